"""Penalised least squares for sums of terms, from sums over the samples alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .mesh1d import Array
from .moments import Moments, moments, spans
from .penalties import cholesky, choose_penalties, free_coefficients, mean_power, solve_with
from .samples import Samples
from .sums import SumFit, group_kinds, group_sizes, starting_penalties
from .terms import Term

# Variances of one kind are related: each is estimated as if it had so many more coefficients with the kind's mean.
# Those of single features are not, so that features without use vanish; those of interactions are nearly common to all
# pairs, for what single pairs seem to gain in few samples is mostly chance.
POOLS = np.array([0.0, 0.0, 40.0, 40.0, 40.0])

# One function on a fine mesh may be wiggly, which is not found from strong penalties: updates begin at the best of
# these multiples of the mean power. For sums of several, on coarser meshes, weak ones are a start that overfits few
# samples.
_FIRST = 10.0 ** np.arange(-6.0, 1.0, 1.5)


class Squares:
    """The sum of squared residuals plus penalties, each output with penalties of its own.

    Args:
        samples: with `y` `[m, q]`.
        smoothing: "reml", or one penalty for all groups, per sample.
    """

    about = "sum of squared residuals plus penalties of all groups of coefficients, over the coefficients"
    choosing = 50_000  # rows on which terms are chosen
    pair_rank = 8  # most columns of a margin of a pair

    def __init__(self, samples: Samples, smoothing: str | float):
        self.samples, self.smoothing = samples, smoothing
        self.history: list[dict[str, float]] = []
        self._known: tuple[tuple[Term, ...], Moments] | None = None

    def line_rank(self, n_features: int) -> int | None:
        """Most columns of a function of one feature: all."""
        return None

    def fit(
        self, terms: Sequence[Term], before: SumFit | None = None, penalties: Array | None = None, folds: bool = True
    ) -> SumFit:
        """Fit given terms.

        Args:
            terms: functions of one feature, then of two.
            before: a fit with some of the terms, whose penalties are the start.
            penalties: `[groups, q]`, used as they are.
            folds: whether errors of cross-validation are wanted.

        Returns:
            The fit.
        """
        sums = self._moments(tuple(terms))
        gram, product, squares, mean, y_mean = sums.centred()
        sizes, kinds, q = group_sizes(terms), group_kinds(terms), len(y_mean)
        start = starting_penalties(terms, before)
        if penalties is None and not isinstance(self.smoothing, str):
            penalties = np.full((len(sizes), q), float(self.smoothing) * self.samples.total)
        chosen, solved = [], []
        for o in range(q):
            equations = NormalEquations(gram, product[:, o], float(squares[o]), sizes, self.samples.total)
            if penalties is None:
                first = None if start is None else start[:, o]
                chosen.append(equations.choose(first, kinds, POOLS[kinds]))
            else:
                chosen.append(np.maximum(penalties[:, o], 1e-12 * equations.power))
            solved.append(equations.at(chosen[-1]))
        theta, smoothing = np.stack([s.theta for s in solved], axis=1), np.stack(chosen, axis=1)
        errors, without = self._cross_validated(sums, np.repeat(smoothing, sizes, axis=0), folds)
        variances = [np.einsum("pq,pr,rq->q", theta[s], gram[s, s], theta[s]) for s in spans(terms)]
        fit = SumFit(
            tuple(terms), theta, sums.y_mean + y_mean, mean, smoothing, np.stack([s.edf for s in solved], axis=1),
            np.array([s.noise for s in solved]), self.samples.total, float(sum(s.objective for s in solved)),
            float(sum(s.gap for s in solved)), gram[None],
            np.array(variances).reshape(-1, q) / self.samples.total, errors, without,
        )  # fmt: skip
        self.history.append(
            {
                "nodes": float(sum(term.size for term in terms)),
                "interactions": float(sum(len(term.features) == 2 for term in terms)),
                "edf": float(1 + fit.edf.sum(axis=0).mean()),
                "cross_validation": float(errors.sum(axis=0).mean() / self.samples.total),
            }
        )
        return fit

    def rest(self, fit: SumFit) -> Array:
        """Held-out residuals, `[m, q]`."""
        return self.samples.y - fit.held_out(self.samples)

    def _moments(self, terms: tuple[Term, ...]) -> Moments:
        if self._known is None or list(map(id, self._known[0])) != list(map(id, terms)):
            self._known = terms, moments(terms, self.samples)
        return self._known[1]

    def _cross_validated(
        self, sums: Moments, penalties: Array, wanted: bool
    ) -> tuple[Array, tuple[tuple[Array, Array], ...]]:
        """Errors `[folds, q]` on each fold, and coefficients and intercepts without it."""
        _, _, _, every, _ = sums.centred()
        errors, without = [], []
        for f in range(len(sums.weight) if wanted and len(sums.weight) > 1 else 0):
            gram, product, _, mean, y_mean = sums.centred(without=f)
            theta = np.zeros(product.shape)
            for o, penalty in enumerate(penalties.T):
                theta[:, o] = solve_with(cholesky(gram + np.diag(penalty)), product[:, o])
            errors.append(np.maximum(sums.errors(f, theta, mean, y_mean), 0.0))
            without.append((theta, sums.y_mean + y_mean + (every - mean) @ theta))
        return np.array(errors).reshape(-1, penalties.shape[1]), tuple(without)


@dataclass(frozen=True)
class _Solved:
    theta: Array
    edf: Array
    noise: float
    objective: float
    gap: float
    criterion: float  # twice the negative restricted log-likelihood, up to a constant


@dataclass(frozen=True)
class NormalEquations:
    """Of one output, centred.

    Attributes:
        gram: `[p, p]`.
        product: `[p]`, with the output.
        squares: of the output.
        sizes: `[groups]`, number of columns, in their order.
        total: number of observations.
    """

    gram: Array
    product: Array
    squares: float
    sizes: NDArray[np.int64]
    total: float

    @property
    def member(self) -> NDArray[np.int64]:
        """`[p]`, the group of each column."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    @property
    def power(self) -> Array:
        """`[groups]`, mean of the diagonal; positive."""
        return mean_power(self.gram.diagonal(), self.member, self.sizes)

    def choose(self, start: Array | None, kinds: NDArray[np.int64], pools: Array) -> Array:
        """Penalties `[groups]` by restricted maximum likelihood, see `choose_penalties`."""

        def use(penalties: Array) -> tuple[Array, Array]:
            solved = self.at(penalties)
            return solved.edf, np.bincount(self.member, solved.theta**2, len(self.sizes)) / solved.noise

        if start is None and 0 < len(self.sizes) <= 2:
            start = min((self.power * factor for factor in _FIRST), key=lambda first: self.at(first).criterion)
        most = 100 if len(self.gram) < 500 else 25
        return choose_penalties(use, start, self.power, kinds, pools, most=most)

    def at(self, penalties: Array) -> _Solved:
        """Everything at penalties `[groups]`."""
        penalty = penalties[self.member]
        factor = cholesky(self.gram + np.diag(penalty))
        theta = solve_with(factor, self.product)
        theta += solve_with(factor, self._descent(theta, penalty))  # corrects rounding
        edf = free_coefficients(factor, penalty, self.member, self.sizes)
        floor = 10 * np.finfo(float).eps * max(self.squares, np.finfo(float).tiny)
        objective = max(self.squares - float(theta @ self.product), floor)
        residual = max(objective - float(penalty @ theta**2), floor)
        noise = residual / max(self.total - 1 - edf.sum(), 1e-3 * self.total)
        # g^T A^-1 g is at most |g|^2 over the penalties.
        gap = float((self._descent(theta, penalty) ** 2 / penalty).sum())
        determinant = 2 * np.log(factor.diagonal()).sum() - np.log(penalty).sum()
        criterion = float(max(self.total - 1, 1.0) * np.log(objective) + determinant)
        return _Solved(theta, edf, noise, objective, gap, criterion)

    def _descent(self, theta: Array, penalty: Array) -> Array:
        return self.product - self.gram @ theta - penalty * theta
