"""Multinomial and binary cross-entropy with an offset and a ridge: the optimum, and the proof that it is one.

L-BFGS in the metric of a Kronecker product, with a Newton-CG finish where L-BFGS crawls. The Hessian is the mean over
samples of (diag(p) - p p^T) x (basis basis^T). With the mean of each factor in place of the product's, and
s (diag(q) - q q^T) for the first, with the mean curvature of every class on its diagonal, its inverse is explicit: one
eigendecomposition [features, features] and a rank-one correction per eigenvector (Sherman-Morrison). This needs about
half of the passes that the diagonal alone does, because classes compete: raising one logit lowers the others'
probabilities.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .problem import (
    Chunk,
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

Targets = Literal["classes", "labels"]

# Pairs of steps and gradient changes that L-BFGS keeps, and the memory for all of them (fp64 entries: 512 MiB).
_MAX_PAIRS = 20
_MAX_PAIR_ENTRIES = 1 << 26

# L-BFGS is left for Newton-CG if the gap has not fallen tenfold in so many passes.
_PATIENCE = 25

# A precision is exhausted if the last so many steps have not brought the smallest gap so far.
_PATIENCE_ROUNDING = {torch.float32: 8, torch.float64: 25}

_SUFFICIENT_DECREASE = 1e-4
_MAX_TRIALS = 12  # per line search
_MAX_CG = 60  # products per Newton step


@dataclass(frozen=True)
class _Point:
    """P and its derivatives at some coefficients, fp64."""

    coefficients: Tensor  # [features, outputs]
    value: float
    gradient: Tensor  # [features, outputs]
    curvature: Tensor  # [outputs], mean of p (1 - p), or an estimate of what it will be

    def gap(self, ridge: float) -> float:
        return self.gradient.square().sum().item() / (2 * ridge)


@dataclass
class _Objective:
    """P(c) = mean cross-entropy(offset + basis c, target) + ridge/2 |c|^2, pass by pass."""

    chunks: Chunks
    shape: tuple[int, int]
    targets: Targets
    ridge: float
    processes: Processes
    scale: float = 1.0
    passes: int = 0
    n_over_scale: float = 0.0  # sums over the samples divided by it are P's
    gram: Tensor = field(default_factory=lambda: torch.empty(0))  # mean of basis basis^T, fp64; set by the first pass

    def __post_init__(self) -> None:
        self._samples = Passes(self.chunks, self.shape, self.targets)

    def evaluate(self, c: Tensor, dtype: torch.dtype) -> _Point:
        """One pass. Logits and residuals are computed in `dtype`, sums over chunks in fp64.

        The curvature of the first point, where all classes may still be equally likely, is estimated by the squared
        residual, which has the same mean once the probabilities are right, and says already how rare a class is.
        """
        features, outputs = self.shape
        first = self.passes == 0
        n, total, curvature = c.new_zeros(1), c.new_zeros(1), c.new_zeros(outputs)
        gradient = torch.zeros_like(c)
        gram = c.new_zeros(features, features) if first else c.new_zeros(0)
        with self.processes.together():
            for chunk in self._pieces(c.device):
                basis, p = chunk.basis.to(dtype), self._logits(chunk, c, dtype)
                total += _to_probabilities(p, chunk.target).sum(dtype=torch.float64)  # what were logits is p now
                n += len(p)
                if not first:  # the sum of p as a product, which adds in blocks
                    curvature += ((p.new_ones(1, len(p)) @ p).squeeze(0) - _squares(p)).double()
                _subtract_target(p, chunk.target)
                gradient += basis.T @ p
                if first:
                    curvature += _squares(p).double()
                    gram += basis.double().T @ basis.double()
        n, total, gradient, curvature, gram = total_of(self.processes, n, total, gradient, curvature, gram)
        if first:
            if not n:
                raise ValueError("there are no samples to fit.")
            self.n_over_scale = n.item() / self.scale
            self.gram = gram / n
        self.passes += 1
        value = total.item() / self.n_over_scale + self.ridge / 2 * c.square().sum().item()
        gradient = self._without_shift(gradient).div_(self.n_over_scale).add_(c, alpha=self.ridge)
        return _Point(c, value, gradient, curvature / self.n_over_scale)

    def hessian_product(self, c: Tensor, direction: Tensor, dtype: torch.dtype) -> Tensor:
        """One pass; `[features, outputs]`."""
        product = torch.zeros_like(c)
        with self.processes.together():
            for chunk in self._pieces(c.device):
                basis, p = chunk.basis.to(dtype), self._logits(chunk, c, dtype)
                change = basis @ direction.to(dtype)
                if self.targets == "classes":
                    p = torch.softmax(p, dim=1, out=p)
                    change.mul_(p)
                    change.addcmul_(p, change.sum(dim=1, keepdim=True), value=-1)
                else:
                    p.sigmoid_()
                    change.mul_(p).mul_(p.neg_().add_(1))
                product += basis.T @ change
        (product,) = total_of(self.processes, product)
        self.passes += 1
        return self._without_shift(product).div_(self.n_over_scale).add_(direction, alpha=self.ridge)

    def _pieces(self, device: torch.device) -> Iterator[Chunk]:
        """One pass, a bounded number of samples at a time."""
        for chunk in self._samples:
            yield from slices(chunk, rows_at_once(self.shape[1], device))

    def _without_shift(self, product: Tensor) -> Tensor:
        """Take out, in place, what only rounding can leave: probabilities sum to one, so their changes sum to zero.

        Steps would magnify it by 1 / ridge, since nothing but the ridge resists a common shift of all classes.
        """
        return product.sub_(product.mean(dim=1, keepdim=True)) if self.targets == "classes" else product

    def _logits(self, chunk: Chunk, c: Tensor, dtype: torch.dtype) -> Tensor:
        """A new `[n, outputs]`."""
        basis, c = chunk.basis.to(dtype), c.to(dtype)
        return basis @ c if chunk.offset is None else torch.addmm(chunk.offset.to(dtype), basis, c)


def _to_probabilities(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of every sample `[n]`; `logits` `[n, outputs]` become p, in place."""
    if target.is_floating_point():
        loss = (torch.nn.functional.softplus(logits) - logits * target.to(logits.dtype)).sum(dim=1)
        logits.sigmoid_()
        return loss
    logits -= logits.amax(dim=1, keepdim=True)
    own = logits.gather(1, target.unsqueeze(1)).squeeze(1)
    total = logits.exp_().sum(dim=1, keepdim=True)
    logits *= 1 / total
    return total.squeeze(1).log() - own


