"""The scikit-learn estimator."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import nn

from .base import SumOfTerms, check_units, is_number, keeps_attributes
from .free import fit_free
from .mesh1d import Array, Scale
from .relu import network_to_mesh, sum_network
from .report import Optimality, SumModel
from .samples import Samples, collect
from .simplicial import SimplicialFit, fit_simplicial
from .squares import Squares
from .terms import FittedTerm

Basis = Literal["auto", "additive", "simplicial"]
Nodes = Literal["smooth", "free"]

# Up to so many features "auto" considers simplices.
_MAX_SIMPLICIAL = 3
_MIN_SIMPLICIAL_SAMPLES = 50
_LEAST_MESH = 16  # nodes


class LagrangeRegressor(SumOfTerms, RegressorMixin, BaseEstimator):
    """Regression by continuous piecewise-linear functions (Li, Cheng & Gu 2025, sections 2.1-2.5).

    By default the model has many more nodes than it needs and a penalty on the jumps of the slope, whose strength
    follows from the data; on given nodes the coefficients are at the global optimum, and `optimality_` says how near.
    One feature: one function. Several: a sum of functions of single features and of pairs that act together, or, in two
    and three dimensions, a function on a mesh of simplices.

    Args:
        basis: "additive" is that sum; "simplicial" the mesh. "auto" takes the sum, and for two or three features the
            mesh instead if the sum leaves interactions in the residual and cross-validation prefers the mesh.
        n_nodes: nodes per feature, or on simplices of the whole mesh; "auto" refines where the fit uses its nodes.
        interactions: pairs of features that act together: "auto" tests all, an integer takes so many (0: none), a list
            of pairs of column numbers those. Only for "additive" with `nodes="smooth"`.
        max_nodes: most nodes of the model.
        scale: "quantile" places nodes where samples are, "minmax" at equal steps.
        nodes: "smooth" as above; "free" moves `n_nodes` nodes per feature to where they serve best.
        smoothing: "reml", or the penalty itself per sample.
        random_state: for subsamples of large data.

    Attributes:
        terms_: the fitted terms, a tuple of `FittedTerm`; empty on simplices.
        nodes_: their meshes, a list with `[k]` per function of one feature and a pair of those per interaction; on
            simplices `[n_nodes, d]`.
        simplices_: `[n_simplices, d + 1]` indices of nodes; None for sums.
        values_: the values at the nodes: a list with `[k]` or `[k, n_outputs]` per term, `[k1, k2]` or
            `[k1, k2, n_outputs]` per interaction; on simplices `[n_nodes]` or `[n_nodes, n_outputs]`.
        intercept_: float or `[n_outputs]`. Terms have mean zero over the samples.
        feature_importances_: `[n_features]`, shares of the variance of all terms; those of an interaction go to both
            features by halves. Not on simplices.
        smoothing_: the penalties: a list with `[penalties, n_outputs]` per term; on simplices one number.
        edf_: effective degrees of freedom; float or `[n_outputs]`.
        noise_variance_: float or `[n_outputs]`.
        history_: a tuple with one entry per model tried.
        optimality_: an `Optimality`: objective, lower bound, gap.
        basis_: "additive" or "simplicial".
        n_features_in_: number of features.
        feature_names_in_: their names, if `X` had names.

    Whole-number sample weights are repetitions, exactly; other weights are precisions relative to each other.
    Repetitions are further observations where equal features come with differing targets; where they never do, as in a
    bootstrap, they count as weights and say nothing about the noise. Outside the range of the samples, functions of one
    feature and those on simplices go on linearly; interactions stay at the value on their border.
    """

    _single: bool
    simplices_: Any
    edf_: Any
    noise_variance_: Any
    basis_: str

    def __init__(
        self,
        basis: Basis = "auto",
        n_nodes: int | Literal["auto"] = "auto",
        interactions: int | Sequence[tuple[int, int]] | Literal["auto"] = "auto",
        max_nodes: int = 4000,
        scale: Scale = "quantile",
        nodes: Nodes = "smooth",
        smoothing: float | Literal["reml"] = "reml",
        random_state: Any = None,
    ):
        self.basis = basis
        self.n_nodes = n_nodes
        self.interactions = interactions
        self.max_nodes = max_nodes
        self.scale = scale
        self.nodes = nodes
        self.smoothing = smoothing
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "LagrangeRegressor":
        """Fit.

        Args:
            X: `[n_samples, n_features]`, finite.
            y: `[n_samples]` or `[n_samples, n_outputs]`, finite.
            sample_weight: `[n_samples]`, non-negative; see the class.

        Returns:
            itself.

        Raises:
            ValueError: for options that do not fit each other or the data, and data that are not finite numbers.
        """
        # Only whole models are kept: a fit that fails leaves an earlier one as it was.
        with keeps_attributes(self):
            X, y = validate_data(
                self, X, y, dtype=np.float64, multi_output=True, y_numeric=True, order="C", force_writeable=False
            )
            y = np.asarray(y, dtype=np.float64)
            weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
            basis = self._check_options(X.shape[1])
            outputs = y.reshape(len(y), -1)
            check_units(X=X, y=outputs)
            samples = collect(X, outputs, weight)
            if basis == "simplicial":
                model: SumModel | SimplicialFit = self._fit_simplicial(samples)
            elif basis == "additive":
                model = self._fit_sum(samples)
            else:
                model = self._better(self._fit_sum(samples), samples)
        self._single = y.ndim == 1
        self._keep(model)
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Predict.

        Args:
            X: `[n_samples, n_features]`.
            return_std: also return the standard deviation of an observation there: noise and uncertainty of the
                function, from the posterior (with nodes and penalties taken as given), so that 95 % of observations lie
                within 1.96 of it. For few samples it is wider than the noise itself, as Student's quantiles are.

        Returns:
            `[n_samples]` or `[n_samples, n_outputs]`, as `y` had it; with `return_std` a pair of those.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        mean = self._as_given(self._model.mean(X))
        if not return_std:
            return mean
        variance = self._model.posterior_variance(X) + self._model.noise_variance
        return mean, self._as_given(np.sqrt(variance) * self._model.widening)

    def to_torch(self) -> nn.Sequential:
        """The fitted function as a network of Linear and ReLU, exact up to rounding, fp64: `[n, d] -> [n, n_outputs]`.

        Returns:
            A new network, with two hidden layers.

        Raises:
            ValueError: for interactions and simplices, which are no finite sums of functions of single features.
        """
        check_is_fitted(self)
        mesh = self.simplices_ is not None
        if mesh or any(len(term.features) > 1 for term in self.terms_):
            raise ValueError(
                "to_torch needs a sum of functions of single features, got "
                + ("a mesh of simplices" if mesh else "interactions, which are bilinear")
                + "; fit with basis='additive', interactions=0."
            )
        empty = torch.empty(0, dtype=torch.float64)
        meshes, values = [empty] * self.n_features_in_, [empty] * self.n_features_in_
        for term in self.terms_:
            meshes[term.features[0]] = torch.from_numpy(np.array(term.nodes[0]))
            values[term.features[0]] = torch.from_numpy(np.array(term.values))
        return sum_network(meshes, values, torch.from_numpy(np.array(self._model.intercept)))

    @classmethod
    def from_torch(cls, net: nn.Module) -> "LagrangeRegressor":
        """A fitted regressor that is the function of a ReLU network of one input, exact up to rounding.

        Args:
            net: see `network_to_mesh`.

        Returns:
            One with a node at every kink; its noise variance is zero.
        """
        nodes, values = (tensor.numpy() for tensor in network_to_mesh(net))
        outputs = values.shape[1]
        zero = np.zeros(outputs)
        term = FittedTerm(
            (0,), (nodes,), values, zero[None], np.full(outputs, float(len(nodes))), values.var(axis=0), 0 * values
        )
        nothing = Optimality.of(0.0, 0.0, "nothing was minimised")
        model = SumModel((term,), zero, term.edf, zero, (), nothing, _no_variance)
        result = cls(basis="additive", n_nodes=len(nodes))
        result.n_features_in_ = 1
        result._single = outputs == 1
        result._keep(model)
        return result

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _check_options(self, d: int) -> str:
        """The basis asked for. Raises a `ValueError` for options out of range or in conflict."""
        for name, kind in (("basis", Basis), ("nodes", Nodes)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {get_args(kind)}, got {getattr(self, name)!r}.")
        self._check_sizes(d)
        if self.smoothing != "reml" and not is_number(self.smoothing):
            raise ValueError(f"smoothing must be 'reml' or a number of at least 0, got {self.smoothing!r}.")
        pairs = self._plain_interactions()
        special = self.nodes != "smooth"
        if self.basis == "simplicial" and self.n_nodes != "auto" and int(self.n_nodes) < _LEAST_MESH:
            raise ValueError(f"n_nodes must be at least {_LEAST_MESH} for basis='simplicial', got {self.n_nodes!r}.")
        if self.basis == "simplicial" and special:
            raise ValueError(f"basis='simplicial' needs nodes='smooth', got nodes={self.nodes!r}.")
        if special and self.n_nodes == "auto":
            raise ValueError("nodes='free' needs a number of nodes per feature, got n_nodes='auto'.")
        if special and not isinstance(pairs, str) and pairs:
            raise ValueError(f"interactions need nodes='smooth', got nodes={self.nodes!r}.")
        if self.basis == "simplicial" and not isinstance(pairs, str) and pairs:
            raise ValueError("a mesh of simplices has no interactions to choose; leave interactions='auto'.")
        simplicial = self.basis == "simplicial" or (self.basis == "auto" and 1 < d <= _MAX_SIMPLICIAL)
        if self.basis == "auto" and (special or not simplicial or pairs != "auto"):
            return "additive"
        return self.basis

    def _fit_sum(self, samples: Samples) -> SumModel:
        if self.nodes == "free":
            return fit_free(samples, int(self.n_nodes), self.max_nodes)
        fit, history = self._fit_terms(samples, lambda part: Squares(part, self.smoothing))
        return fit.model(Squares.about, history)

    def _fit_simplicial(self, samples: Samples) -> SimplicialFit:
        most = self.max_nodes if self.n_nodes == "auto" else min(int(self.n_nodes), self.max_nodes)
        seed = 0 if self.random_state is None else check_random_state(self.random_state).randint(2**31)
        return fit_simplicial(samples, scale=self.scale, smoothing=self.smoothing, max_nodes=most, seed=seed)

    def _better(self, model: SumModel, samples: Samples) -> SumModel | SimplicialFit:
        """The sum, or a mesh of simplices if the sum found interactions and generalised cross-validation prefers it."""
        y, weight = samples.y, samples.weight
        most = self.max_nodes if self.n_nodes == "auto" else min(int(self.n_nodes), self.max_nodes)
        spread = weight @ (y - weight @ y / weight.sum()) ** 2
        active = spread > 0
        paired = any(len(term.features) > 1 for term in model.terms)
        if not paired or len(y) < _MIN_SIMPLICIAL_SAMPLES or most < _LEAST_MESH or not active.any():
            return model

        def score(fit: SumModel | SimplicialFit) -> float:
            free = np.maximum(1 - fit.edf / samples.total, 1e-3)
            return float(((weight @ (y - fit.mean(samples.X)) ** 2 / free**2)[active] / spread[active]).mean())

        mesh = self._fit_simplicial(samples)
        return mesh if score(mesh) < score(model) else model

    def _keep(self, model: SumModel | SimplicialFit) -> None:
        self.basis_, self.simplices_ = "additive", None
        if isinstance(model, SimplicialFit):
            self.basis_, self.simplices_, self.terms_ = "simplicial", model.simplices, ()
            self._model, self.history_, self.optimality_ = model, model.history, model.optimality
            self.nodes_, self.values_, self.smoothing_ = model.nodes, self._as_given(model.values), model.smoothing
            self.intercept_ = self._as_given(model.intercept)
        else:
            super()._keep(model)
            self.values_ = [self._as_given(values) for values in self.values_]
            self.intercept_ = self._as_given(self.intercept_)
        self.edf_, self.noise_variance_ = self._as_given(model.edf), self._as_given(model.noise_variance)

    def _as_given(self, values: Array) -> Any:
        """Without the axis of outputs, the last one, if `y` had none."""
        if not self._single:
            return values
        return values[..., 0] if values.ndim > 1 else float(values[0])


def _no_variance(X: Array) -> Array:
    return np.zeros((len(X), 1))
