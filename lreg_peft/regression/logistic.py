"""Penalised cross-entropy over sums of terms: its optimum, its penalties, its errors of cross-validation.

For two classes there is one logit, for more one for each. The optimum is found by Newton's method, the linear systems
by conjugate gradients with the blocks of single classes as a preconditioner (exact for two classes). Penalties follow
from the restricted likelihood in Laplace's approximation (Wood & Fasiolo 2017): at every step those of the weighted
least-squares problem that the step solves. Intercepts are not penalised.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, special

from .mesh1d import Array
from .moments import blocks, spans
from .ridge import pooled_penalties
from .samples import Samples
from .terms import Term

_MAX_NEWTON = 50
_MAX_CG = 40
_MAX_UPDATES = 12
_GONE, _LEAST = 1e6, 1e-6
# Of a fold that lacks a class: what keeps its intercept finite, in samples.
_INTERCEPT = 0.01
_FOLD_TOLERANCE, _FOLD_STEPS = 1e-3, 4
_MANY = 20  # samples per coefficient: the Hessian of some is that of others
_STILL = 0.1  # of logarithms of penalties
_FACTORS = (10.0 ** np.arange(0.5, 4.1, 0.5), 10.0 ** np.arange(-0.5, -1.6, -0.5))
_CERTAIN = 0.5


@dataclass(frozen=True)
class Logistic:
    """A fitted model.

    Attributes:
        terms: what it is a sum of.
        theta: `[p, c]`, c = 1 for two classes.
        intercept: `[c]`.
        smoothing: `[groups, 1]`; infinite for what has left.
        edf: `[groups, 1]`.
        variances: `[terms, c]`, of the functions over the samples.
        objective: the sum of cross-entropies plus half of the penalties.
        gap: how far it may be above its minimum.
        errors: `[folds, 1]`, sums of cross-entropies over held-out samples.
        residual: `[m, c]`, labels less held-out probabilities.
        hessians: of the likelihood at the optimum, `[p + 1, p + 1]` per logit, the intercept last.
    """

    terms: tuple[Term, ...]
    theta: Array
    intercept: Array
    smoothing: Array
    edf: Array
    variances: Array
    objective: float
    gap: float
    errors: Array
    residual: Array = field(repr=False)
    hessians: list[Array] = field(repr=False)

    def rest(self, samples: Samples) -> Array:
        """`[m, c]`, what a search for further terms looks at."""
        return self.residual


@dataclass(frozen=True)
class Problem:
    """Samples and columns.

    Attributes:
        design: `[m, p]`.
        label: `[m]`.
        weight: `[m]`.
        n_logits: 1 for two classes.
        groups: sizes of groups of columns with one penalty.
    """

    design: Array
    label: NDArray[np.int64]
    weight: Array
    n_logits: int
    groups: NDArray[np.int64]

    @property
    def member(self) -> NDArray[np.int64]:
        """`[p]`, the group of each column."""
        return np.repeat(np.arange(len(self.groups)), self.groups)

    @classmethod
    def of(cls, terms: Sequence[Term], samples: Samples, n_classes: int) -> "Problem":
        """The columns of all terms."""
        groups = np.array([size for term in terms for size in term.groups], dtype=np.int64)
        design = np.empty((len(samples.X), groups.sum()))
        for part, columns in blocks(terms, samples.X):
            design[part] = columns
        label = samples.y[:, 0].astype(np.int64)
        return cls(design, label, samples.weight, 1 if n_classes == 2 else n_classes, groups)

    def rows(self, kept: NDArray[np.bool_]) -> "Problem":
        """Some of the samples."""
        return Problem(self.design[kept], self.label[kept], self.weight[kept], self.n_logits, self.groups)

    def target(self) -> Array:
        """`[m, c]`."""
        if self.n_logits == 1:
            return self.label[:, None].astype(np.float64)
        return np.eye(self.n_logits)[self.label]

    def losses(self, logits: Array) -> Array:
        """Cross-entropies `[m]` of logits `[m, c]`."""
        if self.n_logits == 1:
            signed = np.where(self.label == 1, logits[:, 0], -logits[:, 0])
            return -special.log_expit(signed)
        return special.logsumexp(logits, axis=1) - logits[np.arange(len(logits)), self.label]

    def start(self) -> tuple[Array, Array]:
        """No terms, and the base rates."""
        n = 2 if self.n_logits == 1 else self.n_logits
        rate = np.bincount(self.label, self.weight, n) + 0.5 / n
        logs = np.log(rate / rate.sum())
        intercept = logs[1:] - logs[:1] if n == 2 else logs - logs.mean()
        return np.zeros((self.design.shape[1], self.n_logits)), intercept


def probabilities(logits: Array) -> Array:
    """`[m, c] -> [m, c]`."""
    result: Array = special.expit(logits) if logits.shape[1] == 1 else special.softmax(logits, axis=1)
    return result


@dataclass(frozen=True)
class _Point:
    theta: Array
    intercept: Array
    objective: float
    gap: float
    p: Array
    gradient: Array  # [p, c], of the likelihood alone
    level: Array  # [c], the same of the intercepts


def _at(problem: Problem, theta: Array, intercept: Array, penalty: Array, anchor: Array | None) -> _Point:
    logits = problem.design @ theta + intercept
    p = probabilities(logits)
    rest = problem.weight[:, None] * (problem.target() - p)
    gradient, level = problem.design.T @ rest, rest.sum(axis=0)
    objective = float(problem.weight @ problem.losses(logits)) + 0.5 * float((penalty[:, None] * theta**2).sum())
    slack = gradient - penalty[:, None] * theta
    # The probabilities themselves are a point of the dual problem, up to what intercepts leave over.
    gap = 0.5 * float((slack**2 / penalty[:, None]).sum()) + float(np.abs(intercept * level).sum())
    if anchor is not None:
        objective += 0.5 * _INTERCEPT * float(((intercept - anchor) ** 2).sum())
        level = level - _INTERCEPT * (intercept - anchor)
        gap = 0.5 * float((slack**2 / penalty[:, None]).sum()) + float((level**2).sum()) / _INTERCEPT
    return _Point(theta, intercept, objective, gap, p, gradient, level)


def _hessians(problem: Problem, p: Array) -> list[Array]:
    """Blocks of the Hessian of the likelihood, `[p + 1, p + 1]` per logit, the intercept last."""
    result = []
    for k in range(p.shape[1]):
        curvature = problem.weight * np.maximum(p[:, k] * (1 - p[:, k]), 1e-10)
        root = np.sqrt(curvature)
        scaled = problem.design * root[:, None]
        block = np.empty((problem.design.shape[1] + 1,) * 2)
        inner = linalg.blas.dsyrk(1.0, scaled.T)
        block[:-1, :-1] = inner + np.triu(inner, 1).T
        block[-1, :-1] = block[:-1, -1] = root @ scaled
        block[-1, -1] = curvature.sum()
        result.append(block)
    return result


def _factors(hessians: list[Array], penalty: Array, anchored: bool) -> list[tuple[Array, bool]]:
    added = np.append(penalty, _INTERCEPT if anchored else 0.0)
    return [linalg.cho_factor(h + np.diag(added + 1e-12 * h.diagonal().max()), check_finite=False) for h in hessians]


def _direction(
    problem: Problem, point: _Point, penalty: Array, anchored: bool, factors: list[tuple[Array, bool]]
) -> Array:
    """Newton's step `[p + 1, c]`."""
    right = np.vstack((point.gradient - penalty[:, None] * point.theta, point.level))

    def solve(r: Array) -> Array:
        return np.stack([linalg.cho_solve(f, r[:, k], check_finite=False) for k, f in enumerate(factors)], axis=1)

    if problem.n_logits == 1:
        return solve(right)
    added = np.append(penalty, _INTERCEPT if anchored else 0.0)[:, None]

    def image(v: Array) -> Array:
        logits = problem.design @ v[:-1] + v[-1]
        mixed = point.p * (logits - (point.p * logits).sum(axis=1, keepdims=True)) * problem.weight[:, None]
        return np.vstack((problem.design.T @ mixed, mixed.sum(axis=0))) + added * v

    x, r = np.zeros_like(right), right.copy()
    z = solve(r)
    d, inner = z, float((r * z).sum())
    first = inner
    for _ in range(_MAX_CG):
        q = image(d)
        curvature = float((d * q).sum())
        if not curvature > 0:
            break
        step = inner / curvature
        x, r = x + step * d, r - step * q
        z = solve(r)
        inner, before = float((r * z).sum()), inner
        if inner < 1e-4 * first:
            break
        d = z + inner / before * d
    return x


