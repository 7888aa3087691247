"""What a fit tells about itself: how good the optimum is, and what all models have to answer."""

from dataclasses import dataclass
from typing import Protocol

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


class Model(Protocol):
    """A fitted sum of terms. `terms`, `intercept` `[q]`, and what stands behind the attributes of the estimator."""

    terms: tuple[FittedTerm, ...]
    intercept: Array
    edf: Array  # [q], of the whole model
    noise_variance: Array  # [q]
    history: tuple[dict[str, float], ...]
    optimality: Optimality

    def posterior_variance(self, X: Array) -> Array:
        """Variance of the function, without the noise: `[n, d] -> [n, q]`."""
        ...
