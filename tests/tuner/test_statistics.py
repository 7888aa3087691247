"""What is noted in training, and when it counts."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from tiny import gpt2, inputs, shake
from torch import nn
from torch.utils.checkpoint import checkpoint

from lreg_peft import LRegConfig, LRegLayer, count_hard_samples, track_statistics
from lreg_peft.core import evaluate, project
from lreg_peft.core.mesh import locate
from lreg_peft.tuner.layer import wrap
from lreg_peft.tuner.statistics import MeshStatistics

HEADS = ("full", "reduced", "factored")
COMPONENTS, DOF, IN, OUT = 3, 5, 4, 6
# The two sides add up to a hundred fp32 numbers in different orders.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def tracked(head="full", *, n_rows=1000, n_hard_samples=None, base=None, **options) -> LRegLayer:
    layer = wrap(base or nn.Linear(IN, OUT), IN, OUT, linear=base is None)
    config = LRegConfig(n_components=COMPONENTS, dof=DOF, head=head, **options)
    layer.update_layer("default", COMPONENTS, DOF, config)
    layer.set_adapter("default")
    layer.base_layer.requires_grad_(False)
    shake(layer)
    track_statistics(layer, n_rows=n_rows, n_hard_samples=n_hard_samples)
    return layer.train()


def sums(layer) -> MeshStatistics:
    return layer.lreg_statistics["default"].read(layer.lreg_nodes["default"])


def still(layer, *more) -> torch.optim.Optimizer:
    """An optimiser whose steps change nothing."""
    return torch.optim.SGD([p for p in layer.parameters() if p.requires_grad] + list(more), lr=0.0)


def loss_of(output):
    weight = torch.linspace(-1, 2, OUT)
    return (output * weight).sin().sum()


def expected(layer, features) -> MeshStatistics:
    """The four sums by loops and autograd, in fp64; features last."""
    nodes = layer.lreg_nodes["default"].double().requires_grad_()
    coords = project(features, layer.lreg_projection["default"], layer.lreg_projection_bias["default"]).double()
    coords = coords.detach().reshape(-1, COMPONENTS)
    value = evaluate(coords, nodes, layer.nodal_coefficients("default").detach().double())
    base = layer.base_layer(features).detach().double().reshape(-1, OUT)
    value.retain_grad()
    loss_of(base + value).backward()
    energy, moments = torch.zeros(COMPONENTS, DOF - 1), torch.zeros(COMPONENTS, DOF - 1, 3)
    element, local = locate(coords, nodes.detach())
    for row in range(len(coords)):
        for i in range(COMPONENTS):
            j, t = element[row, i], local[row, i]
            energy[i, j] += value.grad[row].square().sum()
            moments[i, j] += torch.stack(((1 - t) ** 2, t * (1 - t), t**2))
    return MeshStatistics(energy, moments, nodes.grad.float(), torch.zeros(COMPONENTS, DOF - 1))


def assert_same(actual: MeshStatistics, wanted: MeshStatistics, **tolerance) -> None:
    for mine, theirs in zip(actual.tensors(), wanted.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, check_dtype=False, **(tolerance or CLOSE))


def is_empty(statistics: MeshStatistics) -> bool:
    return not any(tensor.any() for tensor in statistics.tensors())


def run(layer, features, optimizer=None):
    """One training step."""
    optimizer = optimizer or still(layer)
    optimizer.zero_grad()
    loss_of(layer(features)).backward()
    optimizer.step()


class TestSums:
    @pytest.mark.parametrize("head", HEADS)
    @pytest.mark.parametrize("train_projection", [True, False])
    def test_equal_loops_and_autograd(self, head, train_projection):
        layer, features = tracked(head, train_projection=train_projection), torch.randn(7, 9, IN)
        run(layer, features)
        wanted = expected(layer, features)
        assert wanted.node_gradient[:, 1:-1].abs().min() > 1e-3
        assert_same(sums(layer), wanted)

    def test_steps_add_up(self):
        layer, features = tracked(), torch.randn(2, 20, IN)
        run(layer, features[0])
        run(layer, features[1])
        assert_same(sums(layer), expected(layer, features))

    def test_channels_first(self):
        conv = nn.Conv2d(IN, OUT, 1)
        layer, features = tracked(base=conv), torch.randn(2, IN, 3, 5)
        output = layer(features)
        loss_of(output.movedim(1, -1)).backward()
        still(layer).step()
        linear = tracked()
        linear.load_state_dict(
            {k: v.squeeze(-1).squeeze(-1) if "base" in k else v for k, v in layer.state_dict().items()}
        )
        assert_same(sums(layer), expected(linear, features.movedim(1, -1)))

    def test_rows_are_a_rotating_sample(self):
        layer, features = tracked(n_rows=8), torch.randn(40, IN)
        run(layer, features)
        assert_same(sums(layer), expected(layer, features[::5]))
        for _ in range(4):
            run(layer, features)
        assert_same(sums(layer), expected(layer, features))

    def test_many_steps_are_sorted_on_the_way(self, monkeypatch):
        monkeypatch.setattr("lreg_peft.tuner.statistics._ROWS_PER_FOLD", 30)
        layer, features = tracked(), torch.randn(6, 20, IN)
        for batch in features:
            run(layer, batch)
        assert len(layer.lreg_statistics["default"]._committed.rows) < 4
        assert_same(sums(layer), expected(layer, features))

    def test_long_accumulation_is_sorted_on_the_way(self, monkeypatch):
        monkeypatch.setattr("lreg_peft.tuner.statistics._ROWS_PER_FOLD", 30)
        layer, features = tracked(), torch.randn(6, 20, IN)
        for batch in features:
            loss_of(layer(batch)).backward()
        assert len(layer.lreg_statistics["default"]._pending.rows) < 4
        still(layer).step()
        assert_same(sums(layer), expected(layer, features))

    def test_rows_without_a_gradient_do_not_count(self):
        layer, features = tracked(), torch.randn(2, 10, IN)
        loss_of(layer(features)[0]).backward()
        still(layer).step()
        assert_same(sums(layer), expected(layer, features[0]))

    def test_rows_that_are_not_finite_do_not_count(self):
        layer, features = tracked(train_projection=False), torch.randn(10, IN)
        wanted = expected(layer, features[:9])
        output = layer(features)
        (loss_of(output[:9]) + output[9].sum() * torch.inf).backward()
        still(layer).step()  # leaves NaN in the coefficients
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
        optimizer = still(layer)
        for _ in range(2):
            optimizer.zero_grad()
            (loss_of(layer(features[0])) + loss_of(layer(features[1]))).backward()
            optimizer.step()
        twice = expected(layer, features)
        assert_same(sums(layer), twice + twice)


class TestWhatCounts:
    def test_nothing_without_a_step(self):
        layer = tracked()
        loss_of(layer(torch.randn(8, IN))).backward()
        assert is_empty(sums(layer))

    def test_nothing_with_the_step_of_another_optimizer(self):
        layer, other = tracked(), nn.Parameter(torch.zeros(1))
        loss_of(layer(torch.randn(8, IN))).backward()
        other.grad = torch.ones(1)
        torch.optim.SGD([other], lr=0.1).step()
        assert is_empty(sums(layer))

    def test_evaluation_does_not_count(self):
        layer, features = tracked(), torch.randn(8, IN)
        layer.eval()
        loss_of(layer(features)).backward()
        still(layer).step()
        layer.train()
        with torch.no_grad():
            layer(features)
        still(layer).step()
        assert is_empty(sums(layer))

    def test_evaluation_between_forward_and_step_leaves_the_step(self):
        layer, features = tracked(), torch.randn(8, IN)
        loss_of(layer(features)).backward()
        with torch.no_grad():
            layer.eval()(torch.randn(30, IN))
        layer.train()
        still(layer).step()
        assert_same(sums(layer), expected(layer, features))

    def test_micro_batches_belong_to_one_step(self):
        layer, features = tracked(), torch.randn(3, 8, IN)
        for batch in features:
            loss_of(layer(batch)).backward()
            assert is_empty(sums(layer))
        still(layer).step()
        assert_same(sums(layer), expected(layer, features))

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointing_counts_once(self, use_reentrant):
        layer, features = tracked(), torch.randn(8, IN, requires_grad=True)
        loss_of(checkpoint(layer, features, use_reentrant=use_reentrant)).backward()
        still(layer).step()
        assert_same(sums(layer), expected(layer, features.detach()))

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointed_micro_batches(self, use_reentrant):
        layer, features = tracked(), torch.randn(2, 8, IN, requires_grad=True)
        for batch in features:
            loss_of(checkpoint(layer, batch, use_reentrant=use_reentrant)).backward()
        still(layer).step()
        assert_same(sums(layer), expected(layer, features.detach()))

    @pytest.mark.parametrize("order", ["clear first", "clear after forward"])
    def test_step_skipped_by_a_scaler_does_not_count(self, order):
        # The overflow happens elsewhere, so that nothing in the layer's own gradients betrays it.
        layer, features, other = tracked(), torch.randn(2, 8, IN), nn.Parameter(torch.ones(()))
        optimizer = still(layer, other)
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        for batch, factor in zip(features, (torch.inf, 1.0), strict=True):
            if order == "clear first":
                optimizer.zero_grad()
            loss = loss_of(layer(batch)) + other * factor
            if order == "clear after forward":
                optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update(1.0)
        assert_same(sums(layer), expected(layer, features[1]))

    def test_skipped_step_of_a_fused_optimizer_does_not_count(self):
        layer, features, other = tracked(n_hard_samples=3), torch.randn(2, 8, IN), nn.Parameter(torch.ones(()))
        optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad] + [other], lr=0.0, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        for batch, factor in zip(features, (torch.inf, 1.0), strict=True):
            optimizer.zero_grad()
            scaler.scale(loss_of(layer(batch)) + other * factor).backward()
            scaler.step(optimizer)
            scaler.update(1.0)
        actual = sums(layer)
        assert actual.hits.sum(dim=1).tolist() == [3] * COMPONENTS
        wanted = expected(layer, features[1])
        assert_same(MeshStatistics(actual.energy, actual.moments, actual.node_gradient, wanted.hits), wanted)

    def test_a_model_nobody_adapts_pays_nothing(self):
        layer = tracked()
        track_statistics(layer, False)
        features = torch.randn(8, IN)
        coords = layer.lreg_projection["default"]
        run(layer, features)
        assert layer.lreg_statistics == {}
        assert not coords._backward_hooks
        assert not layer.lreg_coefficients["default"]._post_accumulate_grad_hooks

    def test_only_meshes_that_can_move_are_tracked(self):
        model = get_peft_model(gpt2(), LRegConfig(target_modules=["mlp"], dof=4, dof_pattern={"h.0.mlp": 2}))
        track_statistics(model)
        assert [len(m.lreg_statistics) for m in model.modules() if isinstance(m, LRegLayer)] == [0, 1]


class TestHits:
    def hits_of(self, layer, features):
        coords = project(features, layer.lreg_projection["default"], layer.lreg_projection_bias["default"])
        element, _ = locate(coords.reshape(-1, COMPONENTS), layer.lreg_nodes["default"])
        return torch.stack([torch.bincount(column, minlength=DOF - 1) for column in element.T]).float()

    def test_samples_with_the_largest_loss(self):
        layer, features = tracked(), torch.randn(9, 2, IN)
        losses = torch.randn(9)
        layer(features).sum().backward()
        count_hard_samples(layer, losses, 4)
        assert is_empty(sums(layer))
        still(layer).step()
        assert torch.equal(sums(layer).hits, self.hits_of(layer, features[losses.argsort(descending=True)[:4]]))

    @pytest.mark.parametrize("flat", [True, False])
    def test_positions_with_the_largest_loss(self, flat):
        layer, features = tracked(), torch.randn(9, 2, IN)
        losses = torch.randn(9, 2)
        output = layer(features)
        count_hard_samples(layer, losses.flatten() if flat else losses, 4)
        output.sum().backward()
        still(layer).step()
        hardest = losses.flatten().argsort(descending=True)[:4]
        assert torch.equal(sums(layer).hits, self.hits_of(layer, features.flatten(0, 1)[hardest]))

    def test_rows_with_the_largest_gradient(self):
        layer, features = tracked(n_hard_samples=4), torch.randn(9, IN)
        weight = torch.randn(9, 1)
        (layer(features) * weight).sum().backward()
        still(layer).step()
        hardest = weight.abs().flatten().argsort(descending=True)[:4]
        assert torch.equal(sums(layer).hits, self.hits_of(layer, features[hardest]))

    def test_errors(self):
        layer, features = tracked(), torch.randn(9, 2, IN)
        with pytest.raises(RuntimeError, match="no training pass"):
            count_hard_samples(layer, torch.randn(9), 2)
        layer(features)
        with pytest.raises(ValueError, match=r"\(9, 2\), got losses of shape \(8,\)"):
            count_hard_samples(layer, torch.randn(8), 2)
        with pytest.raises(ValueError, match="at least 1, got 0"):
            count_hard_samples(layer, torch.randn(9), 0)
        by_gradient = tracked(n_hard_samples=2)
        by_gradient(features)
        with pytest.raises(ValueError, match="already counted by gradient"):
            count_hard_samples(by_gradient, torch.randn(9), 2)
        track_statistics(layer, False)
        with pytest.raises(RuntimeError, match="no statistics are tracked"):
            count_hard_samples(layer, torch.randn(9), 2)
        with pytest.raises(ValueError, match="n_rows must be at least 1, got 0"):
            track_statistics(layer, n_rows=0)


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

    def test_go_with_the_adapter(self):
        model = get_peft_model(gpt2(), LRegConfig(target_modules=["mlp"], dof=4))
        model.add_adapter("other", LRegConfig(target_modules=["mlp"], dof=6))
        track_statistics(model)
        track_statistics(model, adapter_name="other")
        model.set_adapter("other")
        model.delete_adapter("default")
        layers = [module for module in model.modules() if isinstance(module, LRegLayer)]
        assert [list(layer.lreg_statistics) for layer in layers] == [["other"], ["other"]]

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_a_checkpointed_transformer(self, use_reentrant):
        """A whole model, so that the Transformers side of checkpointing takes part."""
        seen = []
        for checkpointing in (False, True):
            model = get_peft_model(gpt2(), LRegConfig(target_modules=["mlp"], dof=4, n_components=2))
            shake(model)
            track_statistics(model)
            if checkpointing:
                model.enable_input_require_grads()
                model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.train()
            batch = inputs("gpt2")
            model(**batch, labels=batch["input_ids"]).loss.backward()
            still(model).step()
            seen.append([sums(m) for m in model.modules() if isinstance(m, LRegLayer)])
        for plain, repeated in zip(*seen, strict=True):
            assert not is_empty(plain)
            assert_same(repeated, plain)
