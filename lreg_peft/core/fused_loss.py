"""Cross-entropy of `base(features) + design @ table`, some rows at a time.

Logits over a vocabulary are by far the largest tensor of a language model's training step: one kilobyte per token and
250 entries. Here they exist for a few hundred rows only. Their gradient is turned at once into those of `design`,
`table` and, if asked for, `features`; these are small, and all that is kept for the backward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Rows per chunk on a CPU: enough for GEMMs at full speed, few enough for the logits of a chunk to stay near the cache.
_CPU_ROWS = 128
# After the GEMM a chunk is worked off in blocks of this size: read from the cache eight times instead of from memory.
_CPU_BLOCK_BYTES = 3 * 2**20
# Elsewhere the logits of a chunk may take this many bytes.
_CHUNK_BYTES = 256 * 2**20

#: Rows of the batch, and what is told the squared norms of the gradient in their logits during the backward pass.
Watcher = tuple[slice, Callable[[Tensor], None]]


def fused_cross_entropy(
    base: Callable[[Tensor], Tensor],
    features: Tensor,
    targets: Tensor,
    design: Tensor | None = None,
    table: Tensor | None = None,
    *,
    normaliser: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    rows_per_chunk: int | None = None,
    watchers: Sequence[Watcher] = (),
) -> Tensor:
    """Sum over rows of the cross-entropy of `base(features) + design @ table`, over `normaliser`.

    Equal to `torch.nn.functional.cross_entropy` on the logits, and so are its gradients, up to rounding; no tensor of
    `[n, classes]` is made, only of `[rows_per_chunk, classes]`.

    Args:
        base: frozen function `[rows, in_features]` -> logits `[rows, classes]`, applied to each row by itself. It gets
            no gradients of its own.
        features: `[n, in_features]`. Their gradient is computed only if they require one, at the cost of a backward
            pass through `base`.
        targets: int64 `[n]`, each in `[0, classes)`.
        design: `[n, K]`.
        table: `[K, classes]`; both or neither.
        normaliser: what the sum is divided by; None takes n. A tensor is not read on the host.
        label_smoothing: as in `torch.nn.functional.cross_entropy`, in [0, 1).
        rows_per_chunk: rows whose logits exist at the same time; None chooses by device.
        watchers: slices of the rows with functions that are called in the backward pass with the squared norms `[m]`
            of the loss gradient in the logits of those rows.

    Returns:
        A scalar, fp32 (fp64 for fp64 features), differentiable once in `features`, `design` and `table`. Softmax and
        sums are computed in that precision whatever the dtype of the logits.

    Raises:
        RuntimeError: in a backward pass with `create_graph=True`.
        ValueError: if the shapes do not fit together or an option is out of range.
    """
    if features.ndim != 2 or targets.shape != features.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"features must be [n, in_features] and targets whole numbers [n], got {tuple(features.shape)} and "
            f"{tuple(targets.shape)} of {targets.dtype}."
        )
    if (design is None) != (table is None):
        raise ValueError("design and table go together: give both or neither.")
    if design is not None and table is not None and design.shape != (len(features), len(table)):
        raise ValueError(
            f"design must be [n, K] and table [K, classes], got {tuple(design.shape)} and {tuple(table.shape)} for "
            f"n = {len(features)}."
        )
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}.")
    if rows_per_chunk is not None and rows_per_chunk < 1:
        raise ValueError(f"rows_per_chunk must be at least 1, got {rows_per_chunk}.")
    normaliser = len(features) if normaliser is None else normaliser
    return _FusedCrossEntropy.apply(  # type: ignore[no-any-return,no-untyped-call]
        features, design, table, targets, base, normaliser, label_smoothing, rows_per_chunk, tuple(watchers)
    )


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        design: Tensor | None,
        table: Tensor | None,
        targets: Tensor,
        base: Callable[[Tensor], Tensor],
        normaliser: Tensor | float,
        smoothing: float,
        rows_per_chunk: int | None,
        watchers: tuple[Watcher, ...],
    ) -> Tensor:
        needs_features, needs_design, needs_table = ctx.needs_input_grad[:3]
        needs_any = needs_features or needs_design or needs_table
        n = len(features)
        size = rows_per_chunk or _rows_per_chunk(base, features)
        precise = torch.float64 if features.dtype == torch.float64 else torch.float32
        total = features.new_zeros((), dtype=precise)
        d_features = torch.empty_like(features) if needs_features else None
        d_design = design.new_empty(design.shape, dtype=precise) if needs_design else None  # type: ignore[union-attr]
        d_table = table.new_zeros(table.shape, dtype=precise) if needs_table else None  # type: ignore[union-attr]
        exact_table = table.to(precise) if table is not None and needs_design else None
        energy = features.new_empty(n if watchers else 0, dtype=precise)
        buffer = None
        for start in range(0, n, size):
            rows = slice(start, min(start + size, n))
            logits, chunk = _base_logits(base, features[rows], needs_features)
            scores, height = logits.detach(), rows.stop - start
            block = _rows_per_block(scores)
            if buffer is None:  # one for all: the allocator would return such blocks to the system every time
                buffer = scores.new_empty(
                    height if needs_features else min(block, height), scores.shape[1], dtype=precise
                )
            for first in range(0, height, block):
                part = slice(start + first, start + min(first + block, height))
                piece = scores[first : first + block]
                if design is not None and table is not None:
                    piece.addmm_(design[part].to(piece.dtype), table.to(piece.dtype))
                room = buffer[first:] if needs_features else buffer
                loss, gradient = _entropy_and_gradient(piece.to(precise), targets[part], smoothing, needs_any, room)
                total += loss
                if gradient is None:
                    continue
                if d_design is not None and exact_table is not None:
                    torch.mm(gradient, exact_table.T, out=d_design[part])
                if d_table is not None and design is not None:
                    d_table.addmm_(design[part].to(precise).T, gradient)
                for picked, _ in watchers:
                    _note_energy(energy, gradient, picked.indices(n), part)
            if d_features is not None:
                (d_features[rows],) = torch.autograd.grad(logits, chunk, buffer[:height].to(logits.dtype))
        ctx.save_for_backward(d_features, d_design, d_table, energy)
        ctx.dtypes = tuple(t.dtype if t is not None else None for t in (features, design, table))
        ctx.normaliser, ctx.watchers = normaliser, watchers
        return total / normaliser

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():  # in a backward pass only with create_graph=True
            raise RuntimeError(
                "lreg_peft: the fused loss has no second derivative. Set LRegConfig(fused_loss=False), or compute the "
                "loss from the logits, where you differentiate with create_graph=True."
            )
        *saved, energy = ctx.saved_tensors
        scale = gradient / ctx.normaliser
        for picked, tell in ctx.watchers:
            tell(energy[picked] * scale.square())
        grads = (
            None if tensor is None else (tensor * scale).to(dtype)
            for tensor, dtype in zip(saved, ctx.dtypes, strict=True)
        )
        return (*grads, None, None, None, None, None, None)


def _note_energy(energy: Tensor, gradient: Tensor, picked: tuple[int, int, int], part: slice) -> None:
    """Write the squared norms of those rows of `gradient`, which are the rows `part`, that are picked."""
    start, stop, step = picked
    begin = start + max(0, -(-(part.start - start) // step)) * step  # the first picked row that is not before `part`
    end = min(stop, part.stop)
    if begin < end:
        norms = torch.linalg.vector_norm(gradient[begin - part.start : end - part.start : step], dim=1)
        energy[begin:end:step] = norms.square()


def _rows_per_block(scores: Tensor) -> int:
    """Rows that stay in the cache of a CPU core while all is done that they are needed for."""
    if scores.device.type != "cpu":
        return len(scores)
    return max(8, _CPU_BLOCK_BYTES // (scores.shape[1] * scores.element_size()))


def _rows_per_chunk(base: Callable[[Tensor], Tensor], features: Tensor) -> int:
    if features.device.type == "cpu" or not len(features):
        return _CPU_ROWS
    with torch.no_grad():
        one = base(features[:1])
    return max(128, _CHUNK_BYTES // (4 * one.shape[-1]))  # fp32 is what the softmax is computed in


def _base_logits(base: Callable[[Tensor], Tensor], features: Tensor, needs_features: bool) -> tuple[Tensor, Tensor]:
    """Logits of a chunk that may be written to, and the features whose gradient they can give."""
    chunk = features.detach()
    if not needs_features:
        with torch.no_grad():
            logits = base(chunk)
        return logits.clone() if logits.data_ptr() == chunk.data_ptr() else logits, chunk
    chunk.requires_grad_()
    with torch.enable_grad():
        return base(chunk) * 1, chunk  # a copy: `base` may need its own output to give the gradient


def _entropy_and_gradient(
    logits: Tensor, targets: Tensor, smoothing: float, needs_gradient: bool, buffer: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Summed cross-entropy of a chunk and its gradient in the logits, which is written to `buffer`."""
    index = targets.unsqueeze(1)
    at_target = logits.gather(1, index)
    probability = torch.softmax(logits, dim=1, out=buffer[: len(logits)])
    # The largest probability is at least 1 / classes, so that its logarithm is always safe.
    log_normaliser = logits.amax(dim=1, keepdim=True) - probability.amax(dim=1, keepdim=True).log()
    loss = (log_normaliser - at_target).sum()
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * (log_normaliser - logits.mean(dim=1, keepdim=True)).sum()
    if not needs_gradient:
        return loss, None
    if smoothing:
        probability -= smoothing / logits.shape[1]
    probability.scatter_add_(1, index, probability.new_full(index.shape, smoothing - 1))
    return loss, probability
