"""What the additive model is made of: functions of one feature, functions of two, and their matrices.

Every term is a table of nodal values, a linear image of coefficients that are independent and normal with one variance
per group: the straight part and the kinks of a function of one feature; products of those for two. This mixed-model
form (Wood 2017, sec. 5.8; t2 smooths: Wood, Scheipl & Faraway 2013) needs no constraints, since constants are left out
of all of them, and lets a term vanish: two groups of a line are its two penalties.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from .mesh1d import Array, find

_ROWS = 1 << 16  # rows of a sparse design held at once


@dataclass(frozen=True)
class Line:
    """A continuous piecewise-linear function of one feature.

    Attributes:
        feature: its column.
        nodes: `[k >= 2]`.
        basis: `[k, k - 1]`, nodal values of the straight line, then of one kink per interior node, each without its
            least-squares line and scaled to unit variance over the samples as a group.
    """

    feature: int
    nodes: Array
    basis: Array

    @classmethod
    def over(cls, feature: int, x: Array, weight: Array, nodes: Array) -> "Line":
        """The term for samples `x` `[n]` of a feature with positive weights."""
        k = len(nodes)
        element, right = find(x, nodes)
        left = 1 - right
        # Weighted moments of pairs of hat functions: means over the samples of products of functions on this mesh.
        w = weight / weight.sum()
        diagonal = np.bincount(element, w * left * left, k) + np.bincount(element + 1, w * right * right, k)
        beside = np.bincount(element, w * left * right, k)[:-1]
        gram = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        mean = gram.sum(axis=1)
        straight = nodes - mean @ nodes
        straight = straight / np.sqrt(straight @ gram @ straight)
        kinks = np.maximum(nodes[:, None] - nodes[None, 1:-1], 0.0)
        if scale_free := k > 2:
            kinks = kinks - mean @ kinks
            kinks = kinks - straight[:, None] * (straight @ gram @ kinks)
            power = np.einsum("ij,ij->", kinks, gram @ kinks) / (k - 2)
            scale_free = power > 0
        if scale_free:
            kinks = kinks / np.sqrt(power)
        return cls(feature, nodes, np.concatenate((straight[:, None], kinks), axis=1))

    @property
    def features(self) -> tuple[int, ...]:
        """The columns it looks at."""
        return (self.feature,)

    @property
    def groups(self) -> list[int]:
        """Number of coefficients in each group of equal variance."""
        return [1] if len(self.nodes) == 2 else [1, len(self.nodes) - 2]

    @property
    def n_functions(self) -> int:
        """Hat functions."""
        return len(self.nodes)

    def alive(self, X: Array) -> tuple[NDArray[np.int64], Array]:
        """Indices and values of the hat functions alive at each sample, `[n, 2]`; the end elements go on outside."""
        element, right = find(X[:, self.feature], self.nodes)
        return np.stack((element, element + 1), axis=1), np.stack((1 - right, right), axis=1)


@dataclass(frozen=True)
class Pair:
    """An interaction: products of functions of two features, bilinear on a grid; constant outside along its border.

    Attributes:
        lines: the margins.
    """

    lines: tuple[Line, Line]

    @property
    def features(self) -> tuple[int, ...]:
        """The columns it looks at."""
        return (self.lines[0].feature, self.lines[1].feature)

    @property
    def nodes(self) -> tuple[Array, Array]:
        """The two meshes, `[k1]` and `[k2]`."""
        return (self.lines[0].nodes, self.lines[1].nodes)

    @property
    def basis(self) -> Array:
        """`[k1 k2, (k1 - 1)(k2 - 1)]`: straight x straight, straight x kinks, kinks x straight, kinks x kinks."""
        first, second = self.lines[0].basis, self.lines[1].basis
        blocks = [np.kron(a, b) for a in (first[:, :1], first[:, 1:]) for b in (second[:, :1], second[:, 1:])]
        return np.concatenate(blocks, axis=1)

    @property
    def groups(self) -> list[int]:
        """Number of coefficients in each group of equal variance."""
        a, b = (len(line.nodes) - 2 for line in self.lines)
        return [size for size in (1, b, a, a * b) if size]

    @property
    def n_functions(self) -> int:
        """Products of hat functions."""
        return self.lines[0].n_functions * self.lines[1].n_functions

    def alive(self, X: Array) -> tuple[NDArray[np.int64], Array]:
        """Indices and values of the products alive at each sample, `[n, 4]`."""
        index, value = [], []
        for line in self.lines:
            element, right = find(X[:, line.feature], line.nodes)
            right = np.clip(right, 0.0, 1.0)
            index.append(np.stack((element, element + 1), axis=1))
            value.append(np.stack((1 - right, right), axis=1))
        n, width = len(X), self.lines[1].n_functions
        return (
            (index[0][:, :, None] * width + index[1][:, None, :]).reshape(n, 4),
            (value[0][:, :, None] * value[1][:, None, :]).reshape(n, 4),
        )


Term = Line | Pair


def chunks(terms: Sequence[Term], X: Array) -> Iterator[tuple[slice, sparse.csr_matrix]]:
    """The design in hat functions of all terms side by side, some rows at a time."""
    total = sum(term.n_functions for term in terms)
    per_row = sum(2 ** len(term.features) for term in terms)
    rows = max(1, min(_ROWS, (1 << 23) // max(per_row, 1)))
    for begin in range(0, len(X), rows):
        part = slice(begin, min(begin + rows, len(X)))
        index, value, start = [], [], 0
        for term in terms:
            i, v = term.alive(X[part])
            index.append(i + start)
            value.append(v)
            start += term.n_functions
        n = part.stop - part.start
        pointer = np.arange(0, (n + 1) * per_row, per_row)
        flat = np.concatenate(index, axis=1).ravel(), np.concatenate(value, axis=1).ravel()
        yield part, sparse.csr_matrix((flat[1], flat[0], pointer), shape=(n, total))


@dataclass(frozen=True)
class Moments:
    """Weighted sums over the samples in the coefficients of the terms, means taken out.

    Attributes:
        gram: `[p, p]`.
        product: `[p, q]`, with the outputs.
        mean: `[p]`, of the columns of the design.
        y_mean: `[q]`.
        squares: `[q]`, of the centred outputs.
        weight: sum of the weights.
    """

    gram: Array
    product: Array
    mean: Array
    y_mean: Array
    squares: Array
    weight: float


def moments(terms: Sequence[Term], X: Array, y: Array, weight: Array) -> Moments:
    """One pass over the samples.

    Args:
        terms: at least one.
        X: `[n, d]`.
        y: `[n, q]`.
        weight: `[n]`, non-negative.

    Returns:
        The sums.
    """
    k = sum(term.n_functions for term in terms)
    total = float(weight.sum())
    y_mean = weight @ y / total
    centred = y - y_mean
    gram, product, sums = np.zeros((k, k)), np.zeros((k, y.shape[1])), np.zeros(k)
    for part, design in chunks(terms, X):
        weighted = design.multiply(weight[part][:, None]).T.tocsr()
        gram += (weighted @ design).toarray()
        product += weighted @ centred[part]
        sums += np.asarray(weighted.sum(axis=1)).ravel()
    gram -= np.outer(sums, sums / total)
    bases = [term.basis for term in terms]
    starts = np.cumsum([0] + [len(basis) for basis in bases])
    spans = [slice(a, b) for a, b in pairwise(starts)]
    columns = np.concatenate([gram[:, s] @ b for s, b in zip(spans, bases, strict=True)], axis=1)
    reduced = np.concatenate([b.T @ columns[s] for s, b in zip(spans, bases, strict=True)], axis=0)
    return Moments(
        (reduced + reduced.T) / 2,
        np.concatenate([b.T @ product[s] for s, b in zip(spans, bases, strict=True)]),
        np.concatenate([b.T @ sums[s] for s, b in zip(spans, bases, strict=True)]) / total,
        y_mean,
        weight @ centred**2,
        total,
    )