def minimise(
    problem: Problem,
    penalty: Array,
    start: tuple[Array, Array],
    tolerance: float,
    steps: int,
    anchor: Array | None = None,
    hessians: list[Array] | None = None,
) -> _Point:
    """The optimum for given finite penalties `[p]`; `tolerance` is of the gap per sample.

    With `hessians`, approximate ones of the likelihood, steps cost little, and end where they no longer help.
    """
    anchored = anchor is not None
    kept = None if hessians is None else _factors(hessians, penalty, anchored)
    point = _at(problem, *start, penalty, anchor)
    total = problem.weight.sum()
    for _ in range(steps):
        if point.gap <= tolerance * total:
            break
        factors = _factors(_hessians(problem, point.p), penalty, anchored) if kept is None else kept
        direction, length = _direction(problem, point, penalty, anchored, factors), 1.0
        while length > 1e-6:
            trial = _at(
                problem,
                point.theta + length * direction[:-1],
                point.intercept + length * direction[-1],
                penalty,
                anchor,
            )
            if trial.objective < point.objective or trial.gap < point.gap:
                break
            length /= 2
        else:
            break
        point = trial
    return point


def solve_logistic(
    terms: Sequence[Term],
    samples: Samples,
    n_classes: int,
    *,
    smoothing: str | float,
    pools: Array,
    tolerance: float,
) -> Logistic:
    """Fit given terms.

    Args:
        terms: functions of one feature, then of two.
        samples: with labels 0, 1, ... as `y`.
        n_classes: at least two.
        smoothing: "auto", or one penalty for all coefficients, per sample.
        pools: per kind of group, see `fit_variances`.
        tolerance: of the gap, per sample.

    Returns:
        The fit.
    """
    problem = Problem.of(terms, samples, n_classes)
    member, groups = problem.member, problem.groups
    kinds = np.array([kind for term in terms for kind in term.kinds], dtype=np.int64)
    theta, intercept = problem.start()
    if not isinstance(smoothing, str):
        log = np.full(len(groups), np.log(smoothing * samples.total))
        return _finished(terms, samples, problem, log, (theta, intercept), tolerance)
    power = np.bincount(member, problem.weight @ problem.design**2, len(groups)) / np.maximum(groups, 1)
    power = np.maximum(power * 0.25, np.finfo(float).tiny)
    low, high = np.log(power * _LEAST), np.log(power * _GONE)
    log = np.log(power * 0.1)
    share = 1.0 if problem.n_logits == 1 else 1 - 1 / n_classes
    for _ in range(_MAX_UPDATES if len(groups) else 0):
        penalty = np.exp(log)[member]
        hessians = _hessians(problem, _at(problem, theta, intercept, penalty, None).p)
        point = minimise(problem, penalty, (theta, intercept), _FOLD_TOLERANCE, 1, None, hessians)
        theta, intercept = point.theta, point.intercept
        edf = share * _edf(hessians, penalty, problem)
        used = np.bincount(member, (theta**2).sum(axis=1), len(groups)).astype(np.float64)
        # One more coefficient of variance one: logits of a separable class stay finite.
        new = np.log(pooled_penalties(edf + 1, used + 1, kinds, pools[kinds]))
        step = np.clip(1.4 * (new - log), -4.0, 4.0)
        moved = np.abs(step * np.minimum(edf, 1.0)).max()
        log = np.clip(log + step, low, high)
        if moved < _STILL:
            break
    return _finished(terms, samples, problem, log, (theta, intercept), tolerance)


