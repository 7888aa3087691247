"""Classification by sums of piecewise-linear functions, at the global optimum of the penalised cross-entropy."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy import special
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from ..core import Chunk, solve_cross_entropy
from .design import Line, chunks
from .mesh1d import Array, Scale, place_nodes
from .report import Optimality
from .terms import FittedTerm
from .weights import read_weights

# Penalties that are tried, per sample, from the strongest; a straight line is penalised like the kinks of a function,
# both of unit variance over the samples.
_PENALTIES = 10.0 ** np.arange(1.0, -5.01, -1.0)
_HELD_OUT = 5  # one part in so many
_SHARED, _MOST, _LEAST = 240, 20, 5
_PATH_TOLERANCE = 1e-4
_ROWS = 1 << 14
_KEPT = 1 << 25  # entries of a design that is made once, not in every pass: 256 MiB


class LagrangeClassifier(ClassifierMixin, BaseEstimator):
    """Logits that are sums of continuous piecewise-linear functions of single features.

    Minimises the mean cross-entropy plus `smoothing / 2` times the squares of all coefficients: the slope of each
    function and its kinks, scaled to unit variance over the samples. The problem is convex, and `optimality_` holds the
    proof.

    Args:
        dof: nodes per feature; "auto" takes up to 20, fewer for many features or few samples.
        scale: "quantile" places nodes where samples are, "minmax" at equal steps.
        smoothing: the penalty; "auto" chooses it on every fifth distinct sample, held out.
        tolerance: gap in the mean cross-entropy at which to stop.

    Attributes:
        classes_: `[n_classes]`.
        terms_: the fitted terms, a tuple of `FittedTerm`; their outputs are logits of the classes.
        nodes_, coef_: lists with `[k]` and `[k, n_classes]` per term.
        intercept_: `[n_classes]`.
        smoothing_: the penalty used.
        history_: cross-entropy on the held-out samples for every penalty tried.
        optimality_: an `Optimality`.
        n_features_in_: number of features.
        feature_names_in_: their names, if `X` had names.
    """

    classes_: np.ndarray
    terms_: tuple[FittedTerm, ...]
    smoothing_: float
    optimality_: Optimality
    n_features_in_: int

    def __init__(
        self,
        dof: Any = "auto",
        scale: Scale = "quantile",
        smoothing: Any = "auto",
        tolerance: float = 1e-6,
    ):
        self.dof = dof
        self.scale = scale
        self.smoothing = smoothing
        self.tolerance = tolerance

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "LagrangeClassifier":
        """Fit.

        Args:
            X: `[n_samples, n_features]`, finite.
            y: `[n_samples]`, labels of at least two classes.
            sample_weight: `[n_samples]`, non-negative, as for `LagrangeRegressor`.

        Returns:
            itself.

        Raises:
            ValueError: for options out of range, a single class, or data that are not finite numbers.
        """
        self._check_options()
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        present, weight, _ = read_weights(weight)
        X, y = X[present], y[present]
        classes, label = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"y must hold at least two classes, got one class: {classes[0]!r}.")
        lines = self._lines(X, weight)
        if self.smoothing == "auto":
            smoothing, self.history_ = self._chosen(lines, X, label, weight, len(classes))
        else:
            smoothing, self.history_ = float(self.smoothing), ()
        theta, optimality = _solve(lines, X, label, weight, len(classes), smoothing, float(self.tolerance))
        self.classes_, self.smoothing_, self.optimality_ = classes, smoothing, optimality
        self.intercept_ = theta[-1]
        terms, start = [], 0
        for line in lines:
            width = line.basis.shape[1]
            values = line.basis @ theta[start : start + width]
            start += width
            terms.append(
                FittedTerm(
                    line.features, (line.nodes,), values, np.full((1, len(classes)), smoothing),
                    np.full(len(classes), np.nan),
                )
            )  # fmt: skip
        self.terms_ = tuple(terms)
        self.nodes_ = [term.nodes[0] for term in terms]
        self.coef_ = [term.values for term in terms]
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits `[n_samples, n_classes]`; for two classes their difference `[n_samples]`."""
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities `[n_samples, n_classes]`."""
        result: np.ndarray = special.softmax(self._logits(X), axis=1)
        return result

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Their logarithms."""
        result: np.ndarray = special.log_softmax(self._logits(X), axis=1)
        return result

    def predict(self, X: Any) -> np.ndarray:
        """Labels `[n_samples]`."""
        best = self._logits(X).argmax(axis=1)
        return self.classes_[best]

    def _logits(self, X: Any) -> Array:
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        result = np.repeat(self.intercept_[None], len(X), axis=0)
        for term in self.terms_:
            result += term.evaluate(X)
        return result

    def _check_options(self) -> None:
        whole = isinstance(self.dof, (int, np.integer)) and not isinstance(self.dof, bool) and self.dof >= 2
        if self.dof != "auto" and not whole:
            raise ValueError(f"dof must be 'auto' or an integer of at least 2, got {self.dof!r}.")
        if self.scale not in ("quantile", "minmax"):
            raise ValueError(f"scale must be 'quantile' or 'minmax', got {self.scale!r}.")
        for name in ("smoothing", "tolerance"):
            value = getattr(self, name)
            if name == "smoothing" and isinstance(value, str) and value == "auto":
                continue
            if not isinstance(value, (int, float, np.number)) or isinstance(value, bool) or not 0 < value < np.inf:
                raise ValueError(f"{name} must be a positive number, got {value!r}.")

    def _lines(self, X: Array, weight: Array) -> list[Line]:
        dof = int(np.clip(min(_SHARED // X.shape[1], 2 * weight.sum() ** (1 / 3)), _LEAST, _MOST))
        dof = dof if self.dof == "auto" else int(self.dof)
        lines = []
        for j, column in enumerate(X.T):
            order = np.argsort(column, kind="stable")
            nodes = place_nodes(column[order], weight[order], dof, self.scale)
            if len(nodes) > 1:
                lines.append(Line.over(j, column, weight, nodes))
        return lines

    def _chosen(
        self, lines: list[Line], X: Array, label: np.ndarray, weight: Array, n_classes: int
    ) -> tuple[float, tuple[dict[str, float], ...]]:
        """The penalty of smallest cross-entropy on held-out samples of every class that has enough.

        Every fifth of the distinct samples of a class, in the order of their features: whatever their order in the
        data, and a sample of weight two is treated like two samples.
        """
        out = np.zeros(len(X), dtype=bool)
        for c in range(n_classes):
            members = np.flatnonzero(label == c)
            _, group = np.unique(X[members], axis=0, return_inverse=True)
            out[members] = group.ravel() % _HELD_OUT == _HELD_OUT // 2
        if not out.any():
            return float(_PENALTIES[len(_PENALTIES) // 2]), ()
        history: list[dict[str, float]] = []

        def held_out(penalty: float, start: Array | None) -> Array:
            theta, _ = _solve(lines, X[~out], label[~out], weight[~out], n_classes, penalty, _PATH_TOLERANCE, start)
            logits = np.concatenate([block @ theta for block in _blocks(lines, X[out])])
            picked = special.log_softmax(logits, axis=1)[np.arange(len(logits)), label[out]]
            history.append({"smoothing": penalty, "cross_entropy": float(-(weight[out] @ picked) / weight[out].sum())})
            return theta

        paths: dict[float, Array] = {}
        theta = None
        for penalty in map(float, _PENALTIES):
            theta = paths[penalty] = held_out(penalty, theta)
            # Past the minimum, weaker penalties only follow the noise.
            if len(history) > 1 and history[-1]["cross_entropy"] > history[-2]["cross_entropy"]:
                break
        best = min(history, key=lambda h: h["cross_entropy"])["smoothing"]
        for penalty in (best * 10**0.5, best / 10**0.5):
            held_out(penalty, paths[best])
        return min(history, key=lambda h: h["cross_entropy"])["smoothing"], tuple(history)


def _blocks(lines: list[Line], X: Array) -> Iterator[Array]:
    """The coefficients' design, and a one last, some rows at a time."""
    if not lines:
        yield np.ones((len(X), 1))
        return
    for _, design in chunks(lines, X):
        for start in range(0, design.shape[0], _ROWS):
            part = design[start : start + _ROWS]
            columns, first = [], 0
            for line in lines:
                columns.append(part[:, first : first + len(line.nodes)] @ line.basis)
                first += len(line.nodes)
            yield np.concatenate((*columns, np.ones((part.shape[0], 1))), axis=1)


def _solve(
    lines: list[Line],
    X: Array,
    label: np.ndarray,
    weight: Array,
    n_classes: int,
    smoothing: float,
    tolerance: float,
    start: Array | None = None,
) -> tuple[Array, Optimality]:
    """Coefficients `[p + 1, n_classes]`, the intercept last."""

    width = sum(line.basis.shape[1] for line in lines) + 1
    kept = list(_blocks(lines, X)) if len(X) * width <= _KEPT else None

    def samples() -> Iterator[Chunk]:
        row = 0
        for block in kept or _blocks(lines, X):
            part = slice(row, row + len(block))
            row = part.stop
            yield Chunk(torch.from_numpy(block), torch.from_numpy(label[part]), weight=torch.from_numpy(weight[part]))

    first = np.zeros((width, n_classes)) if start is None else start
    with warnings.catch_warnings():
        # The gap is reported with the fit; a looser one than asked for is no fault of the data.
        warnings.simplefilter("ignore", RuntimeWarning)
        found = solve_cross_entropy(
            samples, torch.from_numpy(np.ascontiguousarray(first)), ridge=smoothing, tolerance=tolerance, max_passes=500
        )
    about = "mean cross-entropy plus half of the penalty, over all coefficients"
    return found.coefficients.numpy(), Optimality.of(found.objective, found.gap, about)
