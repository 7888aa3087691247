"""Figures of the paper, redrawn from own fits; every function draws one file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, and none may be there
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import RandomForestRegressor
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.regression.benchmark_sets import Array, harmonic, sphere, synthetic
from benchmarks.regression.measure import score
from lreg_peft.regression import LagrangeRegressor

_OWN, _PEER, _TRUTH = "tab:red", "tab:blue", "0.3"


def logarithmic(panel: Any) -> None:
    """A horizontal axis of powers of ten."""
    panel.set_xscale("log")
    panel.xaxis.set_minor_formatter(NullFormatter())


def save(figure: Any, folder: Path, name: str) -> None:
    """As a PNG."""
    figure.savefig(folder / f"{name}.png", dpi=110)
    plt.close(figure)


# --- Figure 1 -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Optima:
    """Nodes of a local optimum, those after the discrete move, those of nodes="free"; and the mean squared errors."""

    x: Array
    y: Array
    local: Array
    moved: Array
    best: Array
    losses: tuple[float, float, float]


def optima() -> Optima:
    """Two teeth on the right, one on the left, and just as many nodes; gradient descent starts with too many left."""
    x = np.linspace(0, 1, 400)
    corners = np.array([0, 0.1, 0.2, 0.3, 0.6, 0.7, 0.8, 0.9, 1.0])
    y = np.interp(x, corners, [0, 0, 1, 0, 0, 1, 0, 1, 0])
    start = np.array([0, 0.06, 0.12, 0.2, 0.28, 0.34, 0.45, 0.85, 1.0])
    local = descend(x, y, start)
    moved = exchange(x, y, local)
    model = LagrangeRegressor(nodes="free", n_nodes=len(start)).fit(x[:, None], y)
    best = np.asarray(model.nodes_[0])
    return Optima(x, y, local, moved, best, (loss(x, y, local), loss(x, y, moved), loss(x, y, best)))


def values_at(x: Array, y: Array, nodes: Array) -> Array:
    """The best values at given nodes."""
    hats = np.stack([np.interp(x, nodes, row) for row in np.eye(len(nodes))], axis=1)
    return np.asarray(np.linalg.lstsq(hats, y, rcond=None)[0], dtype=np.float64)


def loss(x: Array, y: Array, nodes: Array) -> float:
    """Mean squared error of the best values at given nodes."""
    return float(np.mean((np.interp(x, nodes, values_at(x, y, nodes)) - y) ** 2))


def descend(x: Array, y: Array, nodes: Array) -> Array:
    """Nodes by gradient descent on the loss of the best values, with halved steps where it would rise."""
    nodes, step, current = nodes.copy(), 0.01, loss(x, y, nodes)
    for _ in range(400):
        values = values_at(x, y, nodes)
        element = np.clip(np.searchsorted(nodes, x) - 1, 0, len(nodes) - 2)
        slope = np.diff(values) / np.diff(nodes)
        share = (x - nodes[element]) / np.diff(nodes)[element]
        push = -2 * (np.interp(x, nodes, values) - y) * slope[element]
        gradient = np.zeros(len(nodes))
        np.add.at(gradient, element, push * (1 - share))
        np.add.at(gradient, element + 1, push * share)
        gradient[[0, -1]] = 0
        norm = np.abs(gradient).max()
        while step > 1e-7:
            candidate = nodes - step * gradient / max(norm, 1e-12)
            if (np.diff(candidate) > 1e-3).all() and (found := loss(x, y, candidate)) < current:
                nodes, current, step = candidate, found, step * 1.5
                break
            step /= 2
        else:
            break
    return nodes


def exchange(x: Array, y: Array, nodes: Array) -> Array:
    """Single nodes change places as long as that helps, each time followed by a descent."""
    current = loss(x, y, nodes)
    while True:
        candidates = []
        for leaving in range(1, len(nodes) - 1):
            rest = np.delete(nodes, leaving)
            for middle in (rest[1:] + rest[:-1]) / 2:
                candidate = np.sort(np.append(rest, middle))
                candidates.append((loss(x, y, candidate), tuple(candidate)))
        _, start = min(candidates)
        moved = descend(x, y, np.array(start))
        if (found := loss(x, y, moved)) >= current * 0.99:
            return nodes
        nodes, current = moved, found


def figure_1(folder: Path) -> None:
    """A local optimum, the global one, and the loss between them: a wall for descent, no obstacle for a move."""
    found = optima()
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    titles = ("local optimum: descent on the nodes ends here", "after discrete moves of single nodes")
    for panel, title, nodes, error in zip(axes, titles, (found.local, found.moved), found.losses, strict=False):
        panel.plot(found.x, found.y, color=_TRUTH, linewidth=4, alpha=0.3, label="target")
        values = values_at(found.x, found.y, nodes)
        panel.plot(nodes, values, "o-", color=_OWN, label="fit and its nodes")
        panel.set_title(f"{title}\nmean squared error {error:.2g}", fontsize=9)
        panel.legend(fontsize=7)
    share = np.linspace(0, 1, 101)
    between = [loss(found.x, found.y, (1 - t) * found.local + t * found.moved) for t in share]
    axes[2].plot(share, between, color=_PEER, label="all nodes at once, in a straight line")
    axes[2].plot([0, 1], [between[0], between[-1]], "o--", color=_OWN, label="discrete moves")
    axes[2].set_title(f"loss on the way (nodes='free' finds {found.losses[2]:.2g})", fontsize=9)
    axes[2].set_xlabel("from the local optimum (0) to the global one (1)")
    axes[2].legend(fontsize=7)
    save(figure, folder, "figure_1")


# --- the others -----------------------------------------------------------------------------------------------------


def network(**options: Any) -> Any:
    """The MLP of the pictures: 64-64, everything standardised."""
    model = MLPRegressor(hidden_layer_sizes=(64, 64), max_iter=500, random_state=0, **options)
    return TransformedTargetRegressor(make_pipeline(StandardScaler(), model), transformer=StandardScaler())


def figure_3(folder: Path) -> None:
    """One input and two: sin(1/x), and sin x0 + cos x1 on (0, 2 pi)^2 as the authors' code has it."""
    random = np.random.default_rng(0)
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    x = 1 / random.uniform(1, 50, 1000)
    model = LagrangeRegressor().fit(x[:, None], np.sin(1 / x))
    grid = np.geomspace(x.min(), x.max(), 2000)
    axes[0].semilogx(grid, np.sin(1 / grid), color=_TRUTH, linewidth=3, alpha=0.4, label="sin(1/x)")
    axes[0].semilogx(grid, model.predict(grid[:, None]), color=_OWN, linewidth=1, label="LReg")
    axes[0].plot(model.nodes_[0], np.full(len(model.nodes_[0]), -1.15), "|", color=_OWN, label="nodes")
    axes[0].legend(fontsize=7)
    square = random.uniform(0, 2 * np.pi, (4000, 2))
    target = np.sin(square[:, 0]) + np.cos(square[:, 1])
    mesh = LagrangeRegressor(basis="simplicial").fit(square, target)
    new = random.uniform(0, 2 * np.pi, (2000, 2))
    error = score(np.sin(new[:, 0]) + np.cos(new[:, 1]), mesh.predict(new))
    drawn = axes[1].tricontourf(square[:, 0], square[:, 1], mesh.predict(square), levels=20)
    figure.colorbar(drawn, ax=axes[1])
    axes[1].set_title(f"LReg on simplices, R^2 {error:.5f}", fontsize=9)
    axes[2].triplot(mesh.nodes_[:, 0], mesh.nodes_[:, 1], mesh.simplices_, linewidth=0.5, color=_OWN)
    axes[2].set_title(f"its mesh, {len(mesh.nodes_)} nodes", fontsize=9)
    save(figure, folder, "figure_3")