def _edf(hessians: list[Array], penalty: Array, problem: Problem) -> Array:
    """Effective degrees of freedom `[groups]`, summed over logits."""
    member, groups = problem.member, problem.groups
    result = np.zeros(len(groups))
    for factor, _ in _factors(hessians, penalty, False):
        inverse = linalg.lapack.dpotri(factor)[0].diagonal()[:-1]
        result += groups - np.bincount(member, penalty * inverse, len(groups))
    return np.clip(result, 0.0, groups * len(hessians))


def _finished(
    terms: Sequence[Term],
    samples: Samples,
    problem: Problem,
    log: Array,
    start: tuple[Array, Array],
    tolerance: float,
) -> Logistic:
    penalty = np.exp(log)[problem.member]
    point = minimise(problem, penalty, start, tolerance, _MAX_NEWTON)
    hessians = _hessians(problem, point.p)
    errors, rest = _held_out(problem, samples, penalty, (point.theta, point.intercept), hessians)
    columns = problem.design
    variances = np.zeros((len(terms), problem.n_logits))
    for k, span in enumerate(spans(terms)):
        value = columns[:, span] @ point.theta[span]
        mean = problem.weight @ value / samples.total
        variances[k] = problem.weight @ (value - mean) ** 2 / samples.total
    edf = _edf(hessians, penalty, problem)
    return Logistic(
        tuple(terms), point.theta, point.intercept, np.exp(log)[:, None], edf[:, None], variances, point.objective,
        point.gap, errors, rest, hessians,
    )  # fmt: skip


