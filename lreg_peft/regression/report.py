"""What a fit tells about itself: how good the optimum is, and what all models have to answer."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from .mesh1d import Array
from .terms import FittedTerm


@dataclass(frozen=True)
class Optimality:
    """How far a fit can be from the optimum of what was minimised, summed over outputs.

    Attributes:
        objective: as reached.
        lower_bound: no choice of the unknowns named in `about` gets below this.
        gap: `objective - lower_bound`.
        about: the objective and its unknowns, in words.
    """

    objective: float
    lower_bound: float
    gap: float
    about: str

    @classmethod
    def of(cls, objective: float, gap: float, about: str) -> "Optimality":
        """From objective and gap."""
        return cls(objective, objective - gap, gap, about)


@dataclass(frozen=True)
class SumModel:
    """A fitted sum of terms, and what stands behind the attributes of the estimator.

    Attributes:
        terms: with mean zero over the samples.
        intercept: `[q]`.
        edf: `[q]`, of the whole model.
        noise_variance: `[q]`.
        history: one entry per model tried.
        optimality: certificate.
        variance: of the function, without the noise, in units of the samples: `[n, d] -> [n, q]`.
        widening: of standard deviations, `[q]`: Student's quantile over the normal one, at 95 %.
    """

    terms: tuple[FittedTerm, ...]
    intercept: Array
    edf: Array
    noise_variance: Array
    history: tuple[dict[str, float], ...]
    optimality: Optimality
    variance: Callable[[Array], Array]
    widening: Array | float = 1.0

    def mean(self, X: Array) -> Array:
        """`[n, d] -> [n, q]`."""
        result = np.repeat(self.intercept[None], len(X), axis=0)
        for term in self.terms:
            result += term.evaluate(X)
        return result

    def posterior_variance(self, X: Array) -> Array:
        """Variance of the function, without the noise: `[n, d] -> [n, q]`."""
        return self.variance(X)


def widening(free: Array) -> Array:
    """Student's quantile over the normal one at 95 %, for degrees of freedom `[q]`."""
    result: Array = stats.t.ppf(0.975, np.maximum(free, 1.0)) / stats.norm.ppf(0.975)
    return result
