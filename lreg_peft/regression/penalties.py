"""One penalty per group of coefficients, chosen by restricted maximum likelihood, and the dense algebra that it needs.

The fixed point of lambda_g <- sigma^2 edf_g / |theta_g|^2 (Schall 1991) is, for such penalties, that of the generalised
Fellner-Schall update of Wood & Fasiolo (2017). A group without use gets a penalty that leaves nothing of it.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from .mesh1d import Array

_MAX_STEP, _LONG = 6.0, 1.4  # of the logarithm of a penalty in one update; steps are so many times as long
# Updates end when no logarithm moves by more, or by little more without a change of the criterion; groups with less
# than one degree of freedom may move by more in proportion.
_STILL, _NEAR, _TOLERANCE = 0.05, 0.3, 0.01
# Penalties stay within these multiples of the mean power of a group's columns.
_LEAST, _GONE = 1e-9, 1e6


def choose_penalties(
    solve: Callable[[Array], tuple[Array, Array]],
    start: Array | None,
    power: Array,
    kinds: NDArray[np.int64],
    pools: Array,
    *,
    prior: float = 0.0,
    most: int = 100,
) -> Array:
    """Penalties `[groups]`.

    Args:
        solve: from penalties to effective degrees of freedom and squares of coefficients over the noise variance, both
            `[groups]`.
        start: `[groups]`, NaN where the default shall be taken; None for all.
        power: `[groups]`, see `mean_power`.
        kinds: `[groups]`, numbers; variances of one kind are related.
        pools: `[groups]`, of so many coefficients with the mean variance of its kind a group's variance knows.
        prior: and of so many with variance one.
        most: updates.
    """
    low, high = np.log(power * _LEAST), np.log(power * _GONE)
    log = np.log(power)
    if start is not None:
        log = np.where(np.isnan(start), log, np.clip(np.log(start), low, high))
    for _ in range(most if len(power) else 0):
        edf, used = solve(np.exp(log))
        mean = (np.bincount(kinds, used) / np.maximum(np.bincount(kinds, edf), 1e-6))[kinds]
        wanted = np.log(edf + prior + pools + 1e-300) - np.log(used + prior + pools * mean + 1e-300)
        new = np.clip(log + _LONG * np.clip(wanted - log, -_MAX_STEP, _MAX_STEP), low, high)
        moved = (np.abs(new - log) * np.minimum(edf, 1.0)).max()
        # Derivatives of the criterion, twice the negative restricted log-likelihood, times the step.
        change = abs(float((np.exp(log) * used - edf) @ (new - log)))
        log = new
        if moved < _STILL or (change < _TOLERANCE and moved < _NEAR):
            break
    return np.exp(log)


def mean_power(diagonal: Array, member: NDArray[np.int64], sizes: NDArray[np.int64]) -> Array:
    """Mean over each group of a diagonal of normal equations, `[p] -> [groups]`; positive for empty columns too."""
    power = np.bincount(member, diagonal, len(sizes)) / np.maximum(sizes, 1)
    return np.maximum(power, 1e-14 * power.max(initial=0.0) + np.finfo(float).tiny)


def cholesky(matrix: Array) -> Array:
    """The lower factor; columns that depend on others to rounding get a trace of their diagonal added."""
    if not len(matrix):
        return matrix
    jitter, diagonal = 0.0, matrix.diagonal()
    while True:
        try:
            factor: Array = linalg.cholesky(
                matrix + np.diag(jitter * np.maximum(diagonal, diagonal.mean())), lower=True, check_finite=False
            )
            return factor
        except linalg.LinAlgError:
            jitter = max(10 * jitter, 1e-14)
            if jitter > 1:
                raise


def solve_with(factor: Array, right: Array) -> Array:
    """The solution for a matrix with this lower factor."""
    result: Array = linalg.cho_solve((factor, True), right, check_finite=False) if len(factor) else right
    return result


def inverse(factor: Array) -> Array:
    """Of the matrix with this lower factor."""
    if not len(factor):
        return factor
    lower, _ = linalg.lapack.dpotri(factor, lower=1)
    result: Array = np.tril(lower) + np.tril(lower, -1).T
    return result


def free_coefficients(factor: Array, penalty: Array, member: NDArray[np.int64], sizes: NDArray[np.int64]) -> Array:
    """Effective degrees of freedom `[groups]` of a penalised problem.

    Args:
        factor: `[p, p]`, of the matrix of the problem, penalties included; it may have further columns behind those.
        penalty: `[p]`.
        member: `[p]`, the group of each column.
        sizes: `[groups]`.
    """
    if not len(sizes):
        return np.zeros(0)
    root = linalg.lapack.dtrtri(factor, lower=1)[0]
    shares = 1 - penalty * np.einsum("ij,ij->j", root, root)[: len(penalty)]
    return np.clip(np.bincount(member, shares, len(sizes)), 0.0, sizes)
