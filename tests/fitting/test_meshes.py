"""Meshes that move between certified fits: what falls, what is undone, and what the history says."""

import math

import pytest
import tiny
import torch
from peft import get_peft_model
from torch import nn

from lreg_peft import LRegConfig, add_grade, fit_coefficients, fit_meshes, initialize_lreg_weights
from lreg_peft.core import hat_basis
from lreg_peft.core.optimal_knots import optimal_knots
from lreg_peft.fitting import meshes as mesh_fit


class Regression(nn.Module):
    """One linear layer that gives zero: whatever there is to learn is the shortcut's."""

    def __init__(self, inputs=1, outputs=1):
        super().__init__()
        self.head = nn.Linear(inputs, outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x, labels=None):
        return self.head(x)


def step_data(n=2000):
    """A steep bend inside one element of a uniform mesh."""
    u = torch.linspace(0.002, 0.998, n).unsqueeze(1)
    return [{"x": torch.logit(u), "labels": torch.tanh(30 * (u - 0.62))}]


def regression(dof=6, **options):
    model = get_peft_model(Regression(), LRegConfig(target_modules=["head"], n_components=1, dof=dof, **options))
    (layer,) = tiny.layers(model)
    layer.lreg_projection["default"].weight.data.fill_(1.0)  # u = sigmoid(x)
    return model


def classes(**options):
    torch.manual_seed(2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 2, generator=generator)
    margin = torch.sin(3 * x[:, 0]) + x[:, 1].abs() - 1
    labels = (margin + 0.3 * torch.randn(1500, generator=generator) > 0).long()
    model = get_peft_model(Regression(2, 2), LRegConfig(target_modules=["head"], n_components=3, dof=6, **options))
    return model, [{"x": x, "labels": labels}]


@pytest.mark.parametrize("head", ["full", "reduced", "factored"])
def test_the_history_falls_and_is_what_the_model_does(head):
    model, data = classes(head=head)
    before = fit_coefficients(tiny.fresh(model), data, ridge=1e-3, show_progress=False)
    result = fit_meshes(model, data, ridge=1e-3, max_moves=8, show_progress=False)
    assert result.objectives[0] == before.objective
    assert len(result.objectives) == len(result.gaps) >= 2
    for i, (objective, gap) in enumerate(zip(result.objectives, result.gaps, strict=True)):
        assert gap <= 1e-6
        assert all(later < objective - gap for later in result.objectives[i + 1 :])
    assert result.fit.objective == result.objectives[-1]
    # The model holds the best mesh: a fit on it ends where the history does, without a step.
    again = fit_coefficients(model, data, ridge=1e-3, show_progress=False)
    assert again.iterations == 0
    assert again.objective == pytest.approx(result.objectives[-1], rel=1e-9)


def test_nodes_go_where_the_function_bends():
    model = regression()
    result = fit_meshes(model, step_data(), ridge=1e-6, show_progress=False)
    assert result.objectives[-1] < result.objectives[0] / 10
    nodes = tiny.layers(model)[0].lreg_encoder["default"].nodes[0]
    assert ((nodes > 0.5) & (nodes < 0.75)).sum() >= 3  # one of six on the uniform mesh
    assert nodes[0] == 0 and nodes[-1] == 1 and (nodes.diff() > 0).all()


def test_the_rule_of_the_paper_is_there_and_falls_too():
    result = fit_meshes(regression(), step_data(), ridge=1e-6, strategy="mrc", show_progress=False)
    assert list(result.objectives) == sorted(result.objectives, reverse=True)
    assert len(result.objectives) > 1 and result.n_refused <= 1


def waves(dof, n=1000):
    """sin(1/x) with little noise, at the quantiles of x: exchanges from there end in a local optimum."""
    generator = torch.Generator().manual_seed(0)
    x = 1 / (1 + 49 * torch.rand(n, 1, generator=generator))
    labels = torch.sin(1 / x) + 0.01 * torch.randn(n, 1, generator=generator)
    model = get_peft_model(
        Regression(), LRegConfig(target_modules=["head"], n_components=1, dof=dof, init_weights="pca")
    )
    initialize_lreg_weights(model, [{"x": x}], show_progress=False)
    return model, [{"x": x, "labels": labels}]