def figure_4(folder: Path) -> None:
    """Sets A, B and C; a network fails on sin(1/x), a forest and LReg do not."""
    random = np.random.default_rng(0)
    b = 1 / random.uniform(2, 50, (6000, 1))
    noiseless = (b[:3000], np.sin(1 / b[:3000, 0]), b[3000:], np.sin(1 / b[3000:, 0]))
    splits = {"A": synthetic("Fig4A").split(0), "C": synthetic("Fig4C").split(0)}
    sets = {
        name: (split.x, split.y, split.x_test, split.y_test) for name, split in splits.items()
    } | {"B": noiseless}  # fmt: skip
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for panel, name in zip(axes, "ABC", strict=True):
        x, y, x_test, y_test = sets[name]
        order = np.argsort(x_test[:, 0])
        panel.plot(x[:, 0], y, ".", color="0.8", markersize=2)
        lines = []
        models = (("MLP", network(), _PEER), ("random forest", RandomForestRegressor(random_state=0), "tab:green"))
        for label, model, color in (*models, ("LReg", LagrangeRegressor(), _OWN)):
            predicted = model.fit(x, y).predict(x_test)
            panel.plot(x_test[order, 0], predicted[order], color=color, linewidth=1)
            lines.append(f"{label} {score(y_test, predicted):.4f}")
        if name != "A":
            logarithmic(panel)
        panel.set_title(f"{name}: test R^2\n{', '.join(lines)}", fontsize=9)
    save(figure, folder, "figure_4")


