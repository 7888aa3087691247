"""Grades: regressors fitted one after the other, each on what the ones before it leave over.

Source: Zhang, Shen & Xu, "Multi-grade deep learning", arXiv 2601.16884. With a fixed first grade f the second is the
shortcut of Li, Cheng & Gu (2025, section 2.6): f(x) + LReg(x), LReg fitted to y - f(x).
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from sklearn.base import BaseEstimator, MetaEstimatorMixin, RegressorMixin, clone
from sklearn.frozen import FrozenEstimator
from sklearn.utils import Tags, get_tags
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, has_fit_parameter, validate_data
from torch import nn

from .base import keeps_attributes
from .estimator import LagrangeRegressor
from .mesh1d import Array

Form = Literal["composed", "additive"]

_ROWS = 1 << 14  # given to a network at once


class MultigradeRegressor(MetaEstimatorMixin, RegressorMixin, BaseEstimator):
    """A sum of regressors, each fitted to the residual of the sum of the ones before it.

    Args:
        estimators: the grades, regressors of scikit-learn's kind; None takes two `LagrangeRegressor()`. A fitted
            regressor inside `sklearn.frozen.FrozenEstimator`, or a `torch.nn.Module` from `[n, n_features]` to
            `[n, n_outputs]`, takes part as it is: `[FrozenEstimator(model), LagrangeRegressor()]` is a shortcut around
            a model.
        form: "composed": every grade after the first reads the features and the prediction of the grades before it,
            so that grades nest. "additive": the features alone. With the default grades the additive form gains
            nothing, since there a penalty that follows from the data leaves only noise over.

    Attributes:
        estimators_: the fitted grades, a list; networks and frozen regressors are the given ones.
        losses_: `[n_grades]`, mean squared residual over the training samples (and outputs) after each grade.
        n_features_in_: number of features.
        feature_names_in_: their names, if `X` had names.
    """

    estimators_: list[Any]
    losses_: Array
    n_features_in_: int
    _n_outputs: int | None

    def __init__(self, estimators: Sequence[Any] | None = None, form: Form = "composed"):
        self.estimators = estimators
        self.form = form

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "MultigradeRegressor":
        """Fit.

        Args:
            X: `[n_samples, n_features]`, as the grades take it.
            y: `[n_samples]` or `[n_samples, n_outputs]`, finite.
            sample_weight: `[n_samples]`, for grades that take weights.

        Returns:
            itself.

        Raises:
            ValueError: for an unknown form, no grades, weights that a grade does not take, a prediction whose shape is
                not that of `y` or that is not finite; and whatever a grade refuses.
            TypeError: for a grade that is no regressor.
        """
        grades = self._grades()
        # What a column may hold is up to the grades.
        with keeps_attributes(self):
            table, y = validate_data(self, X, y, dtype=None, ensure_all_finite=False, multi_output=True, y_numeric=True)
            y = np.asarray(y, dtype=np.float64)
            weight = None if sample_weight is None else _check_sample_weight(sample_weight, table, dtype=np.float64)
            self._check_weights(grades, weight)
        total = np.zeros_like(y)
        fitted, losses = [], []
        for number, grade in enumerate(grades):
            features = self._features(number, X, table, total)
            if not _is_fixed(grade):
                grade = clone(grade)
                grade.fit(features, y - total, **({} if weight is None else {"sample_weight": weight}))
            total = total + _prediction(grade, number, features, y.shape)
            fitted.append(grade)
            losses.append(np.average((y - total).reshape(len(y), -1) ** 2, axis=0, weights=weight).mean())
        self.estimators_, self.losses_ = fitted, np.array(losses)
        self._n_outputs = y.shape[1] if y.ndim == 2 else None
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Predict.

        Args:
            X: `[n_samples, n_features]`.
            return_std: also return the standard deviation of an observation, as the last grade tells it. Only if the
                grades before it are fixed, frozen or networks: those fitted to the same samples have an uncertainty of
                their own, of which the last one knows nothing.

        Returns:
            `[n_samples]` or `[n_samples, n_outputs]`, as `y` had it; with `return_std` a pair of those.

        Raises:
            ValueError: for `return_std` where it cannot be told.
        """
        if not return_std:
            *_, total = self.staged_predict(X)
            return total
        check_is_fitted(self)
        last = self.estimators_[-1]
        if _is_fixed(last) or not all(map(_is_fixed, self.estimators_[:-1])):
            raise ValueError(
                "return_std needs fixed grades (a FrozenEstimator or a torch.nn.Module) before a fitted one, got "
                f"{[type(grade).__name__ for grade in self.estimators_]}."
            )
        table, shape = self._read(X)
        total = np.zeros(shape)
        for number, grade in enumerate(self.estimators_[:-1]):
            total = total + _prediction(grade, number, self._features(number, X, table, total), shape)
        mean, std = last.predict(self._features(len(self.estimators_) - 1, X, table, total), return_std=True)
        return total + np.reshape(mean, shape), np.reshape(std, shape)

    def staged_predict(self, X: Any) -> Iterator[Array]:
        """The prediction after every grade, the last of them that of `predict`.

        Args:
            X: `[n_samples, n_features]`.

        Yields:
            `[n_samples]` or `[n_samples, n_outputs]`, as `y` had it.
        """
        check_is_fitted(self)
        table, shape = self._read(X)
        total = np.zeros(shape)
        for number, grade in enumerate(self.estimators_):
            total = total + _prediction(grade, number, self._features(number, X, table, total), shape)
            yield total

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        grades = [grade for grade in self.estimators or [LagrangeRegressor()] if isinstance(grade, BaseEstimator)]
        tags.target_tags.multi_output = all(get_tags(grade).target_tags.multi_output for grade in grades)
        return tags

    def _grades(self) -> list[Any]:
        if self.form not in get_args(Form):
            raise ValueError(f"form must be one of {get_args(Form)}, got {self.form!r}.")
        grades = [LagrangeRegressor(), LagrangeRegressor()] if self.estimators is None else list(self.estimators)
        if not grades:
            raise ValueError("estimators must hold at least one grade, got none.")
        for grade in grades:
            usable = isinstance(grade, nn.Module) or (hasattr(grade, "fit") and hasattr(grade, "predict"))
            if not usable or isinstance(grade, type):
                raise TypeError(
                    "estimators must be regressors with fit and predict, or torch.nn.Module, got "
                    f"{grade.__name__ if isinstance(grade, type) else type(grade).__name__}"
                    f"{', a class: make an instance of it' if isinstance(grade, type) else ''}."
                )
        return grades

    @staticmethod
    def _check_weights(grades: list[Any], weight: Array | None) -> None:
        deaf = [type(g).__name__ for g in grades if not _is_fixed(g) and not has_fit_parameter(g, "sample_weight")]
        if weight is not None and deaf:
            raise ValueError(f"sample_weight needs grades whose fit takes it, and {', '.join(deaf)} does not.")

    def _read(self, X: Any) -> tuple[Any, tuple[int, ...]]:
        """The features as an array, and the shape of a prediction."""
        table = validate_data(self, X, dtype=None, ensure_all_finite=False, reset=False)
        return table, (len(table),) if self._n_outputs is None else (len(table), self._n_outputs)

    def _features(self, number: int, X: Any, table: Any, total: Array) -> Any:
        """What a grade reads: `X` as it came, which may have names, or with the prediction so far behind it."""
        if number == 0 or self.form == "additive":
            return X
        dates = table.dtype.kind in "mM"
        return np.concatenate((table.astype(np.float64) if dates else table, total.reshape(len(total), -1)), axis=1)


def _is_fixed(grade: Any) -> bool:
    return isinstance(grade, (FrozenEstimator, nn.Module))


def _prediction(grade: Any, number: int, features: Any, shape: tuple[int, ...]) -> Array:
    found = _run(grade, features) if isinstance(grade, nn.Module) else grade.predict(features)
    result = np.asarray(found, dtype=np.float64)
    # One output with an axis of its own or without is the same.
    if result.shape != shape and (result.size != np.prod(shape) or result.shape[:1] != shape[:1]):
        raise ValueError(
            f"grade {number} ({type(grade).__name__}) must predict {shape} values, as y has them, got {result.shape}."
        )
    if not np.isfinite(result).all():
        raise ValueError(f"grade {number} ({type(grade).__name__}) predicts NaN or infinite values.")
    return result.reshape(shape)


@torch.no_grad()
def _run(network: nn.Module, features: Any) -> Array:
    """A network in eval mode, some rows at a time, in the dtype and on the device of its parameters."""
    own = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    rows = torch.from_numpy(np.array(features, dtype=np.float64)).split(_ROWS)
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        parts = [network(part.to(own)).cpu().double() for part in rows]
    finally:
        for module, training in modes:
            module.training = training
    result: Array = torch.cat(parts).numpy()
    return result