def _held_out(
    problem: Problem, samples: Samples, penalty: Array, start: tuple[Array, Array], hessians: list[Array]
) -> tuple[Array, Array]:
    """Sums of cross-entropies `[folds, 1]`, and labels less probabilities `[m, c]`, by fits to the other folds.

    With many samples, `hessians` of all of them lead to the optimum of most of them.
    """
    errors, rest = np.zeros((len(samples.folds), 1)), np.zeros((len(problem.label), problem.n_logits))
    anchor = problem.start()[1]
    for f, fold in enumerate(samples.folds if len(samples.folds) > 1 else ()):
        kept = np.ones(len(problem.label), dtype=bool)
        kept[fold] = False
        share = float(problem.weight[kept].sum() / problem.weight.sum())
        near = [share * hessian for hessian in hessians] if kept.sum() > _MANY * len(penalty) else None
        point = minimise(problem.rows(kept), penalty, start, _FOLD_TOLERANCE, _FOLD_STEPS, anchor, near)
        held = problem.rows(~kept)
        logits = held.design @ point.theta + point.intercept
        errors[f] = held.weight @ held.losses(logits)
        rest[fold] = held.target() - probabilities(logits)
    return errors, rest


def rescaled(fit: Logistic, samples: Samples, n_classes: int, tolerance: float) -> Logistic:
    """All penalties by one factor, where that clearly makes smaller errors of cross-validation."""
    if not fit.terms or len(samples.folds) < 2:
        return fit
    problem = Problem.of(fit.terms, samples, n_classes)
    log = np.log(fit.smoothing[:, 0])
    best, best_errors = 0.0, fit.errors
    for factors in _FACTORS:
        for factor in np.log(factors):
            errors, _ = _held_out(
                problem, samples, np.exp(log + factor)[problem.member], (fit.theta, fit.intercept), fit.hessians
            )
            gain = (best_errors - errors)[:, 0]
            # Too little smoothing does more harm than too much: only less of it has to be certain.
            needed = _CERTAIN * gain.std(ddof=1) / np.sqrt(len(gain)) if factor < 0 else 0.0
            if gain.mean() <= needed:
                break
            best, best_errors = factor, errors
        if best:
            break
    if not best:
        return fit
    return _finished(fit.terms, samples, problem, log + best, (fit.theta, fit.intercept), tolerance)


def minimise_large(fit: Logistic, part: Samples, samples: Samples, n_classes: int, tolerance: float) -> Logistic:
    """The optimum over all samples, with the penalties of a fit to a part of them."""
    problem = Problem.of(fit.terms, samples, n_classes)
    penalty = fit.smoothing[problem.member, 0]
    near = [samples.total / part.total * hessian for hessian in fit.hessians]
    point = minimise(problem, penalty, (fit.theta, fit.intercept), tolerance, _MAX_NEWTON, None, near)
    point = minimise(problem, penalty, (point.theta, point.intercept), tolerance, _MAX_NEWTON)
    return replace(fit, theta=point.theta, intercept=point.intercept, objective=point.objective, gap=point.gap)
