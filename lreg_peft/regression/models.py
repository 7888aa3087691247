"""Fits of the several kinds, in the one form that the estimator shows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .additive import Additive, fit_additive
from .mesh1d import Array, Scale
from .report import Optimality
from .smooth import Grouped, Smooth, fit_smooth
from .terms import FittedTerm


@dataclass(frozen=True)
class SumModel:
    """See `Model`."""

    terms: tuple[FittedTerm, ...]
    intercept: Array
    edf: Array
    noise_variance: Array
    history: tuple[dict[str, float], ...]
    optimality: Optimality
    variance: Callable[[Array], Array]

    def posterior_variance(self, X: Array) -> Array:
        """Variance of the function, without the noise: `[n, d] -> [n, q]`."""
        return self.variance(X)


@dataclass(frozen=True)
class _OfOneFeature:
    fit: Smooth

    def __call__(self, X: Array) -> Array:
        return self.fit.posterior_variance(X[:, 0])


def smooth_model(
    X: Array,
    y: Array,
    weight: Array,
    total: float,
    *,
    n_nodes: int | None,
    max_nodes: int,
    scale: Scale,
    smoothing: str | float,
) -> SumModel:
    """Many nodes on a single feature; arguments as in `fit_smooth`, a given smoothing relative to `total`."""
    given = smoothing if isinstance(smoothing, str) else float(smoothing) * total
    fit = fit_smooth(
        Grouped.of(X[:, 0], y, weight),
        n_nodes=n_nodes, max_nodes=max_nodes, scale=scale, smoothing=given, total=total,
    )  # fmt: skip
    return of_smooth(fit)


def of_smooth(fit: Smooth) -> SumModel:
    """A fit on one feature, its intercept left in the values."""
    term = FittedTerm((0,), (fit.nodes,), fit.values, fit.smoothing[None], fit.edf)
    about = "sum of squared residuals plus smoothing times the sum of squared slope jumps, over the values at the nodes"
    return SumModel(
        (term,),
        np.zeros(fit.values.shape[1]),
        fit.edf,
        fit.noise_variance,
        fit.history,
        Optimality.of(float(fit.objective.sum()), float(fit.gap.sum()), about),
        _OfOneFeature(fit),
    )


def additive_model(
    X: Array,
    y: Array,
    weight: Array,
    total: float,
    *,
    n_nodes: int | None,
    interactions: int | str | Sequence[tuple[int, int]],
    max_nodes: int,
    scale: Scale,
    smoothing: str | float,
    random: np.random.Generator,
    report: Callable[[], None] | None,
) -> SumModel:
    """Functions of single features and of pairs; arguments as in `fit_additive`."""
    fit = fit_additive(
        X, y, weight,
        total=total, n_nodes=n_nodes, interactions=interactions, max_nodes=max_nodes, scale=scale, smoothing=smoothing,
        random=random, report=report,
    )  # fmt: skip
    return of_additive(fit)


def of_additive(fit: Additive) -> SumModel:
    """A sum of terms with mean zero over the samples, and an intercept."""
    terms = []
    for term, values, smoothing, edf in zip(fit.terms, fit.values, fit.smoothing, fit.edf, strict=True):
        nodes = term.nodes if isinstance(term.nodes, tuple) else (term.nodes,)
        shaped = values.reshape(*(len(mesh) for mesh in nodes), -1)
        terms.append(FittedTerm(term.features, nodes, shaped, smoothing, edf))
    about = "sum of squared residuals plus penalties of all groups of coefficients, over the coefficients"
    return SumModel(
        tuple(terms),
        fit.intercept,
        1 + sum(fit.edf, start=np.zeros_like(fit.intercept)),
        fit.noise_variance,
        fit.history,
        Optimality.of(float(fit.objective.sum()), float(fit.gap.sum()), about),
        fit.posterior_variance,
    )