def _squares(p: Tensor) -> Tensor:
    return torch.linalg.vector_norm(p, dim=0).square()


def _subtract_target(p: Tensor, target: Tensor) -> None:
    """Make p p - target, in place."""
    if target.is_floating_point():
        p.sub_(target.to(p.dtype))
    else:
        p.scatter_add_(1, target.unsqueeze(1), -p.new_ones(len(p), 1))


class _Metric:
    """The inverse of the Kronecker approximation of the Hessian; see the head of this file."""

    def __init__(self, objective: _Objective) -> None:
        values, self.vectors = torch.linalg.eigh(objective.gram)
        self.values = values.clamp_min(0).unsqueeze(1)  # [features, 1]
        self.ridge = objective.ridge
        self.classes = objective.targets == "classes"

    def at(self, point: _Point) -> None:
        """Take the curvature from `point`."""
        share = point.curvature  # s q
        if self.classes:
            share, self.q = _competing(share)
        self.inverse = 1 / (self.values * share + self.ridge)  # [features, outputs]
        if self.classes:
            # Sherman-Morrison; 1 - g s q^T D^-1 q written without cancellation, as sum q ridge / D.
            rest = (self.inverse @ self.q.unsqueeze(1)) * self.ridge  # [features, 1]
            self.correction = self.values * share.sum() / rest

    def solve(self, gradient: Tensor) -> Tensor:
        """Apply the inverse: `[features, outputs]` to the same."""
        turned = self.vectors.T @ gradient
        turned *= self.inverse
        if self.classes:
            pull = (turned @ self.q.unsqueeze(1)) * self.correction  # [features, 1]
            turned.addcmul_(self.inverse, self.q * pull)
        return self.vectors @ turned


