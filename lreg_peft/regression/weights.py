"""What sample weights mean."""

import numpy as np
from numpy.typing import NDArray

from .mesh1d import Array


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
