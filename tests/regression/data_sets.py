"""The data sets of the regression tests, by seed; `N` is a standard normal."""

import numpy as np

Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def split(name: str, seed: int = 0) -> Split:
    """Training inputs and targets, then those for testing."""
    make, n_train, n_test = SETS[name]
    random = np.random.default_rng(seed)
    return (*make(random, n_train), *make(random, n_test))


def _a1(r, n):
    x = r.uniform(-np.pi, np.pi, n)
    return x[:, None], np.sin(x) + np.cos(x) ** 2 / 5 * r.standard_normal(n)


def _b1(r, n):
    x = 1 / r.uniform(1, 50, n)
    return x[:, None], np.sin(1 / x) + 0.01 * r.standard_normal(n)


def _fig4a(r, n):
    x = r.uniform(0, np.pi / 4, n)
    return x[:, None], np.sin(8 * x) + np.abs(np.cos(8 * x)) * r.standard_normal(n)


def _fig4c(r, n):
    x = 1 / r.uniform(2, 50, n)
    return x[:, None], np.sin(1 / x) + 0.5 * x**2 * r.standard_normal(n)


def _a2(r, n):
    x = r.uniform(-np.pi, np.pi, (n, 2))
    return x, (np.sin(x) + np.cos(x) ** 2 / 10 * r.standard_normal((n, 2))).mean(axis=1)


def _b2(r, n):
    x = 1 / r.uniform(2, 20, (n, 2))
    return x, (np.sin(1 / x) + 0.01 * r.standard_normal((n, 2))).mean(axis=1)


def _friedman(r, n):
    x = r.uniform(0, 1, (n, 10))
    signal = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    return x, signal + r.standard_normal(n)


SETS = {
    "A1": (_a1, 1000, 200),
    "B1": (_b1, 1000, 200),
    "Fig. 4 A": (_fig4a, 1000, 200),
    "Fig. 4 C": (_fig4c, 3000, 3000),
    "A2": (_a2, 7500, 1500),
    "B2": (_b2, 50_000, 10_000),
    "Friedman-1": (_friedman, 2000, 5000),
}