@pytest.mark.parametrize("dof", [8, 24])
def test_the_program_goes_further_than_exchanges(dof):
    def fit(strategy):
        model, data = waves(dof)
        return fit_meshes(model, data, ridge=1e-7, strategy=strategy, show_progress=False), model

    exchange, _ = fit("exchange")
    program, model = fit("program")
    assert program.objectives[0] == exchange.objectives[0]
    assert program.objectives[1] < exchange.objectives[1] / 1.2  # the first move is the program's
    assert program.objectives[-1] < exchange.objectives[-1] / 1.05
    assert list(program.objectives) == sorted(program.objectives, reverse=True)
    nodes = tiny.layers(model)[0].lreg_encoder["default"].nodes
    start = tiny.layers(waves(dof)[0])[0].lreg_encoder["default"].nodes
    assert nodes.shape == start.shape and torch.equal(nodes[:, [0, -1]], start[:, [0, -1]])


def test_the_program_with_one_component_is_that_of_the_core():
    """The squared loss, one output: the first move lands at what `optimal_knots` finds, up to bins and ends."""
    model, data = waves(12)
    (layer,) = tiny.layers(model)
    u = layer.coords("default", data[0]["x"])[:, 0].double()
    found = optimal_knots(u, data[0]["labels"][:, 0].double(), [12])[0]
    result = fit_meshes(model, data, ridge=1e-9, strategy="program", max_moves=1, show_progress=False)
    assert result.objectives[-1] == pytest.approx(found.objective / 1000, rel=0.1)


@pytest.mark.parametrize("yes_or_no", [False, True])
def test_the_program_with_classes_and_components(yes_or_no):
    """A proposal there, kept only if the objective provably falls."""
    model, data = classes()
    if yes_or_no:
        data[0]["labels"] = nn.functional.one_hot(data[0]["labels"], 2).float()
    ends = {}
    for strategy in ("exchange", "program"):
        model = classes()[0]
        ends[strategy] = fit_meshes(model, data, ridge=1e-4, strategy=strategy, max_moves=6, show_progress=False)
    assert ends["program"].objectives[0] == ends["exchange"].objectives[0]
    assert ends["program"].objectives[-1] < ends["exchange"].objectives[-1]


def test_a_program_that_is_refused_gives_way_to_exchanges(monkeypatch):
    def worse(self):
        return mesh_fit.AdaptedMesh(self._nodes.pow(4), self._nodes)

    monkeypatch.setattr(mesh_fit.KnotProgram, "mesh", worse)
    by_program, by_exchange = (
        fit_meshes(regression(), step_data(), ridge=1e-6, strategy=strategy, max_moves=moves, show_progress=False)
        for strategy, moves in (("program", 5), ("exchange", 4))
    )
    assert by_program.objectives == by_exchange.objectives and by_program.n_refused == by_exchange.n_refused + 1


def test_the_program_has_nothing_to_say_without_variation_or_room():
    x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    flat = fit_meshes(regression(), [{"x": x, "labels": torch.zeros(50, 1)}], strategy="program", show_progress=False)
    assert len(flat.objectives) == 1
    two = fit_meshes(regression(dof=2), step_data(), ridge=1e-6, strategy="program", show_progress=False)
    assert len(two.objectives) == 1 and two.n_refused == 0


def test_a_refused_move_leaves_nothing_behind(monkeypatch):
    """Proposals that are no better: mesh and weights stay those of the first fit, bit for bit."""
    model, data = classes()
    fit = fit_coefficients(model, data, ridge=1e-3, show_progress=False)
    before = tiny.state(model)

    def worse(nodes, *args, **options):
        return mesh_fit.AdaptedMesh(nodes.pow(4), nodes)

    monkeypatch.setattr(mesh_fit, "adapt_mesh", worse)
    result = fit_meshes(model, data, ridge=1e-3, show_progress=False)
    assert result.n_refused == 5 and result.objectives == (result.fit.objective,)
    assert result.fit.objective == fit.objective
    assert tiny.same_state(before, tiny.state(model))


