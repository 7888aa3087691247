"""Adding a small matrix product to a large tensor without a second large tensor.

A shortcut is `design @ table`: a few basis values per row times their output vectors. Written as `hidden + value`, the
value is one more tensor of the size of `hidden`, and the sum a third one.
"""

from typing import Any

import torch
from torch import Tensor


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
    if not _plain_autograd():
        return _sum(hidden, design, table)
    # A view carries the history of its base along: writing to it costs more in the backward pass than it saves.
    in_place = (
        in_place and hidden.is_contiguous() and not (hidden.requires_grad and (hidden.is_leaf or hidden._is_view()))
    )
    return _AddProduct.apply(hidden, design, table, in_place)  # type: ignore[no-any-return,no-untyped-call]


def _plain_autograd() -> bool:
    """Whether only reverse mode is at work: compilers and functorch's transforms want to see single operations."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def _sum(hidden: Tensor, design: Tensor, table: Tensor) -> Tensor:
    rows, flat = hidden.reshape(-1, table.shape[1]), design.reshape(-1, table.shape[0])
    return torch.addmm(rows, flat, table).view(hidden.shape)


class _AddProduct(torch.autograd.Function):
    """One GEMM that accumulates into its output; saves `design` and `table` only."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, design: Tensor, table: Tensor, in_place: bool) -> Tensor:
        ctx.save_for_backward(design, table)
        if in_place:
            hidden.view(-1, table.shape[1]).addmm_(design.reshape(-1, table.shape[0]), table)
            ctx.mark_dirty(hidden)
            return hidden
        return _sum(hidden, design, table)

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
