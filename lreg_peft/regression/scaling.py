"""Monotone maps of single input columns to [0, 1], where meshes live."""

import math
from dataclasses import dataclass

import numpy as np

from .mesh1d import Scale, evaluate

# Knots of the quantile map. More would follow the noise of the sample quantiles, which then bends the fitted function:
# their number is doubled only until the map is as near to the samples' distribution function as the true one would be
# in 19 of 20 samples (Kolmogorov).
_MAX_ELEMENTS = 64
_KOLMOGOROV = 1.36


@dataclass(frozen=True)
class ColumnScale:
    """A strictly increasing piecewise-linear map per column; beyond its ends it goes on with its last slope.

    Attributes:
        inputs: per column the knots `[n_knots]`, increasing.
        outputs: per column their images, from 0 to 1.
    """

    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]

    def transform(self, x: np.ndarray) -> np.ndarray:
        """`[n_samples, d]` in input units -> mesh coordinates."""
        return _map_columns(x, self.inputs, self.outputs)

    def inverse_transform(self, u: np.ndarray) -> np.ndarray:
        """`[n_samples, d]` in mesh coordinates -> input units."""
        return _map_columns(u, self.outputs, self.inputs)


def fit_scale(x: np.ndarray, weight: np.ndarray, scale: Scale) -> ColumnScale:
    """The map for each column of `x` `[n_samples, d]`, all of which must hold at least two values.

    "quantile" makes every column about uniform on [0, 1], so that a regular mesh holds about equally many samples
    everywhere; "minmax" is linear. A `weight` `[n_samples]` counts a row as that many.
    """
    inputs, outputs = [], []
    for column in x.T:
        if scale == "minmax":
            knots, levels = np.array([column.min(), column.max()]), np.array([0.0, 1.0])
        else:
            knots, levels = quantile_knots(column, weight)
        inputs.append(knots)
        outputs.append(levels)
    return ColumnScale(tuple(inputs), tuple(outputs))


def quantile_knots(column: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values and their share of the weight below them, ties counted half."""
    values, place = np.unique(column, return_inverse=True)
    mass = np.bincount(place, weight)
    level = mass.cumsum() - mass / 2
    level = (level - level[0]) / (level[-1] - level[0])
    n_elements = 1
    while True:
        chosen = np.unique(np.searchsorted(level, np.linspace(0, 1, n_elements + 1)).clip(0, len(values) - 1))
        # Values a rounding apart would make a slope without bound.
        gaps = np.diff(values[chosen]) > 16 * np.finfo(float).eps * np.maximum(
            np.abs(values[chosen][1:]), np.abs(values[chosen][:-1])
        )
        chosen = np.concatenate((chosen[:1], chosen[1:-1][gaps[:-1] & gaps[1:]], chosen[-1:]))
        error = np.abs(np.interp(values, values[chosen], level[chosen]) - level).max()
        if error <= _KOLMOGOROV / math.sqrt(weight.sum()) or n_elements >= _MAX_ELEMENTS:
            return values[chosen], level[chosen]
        n_elements *= 2


def _map_columns(x: np.ndarray, sources: tuple[np.ndarray, ...], images: tuple[np.ndarray, ...]) -> np.ndarray:
    maps = zip(x.T, sources, images, strict=True)
    return np.concatenate([evaluate(column, source, image[:, None]) for column, source, image in maps], axis=1)