def figure_c2(folder: Path) -> None:
    """C.2, noise that depends on x: the function, and where it is uncertain."""
    random = np.random.default_rng(0)
    x = random.uniform(-4, 4, 6000)
    y = np.sin(x) + 0.2 * np.cos(x) ** 2 * random.standard_normal(6000)
    model = LagrangeRegressor().fit(x[:5000, None], y[:5000])
    grid = np.linspace(-4, 4, 500)
    mean, std = model.predict(grid[:, None], return_std=True)
    function = np.sqrt(np.maximum(std**2 - model.noise_variance_, 0))
    figure, panel = plt.subplots(figsize=(7, 3.8), layout="constrained")
    panel.plot(x[:5000], y[:5000], ".", color="0.8", markersize=2)
    panel.plot(grid, np.sin(grid), color=_TRUTH, label="sin x")
    panel.plot(grid, mean, color=_OWN, label="LReg")
    panel.fill_between(grid, mean - 2 * function, mean + 2 * function, color=_OWN, alpha=0.3, label="2 std of the mean")
    panel.set_title(f"C.2, test R^2 {model.score(x[5000:, None], y[5000:]):.4f}", fontsize=9)
    panel.legend(fontsize=7)
    save(figure, folder, "figure_c2")


def figure_c3(folder: Path) -> None:
    """C.3, sin(1/x): fits with 16, 32 and 64 nodes, equal steps beside nodes that moved."""
    random = np.random.default_rng(0)
    x = 1 / random.uniform(2, 50, (6000, 1))
    y = np.sin(1 / x[:, 0])
    figure, axes = plt.subplots(2, 3, figsize=(13, 5.6), layout="constrained", sharex=True, sharey=True)
    grid = np.geomspace(x.min(), x.max(), 2000)
    for column, n_nodes in enumerate((16, 32, 64)):
        choices: tuple[tuple[str, dict[str, Any]], ...] = (
            ("equal steps", {"scale": "minmax", "smoothing": 1e-12}),
            ("moved nodes", {"nodes": "free"}),
        )
        for row, (label, options) in enumerate(choices):
            model = LagrangeRegressor(n_nodes=n_nodes, **options).fit(x[:5000], y[:5000])
            panel = axes[row, column]
            panel.semilogx(grid, np.sin(1 / grid), color=_TRUTH, linewidth=3, alpha=0.3)
            panel.semilogx(grid, model.predict(grid[:, None]), color=_OWN, linewidth=1)
            panel.plot(model.nodes_[0], model.values_[0] + model.intercept_, "o", color=_OWN, markersize=3)
            logarithmic(panel)
            panel.set_ylim(-1.5, 1.5)
            panel.set_title(f"{n_nodes} nodes, {label}: test R^2 {model.score(x[5000:], y[5000:]):.4f}", fontsize=9)
    save(figure, folder, "figure_c3")


def figure_c4(folder: Path) -> None:
    """C.4, Y_4^2: the real part, the fit, the error, the mesh."""
    random = np.random.default_rng(0)
    x = sphere(random, 40_000)
    y, _ = harmonic(x)
    model = LagrangeRegressor(basis="simplicial", scale="minmax", random_state=0).fit(x, y)
    sides = np.meshgrid(np.linspace(0.01, 2 * np.pi - 0.01, 160), np.linspace(0.01, np.pi - 0.01, 80))
    points = np.column_stack([side.ravel() for side in sides])
    true, predicted = harmonic(points)[0][:, 0], model.predict(points)[:, 0]
    figure, axes = plt.subplots(2, 2, figsize=(11, 6), layout="constrained")
    for panel, values, title in (
        (axes[0, 0], true, "real part of Y_4^2"),
        (axes[0, 1], predicted, "LReg"),
        (axes[1, 0], predicted - true, "their difference"),
    ):
        drawn = panel.pcolormesh(*sides, values.reshape(sides[0].shape), shading="gouraud", cmap="RdBu_r")
        figure.colorbar(drawn, ax=panel)
        panel.set_title(title, fontsize=9)
    axes[1, 1].triplot(model.nodes_[:, 0], model.nodes_[:, 1], model.simplices_, linewidth=0.3, color=_OWN)
    test = sphere(random, 8_000)
    error = score(harmonic(test)[0], model.predict(test))
    axes[1, 1].set_title(f"its mesh, {len(model.nodes_)} nodes; test R^2 {error:.5f}", fontsize=9)
    save(figure, folder, "figure_c4")


