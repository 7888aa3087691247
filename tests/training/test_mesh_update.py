"""Meshes that move in training: what moves with them, what must stay, what is refused."""

import copy
import warnings

import adaptation_failures
import adaptation_run
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from processes import run_on_two
from tiny import gpt2, inputs, layers, same_state, shake, state
from torch import nn

from lreg_peft import LRegConfig, LRegLayer, track_statistics, update_meshes
from lreg_peft.training.statistics import statistics_of
from lreg_peft.tuner.moves import Move
from lreg_peft.tuner.sites import Site

WEIGHTINGS = ("full", "reduced", "factored")
OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AMSGrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
}
EPS = torch.finfo(torch.float32).eps


def toy(weighting="full", *, n_nodes=9, components=2, track=True, **options) -> LRegLayer:
    """A shortcut around nothing, from one feature to two."""
    layer = LRegLayer(nn.Linear(1, 2), 1, 2)
    layer.update_layer(
        "default",
        components,
        n_nodes,
        LRegConfig(preset="paper", n_components=components, n_nodes=n_nodes, weighting=weighting, **options),
    )
    layer.set_adapter("default")
    layer.base_layer.requires_grad_(False).weight.zero_()
    shake(layer)
    if track:
        track_statistics(layer)
    return layer.train()


def target(x):
    u = x.sigmoid()
    return torch.cat(((120 * (u - 0.83)).tanh(), 1.0 * ((u > 0.3) & (u < 0.35))), dim=1)


