"""The data: synthetic sets by seed, and real ones that installed packages carry. Nothing is downloaded."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

import numpy as np
from numpy.typing import NDArray
from scipy.special import sph_harm_y
from sklearn.datasets import load_diabetes
from sklearn.model_selection import KFold

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Split:
    """`x` `[n, d]`, `y` `[n]` or `[n, outputs]`; `truth` is the test targets without their noise, None if not known."""

    x: Array
    y: Array
    x_test: Array
    y_test: Array
    truth: Array | None = None


@dataclass(frozen=True)
class DataSet:
    """A set of the comparison.

    Attributes:
        name: short.
        description: inputs, target, number of samples.
        n_features: of an input.
        n_train: training samples.
        n_outputs: targets per sample.
        real: whether the splits are folds instead of fresh samples.
        split: the split of a seed.
    """

    name: str
    description: str
    n_features: int
    n_train: int
    n_outputs: int
    real: bool
    split: Callable[[int], Split]


#: `inputs(random, n)` and `target(x)` -> mean and standard deviation of the noise.
Inputs = Callable[[np.random.Generator, int], Array]
Target = Callable[[Array], tuple[Array, Array | float]]


def draw(inputs: Inputs, target: Target, n_train: int, n_test: int, seed: int) -> Split:
    """Training samples, then test samples, from one generator."""
    random = np.random.default_rng(seed)

    def samples(n: int) -> tuple[Array, Array, Array]:
        x = inputs(random, n)
        mean, noise = target(x)
        noisy = np.any(noise)
        return x, mean + noise * random.standard_normal(np.shape(mean)) if noisy else mean, mean

    x, y, _ = samples(n_train)
    return Split(x, y, *samples(n_test))


def sums(inputs: Inputs, wave: Target, n_train: int, n_test: int, seed: int) -> Split:
    """Two inputs; the target is the mean of two noisy functions of one input each."""
    random = np.random.default_rng(seed)

    def samples(n: int) -> tuple[Array, Array, Array]:
        x = inputs(random, n)
        mean, noise = wave(x)
        return x, (mean + noise * random.standard_normal(x.shape)).mean(axis=1), mean.mean(axis=1)

    x, y, _ = samples(n_train)
    return Split(x, y, *samples(n_test))


def uniform(low: float, high: float, d: int = 1) -> Inputs:
    """Inputs from a cube."""
    return lambda random, n: random.uniform(low, high, (n, d))


def reciprocal(low: float, high: float, d: int = 1) -> Inputs:
    """Inputs whose reciprocals are uniform."""
    return lambda random, n: 1 / random.uniform(low, high, (n, d))


def sphere(random: np.random.Generator, n: int) -> Array:
    """Azimuth and polar angle."""
    return random.uniform(size=(n, 2)) * [2 * np.pi, np.pi]


def harmonic(x: Array) -> tuple[Array, float]:
    """Y_4^2, real and imaginary part."""
    z = sph_harm_y(4, 2, x[:, 1], x[:, 0])
    return np.column_stack((z.real, z.imag)), 0.0


def friedman(x: Array) -> tuple[Array, float]:
    """Five of ten inputs matter."""
    return 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4], 1.0


def _column(function: Callable[[Array], tuple[Array, Array | float]]) -> Target:
    return lambda x: function(x[:, 0])


#: name -> (description, how to draw, inputs, target, samples for training and test, features, outputs)
_SYNTHETIC: dict[str, tuple[str, Callable[..., Split], Inputs, Target, int, int, int, int]] = {
    "A1": (
        "x ~ U(-pi, pi), y = sin x + cos^2(x)/5 N", draw, uniform(-np.pi, np.pi),
        _column(lambda x: (np.sin(x), np.cos(x) ** 2 / 5)), 1000, 200, 1, 1,
    ),
    "B1": (
        "1/x ~ U(1, 50), y = sin(1/x) + .01 N", draw, reciprocal(1, 50),
        _column(lambda x: (np.sin(1 / x), 0.01)), 1000, 200, 1, 1,
    ),
    "Fig4A": (
        "x ~ U(0, pi/4), y = sin 8x + abs(cos 8x) N", draw, uniform(0, np.pi / 4),
        _column(lambda x: (np.sin(8 * x), np.abs(np.cos(8 * x)))), 1000, 200, 1, 1,
    ),
    "Fig4C": (
        "1/x ~ U(2, 50), y = sin(1/x) + x^2/2 N", draw, reciprocal(2, 50),
        _column(lambda x: (np.sin(1 / x), 0.5 * x**2)), 3000, 3000, 1, 1,
    ),
    "A2": (
        "x ~ U(-pi, pi)^2, y = mean of sin x_i + cos^2(x_i)/10 N", sums, uniform(-np.pi, np.pi, 2),
        lambda x: (np.sin(x), np.cos(x) ** 2 / 10), 7500, 1500, 2, 1,
    ),
    "B2": (
        "1/x_i ~ U(2, 20), y = mean of sin(1/x_i) + .01 N", sums, reciprocal(2, 20, 2),
        lambda x: (np.sin(1 / x), 0.01), 50_000, 10_000, 2, 1,
    ),
    "S2": (
        "1/x_i ~ U(1, 5), y = sin(1/(x1 x2)) + .01 N", draw, reciprocal(1, 5, 2),
        lambda x: (np.sin(1 / x.prod(axis=1)), 0.01), 50_000, 10_000, 2, 1,
    ),
    "C.4": (
        "angles on the sphere, y = real and imaginary part of Y_4^2", draw, sphere, harmonic, 40_000, 8_000, 2, 2,
    ),
    "3-D": (
        "x ~ U(0, 1)^3, y = sin(3 pi x1 x2) x3 + x3^2 + .05 N", draw, uniform(0, 1, 3),
        lambda x: (np.sin(3 * np.pi * x[:, 0] * x[:, 1]) * x[:, 2] + x[:, 2] ** 2, 0.05), 20_000, 5_000, 3, 1,
    ),
    "Friedman-1": (
        "x ~ U(0, 1)^10, y = 10 sin(pi x1 x2) + 20 (x3 - .5)^2 + 10 x4 + 5 x5 + N", draw, uniform(0, 1, 10),
        friedman, 2_000, 5_000, 10, 1,
    ),
}  # fmt: skip
ONE_FEATURE = ("A1", "B1", "Fig4A", "Fig4C")
SEVERAL_FEATURES = ("A2", "B2", "S2", "C.4", "3-D", "Friedman-1")

N_FOLDS = 5


def synthetic(name: str) -> DataSet:
    """One of `_SYNTHETIC`."""
    description, make, inputs, target, n_train, n_test, n_features, n_outputs = _SYNTHETIC[name]
    return DataSet(
        name,
        f"{description}; {n_train:,} / {n_test:,}",
        n_features,
        n_train,
        n_outputs,
        False,
        lambda seed: make(inputs, target, n_train, n_test, seed),
    )


def real_sets() -> Iterator[DataSet]:
    """Those whose package is installed: seed 0-4 are the folds of a first shuffle, 5-9 those of a second."""
    for name, load in (("diabetes", _diabetes), ("Boston", _boston), ("auto-mpg", _auto_mpg)):
        try:
            x, y = load()
        except ImportError:
            continue
        yield DataSet(
            name,
            f"{x.shape[0]} samples, {x.shape[1]} features; {N_FOLDS} folds",
            x.shape[1],
            len(x) * (N_FOLDS - 1) // N_FOLDS,
            1,
            True,
            lambda seed, x=x, y=y: _fold(x, y, seed),  # type: ignore[misc]
        )


def _fold(x: Array, y: Array, seed: int) -> Split:
    folds = list(KFold(N_FOLDS, shuffle=True, random_state=seed // N_FOLDS).split(x))
    train, test = folds[seed % N_FOLDS]
    return Split(x[train], y[train], x[test], y[test])


def _diabetes() -> tuple[Array, Array]:
    x, y = load_diabetes(return_X_y=True)
    return np.asarray(x), np.asarray(y)


def _boston() -> tuple[Array, Array]:
    x, y = import_module("mlxtend.data").boston_housing_data()
    return np.asarray(x), np.asarray(y)


def _auto_mpg() -> tuple[Array, Array]:
    x, y = import_module("mlxtend.data").autompg_data()
    known = ~np.isnan(x).all(axis=0)  # the column of names is read as NaN
    return np.asarray(x[:, known]), np.asarray(y)
