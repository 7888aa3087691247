"""What the estimators of sums have in common: checks of their options, and how their terms are shown."""

import numbers
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from .mesh1d import Array, Scale
from .report import Optimality, SumModel
from .samples import Samples
from .search import Loss, fit_sum
from .sums import SumFit
from .terms import FittedTerm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS, _SAMPLES = ("#0b5394", "#b45f06", "#38761d", "#741b47", "#999999"), "#e08214"
_COLUMNS = 4
_POINTS = 5000  # samples drawn


def is_integer(value: Any, least: int) -> bool:
    """Whether it is a whole number, and not less than `least`."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= least)


def is_number(value: Any) -> bool:
    """Whether it is a finite number, not negative."""
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and bool(0 <= value < np.inf)


def check_nodes(scale: Any, **numbers: Any) -> None:
    """Raises a `ValueError` unless there are numbers of nodes and a known way to place them."""
    for name, value in numbers.items():
        if not is_integer(value, 2):
            raise ValueError(f"{name} must be an integer of at least 2, got {value!r}.")
    if scale not in get_args(Scale):
        raise ValueError(f"scale must be one of {get_args(Scale)}, got {scale!r}.")


def check_units(**arrays: Array) -> None:
    """Raises a `ValueError` for columns whose squares are no numbers."""
    for name, values in arrays.items():
        largest = np.abs(values).max(axis=0)
        wild = largest[(largest > 0) & ~((largest > 1e-150) & (largest < 1e150))]
        if len(wild):
            raise ValueError(
                f"every column of {name} must be between 1e-150 and 1e150, so that its variance is a number, got "
                f"values up to {wild[0]:.3g}; take other units."
            )


@contextmanager
def keeps_attributes(estimator: Any) -> Iterator[None]:
    """What an estimator knows of its features stays as it was if an error is raised inside."""
    before = {name: value for name, value in vars(estimator).items() if name.endswith("_in_")}
    try:
        yield
    except BaseException:
        for name in ("n_features_in_", "feature_names_in_"):
            vars(estimator).pop(name, None)
        vars(estimator).update(before)
        raise


class SumOfTerms:
    """Options `n_nodes`, `max_nodes`, `scale`, `interactions`; attributes `terms_` and what is told of them."""

    n_nodes: Any
    max_nodes: int
    scale: Scale
    interactions: Any
    random_state: Any
    _model: Any
    terms_: tuple[FittedTerm, ...]
    nodes_: Any
    values_: Any
    intercept_: Any
    smoothing_: Any
    history_: tuple[dict[str, float], ...]
    optimality_: Optimality
    n_features_in_: int

    def _fit_terms(
        self, samples: Samples, loss_over: Callable[[Samples], Loss]
    ) -> tuple[SumFit, tuple[dict[str, float], ...]]:
        return fit_sum(
            samples, loss_over,
            n_nodes=None if self.n_nodes == "auto" else int(self.n_nodes),
            interactions=self._plain_interactions(), max_nodes=self.max_nodes, scale=self.scale,
            random=np.random.default_rng(check_random_state(self.random_state).randint(2**31)),
        )  # fmt: skip

    def _keep(self, model: SumModel) -> None:
        self._model = model
        self.terms_, self.intercept_ = model.terms, model.intercept
        self.nodes_ = [term.nodes[0] if len(term.nodes) == 1 else term.nodes for term in model.terms]
        self.values_ = [term.values for term in model.terms]
        self.smoothing_ = [term.smoothing for term in model.terms]
        self.history_, self.optimality_ = model.history, model.optimality

    @property
    def feature_importances_(self) -> Array:
        """Shares of the variance of all terms, `[n_features]`; interactions count by halves for both of theirs."""
        check_is_fitted(self)
        if getattr(self, "simplices_", None) is not None:
            raise AttributeError(
                "a mesh of simplices has no importances of single features; take permutation_importance."
            )
        result = np.zeros(self.n_features_in_)
        for term in self.terms_:
            result[list(term.features)] += term.variance.sum() / len(term.features)
        return result / max(result.sum(), np.finfo(float).tiny)

    def summary(self) -> str:
        """A table of the terms, most variable first: effective degrees of freedom, share of the variance, penalties."""
        check_is_fitted(self)
        total = sum((term.variance.sum() for term in self.terms_), start=0.0) or 1.0
        lines = [f"{'term':<32}{'edf':>9}{'variance':>10}  penalties"]
        for term in sorted(self.terms_, key=lambda term: -float(term.variance.sum())):
            name = " x ".join(self._name(j) for j in term.features)
            penalties = ", ".join(f"{value:.3g}" for value in term.smoothing.mean(axis=1))
            lines.append(f"{name:<32}{term.edf.mean():>9.2f}{term.variance.sum() / total:>10.2%}  {penalties}")
        lines.append(f"{'in all':<32}{np.mean(getattr(self, 'edf_', 0.0)):>9.2f}")
        return "\n".join(lines)

    def plot(self, X: Any = None, y: Any = None, *, max_terms: int = 12) -> "Figure":
        """Draw the terms: curves with bands that hold them at 95 %, pairs as images, two-dimensional meshes.

        Args:
            X: samples to show below the curves; with `y` the partial residuals of each term.
            y: targets of a regressor.
            max_terms: the terms of the largest variance are shown.

        Returns:
            A matplotlib figure.

        Raises:
            ImportError: without matplotlib.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot draws with matplotlib. Install it: pip install matplotlib.") from error
        check_is_fitted(self)
        rest = None
        if X is not None:
            every = slice(None, None, -(-len(X) // _POINTS))
            X = validate_data(self, X, dtype=np.float64, reset=False)[every]
            if y is not None:
                rest = np.asarray(y, dtype=np.float64)[every] - self.predict(X)  # type: ignore[attr-defined]
                rest = rest.reshape(len(rest), -1)[:, 0]
        terms = sorted(self.terms_, key=lambda term: -float(term.variance.sum()))[:max_terms]
        columns = max(min(len(terms), _COLUMNS), 1)
        rows = max(-(-len(terms) // columns), 1)
        figure = Figure(figsize=(3.6 * columns, 2.8 * rows), layout="constrained")
        if getattr(self, "simplices_", None) is not None:
            _draw_mesh(figure, self, X)
        for k, term in enumerate(terms):
            axes = figure.add_subplot(rows, columns, k + 1)
            axes.set_xlabel(self._name(term.features[0]))
            if len(term.features) == 1:
                _draw_line(axes, term, X, rest, getattr(self, "classes_", None))
            else:
                image = axes.pcolormesh(*term.nodes, term.values[:, :, -1].T, shading="gouraud", cmap="RdBu_r")
                figure.colorbar(image, ax=axes)
                axes.set_ylabel(self._name(term.features[1]))
        return figure

    def _name(self, feature: int) -> str:
        names = getattr(self, "feature_names_in_", None)
        return f"x{feature}" if names is None else str(names[feature])

    def _plain_interactions(self) -> Any:
        """A string, a number, or a list of tuples; whole numbers of NumPy become Python's."""
        if isinstance(self.interactions, (str, numbers.Number)):
            return int(self.interactions) if isinstance(self.interactions, np.integer) else self.interactions
        return [tuple(j.item() if isinstance(j, np.integer) else j for j in pair) for pair in self.interactions]

    def _check_sizes(self, d: int) -> None:
        """Raises a `ValueError` for options out of range."""
        if self.n_nodes != "auto":
            check_nodes(self.scale, n_nodes=self.n_nodes)
        check_nodes(self.scale, max_nodes=self.max_nodes)
        pairs = self._plain_interactions()
        if isinstance(pairs, (str, numbers.Number)):
            if pairs != "auto" and not is_integer(pairs, 0):
                raise ValueError(f"interactions must be 'auto', a number of pairs or a list of pairs, got {pairs!r}.")
        elif not all(len(p) == 2 and all(is_integer(j, 0) and j < d for j in p) and p[0] != p[1] for p in pairs):
            raise ValueError(f"interactions must be pairs of two different columns in [0, {d - 1}], got {pairs!r}.")


def _draw_line(axes: Any, term: FittedTerm, X: Array | None, rest: Array | None, classes: Any) -> None:
    nodes, shown = term.nodes[0], range(term.values.shape[1])
    if X is not None:
        x = X[:, term.features[0]]
        if rest is None:
            axes.plot(x, np.full(len(x), term.values.min()), "|", color=_SAMPLES, alpha=0.3)
        else:
            axes.plot(x, term.evaluate(X)[:, 0] + rest, ".", color=_SAMPLES, markersize=2, alpha=0.4)
    if classes is not None and len(classes) == 2:
        shown = range(1, 2)  # the other is its mirror image
    for o in shown:
        value, wide, colour = term.values[:, o], 1.96 * term.deviation[:, o], _COLOURS[o % len(_COLOURS)]
        axes.fill_between(nodes, value - wide, value + wide, color=colour, alpha=0.2, linewidth=0)
        axes.plot(nodes, value, color=colour, label=None if classes is None else str(classes[o]))
        if len(nodes) <= 64 and len(shown) == 1:
            axes.plot(nodes, value, "o", color=colour, markersize=3)
    if len(shown) > 1 and classes is not None:
        axes.legend(fontsize=7)


def _draw_mesh(figure: "Figure", model: Any, X: Array | None) -> None:
    nodes, triangles = np.asarray(model.nodes_), np.asarray(model.simplices_)
    if nodes.shape[1] != 2:
        raise ValueError(f"plot draws meshes of simplices in two dimensions only, got {nodes.shape[1]}.")
    axes: Any = figure.add_subplot()
    values = np.asarray(model.values_).reshape(len(nodes), -1)[:, 0]
    image: Any = axes.tripcolor(nodes[:, 0], nodes[:, 1], triangles, values, shading="gouraud", cmap="viridis")
    axes.triplot(nodes[:, 0], nodes[:, 1], triangles, color="white", linewidth=0.3)
    if X is not None:
        axes.plot(X[:, 0], X[:, 1], ".", color=_SAMPLES, markersize=1, alpha=0.3)
    figure.colorbar(image, ax=axes)
