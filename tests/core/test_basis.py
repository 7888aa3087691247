import numpy as np
import pytest
import reference
import torch
from test_mesh import random_nodes

from lreg_peft.core import (
    curvature_penalty,
    evaluate,
    hat_basis,
    locate,
    uniform_nodes,
)
from lreg_peft.core.mesh import active_nodes

N_NODES = [2, 3, 8, 9, 64]


def special_points(nodes: torch.Tensor) -> torch.Tensor:
    """Nodes, midpoints, points beyond the ends and random points: [samples, components]."""
    columns = nodes.T
    middle = (columns[1:] + columns[:-1]) / 2
    outside = torch.stack((columns[0] - 1, columns[-1] + 1))
    return torch.cat((columns, middle, outside, torch.rand(50, nodes.shape[0], dtype=nodes.dtype)))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("n_nodes", N_NODES)
class TestTheorems:
    def test_kronecker_delta_at_the_nodes(self, n_nodes):
        nodes = random_nodes(3, n_nodes)
        basis = hat_basis(nodes.T, nodes)  # [n_nodes, components, n_nodes]
        assert torch.equal(basis, torch.eye(n_nodes, dtype=nodes.dtype).unsqueeze(1).expand(n_nodes, 3, n_nodes))

    def test_partition_of_unity_and_bounds(self, n_nodes):
        nodes = random_nodes(3, n_nodes)
        basis = hat_basis(special_points(nodes), nodes)
        assert (basis >= 0).all() and (basis <= 1).all()
        torch.testing.assert_close(basis.sum(-1), torch.ones_like(basis[..., 0]), atol=2**-52, rtol=0)

    def test_at_most_two_neighbouring_entries_are_non_zero(self, n_nodes):
        nodes = random_nodes(3, n_nodes)
        points = special_points(nodes)
        basis = hat_basis(points, nodes)
        element, local = locate(points, nodes)
        assert ((basis != 0).sum(-1) <= 2).all()
        assert torch.equal(basis.gather(-1, element.unsqueeze(-1)).squeeze(-1), 1 - local)
        assert torch.equal(basis.gather(-1, element.unsqueeze(-1) + 1).squeeze(-1), local)

    def test_piecewise_linear_functions_are_reproduced_by_their_nodal_values(self, n_nodes):
        nodes = random_nodes(1, n_nodes)
        values = torch.randn(1, n_nodes, 1, dtype=torch.float64)
        points = torch.rand(200, 1, dtype=torch.float64)
        expected = np.interp(points.squeeze(1), nodes[0], values[0, :, 0])
        result = evaluate(points, nodes, values).squeeze(1)
        np.testing.assert_allclose(result, expected, atol=1e-13)

    def test_derivative_inside_an_element_is_the_slope(self, n_nodes):
        nodes = random_nodes(1, n_nodes)
        values = torch.randn(1, n_nodes, 1, dtype=torch.float64)
        middle = ((nodes[:, 1:] + nodes[:, :-1]) / 2).T.requires_grad_()
        (slope,) = torch.autograd.grad(evaluate(middle, nodes, values).sum(), middle)
        expected = values[0, :, 0].diff() / nodes[0].diff()
        torch.testing.assert_close(slope.squeeze(1), expected, rtol=1e-12, atol=1e-12)

    def test_equals_the_literal_formula(self, n_nodes):
        nodes = random_nodes(2, n_nodes)
        coefficients = torch.randn(2, n_nodes, 5, dtype=torch.float64)
        points = special_points(nodes)
        psi = reference.basis(points.numpy(), nodes.numpy())
        np.testing.assert_allclose(hat_basis(points, nodes), psi, atol=1e-13)
        expected = np.einsum("sij,ijc->sc", psi, coefficients.numpy())
        np.testing.assert_allclose(evaluate(points, nodes, coefficients), expected, atol=1e-12)

    def test_gradients(self, n_nodes):
        nodes = random_nodes(2, n_nodes)
        element = torch.randint(0, n_nodes - 1, (4, 2))
        inside = 0.2 + 0.6 * torch.rand(4, 2, dtype=torch.float64)  # away from the nodes, where the slope jumps
        component = torch.arange(2)
        left, right = nodes[component, element], nodes[component, element + 1]
        coords = (left + inside * (right - left)).requires_grad_()
        coefficients = torch.randn(2, n_nodes, 3, dtype=torch.float64, requires_grad=True)

        def function(u, c):
            return evaluate(u, nodes, c)

        assert torch.autograd.gradcheck(function, (coords, coefficients), eps=1e-7)