def figure_a2(folder: Path) -> None:
    """The worked mesh of appendix A and its basis function psi_3, which lives on the triangles 2, 3, 5 and 6."""
    triangles = np.array([[6, 7, 5], [0, 6, 5], [3, 7, 1], [2, 3, 1], [7, 4, 5], [3, 4, 7], [4, 3, 2]])
    # The paper gives the triangles only; these nodes make them a mesh.
    nodes = np.array([[-1.5, 2], [1, 0], [0, -1], [0, 0], [-1, 0], [-1, 1], [-0.5, 2], [0, 1]])
    values = np.eye(len(nodes))[3]
    figure = plt.figure(figsize=(10, 4), layout="constrained")
    flat = figure.add_subplot(1, 2, 1)
    flat.triplot(nodes[:, 0], nodes[:, 1], triangles, color=_TRUTH)
    carrying = np.flatnonzero((triangles == 3).any(axis=1))
    for index, corners in enumerate(triangles):
        if index in carrying:
            flat.fill(*nodes[corners].T, color=_OWN, alpha=0.25)
        x, y = nodes[corners].mean(axis=0)
        flat.text(x, y, str(index), color=_OWN, ha="center")
    for index, node in enumerate(nodes):
        flat.annotate(str(index), node, xytext=(3, 3), textcoords="offset points", weight="bold")
    flat.set_title(f"psi_3 lives on the triangles {', '.join(map(str, carrying))}", fontsize=9)
    solid: Any = figure.add_subplot(1, 2, 2, projection="3d")
    solid.plot_trisurf(nodes[:, 0], nodes[:, 1], values, triangles=triangles, cmap="Reds", edgecolor=_TRUTH)
    save(figure, folder, "figure_a2")


def slopes() -> dict[str, tuple[list[int], list[float], float]]:
    """Root mean squared error without noise by number of nodes, and the fitted slope; one input and two."""
    results = {}
    for d, sizes in ((1, (10, 20, 40, 80, 160, 320)), (2, (50, 100, 200, 400, 800))):
        random = np.random.default_rng(0)
        x, new = random.uniform(size=(20_000, d)), random.uniform(size=(4_000, d))
        nodes, errors = [], []
        for size in sizes:
            options: dict[str, Any] = {"n_nodes": size, "smoothing": 1e-12} if d == 1 else {
                "basis": "simplicial", "max_nodes": size, "scale": "minmax",
            }  # fmt: skip
            model = LagrangeRegressor(random_state=0, **options).fit(x, _wave(x))
            nodes.append(len(model.nodes_[0]) if d == 1 else len(model.nodes_))
            errors.append(float(np.sqrt(np.mean((model.predict(new) - _wave(new)) ** 2))))
        name = f"{d} input{'s' if d > 1 else ''}"
        results[name] = (nodes, errors, float(np.polyfit(np.log(nodes), np.log(errors), 1)[0]))
    return results


def _wave(x: Array) -> Array:
    return np.sin(5 * x.prod(axis=1) + 2 * x[:, 0])


def figure_slopes(folder: Path) -> None:
    """The scaling law: N^(-2/d) for smooth functions."""
    figure, panel = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, (nodes, errors, slope) in slopes().items():
        panel.loglog(nodes, errors, "o-", label=f"{name}: slope {slope:.2f}")
    panel.set_xlabel("nodes")
    panel.set_ylabel("root mean squared error, no noise")
    panel.grid(alpha=0.3)
    panel.legend()
    save(figure, folder, "slopes")


FIGURES: dict[str, Callable[[Path], None]] = {
    "figure_1": figure_1,
    "figure_3": figure_3,
    "figure_4": figure_4,
    "figure_c2": figure_c2,
    "figure_c3": figure_c3,
    "figure_c4": figure_c4,
    "figure_a2": figure_a2,
    "slopes": figure_slopes,
}
