"""What the convex solvers of this package share: how samples come in, and what comes out.

With the encoder fixed, an LReg layer is linear in its weights, so that fitting them is a convex problem with one
optimum (up to directions without effect). A solver reads the samples in chunks, pass by pass, and returns with the
coefficients an upper bound on their distance from that optimum, measured in the objective: the gap.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# Entries of the [samples, outputs] matrices that a pass holds at once, and the samples that there are at least and at
# most. Measured on a CPU: 8 MB in fp32 is best while it gives 128 samples or more; fewer do not pay for adding their
# share of the gradient. Products in fp32 are summed over the most at once; beyond that, in fp64.
_MAX_ENTRIES = {"cpu": 1 << 21}
_MAX_ENTRIES_ELSEWHERE = 1 << 26
_MIN_ROWS, _MAX_ROWS = 128, 4096

Status = Literal["converged", "iteration_limit", "stalled"]

#: What a solver takes for targets: classes, independent yes-or-no labels, values.
TargetKind = Literal["classes", "labels", "values"]


class Chunk(NamedTuple):
    """Some of the samples. Nothing in it is changed.

    Attributes:
        basis: `[n, features]`, fp32 or fp64; constant features (an intercept) are columns like the others.
        target: int64 `[n]` for classes, floating `[n, outputs]` otherwise.
        offset: `[n, outputs]`, what the prediction starts from: the frozen model's output. None means zero.
    """

    basis: Tensor
    target: Tensor
    offset: Tensor | None = None


#: Begins a pass over the samples: every call gives the same ones. The chunks may be made on the fly.
Chunks = Callable[[], Iterable[Chunk]]

#: Told after every pass: passes so far, objective, gap.
Report = Callable[[int, float, float], None]


class Processes:
    """How processes that each hold a share of the samples act as one. This class: a process on its own."""

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, bit-identical on all."""
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, of equal shapes, in the order of their ranks."""
        return [tensor]

    def together(self) -> AbstractContextManager[None]:
        """A stage that each goes through by itself; an error of one is then an error of all."""
        return nullcontext()


@dataclass(frozen=True)
class Certificate:
    """How close coefficients are to the optimum, as they are stored, after rounding.

    Attributes:
        objective: P, see the solver; computed in fp64.
        gap: an upper bound on P minus the smallest P there is: the certificate. For least squares it is the exact
            distance, up to rounding, which grows with the condition number. It is about the samples as the solver sees
            them, basis and offset in fp32 or fp64: a model that computes in bf16 or fp16 adds its own rounding.
        gradient_norm: Euclidean norm of the gradient of P.
        iterations: accepted steps.
        passes: reads of all samples: evaluations of the gradient and products with the Hessian count one each.
        status: "converged" if `gap <= tolerance`; "iteration_limit" if the allowed passes were used up; "stalled" if
            rounding permits no further progress.
        method: which way the optimum was found.
        message: status and method in words; what to change if the tolerance was not reached.
        left_out: what is to be added to the gap for a bound over any coefficients whatever: 0, but for least squares
            without a ridge on a basis that determines some directions by no more than its own rounding. Those keep
            their value of the start, and coefficients along them, as large as one over that rounding, could lower P
            by this much further.
    """

    objective: float
    gap: float
    gradient_norm: float
    iterations: int
    passes: int
    status: Status
    method: str
    message: str
    left_out: float = field(default=0.0, kw_only=True)

    def warn_unless_converged(self) -> None:
        """Emit a `RuntimeWarning` with the message if the tolerance was not reached."""
        if self.status != "converged":
            warnings.warn(self.message, RuntimeWarning, stacklevel=3)


@dataclass(frozen=True)
class Solution(Certificate):
    """A `Certificate` and what it is about.

    Attributes:
        coefficients: `[features, outputs]`, in the dtype of the start.
    """

    coefficients: Tensor


def check_options(start: Tensor, scale: float, tolerance: float, max_passes: int) -> None:
    """Raise a `ValueError` for coefficients or options that no solver can work with."""
    if start.ndim != 2 or 0 in start.shape or not start.is_floating_point():
        raise ValueError(
            f"start must be floating point [features >= 1, outputs >= 1], got {start.dtype} {tuple(start.shape)}."
        )
    if not torch.isfinite(start).all():
        raise ValueError("start must be finite, got NaN or infinite values.")
    for name, value in (("tolerance", tolerance), ("scale", scale)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}.")
    if max_passes < 3:
        raise ValueError(f"max_passes must be at least 3, got {max_passes}.")


def check_chunk(chunk: Chunk, shape: tuple[int, int], kind: TargetKind) -> None:
    """Raise an error that says what is wrong with a chunk for coefficients of `shape` [features, outputs]."""
    if not isinstance(chunk, Chunk):
        raise TypeError(f"chunks must give core.Chunk(basis, target, offset), got a {type(chunk).__name__}.")
    named = chunk._asdict()
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name == "offset"):
            raise TypeError(f"{name} must be a tensor, got a {type(tensor).__name__}.")
    basis, target, offset = chunk
    features, outputs = shape
    if basis.ndim != 2 or basis.shape[1] != features or basis.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"basis must be fp32 or fp64 [n, {features}], got {basis.dtype} {tuple(basis.shape)}.")
    n = len(basis)
    classes = kind == "classes"
    expected = (n,) if classes else (n, outputs)
    fits = target.dtype == torch.int64 if classes else target.is_floating_point()
    if tuple(target.shape) != expected or not fits:
        words = "int64" if classes else "floating point"
        raise ValueError(f"target must be {words} {list(expected)}, got {target.dtype} {tuple(target.shape)}.")
    if classes and n and not 0 <= int(target.min()) <= int(target.max()) < outputs:
        raise ValueError(
            f"labels must lie in [0, {outputs - 1}] for {outputs} classes, got values from {int(target.min())} to "
            f"{int(target.max())}."
        )
    if offset is not None and tuple(offset.shape) != (n, outputs):
        raise ValueError(f"offset must have shape [n, outputs] = {(n, outputs)}, got {tuple(offset.shape)}.")
    for name, tensor in named.items():
        if tensor is not None and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} must be finite, got NaN or infinite values.")
    if kind == "labels" and n and not 0 <= float(target.min()) <= float(target.max()) <= 1:
        raise ValueError(
            "target must lie in [0, 1] for labels that are each yes or no, got values from "
            f"{float(target.min()):.6g} to {float(target.max()):.6g}; for other values use least squares."
        )


class Passes:
    """The samples of this process, pass by pass: checked in the first pass, and known again in every other.

    A certificate speaks of the samples of its last pass. If they were not those of the passes before, or none at all,
    it would be true of nothing.
    """

    def __init__(self, chunks: Chunks, shape: tuple[int, int], kind: TargetKind) -> None:
        self._chunks, self._shape, self._kind = chunks, shape, kind
        self._first: int | None = None
        #: How many were read to the end.
        self.complete = 0

    def __iter__(self) -> Iterator[Chunk]:
        """One pass.

        Raises:
            ValueError: for chunks that do not fit, and at the end of a pass that saw others than the first.
            TypeError: for what is no chunk.
        """
        rows = 0
        for chunk in self._chunks():
            # Later passes are checked by what is cheap: the whole is compared in the end.
            if self._first is None:
                check_chunk(chunk, self._shape, self._kind)
            rows += len(chunk.basis)
            yield chunk
        if self._first is None:
            self._first = rows
        elif rows != self._first:
            raise ValueError(
                "chunks must give the same samples in every pass: "
                f"pass 1 had {self._first}, pass {self.complete + 1} has {rows}. Give a function that begins anew "
                "whenever it is called, not one that hands on an iterator."
            )
        self.complete += 1


def rows_at_once(outputs: int, device: torch.device) -> int:
    """How many samples a pass should hold at a time: bounds memory for many outputs, and rounding for few."""
    entries = _MAX_ENTRIES.get(device.type, _MAX_ENTRIES_ELSEWHERE)
    return min(max(_MIN_ROWS, entries // outputs), _MAX_ROWS)


def slices(chunk: Chunk, rows: int) -> Iterator[Chunk]:
    """The chunk in pieces of at most `rows` samples."""
    for first in range(0, len(chunk.basis), rows):
        piece = slice(first, first + rows)
        offset = None if chunk.offset is None else chunk.offset[piece]
        yield Chunk(chunk.basis[piece], chunk.target[piece], offset)


def total_of(processes: Processes, *tensors: Tensor) -> list[Tensor]:
    """Sums over the processes, in one message."""
    flat = processes.total(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
