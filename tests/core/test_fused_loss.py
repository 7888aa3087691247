"""The chunked cross-entropy against torch's own on whole logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lreg_peft.core import fused_loss
from lreg_peft.core.fused_loss import fused_cross_entropy

N, IN, K, CLASSES = 23, 5, 4, 31


def problem(dtype: torch.dtype = torch.float64, *, train_features: bool = False, n: int = N) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "weight": draw(CLASSES, IN),
        "features": draw(n, IN).requires_grad_(train_features),
        "design": draw(n, K).requires_grad_(),
        "table": draw(K, CLASSES).requires_grad_(),
        "targets": torch.randint(CLASSES, (n,), generator=generator),
    }


def fused(p: dict[str, Tensor], **options) -> Tensor:
    return fused_cross_entropy(
        lambda rows: torch.tanh(rows @ p["weight"].T), p["features"], p["targets"], p["design"], p["table"], **options
    )


def whole_logits(p: dict[str, Tensor]) -> Tensor:
    return torch.tanh(p["features"] @ p["weight"].T) + p["design"] @ p["table"]


def grads(loss: Tensor, p: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [t for t in (p["features"], p["design"], p["table"]) if t.requires_grad]))


def linear(p: dict[str, Tensor], *, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(IN, CLASSES, bias=bias).to(p["features"].dtype).requires_grad_(False)
    layer.weight.copy_(p["weight"])
    return layer


@pytest.mark.parametrize("train_features", [False, True])
@pytest.mark.parametrize("rows_per_chunk", [None, 1, 7, 23, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_base_takes_the_other_layout_to_the_same_result(rows_per_chunk, bias, train_features):
    p = problem(train_features=train_features)
    layer = linear(p, bias=bias)
    inputs = (p["features"], p["targets"], p["design"], p["table"])
    results = []
    for base in (layer, lambda rows: layer(rows)):
        loss = fused_cross_entropy(base, *inputs, rows_per_chunk=rows_per_chunk)
        results.append([loss.detach(), *grads(loss, p)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-14)


def test_a_hooked_linear_layer_is_called():
    p, calls = problem(), []
    layer = linear(p)
    layer.register_forward_hook(lambda module, args, output: calls.append(1) or output * 2)
    loss = fused_cross_entropy(layer, p["features"], p["targets"], p["design"], p["table"])
    assert calls
    torch.testing.assert_close(loss, F.cross_entropy(layer(p["features"]) + p["design"] @ p["table"], p["targets"]))


def test_a_linear_layer_with_another_forward_is_called(monkeypatch):
    p = problem()
    layer = linear(p)
    forward = nn.Linear.forward
    for owner, other in ((layer, lambda x: 2 * forward(layer, x)), (nn.Linear, lambda self, x: 2 * forward(self, x))):
        with monkeypatch.context() as patch:
            patch.setattr(owner, "forward", other)
            loss = fused_cross_entropy(layer, p["features"], p["targets"], p["design"], p["table"])
        logits = 2 * layer(p["features"]) + p["design"] @ p["table"]
        torch.testing.assert_close(loss, F.cross_entropy(logits, p["targets"]))


@pytest.fixture(params=["one block", "blocks of 8"])
def block(request, monkeypatch):
    if request.param == "blocks of 8":
        monkeypatch.setattr(fused_loss, "_CPU_BLOCK_BYTES", 0)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("train_features", [False, True])
@pytest.mark.parametrize("rows_per_chunk", [None, 1, 7, 23, 100])
def test_equals_cross_entropy_and_its_gradients(rows_per_chunk, train_features):
    p = problem(train_features=train_features)
    loss = fused(p, rows_per_chunk=rows_per_chunk)
    expected = F.cross_entropy(whole_logits(p), p["targets"])
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    for mine, theirs in zip(grads(3 * loss, p), grads(3 * expected, p), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-14)


def test_relative_error_in_single_precision():
    single, double = problem(torch.float32), problem()
    expected = F.cross_entropy(whole_logits(double), double["targets"])
    loss = fused(single)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for mine, theirs in zip(grads(loss, single), grads(expected, double), strict=True):
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm()


def test_extreme_logits():
    p = problem(torch.float32)
    p["weight"] = torch.zeros_like(p["weight"])
    with torch.no_grad():
        p["table"] *= 300
    loss = fused(p)
    expected = F.cross_entropy(whole_logits(p), p["targets"])
    assert expected > 100
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_a_half_precision_base_is_summed_in_single_precision():
    p = problem(torch.bfloat16, n=300)
    loss = fused(p)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(whole_logits(p).float(), p["targets"]), rtol=1e-2, atol=0)
    assert [g.dtype for g in grads(loss, p)] == [torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("normaliser", [7, torch.tensor(7), 7.0])
def test_normaliser(normaliser):
    p = problem()
    torch.testing.assert_close(fused(p, normaliser=normaliser), fused(p) * N / 7)
    torch.testing.assert_close(grads(fused(p, normaliser=normaliser), p)[1], grads(fused(p) * N / 7, p)[1])


def test_without_a_shortcut():
    p = problem(train_features=True)
    base = lambda rows: rows @ p["weight"].T  # noqa: E731
    loss = fused_cross_entropy(base, p["features"], p["targets"], rows_per_chunk=4)
    expected = F.cross_entropy(base(p["features"]), p["targets"])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, p["features"])[0] for x in (loss, expected)))


def test_a_base_that_returns_its_input_keeps_it():
    features = torch.randn(N, CLASSES)
    before = features.clone()
    p = problem(torch.float32)
    loss = fused_cross_entropy(lambda rows: rows, features, p["targets"], p["design"], p["table"])
    assert torch.equal(features, before)
    torch.testing.assert_close(loss, F.cross_entropy(features + p["design"] @ p["table"], p["targets"]))


class Sizes(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("train_features", [False, True])
def test_no_tensor_is_larger_than_the_logits_of_a_chunk(train_features):
    p = problem(train_features=train_features, n=200)
    with Sizes() as sizes:
        fused(p, rows_per_chunk=40).backward()
    assert sizes.largest == 40 * CLASSES
    with Sizes() as sizes:
        F.cross_entropy(whole_logits(p), p["targets"]).backward()
    assert sizes.largest == 200 * CLASSES


def test_saves_the_gradients_of_its_small_inputs_only():
    p = problem(n=200)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        fused(p)
    assert sorted(saved) == [K * CLASSES, 200 * K]


def test_second_derivatives_are_refused():
    p = problem()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(fused(p), p["table"], create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(3, dtype=torch.long)}, "features must be"),
        ({"targets": torch.zeros(N)}, "whole numbers"),
        ({"features": torch.zeros(2, N, IN)}, "features must be"),
        ({"design": None}, "go together"),
        ({"design": torch.zeros(N, K + 1)}, r"got \(23, 5\) and \(4, 31\) for n = 23"),
    ],
)
def test_wrong_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        fused({**problem(), **change})


def test_wrong_options():
    with pytest.raises(ValueError, match="rows_per_chunk must be at least 1, got 0"):
        fused(problem(), rows_per_chunk=0)
