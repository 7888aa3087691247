"""SciPy's methods for scattered data as scikit-learn estimators."""

from typing import Any

import numpy as np
from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator, RBFInterpolator
from sklearn.base import BaseEstimator, RegressorMixin

_HELD_OUT = 500


class LinearInterpolation(RegressorMixin, BaseEstimator):
    """Piecewise linear through all samples, noise included; outside their hull the nearest sample."""

    def fit(self, X: Any, y: Any) -> "LinearInterpolation":
        self.inside_ = LinearNDInterpolator(X, y, rescale=True)
        self.outside_ = NearestNDInterpolator(X, y, rescale=True)
        return self

    def predict(self, X: Any) -> Any:
        values = self.inside_(X)
        missing = np.isnan(values).reshape(len(X), -1).any(axis=1)
        values[missing] = self.outside_(X[missing])
        return values


class RadialBasisFunctions(RegressorMixin, BaseEstimator):
    """Thin plates on the nearest samples, inputs standardised, smoothing chosen on held-out samples."""

    def __init__(self, neighbours: int = 40, smoothings: tuple[float, ...] = (0.0, 1e-3, 1e-1, 10.0)):
        self.neighbours = neighbours
        self.smoothings = smoothings

    def fit(self, X: Any, y: Any) -> "RadialBasisFunctions":
        self.mean_, self.scale_ = X.mean(axis=0), X.std(axis=0)
        X = (X - self.mean_) / self.scale_
        order = np.random.default_rng(0).permutation(len(X))
        n_held = min(_HELD_OUT, len(X) // 5)
        held, rest = order[:n_held], order[n_held:]
        errors = [
            ((self._plates(X[rest], y[rest], smoothing)(X[held]) - y[held]) ** 2).mean()
            for smoothing in self.smoothings
        ]
        self.smoothing_ = self.smoothings[int(np.argmin(errors))]
        self.model_ = self._plates(X, y, self.smoothing_)
        return self

    def predict(self, X: Any) -> Any:
        return self.model_((X - self.mean_) / self.scale_)

    def _plates(self, X: Any, y: Any, smoothing: float) -> RBFInterpolator:
        return RBFInterpolator(X, y, neighbors=self.neighbours, smoothing=smoothing)
