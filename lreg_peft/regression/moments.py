"""Sums over the samples, fold by fold: all that a penalised fit and its cross-validation look at."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .mesh1d import Array, find
from .samples import Samples
from .terms import Line, Term

_BLOCK = 1 << 21  # entries of the design held at once


@dataclass(frozen=True)
class Moments:
    """Weighted sums over the samples of every fold, in the coefficients of the terms.

    Attributes:
        gram: `[folds, p, p]`.
        product: `[folds, p, q]`, with the outputs, of which the mean over all samples has been taken.
        sums: `[folds, p]`, of the columns.
        y_sums: `[folds, q]`, of the centred outputs.
        squares: `[folds, q]`, of the centred outputs.
        weight: `[folds]`.
        y_mean: `[q]`, what the outputs were centred with.
    """

    gram: Array
    product: Array
    sums: Array
    y_sums: Array
    squares: Array
    weight: Array
    y_mean: Array

    def centred(self, without: int | None = None) -> tuple[Array, Array, Array, Array, Array]:
        """Of all folds but one, with the means over them taken out.

        Returns:
            gram `[p, p]`, product `[p, q]`, squares `[q]`, and the means of columns `[p]` and outputs `[q]`.
        """
        kept = np.arange(len(self.weight)) != (-1 if without is None else without)
        weight = self.weight[kept].sum()
        # A sum over the first axis makes copies, one after the other does not.
        gram = self.gram[kept][0] if kept.sum() == 1 else sum(self.gram[f] for f in np.flatnonzero(kept))
        mean, y_mean = self.sums[kept].sum(axis=0) / weight, self.y_sums[kept].sum(axis=0) / weight
        return (
            gram - weight * np.outer(mean, mean),
            self.product[kept].sum(axis=0) - weight * np.outer(mean, y_mean),
            self.squares[kept].sum(axis=0) - weight * y_mean**2,
            mean,
            y_mean,
        )

    def errors(self, fold: int, theta: Array, mean: Array, y_mean: Array) -> Array:
        """Squared errors `[q]` over the samples of a fold, of `theta` `[p, q]` fitted with means of other samples."""
        shift = y_mean - mean @ theta  # [q], the intercept
        image = self.gram[fold] @ theta
        return (
            self.squares[fold]
            - 2 * (theta * self.product[fold]).sum(axis=0)
            + (theta * image).sum(axis=0)
            - 2 * shift * (self.y_sums[fold] - self.sums[fold] @ theta)
            + self.weight[fold] * shift**2
        )


def blocks(terms: Sequence[Term], X: Array) -> Iterator[tuple[slice, Array]]:
    """The columns of all terms side by side, some rows at a time."""
    width = sum(sum(term.groups) for term in terms)
    step = max(64, _BLOCK // max(width, 1))
    for start in range(0, len(X), step):
        part = slice(start, min(start + step, len(X)))
        empty = np.zeros((part.stop - part.start, 0))
        yield part, np.concatenate([empty, *(term.columns(X[part]) for term in terms)], axis=1)


def moments(terms: Sequence[Term], samples: Samples) -> Moments:
    """One pass over the samples: with hat functions, which cost two entries a row, for functions of one feature."""
    y, weight = samples.y, samples.weight
    width, n_folds, q = sum(map(_width, terms)), len(samples.folds), y.shape[1]
    step = max(64, _BLOCK // max(width, 1))
    y_mean = weight @ y / weight.sum()
    targets = np.column_stack((y - y_mean, np.ones(len(y))))
    p = sum(sum(term.groups) for term in terms)
    gram, product, sums = np.zeros((n_folds, p, p)), np.zeros((n_folds, p, q)), np.zeros((n_folds, p))
    for f, fold in enumerate(samples.folds):
        inner, right = np.zeros((width, width)), np.zeros((width, q + 1))
        for start in range(fold.start, fold.stop, step):
            part = slice(start, min(start + step, fold.stop))
            root = np.sqrt(weight[part])[:, None]
            columns = _sparse_columns(terms, samples.X[part], width, root)
            inner += columns.T @ columns
            right += columns.T @ (targets[part] * root)
        right = _combined(terms, right)
        gram[f], product[f], sums[f] = _combined(terms, _combined(terms, inner).T), right[:, :q], right[:, q]
    totals = np.array([weight[fold] @ np.column_stack((targets, targets[:, :q] ** 2))[fold] for fold in samples.folds])
    return Moments(gram, product, sums, totals[:, :q], totals[:, q + 1 :], totals[:, q], y_mean)


def _width(term: Term) -> int:
    return term.size if isinstance(term, Line) else sum(term.groups)


def _sparse_columns(terms: Sequence[Term], X: Array, width: int, root: Array) -> Array:
    """Hat functions for functions of one feature, columns for others; times `root`."""
    result, start = np.zeros((len(X), width)), 0
    rows = np.arange(len(X))
    for term in terms:
        if isinstance(term, Line):
            element, local = find(X[:, term.feature], term.nodes)
            right = local * root[:, 0]
            result[rows, start + element], result[rows, start + element + 1] = root[:, 0] - right, right
        else:
            result[:, start : start + _width(term)] = term.columns(X) * root
        start += _width(term)
    return result


def _combined(terms: Sequence[Term], sums: Array) -> Array:
    """From hat functions to coefficients, along the first axis."""
    ends = np.cumsum([0, *map(_width, terms)])
    parts = [sums[a:b] for a, b in pairwise(ends)]
    images = [t.basis.T @ part if isinstance(t, Line) else part for t, part in zip(terms, parts, strict=True)]
    return np.concatenate([sums[:0], *images])


def spans(terms: Sequence[Term]) -> list[slice]:
    """The columns of each term."""
    ends = np.cumsum([0] + [sum(term.groups) for term in terms])
    return [slice(int(a), int(b)) for a, b in pairwise(ends)]
