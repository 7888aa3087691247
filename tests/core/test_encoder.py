"""The curve of a shortcut against the paper's formulas in plain loops: values, derivatives of every kind, precision."""

import numpy as np
import pytest
import reference
import torch
from torch import nn

from lreg_peft.core.encoder import LagrangeEncoder

D = 3
WEIGHTINGS = {
    "full": {"weighting": "full"},
    "reduced": {"weighting": "reduced"},
    "factored": {"weighting": "factored"},
    "linear term": {"weighting": "factored", "linear_term": True},
}
N_NODES = [2, 3, 5, 8, 16, 32, 33, 64]  # many nodes may take another way than few
every_head = pytest.mark.parametrize("options", WEIGHTINGS.values(), ids=WEIGHTINGS)
every_size = pytest.mark.parametrize("n_nodes", N_NODES)


def latent_nodes(n_nodes: int) -> torch.Tensor:
    """z `[D, n_nodes]` whose sigmoids are the nodes; the ends are so far out that theirs are 0 and 1."""
    inner = 3 * torch.randn(D, n_nodes - 2, dtype=torch.float64).sort(dim=1).values
    end = torch.full((D, 1), 800.0, dtype=torch.float64)
    return torch.cat((-end, inner, end), dim=1)


def encoder_on(nodes: torch.Tensor, **options) -> LagrangeEncoder:
    """Profiles as training leaves them, on given nodes."""
    encoder = LagrangeEncoder(*nodes.shape, nodes=nodes, **options)
    if encoder.weight is not None:
        nn.init.normal_(encoder.weight)
    return encoder


def made(n_nodes: int, **options) -> tuple[LagrangeEncoder, torch.Tensor]:
    """An encoder in fp64 on a random mesh, and latent coordinates for it: random ones, and every node."""
    nodes = latent_nodes(n_nodes)
    encoder = encoder_on(nodes.sigmoid(), **options)
    return encoder, torch.cat((3 * torch.randn(20, D, dtype=torch.float64), nodes.T))


def of_reference(function, encoder: LagrangeEncoder, latent: torch.Tensor) -> torch.Tensor:
    profile = None if encoder.weight is None else encoder.weight.detach().numpy()
    return torch.from_numpy(
        function(latent.detach().numpy(), encoder.nodes.numpy(), encoder.weighting, profile, encoder.linear_term)
    )


# An element of these random meshes may be a ten-thousandth long, by which rounding errors of 2^-52 are divided.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


@every_head
@every_size
class TestReference:
    def test_values(self, n_nodes, options):
        encoder, latent = made(n_nodes, **options)
        design = encoder(latent)
        assert design.shape == (len(latent), encoder.n_functions)
        torch.testing.assert_close(design, of_reference(reference.design, encoder, latent), **TOLERANCE)

    def test_gradients_and_those_at_nodes_are_of_the_element_to_the_right(self, n_nodes, options):
        encoder, latent = made(n_nodes, **options)
        latent.requires_grad_()
        weight = torch.randn(len(latent), encoder.n_functions, dtype=torch.float64)
        (encoder(latent) * weight).sum().backward()
        slope = of_reference(reference.design_slope, encoder, latent)
        torch.testing.assert_close(latent.grad, torch.einsum("sk,ski->si", weight, slope), **TOLERANCE)
        if encoder.weight is not None:
            basis = torch.from_numpy(reference.basis(latent.detach().sigmoid().numpy(), encoder.nodes.numpy()))
            torch.testing.assert_close(encoder.weight.grad, torch.einsum("si,sij->ij", weight, basis), **TOLERANCE)

    def test_the_gradient_in_the_coordinates_leaves_the_linear_term_out(self, n_nodes, options):
        encoder, latent = made(n_nodes, **options)
        latent = latent[:20]
        weight = torch.randn(20, encoder.n_functions, dtype=torch.float64)
        with torch.no_grad():
            found = encoder.coordinate_gradient(latent, weight)
        profile = None if encoder.weight is None else encoder.weight.detach().numpy()
        slope = torch.from_numpy(
            reference.design_slope(latent.numpy(), encoder.nodes.numpy(), encoder.weighting, profile)  # no linear term
        )
        u = latent.sigmoid()
        torch.testing.assert_close(found * u * (1 - u), torch.einsum("sk,ski->si", weight, slope), **TOLERANCE)

    def test_any_leading_shape(self, n_nodes, options):
        encoder, latent = made(n_nodes, **options)
        expected = encoder(latent[:20])
        assert torch.equal(encoder(latent[:20].view(4, 5, D)), expected.view(4, 5, -1))
        assert torch.equal(encoder(latent[0]), expected[0])
        assert encoder(latent[:0]).shape == (0, encoder.n_functions)

    def test_fp32(self, n_nodes, options):
        """The same to a few roundings of u, divided by the length of an element."""
        encoder = encoder_on(torch.linspace(0, 1, n_nodes, dtype=torch.float64).pow(1.3).repeat(D, 1), **options)
        latent = 3 * torch.randn(50, D, dtype=torch.float64)
        expected = of_reference(reference.design, encoder, latent)
        single = LagrangeEncoder(D, n_nodes, nodes=encoder.nodes.float(), **options)
        if encoder.weight is not None:
            single.weight.data.copy_(encoder.weight)
        found = single(latent.float())
        assert found.dtype == torch.float32
        shortest = encoder.nodes.diff(dim=1).min().item()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=8 * 2**-24 / shortest)


