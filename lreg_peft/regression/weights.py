"""What sample weights mean."""

import numpy as np
from numpy.typing import NDArray

from .mesh1d import Array

# Sorting by all columns is nothing beside a fit of so many rows; of more, single ones matter less than rounding.
_SORTED = 1 << 14


def read_weights(weight: Array) -> tuple[NDArray[np.bool_], Array, float]:
    """Which samples count, their weights, and the number of samples they stand for.

    Whole numbers count repetitions: a sample of weight three acts like three samples, one of weight zero like none.
    Other weights are precisions, relative to each other: they are scaled to a mean of one over the samples that count.

    Args:
        weight: `[n]`, non-negative.

    Returns:
        present: `[n]`.
        weight: `[present]`, positive.
        total: number of samples.

    Raises:
        ValueError: if no weight is positive.
    """
    present = weight > 0
    if not present.any():
        raise ValueError("sample_weight must be positive for at least one sample, got zeros only.")
    kept = weight[present]
    if not (kept == np.round(kept)).all():
        kept = kept / kept.mean()
    return present, kept, float(kept.sum())


def in_order(X: Array, y: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Rows sorted, and repetitions as one row that carries their weight.

    So that a fit to weights and one to repetitions add up the same numbers in the same order. Penalties that follow
    from the data enlarge rounding, up to 1e-6 of a prediction, and with several threads sums depend on their length.

    Args:
        X: `[n, d]`.
        y: `[n, n_outputs]`.
        weight: `[n]`, positive.

    Returns:
        The same, of at most as many rows; as they came if they are many, or weights are not repetitions.
    """
    if len(X) > _SORTED or not (weight == np.round(weight)).all():
        return X, y, weight
    rows = np.concatenate((X, y), axis=1)
    order = np.lexsort(rows.T[::-1])
    rows = rows[order]
    starts = np.flatnonzero(np.concatenate(([True], (rows[1:] != rows[:-1]).any(axis=1))))
    d = X.shape[1]
    return (
        np.ascontiguousarray(rows[starts, :d]),
        np.ascontiguousarray(rows[starts, d:]),
        np.add.reduceat(weight[order], starts),
    )
