"""Sums of functions of one feature and of two, all smoothing parameters by restricted maximum likelihood."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import linalg

from .mesh1d import Array, Scale
from .moments import Moments, blocks, moments, spans
from .report import Optimality, SumModel, widening
from .ridge import Ridge, cholesky, fit_variances, inverse
from .samples import Samples
from .search import POOLS, Builder, better, crowded, mesh_sizes, with_pairs
from .terms import FittedTerm, Pair, Term

_GAIN = 10.0  # in the criterion, for which more nodes are kept: a Bayes factor of 150
# Factors that all penalties together may get for smaller errors of cross-validation.
_FACTORS = 10.0 ** np.arange(0.5, 12.1, 0.5)
_MOST_EDF = 0.8  # of the observations
_CHOOSING = 50_000  # rows on which terms are chosen


@dataclass(frozen=True)
class Additive:
    """A fitted model with `q` outputs.

    Attributes:
        terms: functions of one feature, then of two.
        theta: `[p, q]`, coefficients of all terms.
        intercept: `[q]`.
        smoothing: `[groups, q]`; infinite for what has left.
        edf: `[groups, q]`.
        noise_variance: `[q]`.
        objective: `[q]`.
        gap: `[q]`.
        criterion: `[q]`, twice the negative restricted log-likelihood, up to a constant common to models of the data.
        errors: `[folds, q]`, squared errors of cross-validation.
        history: one entry per model tried.
    """

    terms: tuple[Term, ...]
    theta: Array
    intercept: Array
    smoothing: Array
    edf: Array
    noise_variance: Array
    objective: Array
    gap: Array
    criterion: Array
    errors: Array
    history: tuple[dict[str, float], ...]
    sums: Moments = field(repr=False)
    fold_theta: Array = field(repr=False)  # [folds, p, q]
    fold_shift: Array = field(repr=False)  # [folds, q]

    @property
    def variances(self) -> Array:
        """`[terms, q]`, of the functions over the samples."""
        gram, *_ = self.sums.centred()
        parts = [np.einsum("pq,pr,rq->q", self.theta[s], gram[s, s], self.theta[s]) for s in spans(self.terms)]
        return np.array(parts).reshape(len(self.terms), self.theta.shape[1]) / self.sums.weight.sum()

    def model(self) -> SumModel:
        """In the form that the estimator shows."""
        _, _, _, mean, _ = self.sums.centred()
        intercept, terms, group = self.intercept.copy(), [], 0
        inverses = self._inverses()
        for term, span, variance in zip(self.terms, spans(self.terms), self.variances, strict=True):
            here = slice(group, group + len(term.groups))
            group = here.stop
            # Functions come out with mean zero over the samples.
            shift = mean[span] @ self.theta[span]
            intercept += shift
            basis, shape = term.basis - mean[span], tuple(map(len, term.meshes))
            values = (basis @ self.theta[span]).reshape(*shape, -1)
            spread = (
                np.einsum("kp,opr,kr->ko", basis, inverses[:, span, span], basis, optimize=True) * self.noise_variance
            )
            deviation = np.sqrt(np.maximum(spread, 0)).reshape(*shape, -1)
            edf = self.edf[here].sum(axis=0)
            terms.append(FittedTerm(term.features, term.meshes, values, self.smoothing[here], edf, variance, deviation))
        edf = 1 + self.edf.sum(axis=0)
        about = "sum of squared residuals plus penalties of all groups of coefficients, over the coefficients"
        return SumModel(
            tuple(terms), intercept, edf, self.noise_variance, self.history,
            Optimality.of(float(self.objective.sum()), float(self.gap.sum()), about),
            self.posterior_variance, widening(self.sums.weight.sum() - edf),
        )  # fmt: skip

    @property
    def penalties(self) -> Array:
        """`[p, q]`, per coefficient."""
        return np.repeat(self.smoothing, [size for term in self.terms for size in term.groups], axis=0)

    def rest(self, samples: Samples) -> Array:
        """Residuals `[m, q]` for the rows of every fold by the fit to the others."""
        result = np.empty((len(samples.X), len(self.intercept)))
        for f, fold in enumerate(samples.folds):
            result[fold] = samples.y[fold] - self.fold_shift[f]
            for term, span in zip(self.terms, spans(self.terms), strict=True):
                result[fold] -= term.function(samples.X[fold], self.fold_theta[f, span])
        return result

    def _inverses(self) -> Array:
        """Of the normal equations, `[q, p, p]`; zero for what has left."""
        gram, *_ = self.sums.centred()
        penalties = self.penalties
        result = np.zeros((len(self.intercept), *gram.shape))
        for o in range(len(self.intercept)):
            here = np.flatnonzero(np.isfinite(penalties[:, o]))
            if len(here):
                result[o][np.ix_(here, here)] = inverse(gram[np.ix_(here, here)] + np.diag(penalties[here, o]))
        return result

    def posterior_variance(self, X: Array) -> Array:
        """Variance of the function at `X`, without the noise; `[n, d] -> [n, q]`."""
        result = np.repeat(self.noise_variance[None] / self.sums.weight.sum(), len(X), axis=0)
        inverses, mean = self._inverses(), self.sums.centred()[3]
        for part, columns in blocks(self.terms, X) if self.terms else ():
            for o, matrix in enumerate(inverses):
                deviation = columns - mean
                result[part, o] += self.noise_variance[o] * ((deviation @ matrix) * deviation).sum(axis=1)
        return result


def fit_additive(
    samples: Samples,
    *,
    n_nodes: int | None = None,
    interactions: int | str | Sequence[tuple[int, int]] = "auto",
    max_nodes: int = 4000,
    scale: Scale = "quantile",
    smoothing: str | float = "reml",
    random: np.random.Generator,
    report: Callable[[], None] | None = None,
) -> Additive:
    """Fit.

    Args:
        samples: with `y` `[m, q]`.
        n_nodes: per function; None starts with up to 32 and doubles them where they are used.
        interactions: "auto", how many, or which; 0 for none.
        max_nodes: most nodes of all terms together.
        scale: see `place_nodes`.
        smoothing: "reml", or one penalty for all groups, per sample.
        random: for the search of interactions in large data.
        report: called after every update of the penalties.

    Returns:
        The fit.
    """
    every, samples = samples, samples.thinned(_CHOOSING)
    X, q = samples.X, samples.y.shape[1]
    varying = [j for j in range(X.shape[1]) if X[:, j].min() < X[:, j].max()]
    wanted = mesh_sizes(varying, X.shape[1], n_nodes, max_nodes)
    build = Builder(samples, scale)

    def solve(terms: Sequence[Term], before: Additive | None) -> Additive:
        if before is None:
            sums = moments(terms, samples)
        else:
            # What is known comes first, and goes back to its place.
            old = {id(term): columns for term, columns in zip(before.terms, spans(before.terms), strict=True)}
            order = sorted(range(len(terms)), key=lambda k: id(terms[k]) not in old)
            kept = [old[id(terms[k])] for k in order if id(terms[k]) in old]
            known = before.sums.part(np.concatenate([np.arange(s.start, s.stop) for s in kept])) if kept else None
            sums = moments([terms[k] for k in order], samples, known)
            if order != list(range(len(terms))):
                places = dict(zip(order, spans([terms[k] for k in order]), strict=True))
                back = [np.arange(places[k].start, places[k].stop) for k in range(len(terms))]
                sums = sums.part(np.concatenate(back))
        return solve_terms(terms, samples, smoothing, sums=sums, before=before, report=report)

    fit = solve([build.line(j, wanted[j]) for j in varying], None)
    while n_nodes is None and (finer := crowded(fit, wanted, max_nodes)):
        wanted.update({j: 2 * wanted[j] for j in finer})
        larger = solve([build.line(j, wanted[j]) for j in varying], fit)
        if isinstance(smoothing, str) and not larger.criterion.sum() < fit.criterion.sum() - _GAIN * q:
            break
        fit = larger
    if len(varying) > 1:
        fit = with_pairs(fit, build, samples, interactions, max_nodes, random, solve)
    if samples is not every:
        # More rows, more of each sum: penalties that are relative to them begin where they were.
        known = replace(fit, smoothing=fit.smoothing * (every.total / samples.total))
        sums = moments(fit.terms, every)
        fit = solve_terms(fit.terms, every, smoothing, sums=sums, before=known, report=report)
    return _cautious(fit, every) if isinstance(smoothing, str) else fit


def solve_terms(
    terms: Sequence[Term],
    samples: Samples,
    smoothing: str | float,
    *,
    sums: Moments,
    penalties: Array | None = None,
    before: Additive | None = None,
    report: Callable[[], None] | None = None,
) -> Additive:
    """Fit given terms.

    Args:
        terms: functions of one feature, then of two.
        samples: the data.
        smoothing: see `fit_additive`.
        sums: of the terms.
        penalties: `[groups, q]`, used as they are instead of `smoothing`; None to choose them.
        before: a fit with some of the terms, whose penalties are the start.
        report: called after every update of the penalties.

    Returns:
        The fit.
    """
    q, total = samples.y.shape[1], samples.total
    groups = [size for term in terms for size in term.groups]
    kinds = np.array([kind for term in terms for kind in term.kinds], dtype=np.int64)
    gram, product, squares, mean, y_mean = sums.centred()
    start = None if before is None or not terms else _starts(terms, before)
    if penalties is None and not isinstance(smoothing, str):
        penalties = np.full((len(groups), q), float(smoothing) * total)
    fits: list[Ridge] = [
        fit_variances(
            gram, product[:, o], float(squares[o]), groups, total,
            start=None if start is None else start[:, o], fixed=None if penalties is None else penalties[:, o],
            kinds=kinds, pools=np.asarray(POOLS)[kinds], report=report,
        )
        for o in range(q)
    ]  # fmt: skip
    theta = np.stack([fit.theta for fit in fits], axis=1)
    chosen = np.stack([fit.penalties for fit in fits], axis=1)  # [groups, q]
    edf = np.stack([fit.edf for fit in fits], axis=1)
    fold_theta, fold_shift, errors = _cross_validated(sums, np.repeat(chosen, groups, axis=0))
    entry = {
        "nodes": float(sum(term.size for term in terms)),
        "interactions": float(sum(isinstance(term, Pair) for term in terms)),
        "updates": float(sum(len(fit.history) - 1 for fit in fits)),
        "edf": float(1 + edf.sum(axis=0).mean()),
        "criterion": float(np.mean([fit.criterion for fit in fits])),
        "cross_validation": float(errors.sum(axis=0).mean() / total),
    }
    return Additive(
        tuple(terms), theta, sums.y_mean + y_mean - mean @ theta, chosen, edf,
        np.array([fit.noise_variance for fit in fits]), np.array([fit.objective for fit in fits]),
        np.array([fit.gap for fit in fits]), np.array([fit.criterion for fit in fits]), errors,
        (*(before.history if before else ()), entry), sums, fold_theta, fold_shift + sums.y_mean,
    )  # fmt: skip


def _cross_validated(sums: Moments, penalties: Array) -> tuple[Array, Array, Array]:
    """Coefficients `[folds, p, q]` without each fold, their intercepts and errors `[folds, q]` on the fold."""
    n_folds, p, q = sums.product.shape
    theta, shift, errors = np.zeros((n_folds, p, q)), np.zeros((n_folds, q)), np.zeros((n_folds, q))
    for f in range(n_folds if n_folds > 1 else 0):
        gram, product, _, mean, y_mean = sums.centred(without=f)
        for o in range(q):
            here = np.flatnonzero(np.isfinite(penalties[:, o]))
            if len(here):
                matrix = gram[np.ix_(here, here)] + np.diag(penalties[here, o])
                theta[f, here, o] = linalg.cho_solve((cholesky(matrix), True), product[here, o], check_finite=False)
        shift[f] = y_mean - mean @ theta[f]
        errors[f] = np.maximum(sums.errors(f, theta[f], mean, y_mean), 0.0)
    return theta, shift, errors


def _cautious(fit: Additive, samples: Samples) -> Additive:
    """Stronger penalties, all by one factor, where they clearly make smaller errors of cross-validation.

    And in any case such that some degrees of freedom are left for the noise.
    """
    if not fit.terms or len(samples.folds) < 2:
        return fit
    best = fit
    for factor in _FACTORS:
        stronger = solve_terms(
            fit.terms, samples, "reml", sums=fit.sums, penalties=fit.smoothing * factor, before=fit
        )  # fmt: skip
        crowded = 1 + best.edf.sum(axis=0).max() > _MOST_EDF * samples.total
        if not crowded and not better(stronger, best):
            break
        best = stronger
    return best


def _starts(terms: Sequence[Term], before: Additive) -> Array:
    """Penalties to start from: those of the same features and groups in `before`."""
    known, row = {}, 0
    for term in before.terms:
        known[term.features] = before.smoothing[row : row + len(term.groups)]
        row += len(term.groups)
    result = []
    for term in terms:
        old = known.get(term.features)
        n = len(term.groups)
        result.append(old if old is not None and len(old) == n else np.full((n, before.smoothing.shape[1]), np.nan))
    return np.concatenate(result)