def test_an_error_on_the_way_leaves_the_model_as_it_was(monkeypatch):
    model, data = classes()
    before = tiny.state(model)
    calls = []

    def fails(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **options)

    original = mesh_fit.adapt_mesh
    monkeypatch.setattr(mesh_fit, "adapt_mesh", fails)
    with pytest.raises(KeyboardInterrupt):
        fit_meshes(model, data, ridge=1e-3, show_progress=False)
    assert len(calls) == 2
    assert tiny.same_state(before, tiny.state(model))


def test_two_nodes_cannot_move():
    result = fit_meshes(regression(dof=2), step_data(), ridge=1e-6, show_progress=False)
    assert len(result.objectives) == 1 and result.n_refused == 0


def test_the_mesh_that_a_composed_grade_reads_stays():
    model, data = classes()
    fit = fit_coefficients(model, data, ridge=1e-3, show_progress=False)
    name = add_grade(model, form="composed")
    with pytest.raises(ValueError, match=f"'{name}' is composed on 'default'"):
        fit_meshes(model, data, adapter_name="default", show_progress=False)
    grade = fit_meshes(model, data, ridge=1e-3, max_moves=2, show_progress=False)
    assert grade.fit.adapter == name
    assert grade.objectives[0] < fit.objective


def test_progress_shows_moves(capsys):
    fit_meshes(regression(), step_data(), ridge=1e-6, max_moves=2)
    assert "mesh moves" in capsys.readouterr().err


def test_proposals_rest_on_the_gradients_of_the_loss(monkeypatch):
    """Energy and node gradient of a fitted head are those that autograd gives."""
    model, data = classes()
    fit_coefficients(model, data, ridge=1e-3, show_progress=False)
    seen = {}

    def look(nodes, coefficients, energy, *, moments, node_gradient, **options):
        seen.update(energy=energy, moments=moments, gradient=node_gradient)
        return mesh_fit.AdaptedMesh(nodes, nodes)

    monkeypatch.setattr(mesh_fit, "adapt_mesh", look)
    fit_meshes(model, data, ridge=1e-3, show_progress=False)
    (layer,) = tiny.layers(model)
    nodes = layer.lreg_encoder["default"].nodes.double().requires_grad_()
    x, labels = data[0]["x"], data[0]["labels"]
    design = hat_basis(layer.coords("default", x).double(), nodes).flatten(-2)
    logits = (design @ layer.table("default").double()).requires_grad_()
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    in_logits, in_nodes = torch.autograd.grad(loss, (logits, nodes))
    torch.testing.assert_close(seen["energy"].sum(dim=1), in_logits.square().sum().expand(3), rtol=1e-5, atol=0)
    torch.testing.assert_close(seen["gradient"][:, 1:-1], in_nodes[:, 1:-1], rtol=1e-4, atol=1e-4)
    assert seen["moments"].shape == (3, 5, 3)


def test_the_history_can_be_drawn(tmp_path):
    result = fit_meshes(regression(), step_data(), ridge=1e-6, max_moves=3, show_progress=False)
    figure = result.plot()
    (line,) = figure.axes[0].lines
    assert line.get_ydata().tolist() == pytest.approx(list(result.objectives))
    figure.savefig(tmp_path / "history.png")


def test_bad_options_are_refused():
    model = regression()
    before = tiny.state(model)
    with pytest.raises(ValueError, match="max_moves must be at least 0"):
        fit_meshes(model, step_data(), max_moves=-1)
    with pytest.raises(ValueError, match="strategy must be one of"):
        fit_meshes(model, step_data(), strategy="best", show_progress=False)
    with pytest.raises(ValueError, match="must be finite"):
        fit_meshes(model, [{"x": torch.full((3, 1), math.nan), "labels": torch.zeros(3, 1)}], show_progress=False)
    assert tiny.same_state(before, tiny.state(model))
