"""One feature, many nodes, and a penalty on the jumps of the slope whose strength follows from the data.

Minimises sum_i w_i (y_i - f(x_i))^2 + lambda sum_j (slope jump at node j)^2, output by output.
"""

from dataclasses import dataclass, field, replace

import numpy as np
from scipy import sparse

from .mesh1d import Array, Scale, evaluate, find, place_nodes, second_differences
from .penalized import Posterior, Problem, SmoothingSearch, Solved, residual_squares, rows_of
from .report import Optimality, SumModel, widening
from .samples import Samples
from .scaling import quantile_knots
from .terms import FittedTerm

DEFAULT_NODES = 256
_CROWDED = 0.3  # a mesh on which the fit spends more than this share of the nodes is doubled


@dataclass(frozen=True)
class _Fit:
    """One mesh, and a solution with its degrees of freedom for each output, relative to the straight line."""

    nodes: Array
    problems: list[Problem] = field(repr=False)
    solved: list[Solved] = field(repr=False)
    edf: Array  # [q]
    line: Array  # [k, q], at the nodes
    criterion: float  # REML, over outputs


@dataclass(frozen=True)
class _Variance:
    nodes: Array
    noise: Array
    posteriors: list[Posterior]

    def __call__(self, X: Array) -> Array:
        element, right = find(X[:, 0], self.nodes)
        indices, weights = element[:, None] + np.arange(2), np.stack((1 - right, right), axis=1)
        return np.stack([p.variance(indices, weights) for p in self.posteriors], axis=1) * self.noise


def fit_smooth(
    samples: Samples,
    *,
    n_nodes: int | None = None,
    max_nodes: int = 4000,
    scale: Scale = "quantile",
    smoothing: str | float = "reml",
) -> SumModel:
    """Fit.

    Args:
        samples: with one feature that varies.
        n_nodes: None takes 256 and doubles them while the fit uses most of them and the criterion gains.
        max_nodes: most nodes.
        scale: see `place_nodes`; jumps of the slope are alike per sample ("quantile") or per length ("minmax").
        smoothing: "reml" or lambda itself.

    Returns:
        The fit, the function with mean zero over the samples.
    """
    order = np.argsort(samples.X[:, 0], kind="stable")
    x, mass = samples.X[order, 0], samples.mass[order]
    data = replace(samples, X=x[:, None], y=samples.y[order], weight=samples.weight[order], mass=mass)
    wanted = min(DEFAULT_NODES if n_nodes is None else n_nodes, max_nodes)
    best = _fit_on(data, place_nodes(x, mass, wanted, scale), scale, smoothing)
    tried = [best]
    # Half of the distinct samples at most: with as many nodes as samples, nothing tells noise from signal.
    most = min(max_nodes, int((np.diff(x) > 0).sum() + 1) // 2)
    while n_nodes is None and wanted < most and best.edf.max() > _CROWDED * len(best.nodes):
        wanted = min(2 * wanted, most)
        tried.append(_fit_on(data, place_nodes(x, mass, wanted, scale), scale, smoothing))
        if isinstance(smoothing, str) and not tried[-1].criterion < best.criterion:
            break
        best = tried[-1]
    history = tuple(
        {"nodes": float(len(fit.nodes)), "edf": float(fit.edf.mean()), "criterion": fit.criterion} for fit in tried
    )
    return _model(best, data, history)


def _fit_on(data: Samples, nodes: Array, scale: Scale, smoothing: str | float) -> _Fit:
    x, weight = data.X[:, 0], data.weight
    k, element, right = len(nodes), *find(x, nodes)
    design = rows_of(element[:, None] + np.arange(2), np.stack((1 - right, right), axis=1), k)
    weighted = sparse.diags_array(weight) @ design
    # Residuals from the straight line, which is not penalised: a fit is not worse than it by rounding.
    ends = np.stack((np.ones(k), (nodes - nodes[0]) / (nodes[-1] - nodes[0])), axis=1)
    straight = design @ ends
    root = np.sqrt(weight)[:, None]
    line = ends @ np.linalg.lstsq(straight * root, data.y * root, rcond=None)[0]
    y = data.y - design @ line
    level = np.interp(nodes, *quantile_knots(x, data.mass)) if scale == "quantile" else None
    rows = second_differences(nodes, level) if k > 2 else np.zeros((0, 3))
    jumps = rows_of(np.arange(len(rows))[:, None] + np.arange(3), rows, k)
    gram, rough = (weighted.T @ design).tocsc(), (jumps.T @ jumps).tocsc()
    squares = weight @ y**2
    floor = 1e-28 * (weight @ data.y**2)
    problems, solved, edf, criterion = [], [], [], 0.0
    for o in range(len(squares)):
        problem = Problem(
            gram,
            weighted.T @ y[:, o : o + 1],
            squares[o : o + 1],
            rough,
            data.total,
            min(k, 2),
            squares[o : o + 1] > floor[o],
        )
        # What lies on the line to rounding is a line.
        search = SmoothingSearch(smoothing if problem.active.any() else 1.0)  # type: ignore[arg-type]
        found, used = search.run(problem)
        problems.append(problem)
        solved.append(found)
        edf.append(used)
        criterion += search.score(problem, found)
    return _Fit(nodes, problems, solved, np.array(edf), line, criterion)


def _model(fit: _Fit, data: Samples, history: tuple[dict[str, float], ...]) -> SumModel:
    pairs = list(zip(fit.problems, fit.solved, strict=True))
    squares = np.array([residual_squares(p, s)[0] for p, s in pairs])
    noise = squares / np.maximum(data.total - fit.edf, 1e-3 * data.total)
    values = fit.line + np.concatenate([s.coefficients for s in fit.solved], axis=1)
    fitted = evaluate(data.X[:, 0], fit.nodes, values)
    mean = data.weight @ fitted / data.weight.sum()
    variance = data.weight @ (fitted - mean) ** 2 / data.weight.sum()
    smoothing = np.exp([[s.log_smoothing for s in fit.solved]])
    about = "sum of squared residuals plus smoothing times the sum of squared slope jumps, over the values at the nodes"
    spread = _Variance(fit.nodes, noise, [Posterior(s.matrix) for s in fit.solved])
    deviation = np.sqrt(spread(fit.nodes[:, None]))
    return SumModel(
        (FittedTerm((0,), (fit.nodes,), values - mean, smoothing, fit.edf, variance, deviation),),
        mean, fit.edf, noise, history,
        Optimality.of(float(sum(s.objective.sum() for s in fit.solved)), sum(s.gap(p) for p, s in pairs), about),
        spread, widening(data.total - fit.edf),
    )  # fmt: skip
