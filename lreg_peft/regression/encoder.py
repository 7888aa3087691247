"""The Lagrange encoder as a transformer: features in, hat functions out."""

from typing import Any

import numpy as np
from scipy import sparse
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import (
    _check_feature_names_in,
    _check_sample_weight,
    check_is_fitted,
    validate_data,
)

from .base import check_nodes, keeps_attributes
from .mesh1d import Scale, find, place_nodes
from .penalized import rows_of


class LagrangeEncoder(TransformerMixin, BaseEstimator):
    """Every feature becomes the hat functions of a mesh (Li, Cheng & Gu 2025, sec. 2.6): at most two are not zero.

    A linear model on the result is a sum of continuous piecewise-linear functions. The hat functions of a feature are
    one at their own node, zero at the others, and sum to one; outside the mesh its border counts.

    Args:
        n_nodes: nodes per feature, at least 2; fewer where a feature takes fewer values.
        scale: "quantile" places nodes where samples are, "minmax" at equal steps.
        sparse_output: CSR matrix or array.

    Attributes:
        nodes_: a list with `[k]` per feature, k <= n_nodes.
        n_features_in_: number of features.
        n_features_out_: number of hat functions.
        feature_names_in_: names of the features, if `X` had names.
    """

    nodes_: list[np.ndarray]
    n_features_in_: int
    n_features_out_: int

    def __init__(self, n_nodes: int = 16, scale: Scale = "quantile", sparse_output: bool = True):
        self.n_nodes = n_nodes
        self.scale = scale
        self.sparse_output = sparse_output

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "LagrangeEncoder":
        """Place the nodes.

        Args:
            X: `[n_samples, n_features]`, finite.
            y: not looked at.
            sample_weight: `[n_samples]`, non-negative: a sample of weight two acts like two.

        Returns:
            itself.

        Raises:
            ValueError: for options out of range, or data that are not finite numbers.
        """
        check_nodes(self.scale, n_nodes=self.n_nodes)
        with keeps_attributes(self):
            X = validate_data(self, X, dtype=np.float64)
            weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        X, weight = X[weight > 0], weight[weight > 0]
        self.nodes_ = []
        for column in X.T:
            order = np.argsort(column, kind="stable")
            self.nodes_.append(place_nodes(column[order], weight[order], int(self.n_nodes), self.scale))
        self.n_features_out_ = sum(map(len, self.nodes_))
        return self

    def transform(self, X: Any) -> Any:
        """Evaluate the hat functions.

        Args:
            X: `[n_samples, n_features]`.

        Returns:
            `[n_samples, n_features_out_]`, fp64: a CSR matrix with two entries per sample and feature, or an array.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        blocks = []
        for column, nodes in zip(X.T, self.nodes_, strict=True):
            if len(nodes) == 1:
                blocks.append(sparse.csr_array(np.ones((len(X), 1))))
            else:
                element, right = find(np.clip(column, nodes[0], nodes[-1]), nodes)
                two, hats = element[:, None] + np.arange(2), np.stack((1 - right, right), axis=1)
                blocks.append(rows_of(two, hats, len(nodes)))
        result = sparse.csr_matrix(sparse.hstack(blocks, format="csr"))
        return result if self.sparse_output else result.toarray()

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of the hat functions: the name of the feature, and the number of the node.

        Args:
            input_features: names of the features; None takes those seen in `fit`, or x0, x1, ...

        Returns:
            `[n_features_out_]`, of dtype object.
        """
        check_is_fitted(self, "n_features_in_")
        names = _check_feature_names_in(self, input_features)
        return np.array(
            [f"{name}_hat{j}" for name, nodes in zip(names, self.nodes_, strict=True) for j in range(len(nodes))],
            dtype=object,
        )

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []
        return tags