def parameters(layer):
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def step(layer, optimizer, x):
    optimizer.zero_grad()
    loss = (layer(x) - target(x)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def trained(weighting="full", kind="AdamW", n_steps=5):
    layer, x = toy(weighting), 2 * torch.randn(100, 1)
    optimizer = OPTIMIZERS[kind](parameters(layer))
    for _ in range(n_steps):
        step(layer, optimizer, x)
    return layer, optimizer, x


def nodes_of(layer):
    return layer.lreg_encoder["default"].nodes


def sums(layer):
    return statistics_of(Site("", layer, "default")).read()


def nodal(layer, values):
    """`[components, n_nodes, ...]`."""
    return layer.lreg_encoder["default"].to_nodes(values)


def snapshot(layer, optimizer):
    held = optimizer.state[layer.nodal_parameter("default")]
    return {
        "nodes": nodes_of(layer).clone(),
        "values": layer.nodal_parameter("default").detach().clone(),
        **{k: v.clone() for k, v in held.items() if isinstance(v, torch.Tensor)},
    }


class TestCarrying:
    @pytest.mark.parametrize("weighting", WEIGHTINGS)
    @pytest.mark.parametrize("kind", OPTIMIZERS)
    def test_everything_on_the_mesh_is_interpolated(self, weighting, kind):
        layer, optimizer, _ = trained(weighting, kind)
        before = snapshot(layer, optimizer)
        assert update_meshes(layer, optimizer).accepted
        after = snapshot(layer, optimizer)
        assert not torch.equal(before["nodes"], after["nodes"])
        for name in before.keys() - {"nodes", "step"}:
            old, new = nodal(layer, before[name]), nodal(layer, after[name])
            assert not torch.equal(old, new)
            for i in range(old.shape[0]):
                for column in np.ndindex(old.shape[2:]):
                    wanted = np.interp(after["nodes"][i], before["nodes"][i], old[(i, slice(None), *column)])
                    # Local coordinates carry a few roundings, over elements that can be a tenth of the mesh.
                    np.testing.assert_allclose(new[(i, slice(None), *column)], wanted, atol=100 * EPS * old.abs().max())
        if "step" in before:
            assert torch.equal(before["step"], after["step"])

    @pytest.mark.parametrize("kind", ["AdamW", "AMSGrad"])
    def test_second_moments_stay_non_negative(self, kind):
        layer, optimizer, x = trained("full", kind)
        for _ in range(10):
            step(layer, optimizer, x)
            update_meshes(layer, optimizer)
            after = snapshot(layer, optimizer)
            assert all((after[name] >= 0).all() for name in after if "sq" in name)

    @pytest.mark.parametrize("weighting", WEIGHTINGS)
    def test_in_place_with_rising_nodes(self, weighting):
        layer, optimizer, x = trained(weighting)
        held = optimizer.state[layer.nodal_parameter("default")]
        tensors = [nodes_of(layer), layer.nodal_parameter("default"), held["exp_avg"], held["exp_avg_sq"]]
        addresses = [tensor.data_ptr() for tensor in tensors]
        for _ in range(30):
            step(layer, optimizer, x)
            update_meshes(layer, optimizer)
            nodes = nodes_of(layer)
            assert (nodes.diff(dim=1) > 0).all() and (nodes[:, 0] == 0).all() and (nodes[:, -1] == 1).all()
        assert [tensor.data_ptr() for tensor in tensors] == addresses

    def test_what_is_not_on_the_mesh_stays(self):
        layer, optimizer, _ = trained("factored")
        before = state(layer)
        update_meshes(layer, optimizer)
        after = state(layer)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"lreg_encoder.default.nodes", "lreg_encoder.default.weight"}

    def test_without_an_optimizer_its_state_stays(self):
        layer, optimizer, _ = trained()
        before = snapshot(layer, optimizer)
        update_meshes(layer)
        after = snapshot(layer, optimizer)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"nodes", "values"}

    def test_wrapped_optimizer(self):
        layer, optimizer, _ = trained()
        torch.manual_seed(0)
        twin, twin_optimizer, _ = trained()
        update_meshes(layer, Accelerator(cpu=True).prepare_optimizer(optimizer))
        update_meshes(twin, twin_optimizer)
        one, other = snapshot(layer, optimizer), snapshot(twin, twin_optimizer)
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_report(self):
        layer, optimizer, _ = trained()
        old = nodes_of(layer).clone()
        update = update_meshes(layer, optimizer)
        new = nodes_of(layer)
        assert update.n_moved == sum(len(set(new[i].tolist()) - set(old[i].tolist())) for i in range(2)) > 0

    def test_hits_move_the_mesh_of_the_paper(self):
        layer, x = toy(track=False), 2 * torch.randn(100, 1)
        track_statistics(layer, n_hard_samples=10)
        step(layer, torch.optim.SGD(parameters(layer), lr=0.01), x)
        gathered = sums(layer)
        assert update_meshes(layer, strategy="paper").accepted
        lengths = nodes_of(layer).diff(dim=1)
        assert lengths[gathered.hits > 0].mean() < lengths[gathered.hits == 0].mean()


