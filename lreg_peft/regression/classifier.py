"""Classification by sums of piecewise-linear functions, at the global optimum of the penalised cross-entropy."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy import special
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from .base import SumOfTerms, check_units, is_number, keeps_attributes
from .entropy import Entropy
from .mesh1d import Array, Scale
from .report import SumModel
from .samples import Samples, collect


class LagrangeClassifier(SumOfTerms, ClassifierMixin, BaseEstimator):
    """Logits that are sums of continuous piecewise-linear functions of single features and of pairs.

    Minimises the cross-entropy plus half of the penalties times the squares of coefficients: slopes, bends, and
    products of them. Intercepts are not penalised. The penalties follow from the data by restricted maximum likelihood
    in Laplace's approximation, and all together from stratified cross-validation, as do the interactions. The problem
    is convex, and `optimality_` holds the proof of the optimum.

    Args:
        n_nodes: nodes per feature; "auto" takes up to 32, fewer for many features.
        interactions: pairs of features that act together: "auto" looks for them, an integer takes so many (0: none), a
            list of pairs of column numbers those.
        max_nodes: most nodes of the model.
        scale: "quantile" places nodes where samples are, "minmax" at equal steps.
        smoothing: "reml", or one penalty for all coefficients, per sample.
        random_state: for the search of interactions in large data.

    Attributes:
        classes_: `[n_classes]`.
        terms_: the fitted terms, a tuple of `FittedTerm`; their outputs are logits of the classes.
        nodes_, values_: lists with `[k]` and `[k, n_classes]` per function of one feature, pairs of nodes and
            `[k1, k2, n_classes]` per interaction.
        intercept_: `[n_classes]`.
        smoothing_: the penalties, a list with `[penalties, 1]` per term.
        edf_: effective degrees of freedom, over all logits.
        feature_importances_: `[n_features]`, shares of the variance of all terms.
        history_: nodes, interactions, edf and held-out cross-entropy of every model tried.
        optimality_: an `Optimality`.
        n_features_in_: number of features.
        feature_names_in_: their names, if `X` had names.

    Whole-number sample weights are repetitions, exactly; others are precisions relative to each other.
    """

    classes_: np.ndarray
    edf_: float

    def __init__(
        self,
        n_nodes: int | Literal["auto"] = "auto",
        interactions: int | Sequence[tuple[int, int]] | Literal["auto"] = "auto",
        max_nodes: int = 4000,
        scale: Scale = "quantile",
        smoothing: float | Literal["reml"] = "reml",
        random_state: Any = None,
    ):
        self.n_nodes = n_nodes
        self.interactions = interactions
        self.max_nodes = max_nodes
        self.scale = scale
        self.smoothing = smoothing
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "LagrangeClassifier":
        """Fit.

        Args:
            X: `[n_samples, n_features]`, finite.
            y: `[n_samples]`, labels of at least two classes.
            sample_weight: `[n_samples]`, non-negative; see the class.

        Returns:
            itself.

        Raises:
            ValueError: for options out of range, a single class, or data that are not finite numbers.
        """
        with keeps_attributes(self):
            X, y = validate_data(self, X, y, dtype=np.float64)
            self._check_options(X.shape[1])
            check_classification_targets(y)
            weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
            present = weight > 0
            classes, label = np.unique(y[present], return_inverse=True)
            if len(classes) < 2:
                raise ValueError(f"y must hold at least two classes, got one class: {classes.tolist()[0]!r}.")
            check_units(X=X)
            samples = collect(X[present], label[:, None].astype(np.float64), weight[present], classes=True)
            model = self._fit(samples, len(classes))
        self.classes_ = classes
        self._keep(model)
        self.edf_ = float(len(classes) - 2 + model.edf.sum())
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
        return self._model.mean(validate_data(self, X, dtype=np.float64, reset=False))

    def _check_options(self, d: int) -> None:
        self._check_sizes(d)
        if self.smoothing != "reml" and not (is_number(self.smoothing) and self.smoothing > 0):
            raise ValueError(f"smoothing must be 'reml' or a positive number, got {self.smoothing!r}.")

    def _fit(self, samples: Samples, n_classes: int) -> SumModel:
        fit, history = self._fit_terms(samples, lambda part: Entropy(part, n_classes, self.smoothing))
        # Two classes: half of the logit each, with opposite signs.
        signs = np.array([[-0.5, 0.5]]) if n_classes == 2 else np.eye(n_classes)
        return fit.model(Entropy.about, history, signs)
