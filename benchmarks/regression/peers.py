"""Who is compared: LReg and its peers, each as its users run it; what has to be chosen is chosen in training."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor
from sklearn.linear_model import LinearRegression, RidgeCV
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsRegressor
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import SplineTransformer, StandardScaler

from benchmarks.regression.finite_elements import FiniteElements
from benchmarks.regression.kan import KolmogorovArnoldNetwork
from benchmarks.regression.scattered import LinearInterpolation, RadialBasisFunctions
from lreg_peft.regression import LagrangeRegressor

#: Above so many samples, cross-validation of a peer's options looks at a part of them.
CHOICE_SAMPLES = 5_000


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Attributes:
        name: of the row.
        summary: options, in words.
        build: the estimator for a seed.
        package: what must be installed for it, None for scikit-learn and SciPy.
        features: least and most number of features.
        most_samples: more are left out, for time.
        several_outputs: whether it takes them.
        slow: whether it has to wait until all others are through.
    """

    name: str
    summary: str
    build: Callable[[int], Any]
    package: str | None = None
    features: tuple[int, int] = (1, 10**9)
    most_samples: int = 10**9
    several_outputs: bool = True
    slow: bool = False

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return self.package is None or find_spec(self.package) is not None

    def refuses(self, n_features: int, n_samples: int, n_outputs: int) -> str | None:
        """Why it is not run on such a set; None if it is."""
        low, high = self.features
        if not self.installed:
            return "not installed"
        if not low <= n_features <= high:
            return f"for {low} to {high} features" if high < 10**9 else f"for {low} features and more"
        if n_samples > self.most_samples:
            return f"left out above {self.most_samples:,} samples, for time"
        if n_outputs > 1 and not self.several_outputs:
            return "one output only"
        return None


class ChosenOnPart(RegressorMixin, BaseEstimator):
    """A grid search that looks at no more than CHOICE_SAMPLES samples; the winner is fitted on all of them."""

    def __init__(self, search: GridSearchCV):
        self.search = search

    def fit(self, X: Any, y: Any) -> "ChosenOnPart":
        search = clone(self.search).set_params(refit=len(X) <= CHOICE_SAMPLES)
        part = np.random.default_rng(0).permutation(len(X))[:CHOICE_SAMPLES]
        search.fit(X[part], y[part])
        best = clone(search.estimator).set_params(**search.best_params_)
        self.best_ = search.best_estimator_ if search.refit else best.fit(X, y)
        return self

    def predict(self, X: Any) -> Any:
        return self.best_.predict(X)


def _spline(seed: int) -> Any:
    model = make_pipeline(SplineTransformer(knots="quantile"), RidgeCV(np.logspace(-6, 3, 10)))
    grid = {"splinetransformer__n_knots": [4, 8, 16, 32, 64, 128]}
    return ChosenOnPart(GridSearchCV(model, grid, cv=3))


def _neighbours(seed: int) -> Any:
    model = make_pipeline(StandardScaler(), KNeighborsRegressor())
    grid = {"kneighborsregressor__n_neighbors": [2, 3, 5, 10, 20, 40, 80]}
    return ChosenOnPart(GridSearchCV(model, grid, cv=3))


def _mlp(seed: int) -> Any:
    network = MLPRegressor(hidden_layer_sizes=(64, 64), max_iter=200, early_stopping=True, random_state=seed)
    return TransformedTargetRegressor(make_pipeline(StandardScaler(), network), transformer=StandardScaler())


class Boosted(RegressorMixin, BaseEstimator):
    """Gradient boosting for any number of outputs, one model each."""

    def __init__(self, model: Any):
        self.model = model

    def fit(self, X: Any, y: Any) -> "Boosted":
        self.single_ = y.ndim == 1
        self.models_ = [clone(self.model).fit(X, column) for column in y.reshape(len(y), -1).T]
        return self

    def predict(self, X: Any) -> Any:
        columns = [model.predict(X) for model in self.models_]
        return columns[0] if self.single_ else np.column_stack(columns)