class TestAcceptance:
    def losses(self, *values):
        given = iter(values)
        return lambda: next(given)

    @pytest.mark.parametrize("weighting", WEIGHTINGS)
    @pytest.mark.parametrize("after", [1.5, float("nan")])
    def test_refused_moves_leave_no_trace(self, weighting, after):
        layer, optimizer, _ = trained(weighting)
        before, held = state(layer), snapshot(layer, optimizer)
        update = update_meshes(layer, optimizer, accept=self.losses(1.0, after))
        assert update.refused and not update.accepted and update.n_moved > 0
        assert (update.loss_before, str(update.loss_after)) == (1.0, str(after))
        assert same_state(before, state(layer))
        now = snapshot(layer, optimizer)
        assert all(torch.equal(held[name], now[name]) for name in held)

    @pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt(), StopIteration()])
    @pytest.mark.parametrize("failing", [1, 2])
    @pytest.mark.parametrize("weighting", WEIGHTINGS)
    def test_a_loss_that_fails_leaves_no_trace(self, weighting, failing, error):
        layer, optimizer, _ = trained(weighting)
        before, held = state(layer), snapshot(layer, optimizer)
        gathered = sums(layer)
        calls = []

        def accept():
            calls.append(nodes_of(layer).clone())
            if len(calls) == failing:
                raise error
            return 1.0

        with pytest.raises(type(error)):
            update_meshes(layer, optimizer, accept=accept)
        assert len(calls) == failing
        assert torch.equal(calls[-1], before["lreg_encoder.default.nodes"]) is (
            failing == 1
        )  # the second sees the move
        assert same_state(before, state(layer))
        now = snapshot(layer, optimizer)
        assert held.keys() == now.keys() and all(torch.equal(held[name], now[name]) for name in held)
        # What was gathered is still there for the next try.
        again = sums(layer)
        assert all(torch.equal(one, other) for one, other in zip(gathered, again, strict=True))
        assert update_meshes(layer, optimizer, accept=lambda: 1.0).accepted

    @pytest.mark.parametrize("accept", [None, lambda: 1.0])
    def test_a_move_that_breaks_off_half_way_is_undone(self, accept, monkeypatch):
        model = nn.Sequential(toy(), nn.Linear(2, 1), toy("factored"))
        optimizer = torch.optim.AdamW(parameters(model), lr=0.01)
        model(torch.randn(50, 1)).sum().backward()
        optimizer.step()
        before, moments = state(model), copy.deepcopy(optimizer.state_dict())
        applied = []

        def apply(move):
            applied.append(move)
            if len(applied) == 2:
                move.site.nodes.copy_(move.mesh.nodes)
                raise KeyboardInterrupt
            original(move)

        original = Move.apply
        monkeypatch.setattr(Move, "apply", apply)
        with pytest.raises(KeyboardInterrupt):
            update_meshes(model, optimizer, accept=accept)
        assert len(applied) == 2 and same_state(before, state(model))
        for index, entry in optimizer.state_dict()["state"].items():
            assert all(torch.equal(value, moments["state"][index][name]) for name, value in entry.items())

    @pytest.mark.parametrize("loss", [None, torch.zeros(2)])
    def test_a_loss_that_is_no_number(self, loss):
        layer, optimizer, _ = trained()
        before = state(layer)
        with pytest.raises((TypeError, ValueError), match=r"not 'NoneType'|only one element tensors"):
            update_meshes(layer, optimizer, accept=lambda: loss)
        assert same_state(before, state(layer))

    def test_equal_loss_is_kept(self):
        layer, optimizer, _ = trained()
        before = nodes_of(layer).clone()
        update = update_meshes(layer, optimizer, accept=self.losses(1.0, 1.0))
        assert update.accepted and not update.refused
        assert not torch.equal(before, nodes_of(layer))

    @pytest.mark.parametrize(("after", "accepted"), [(-1.96, True), (-1.94, False)])
    def test_tolerance(self, after, accepted):
        layer, optimizer, _ = trained()
        update = update_meshes(layer, optimizer, accept=self.losses(-2.0, after), tolerance=0.025)
        assert update.accepted is accepted

    def test_sees_the_loss_on_both_meshes(self):
        layer, optimizer, _ = trained()
        seen = []

        def accept():
            seen.append((nodes_of(layer).clone(), torch.is_grad_enabled()))
            return 1.0

        old = nodes_of(layer).clone()
        update_meshes(layer, optimizer, accept=accept)
        assert torch.equal(seen[0][0], old) and torch.equal(seen[1][0], nodes_of(layer))
        assert not seen[0][1] and not seen[1][1]

    def test_statistics_start_anew(self):
        layer, optimizer, x = trained()
        update_meshes(layer, optimizer, accept=self.losses(1.0, 2.0))
        with pytest.raises(RuntimeError, match="no statistics were gathered since the last update"):
            update_meshes(layer, optimizer)
        step(layer, optimizer, x)
        assert update_meshes(layer, optimizer).accepted

    def test_nothing_to_move_asks_nobody(self):
        layer, optimizer, _ = trained()
        update = update_meshes(layer, optimizer, accept=self.losses(), strategy="relocate", n_refine=0, size=1e-30)
        assert update.n_moved == 0
        assert not update.accepted and not update.refused and update.loss_before is None


