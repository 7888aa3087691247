"""Penalised cross-entropy for sums of terms.

For two classes there is one logit, for more one for each. The optimum is found by Newton's method, the linear systems
by conjugate gradients with the blocks of single logits as a preconditioner (exact for two classes). Penalties follow
from the restricted likelihood in Laplace's approximation (Wood & Fasiolo 2017): at every step those of the weighted
least-squares problem that the step solves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special
from scipy.sparse.linalg import LinearOperator, cg

from .mesh1d import Array
from .moments import blocks, spans
from .penalties import cholesky, choose_penalties, free_coefficients, mean_power, solve_with
from .samples import Samples
from .squares import POOLS
from .sums import SumFit, group_kinds, group_sizes, starting_penalties
from .terms import Term

_MAX_NEWTON = 50
# Penalty of how far intercepts are from the logarithms of the base rates: enough to be finite where a class is missing.
_INTERCEPT = 1e-3
# Gaps per sample: of the fit, and of fits on the way to it and without a fold.
_TOLERANCE, _FOLD_TOLERANCE = 1e-9, 1e-6


class Entropy:
    """The sum of cross-entropies plus half of the penalties, which logits have in common.

    Args:
        samples: with labels 0, 1, ... as `y`.
        n_classes: at least two.
        smoothing: "reml", or one penalty for all coefficients, per sample.
    """

    about = "mean cross-entropy plus half of the penalties, over all coefficients"
    choosing = 10_000  # rows on which terms are chosen
    pair_rank = 5

    def __init__(self, samples: Samples, n_classes: int, smoothing: str | float):
        self.samples, self.smoothing = samples, smoothing
        self.history: list[dict[str, float]] = []
        label = samples.y[:, 0].astype(np.int64)
        rate = np.bincount(label, samples.weight, n_classes) + 0.5 / n_classes
        logs = np.log(rate / rate.sum())
        self._target = label[:, None].astype(np.float64) if n_classes == 2 else np.eye(n_classes)[label]
        self._anchor = logs[1:] - logs[:1] if n_classes == 2 else logs - logs.mean()
        # A label says less than a number: bends of single features share some of their variance.
        self._pools = np.concatenate((POOLS[:1], [5.0], POOLS[2:]))
        # Degrees of freedom of logits of which only differences count.
        self._share = 1.0 if n_classes == 2 else 1 - 1 / n_classes
        self._known: tuple[tuple[Term, ...], Array] | None = None

    def line_rank(self, n_features: int) -> int | None:
        """Most columns of a function of one feature."""
        return int(np.clip(200 // max(n_features, 1), 4, 12))

    def fit(
        self, terms: Sequence[Term], before: SumFit | None = None, penalties: Array | None = None, folds: bool = True
    ) -> SumFit:
        """Fit given terms.

        Args:
            terms: functions of one feature, then of two.
            before: a fit; with the same terms, its coefficients are the start.
            penalties: `[groups, 1]`, used as they are.
            folds: whether errors of cross-validation are wanted.

        Returns:
            The fit.
        """
        samples, design = self.samples, self._design(tuple(terms))
        sizes, kinds = group_sizes(terms), group_kinds(terms)
        member = np.repeat(np.arange(len(sizes)), sizes)
        theta = np.zeros((design.shape[1], len(self._anchor)))
        if before is not None and list(map(id, before.terms)) == list(map(id, terms)):
            theta[:-1], theta[-1] = before.theta, before.intercept - before.mean @ before.theta - self._anchor
        if penalties is None and not isinstance(self.smoothing, str):
            penalties = np.full((len(sizes), 1), float(self.smoothing) * samples.total)

        def problem(penalties: Array) -> _Problem:
            penalty = np.append(penalties[member], _INTERCEPT)
            return _Problem(design, self._target, samples.weight, penalty, self._anchor)

        def degrees(penalties: Array, factors: list[Array]) -> Array:
            edf = [free_coefficients(factor, penalties[member], member, sizes) for factor in factors]
            return np.asarray(self._share * np.sum(edf, axis=0))

        def step(penalties: Array) -> tuple[Array, Array]:
            nonlocal theta
            here = problem(penalties)
            point = here.at(theta)
            factors = here.factors(point)
            theta = here.minimise(point, _FOLD_TOLERANCE, factors, steps=1).theta
            used = np.bincount(member, (theta[:-1] ** 2).sum(axis=1), len(sizes)).astype(np.float64)
            return degrees(penalties, factors), used

        if penalties is None:
            power = mean_power(samples.weight @ design[:, :-1] ** 2, member, sizes)
            start = starting_penalties(terms, before)
            # One more coefficient of variance one: logits of a separable class stay finite.
            penalties = choose_penalties(
                step, None if start is None else start[:, 0], power / 4, kinds, self._pools[kinds], prior=1.0, most=25
            )[:, None]
        best = problem(penalties[:, 0])
        point = best.minimise(best.at(theta), _TOLERANCE)
        hessians = best.hessians(point)
        factors = [cholesky(h + np.diag(best.penalty)) for h in hessians]
        mean = samples.weight @ design[:, :-1] / samples.total
        errors, without = self._cross_validated(best, point, hessians, mean, folds)
        coefficients = point.theta[:-1]
        values = [(design[:, span] - mean[span]) @ coefficients[span] for span in spans(terms)]
        fit = SumFit(
            tuple(terms), coefficients, self._anchor + point.theta[-1] + mean @ coefficients, mean, penalties,
            degrees(penalties[:, 0], factors)[:, None], np.ones(len(self._anchor)),
            samples.total, point.objective / samples.total, point.gap / samples.total,
            np.array([h[:-1, :-1] - np.outer(h[-1, :-1], h[-1, :-1]) / h[-1, -1] for h in hessians]),
            np.array([samples.weight @ v**2 / samples.total for v in values]).reshape(len(values), -1), errors, without,
        )  # fmt: skip
        self.history.append(
            {
                "nodes": float(sum(term.size for term in terms)),
                "interactions": float(sum(len(term.features) == 2 for term in terms)),
                "edf": float(self._share * len(self._anchor) + fit.edf.sum()),
                "cross_entropy": float(errors.sum() / samples.total),
            }
        )
        return fit

    def rest(self, fit: SumFit) -> Array:
        """Labels less held-out probabilities, `[m, c]`."""
        return self._target - _probabilities(fit.held_out(self.samples))

    def _design(self, terms: tuple[Term, ...]) -> Array:
        """The columns of all terms, and one of ones."""
        if self._known is None or list(map(id, self._known[0])) != list(map(id, terms)):
            design = np.ones((len(self.samples.X), group_sizes(terms).sum() + 1))
            for part, columns in blocks(terms, self.samples.X):
                design[part, :-1] = columns
            self._known = terms, design
        return self._known[1]

    def _cross_validated(
        self, problem: "_Problem", start: "_Point", hessians: list[Array], mean: Array, wanted: bool
    ) -> tuple[Array, tuple[tuple[Array, Array], ...]]:
        """Errors `[folds, 1]` on each fold, and coefficients and intercepts without it."""
        errors, without = [], []
        for fold in self.samples.folds if wanted and len(self.samples.folds) > 1 else ():
            weight = problem.weight.copy()
            weight[fold] = 0
            share = weight.sum() / problem.weight.sum()
            factors = [cholesky(share * h + np.diag(problem.penalty)) for h in hessians]
            without_fold = replace(problem, weight=weight)
            theta = without_fold.minimise(without_fold.at(start.theta), _FOLD_TOLERANCE, factors).theta
            logits = problem.design[fold] @ theta + self._anchor
            errors.append(problem.weight[fold] @ _losses(logits, self._target[fold]))
            without.append((theta[:-1], self._anchor + theta[-1] + mean @ theta[:-1]))
        return np.array(errors).reshape(-1, 1), tuple(without)


@dataclass(frozen=True)
class _Point:
    theta: Array
    p: Array
    objective: float
    gap: float
    descent: Array  # minus the gradient


@dataclass(frozen=True)
class _Problem:
    """Of given penalties.

    Attributes:
        design: `[m, p + 1]`, the last column ones.
        target: `[m, c]`.
        weight: `[m]`.
        penalty: `[p + 1]`.
        anchor: `[c]`, added to the logits.
    """

    design: Array
    target: Array
    weight: Array
    penalty: Array
    anchor: Array

    def at(self, theta: Array) -> _Point:
        """Everything at `theta` `[p + 1, c]`."""
        logits = self.design @ theta + self.anchor
        p = _probabilities(logits)
        descent = self.design.T @ (self.weight[:, None] * (self.target - p)) - self.penalty[:, None] * theta
        objective = self.weight @ _losses(logits, self.target) + 0.5 * (self.penalty @ theta**2).sum()
        # The probabilities themselves are a point of the dual problem.
        gap = 0.5 * float((descent**2 / self.penalty[:, None]).sum())
        return _Point(theta, p, float(objective), gap, descent)

    def hessians(self, point: _Point) -> list[Array]:
        """Blocks of the Hessian of the losses, `[p + 1, p + 1]` per logit."""
        result = []
        for p in point.p.T:
            scaled = self.design * np.sqrt(self.weight * np.maximum(p * (1 - p), 1e-10))[:, None]
            result.append(scaled.T @ scaled)
        return result

    def factors(self, point: _Point) -> list[Array]:
        """Of those blocks with their penalties."""
        return [cholesky(h + np.diag(self.penalty)) for h in self.hessians(point)]

    def minimise(
        self, point: _Point, tolerance: float, factors: list[Array] | None = None, steps: int = _MAX_NEWTON
    ) -> _Point:
        """The optimum, to a gap per sample, from a point; `factors` are about those near the optimum."""
        for _ in range(steps):
            if point.gap <= tolerance * self.weight.sum():
                break
            factors = self.factors(point) if factors is None else factors
            direction, length = self._direction(point, factors), 1.0
            trial = self.at(point.theta + direction)
            # Rounding may hide that the last steps lower the objective.
            while not trial.objective <= point.objective * (1 + 1e-12) and length > 1e-6:
                length /= 2
                trial = self.at(point.theta + length * direction)
            if length <= 1e-6:
                break
            point = trial
        return point

    def _direction(self, point: _Point, factors: list[Array]) -> Array:
        """Newton's step `[p + 1, c]`."""
        shape = point.theta.shape

        def image(v: Array) -> Array:
            logits = self.design @ v.reshape(shape)
            mixed = point.p * logits
            mixed -= point.p * (mixed if shape[1] == 1 else mixed.sum(axis=1, keepdims=True))
            return np.ravel(self.design.T @ (mixed * self.weight[:, None]) + self.penalty[:, None] * v.reshape(shape))

        def precondition(r: Array) -> Array:
            columns = zip(factors, r.reshape(shape).T, strict=True)
            return np.stack([solve_with(factor, column) for factor, column in columns], axis=1).ravel()

        size = point.theta.size
        step, _ = cg(
            LinearOperator((size, size), matvec=image), point.descent.ravel(),
            rtol=1e-2, maxiter=40, M=LinearOperator((size, size), matvec=precondition),
        )  # fmt: skip
        return np.asarray(step).reshape(shape)


def _probabilities(logits: Array) -> Array:
    """`[m, c] -> [m, c]`."""
    result: Array = special.expit(logits) if logits.shape[1] == 1 else special.softmax(logits, axis=1)
    return result


def _losses(logits: Array, target: Array) -> Array:
    """Cross-entropies, `[m]`."""
    if logits.shape[1] == 1:
        return np.logaddexp(0.0, logits[:, 0]) - target[:, 0] * logits[:, 0]
    result: Array = special.logsumexp(logits, axis=1) - (target * logits).sum(axis=1)
    return result