def _lightgbm(seed: int) -> Any:
    return Boosted(import_module("lightgbm").LGBMRegressor(n_jobs=1, verbose=-1, random_state=seed))


def _pygam(seed: int) -> Any:
    return AdditiveModel()


def _ebm(seed: int) -> Any:
    return import_module("interpret.glassbox").ExplainableBoostingRegressor(n_jobs=1, random_state=seed)


class AdditiveModel(RegressorMixin, BaseEstimator):
    """pyGAM's LinearGAM: a spline per feature, for two features their tensor product; penalty by its grid search."""

    def fit(self, X: Any, y: Any) -> "AdditiveModel":
        pygam = import_module("pygam")
        terms: Any = pygam.s(0)
        for feature in range(1, X.shape[1]):
            terms += pygam.s(feature)
        if X.shape[1] == 2:
            terms += pygam.te(0, 1)
        part = np.random.default_rng(0).permutation(len(X))[:CHOICE_SAMPLES]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model_ = pygam.LinearGAM(terms).gridsearch(X[part], y[part], progress=False)
            if len(part) < len(X):
                self.model_ = pygam.LinearGAM(terms, lam=self.model_.lam).fit(X, y)
        return self

    def predict(self, X: Any) -> Any:
        return self.model_.predict(X)


LREG = "LReg"
#: In the order of the tables.
METHODS: Sequence[Method] = (
    Method(LREG, "LagrangeRegressor(), all options as they are", lambda seed: LagrangeRegressor(random_state=seed)),
    Method(
        "LReg, sum", "basis='additive'",
        lambda seed: LagrangeRegressor(basis="additive", random_state=seed), features=(2, 3),
    ),
    Method(
        "LReg, simplices", "basis='simplicial'",
        lambda seed: LagrangeRegressor(basis="simplicial", random_state=seed), features=(2, 3),
    ),
    Method("LinearRegression", "ordinary least squares", lambda seed: LinearRegression()),
    Method("splines + RidgeCV", "cubic, 4 to 128 quantile knots by cross-validation", _spline),
    Method("HistGradientBoosting", "defaults", lambda seed: Boosted(HistGradientBoostingRegressor(random_state=seed))),
    Method("RandomForest", "defaults", lambda seed: RandomForestRegressor(random_state=seed), slow=True),
    Method("kNN", "2 to 80 neighbours by cross-validation, standardised", _neighbours),
    Method("MLP", "scikit-learn, 64-64, early stopping, standardised", _mlp, most_samples=20_000, slow=True),
    Method("LightGBM", "defaults", _lightgbm, package="lightgbm"),
    Method(
        "pyGAM", "defaults, a tensor term for two features, penalty by its grid search",
        _pygam, package="pygam", several_outputs=False, slow=True,
    ),
    Method(
        "EBM", "interpret, defaults", _ebm,
        package="interpret", features=(2, 10**9), most_samples=10_000, several_outputs=False, slow=True,
    ),
    Method(
        "KAN", "inkan, d-8-1 with 20 intervals, 1,500 steps of AdamW on batches of 256",
        lambda seed: KolmogorovArnoldNetwork(random_state=seed), package="inkan", slow=True,
    ),
    Method(
        "LinearND", "SciPy's piecewise-linear interpolation of all samples, the nearest one outside",
        lambda seed: LinearInterpolation(), features=(2, 3),
    ),
    Method(
        "RBF", "SciPy, thin plates on 40 neighbours, smoothing on held-out samples",
        lambda seed: RadialBasisFunctions(), features=(1, 3),
    ),
    Method(
        "scikit-fem", "P1 on a uniform mesh, Dirichlet penalty, both on held-out samples",
        lambda seed: FiniteElements(), package="skfem", features=(1, 2), slow=True,
    ),
)  # fmt: skip