class TestErrors:
    def test_no_layer(self):
        with pytest.raises(ValueError, match=r"\(Linear\) has no LReg layer.*get_peft_model"):
            update_meshes(nn.Linear(2, 2))

    def test_no_node_that_could_move(self):
        with pytest.raises(ValueError, match=r"every mesh has n_nodes=2.*3 or more"):
            update_meshes(toy(n_nodes=2, track=False))

    def test_no_such_adapter(self):
        with pytest.raises(ValueError, match=r"named 'other'.*\['default'\]"):
            update_meshes(toy(), adapter_name="other")

    def test_not_tracked(self):
        with pytest.raises(RuntimeError, match="Call track_statistics"):
            update_meshes(toy(track=False))

    def test_nothing_gathered(self):
        layer, optimizer, x = trained(n_steps=0)
        layer.eval()
        step(layer, optimizer, x)
        with pytest.raises(RuntimeError, match="the backward passes of training passes"):
            update_meshes(layer, optimizer)

    def test_no_hits(self):
        layer, optimizer, _ = trained()
        with pytest.raises(RuntimeError, match=r"track_statistics\(model, n_hard_samples=k\)"):
            update_meshes(layer, optimizer, strategy="paper")

    def test_optimizer_of_something_else(self):
        layer, _, _ = trained()
        before = state(layer)
        with pytest.raises(ValueError, match=r"\(SGD\) does not hold the coefficients"):
            update_meshes(layer, torch.optim.SGD([nn.Parameter(torch.zeros(1))]))
        assert same_state(before, state(layer))

    def test_quantised_state(self):
        layer, optimizer, _ = trained()
        held = optimizer.state[layer.nodal_parameter("default")]
        held["state1"] = torch.zeros_like(held["exp_avg"], dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"'state1'.*torch.uint8"):
            update_meshes(layer, optimizer)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"strategy": "best"}, ValueError, "strategy must be one of"),
            ({"tolerance": float("nan")}, ValueError, "tolerance must be at least 0, got nan"),
            ({"n_refine": -1}, ValueError, "n_refine must be at least 0, got -1"),
            ({"n_refine": True}, TypeError, "n_refine must be a whole number"),
            ({"size": 1.5}, ValueError, "size must be at most 1, got 1.5"),
            ({"optimizer": "AdamW"}, TypeError, "optimizer must be a torch optimizer"),
        ],
    )
    def test_options(self, options, error, message):
        layer, optimizer, _ = trained()
        before, held = state(layer), snapshot(layer, optimizer)
        with pytest.raises(error, match=message):
            update_meshes(layer, **{"optimizer": optimizer, **options})
        now = snapshot(layer, optimizer)
        assert same_state(before, state(layer)) and all(torch.equal(held[name], now[name]) for name in held)

    def test_options_of_the_statistics(self):
        layer = toy()
        tracked = statistics_of(Site("", layer, "default"))
        for options in ({"n_rows": 0}, {"n_hard_samples": 0}):
            with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least 1, got 0"):
                track_statistics(layer, **options)
        assert statistics_of(Site("", layer, "default")) is tracked