@every_size
class TestTheorems:
    def hats(self, n_nodes):
        encoder, latent = made(n_nodes)
        return encoder, encoder.basis(latent).unflatten(-1, (D, n_nodes))

    def test_kronecker_delta_at_the_nodes(self, n_nodes):
        _, hats = self.hats(n_nodes)
        expected = torch.eye(n_nodes, dtype=torch.float64).unsqueeze(1).expand(n_nodes, D, n_nodes)
        assert torch.equal(hats[20:], expected)

    def test_partition_of_unity_and_bounds(self, n_nodes):
        _, hats = self.hats(n_nodes)
        assert (hats >= 0).all() and (hats <= 1).all()
        torch.testing.assert_close(hats.sum(dim=-1), torch.ones_like(hats[..., 0]), atol=2**-51, rtol=0)

    def test_at_most_two_neighbours_are_not_zero(self, n_nodes):
        _, hats = self.hats(n_nodes)
        for row in hats.flatten(0, 1):
            (nonzero,) = row.nonzero(as_tuple=True)
            assert len(nonzero) <= 2 and nonzero.max() - nonzero.min() <= 1

    @pytest.mark.parametrize("weighting", ["full", "reduced", "factored"])
    def test_the_basis_is_that_of_every_head(self, n_nodes, weighting):
        encoder, latent = made(n_nodes, weighting=weighting)
        other = LagrangeEncoder(D, n_nodes, nodes=encoder.nodes)
        assert torch.equal(encoder.basis(latent), other(latent))

    @pytest.mark.parametrize("weighting", ["full", "reduced"])
    def test_nodal_coefficients_are_the_values_at_the_nodes(self, n_nodes, weighting):
        """Of the function that design and table make: at the nodes of all components at once their sum."""
        encoder, latent = made(n_nodes, weighting=weighting)
        weight = torch.randn(4, encoder.n_functions, dtype=torch.float64)
        at_nodes = encoder(latent[20:]) @ weight.T
        torch.testing.assert_close(at_nodes, encoder.nodal_coefficients(weight).sum(dim=0), **TOLERANCE)


def inside(n_nodes: int, **options) -> tuple[LagrangeEncoder, torch.Tensor]:
    """Coordinates in the middle of elements, so that finite differences see one element; a few, as Jacobians are
    large."""
    encoder, _ = made(min(n_nodes, 9) if n_nodes <= 32 else n_nodes, **options)
    nodes = torch.linspace(0, 1, encoder.n_nodes, dtype=torch.float64).pow(1.2).repeat(D, 1)
    encoder.nodes.copy_(nodes)
    middle = (nodes[:, 1:] + nodes[:, :-1]) / 2
    picked = torch.tensor([0, encoder.n_nodes // 2 - 1, encoder.n_nodes - 2]).clamp(min=0)
    return encoder, middle[:, picked].T.logit()


@every_head
@pytest.mark.parametrize("n_nodes", [2, 9, 40])
class TestDerivatives:
    def functions(self, n_nodes, options):
        encoder, latent = inside(n_nodes, **options)
        if encoder.weight is None:
            return encoder, (latent,), lambda z: encoder(z)
        given = encoder.weight.detach().clone()
        return encoder, (latent, given), lambda z, w: torch.func.functional_call(encoder, {"weight": w}, (z,))

    def test_first_and_second_by_differences(self, n_nodes, options):
        _, inputs, function = self.functions(n_nodes, options)
        inputs = tuple(value.requires_grad_() for value in inputs)
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)

    def test_second_derivatives_are_not_those_of_a_line(self, n_nodes, options):
        encoder, (latent, *_), _ = self.functions(n_nodes, options)
        latent.requires_grad_()
        (first,) = torch.autograd.grad(encoder(latent).square().sum(), latent, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), latent)
        assert second.abs().min() > 1e-8

    def test_vjp_jvp_and_vmap(self, n_nodes, options):
        _, inputs, function = self.functions(n_nodes, options)
        output, pull = torch.func.vjp(function, *inputs)
        tangents = tuple(torch.randn_like(value) for value in inputs)
        same, push = torch.func.jvp(function, inputs, tangents)
        torch.testing.assert_close(output, same)
        torch.testing.assert_close(output, function(*inputs))
        cotangent = torch.randn_like(output)
        pulled = pull(cotangent)
        torch.testing.assert_close(
            (cotangent * push).sum(), sum((p * t).sum() for p, t in zip(pulled, tangents, strict=True))
        )
        leaves = tuple(value.clone().requires_grad_() for value in inputs)
        for mine, theirs in zip(pulled, torch.autograd.grad(function(*leaves), leaves, cotangent), strict=True):
            torch.testing.assert_close(mine, theirs)
        by_row = torch.func.vmap(function, in_dims=(0, *(None for _ in inputs[1:])))(*inputs)
        torch.testing.assert_close(by_row, output)

    def test_jacobians_of_samples(self, n_nodes, options):
        _, (latent, *weights), function = self.functions(n_nodes, options)
        forward, backward = (
            torch.func.vmap(jacobian(lambda z: function(z, *weights)))(latent)
            for jacobian in (torch.func.jacfwd, torch.func.jacrev)
        )
        torch.testing.assert_close(forward, backward)
        twice = torch.func.vmap(torch.func.hessian(lambda z: function(z, *weights).square().sum()))(latent)
        assert twice.abs().max() > 1e-8


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.bfloat16), nn.Module.double])
def test_nodes_stay_in_fp32_whatever_the_module_is_cast_to(cast):
    encoder = LagrangeEncoder(2, 5, "factored", nodes=torch.tensor([[0.0, 0.9, 0.9005, 0.901, 1.0]] * 2))
    nodes = encoder.nodes.clone()
    model = cast(nn.Sequential(nn.Linear(2, 2), encoder))
    assert encoder.weight.dtype == model[0].weight.dtype != torch.float32
    assert encoder.nodes.dtype == torch.float32
    assert torch.equal(encoder.nodes, nodes)
    assert encoder.to("meta").nodes.is_meta


