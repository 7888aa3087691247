"""Penalised least squares in sparse normal equations, and how much penalty: by REML or by generalised cross-validation.

For each output, |y - Phi c|^2 + lambda c^T K c is minimised. The penalty weight lambda is shared by the outputs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import SuperLU, splu

Smoothing = Literal["reml", "gcv"]

# A multiple of the identity, relative to the mean diagonals of both matrices: it decides only what neither the samples
# nor the penalty do (no samples in some direction at all), in favour of small values.
_RIDGE = 1e-13

# Range of log lambda around the one that balances the traces of both matrices.
_LOW, _HIGH = -20.0, 16.0

_STIFF = 20.0  # of log lambda: functions are linear

_TOLERANCE = 0.03  # of log lambda: changes the score in the fourth digit only
_PROBES = 16

_SMALL = 100  # nodes up to which a trace costs nothing
_LARGE = 400  # nodes from which lambda follows the refinement in single steps
# Generalised cross-validation counts a degree of freedom as so many: plain, it interpolates noise now and then
# (Kim & Gu 2004).
COST = 1.4

_SPACING = 0.02  # of log lambda, in differences


@dataclass(frozen=True)
class Problem:
    """Normal equations of one mesh.

    Attributes:
        gram: `[n, n]`, Phi^T W Phi, sparse.
        moment: `[n, n_outputs]`, Phi^T W y.
        square: `[n_outputs]`, y^T W y.
        rough: `[n, n]`, the penalty K, sparse, positive semi-definite.
        n_samples: number of rows; the weights sum to it.
        nullity: dimension of the null space of K.
        active: `[n_outputs]`, outputs that vary; lambda is chosen on them.
    """

    gram: sparse.csc_array
    moment: np.ndarray
    square: np.ndarray
    rough: sparse.csc_array
    n_samples: float
    nullity: int
    active: np.ndarray

    @property
    def balance(self) -> float:
        """log lambda at which both matrices have the same trace."""
        return math.log(max(self.gram.trace(), 1e-300) / max(self.rough.trace(), 1e-300))


@dataclass(frozen=True)
class Solved:
    """A problem solved for one lambda.

    Attributes:
        log_smoothing: log lambda.
        coefficients: `[n, n_outputs]`.
        objective: `[n_outputs]`, |y - Phi c|^2 + lambda c^T K c (+ the ridge).
        log_determinant: of the matrix H of the normal equations.
        factor: of H.
        matrix: H.
    """

    log_smoothing: float
    coefficients: np.ndarray
    objective: np.ndarray
    log_determinant: float
    factor: SuperLU
    matrix: sparse.csc_array


def factorize(matrix: sparse.csc_array) -> SuperLU:
    """Of a symmetric positive definite matrix, with pivots on the diagonal."""
    return splu(
        matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True, "Equil": False}
    )


def solve(problem: Problem, log_smoothing: float) -> Solved:
    """Minimise for one lambda."""
    n = problem.gram.shape[0]
    weight = math.exp(log_smoothing)
    ridge = _RIDGE * (problem.gram.trace() + weight * problem.rough.trace()) / n
    matrix = (problem.gram + weight * problem.rough + ridge * sparse.eye_array(n)).tocsc()
    factor = factorize(matrix)
    coefficients = factor.solve(problem.moment)
    objective = problem.square - (problem.moment * coefficients).sum(0)
    # Below the rounding of this difference there is nothing to tell.
    objective = np.maximum(objective, 1e-14 * problem.square)
    log_determinant = float(np.log(np.abs(factor.U.diagonal())).sum())
    return Solved(log_smoothing, coefficients, objective, log_determinant, factor, matrix)


class SmoothingSearch:
    """Finds lambda for one mesh after the other, starting where the last search ended."""

    def __init__(self, smoothing: Smoothing | float, seed: int):
        self.smoothing = smoothing
        self.seed = seed
        self.log_smoothing: float | None = None if isinstance(smoothing, str) else math.log(max(smoothing, 1e-300))

    def run(self, problem: Problem, *, polish: bool) -> tuple[Solved, float]:
        """The solution at the best lambda and its effective degrees of freedom; a rough search unless `polish`."""
        if not isinstance(self.smoothing, str) or problem.rough.nnz == 0:
            at = self.log_smoothing or 0.0
            near = {x: (0.0, solve(problem, x)) for x in (at - 0.5, at, at + 0.5)}
            return near[at][1], _edf(problem, at, near)
        low, high = problem.balance + _LOW, problem.balance + _HIGH
        if self.smoothing == "reml" and not polish and self.log_smoothing is not None and len(problem.moment) > _LARGE:
            return self._step(problem, low, high)
        scores: dict[float, tuple[float, Solved]] = {}

        def evaluate(at: float) -> float:
            if at not in scores:
                solved = solve(problem, at)
                scores[at] = (self._score(problem, solved), solved)
            return scores[at][0]

        if self.log_smoothing is None:
            centre = min(np.linspace(low, high, 9).tolist(), key=evaluate)
            step = (high - low) / 8
        else:
            centre = float(np.clip(self.log_smoothing, low + 1, high - 1))
            step = 1.0
        best = _minimise(evaluate, float(centre), step, low, high, _TOLERANCE if polish else 0.5)
        self.log_smoothing = best
        return scores[best][1], _edf(problem, best, scores)

    def _step(self, problem: Problem, low: float, high: float) -> tuple[Solved, float]:
        """The lambda at hand for this mesh, and one update of Fellner and Schall for the next (Wood & Fasiolo 2017)."""
        assert self.log_smoothing is not None
        solved = solve(problem, float(np.clip(self.log_smoothing, low, high)))
        edf = self._probed_edf(problem, solved)
        c = solved.coefficients[:, problem.active]
        noise = residual_squares(problem, solved)[problem.active] / max(problem.n_samples - edf, 1.0)
        bent = ((c * (problem.rough @ c)).sum(0) / np.maximum(noise, np.finfo(float).tiny)).mean()
        ratio = math.log(max(edf - problem.nullity, 1e-3)) - math.log(max(bent, 1e-300))
        self.log_smoothing = solved.log_smoothing + float(np.clip(ratio - solved.log_smoothing, -2, 2))
        return solved, edf

    def _probed_edf(self, problem: Problem, solved: Solved) -> float:
        n = len(problem.moment)
        probes = np.random.default_rng(self.seed).choice([-1.0, 1.0], size=(n, _PROBES))
        trace = (probes * solved.factor.solve(problem.gram @ probes)).sum() / _PROBES
        return float(np.clip(trace, 1.0, n))

    def _score(self, problem: Problem, solved: Solved) -> float:
        active = problem.active
        if self.smoothing == "reml":
            rank = problem.gram.shape[0] - problem.nullity
            fit = max(problem.n_samples - problem.nullity, 1.0) * np.log(solved.objective[active]).sum()
            return float(fit + active.sum() * (solved.log_determinant - rank * solved.log_smoothing))
        edf = self._probed_edf(problem, solved)
        rest = residual_squares(problem, solved)[active] / problem.square[active]
        return float(np.log(rest).sum() - 2 * active.sum() * math.log(max(1 - COST * edf / problem.n_samples, 1e-3)))


def evidence(problem: Problem, solved: Solved) -> float:
    """Twice the negative restricted log-likelihood per sample and output, less that of a linear function.

    The difference is free of the constants of a mesh, so that meshes can be compared.
    """
    stiff = solve(problem, problem.balance + _STIFF)
    rank = problem.gram.shape[0] - problem.nullity
    degrees = max(problem.n_samples - problem.nullity, 1.0)
    fit = np.log(solved.objective[problem.active] / problem.square[problem.active]).mean()
    logs = solved.log_determinant - stiff.log_determinant - rank * (solved.log_smoothing - stiff.log_smoothing)
    return float(fit + logs / degrees)


def residual_squares(problem: Problem, solved: Solved) -> np.ndarray:
    """`[n_outputs]`, |y - Phi c|^2."""
    c = solved.coefficients
    squares = problem.square - 2 * (problem.moment * c).sum(0) + (c * (problem.gram @ c)).sum(0)
    return np.maximum(squares, 1e-14 * problem.square)


def _minimise(
    evaluate: Callable[[float], float], centre: float, step: float, low: float, high: float, tolerance: float
) -> float:
    """Of a smooth function of one variable: bracket, then parabolas."""
    left, right = max(centre - step, low), min(centre + step, high)
    while evaluate(left) < evaluate(centre) and left > low:
        centre, right = left, centre
        step *= 2
        left = max(left - step, low)
    while evaluate(right) < evaluate(centre) and right < high:
        centre, left = right, centre
        step *= 2
        right = min(right + step, high)
    points = {x: evaluate(x) for x in (left, centre, right)}
    for _ in range(12):
        centre = min(points, key=points.__getitem__)
        lower = [x for x in points if x < centre]
        upper = [x for x in points if x > centre]
        if not lower or not upper:
            break
        left, right = max(lower), min(upper)
        a, b = centre - left, right - centre
        fa, fb = points[left] - points[centre], points[right] - points[centre]
        curvature = fa / a + fb / b
        move = (fa / a * b - fb / b * a) / (2 * curvature) if curvature > 0 else 0.0
        if abs(move) < tolerance:
            if max(a, b) <= 12 * tolerance:
                break
            move = -0.4 * a if a > b else 0.4 * b
        point = float(np.clip(centre + move, left + 0.05 * a, right - 0.05 * b))
        points[point] = evaluate(point)
    return min(points, key=points.__getitem__)


def _edf(problem: Problem, at: float, scores: dict[float, tuple[float, Solved]]) -> float:
    """tr(H^-1 Phi^T W Phi), by the trace itself on a small mesh.

    It is n - lambda tr(H^-1 K), and lambda tr(H^-1 K) is the slope of log|H| in log lambda: on a larger mesh that of
    the parabola through the nearest values at hand.
    """
    n = problem.gram.shape[0]
    if n <= _SMALL:
        return float(scores[at][1].factor.solve(problem.gram.toarray()).trace())
    value = scores[at][1].log_determinant
    slopes = []
    for side in (-1, 1):
        others = [x for x in scores if (x - at) * side > _SPACING]
        if others:
            x = min(others, key=lambda x: abs(x - at))
            slopes.append((abs(x - at), (scores[x][1].log_determinant - value) / (x - at)))
    if len(slopes) == 2:
        (a, left), (b, right) = slopes
        slope = (left * b + right * a) / (a + b)
    else:
        slope = slopes[0][1]
    return float(np.clip(n - slope, 1.0, n))
