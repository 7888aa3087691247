"""A few nodes where they serve best: functions of single features, least squares over the values and over the nodes.

On given nodes the values are solved for. A mesh several times finer, at quantiles, is thinned to the wanted number,
cheapest nodes first; then all slide by damped Gauss-Newton steps, the values eliminated (Golub & Pereyra 1973; Jacobian
of Kaufman 1975).
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from scipy import linalg, sparse

from .mesh1d import Array, find, place_nodes
from .report import SumModel
from .samples import Samples
from .squares import Squares
from .terms import Line

# Parameters that a node placed by the data counts for, its value included (Friedman 1991, sec. 3.6).
_KNOT_COST = 3.0

_FINER, _SAMPLES_PER_ELEMENT = 8, 3  # the mesh that is thinned
_THINNED = 0.1  # share of its surplus that leaves at once
_MAX_SLIDES, _MAX_DAMPINGS, _DAMPING_FACTOR = 40, 4, 8.0
_MIN_PROGRESS = 1e-3  # of the loss, by a step
_MAX_SHIFT = 0.45  # of the element that a node slides into
_SHORTEST = 1e-5  # element, of the range
_RIDGE = 1e-10  # of targets of variance one: what samples do not determine is small
_PENALTY = 1e-12


def fit_free(samples: Samples, n_nodes: int, max_nodes: int) -> SumModel:
    """Fit functions of single features on `n_nodes` nodes each.

    The penalties of the result are too small to matter, and it takes the nodes as given.
    """
    low, span = samples.X.min(axis=0), np.ptp(samples.X, axis=0)
    varying = np.flatnonzero(span > 0)
    scale = np.sqrt(samples.weight @ (samples.y - _mean(samples)) ** 2 / samples.total).max() or 1.0
    x = (samples.X[:, varying] - low[varying]) / span[varying]
    data = _Data(x, (samples.y - _mean(samples)) / scale, samples.weight / samples.total, samples.mass)
    most = min([len(np.unique(column)) for column in x.T] + [max_nodes // max(len(varying), 1)])
    path = _placed(data, max(2, min(n_nodes, most))) if len(varying) else []
    meshes = path[-1].meshes if path else ()
    terms = []
    for j, mesh in zip(varying, meshes, strict=True):
        nodes = low[j] + span[j] * mesh
        nodes[-1] = samples.X[:, j].max()
        terms.append(Line.over(int(j), samples.X[:, j], samples.mass, nodes, "quantile"))
    fit = Squares(samples, _PENALTY).fit(terms, folds=False)
    least = 1e-3 * samples.total
    edf = 1 + fit.edf.sum(axis=0)
    noise = fit.noise * np.maximum(samples.total - edf, least) / max(samples.total - _parameters(meshes), least)
    history = [{"nodes": float(sum(map(len, f.meshes))), "mean_squared_error": f.loss * scale**2} for f in path]
    return replace(fit, noise=noise).model(Squares.about, history)


def _mean(samples: Samples) -> Array:
    result: Array = samples.weight @ samples.y / samples.total
    return result


def _parameters(meshes: tuple[Array, ...]) -> float:
    return 1 + sum(len(mesh) - 1 + (_KNOT_COST - 1) * (len(mesh) - 2) for mesh in meshes)


@dataclass(frozen=True)
class _Data:
    """Features `x` `[n, d]` on [0, 1], targets `y` `[n, q]` without mean, weights that sum to one, and masses."""

    x: Array
    y: Array
    weight: Array
    mass: Array


@dataclass(frozen=True)
class _Fit:
    """The values on given meshes, and what derivatives in the nodes need.

    "Halves" are the pieces of hat functions in single elements, `1 - local` and `local`, E of them; a hat function is
    the sum of the halves on both sides of its node.
    """

    meshes: tuple[Array, ...]
    values: Array  # [p, q], of all meshes
    loss: float
    glue: sparse.csr_array  # [E, p], from values at nodes to those of halves
    gram: Array  # [E, E]
    factor: tuple[Array, bool]  # of the normal equations, [p, p]
    rest: Array  # [E, q], products of halves and residual

    @property
    def spans(self) -> list[slice]:
        """The values of each mesh."""
        ends = np.cumsum([0, *map(len, self.meshes)])
        return [slice(int(a), int(b)) for a, b in pairwise(ends)]


def _solve(data: _Data, meshes: tuple[Array, ...]) -> _Fit | None:
    """Least squares for the values; None if the normal equations are singular."""
    n, d = data.x.shape
    index, local, glue = np.empty((n, d, 2), dtype=np.int64), np.empty((n, d, 2)), []
    start = 0
    for i, mesh in enumerate(meshes):
        element, right = find(data.x[:, i], mesh)
        index[:, i] = start + 2 * element[:, None] + np.arange(2)
        local[:, i, 0], local[:, i, 1] = 1 - right, right
        half = np.arange(2 * len(mesh) - 2)
        glue.append(sparse.csr_array((np.ones(len(half)), (half, (half + 1) // 2)), shape=(len(half), len(mesh))))
        start += len(half)
    pointer = np.arange(0, 2 * n * d + 1, 2 * d)
    halves = sparse.csr_array((local.ravel(), index.ravel(), pointer), shape=(n, start))
    weighted = sparse.csr_array(((local * data.weight[:, None, None]).ravel(), index.ravel(), pointer), halves.shape).T
    joined = sparse.block_diag(glue, format="csr")
    gram, target = (weighted @ halves).toarray(), weighted @ data.y
    normal = joined.T @ (joined.T @ gram).T
    normal[np.diag_indices(len(normal))] += _RIDGE
    try:
        factor = linalg.cho_factor(normal, check_finite=False)
    except linalg.LinAlgError:
        return None
    values = linalg.cho_solve(factor, joined.T @ target, check_finite=False)
    residual = data.y - halves @ (joined @ values)
    loss = float((data.weight @ residual**2 + _RIDGE * (values**2).sum(axis=0)).mean())
    return _Fit(meshes, values, loss, joined, gram, factor, target - gram @ (joined @ values))


def _placed(data: _Data, n_nodes: int) -> list[_Fit]:
    """Fits of falling loss, the last one with the best nodes that were found."""
    orders = [np.argsort(column, kind="stable") for column in data.x.T]
    finer = max(n_nodes, min(_FINER * (n_nodes - 1), len(data.x) // _SAMPLES_PER_ELEMENT) + 1)
    for count in (finer, n_nodes):
        fit = _solve(
            data,
            tuple(
                place_nodes(column[order], data.mass[order], count, "quantile")
                for column, order in zip(data.x.T, orders, strict=True)
            ),
        )
        while fit is not None and max(map(len, fit.meshes)) > n_nodes:
            fit = _solve(data, _thinner(fit, n_nodes))
        if fit is not None:
            return _slides(data, fit)
    raise ValueError(f"n_nodes={n_nodes} nodes per feature leave singular normal equations; take fewer.")


def _costs(fit: _Fit) -> list[Array]:
    """By how much the loss rises without each interior node: that of a fit without a kink there."""
    result = []
    for mesh, span in zip(fit.meshes, fit.spans, strict=True):
        k, width = len(mesh), 1 / np.diff(mesh)
        kinks = np.zeros((k - 2, fit.values.shape[0]))
        rows, first = np.arange(k - 2), span.start + np.arange(k - 2)
        kinks[rows, first], kinks[rows, first + 2] = width[:-1], width[1:]
        kinks[rows, first + 1] = -width[:-1] - width[1:]
        spread = (kinks * linalg.cho_solve(fit.factor, kinks.T, check_finite=False).T).sum(axis=1)
        result.append(((kinks @ fit.values) ** 2).mean(axis=1) / spread)
    return result


def _thinner(fit: _Fit, n_nodes: int) -> tuple[Array, ...]:
    """Meshes without some of their surplus, cheapest nodes first, no two of them neighbours."""
    result = []
    for mesh, cost in zip(fit.meshes, _costs(fit), strict=True):
        gone: set[int] = set()
        wanted = math.ceil(_THINNED * (len(mesh) - n_nodes))
        for node in np.argsort(cost, kind="stable") + 1:
            if len(gone) < wanted and not {node - 1, node + 1} & gone:
                gone.add(int(node))
        result.append(np.delete(mesh, sorted(gone)))
    return tuple(result)


def _slides(data: _Data, fit: _Fit) -> list[_Fit]:
    """`fit`, and those after damped Gauss-Newton steps on all interior nodes."""
    path, damping = [fit], 1e-2
    for _ in range(_MAX_SLIDES if max(map(len, fit.meshes)) > 2 else 0):
        curvature, descent = _node_model(path[-1])
        for _ in range(_MAX_DAMPINGS):
            trial = _solve(data, _slid(path[-1], curvature, descent, damping))
            if trial is not None and trial.loss < path[-1].loss:
                break
            damping *= _DAMPING_FACTOR
        else:
            break
        damping /= _DAMPING_FACTOR
        path.append(trial)
        if trial.loss > path[-2].loss * (1 - _MIN_PROGRESS):
            break
    return path


def _node_model(fit: _Fit) -> tuple[Array, Array]:
    """Gauss-Newton matrix and descent direction of half the loss in all nodes, the values eliminated.

    Sliding a node changes the function by minus the slope times the hat function of that node. With Phi the halves of
    all samples, G = Phi^T Phi and T the glue, the Jacobian of output o is -Phi diag(s_o) T, and eliminating the values
    projects it: G becomes G - G T H^-1 T^T G.
    """
    slope = np.concatenate(
        [np.diff(fit.values[s], axis=0) / np.diff(m)[:, None] for m, s in zip(fit.meshes, fit.spans, strict=True)]
    ).repeat(2, axis=0)  # [E, q]
    tied = fit.glue.T @ fit.gram
    projected = fit.gram - tied.T @ linalg.cho_solve(fit.factor, tied, check_finite=False)
    curvature = fit.glue.T @ (fit.glue.T @ (projected * (slope @ slope.T))).T
    return curvature, -fit.glue.T @ (slope * fit.rest).sum(axis=1)


def _slid(fit: _Fit, curvature: Array, descent: Array, damping: float) -> tuple[Array, ...]:
    """Meshes after one step of Levenberg and Marquardt, each node within `_MAX_SHIFT` of the element it slides into."""
    inner = np.concatenate([np.arange(s.start + 1, s.stop - 1) for s in fit.spans])
    diagonal = np.maximum(curvature.diagonal()[inner], 0)
    floor = 1e-12 * max(diagonal.mean(), np.finfo(float).tiny)
    matrix = curvature[np.ix_(inner, inner)] + np.diag(damping * diagonal + floor)
    step = np.zeros(len(descent))
    try:
        step[inner] = linalg.solve(matrix, descent[inner], assume_a="sym", check_finite=False)
    except linalg.LinAlgError:
        return fit.meshes
    result = []
    for mesh, span in zip(fit.meshes, fit.spans, strict=True):
        room = np.maximum(np.diff(mesh) - _SHORTEST, 0) * _MAX_SHIFT
        result.append(mesh.copy())
        result[-1][1:-1] += np.clip(np.nan_to_num(step[span][1:-1]), -room[:-1], room[1:])
    return tuple(result)