def test_l2_error_falls_with_the_square_of_the_element_length():
    counts = [9, 17, 33, 65, 129]
    x = torch.linspace(0, 1, 20001, dtype=torch.float64).unsqueeze(1)
    errors = []
    for n_nodes in counts:
        nodes = uniform_nodes(1, n_nodes, dtype=torch.float64)
        values = torch.sin(2 * torch.pi * nodes).unsqueeze(-1)
        errors.append((evaluate(x, nodes, values) - torch.sin(2 * torch.pi * x)).square().mean().sqrt().item())
    slope = np.polyfit(np.log(np.array(counts) - 1.0), np.log(errors), 1)[0]
    assert abs(slope + 2) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_nodes", [8, 256, 1024])
def test_half_precision_coefficients_keep_their_error_at_every_size(dtype, n_nodes):
    nodes = uniform_nodes(4, n_nodes)
    coords = torch.rand(500, 4)
    coefficients = torch.randn(4, n_nodes, 3, dtype=torch.float64)
    exact = evaluate(coords, nodes, coefficients)
    rounded = evaluate(coords, nodes, coefficients.to(dtype))
    assert rounded.dtype == dtype
    error = (rounded.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 2 * torch.finfo(dtype).eps  # coefficients, weights and result are each rounded once


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((5, 2), (2, 3), (3, 3, 4)), r"coefficients \(3, 3, 4\) and nodes \(2, 3\)"),
        (((5, 2), (2, 3), (2, 4, 4)), r"coefficients \(2, 4, 4\) and nodes \(2, 3\)"),
        (((5, 3), (2, 3), (2, 3, 4)), r"coords \(5, 3\) and nodes \(2, 3\)"),
        (((5, 2), (2, 3), (2, 3)), r"coefficients \(2, 3\) and nodes"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, message):
    coords, nodes, coefficients = shapes
    with pytest.raises(ValueError, match=message):
        evaluate(torch.rand(coords), uniform_nodes(*nodes), torch.zeros(coefficients))


class TestCurvaturePenalty:
    def test_is_the_papers_on_a_uniform_mesh(self):
        c = torch.randn(3, 6, 4, dtype=torch.float64)
        expected = (c[:, 1:-1] - (c[:, 2:] + c[:, :-2]) / 2).abs().mean()
        nodes = uniform_nodes(3, 6, dtype=torch.float64)
        torch.testing.assert_close(curvature_penalty(nodes, c), expected, rtol=1e-14, atol=0)

    def test_straight_lines_are_free_on_every_mesh(self):
        nodes = random_nodes(3, 20)
        line = 2 * nodes.unsqueeze(-1) * torch.tensor([1.0, -3.0]) + 0.5
        assert curvature_penalty(nodes, line) < 1e-15

    def test_acts_along_the_mesh_and_not_across_components(self):
        nodes = uniform_nodes(5, 4)
        constants = torch.randn(5, 1, 2).expand(5, 4, 2)  # flat along the mesh, different between components
        assert curvature_penalty(nodes, constants) < 1e-6

    def test_is_zero_and_differentiable_without_interior_nodes(self):
        coefficients = torch.randn(2, 2, 3, requires_grad=True)
        penalty = curvature_penalty(uniform_nodes(2, 2), coefficients)
        penalty.backward()
        assert penalty == 0
        assert torch.equal(coefficients.grad, torch.zeros_like(coefficients))

    def test_refuses_other_shapes(self):
        with pytest.raises(ValueError, match=r"coefficients \(2, 3, 1\) and nodes \(2, 4\)"):
            curvature_penalty(uniform_nodes(2, 4), torch.zeros(2, 3, 1))


@pytest.mark.parametrize("lead", [(), (7,), (2, 3)])
def test_active_nodes_are_the_non_zeros_of_the_basis(lead):
    generator = torch.Generator().manual_seed(0)
    nodes = uniform_nodes(3, 5, dtype=torch.float64)
    coords = torch.rand(*lead, 3, generator=generator, dtype=torch.float64)
    rows, weights = active_nodes(*locate(coords, nodes), 5)
    assert rows.shape == weights.shape == (*lead, 6)
    dense = torch.zeros(*lead, 15, dtype=torch.float64).scatter(-1, rows, weights)
    assert torch.equal(dense, hat_basis(coords, nodes).flatten(-2))
