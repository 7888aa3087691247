"""What is noted in training, and what counts."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from tiny import gpt2, inputs, layers, shake
from torch import nn
from torch.utils.checkpoint import checkpoint

from lreg_peft import LRegConfig, LRegLayer, track_statistics
from lreg_peft.core import evaluate
from lreg_peft.core.mesh import locate
from lreg_peft.training.statistics import MeshStatistics, statistics_of
from lreg_peft.tuner.layout import UNSAID, Reading
from lreg_peft.tuner.sites import Site

WEIGHTINGS = ("full", "reduced", "factored")
COMPONENTS, N_NODES, IN, OUT = 3, 5, 4, 6
# The two sides add up to a hundred fp32 numbers in different orders.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


class Merging(nn.Module):
    """Makes one token of the four of a square, as the stages of image transformers do."""

    def __init__(self):
        super().__init__()
        self.merge = nn.Conv2d(IN, OUT, 2, stride=2)

    def forward(self, tokens):
        return self.merge(tokens.unflatten(1, (4, 4)).movedim(-1, 1)).flatten(2).transpose(1, 2)


def tracked(weighting="full", *, n_rows=1000, n_hard_samples=None, base=None, reading=UNSAID, **options) -> LRegLayer:
    layer = LRegLayer(base or nn.Linear(IN, OUT), IN, OUT)
    config = LRegConfig(preset="paper", n_components=COMPONENTS, n_nodes=N_NODES, weighting=weighting, **options)
    layer.update_layer("default", COMPONENTS, N_NODES, config, reading=reading)
    layer.set_adapter("default")
    layer.base_layer.requires_grad_(False)
    shake(layer)
    track_statistics(layer, n_rows=n_rows, n_hard_samples=n_hard_samples)
    return layer.train()


def gathering(layer, name="default"):
    return statistics_of(Site("", layer, name))


def sums(layer) -> MeshStatistics:
    return gathering(layer).read()


def n_hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def run_model(model):
    batch = inputs("gpt2")
    model(**batch, labels=batch["input_ids"]).loss.backward()


def loss_of(output):
    weight = torch.linspace(-1, 2, OUT)
    return (output * weight).sin().sum()


def expected(layer, features) -> MeshStatistics:
    """The four sums by loops and autograd, in fp64; features last."""
    nodes = layer.lreg_encoder["default"].nodes.double().requires_grad_()
    coords = layer.coords("default", features).detach().double().reshape(-1, COMPONENTS)
    value = layer.scaling["default"] * evaluate(coords, nodes, layer.nodal_coefficients("default").detach().double())
    base = layer.base_layer(features).detach().double().reshape(-1, OUT)
    value.retain_grad()
    loss_of(base + value).backward()
    energy, moments = torch.zeros(COMPONENTS, N_NODES - 1), torch.zeros(COMPONENTS, N_NODES - 1, 3)
    element, local = locate(coords, nodes.detach())
    for row in range(len(coords)):
        for i in range(COMPONENTS):
            j, t = element[row, i], local[row, i]
            energy[i, j] += value.grad[row].square().sum()
            moments[i, j] += torch.stack(((1 - t) ** 2, t * (1 - t), t**2))
    return MeshStatistics(energy, moments, nodes.grad.float(), torch.zeros(COMPONENTS, N_NODES - 1))


def assert_same(actual: MeshStatistics, wanted: MeshStatistics, **tolerance) -> None:
    for mine, theirs in zip(actual, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, check_dtype=False, **(tolerance or CLOSE))


def is_empty(statistics: MeshStatistics) -> bool:
    return not any(tensor.any() for tensor in statistics)


def run(layer, features):
    """One training pass."""
    loss_of(layer(features)).backward()


class TestSums:
    @pytest.mark.parametrize("weighting", WEIGHTINGS)
    @pytest.mark.parametrize("train_projection", [True, False])
    def test_equal_loops_and_autograd(self, weighting, train_projection):
        layer, features = tracked(weighting, train_projection=train_projection), torch.randn(7, 9, IN)
        run(layer, features)
        wanted = expected(layer, features)
        assert wanted.node_gradient[:, 1:-1].abs().min() > 1e-3
        assert_same(sums(layer), wanted)

    @pytest.mark.parametrize("weighting", WEIGHTINGS)
    def test_of_a_scaled_shortcut(self, weighting):
        layer, features = tracked(weighting), torch.randn(7, 9, IN)
        layer.set_scale("default", 0.3)
        run(layer, features)
        assert_same(sums(layer), expected(layer, features))

    def test_under_autocast(self):
        layer, features = tracked(), torch.randn(50, IN)
        wanted = expected(layer, features)
        with torch.autocast("cpu", torch.bfloat16):
            run(layer, features)  # the backward pass as well, as some loops have it
        actual = sums(layer)
        # bf16 has 8 bits; squares and sums of positive numbers keep that.
        assert (actual.energy.sum() / wanted.energy.sum() - 1).abs() < 0.05
        assert_same(MeshStatistics(wanted.energy, actual.moments, wanted.node_gradient, wanted.hits), wanted)

    def test_passes_add_up(self):
        layer, features = tracked(), torch.randn(2, 20, IN)
        run(layer, features[0])
        run(layer, features[1])
        assert_same(sums(layer), expected(layer, features))

    def test_channels_first(self):
        conv = nn.Conv2d(IN, OUT, 1)
        layer, features = tracked(base=conv), torch.randn(2, IN, 3, 5)
        output = layer(features)
        loss_of(output.movedim(1, -1)).backward()
        linear = tracked()
        linear.load_state_dict(
            {k: v.squeeze(-1).squeeze(-1) if "base" in k else v for k, v in layer.state_dict().items()}
        )
        assert_same(sums(layer), expected(linear, features.movedim(1, -1)))

    @pytest.mark.parametrize("layout", ["channels_first", "grid", "line"])
    @pytest.mark.parametrize("n_rows", [1000, 5])
    def test_where_the_output_has_fewer_positions(self, layout, n_rows):
        """As if every position had its own value before the average of four is taken."""
        base = {"channels_first": nn.Conv2d(IN, OUT, 2, stride=2), "grid": Merging(), "line": nn.Conv1d(IN, OUT, 4, 4)}
        layer = tracked(base=base[layout], reading=Reading("grid") if layout == "grid" else UNSAID, n_rows=n_rows)
        shape = {"channels_first": (2, IN, 4, 4), "grid": (2, 16, IN), "line": (2, IN, 16)}[layout]
        features = torch.randn(shape)
        output = layer(features)
        output.retain_grad()
        output.sin().square().sum().backward()
        gradient = output.grad if layout == "grid" else output.grad.flatten(2).transpose(1, 2)  # [2, 4, OUT]
        if layout == "line":
            everywhere = gradient.repeat_interleave(4, dim=1) / 4
        else:
            image = gradient.unflatten(1, (2, 2)) / 4
            everywhere = image.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1, 2)
        rows = features if layout == "grid" else features.flatten(2).transpose(1, 2)
        stride = 1 if n_rows == 1000 else 7
        coords, energy = layer.coords("default", rows).flatten(0, 1)[::stride], everywhere.square().sum(-1).flatten()
        element, _ = locate(coords.detach(), layer.lreg_encoder["default"].nodes)
        expected = torch.zeros(COMPONENTS, N_NODES - 1)
        expected.scatter_add_(1, element.T, energy[::stride].expand(COMPONENTS, -1))
        torch.testing.assert_close(sums(layer).energy, expected)

    def test_rows_are_a_rotating_sample(self):
        layer, features = tracked(n_rows=8), torch.randn(40, IN)
        run(layer, features)
        assert_same(sums(layer), expected(layer, features[::5]))
        for _ in range(4):
            run(layer, features)
        assert_same(sums(layer), expected(layer, features))

    def test_many_passes_are_those_of_one(self):
        """More rows than are kept before they are summed."""
        features = torch.randn(10, 1000, IN)
        base = nn.Linear(IN, OUT)
        in_passes, at_once = tracked(n_rows=1000, base=base), tracked(n_rows=10_000, base=base)
        for batch in features:
            run(in_passes, batch)
        run(at_once, features)
        assert_same(sums(in_passes), sums(at_once), rtol=1e-4, atol=1e-3)  # sums of 10,000 fp32 terms in another order

    def test_rows_without_a_gradient_do_not_count(self):
        layer, features = tracked(), torch.randn(2, 10, IN)
        loss_of(layer(features)[0]).backward()
        assert_same(sums(layer), expected(layer, features[0]))

    def test_rows_that_are_not_finite_do_not_count(self):
        layer, features = tracked(train_projection=False), torch.randn(10, IN)
        wanted = expected(layer, features[:9])
        output = layer(features)
        (loss_of(output[:9]) + output[9].sum() * torch.inf).backward()
        assert_same(sums(layer), wanted)

    def test_low_precision_model(self):
        layer, features = tracked(), torch.randn(50, IN)
        wanted = expected(layer, features)
        layer.to(torch.bfloat16)
        run(layer, features.bfloat16())
        actual = sums(layer)
        assert actual.energy.dtype == torch.float32
        # bf16 has 8 bits; squares and sums of positive numbers keep that.
        assert (actual.energy.sum() / wanted.energy.sum() - 1).abs() < 0.05

    def test_a_module_used_twice_counts_twice(self):
        layer, features = tracked(), torch.randn(2, 10, IN)
        (loss_of(layer(features[0])) + loss_of(layer(features[1]))).backward()
        assert_same(sums(layer), expected(layer, features))

    def test_two_adapters_of_one_module(self):
        layer, features = tracked(), torch.randn(30, IN)
        layer.update_layer("other", 2, 4, LRegConfig(preset="paper", n_components=2, n_nodes=4))
        layer.set_adapter(["default", "other"])
        shake(layer, "other", seed=5)
        track_statistics(layer, n_rows=1000)
        output = layer(features)
        output.retain_grad()
        loss_of(output).backward()
        for name in ("default", "other"):
            energy = gathering(layer, name).read().energy
            torch.testing.assert_close(energy.sum(dim=1), output.grad.square().sum().expand(len(energy)))


class TestWhatCounts:
    def test_evaluation_does_not_count(self):
        layer, features = tracked(), torch.randn(8, IN)
        layer.eval()
        loss_of(layer(features)).backward()
        layer.train()
        with torch.no_grad():
            layer(features)
        assert is_empty(sums(layer))

    def test_a_forward_pass_alone_does_not_count(self):
        layer = tracked()
        layer(torch.randn(8, IN))
        assert is_empty(sums(layer))

    def test_evaluation_between_forward_and_backward_leaves_the_pass(self):
        layer, features = tracked(), torch.randn(8, IN)
        loss = loss_of(layer(features))
        with torch.no_grad():
            layer.eval()(torch.randn(30, IN))
        layer.train()
        loss.backward()
        assert_same(sums(layer), expected(layer, features))

    def test_micro_batches_add_up(self):
        layer, features = tracked(), torch.randn(3, 8, IN)
        for batch in features:
            run(layer, batch)
        assert_same(sums(layer), expected(layer, features))

    @pytest.mark.parametrize("train_projection", [True, False])
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointing_counts_once(self, use_reentrant, train_projection):
        layer = tracked(n_hard_samples=3, train_projection=train_projection)
        features = torch.randn(2, 8, IN, requires_grad=True)
        for batch in features:
            loss_of(checkpoint(layer, batch, use_reentrant=use_reentrant)).backward()
        actual, wanted = sums(layer), expected(layer, features.detach())
        assert actual.hits.sum(dim=1).tolist() == [6] * COMPONENTS
        assert_same(MeshStatistics(actual.energy, actual.moments, actual.node_gradient, wanted.hits), wanted)

    def test_frozen_shortcuts_do_not_count(self):
        layer = tracked()
        layer.requires_grad_(False)
        features = torch.randn(8, IN, requires_grad=True)
        run(layer, features)  # the gradient passes through on its way to modules below
        assert_same(sums(layer), expected(layer, features.detach()))
        layer(features.detach())
        assert_same(sums(layer), expected(layer, features.detach()))

    def test_hooks_are_gone_when_it_ends(self):
        model = get_peft_model(gpt2(), LRegConfig(target_modules=["mlp"], n_nodes=4))
        before = n_hooks(model)
        track_statistics(model)
        assert n_hooks(model) == before + 4
        track_statistics(model, n_rows=5)  # again, in place of the first
        assert n_hooks(model) == before + 4
        track_statistics(model, False)
        assert n_hooks(model) == before
        run_model(model)
        assert all(gathering(layer) is None for layer in layers(model))

    def test_sharded_coefficients_are_refused_at_once(self):
        layer = tracked()
        track_statistics(layer, False)
        layer.lreg_coefficients["default"].weight = nn.Parameter(torch.zeros(10))  # as FSDP leaves them between passes
        with pytest.raises(RuntimeError, match="are sharded over processes, and meshes move on whole ones"):
            track_statistics(layer)
        assert n_hooks(layer) == 0

    def test_only_meshes_that_can_move_are_tracked(self):
        model = get_peft_model(gpt2(), LRegConfig(target_modules=["mlp"], n_nodes=4, node_pattern={"h.0.mlp": 2}))
        track_statistics(model)
        assert [gathering(layer) is None for layer in layers(model)] == [True, False]


class TestHits:
    def hits_of(self, layer, features):
        coords = layer.coords("default", features).detach()
        element, _ = locate(coords.reshape(-1, COMPONENTS), layer.lreg_encoder["default"].nodes)
        return torch.stack([torch.bincount(column, minlength=N_NODES - 1) for column in element.T]).float()

    def test_rows_with_the_largest_gradient(self):
        layer, features = tracked(n_hard_samples=4), torch.randn(9, IN)
        weight = torch.randn(9, 1)
        (layer(features) * weight).sum().backward()
        hardest = weight.abs().flatten().argsort(descending=True)[:4]
        assert torch.equal(sums(layer).hits, self.hits_of(layer, features[hardest]))


class TestState:
    def test_not_in_the_state_dict(self):
        layer = tracked()
        before = set(layer.state_dict())
        run(layer, torch.randn(8, IN))
        assert set(layer.state_dict()) == before

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
    def test_copies_gather_on_their_own(self, copied):
        layer, features = tracked(), torch.randn(8, IN)
        run(layer, features)
        twin = copied(layer)
        assert is_empty(sums(twin))
        run(twin, features)
        assert_same(sums(twin), expected(layer, features))
        assert_same(sums(layer), expected(layer, features))

    def test_a_copy_ends_on_its_own(self):
        layer = tracked()
        twin = copy.deepcopy(layer)
        track_statistics(twin, False)
        assert n_hooks(twin) == 0
        run(layer, torch.randn(8, IN))
        assert not is_empty(sums(layer))

    def test_go_with_the_adapter(self):
        model = get_peft_model(gpt2(), LRegConfig(target_modules=["mlp"], n_nodes=4))
        model.add_adapter("other", LRegConfig(target_modules=["mlp"], n_nodes=6))
        track_statistics(model)
        track_statistics(model, adapter_name="other")
        model.set_adapter("other")
        model.delete_adapter("default")
        assert all(gathering(layer, "other") is not None for layer in layers(model))
        model.add_adapter("default", LRegConfig(target_modules=["mlp"], n_nodes=4))
        assert all(gathering(layer) is None for layer in layers(model))

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_a_checkpointed_transformer(self, use_reentrant):
        """A whole model, so that the Transformers side of checkpointing takes part."""
        seen = []
        for checkpointing in (False, True):
            base = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
            model = get_peft_model(base, LRegConfig(target_modules=["mlp"], n_nodes=4, n_components=2))
            shake(model)
            track_statistics(model)
            if checkpointing:
                model.enable_input_require_grads()
                model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.train()
            run_model(model)
            seen.append([sums(layer) for layer in layers(model)])
        for plain, repeated in zip(*seen, strict=True):
            assert not is_empty(plain)
            assert_same(repeated, plain)