class TestInModels:
    def batch(self):
        batch = inputs("gpt2")
        return {**batch, "labels": batch["input_ids"]}

    def adapted(self, native=False):
        config = LRegConfig(target_modules=["mlp"], n_components=2, n_nodes=6)
        model = gpt2()
        if native:
            model.add_adapter(config)
        else:
            model = get_peft_model(model, config)
        shake(model)
        return model.train()

    @pytest.mark.parametrize("native", [False, True])
    def test_the_manual_loop(self, native):
        model = self.adapted(native)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        before = [nodes_of(layer).clone() for layer in layers(model)]
        track_statistics(model)
        for i in range(1, 7):
            model(**self.batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if i % 3 == 0:
                assert update_meshes(model, optimizer).accepted
        for layer, nodes in zip(layers(model), before, strict=True):
            assert not torch.equal(nodes_of(layer), nodes)

    def test_wrapped_in_another_module(self):
        model = self.adapted()
        track_statistics(nn.Sequential(model))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(**self.batch()).loss.backward()
        optimizer.step()
        assert update_meshes(nn.Sequential(model), optimizer).accepted

    def test_moving_meshes_lower_the_training_loss(self):
        losses = {}
        for moving in (False, True):
            torch.manual_seed(0)
            layer, x = toy(components=1, n_nodes=12, track=moving, train_projection=False), 2 * torch.randn(200, 1)
            layer.lreg_projection["default"].weight.data.fill_(1.0)
            layer.lreg_projection["default"].bias.data.zero_()
            optimizer = torch.optim.Adam(parameters(layer), lr=0.03)
            for i in range(1, 401):
                losses[moving] = step(layer, optimizer, x)
                if moving and i % 20 == 0 and i <= 300:
                    update_meshes(layer, optimizer)
        assert losses[True] < 0.2 * losses[False]

    @pytest.mark.slow
    def test_compiled_model_does_not_recompile_when_nodes_move(self):
        from torch._dynamo.testing import CompileCounter

        model, x = nn.Sequential(toy(), nn.Tanh(), nn.Linear(2, 1), toy("factored")), torch.randn(20, 1)
        optimizer = torch.optim.AdamW(parameters(model), lr=1e-2)
        twin = copy.deepcopy(model)
        twin_optimizer = torch.optim.AdamW(parameters(twin), lr=1e-2)
        counter = CompileCounter()
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=counter)
        frames = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch looks at .grad of the tensors where a graph breaks
            for _ in range(3):
                step(compiled, optimizer, x)
                step(twin, twin_optimizer, x)
                assert update_meshes(compiled, optimizer).accepted
                assert update_meshes(twin, twin_optimizer).accepted
                frames.append(counter.frame_count)
        assert frames[0] > 0 and frames[0] == frames[-1]
        # Compiled, the gradient takes another way through the basis, and Adam amplifies the rounding of small ones.
        mine, theirs = state(model), state(twin)
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)

    def test_whole_graph_without_statistics_and_a_clear_error_with_them(self):
        layer, x = toy(track=False), torch.randn(5, 1)
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x))
        track_statistics(layer)
        with pytest.raises(Exception, match="track_statistics"):
            compiled(x)
        track_statistics(layer, False)
        torch.testing.assert_close(compiled(x), layer(x))

    def test_a_model_compiled_before_gathers_from_then_on(self):
        layer, x = toy(track=False), torch.randn(20, 1)
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="eager")
        optimizer = torch.optim.AdamW(parameters(layer), lr=1e-2)
        step(compiled, optimizer, x)
        track_statistics(layer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch looks at .grad of the tensors where a graph breaks
            step(compiled, optimizer, x)
        assert update_meshes(layer, optimizer).accepted


def test_two_processes_end_as_one(tmp_path):
    run_on_two(adaptation_run.run, tmp_path)
    one, other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    alone = adaptation_run.train()
    for name in ("nodes", "coefficients", "moments"):
        assert torch.equal(one[name], other[name])
    assert (one["accepted"], one["losses"], one["checks"]) == (other["accepted"], other["losses"], other["checks"])
    assert True in one["accepted"] and False in one["accepted"]
    assert one["accepted"] == alone["accepted"]
    # Gradients and statistics are summed in another order, and Adam amplifies that where a gradient is tiny: 60 steps
    # of a few ulp each, and room for a hundred times that.
    np.testing.assert_allclose(one["losses"], alone["losses"], rtol=1e-5)
    assert (one["nodes"] - alone["nodes"]).abs().max() < 1e-5


def test_an_error_of_one_process_ends_all(tmp_path):
    """Every stage at which one of two processes can fail: both end with its error, the model as it was."""
    run_on_two(adaptation_failures.run, tmp_path)
    reports = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for stage, words in adaptation_failures.STAGES.items():
        for report in reports:
            assert words in report[stage]["error"], stage
            assert report[stage]["unchanged"], stage
            assert report[stage]["seconds"] < 10, stage
    assert all(report["accepted"] for report in reports)
