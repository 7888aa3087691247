"""`add_product`: the sum of a tensor and a matrix product, and when it may write into the tensor."""

import pytest
import torch
from torch import nn

from lreg_peft.core import add_product


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
