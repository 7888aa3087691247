"""One feature, many nodes: a penalised least-squares fit whose smoothing parameter follows from the data.

Minimises sum_i w_i (y_i - f(x_i))^2 + lambda sum_j (slope jump at node j)^2, for every lambda of a grid at once. As a
mixed model (Wahba 1978; Wood 2017, sec. 6.2) the jumps are normal with variance sigma^2 / lambda; restricted maximum
likelihood (REML) and generalised cross-validation (GCV) choose lambda, and the posterior gives the standard deviation
of a prediction. The matrices have five diagonals, so that a fit costs O(samples + nodes) after sorting.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .banded import Pentadiagonal
from .mesh1d import Array, Scale, evaluate, find, place_nodes, second_differences
from .report import Optimality, SumModel, widening
from .samples import Samples
from .scaling import quantile_knots
from .terms import FittedTerm

# Values of lambda tried: from hardly any penalty, relative to the matrix of the data, to a straight line.
_GRID = 40
_LOW, _HIGH = -5.0, 10.0

# Most effective degrees of freedom, of the observations: the rest tells the noise.
_MOST_EDF = 0.8

# A mesh on which the fit spends more than this share of the nodes is doubled.
_CROWDED = 0.3

DEFAULT_NODES = 256


@dataclass(frozen=True)
class Smooth:
    """A fitted function of one feature with `q` outputs.

    Attributes:
        nodes: `[k]`.
        values: `[k, q]`.
        smoothing: `[q]`, lambda.
        edf: `[q]`, trace of the matrix from y to the fit.
        noise_variance: `[q]`.
        variance: `[k, q]`, of the posterior at the nodes.
        covariance: `[k - 1, q]`, between neighbouring nodes.
        objective: `[q]`, minimised sum of squares plus penalty.
        gap: `[q]`, the objective above its minimum over the values, from the gradient.
        criterion: `[q]`, REML or GCV at lambda; NaN for a given lambda.
        history: one entry per mesh tried: nodes, edf and criterion, means over outputs.
    """

    nodes: Array
    values: Array
    smoothing: Array
    edf: Array
    noise_variance: Array
    variance: Array
    covariance: Array
    objective: Array
    gap: Array
    criterion: Array
    history: tuple[dict[str, float], ...] = ()

    def predict(self, x: Array) -> Array:
        """`[n] -> [n, q]`."""
        return evaluate(x, self.nodes, self.values)

    def model(self, samples: Samples) -> SumModel:
        """In the form that the estimator shows, the function with mean zero over the samples."""
        fitted = self.predict(samples.X[:, 0])
        intercept = samples.weight @ fitted / samples.total
        variance = samples.weight @ (fitted - intercept) ** 2 / samples.total
        term = FittedTerm((0,), (self.nodes,), self.values - intercept, self.smoothing[None], self.edf, variance)
        about = (
            "sum of squared residuals plus smoothing times the sum of squared slope jumps, over the values at the nodes"
        )
        return SumModel(
            (term,), intercept, self.edf, self.noise_variance, self.history,
            Optimality.of(float(self.objective.sum()), float(self.gap.sum()), about),
            self.posterior_variance, widening(samples.total - self.edf),
        )  # fmt: skip

    def posterior_variance(self, X: Array) -> Array:
        """Variance of the function at `X`, without the noise; `[n, 1] -> [n, q]`."""
        if len(self.nodes) == 1:
            return np.repeat(self.variance, len(X), axis=0)
        element, local = find(X[:, 0], self.nodes)
        right = local[:, None]
        left = 1 - right
        return np.maximum(
            left**2 * self.variance[element]
            + right**2 * self.variance[element + 1]
            + 2 * left * right * self.covariance[element],
            0,
        )


@dataclass(frozen=True)
class Grouped:
    """Samples sorted by x, equal ones merged: what a fit on one feature needs to know.

    Attributes:
        x: `[m]`, strictly increasing.
        weight: `[m]`, positive.
        mass: `[m]`, how often a value is there, whatever its precision: where meshes need nodes.
        y: `[m, q]`, weighted means.
        within: `[q]`, weighted sum of squares around those means.
    """

    x: Array
    weight: Array
    mass: Array
    y: Array
    within: Array

    @classmethod
    def of(cls, x: Array, y: Array, weight: Array, mass: Array | None = None) -> "Grouped":
        """Group `x` `[n]`, `y` `[n, q]`, `weight` and `mass` `[n]`, positive."""
        order = np.argsort(x, kind="stable")
        x, y, weight, mass = x[order], y[order], weight[order], (weight if mass is None else mass)[order]
        first = np.flatnonzero(np.concatenate(([True], np.diff(x) > 0)))
        if len(first) == len(x):
            return cls(x, weight, mass, y, np.zeros(y.shape[1]))
        total = np.add.reduceat(weight, first)
        mean = np.add.reduceat(weight[:, None] * y, first) / total[:, None]
        group = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(x))))
        within = (weight[:, None] * (y - mean[group]) ** 2).sum(axis=0)
        return cls(x[first], total, np.add.reduceat(mass, first), mean, within)


def fit_smooth(
    data: Grouped,
    *,
    n_nodes: int | None = None,
    max_nodes: int = 4000,
    scale: Scale = "quantile",
    smoothing: str | float = "reml",
    total: float | None = None,
) -> Smooth:
    """Fit.

    Args:
        data: the samples.
        n_nodes: None takes 256 and doubles them while the fit uses most of them and the criterion gains.
        max_nodes: most nodes.
        scale: see `place_nodes`; jumps of the slope are alike per sample ("quantile") or per length ("minmax").
        smoothing: "reml", "gcv" or lambda itself.
        total: number of samples that the weights stand for; None takes their sum.

    Returns:
        The fit.
    """
    total = float(data.weight.sum()) if total is None else total
    wanted = DEFAULT_NODES if n_nodes is None else n_nodes
    wanted = min(wanted, max_nodes)
    best = fit_on_nodes(data, place_nodes(data.x, data.mass, wanted, scale), scale, smoothing, total)
    history = [_entry(best)]
    # Half of the distinct samples at most: with as many nodes as samples, GCV cannot tell noise from signal.
    most = min(max_nodes, len(data.x) // 2)
    while n_nodes is None and wanted < most and best.edf.max() > _CROWDED * len(best.nodes):
        wanted = min(2 * wanted, most)
        finer = fit_on_nodes(data, place_nodes(data.x, data.mass, wanted, scale), scale, smoothing, total)
        history.append(_entry(finer))
        if isinstance(smoothing, str) and not finer.criterion.sum() < best.criterion.sum():
            break
        best = finer
    return Smooth(**{**vars(best), "history": tuple(history)})


def _entry(fit: Smooth) -> dict[str, float]:
    return {"nodes": len(fit.nodes), "edf": float(fit.edf.mean()), "criterion": float(fit.criterion.mean())}


@dataclass(frozen=True)
class _Normal:
    """The normal equations of a mesh, in bands, for residuals from the straight line."""

    gram: tuple[Array, Array]  # diagonal [k], first lower diagonal [k] (entry 0 unused)
    penalty: tuple[Array, Array, Array]  # the same and the second lower diagonal [k]
    right: Array  # [k, q]
    squares: Array  # [q]
    total: float

    def factor(self, smoothing: Array) -> Pentadiagonal:
        lam = smoothing[None, :]
        return Pentadiagonal.factor(
            self.gram[0][:, None] + lam * self.penalty[0][:, None],
            self.gram[1][:, None] + lam * self.penalty[1][:, None],
            lam * self.penalty[2][:, None],
        )


def fit_on_nodes(data: Grouped, nodes: Array, scale: Scale, smoothing: str | float, total: float) -> Smooth:
    """Fit on given nodes, in the range of the samples; arguments as in `fit_smooth`."""
    q, k = data.y.shape[1], len(nodes)
    line, squares = _line(data, k)
    if k <= 2:
        return _straight(data, nodes, line, squares + data.within, total)
    normal = _normal_equations(data, nodes, data.y - line, squares + data.within, scale, total)
    if isinstance(smoothing, str):
        lam, criterion = _choose(normal, smoothing)
    else:
        lam, criterion = np.full(q, float(smoothing)), np.full(q, np.nan)
    factor = normal.factor(lam)  # one system per output
    columns = factor.solve(normal.right.T[None, :, :].transpose(2, 1, 0))  # [k, q, 1]
    values = columns[:, :, 0]
    values, gap = _refined(normal, factor, lam, values)
    image = _apply(normal, lam, values)
    objective = np.maximum(normal.squares - 2 * (values * normal.right).sum(0) + (values * image).sum(0), 0.0)
    diagonal, first, _ = factor.inverse_band()
    edf = _trace(normal, diagonal, first)
    residual = np.maximum(objective - lam * _roughness(normal, values), 0.0)
    noise = residual / np.maximum(total - edf, 1e-3 * total)
    values = values + evaluate(nodes, data.x[[0, -1]], line[[0, -1]])
    return Smooth(nodes, values, lam, edf, noise, diagonal * noise, first[1:] * noise, objective, gap, criterion)


def _line(data: Grouped, k: int) -> tuple[Array, Array]:
    """The weighted least-squares line at the samples, and the squares it leaves. A constant on a single node."""
    w = data.weight / data.weight.sum()
    mean = w @ data.y
    centred = data.x - w @ data.x
    spread = w @ centred**2
    slope = (w * centred) @ (data.y - mean) / spread if k > 1 and spread > 0 else np.zeros(data.y.shape[1])
    line = mean + centred[:, None] * slope
    return line, data.weight @ (data.y - line) ** 2


def _straight(data: Grouped, nodes: Array, line: Array, squares: Array, total: float) -> Smooth:
    """A mesh of one or two nodes: nothing to penalise."""
    q, k = data.y.shape[1], len(nodes)
    noise = squares / max(total - k, 1.0)
    weight, zero = data.weight.sum(), np.zeros(q)
    if k == 1:
        variance, covariance = (noise / weight)[None], np.zeros((0, q))
    else:
        mean = data.weight @ data.x / weight
        spread = data.weight @ (data.x - mean) ** 2
        a, b = nodes - mean
        variance = np.stack([noise * (1 / weight + t * t / spread) for t in (a, b)])
        covariance = (noise * (1 / weight + a * b / spread))[None]
    return Smooth(
        nodes, line[[0, -1]][:k], zero, np.full(q, float(k)), noise, variance, covariance, squares, zero,
        np.full(q, np.nan),
    )  # fmt: skip


def _normal_equations(data: Grouped, nodes: Array, y: Array, squares: Array, scale: Scale, total: float) -> _Normal:
    k = len(nodes)
    element, right = find(data.x, nodes)
    left, w = 1 - right, data.weight
    diagonal = np.bincount(element, w * left**2, k) + np.bincount(element + 1, w * right**2, k)
    first = np.bincount(element + 1, w * left * right, k).astype(np.float64)
    target = np.stack(
        [
            np.bincount(element, w * left * column, k) + np.bincount(element + 1, w * right * column, k)
            for column in y.T
        ],
        axis=1,
    )
    level = np.interp(nodes, *quantile_knots(data.x, data.mass)) if scale == "quantile" else None
    rows = second_differences(nodes, level)
    penalty = [np.zeros(k), np.zeros(k), np.zeros(k)]
    for a in range(3):
        penalty[0][a : k - 2 + a] += rows[:, a] ** 2
        if a:
            penalty[1][a : k - 2 + a] += rows[:, a] * rows[:, a - 1]
    penalty[2][2:] = rows[:, 2] * rows[:, 0]
    return _Normal((diagonal.astype(np.float64), first), (penalty[0], penalty[1], penalty[2]), target, squares, total)


def _choose(normal: _Normal, rule: str) -> tuple[Array, Array]:
    """Lambda for every output: the best of a grid, moved to the vertex of the parabola through its neighbours."""
    q = normal.right.shape[1]
    ratio = normal.gram[0].sum() / normal.penalty[0].sum()
    exponent = np.linspace(_LOW, _HIGH, _GRID)
    lam = ratio * 10**exponent
    factor = normal.factor(lam)
    diagonal, first, _ = factor.inverse_band()
    edf = _trace(normal, diagonal, first)
    score = _scores(normal, factor, lam, rule, edf)  # [grid, q]
    score[edf > max(_MOST_EDF * normal.total, 1.01 * edf.min())] = np.inf
    best = score.argmin(axis=0)
    inner = np.clip(best, 1, _GRID - 2)
    pick = np.arange(q)
    low, mid, high = score[inner - 1, pick], score[inner, pick], score[inner + 1, pick]
    curved = (best == inner) & np.isfinite(low)
    low = np.where(curved, low, mid)
    bend = low - 2 * mid + high
    curved &= bend > 0
    shift = np.where(curved, 0.5 * (low - high) / np.where(curved, bend, 1.0), 0.0)
    found = exponent[best] + np.clip(shift, -0.5, 0.5) * (exponent[1] - exponent[0])
    return ratio * 10**found, score[best, pick]


def _scores(normal: _Normal, factor: Pentadiagonal, lam: Array, rule: str, edf: Array) -> Array:
    k = len(normal.right)
    solved = factor.solve(normal.right[:, None, :])  # [k, grid, q]
    explained = (solved * normal.right[:, None, :]).sum(axis=0)  # [grid, q]
    floor = np.finfo(np.float64).eps * np.maximum(normal.squares, np.finfo(np.float64).tiny) * 10
    if rule == "reml":
        penalised = np.maximum(normal.squares - explained, floor)
        degrees = max(normal.total - 2, 1.0)
        logs = factor.log_determinant() - (k - 2) * np.log(lam)
        return degrees * np.log(penalised) + logs[:, None]
    rough = lam[:, None] * _roughness(normal, solved)
    residual = np.maximum(normal.squares - explained - rough, floor)
    spare = np.maximum(normal.total - edf[:, None], 1e-3 * normal.total)
    return normal.total * np.log(residual) - 2 * normal.total * np.log(spare)


def _trace(normal: _Normal, diagonal: Array, first: Array) -> Array:
    """tr(A^-1 G) from the bands of both, `[batch]`."""
    result: Array = normal.gram[0] @ diagonal + 2 * (normal.gram[1][1:] @ first[1:])
    return result


def _roughness(normal: _Normal, values: Array) -> Array:
    """c^T S c for `values` `[k, ...]`, by bands."""
    main, first, second = (band.reshape(-1, *[1] * (values.ndim - 1)) for band in normal.penalty)
    result: Array = (
        (main * values**2).sum(0)
        + 2 * (first[1:] * values[1:] * values[:-1]).sum(0)
        + 2 * (second[2:] * values[2:] * values[:-2]).sum(0)
    )
    return np.maximum(result, 0.0)


def _apply(normal: _Normal, lam: Array, values: Array) -> Array:
    """A `values`, one lambda per column."""
    main = normal.gram[0][:, None] + lam * normal.penalty[0][:, None]
    first = normal.gram[1][:, None] + lam * normal.penalty[1][:, None]
    second = lam * normal.penalty[2][:, None]
    result: Array = main * values
    result[1:] += first[1:] * values[:-1]
    result[:-1] += first[1:] * values[1:]
    result[2:] += second[2:] * values[:-2]
    result[:-2] += second[2:] * values[2:]
    return result


def _refined(normal: _Normal, factor: Pentadiagonal, lam: Array, values: Array) -> tuple[Array, Array]:
    """One step of iterative refinement, and the gap: half the square of the gradient in the metric of A^-1, doubled."""
    rest = normal.right - _apply(normal, lam, values)
    values = values + factor.solve(rest[:, :, None])[:, :, 0]
    rest = normal.right - _apply(normal, lam, values)
    gap: NDArray[np.float64] = np.maximum((rest * factor.solve(rest[:, :, None])[:, :, 0]).sum(0), 0.0)
    return values, gap
