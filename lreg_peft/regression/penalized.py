"""Penalised least squares in sparse normal equations, and how much penalty: by restricted maximum likelihood.

|y - Phi c|^2 + lambda c^T K c is minimised for each output, Phi and K of a mesh on a line or of simplices. As a mixed
model (Wahba 1978; Wood 2017, sec. 6.2) the jumps of the gradient that K measures are normal with variance sigma^2 /
lambda; lambda is shared by the outputs, and the posterior gives the uncertainty of the function.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse
from scipy.sparse.linalg import SuperLU, splu

from .mesh1d import Array

# A multiple of the identity, relative to the mean diagonals of the matrices of samples and of the penalty: it decides
# only what neither does (no samples in some direction at all), in favour of small values.
_RIDGE, _ROUGH_RIDGE = 1e-13, 1e-15

# Range of log lambda around the one that balances the traces of both matrices, and values tried first.
_LOW, _HIGH, _FIRST = -20.0, 25.0, 12

_STIFF = 20.0  # of log lambda: functions are linear

_TOLERANCE, _ROUGH = 0.03, 0.5  # of log lambda: the first changes the score in the fourth digit only
# A trace is taken as it is up to so many nodes, else from so many probes.
_SMALL, _PROBES = 500, 32
# Most effective degrees of freedom, of the observations: the rest tells the noise.
_MOST_EDF = 0.8

_BLOCK = 1 << 22  # entries of solutions held at once


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
    moment: Array
    square: Array
    rough: sparse.csc_array
    n_samples: float
    nullity: int
    active: NDArray[np.bool_]

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
    coefficients: Array
    objective: Array
    log_determinant: float
    factor: SuperLU
    matrix: sparse.csc_array

    def gap(self, problem: Problem) -> float:
        """How far the objectives, summed, can be above their minimum."""
        rest = problem.moment - self.matrix @ self.coefficients
        return float((rest * self.factor.solve(rest)).sum())


@dataclass
class Posterior:
    """What the samples leave open about the values at the nodes, over the noise variance: the inverse of H."""

    precision: sparse.csc_array
    _factor: SuperLU | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_factor": None}  # SuperLU's own memory; made again when asked for

    def variance(self, indices: NDArray[np.int64], weights: Array) -> Array:
        """Of combinations of values: `weights` `[m, width]` of the nodes `indices`, to `[m]`."""
        if self._factor is None:
            self._factor = factorize(self.precision)
        n = self.precision.shape[0]
        touched, local = np.unique(indices, return_inverse=True)
        local = local.reshape(indices.shape)
        width = max(1, _BLOCK // n)
        result = np.zeros(len(indices))
        for start in range(0, len(touched), width):
            block = touched[start : start + width]
            unit = np.zeros((n, len(block)))
            unit[block, np.arange(len(block))] = 1
            columns = self._factor.solve(unit)
            row, place = np.nonzero((local >= start) & (local < start + len(block)))
            entries = columns[indices[row], (local[row, place] - start)[:, None]]  # [m, width]
            np.add.at(result, row, weights[row, place] * (entries * weights[row]).sum(1))
        return result


def rows_of(indices: NDArray[np.int64], weights: Array, n: int) -> sparse.csr_array:
    """Rows with the given entries: `[len(indices), n]`."""
    rows, width = indices.shape
    pointers = np.arange(0, rows * width + 1, width)
    return sparse.csr_array((weights.ravel(), indices.ravel(), pointers), shape=(rows, n))


def factorize(matrix: sparse.csc_array) -> SuperLU:
    """Of a symmetric positive definite matrix, with pivots on the diagonal."""
    return splu(
        matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True, "Equil": False}
    )


def solve(problem: Problem, log_smoothing: float) -> Solved:
    """Minimise for one lambda."""
    n = problem.gram.shape[0]
    weight = math.exp(log_smoothing)
    ridge = (_RIDGE * problem.gram.trace() + _ROUGH_RIDGE * weight * problem.rough.trace()) / n
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

    def __init__(self, smoothing: str | float, seed: int = 0):
        self.smoothing = smoothing
        self.seed = seed
        self.log_smoothing: float | None = None if isinstance(smoothing, str) else math.log(max(smoothing, 1e-300))

    def run(self, problem: Problem, *, polish: bool = True) -> tuple[Solved, float]:
        """The solution at the best lambda and its effective degrees of freedom; a rough search unless `polish`."""
        if not isinstance(self.smoothing, str) or problem.rough.nnz == 0:
            solved = solve(problem, self.log_smoothing or 0.0)
            return solved, self._edf(problem, solved)
        low, high = problem.balance + _LOW, problem.balance + _HIGH
        tried: dict[float, tuple[float, Solved]] = {}

        def score(at: float) -> float:
            if at not in tried:
                solved = solve(problem, at)
                tried[at] = (restricted_likelihood(problem, solved), solved)
            return tried[at][0]

        if self.log_smoothing is None:
            centre, reach = min(np.linspace(low, high, _FIRST).tolist(), key=score), (high - low) / (_FIRST - 1)
        else:
            centre, reach = float(np.clip(self.log_smoothing, low, high)), 1.0
        while True:
            bounds = max(centre - reach, low), min(centre + reach, high)
            optimize.minimize_scalar(
                lambda at: score(float(at)), bounds=bounds, method="bounded",
                options={"xatol": _TOLERANCE if polish else _ROUGH},
            )  # fmt: skip
            best = min((centre, *tried), key=score)
            if abs(best - centre) < 0.7 * reach or best in (low, high):
                break
            centre, reach = best, 2 * reach
        solved, edf = tried[best][1], self._edf(problem, tried[best][1])
        while polish and edf > max(_MOST_EDF * problem.n_samples, 1.01 * problem.nullity) and best < high:
            best = min(best + 0.5, high)
            solved = solve(problem, best)
            edf = self._edf(problem, solved)
        self.log_smoothing = best
        return solved, edf

    def _edf(self, problem: Problem, solved: Solved) -> float:
        """tr(H^-1 Phi^T W Phi); from random signs (Hutchinson 1990) for many nodes."""
        n = len(problem.moment)
        if n <= _SMALL:
            return float(solved.factor.solve(problem.gram.toarray()).trace())
        probes = np.random.default_rng(self.seed).choice([-1.0, 1.0], size=(n, _PROBES))
        trace = (probes * solved.factor.solve(problem.gram @ probes)).sum() / _PROBES
        return float(np.clip(trace, 1.0, n))


def restricted_likelihood(problem: Problem, solved: Solved) -> float:
    """Twice its negative logarithm, up to a constant of the mesh."""
    active = problem.active
    rank = problem.gram.shape[0] - problem.nullity
    fit = max(problem.n_samples - problem.nullity, 1.0) * np.log(solved.objective[active]).sum()
    return float(fit + active.sum() * (solved.log_determinant - rank * solved.log_smoothing))


def cross_validation(problem: Problem, solved: Solved, edf: float) -> float:
    """Generalised, over the variance of y, mean over the outputs that vary."""
    relative = (residual_squares(problem, solved) / np.maximum(problem.square, 1e-300))[problem.active]
    return float(relative.mean() / max(1 - edf / problem.n_samples, 1e-2) ** 2) if len(relative) else 0.0


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


def residual_squares(problem: Problem, solved: Solved) -> Array:
    """`[n_outputs]`, |y - Phi c|^2."""
    c = solved.coefficients
    squares = problem.square - 2 * (problem.moment * c).sum(0) + (c * (problem.gram @ c)).sum(0)
    return np.maximum(squares, 1e-14 * problem.square)
