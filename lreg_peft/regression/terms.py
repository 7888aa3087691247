"""Fitted terms: what a regressor is the sum of."""

from dataclasses import dataclass

import numpy as np

from .mesh1d import Array, evaluate, find


@dataclass(frozen=True)
class FittedTerm:
    """A piecewise-linear function of one feature, or a bilinear one of two.

    Attributes:
        features: the columns it looks at, one or two.
        nodes: one mesh per feature, `[k]` each.
        values: at the nodes, `[k, outputs]` or `[k1, k2, outputs]`.
        smoothing: `[penalties, outputs]`, what the term was penalised with; infinite for a part that vanished.
        edf: `[outputs]`, effective degrees of freedom.
    """

    features: tuple[int, ...]
    nodes: tuple[Array, ...]
    values: Array
    smoothing: Array
    edf: Array

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
