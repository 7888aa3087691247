"""Ridge regression with one penalty per group of coefficients, all chosen by restricted maximum likelihood.

The fixed-point iteration lambda_g <- sigma^2 edf_g / |theta_g|^2 (Schall 1991), which for such penalties is the
generalised Fellner-Schall update of Wood & Fasiolo (2017), with steps twice as long as long as they help. A group
without use gets a penalty without bound, and leaves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from .mesh1d import Array

_MAX_UPDATES = 100
_TOLERANCE = 1e-2  # of twice the restricted log-likelihood
_LONG = 1.4
_MAX_STEP = 6.0  # of the logarithm of a penalty, in one update

# A group leaves when its penalty is so many times the mean power of its columns; a penalty is never so much less.
_GONE = 1e6
_LEAST = 1e-9


@dataclass(frozen=True)
class Ridge:
    """The optimum for one output.

    Attributes:
        theta: `[p]`.
        penalties: `[groups]`, lambda; infinite for groups that have left.
        edf: `[groups]`.
        noise_variance: estimate of sigma^2.
        criterion: twice the negative restricted log-likelihood, up to a constant.
        objective: residual sum of squares plus penalties.
        gap: how far `objective` may be above its minimum.
        history: criterion after every update.
    """

    theta: Array
    penalties: Array
    edf: Array
    noise_variance: float
    criterion: float
    objective: float
    gap: float
    history: tuple[float, ...]


@dataclass(frozen=True)
class _State:
    log: Array
    theta: Array
    edf: Array
    power: Array  # |theta_g|^2
    residual: float
    noise: float
    criterion: float
    penalised: float


def fit_variances(
    gram: Array,
    product: Array,
    squares: float,
    groups: Sequence[int],
    total: float,
    *,
    start: Array | None = None,
    fixed: Array | None = None,
    kinds: NDArray[np.int64] | None = None,
    pools: Array | None = None,
    report: Callable[[], None] | None = None,
) -> Ridge:
    """Solve.

    Args:
        gram: `[p, p]`, centred.
        product: `[p]`, with the centred output.
        squares: of the centred output.
        groups: sizes, in the order of the columns.
        total: number of samples.
        start: `[groups]` penalties to start from; NaN where the default shall be taken.
        fixed: `[groups]` penalties to use as they are.
        kinds: `[groups]`, numbers; variances of one kind are related.
        pools: `[groups]`, of so many coefficients with the mean variance of its kind a group's variance knows.
        report: called after every update.

    Returns:
        The optimum.
    """
    sizes = np.asarray(groups, dtype=int)
    member = np.repeat(np.arange(len(sizes)), sizes)
    power = np.maximum(np.bincount(member, gram.diagonal(), len(sizes)) / sizes, 0.0)
    problem = _Problem(gram, product, squares, sizes, member, total)
    if fixed is not None:
        state = problem.at(np.log(np.maximum(fixed, 1e-12 * power + np.finfo(float).tiny)))
        return problem.result(state, [state.criterion])
    with np.errstate(divide="ignore"):
        low, high = np.log(power * _LEAST), np.log(power * _GONE)
        log = np.log(power)
        if start is not None:
            log = np.where(np.isnan(start), log, np.clip(np.log(start), low, high))
    # A column without variance, of a feature without values to tell apart: it has no coefficient.
    log = np.where(power > 1e-14 * max(gram.diagonal().max(initial=0.0), np.finfo(float).tiny), log, np.inf)
    state = problem.at(log)
    history = [state.criterion]
    kinds = np.zeros(len(sizes), dtype=int) if kinds is None else kinds
    pools = np.zeros(len(sizes)) if pools is None else pools
    for _ in range(_MAX_UPDATES if len(product) < 500 else _MAX_UPDATES // 4):
        with np.errstate(divide="ignore", invalid="ignore"):
            step = np.log(pooled_penalties(state.edf, state.power / state.noise, kinds, pools)) - state.log
        step = np.where(np.isfinite(state.log), np.clip(np.nan_to_num(step, nan=0.0), -_MAX_STEP, _MAX_STEP), 0.0)
        trial = problem.at(_kept(state.log + _LONG * step, low, high))
        history.append(trial.criterion)
        moved = (np.abs(np.where(np.isfinite(trial.log), step, 0.0)) * np.minimum(state.edf, 1.0)).max(initial=0.0)
        state = trial
        if report is not None:
            report()
        if moved < 0.05 or (abs(history[-1] - history[-2]) < _TOLERANCE and moved < 0.3):
            break
    return problem.result(state, history)


def pooled_penalties(edf: Array, used: Array, kinds: NDArray[np.int64], pools: Array) -> Array:
    """One update of Fellner, Schall, Wood and Fasiolo: penalties `[groups]`, the reciprocals of variances.

    Args:
        edf: `[groups]`.
        used: `[groups]`, squares of the coefficients over the noise variance.
        kinds: `[groups]`.
        pools: `[groups]`, coefficients of the kind's mean variance that are added to a group's own.
    """
    mean = (np.bincount(kinds, used) / np.maximum(np.bincount(kinds, edf), 1e-6))[kinds]
    with np.errstate(divide="ignore", invalid="ignore"):
        result: Array = (edf + pools) / (used + pools * mean)
    return np.clip(np.nan_to_num(result, nan=1e300, posinf=1e300), 1e-300, 1e300)


def _kept(log: Array, low: Array, high: Array) -> Array:
    return np.where(log > high, np.inf, np.maximum(log, low))


@dataclass(frozen=True)
class _Problem:
    gram: Array
    product: Array
    squares: float
    sizes: NDArray[np.int64]
    member: NDArray[np.int64]
    total: float

    def at(self, log: Array) -> _State:
        """Everything at some penalties; only the columns of groups that are present enter."""
        present = np.isfinite(log)
        columns = np.flatnonzero(present[self.member])
        penalty = np.exp(log[self.member[columns]])
        theta, inverse = np.zeros(len(self.product)), np.zeros(len(self.product))
        determinant = 0.0
        if len(columns):
            matrix = self.gram[np.ix_(columns, columns)]
            matrix[np.diag_indices(len(columns))] += penalty
            factor = cholesky(matrix)
            theta[columns] = linalg.cho_solve((factor, True), self.product[columns], check_finite=False)
            determinant = 2 * float(np.log(factor.diagonal()).sum())
            root = linalg.lapack.dtrtri(factor, lower=1)[0]
            inverse[columns] = np.einsum("ij,ij->j", root, root)
        power = np.bincount(self.member, theta**2, len(self.sizes)).astype(np.float64)
        with np.errstate(invalid="ignore"):
            used = self.sizes - np.exp(np.where(present, log, 0)) * np.bincount(self.member, inverse, len(self.sizes))
        edf = np.where(present, np.clip(used, 0, self.sizes), 0.0)
        rough = float((np.exp(log[present]) * power[present]).sum())
        floor = 10 * np.finfo(float).eps * max(self.squares, np.finfo(float).tiny)
        penalised = max(self.squares - float(theta @ self.product), floor)
        residual = max(penalised - rough, floor)
        noise = residual / max(self.total - 1 - edf.sum(), 1e-3 * self.total)
        criterion = (
            max(self.total - 1, 1.0) * np.log(penalised)
            + determinant
            - float((self.sizes[present] * log[present]).sum())
        )
        return _State(log, theta, edf, power, residual, noise, criterion, penalised)

    def result(self, state: _State, history: list[float]) -> Ridge:
        """Refined, and with the distance from the optimum: g^T A^-1 g, at most |g|^2 over the penalties."""
        present = np.isfinite(state.log)
        columns = np.flatnonzero(present[self.member])
        penalty = np.exp(state.log[self.member[columns]])
        gap = 0.0
        if len(columns):
            matrix = self.gram[np.ix_(columns, columns)]
            matrix[np.diag_indices(len(columns))] += penalty
            factor = cholesky(matrix.copy())
            for _ in range(2):
                gradient = self.product[columns] - matrix @ state.theta[columns]
                state.theta[columns] += linalg.cho_solve((factor, True), gradient, check_finite=False)
            gradient = self.product[columns] - matrix @ state.theta[columns]
            gap = float((gradient**2 / penalty).sum())
        with np.errstate(over="ignore"):
            penalties = np.exp(state.log)
        return Ridge(
            state.theta, penalties, state.edf, state.noise, state.criterion, state.penalised, gap, tuple(history)
        )


def cholesky(matrix: Array) -> Array:
    """The lower factor; columns that depend on others to rounding get a trace of their diagonal added."""
    jitter = 0.0
    diagonal = matrix.diagonal().copy()
    while True:
        try:
            factor: Array = linalg.cholesky(matrix, lower=True, check_finite=False)
            return factor
        except linalg.LinAlgError:
            jitter = max(10 * jitter, 1e-14)
            if jitter > 1:
                raise
            matrix[np.diag_indices(len(matrix))] = diagonal + jitter * np.maximum(diagonal, diagonal.mean())


def inverse(matrix: Array) -> Array:
    """Of a positive definite matrix."""
    lower, _ = linalg.lapack.dpotri(cholesky(matrix), lower=1)
    result: Array = np.tril(lower) + np.tril(lower, -1).T
    return result
