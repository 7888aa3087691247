"""Meshes that move between certified fits: what falls, what is undone, and what the history says."""

import math

import pytest
import tiny
import torch
from peft import get_peft_model
from torch import nn

from lreg_peft import LRegConfig, add_grade, fit_coefficients
from lreg_peft.core import hat_basis
from lreg_peft.fitting import coefficients as mesh_fit


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


def regression(n_nodes=6, **options):
    model = get_peft_model(
        Regression(), LRegConfig(target_modules=["head"], n_components=1, n_nodes=n_nodes, **options)
    )
    (layer,) = tiny.layers(model)
    layer.lreg_projection["default"].weight.data.fill_(1.0)  # u = sigmoid(x)
    return model


def classes(**options):
    torch.manual_seed(2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 2, generator=generator)
    margin = torch.sin(3 * x[:, 0]) + x[:, 1].abs() - 1
    labels = (margin + 0.3 * torch.randn(1500, generator=generator) > 0).long()
    model = get_peft_model(Regression(2, 2), LRegConfig(target_modules=["head"], n_components=3, n_nodes=6, **options))
    return model, [{"x": x, "labels": labels}]


@pytest.mark.parametrize("weighting", ["full", "reduced", "factored"])
def test_the_history_falls_and_is_what_the_model_does(weighting):
    model, data = classes(weighting=weighting)
    before = fit_coefficients(tiny.fresh(model), data, ridge=1e-3, show_progress=False)
    result = fit_coefficients(model, data, ridge=1e-3, max_moves=8, show_progress=False)
    assert result.objectives[0] == before.objective
    assert len(result.objectives) == len(result.gaps) >= 2
    for i, (objective, gap) in enumerate(zip(result.objectives, result.gaps, strict=True)):
        assert gap <= 1e-6
        assert all(later < objective - gap for later in result.objectives[i + 1 :])
    assert result.objective == result.objectives[-1]
    # The model holds the best mesh: a fit on it ends where the history does, without a step.
    again = fit_coefficients(model, data, ridge=1e-3, show_progress=False)
    assert again.iterations == 0
    assert again.objective == pytest.approx(result.objectives[-1], rel=1e-9)


def test_nodes_go_where_the_function_bends():
    model = regression()
    result = fit_coefficients(model, step_data(), ridge=1e-6, max_moves=20, show_progress=False)
    assert result.objectives[-1] < result.objectives[0] / 10
    nodes = tiny.layers(model)[0].lreg_encoder["default"].nodes[0]
    assert ((nodes > 0.5) & (nodes < 0.75)).sum() >= 3  # one of six on the uniform mesh
    assert nodes[0] == 0 and nodes[-1] == 1 and (nodes.diff() > 0).all()


def test_a_refused_move_leaves_nothing_behind(monkeypatch):
    """Proposals that are no better: mesh and weights stay those of the first fit, bit for bit."""
    model, data = classes()
    fit = fit_coefficients(model, data, ridge=1e-3, show_progress=False)
    before = tiny.state(model)

    def worse(nodes, *args, **options):
        return mesh_fit.AdaptedMesh(nodes.pow(4), nodes)

    monkeypatch.setattr(mesh_fit, "adapt_mesh", worse)
    result = fit_coefficients(model, data, ridge=1e-3, max_moves=20, show_progress=False)
    assert result.n_refused == 5 and result.objectives == (result.objective,)
    assert result.objective == fit.objective
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
        fit_coefficients(model, data, ridge=1e-3, max_moves=20, show_progress=False)
    assert len(calls) == 2
    assert tiny.same_state(before, tiny.state(model))


def test_two_nodes_cannot_move():
    result = fit_coefficients(regression(n_nodes=2), step_data(), ridge=1e-6, max_moves=20, show_progress=False)
    assert len(result.objectives) == 1 and result.n_refused == 0


def test_the_mesh_that_a_composed_grade_reads_stays():
    model, data = classes()
    fit = fit_coefficients(model, data, ridge=1e-3, show_progress=False)
    name = add_grade(model, form="composed")
    with pytest.raises(ValueError, match=f"'{name}' is composed on 'default'"):
        fit_coefficients(model, data, adapter_name="default", max_moves=20, show_progress=False)
    grade = fit_coefficients(model, data, ridge=1e-3, max_moves=2, show_progress=False)
    assert grade.adapter == name
    assert grade.objectives[0] < fit.objective


def test_progress_shows_moves(capsys):
    fit_coefficients(regression(), step_data(), ridge=1e-6, max_moves=2)
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
    fit_coefficients(model, data, ridge=1e-3, max_moves=20, show_progress=False)
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


def test_bad_options_are_refused():
    model = regression()
    before = tiny.state(model)
    with pytest.raises(ValueError, match="max_moves must be at least 0"):
        fit_coefficients(model, step_data(), max_moves=-1)
    with pytest.raises(ValueError, match="must be finite"):
        fit_coefficients(
            model, [{"x": torch.full((3, 1), math.nan), "labels": torch.zeros(3, 1)}], max_moves=20, show_progress=False
        )
    assert tiny.same_state(before, tiny.state(model))
