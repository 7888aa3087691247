"""Which pairs of features act together: the residual of a fit, summed over the cells of every pair."""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .mesh1d import Array, place_nodes

_BINS = 8
_MAX_SAMPLES = 50_000
_MAX_FEATURES = 40

# Expected number of pairs that enter though nothing acts together. Their variances then go to zero, mostly.
_FALSE_ALARMS = 0.05


def rank_pairs(
    X: Array, residual: Array, weight: Array, candidates: list[int], random: np.random.Generator
) -> list[tuple[float, tuple[int, int]]]:
    """Pairs of features by how unlikely their residuals are if there is no interaction.

    Two tests for each, and the sharper counts, doubled: the squares of the means of the residual over the cells of
    a grid of quantiles, against chi-squared, and the correlation of the residual with the product of the ranks.

    Args:
        X: `[n, d]`.
        residual: `[n, q]`.
        weight: `[n]`, non-negative.
        candidates: columns to pair, most promising first.
        random: for a subsample of large data.

    Returns:
        Logarithms of p-values and pairs (smaller column first), most unlikely first.
    """
    if len(X) > _MAX_SAMPLES:
        part = random.choice(len(X), _MAX_SAMPLES, replace=False)
        X, residual, weight = X[part], residual[part], weight[part]
    found = [
        (_log_p(X[:, i], X[:, j], residual, weight), (i, j))
        for i, j in combinations(sorted(candidates[:_MAX_FEATURES]), 2)
    ]
    return sorted(found)


def significant(ranked: list[tuple[float, tuple[int, int]]]) -> Iterator[tuple[int, int]]:
    """The pairs whose p-value, times the number of pairs, is below the number of false alarms accepted."""
    limit = np.log(_FALSE_ALARMS / max(len(ranked), 1))
    yield from (pair for log_p, pair in ranked if log_p < limit)


def _log_p(first: Array, second: Array, residual: Array, weight: Array) -> float:
    bins = [_bin(x, weight) for x in (first, second)]
    sizes = [int(b.max()) + 1 for b in bins]
    if min(sizes) < 2:
        return 0.0
    cell = bins[0] * sizes[1] + bins[1]
    n_cells = sizes[0] * sizes[1]
    mass = np.bincount(cell, weight, n_cells)
    used = mass > 0
    # Freedom left when the margins, fitted before, are taken out.
    freedom = int(used.sum()) - sizes[0] - sizes[1] + 1
    if freedom < 1:
        return 0.0
    centres = [np.arange(size) - np.bincount(b, weight, size) @ np.arange(size) / weight.sum() for b, size in
               zip(bins, sizes, strict=True)]  # fmt: skip
    product = centres[0][bins[0]] * centres[1][bins[1]]
    best = 0.0
    for r in residual.T:
        variance = weight @ r**2 / weight.sum()
        if not variance > 0:
            continue
        sums = np.bincount(cell, weight * r, n_cells)
        energy = float((sums[used] ** 2 / mass[used]).sum() / variance)
        straight = float((weight * product) @ r) ** 2 / (float(weight @ product**2) * variance + 1e-300)
        log_p = min(stats.chi2.logsf(energy, freedom), stats.chi2.logsf(straight, 1)) + np.log(2)
        best = min(best, log_p)
    return best


def _bin(x: Array, weight: Array) -> NDArray[np.int64]:
    order = np.argsort(x, kind="stable")
    nodes = place_nodes(x[order], np.maximum(weight[order], 1e-300), _BINS + 1, "quantile")
    if len(nodes) <= _BINS:  # few values: a bin for each
        return np.searchsorted(nodes, x)
    return np.searchsorted(nodes[1:-1], x, side="right")
