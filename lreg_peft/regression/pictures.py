"""Pictures of a fitted regressor."""

from typing import TYPE_CHECKING, Any

import numpy as np

from .mesh1d import Array
from .terms import FittedTerm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOUR, _SAMPLES = "#0b5394", "#e08214"
_COLUMNS = 4
_POINTS = 5000  # samples drawn


def draw(model: Any, X: Array | None, y: Array | None, max_terms: int) -> "Figure":
    """The terms of a fitted `LagrangeRegressor`, most variable first; see its `plot`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot draws with matplotlib. Install it: pip install matplotlib.") from error
    if X is not None and len(X) > _POINTS:
        step = -(-len(X) // _POINTS)
        X, y = X[::step], None if y is None else y[::step]
    if model.simplices_ is not None:
        return _draw_mesh(Figure(figsize=(5, 4), layout="constrained"), model, X)
    terms = sorted(model.terms_, key=lambda term: -float(term.values.std()))[:max_terms]
    if not terms:
        return Figure(figsize=(4, 3), layout="constrained")
    rows = -(-len(terms) // _COLUMNS)
    columns = min(len(terms), _COLUMNS)
    figure = Figure(figsize=(3.6 * columns, 2.8 * rows), layout="constrained")
    names = getattr(model, "feature_names_in_", [f"x{j}" for j in range(model.n_features_in_)])
    rest = None
    if X is not None and y is not None:
        mean = model.predict(X)
        rest = y - (mean[:, None] if mean.ndim == 1 else mean)
    for k, term in enumerate(terms):
        axes = figure.add_subplot(rows, columns, k + 1)
        if len(term.features) == 1:
            _draw_line(axes, term, X, rest)
            axes.set_xlabel(str(names[term.features[0]]))
        else:
            image = axes.pcolormesh(*term.nodes, term.values[:, :, 0].T, shading="gouraud", cmap="RdBu_r")
            figure.colorbar(image, ax=axes)
            axes.set_xlabel(str(names[term.features[0]]))
            axes.set_ylabel(str(names[term.features[1]]))
    return figure


def _draw_line(axes: Any, term: FittedTerm, X: Array | None, rest: Array | None) -> None:
    nodes, values = term.nodes[0], term.values
    if X is not None:
        x = X[:, term.features[0]]
        if rest is None:
            axes.plot(x, np.full(len(x), values.min()), "|", color=_SAMPLES, alpha=0.3)
        else:
            axes.plot(x, (term.evaluate(X) + rest)[:, 0], ".", color=_SAMPLES, markersize=2, alpha=0.4)
    for o in range(values.shape[1]):
        axes.plot(nodes, values[:, o], color=_COLOUR, alpha=1 / (1 + o) ** 0.5)
    if len(nodes) <= 64:
        axes.plot(nodes, values[:, 0], "o", color=_COLOUR, markersize=3)


def _draw_mesh(figure: "Figure", model: Any, X: Array | None) -> "Figure":
    nodes = np.asarray(model.nodes_)
    if nodes.shape[1] != 2:
        raise ValueError(f"plot draws meshes of simplices in two dimensions only, got {nodes.shape[1]}.")
    axes: Any = figure.add_subplot()
    triangles = np.asarray(model.simplices_)
    values = np.asarray(model.values_).reshape(len(nodes), -1)[:, 0]
    image: Any = axes.tripcolor(nodes[:, 0], nodes[:, 1], triangles, values, shading="gouraud", cmap="viridis")
    axes.triplot(nodes[:, 0], nodes[:, 1], triangles, color="white", linewidth=0.3)
    if X is not None:
        axes.plot(X[:, 0], X[:, 1], ".", color=_SAMPLES, markersize=1, alpha=0.3)
    figure.colorbar(image, ax=axes)
    return figure