def test_coordinates_of_half_precision_are_not_rounded():
    """sigmoid(7) and sigmoid(8) are both 1 in bf16."""
    encoder = LagrangeEncoder(1, 3, nodes=torch.tensor([[0.0, 0.9990, 1.0]]))
    design = encoder(torch.tensor([[7.0], [8.0]], dtype=torch.bfloat16))
    assert design.dtype == torch.float32
    expected = reference.design(np.array([[7.0], [8.0]]), np.array([[0.0, 0.9990, 1.0]]), "full")
    torch.testing.assert_close(design.double(), torch.from_numpy(expected), rtol=0, atol=1e-3)  # 2^-24 / 0.001


def test_the_linear_term_goes_on_where_the_sigmoid_says_nothing():
    encoder = encoder_on(
        torch.linspace(0, 1, 5, dtype=torch.float64).repeat(D, 1), weighting="factored", linear_term=True
    )
    far = encoder(torch.tensor([[60.0] * D, [61.0] * D], dtype=torch.float64))
    torch.testing.assert_close(far[1] - far[0], torch.full((D,), 1 / 1.702, dtype=torch.float64))


@every_head
class TestOnTheMesh:
    def test_to_nodes_and_back(self, options):
        encoder, _ = made(5, **options)
        values = torch.randn(encoder.weight.shape if encoder.weight is not None else (4, encoder.n_functions))
        nodal = encoder.to_nodes(values)
        assert nodal.shape == (D, 5, 1 if encoder.weight is not None else 4)
        assert torch.equal(encoder.from_nodes(nodal, values), values)

    def test_the_constant_is_a_design_of_one(self, options):
        encoder, latent = made(5, **options)
        if encoder.weight is not None:
            encoder.weight.data[0] = 0.7  # its first profile is constant, as at the start with a linear term
        value = encoder(latent[:20]) @ encoder.constant()
        if encoder.linear_term:
            value = value - latent[:20, 0] / 1.702 / 0.7
        torch.testing.assert_close(value, torch.ones(20, dtype=torch.float64))

    def test_another_mesh_has_the_profiles_of_the_start(self, options):
        encoder, _ = made(5, **options)
        nodes = torch.rand(D, 5, dtype=torch.float64).cumsum(dim=1)
        nodes = (nodes - nodes[:, :1]) / (nodes[:, -1:] - nodes[:, :1])
        encoder.set_nodes(nodes)
        assert torch.equal(encoder.nodes, nodes)
        if encoder.weight is not None:
            assert torch.equal(encoder.weight, LagrangeEncoder(D, 5, nodes=nodes, **options).weight)
        with pytest.raises(ValueError, match="strictly increasing"):
            encoder.set_nodes(nodes.flip(1))


def test_profiles_start_with_the_mean_asked_for_and_variance_one():
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)[1:-1]
    encoder = LagrangeEncoder(1, 6, "factored", profile_mean=0.3)
    values = encoder(u.logit().unsqueeze(1))
    assert abs(values.mean().item() - 0.3) < 1e-3
    assert abs(values.std().item() - 1) < 5e-3


def test_what_is_printed_names_the_sizes():
    text = repr(LagrangeEncoder(2, 7, "factored", linear_term=True))
    assert text == "LagrangeEncoder(n_components=2, n_nodes=7, weighting='factored', linear_term=True)"
