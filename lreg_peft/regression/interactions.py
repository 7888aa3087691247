"""Which pairs of features act together: what a fit leaves over, summed over the cells of every pair."""

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from .mesh1d import Array, place_nodes
from .samples import Samples

_BINS = 8
_MAX_SAMPLES = 50_000
_MAX_FEATURES = 40

# A cell counts as if it held so many more samples without residual: few samples are no evidence.
_LEAST_MASS = 5.0
# Residuals count up to so many times the median of their absolute values, so that single ones do not decide.
_CLIP = 5.0


def rank_pairs(
    samples: Samples, residual: Array, candidates: list[int], random: np.random.Generator
) -> list[tuple[float, tuple[int, int]]]:
    """Pairs of features by the share of the residual that cells of a grid of quantiles explain.

    Args:
        samples: the data.
        residual: `[m, q]`, held out.
        candidates: columns to pair, most promising first.
        random: for a subsample of large data.

    Returns:
        Energies, in standard deviations of those of noise, and pairs (smaller column first), most promising first.
    """
    X, weight = samples.X, samples.weight
    if len(X) > _MAX_SAMPLES:
        part = random.choice(len(X), _MAX_SAMPLES, replace=False)
        X, residual, weight = X[part], residual[part], weight[part]
    residual = residual - np.median(residual, axis=0)
    scale = np.median(np.abs(residual), axis=0)
    bound = _CLIP * np.where(scale > 0, scale, np.abs(residual).max(axis=0))
    residual = np.clip(residual, -bound, bound)
    residual = residual - weight @ residual / weight.sum()
    variance = weight @ residual**2 / weight.sum()
    residual = residual[:, variance > 0] / np.sqrt(variance[variance > 0])
    columns = sorted(candidates[:_MAX_FEATURES])
    bins = {j: _bin(X[:, j], weight) for j in columns}
    found = [(-_energy(bins[i], bins[j], residual, weight), (i, j)) for i, j in combinations(columns, 2)]
    return [(-energy, pair) for energy, pair in sorted(found)]


def _energy(first: NDArray[np.int64], second: NDArray[np.int64], residual: Array, weight: Array) -> float:
    """What an interaction explains beyond rows and columns, above what chance lets it seem to, in noise variances."""
    sizes = [int(b.max()) + 1 for b in (first, second)]
    if min(sizes) < 2:
        return 0.0
    cell = first * sizes[1] + second
    n_cells = sizes[0] * sizes[1]
    mass = np.bincount(cell, weight, n_cells)
    used = mass > 0
    rows, columns = np.divmod(np.flatnonzero(used), sizes[1])
    mass = mass[used]
    root = np.sqrt(mass)[:, None]
    margins = np.concatenate((np.eye(sizes[0])[rows], np.eye(sizes[1])[columns]), axis=1) * root
    span, size, _ = np.linalg.svd(margins, full_matrices=False)
    span = span[:, size > 1e-9 * size[0]]
    if len(mass) <= span.shape[1]:
        return 0.0
    product = ((rows - rows @ mass / mass.sum()) * (columns - columns @ mass / mass.sum()))[:, None] * root
    product = product - span @ (span.T @ product)
    shrink = mass / (mass + _LEAST_MASS)
    free = np.maximum(1 - (span**2).sum(axis=1), 0.0)  # expected squares of pure noise
    best = 0.0
    for r in residual.T:
        sums = np.bincount(cell, weight * r, n_cells)[used][:, None] / root
        sums = (sums - span @ (span.T @ sums))[:, 0]
        noise = np.sqrt(2 * float((shrink**2 * free**2).sum()))
        cells = float((shrink * (sums**2 - free)).sum()) / max(noise, 1e-300)
        # The absolute value of a normal deviate is as rare as one that is smaller by about a quarter.
        straight = abs(float(product[:, 0] @ sums)) / np.sqrt(float((product**2).sum()) + 1e-300) - 0.25
        best = max(best, cells, straight)
    return best


def _bin(x: Array, weight: Array) -> NDArray[np.int64]:
    order = np.argsort(x, kind="stable")
    nodes = place_nodes(x[order], weight[order], _BINS + 1, "quantile")
    if len(nodes) <= _BINS:  # few values: a bin for each
        return np.searchsorted(nodes, x)
    return np.searchsorted(nodes[1:-1], x, side="right")
