"""Adding a small matrix product to a large tensor without a second large tensor.

A shortcut is `design @ table`: a few basis values per row times their output vectors. Written as `hidden + value`, the
value is one more tensor of the size of `hidden`, and the sum a third one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .basis import design_matrix, design_of_elements, reverse_mode_only
from .mesh import locate, take


def add_product(hidden: Tensor, design: Tensor, table: Tensor, *, in_place: bool = False) -> Tensor:
    """`hidden + design @ table`.

    Args:
        hidden: `[..., out_features]`.
        design: `[..., K]`, the leading shape of `hidden`.
        table: `[K, out_features]`, the dtype of `design` and `hidden`.
        in_place: write into `hidden` where autograd allows it. The caller vouches that nothing else needs the old
            values; autograd itself is protected by its version counter.

    Returns:
        `[..., out_features]`; `hidden` itself if it was written to. Differentiable in all three, twice.
    """
    if not reverse_mode_only():
        return _sum(hidden, design, table)
    if not torch.is_grad_enabled():  # for one token at a time the detour by autograd costs more than the product
        return _add(hidden, design, table) if in_place and _may_write(hidden) else _sum(hidden, design, table)
    return _AddProduct.apply(hidden, design, table, in_place and _may_write(hidden))  # type: ignore[no-any-return,no-untyped-call]


def add_basis(
    hidden: Tensor, coords: Tensor, nodes: Tensor, table: Tensor, *, reduced: bool = False, in_place: bool = False
) -> Tensor:
    """`hidden + design_matrix(coords, nodes) @ table`, keeping nothing but `coords` for the backward pass.

    The basis is 2 dof times larger than the coordinates with their element numbers, and quickly made again.

    Args:
        hidden: `[..., out_features]`.
        coords: `[..., components]`, fp32 or fp64.
        nodes: `[components, dof]`, valid.
        table: `[K, out_features]`, the dtype of `hidden`; the basis is rounded to it.
        reduced: see `design_matrix`.
        in_place: see `add_product`.

    Returns:
        `[..., out_features]`; `hidden` itself if it was written to. Differentiable in `hidden`, `coords` and `table`,
        twice.
    """
    if not reverse_mode_only():
        return _sum(hidden, design_matrix(coords, nodes, reduced=reduced).to(hidden.dtype), table)
    return _AddBasis.apply(hidden, coords, nodes, table, reduced, in_place and _may_write(hidden))  # type: ignore[no-any-return,no-untyped-call]


def _may_write(hidden: Tensor) -> bool:
    # A view carries the history of its base along: writing to it costs more in the backward pass than it saves.
    return hidden.is_contiguous() and not (hidden.requires_grad and (hidden.is_leaf or hidden._is_view()))


def _sum(hidden: Tensor, design: Tensor, table: Tensor) -> Tensor:
    rows, flat = hidden.reshape(-1, table.shape[1]), design.reshape(-1, table.shape[0])
    return torch.addmm(rows, flat, table).view(hidden.shape)


def _accumulate(ctx: Any, hidden: Tensor, design: Tensor, table: Tensor, in_place: bool) -> Tensor:
    if not in_place:
        return _sum(hidden, design, table)
    ctx.mark_dirty(hidden)
    return _add(hidden, design, table)


def _add(hidden: Tensor, design: Tensor, table: Tensor) -> Tensor:
    hidden.view(-1, table.shape[1]).addmm_(design.reshape(-1, table.shape[0]), table)
    return hidden


class _AddProduct(torch.autograd.Function):
    """One GEMM that accumulates into its output; saves `design` and `table` only."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, design: Tensor, table: Tensor, in_place: bool) -> Tensor:
        ctx.save_for_backward(design, table)
        return _accumulate(ctx, hidden, design, table, in_place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:  # type: ignore[override]
        design, table = ctx.saved_tensors
        rows = gradient.reshape(-1, table.shape[1])
        needs_design, needs_table = ctx.needs_input_grad[1:3]
        return (
            gradient,
            (rows @ table.T).view(design.shape) if needs_design else None,
            design.reshape(-1, table.shape[0]).T @ rows if needs_table else None,
            None,
        )


class _AddBasis(torch.autograd.Function):
    """As `_AddProduct`, with a design that is made in the forward pass and once more in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, coords: Tensor, nodes: Tensor, table: Tensor, reduced: bool, in_place: bool
    ) -> Tensor:
        ctx.save_for_backward(coords, nodes, table)
        ctx.reduced = reduced
        return _accumulate(ctx, hidden, design_matrix(coords, nodes, reduced=reduced).to(table.dtype), table, in_place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        coords, nodes, table = ctx.saved_tensors
        _, needs_coords, _, needs_table = ctx.needs_input_grad[:4]
        d_coords = d_table = None
        if torch.is_grad_enabled():  # a second derivative will be taken: let autograd see every step
            inputs = [t for t, needed in ((coords, needs_coords), (table, needs_table)) if needed]
            value = design_matrix(coords, nodes, reduced=ctx.reduced).to(table.dtype) @ table
            grads = list(torch.autograd.grad(value, inputs, gradient, create_graph=True)) if inputs else []
            d_coords = grads.pop(0) if needs_coords else None
            d_table = grads.pop(0) if needs_table else None
            return gradient, d_coords, None, d_table, None, None
        rows = gradient.reshape(-1, table.shape[1])
        element, local = locate(coords, nodes, validate=False)
        if needs_table:
            design = design_of_elements(element, local, nodes.shape[1], reduced=ctx.reduced).to(table.dtype)
            d_table = design.reshape(-1, table.shape[0]).T @ rows
        if needs_coords:
            d_coords = _through_the_basis(rows @ table.T, coords, element, nodes, ctx.reduced)
        return gradient, d_coords, None, d_table, None, None


def _through_the_basis(d_design: Tensor, coords: Tensor, element: Tensor, nodes: Tensor, reduced: bool) -> Tensor:
    """Gradient in the coordinates `[..., components]` from that in the design `[n, K]`."""
    components, dof = nodes.shape
    if reduced:
        d_design = F.pad(d_design[:, :-1].unflatten(1, (components, dof - 1)), (1, 0))
    by_node = d_design.reshape(*coords.shape, dof)
    ends = torch.stack((element, element + 1), dim=-1)
    rise = by_node.gather(-1, ends).to(coords.dtype).diff(dim=-1).squeeze(-1)
    left, right = take(nodes[:, :-1], element), take(nodes[:, 1:], element)
    inside = (coords >= nodes[:, 0]) & (coords <= nodes[:, -1])  # beyond the mesh the basis is constant
    return torch.where(inside, rise / (right - left), 0.0)
