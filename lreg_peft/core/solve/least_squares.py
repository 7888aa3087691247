"""Least squares with an offset and several outputs, from one or two passes and a check."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .problem import (
    Chunks,
    Passes,
    Processes,
    Report,
    Solution,
    Status,
    check_options,
    rows_at_once,
    slices,
    total_of,
)

# The normal equations square the condition number of the basis. Up to this condition of the product at least five
# digits of the coefficients are right after the first solve, and every further pass adds as many.
_MAX_CONDITION = 1e11

_MIN_ROWS = 4096  # a QR step repeats the triangle so far, which many samples at once make cheap


@dataclass(frozen=True)
class _Spectrum:
    """Eigenvectors and eigenvalues of the Hessian A^T A / n + ridge; of both only what rounding leaves sure."""

    vectors: Tensor  # [features, rank]
    values: Tensor  # [rank]
    # Those that only the rounding of the basis determines, as far as fp64 tells them from nothing.
    unsure: tuple[Tensor, Tensor] | None = None

    def solve(self, gradient: Tensor) -> Tensor:
        return self.vectors @ ((self.vectors.T @ gradient) / self.values.unsqueeze(1))

    def gap(self, gradient: Tensor) -> float:
        """P minus its minimum: for a quadratic function half of g^T H^-1 g, exactly."""
        return _descent(self.vectors, self.values, gradient)

    def left_out(self, gradient: Tensor, objective: float) -> float:
        """What coefficients along the unsure directions could lower P by; no more than all of it."""
        if self.unsure is None:
            return 0.0
        # With a margin: so close to the rounding of the basis, sums in fp64 leave seven digits at least.
        return min(_descent(*self.unsure, gradient) * (1 + 1e-6), objective)


def _descent(vectors: Tensor, values: Tensor, gradient: Tensor) -> float:
    return ((vectors.T @ gradient).square() / values.unsqueeze(1)).sum().item() / 2


@dataclass(frozen=True)
class _Sums:
    """Sums over all samples at some coefficients, fp64."""

    n: float  # over scale
    squares: float
    product: Tensor  # basis^T residual, [features, outputs]
    gram: Tensor  # basis^T basis, [features, features]


def solve_least_squares(
    chunks: Chunks,
    start: Tensor,
    *,
    ridge: float = 0.0,
    scale: float = 1.0,
    tolerance: float = 1e-6,
    max_passes: int = 20,
    processes: Processes | None = None,
    report: Report | None = None,
) -> Solution:
    """Minimise P(c) = scale / 2 * mean_i |offset_i + basis_i c - target_i|^2 + ridge/2 |c|^2.

    The normal equations are accumulated chunk by chunk in fp64. If their condition is bad, the triangular factor of a
    QR decomposition is accumulated instead, which does not square the condition number of the basis. A further pass
    computes the gradient afresh, which certifies the result; if it is not good enough, it refines it. Without a
    ridge, directions that the samples do not determine, up to the rounding of the basis, keep their value in `start`
    and have no part in the gap: from zero, this is the solution of smallest norm. The gap is then a bound over the
    coefficients in the other directions; `gap + left_out` is one over all coefficients whatever, as large as those
    along directions of that kind may be.

    Memory: O(features^2 + features * outputs), and the chunks in fp64, a few thousand samples at a time.

    Args:
        chunks: begins a pass over the samples; targets floating `[n, outputs]`.
        start: `[features, outputs]`; its dtype and device are those of the result.
        ridge: at least 0.
        scale: positive; `2 / outputs` makes the first term the mean squared error.
        tolerance: gap at which to stop, in the units of P.
        max_passes: at least 3.
        processes: how several processes act as one; each passes its own samples, and all get the same result.
        report: told after every pass.

    Returns:
        A `Solution` with the method "normal equations" or "QR".

    Raises:
        ValueError: for empty or non-finite data, shapes that do not fit, passes that differ, or options out of range.

    Warns:
        RuntimeWarning: if the tolerance was not reached.
    """
    check_options(start, scale, tolerance, max_passes)
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge must be at least 0 and finite, got {ridge}.")
    processes = processes or Processes()
    c = start.detach().double()
    samples = Passes(chunks, (start.shape[0], start.shape[1]), "values")
    sums = _sum_up(samples, c, processes, scale, with_gram=True)
    if not sums.n:
        raise ValueError("there are no samples to fit.")
    passes, iterations, method = 1, 0, "normal equations"
    spectrum = _of_normal_equations(sums, ridge)
    if spectrum is None:
        spectrum, method = _of_triangle(*_triangle(samples, start, processes), sums.n, ridge), "QR"
        passes += 1
    gradient = sums.product / sums.n + ridge * c
    best: Solution | None = None
    status: Status = "iteration_limit"
    while passes < max_passes:
        c = c - spectrum.solve(gradient)
        rounded = c.to(start.dtype)
        sums = _sum_up(samples, rounded.double(), processes, scale)
        passes, iterations = passes + 1, iterations + 1
        gradient = sums.product / sums.n + ridge * rounded.double()
        objective = sums.squares / (2 * sums.n) + ridge / 2 * rounded.double().square().sum().item()
        gap = spectrum.gap(gradient)
        if report is not None:
            report(passes, objective, gap)
        stalled = best is not None and not gap < best.gap / 2
        if best is None or gap < best.gap:
            norm, left_out = gradient.norm().item(), spectrum.left_out(gradient, objective)
            best = Solution(
                objective, gap, norm, iterations, passes, "converged", method, "", rounded, left_out=left_out
            )
        if best.gap <= tolerance or stalled:
            status = "converged" if best.gap <= tolerance else "stalled"
            break
        c = rounded.double()
    assert best is not None  # max_passes >= 3 leaves one turn of the loop after the QR pass
    message = _message(status, best.gap, tolerance, passes, method, start.dtype) + _remark(spectrum, best.left_out)
    result = replace(best, passes=passes, status=status, message=message)
    result.warn_unless_converged()
    return result


def _message(status: Status, gap: float, tolerance: float, passes: int, method: str, dtype: torch.dtype) -> str:
    found = f"least squares by {method}: gap {gap:.1e} after {passes} passes"
    if status == "converged":
        return f"{found}, within the tolerance {tolerance:.1e}."
    if status == "stalled":
        return f"{found}, which rounding keeps above the tolerance {tolerance:.1e}: raise tolerance or ridge" + (
            ", or keep the coefficients in fp64." if dtype != torch.float64 else "."
        )
    return f"{found} is above the tolerance {tolerance:.1e}: raise max_passes, tolerance or ridge."


def _remark(spectrum: _Spectrum, left_out: float) -> str:
    if spectrum.unsure is None:
        return ""
    unsure, total = len(spectrum.unsure[1]), len(spectrum.vectors)
    return (
        f" The basis determines {unsure} of {total} directions by no more than its rounding; they kept their start. "
        f"Huge coefficients along them could lower the objective by up to {left_out:.1e} more: a ridge above 0 rules "
        "them out."
    )


def _sum_up(samples: Passes, c: Tensor, processes: Processes, scale: float, *, with_gram: bool = False) -> _Sums:
    """One pass; the Gram matrix is the same in all of them."""
    features, outputs = c.shape
    n, squares = c.new_zeros(1), c.new_zeros(1)
    product = c.new_zeros(features, outputs)
    gram = c.new_zeros(features, features)
    with processes.together():
        for whole in samples:
            for chunk in slices(whole, rows_at_once(outputs, c.device)):
                basis, target = chunk.basis.double(), chunk.target.double()
                residual = basis @ c - (target if chunk.offset is None else target - chunk.offset)
                n += len(residual)
                squares += residual.square().sum()
                product += basis.T @ residual
                if with_gram:
                    gram += basis.T @ basis
    n, squares, product, gram = total_of(processes, n, squares, product, gram)
    return _Sums(n.item() / scale, squares.item(), product, gram)


def _of_normal_equations(sums: _Sums, ridge: float) -> _Spectrum | None:
    """None if the condition is bad."""
    values, vectors = torch.linalg.eigh(sums.gram / sums.n)
    if not values[0] + ridge > (values[-1] + ridge) / _MAX_CONDITION:
        return None
    return _Spectrum(vectors, values + ridge)


def _triangle(samples: Passes, like: Tensor, processes: Processes) -> tuple[Tensor, float]:
    """R of the QR decomposition of the basis, fp64 `[features, features]`, and the precision of the basis."""
    features = like.shape[0]
    factor = like.new_zeros(features, features, dtype=torch.float64)
    precision = 0.0
    with processes.together():
        for whole in samples:
            precision = max(precision, torch.finfo(whole.basis.dtype).eps)
            for chunk in slices(whole, max(_MIN_ROWS, 4 * features)):
                factor = torch.linalg.qr(torch.cat((factor, chunk.basis.double())), mode="r").R
    parts = processes.gather(factor)
    precision = max(processes.gather(like.new_tensor([precision], dtype=torch.float64))).item()
    return parts[0] if len(parts) == 1 else torch.linalg.qr(torch.cat(parts), mode="r").R, precision


def _of_triangle(factor: Tensor, precision: float, n: float, ridge: float) -> _Spectrum:
    """Without a ridge, directions that the basis determines by no more than its own rounding are left out."""
    _, singular, rows = torch.linalg.svd(factor / math.sqrt(n))
    values = singular.square() + ridge
    if ridge > 0:
        return _Spectrum(rows.T, values)
    known = singular > len(singular) * precision * singular[0]
    something = singular > len(singular) * torch.finfo(torch.float64).eps * singular[0]
    unsure = something & ~known
    pair = (rows.T[:, unsure], values[unsure]) if unsure.any() else None
    return _Spectrum(rows.T[:, known], values[known], pair)