def _competing(curvature: Tensor) -> tuple[Tensor, Tensor]:
    """s q and q, q a distribution, such that s (diag(q) - q q^T) has about this diagonal `[classes]`."""
    share = curvature.clamp_min(torch.finfo(curvature.dtype).tiny)
    for _ in range(20):
        share = curvature.clamp_min(1e-30) / (1 - share / share.sum()).clamp_min(1e-3)
    return share, share / share.sum()


class _History:
    """The pairs of L-BFGS, and the direction they give (Nocedal 1980)."""

    def __init__(self, size: int) -> None:
        pairs = min(_MAX_PAIRS, max(4, _MAX_PAIR_ENTRIES // (2 * size)))
        self.pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=pairs)

    def add(self, step: Tensor, change: Tensor) -> None:
        product = (step * change).sum().item()
        if product > 0:  # always, but for rounding: P is strongly convex
            self.pairs.append((step, change, product))

    def direction(self, gradient: Tensor, metric: _Metric) -> Tensor:
        q = gradient.clone()
        factors = []
        for step, change, product in reversed(self.pairs):
            factor = (step * q).sum() / product
            factors.append(factor)
            q -= factor * change
        q = metric.solve(q)
        if self.pairs:  # the metric's scale, from the latest change of the gradient
            _, change, product = self.pairs[-1]
            q *= product / (change * metric.solve(change)).sum()
        for (step, change, product), factor in zip(self.pairs, reversed(factors), strict=True):
            q += step * (factor - (change * q).sum() / product)
        return q.neg_()


def solve_cross_entropy(
    chunks: Chunks,
    start: Tensor,
    *,
    ridge: float,
    targets: Targets = "classes",
    scale: float = 1.0,
    tolerance: float = 1e-6,
    max_passes: int = 500,
    processes: Processes | None = None,
    report: Report | None = None,
) -> Solution:
    """Minimise P(c) = scale * mean_i CE(offset_i + basis_i c, target_i) + ridge/2 |c|^2.

    P is strongly convex, so that |grad P|^2 / (2 ridge) bounds its distance from the minimum at any point: Fenchel's
    duality gap for this problem. The gap of the result is computed in fp64 from all samples, for the coefficients as
    they are returned.

    Logits are computed in the precision of the basis as long as that brings progress, and in fp64 for the
    certificate and whatever progress it asks for. Sums over samples are fp64 throughout.

    Memory: coefficients and gradient in fp64, up to 20 pairs of such tensors (no more than 512 MiB, but at least 4
    pairs), and at most three [samples, outputs] matrices of a bounded number of samples, the offset among them: for
    many classes, give chunks of few samples.

    Args:
        chunks: begins a pass over the samples.
        start: `[features, outputs]`, where to start: zeros, or an earlier solution. Its dtype and device are those of
            the result.
        ridge: positive. Without it there may be no minimum (separable classes), and there is no certificate.
        targets: "classes" for one of several classes, int64 `[n]`; "labels" for independent yes-or-no outputs,
            floating `[n, outputs]` in [0, 1], whose cross-entropies are summed.
        scale: positive; `1 / outputs` makes the sum over labels their mean.
        tolerance: gap at which to stop, in the units of P.
        max_passes: at least 3.
        processes: how several processes act as one; each passes its own samples, and all get the same result.
        report: told after every pass.

    Returns:
        A `Solution` with the method "L-BFGS" or "L-BFGS, Newton-CG".

    Raises:
        ValueError: for empty or non-finite data, labels outside the classes, shapes that do not fit, or options out
            of range.

    Warns:
        RuntimeWarning: if the tolerance was not reached.
    """
    check_options(start, scale, tolerance, max_passes)
    if not 0 < ridge < math.inf:
        raise ValueError(
            f"cross-entropy needs ridge > 0, and finite, got {ridge}: without it there is no certificate, and for "
            "separable classes no minimum."
        )
    if targets not in ("classes", "labels"):
        raise ValueError(f"targets must be 'classes' or 'labels', got {targets!r}.")
    shape = start.shape[0], start.shape[1]
    objective = _Objective(chunks, shape, targets, ridge, processes or Processes(), scale)
    result = _Descent(objective, start, tolerance, max_passes, report).run()
    result.warn_unless_converged()
    return result


class _Descent:
    """One solve: the state of the iteration."""

    def __init__(
        self, objective: _Objective, start: Tensor, tolerance: float, max_passes: int, report: Report | None
    ) -> None:
        self.objective, self.tolerance, self.max_passes, self.report = objective, tolerance, max_passes, report
        self.goal = tolerance  # gap of the working coefficients at which their certificate is worth a pass
        self.final_dtype = start.dtype
        self.dtype = torch.float64 if start.dtype == torch.float64 else torch.float32
        self.history = _History(start.numel())
        self.gaps: list[tuple[int, float]] = []  # passes and gap of every point
        self.newton = False
        self.iterations = 0
        c = start.detach().double()
        if objective.targets == "classes" and start.shape[1] > 1:
            # A common shift of all classes changes no probability, and the ridge wants none. An earlier solution has
            # none but its rounding, and keeps every bit.
            shift = c.mean(dim=1, keepdim=True)
            if shift.abs().max() > torch.finfo(start.dtype).eps * c.abs().max():
                c = c - shift
        self.point = self._evaluate(c)
        self.metric = _Metric(objective)

    def run(self) -> Solution:
        certified: _Point | None = None
        status: Status = "iteration_limit"
        # Two passes are kept: for fp64, and for the certificate.
        while self.objective.passes < self.max_passes - 2:
            if self.point.gap(self.objective.ridge) <= self.goal:
                certified = self._certify()
                if certified.gap(self.objective.ridge) <= self.tolerance:
                    break
                if self.dtype == torch.float32:
                    self._refine_precision()
                elif self.goal == self.tolerance:
                    self.goal = self.tolerance / 10  # room for the rounding of the coefficients
                else:
                    status = "stalled"
                    break
                continue
            if not self._is_lost_in_rounding() and self._advance():
                continue
            if self.objective.passes >= self.max_passes - 2:
                break
            if self.dtype == torch.float32:
                self._refine_precision()
            elif not self.newton:
                self.newton = True
                self.gaps.clear()
            else:
                status = "stalled"
                break
        if certified is None or certified.coefficients.ne(self._rounded()).any():
            certified = self._certify()
        if certified.gap(self.objective.ridge) <= self.tolerance:
            status = "converged"
        return self._solution(certified, status)

    def _evaluate(self, c: Tensor) -> _Point:
        point = self.objective.evaluate(c, self.dtype)
        if self.report is not None:
            self.report(self.objective.passes, point.value, point.gap(self.objective.ridge))
        return point

    def _rounded(self) -> Tensor:
        return self.point.coefficients.to(self.final_dtype).double()

    def _certify(self) -> _Point:
        """The present point as it will be returned, in fp64."""
        rounded = self._rounded()
        if self.dtype == torch.float64 and torch.equal(rounded, self.point.coefficients):
            return self.point
        self.dtype, working = torch.float64, self.dtype
        certified = self._evaluate(rounded)
        self.dtype = working
        return certified

    def _refine_precision(self) -> None:
        """Go on in fp64."""
        self.dtype = torch.float64
        self.gaps.clear()
        self.point = self._evaluate(self.point.coefficients)

    def _is_lost_in_rounding(self) -> bool:
        """Whether the last steps have not led anywhere."""
        gaps = [gap for _, gap in self.gaps]
        patience = _PATIENCE_ROUNDING[self.dtype]
        return len(gaps) > patience and min(gaps[-patience:]) > min(gaps)

    def _advance(self) -> bool:
        """One step downhill; False if rounding, or the number of passes, leaves none."""
        gap = self.point.gap(self.objective.ridge)
        self.gaps.append((self.objective.passes, gap))
        earlier = [past for passes, past in self.gaps if passes <= self.objective.passes - _PATIENCE]
        self.newton = self.newton or (bool(earlier) and gap > earlier[-1] / 10)
        self.metric.at(self.point)
        direction = (
            self._newton_direction() if self.newton else self.history.direction(self.point.gradient, self.metric)
        )
        new = self._search(direction)
        if new is None:
            return False
        self.history.add(new.coefficients - self.point.coefficients, new.gradient - self.point.gradient)
        self.point = new
        self.iterations += 1
        return True

    def _search(self, direction: Tensor) -> _Point | None:
        """Backtrack along `direction` until P falls; None if it does not."""
        old = self.point
        slope = (direction * old.gradient).sum().item()
        noise = 4 * torch.finfo(self.dtype).eps * abs(old.value)
        step = 1.0
        for _ in range(_MAX_TRIALS):
            if not slope < 0 or self.objective.passes >= self.max_passes - 1:
                return None
            new = self._evaluate(old.coefficients + step * direction)
            new_slope = (direction * new.gradient).sum().item()
            enough = new.value <= old.value + _SUFFICIENT_DECREASE * step * slope
            # Differences of P below its rounding say nothing, slopes still do (Hager & Zhang 2005).
            level = abs(new.value - old.value) <= noise and new_slope <= (2 * _SUFFICIENT_DECREASE - 1) * slope
            if enough or level:
                return new
            secant = slope / (slope - new_slope) if new_slope > slope else 0.5
            step *= min(max(secant, 0.1), 0.7)
        return None

    def _newton_direction(self) -> Tensor:
        """Conjugate gradients on the Newton equations, preconditioned by what L-BFGS knows of the inverse."""
        gradient = self.point.gradient
        # A tenth, but no more than the tolerance asks for.
        goal = max(0.1 * gradient.norm().item(), (self.goal * self.objective.ridge / 2) ** 0.5)
        direction = torch.zeros_like(gradient)
        residual = -gradient
        scaled = self.history.direction(residual, self.metric).neg_()
        search, product = scaled, (residual * scaled).sum()
        for _ in range(_MAX_CG):
            if residual.norm().item() <= goal or self.objective.passes >= self.max_passes - 2:
                break
            image = self.objective.hessian_product(self.point.coefficients, search, self.dtype)
            factor = product / (search * image).sum()
            direction = direction + factor * search
            residual = residual - factor * image
            scaled = self.history.direction(residual, self.metric).neg_()
            before, product = product, (residual * scaled).sum()
            search = scaled + (product / before) * search
        return direction

    def _solution(self, point: _Point, status: Status) -> Solution:
        gap = point.gap(self.objective.ridge)
        method = "L-BFGS, Newton-CG" if self.newton else "L-BFGS"
        passes = self.objective.passes
        found = f"cross-entropy by {method}: gap {gap:.1e} after {passes} passes"
        if status == "converged":
            message = f"{found}, within the tolerance {self.tolerance:.1e}."
        elif status == "stalled":
            message = (
                f"{found}, which rounding keeps above the tolerance {self.tolerance:.1e}: raise tolerance or ridge"
            )
            message += "." if self.final_dtype == torch.float64 else ", or keep the coefficients in fp64."
        else:
            message = f"{found} is above the tolerance {self.tolerance:.1e}: raise max_passes, tolerance or ridge."
        return Solution(
            point.value,
            gap,
            point.gradient.norm().item(),
            self.iterations,
            passes,
            status,
            method,
            message,
            point.coefficients.to(self.final_dtype),
        )
