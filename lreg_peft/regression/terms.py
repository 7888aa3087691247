"""What sums are made of: functions of one feature, functions of two, and their columns.

A term is a table of nodal values, a linear image of coefficients that are independent and normal, with one variance per
group: the straight part and the bends of a function of one feature; products of those for two. In this mixed-model form
(Wood 2017, sec. 5.8; t2 smooths: Wood, Scheipl & Faraway 2013) constants are left out of all terms, so that no
constraints are needed, and a term can vanish.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .mesh1d import QUANTILE_SHARE, Array, evaluate, find
from .scaling import quantile_knots

# Bends are given by the functions that vary most a priori (Demmler & Reinsch 1975); those with less than this share of
# the variance of the first make no difference.
_NEGLIGIBLE = 1e-13
# For products a coarser selection: the share, and the most columns of a group.
_NEGLIGIBLE_PRODUCT, _PRODUCTS = 1e-4, 24


@dataclass(frozen=True)
class FittedTerm:
    """A piecewise-linear function of one feature, or a bilinear one of two.

    Attributes:
        features: the columns it looks at, one or two.
        nodes: one mesh per feature, `[k]` each.
        values: at the nodes, `[k, outputs]` or `[k1, k2, outputs]`.
        smoothing: `[penalties, outputs]`, what the term was penalised with.
        edf: `[outputs]`, effective degrees of freedom.
        variance: `[outputs]`, of the function over the samples.
        deviation: standard deviations at the nodes, shaped like `values`: what the samples leave open, given the
            penalties.
    """

    features: tuple[int, ...]
    nodes: tuple[Array, ...]
    values: Array
    smoothing: Array
    edf: Array
    variance: Array
    deviation: Array

    def evaluate(self, X: Array) -> Array:
        """`[n, d] -> [n, outputs]`. Outside its mesh a line goes on straight, a pair stays at its border."""
        if len(self.features) == 1:
            return evaluate(X[:, self.features[0]], self.nodes[0], self.values)
        (first, a), (second, b) = (
            find(np.clip(X[:, feature], nodes[0], nodes[-1]), nodes)
            for feature, nodes in zip(self.features, self.nodes, strict=True)
        )
        a, b = a[:, None], b[:, None]
        low = (1 - b) * self.values[first, second] + b * self.values[first, second + 1]
        high = (1 - b) * self.values[first + 1, second] + b * self.values[first + 1, second + 1]
        return (1 - a) * low + a * high


@dataclass(frozen=True)
class Line:
    """A continuous piecewise-linear function of one feature.

    Attributes:
        feature: its column.
        nodes: `[k >= 2]`.
        basis: `[k, r]`, nodal values of the straight line, then of bends without their least-squares line. All have
            mean zero over the samples; the line has unit variance, and so have the bends together.
        power: `[r]`, variances of the columns over the samples.
    """

    feature: int
    nodes: Array
    basis: Array
    power: Array

    @classmethod
    def over(cls, feature: int, x: Array, weight: Array, nodes: Array, scale: str, rank: int | None = None) -> "Line":
        """The term for samples `x` `[n]` of a feature with positive weights; `rank`: most columns."""
        k = len(nodes)
        element, right = find(x, nodes)
        left = 1 - right
        # Weighted moments of pairs of hat functions: means over the samples of products of functions on this mesh.
        w = weight / weight.sum()
        diagonal = np.bincount(element, w * left * left, k) + np.bincount(element + 1, w * right * right, k)
        beside = np.bincount(element, w * left * right, k)[:-1]
        gram = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        mean = gram.sum(axis=1)
        half = nodes / 2  # the range of numbers is finite
        place = (half - half[0]) / (half[-1] - half[0])
        straight = place - mean @ place
        straight = (straight / np.sqrt(straight @ gram @ straight))[:, None]
        if k == 2:
            return cls(feature, nodes, straight, np.ones(1))
        bends = _bends(place, np.interp(nodes, *quantile_knots(x, weight)), scale)
        bends = bends - mean @ bends
        bends = bends - straight * (straight.T @ gram @ bends)
        variance, rotation = np.linalg.eigh(bends.T @ gram @ bends)
        order = np.argsort(-variance)
        order = order[: k - 2 if rank is None else max(rank - 1, 1)]
        order = order[variance[order] > _NEGLIGIBLE * max(variance[order[0]], np.finfo(float).tiny)]
        if not len(order):
            return cls(feature, nodes, straight, np.ones(1))
        bends = bends @ rotation[:, order]
        total = variance[order].sum()
        return cls(
            feature, nodes, np.concatenate((straight, bends / np.sqrt(total)), axis=1),
            np.concatenate(([1.0], variance[order] / total)),
        )  # fmt: skip

    @property
    def features(self) -> tuple[int, ...]:
        """The columns it looks at."""
        return (self.feature,)

    @property
    def meshes(self) -> tuple[Array, ...]:
        """One mesh per feature."""
        return (self.nodes,)

    @property
    def groups(self) -> list[int]:
        """Number of coefficients in each group of equal variance."""
        return [1, len(self.power) - 1] if len(self.power) > 1 else [1]

    @property
    def kinds(self) -> list[int]:
        """Of each group: which others its variance is like."""
        return [0, 1][: len(self.groups)]

    @property
    def size(self) -> int:
        """Nodes."""
        return len(self.nodes)

    def columns(self, X: Array) -> Array:
        """`[n, d] -> [n, r]`; the end elements go on outside."""
        return self.at(X[:, self.feature])

    def function(self, X: Array, theta: Array) -> Array:
        """Of coefficients `[r, q]` at the samples: `[n, q]`."""
        return evaluate(X[:, self.feature], self.nodes, self.basis @ theta)

    def at(self, x: Array) -> Array:
        """`[n] -> [n, r]`."""
        return evaluate(x, self.nodes, self.basis)


def _bends(place: Array, level: Array, scale: str) -> Array:
    """Functions with one jump of the slope each, `[k, bends]`, of equal variance a priori.

    "quantile": slopes are per step of a coordinate between the range and the share of samples below, so that a far
    value does not make straight lines of all others. "minmax": variances of jumps are the lengths of elements, so that
    the prior is about that of the integrated squared second derivative.
    """
    if scale == "quantile":
        where = QUANTILE_SHARE * level + (1 - QUANTILE_SHARE) * place
        return np.maximum(where[:, None] - where[None, :-1], 0.0)
    length = np.diff(place)
    root = np.sqrt((length[:-1] + length[1:]) / 2)
    return np.maximum(place[:, None] - place[None, 1:-1], 0.0) * root


@dataclass(frozen=True)
class Pair:
    """An interaction: products of functions of two features, bilinear on a grid; constant outside along its border.

    Attributes:
        lines: the margins.
        kinds: per group, which others its variance is like.
        products: per group (straight x straight, straight x bends, bends x straight, bends x bends) the columns of
            both margins, `[2, size]`.
    """

    lines: tuple[Line, Line]
    products: tuple[NDArray[np.int64], ...]
    kinds: list[int]

    @classmethod
    def of(cls, first: Line, second: Line) -> "Pair":
        """All products but those that make little difference a priori."""
        products, kinds = [], []
        for a in (np.arange(1), np.arange(1, len(first.power))):
            for b in (np.arange(1), np.arange(1, len(second.power))):
                if not len(a) or not len(b):
                    continue
                i, j = (index.ravel() for index in np.meshgrid(a, b, indexing="ij"))
                power = first.power[i] * second.power[j]
                best = np.argsort(-power, kind="stable")[:_PRODUCTS]
                best = best[power[best] > _NEGLIGIBLE_PRODUCT * power[best[0]]]
                products.append(np.stack((i[best], j[best])))
                kinds.append(2 + int(i[0] > 0) + int(j[0] > 0))
        return cls((first, second), tuple(products), kinds)

    @property
    def features(self) -> tuple[int, ...]:
        """The columns it looks at."""
        return (self.lines[0].feature, self.lines[1].feature)

    @property
    def meshes(self) -> tuple[Array, ...]:
        """One mesh per feature."""
        return (self.lines[0].nodes, self.lines[1].nodes)

    @property
    def groups(self) -> list[int]:
        """Number of coefficients in each group of equal variance."""
        return [group.shape[1] for group in self.products]

    @property
    def size(self) -> int:
        """Nodes."""
        return self.lines[0].size * self.lines[1].size

    @property
    def basis(self) -> Array:
        """`[k1 k2, r]`, nodal values."""
        i, j = np.concatenate(self.products, axis=1)
        first, second = self.lines[0].basis[:, i], self.lines[1].basis[:, j]
        return (first[:, None, :] * second[None, :, :]).reshape(self.size, -1)

    def columns(self, X: Array) -> Array:
        """`[n, d] -> [n, r]`."""
        i, j = np.concatenate(self.products, axis=1)
        parts = [line.at(np.clip(X[:, line.feature], line.nodes[0], line.nodes[-1])) for line in self.lines]
        return parts[0][:, i] * parts[1][:, j]

    def function(self, X: Array, theta: Array) -> Array:
        """Of coefficients `[r, q]` at the samples: `[n, q]`."""
        return self.columns(X) @ theta


Term = Line | Pair
