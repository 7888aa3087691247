"""Cross-entropy of `base(features) + design @ table`, some rows at a time.

Logits over a vocabulary are by far the largest tensor of a language model's training step: one kilobyte per token and
250 entries. Here they exist for a few hundred rows only. Their gradient is turned at once into those of `design`,
`table` and, if asked for, `features`; these are small, and all that is kept for the backward pass.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import whole

# Rows per chunk on a CPU: enough for GEMMs at full speed, few enough for the logits of a chunk to stay near the cache.
_CPU_ROWS = 128
# GEMM and softmax over a row length that fills whole vector registers run up to twice as fast.
_ALIGNED_ROWS = 32
# After the GEMM a chunk is worked off in blocks of this size: read from the cache eight times instead of from memory.
_CPU_BLOCK_BYTES = 3 * 2**20
# Elsewhere the logits of a chunk may take this many bytes.
_CHUNK_BYTES = 256 * 2**20

_LINEAR_FORWARD = nn.Linear.forward

Base = Callable[[Tensor], Tensor]


def fused_cross_entropy(
    base: Base,
    features: Tensor,
    targets: Tensor,
    design: Tensor | None = None,
    table: Tensor | None = None,
    *,
    normaliser: Tensor | float | None = None,
    rows_per_chunk: int | None = None,
) -> Tensor:
    """Sum over rows of the cross-entropy of `base(features) + design @ table`, over `normaliser`.

    Equal to `torch.nn.functional.cross_entropy` on the logits, and so are its gradients, up to rounding; no tensor of
    `[n, classes]` is made, only of `[rows_per_chunk, classes]`.

    Args:
        base: frozen function `[rows, in_features]` -> logits `[rows, classes]`, applied to each row by itself. It gets
            no gradients of its own. For an `nn.Linear` there is a faster way on the CPU.
        features: `[n, in_features]`. Their gradient is computed only if they require one, at the cost of a backward
            pass through `base`.
        targets: int64 `[n]`, each in `[0, classes)`.
        design: `[n, K]`.
        table: `[K, classes]`; both or neither.
        normaliser: what the sum is divided by; None takes n. A tensor is not read on the host.
        rows_per_chunk: rows whose logits exist at the same time; None chooses by device.

    Returns:
        A scalar, fp32 (fp64 for fp64 features), differentiable once in `features`, `design` and `table`. Softmax and
        sums are computed in that precision whatever the dtype of the logits.

    Raises:
        RuntimeError: in a backward pass with `create_graph=True`.
        ValueError: if the shapes do not fit together or an option is out of range.
    """
    whole("rows_per_chunk", rows_per_chunk, 1, optional=True)
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
    normaliser = len(features) if normaliser is None else normaliser
    return _FusedCrossEntropy.apply(  # type: ignore[no-any-return,no-untyped-call]
        features, design, table, targets, base, normaliser, rows_per_chunk
    )


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        design: Tensor | None,
        table: Tensor | None,
        targets: Tensor,
        base: Base,
        normaliser: Tensor | float,
        rows_per_chunk: int | None,
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
        chunks = _ClassesFirst if _takes_classes_first(base, features) else _RowsFirst
        work = chunks(base, needs_features, precise)
        for start in range(0, n, size):
            rows = slice(start, min(start + size, n))
            for part, scores in work.scores(features, design, table, rows):
                room = work.room(scores, part)
                loss, gradient = _entropy_and_gradient(scores, targets[part], needs_any, room, work.classes)
                total += loss
                if gradient is None:
                    continue
                gradient = gradient.movedim(work.classes, 1)  # [rows, classes]
                if d_design is not None and exact_table is not None:
                    # This way round: the other one is ten times slower for a table of less than a dozen rows.
                    d_design[part] = (exact_table @ gradient.T).T
                if d_table is not None and design is not None:
                    d_table.addmm_(design[part].to(precise).T, gradient)
            if d_features is not None:
                d_features[rows] = work.features_gradient()
        ctx.save_for_backward(d_features, d_design, d_table)
        ctx.dtypes = tuple(t.dtype if t is not None else None for t in (features, design, table))
        ctx.normaliser, ctx.n_rows = normaliser, n
        return total / normaliser

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():  # in a backward pass only with create_graph=True
            raise RuntimeError(
                "lreg_peft: the fused loss has no second derivative. Set LRegConfig(fused_loss=False), or compute the "
                "loss from the logits, where you differentiate with create_graph=True."
            )
        saved = ctx.saved_tensors
        if not ctx.n_rows:  # zero, as of the mean over nothing, and not zero times infinity
            gradient, ctx.normaliser = torch.zeros_like(gradient), 1
        scale = gradient / ctx.normaliser
        grads = (
            None if tensor is None else (tensor * scale).to(dtype)
            for tensor, dtype in zip(saved, ctx.dtypes, strict=True)
        )
        return (*grads, None, None, None, None)


class _RowsFirst:
    """Logits of a chunk as any `base` gives them, `[rows, classes]`."""

    classes = 1  # dimension

    def __init__(self, base: Base, needs_features: bool, precise: torch.dtype) -> None:
        self._base, self._needs_features, self._precise = base, needs_features, precise
        self._buffer: Tensor | None = None  # one for all: the allocator would return it to the system every time
        self._start = 0

    def scores(
        self, features: Tensor, design: Tensor | None, table: Tensor | None, rows: slice
    ) -> Iterator[tuple[slice, Tensor]]:
        """Pieces of a chunk: their rows, and logits `[rows, classes]` with the shortcut."""
        self._start = rows.start
        self._chunk = features[rows].detach().requires_grad_(self._needs_features)
        with torch.set_grad_enabled(self._needs_features):
            self._logits = self._base(self._chunk)
            # `base` may need its own output to give the gradient, or return its input.
            if self._needs_features or self._logits.data_ptr() == self._chunk.data_ptr():
                self._logits = self._logits * 1
        logits = self._logits.detach()
        block = _rows_per_block(logits)
        for first in range(0, len(logits), block):
            piece = logits[first : first + block]
            part = slice(rows.start + first, rows.start + first + len(piece))
            if design is not None and table is not None:
                piece.addmm_(design[part].to(piece.dtype), table.to(piece.dtype))
            if self._buffer is None:
                height = len(logits) if self._needs_features else len(piece)
                self._buffer = piece.new_empty(height, piece.shape[1], dtype=self._precise)
            yield part, piece.to(self._precise)

    def room(self, scores: Tensor, part: slice) -> Tensor:
        """Where the gradient in these logits goes; of a whole chunk if the features need theirs."""
        assert self._buffer is not None
        first = part.start - self._start if self._needs_features else 0
        return self._buffer[first : first + len(scores)]

    def features_gradient(self) -> Tensor:
        """Gradient in the features of the chunk, `[rows, in_features]`."""
        assert self._buffer is not None
        gradient = self._buffer[: len(self._logits)].to(self._logits.dtype)
        return torch.autograd.grad(self._logits, self._chunk, gradient)[0]


class _ClassesFirst:
    """Logits of a linear layer as `[classes, rows]`.

    On a CPU the product of the large weight with few rows is some 1.4 times faster this way round, and so are the thin
    products after it.
    """

    classes = 0

    def __init__(self, base: Base, needs_features: bool, precise: torch.dtype) -> None:
        assert isinstance(base, nn.Linear)
        self._weight, self._bias = base.weight.detach(), base.bias
        self._precise = precise
        self._logits: Tensor | None = None
        self._gradient: Tensor | None = None

    def scores(
        self, features: Tensor, design: Tensor | None, table: Tensor | None, rows: slice
    ) -> Iterator[tuple[slice, Tensor]]:
        """The chunk as one piece, `[classes, rows]`, with spare rows at the end that make their number a round one."""
        chunk = features[rows].detach()
        spare = -len(chunk) % _ALIGNED_ROWS
        chunk = F.pad(chunk, (0, 0, 0, spare))
        if self._logits is None:
            self._logits = chunk.new_empty(len(self._weight) * len(chunk))
        scores = self._logits[: len(self._weight) * len(chunk)].view(-1, len(chunk))
        torch.mm(self._weight, chunk.T, out=scores)
        if self._bias is not None:
            scores += self._bias.detach().unsqueeze(1)
        if design is not None and table is not None:
            scores.addmm_(table.to(scores.dtype).T, F.pad(design[rows], (0, 0, 0, spare)).to(scores.dtype).T)
        yield rows, scores.to(self._precise)

    def room(self, scores: Tensor, part: slice) -> Tensor:
        """Where the gradient of `scores` [vocabulary, rows of the chunk] goes: one buffer for all chunks."""
        if self._gradient is None:
            self._gradient = scores.new_empty(scores.numel())
        room = self._gradient[: scores.numel()].view(scores.shape)
        self._filled = room[:, : part.stop - part.start]
        return room

    def features_gradient(self) -> Tensor:
        """The gradient in the features of the rows last filled, [rows, in_features], in the dtype of the weight."""
        return self._filled.T.to(self._weight.dtype) @ self._weight


def is_plain_linear(base: Base) -> TypeGuard[nn.Linear]:
    """Whether `base` is a linear layer as torch has it: simulators of quantisation replace `forward`."""
    return type(base) is nn.Linear and nn.Linear.forward is _LINEAR_FORWARD and "forward" not in base.__dict__


def _takes_classes_first(base: Base, features: Tensor) -> bool:
    """Whether `base` is a linear layer on the CPU that computes with its weight and nothing else."""
    return (
        is_plain_linear(base)
        and features.device.type == base.weight.device.type == "cpu"
        and base.weight.dtype == features.dtype
        and not (base._forward_hooks or base._forward_pre_hooks)
        and not torch.is_autocast_enabled("cpu")
    )


def _rows_per_block(scores: Tensor) -> int:
    """Rows that stay in the cache of a CPU core while all is done that they are needed for."""
    if scores.device.type != "cpu":
        return max(1, len(scores))
    return max(8, _CPU_BLOCK_BYTES // (scores.shape[1] * scores.element_size()))


def _rows_per_chunk(base: Base, features: Tensor) -> int:
    if features.device.type == "cpu" or not len(features):
        return _CPU_ROWS
    with torch.no_grad():
        one = base(features[:1])
    return max(128, _CHUNK_BYTES // (4 * one.shape[-1]))  # fp32 is what the softmax is computed in


def _entropy_and_gradient(
    logits: Tensor, targets: Tensor, needs_gradient: bool, room: Tensor, classes: int
) -> tuple[Tensor, Tensor | None]:
    """Summed cross-entropy of logits with the classes in dimension `classes`, and its gradient, written to `room`.

    Rows beyond those of `targets` are not counted and not returned.
    """
    n = len(targets)
    index = targets.unsqueeze(classes)
    at_target = logits.gather(classes, index)
    probability = torch.softmax(logits, dim=classes, out=room)
    # The largest probability is at least 1 / classes, so that its logarithm is always safe.
    log_normaliser = logits.amax(dim=classes, keepdim=True) - probability.amax(dim=classes, keepdim=True).log()
    log_normaliser = log_normaliser.narrow(1 - classes, 0, n)
    loss = (log_normaliser - at_target).sum()
    if not needs_gradient:
        return loss, None
    probability.scatter_add_(classes, index, probability.new_full(index.shape, -1))
    return loss, probability.narrow(1 - classes, 0, n)
