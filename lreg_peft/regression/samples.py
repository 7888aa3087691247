"""What a fit sees of the data: distinct rows with weights, in folds for cross-validation.

A sample of weight three is three samples, exactly: rows that repeat each other are put together before anything else,
and come in an order that depends on their values alone. Whether repetitions are further observations depends on the
data. Where equal features have differing targets (a table of few categories), they are. Where equal features come with
equal targets (a bootstrap, a row with a weight of two), they say nothing new about the noise, and count as weights.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .mesh1d import Array

FOLDS = 5

# Share of the pairs of rows with equal features that also have equal targets, from which repetitions are copies. By
# chance, numbers agree seldom, labels often.
_COPIES = {False: 0.5, True: 0.95}
# More of each row, on average, are a design of few places, not copies. Numbers at many places are not designed: there,
# large whole weights are precisions.
_MOST_COPIES, _FEW_PLACES = 8.0, 256


@dataclass(frozen=True)
class Samples:
    """Rows, grouped by fold.

    Attributes:
        X: `[m, d]`.
        y: `[m, q]`.
        weight: `[m]`, positive; they sum to the number of observations.
        mass: `[m]`, how often a row is there, whatever its precision: where meshes need nodes.
        folds: `[m]` rows of each fold; a row of which there are several may be in more than one.
        total: number of observations.
    """

    X: Array
    y: Array
    weight: Array
    mass: Array
    folds: tuple[slice, ...]
    total: float

    def thinned(self, most: int) -> "Samples":
        """At most about so many of the rows, at equal steps through every fold; itself, if it has no more."""
        if len(self.X) <= most:
            return self
        step = len(self.X) / most
        rows = [np.unique(np.arange(fold.start, fold.stop, step).astype(int)) for fold in self.folds]
        kept, ends = np.concatenate(rows), np.cumsum([0] + [len(r) for r in rows])
        folds = tuple(slice(int(a), int(b)) for a, b in pairwise(ends))
        weight = self.weight[kept]
        return Samples(self.X[kept], self.y[kept], weight, self.mass[kept], folds, float(weight.sum()))


def collect(X: Array, y: Array, weight: Array, *, classes: bool = False) -> Samples:
    """Read samples.

    Args:
        X: `[n, d]`.
        y: `[n, q]`; labels as numbers, if `classes`.
        weight: `[n]`, non-negative, some positive. Whole numbers count repetitions, others are precisions relative to
            each other.
        classes: whether `y` is a label.

    Returns:
        The samples.
    """
    if not (weight > 0).all():
        X, y, weight = X[weight > 0], y[weight > 0], weight[weight > 0]
    whole = bool((weight == np.round(weight)).all())
    counts = weight if whole else np.ones(len(X))
    # Rows are sorted by hashes that depend neither on their order nor on that of the columns: each column has a key of
    # its own, the mean of 24 bits of its values' hashes. Sums below 2^53 are exact, and weights may have any common
    # factor.
    bits = _bits(X)
    mean = counts @ (_mix(bits) >> np.uint64(40)).astype(np.float64) / counts.sum()
    features = _mix(bits * (_bits(mean) | np.uint64(1))).sum(axis=1, dtype=np.uint64)
    targets = _mix(_bits(y) * np.arange(1, 2 * y.shape[1], 2, dtype=np.uint64)).sum(axis=1, dtype=np.uint64)
    row = _mix(features + targets)
    order = np.lexsort((row, y[:, 0]))
    X, y, counts, weight = X[order], y[order], counts[order], weight[order]
    features, row = features[order], row[order]
    starts = np.flatnonzero(np.concatenate(([True], row[1:] != row[:-1])))
    copies = _are_copies(features, counts, starts, classes)
    if len(starts) < len(X) and (whole or copies):
        X, y, weight, counts = X[starts], y[starts], np.add.reduceat(weight, starts), np.add.reduceat(counts, starts)
    if copies or not whole:
        weight = weight / weight.mean()
    if copies:
        counts = counts / counts.mean()
    return _in_folds(X, y, weight, counts, min(FOLDS, len(X) if copies or not whole else int(weight.sum())))


def _are_copies(features: NDArray[np.uint64], counts: Array, starts: NDArray[np.int64], classes: bool) -> bool:
    per_row = np.add.reduceat(counts, starts)
    _, group = np.unique(features[starts], return_inverse=True)
    per_features = np.bincount(group, per_row)
    same_features = float((per_features * (per_features - 1)).sum())
    if counts.sum() > _MOST_COPIES * len(starts) and (classes or len(starts) <= _FEW_PLACES):
        return False
    return same_features > 0 and float((per_row * (per_row - 1)).sum()) > _COPIES[classes] * same_features


def _in_folds(X: Array, y: Array, weight: Array, mass: Array, n_folds: int) -> Samples:
    """Observation after observation to the next fold: rows of whole weights are many observations, others one."""
    whole = bool((weight == np.round(weight)).all())
    if whole and weight.max() > 1:
        last = np.cumsum(weight).astype(np.int64)
        first = last - weight.astype(np.int64)
        share = np.stack([(last - f + n_folds - 1) // n_folds - (first - f + n_folds - 1) // n_folds
                          for f in range(n_folds)])  # fmt: skip
        fold, row = np.nonzero(share)
        weight = mass = share[fold, row].astype(np.float64)
    else:
        row = np.argsort(np.arange(len(X)) % n_folds, kind="stable")
        fold = row % n_folds
        weight, mass = weight[row], mass[row]
    ends = np.searchsorted(fold, np.arange(n_folds + 1))
    folds = tuple(slice(int(a), int(b)) for a, b in pairwise(ends))
    X, y = np.ascontiguousarray(X[row]), np.ascontiguousarray(y[row])
    return Samples(X, y, weight, mass, folds, float(weight.sum()))


def _bits(values: Array) -> NDArray[np.uint64]:
    return np.ascontiguousarray(values + 0.0).view(np.uint64)  # + 0.0: zero has one sign


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
