"""`add_product`: the sum of a tensor and a matrix product, and when it may write into the tensor."""

import pytest
import torch
from torch import nn

from lreg_peft.core import add_basis, add_product, design_matrix


def inputs(*, hidden_grad: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 4), (2, 5, 3), (3, 4))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return tensors[0].requires_grad_(hidden_grad), tensors[1].requires_grad_(), tensors[2].requires_grad_()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("hidden_grad", [False, True])
def test_values_and_both_derivatives(in_place, hidden_grad):
    hidden, design, table = inputs(hidden_grad=hidden_grad)

    def total(hidden, design, table):
        return add_product(hidden * 1, design, table, in_place=in_place)

    torch.testing.assert_close(total(hidden, design, table), hidden + design @ table, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(total, (hidden, design, table))
    assert torch.autograd.gradgradcheck(total, (hidden, design, table))


def test_in_place_writes_into_what_it_was_given_and_saves_nothing_of_its_size():
    hidden, design, table = inputs()
    base = (hidden * 1).contiguous()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        total = add_product(base, design, table, in_place=True)
    assert total.data_ptr() == base.data_ptr()
    assert sorted(saved) == [table.numel(), design.numel()]


@pytest.mark.parametrize("kind", ["leaf", "view", "asked not to", "strided"])
def test_memory_of_others_is_left_alone(kind):
    hidden, design, table = inputs()
    base = {
        "leaf": lambda: hidden,
        "view": lambda: (hidden * 1).view(2, 5, 4)[:],
        "asked not to": lambda: hidden * 1,
        "strided": lambda: (hidden * 1).transpose(0, 1).contiguous().transpose(0, 1),
    }[kind]()
    before = base.detach().clone()
    total = add_product(base, design, table, in_place=kind != "asked not to")
    assert total.data_ptr() != base.data_ptr()
    assert torch.equal(base.detach(), before)
    total.sum().backward()


def test_a_base_that_needs_its_output_for_the_backward_pass_is_protected_by_autograd():
    hidden, design, table = inputs()
    total = add_product(hidden.tanh(), design, table, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # inside torch
def test_transforms_of_functorch_see_plain_operations():
    hidden, design, table = inputs(hidden_grad=False)
    tangent = torch.ones_like(table)
    _, forward = torch.func.jvp(lambda t: add_product(hidden, design.detach(), t), (table.detach(),), (tangent,))
    torch.testing.assert_close(forward, design.detach() @ tangent)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(table.detach(), tangent)
        total = add_product(hidden, design.detach(), dual, in_place=True)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(total).tangent, design.detach() @ tangent)


def test_identity_of_a_zero_table_is_exact():
    hidden, design, _ = inputs()
    for dtype in (torch.float32, torch.bfloat16):
        base = hidden.detach().to(dtype)
        table = torch.zeros(3, 4, dtype=dtype)
        assert torch.equal(add_product(base.clone(), design.detach().to(dtype), table, in_place=True), base)


def test_linear_layers_keep_working_under_it():
    layer = nn.Linear(4, 4).double()
    hidden, design, table = inputs()
    add_product(layer(hidden), design, table, in_place=True).square().sum().backward()
    expected = torch.autograd.grad((layer(hidden) + design @ table).square().sum(), layer.weight)[0]
    torch.testing.assert_close(layer.weight.grad, expected)


class TestAddBasis:
    """The same sum with the design made inside."""

    NODES = torch.tensor([[0.0, 0.2, 0.7, 1.0], [0.0, 0.5, 0.6, 1.0]], dtype=torch.float64)

    def inputs(self, *, reduced: bool, hidden_grad: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64, requires_grad=hidden_grad)
        coords = torch.rand(2, 5, 2, generator=generator, dtype=torch.float64) * 0.98 + 0.01
        table = torch.randn(7 if reduced else 8, 3, generator=generator, dtype=torch.float64)
        return hidden, coords.requires_grad_(), table.requires_grad_()

    @pytest.mark.parametrize("reduced", [False, True])
    @pytest.mark.parametrize("in_place", [False, True])
    def test_values_and_both_derivatives(self, reduced, in_place):
        def total(hidden, coords, table):
            return add_basis(hidden * 1, coords, self.NODES, table, reduced=reduced, in_place=in_place)

        hidden, coords, table = self.inputs(reduced=reduced)
        expected = hidden + design_matrix(coords, self.NODES, reduced=reduced) @ table
        torch.testing.assert_close(total(hidden, coords, table), expected, rtol=1e-14, atol=1e-14)
        assert torch.autograd.gradcheck(total, (hidden, coords, table))
        assert torch.autograd.gradgradcheck(total, (hidden, coords, table))

    @pytest.mark.parametrize("reduced", [False, True])
    def test_same_gradients_as_the_composed_form(self, reduced):
        for hidden_grad in (True, False):
            hidden, coords, table = self.inputs(reduced=reduced, hidden_grad=hidden_grad)
            with torch.no_grad():  # the ends of the mesh, a node, and beyond the ends
                coords[0, :, 0] = torch.tensor([0.0, 1.0, 0.2, -0.5, 1.5])
            weight = torch.randn(3, dtype=torch.float64)
            mine = add_basis(hidden, coords, self.NODES, table, reduced=reduced)
            theirs = hidden + design_matrix(coords, self.NODES, reduced=reduced) @ table
            for a, b in zip(
                *(torch.autograd.grad((x.sin() @ weight).sum(), (coords, table)) for x in (mine, theirs)), strict=True
            ):
                torch.testing.assert_close(a, b)

    def test_saves_the_coordinates_and_nothing_of_the_size_of_the_basis(self):
        hidden, coords, table = self.inputs(reduced=False)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            add_basis(hidden * 1, coords, self.NODES, table, in_place=True)
        assert sorted(saved) == sorted([coords.numel(), self.NODES.numel(), table.numel()])

    def test_half_precision_rounds_the_basis_and_not_the_coordinates(self):
        hidden, coords, table = (t.detach() for t in self.inputs(reduced=False))
        half = add_basis(hidden.bfloat16(), coords.float(), self.NODES.float(), table.bfloat16())
        expected = hidden + design_matrix(coords, self.NODES) @ table
        assert (half - expected).norm() < 5e-3 * expected.norm()
