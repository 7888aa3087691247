"""A fitted sum of terms, whatever it was fitted to: squares or cross-entropies."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .mesh1d import Array
from .moments import blocks, spans
from .penalties import cholesky, inverse
from .report import Optimality, SumModel, widening
from .samples import Samples
from .terms import FittedTerm, Term


@dataclass(frozen=True)
class SumFit:
    """A sum of terms with `q` outputs or logits, which have penalties of their own (c = q) or in common (c = 1).

    Attributes:
        terms: functions of one feature, then of two.
        theta: `[p, q]`, coefficients of all terms.
        intercept: `[q]`, of columns without their means.
        mean: `[p]`, of the columns over the samples.
        smoothing: `[groups, c]`.
        edf: `[groups, c]`.
        noise: `[q]`, its variance.
        total: number of observations.
        objective: what was minimised, over all outputs.
        gap: how far that may be above its minimum.
        curvature: `[1 or q, p, p]`, of the sum of losses in the coefficients, intercepts eliminated.
        variances: `[terms, q]`, of the functions over the samples.
        errors: `[folds, c]`, of cross-validation.
        folds: coefficients and intercepts without each fold.
    """

    terms: tuple[Term, ...]
    theta: Array
    intercept: Array
    mean: Array
    smoothing: Array
    edf: Array
    noise: Array
    total: float
    objective: float
    gap: float
    curvature: Array
    variances: Array
    errors: Array
    folds: tuple[tuple[Array, Array], ...]

    def held_out(self, samples: Samples) -> Array:
        """`[m, q]`, for the rows of every fold by the fit to the others."""
        result = np.empty((len(samples.X), len(self.intercept)))
        for fold, (theta, intercept) in zip(samples.folds, self.folds, strict=True):
            result[fold] = intercept - self.mean @ theta
            for term, span in zip(self.terms, spans(self.terms), strict=True):
                result[fold] += term.function(samples.X[fold], theta[span])
        return result

    def model(self, about: str, history: Sequence[dict[str, float]], signs: Array | None = None) -> SumModel:
        """In the form that the estimators show.

        Args:
            about: what was minimised, in words.
            history: of the models tried.
            signs: `[q, outputs]`, how outputs are made of logits.
        """
        signs = np.eye(len(self.intercept)) if signs is None else signs
        n_outputs = signs.shape[1]

        def per_output(edf: Array) -> Array:
            return edf if len(edf) == n_outputs else np.full(n_outputs, edf.sum() / n_outputs)

        penalties = np.repeat(self.smoothing, group_sizes(self.terms), axis=0)
        penalties = np.broadcast_to(penalties, self.theta.shape)
        curvature = np.broadcast_to(self.curvature, (self.theta.shape[1], *self.curvature.shape[1:]))
        inverses = np.array(
            [inverse(cholesky(c + np.diag(penalty))) for c, penalty in zip(curvature, penalties.T, strict=True)]
        )
        terms, group = [], 0
        for k, (term, span) in enumerate(zip(self.terms, spans(self.terms), strict=True)):
            here = slice(group, group + len(term.groups))
            group = here.stop
            # Functions have mean zero over the samples.
            basis, shape = term.basis - self.mean[span], (*map(len, term.meshes), n_outputs)
            spread = np.einsum("kp,opr,kr->ko", basis, inverses[:, span, span], basis, optimize=True) * self.noise
            fitted = FittedTerm(
                term.features, term.meshes, (basis @ self.theta[span] @ signs).reshape(shape), self.smoothing[here],
                per_output(self.edf[here].sum(axis=0)), self.variances[k] @ signs**2,
                np.sqrt(np.maximum(spread, 0) @ signs**2).reshape(shape),
            )  # fmt: skip
            terms.append(fitted)
        edf = 1 + self.edf.sum(axis=0)
        return SumModel(
            tuple(terms), self.intercept @ signs, edf, self.noise, tuple(history),
            Optimality.of(self.objective, self.gap, about),
            _Variance(self.terms, inverses, self.mean, self.noise, self.total), widening(self.total - edf),
        )  # fmt: skip


@dataclass(frozen=True)
class _Variance:
    """Of the function at `X`, without the noise."""

    terms: tuple[Term, ...]
    inverses: Array
    mean: Array
    noise: Array
    total: float

    def __call__(self, X: Array) -> Array:
        result = np.repeat(self.noise[None] / self.total, len(X), axis=0)
        for part, columns in blocks(self.terms, X):
            columns = columns - self.mean
            for o, matrix in enumerate(self.inverses):
                result[part, o] += self.noise[o] * ((columns @ matrix) * columns).sum(axis=1)
        return result


def group_sizes(terms: Sequence[Term]) -> NDArray[np.int64]:
    """Coefficients of each group."""
    return np.array([size for term in terms for size in term.groups], dtype=np.int64)


def group_kinds(terms: Sequence[Term]) -> NDArray[np.int64]:
    """The kind of each group."""
    return np.array([kind for term in terms for kind in term.kinds], dtype=np.int64)


def starting_penalties(terms: Sequence[Term], before: SumFit | None) -> Array | None:
    """`[groups, c]`: those of the same features and groups in `before`, NaN elsewhere."""
    if before is None:
        return None
    known = {}
    ends = np.cumsum([0, *(len(term.groups) for term in before.terms)])
    for term, (first, last) in zip(before.terms, pairwise(ends), strict=True):
        known[term.features, len(term.groups)] = before.smoothing[first:last]
    new = [np.full((len(term.groups), before.smoothing.shape[1]), np.nan) for term in terms]
    return np.concatenate(
        [known.get((term.features, len(term.groups)), unknown) for term, unknown in zip(terms, new, strict=True)]
    )
