"""Regression on simplices: the basis P1(R^d) on a mesh that is refined where the residual says so.

After Li, Cheng & Gu (2025), appendix A, with the coefficients at their global optimum on every mesh. What is ours: a
roughness penalty on the jumps of the gradient, its weight by REML, marking by what a new node takes from the squared
residual, and a stop by the same restricted likelihood: generalised cross-validation keeps a mesh that interpolates
noise now and then.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from .mesh1d import Array
from .penalized import Posterior, Problem, SmoothingSearch, Solved, cross_validation, evidence, residual_squares
from .penalized import rows_of as _design
from .report import Optimality, widening
from .samples import Samples
from .scaling import ColumnScale, Scale, fit_scale
from .simplices import (
    SimplicialMesh,
    bisect,
    descend,
    grid_mesh,
    interior_facets,
    locate_in_mesh,
    longest_edges,
)

#: More inputs than this and simplices are the wrong tool: a cube alone holds d! of them.
MAX_DIMENSION = 3

# Cells per axis of the first mesh, fewer for few samples. So many because a single bisection may show no gain where
# several do; the penalty makes nodes harmless that are of no use.
_START_CELLS = {1: 64, 2: 16, 3: 4}

# A round of refinement marks the edges that hold this share of what can be gained ...
_BULK = 0.9
# ... and at most this share of the nodes, so that the next residual has a say.
_GROWTH = 1.5
# A new node that is worth less than this share of what noise makes it seem is not tried. Low, because the penalty makes
# nodes harmless that are of no use.
_SIGNIFICANT = 0.3

# Rounds without a better criterion before refinement ends; better is by this share at least.
_PATIENCE = 2
_BETTER = 4e-3
# Nor does it go on for the room that is left when this share of max_nodes is there.
_FULL = 0.9

_CHUNK = 1 << 17  # rows handled at once


@dataclass(frozen=True)
class SimplicialFit:
    """A fitted continuous function, linear on every simplex of a mesh in scaled coordinates.

    Outside of the samples' range it goes on linearly: scaled coordinates with the last slope of each column's scale,
    the function as on the nearest simplex. Columns that were constant in the samples have no influence.

    Attributes:
        mesh: in scaled coordinates, on the unit cube; its dimension is the number of columns that vary.
        scale: from input units to scaled coordinates.
        columns: the columns of X that vary.
        values: `[n_nodes, q]`, at the nodes.
        smoothing: lambda.
        edf: `[q]`, effective degrees of freedom, the same for all outputs.
        noise_variance: `[q]`, for a row of the mean weight.
        history: every mesh that was tried: nodes, smoothing, edf, criterion (of REML, its exponential per sample).
        optimality: certificate of the values.
        posterior: of the values.
        widening: of standard deviations, as for sums.
    """

    mesh: SimplicialMesh
    scale: ColumnScale
    columns: NDArray[np.int64]
    values: Array
    smoothing: float
    edf: Array
    noise_variance: Array
    history: tuple[dict[str, float], ...]
    optimality: Optimality
    posterior: Posterior
    widening: Array
    terms: tuple[Any, ...] = ()

    @property
    def intercept(self) -> Array:
        """`[q]`: none."""
        return np.zeros(self.values.shape[1])

    @property
    def nodes(self) -> Array:
        """`[n_nodes, d]` in units of the inputs that vary."""
        return self.scale.inverse_transform(self.mesh.nodes.numpy())

    @property
    def simplices(self) -> NDArray[np.int64]:
        """`[n_simplices, d + 1]`, indices of nodes."""
        return self.mesh.simplices.numpy()

    def locate(self, X: Array) -> tuple[NDArray[np.int64], Array]:
        """Which values a row takes and with which weights: `indices` and `weights`, both `[n, d + 1]`."""
        cell, weights = locate_in_mesh(torch.from_numpy(self.scale.transform(X[:, self.columns])), self.mesh)
        return self.mesh.cells[cell].numpy(), weights.numpy()

    def mean(self, X: Array) -> Array:
        """`[n, d] -> [n, q]`."""
        parts = [self.locate(X[start : start + _CHUNK]) for start in range(0, max(len(X), 1), _CHUNK)]
        return np.concatenate([_design(*part, len(self.values)) @ self.values for part in parts])

    def posterior_variance(self, X: Array) -> Array:
        """Of the function, without the noise; the penalty is its prior (Wahba 1983): `[n, d] -> [n, q]`."""
        parts = [self.locate(X[start : start + _CHUNK]) for start in range(0, max(len(X), 1), _CHUNK)]
        leverage = np.concatenate([self.posterior.variance(*part) for part in parts])
        return leverage[:, None] * self.noise_variance


@dataclass
class _Samples:
    """Rows with weight, and where they are in the mesh."""

    points: torch.Tensor  # [n, d], scaled
    y: Array  # [n, q], without their plane
    weight: Array
    cell: torch.Tensor
    local: torch.Tensor  # [n, d + 1]
    total: float  # sum of the weights
    square: Array  # [q]


@dataclass
class _State:
    """A mesh and its fit."""

    mesh: SimplicialMesh
    solved: Solved
    problem: Problem
    residual_square: Array
    edf: float
    criterion: float

    @property
    def noise(self) -> Array:
        rest = max(self.problem.n_samples - self.edf, 1e-2 * self.problem.n_samples)
        return self.residual_square / rest


def fit_simplicial(
    samples: Samples,
    *,
    scale: Scale = "quantile",
    smoothing: Any = "reml",
    max_nodes: int = 4000,
    seed: int = 0,
) -> SimplicialFit:
    """Fit y = f(x) with a continuous f that is linear on each simplex of an adaptive mesh.

    Minimises sum_i w_i |y_i - f(x_i)|^2 + lambda sum_F |F| / h_F [df/dn]_F^2 over the nodal values exactly, on each of
    a sequence of meshes; F are the facets, [df/dn]_F the jump of the gradient, |F| / h_F area over width. Refinement
    bisects the longest edges whose midpoint as a node would take most from the squared residual; it ends when the
    criterion that chooses lambda no longer falls.

    Memory beyond the inputs is about 300 bytes a sample; 10^6 samples of 2 inputs take about 10 s on one core.

    Args:
        samples: up to 3 columns may vary.
        scale: "quantile" maps each column to [0, 1] by its quantiles, "minmax" linearly.
        smoothing: "reml", or lambda itself.
        max_nodes: refinement stays below.
        seed: of the signs that estimate traces on large meshes; nothing else is random.

    Raises:
        ValueError: for more than 3 columns that vary.
    """
    x, weight, total = samples.X, samples.weight, samples.total
    columns = np.flatnonzero(x.max(0) > x.min(0))
    if len(columns) > MAX_DIMENSION:
        raise ValueError(
            f"simplices are for up to {MAX_DIMENSION} inputs, got {len(columns)} columns that vary; use additive "
            'terms, basis="additive", or select columns.'
        )
    if len(columns) == 0:
        columns = np.zeros(1, dtype=np.int64)  # one element whose slope nothing determines: it stays flat
        scaler = ColumnScale((x[0, :1] + [0.0, 1.0],), (np.array([0.0, 1.0]),))
    else:
        scaler = fit_scale(x[:, columns], weight, scale)
    scaled = scaler.transform(np.ascontiguousarray(x[:, columns]))
    plane = _plane(scaled, samples.y, weight)
    y = samples.y - plane[0] - scaled @ plane[1:]
    square = weight @ y**2
    active = square > 1e-28 * (weight @ samples.y**2)

    max_nodes = min(max_nodes, math.ceil(total))  # more than samples only follow the noise
    mesh = _starting_mesh(len(columns), total, max_nodes)
    points = torch.from_numpy(scaled)
    located = _Samples(points, y, weight, *locate_in_mesh(points, mesh), total, square)
    search = SmoothingSearch(smoothing, seed)
    history: list[dict[str, float]] = []

    def fitted(mesh: SimplicialMesh, polish: bool = False) -> _State:
        state = _fit_on(mesh, located, active, search, polish)
        history.append(
            {
                "nodes": float(len(mesh.nodes)),
                "smoothing": math.exp(state.solved.log_smoothing),
                "edf": state.edf,
                "criterion": state.criterion,
            }
        )
        return state

    state = best = fitted(mesh)
    stale = 0
    while active.any() and len(state.mesh.nodes) < _FULL * max_nodes:
        finer = _refined(state, located, max_nodes) if stale < _PATIENCE else None
        if finer is None:
            break
        located.cell, located.local = descend(finer, located.cell, located.local)
        state = fitted(finer)
        stale = 0 if state.criterion < best.criterion * (1 - _BETTER) else stale + 1
        if state.criterion < best.criterion:
            best = state
    if active.any():
        located.cell, located.local = locate_in_mesh(points, best.mesh)
        best = fitted(best.mesh, polish=True)
    solved, problem = best.solved, best.problem
    about = "(|y - Phi c|^2 + smoothing c^T K c) / samples, over the coefficients on the final mesh"
    edf = np.full(y.shape[1], best.edf)
    return SimplicialFit(
        best.mesh, scaler, columns, solved.coefficients + plane[0] + best.mesh.nodes.numpy() @ plane[1:],
        math.exp(solved.log_smoothing), edf, best.noise, tuple(history),
        Optimality.of(float(solved.objective.sum()) / total, solved.gap(problem) / total, about),
        Posterior(solved.matrix), widening(total - edf),
    )  # fmt: skip


def _plane(x: Array, y: Array, weight: Array) -> Array:
    """The linear function that fits best, the flattest of several: `[d + 1, q]`. The penalty does not see it."""
    root = np.sqrt(weight)[:, None]
    mean, y_mean = weight @ x / weight.sum(), weight @ y / weight.sum()
    slope = np.linalg.lstsq((x - mean) * root, (y - y_mean) * root, rcond=1e-9)[0]
    return np.concatenate((y_mean[None] - mean @ slope, slope))


def _fit_on(
    mesh: SimplicialMesh, samples: _Samples, active: NDArray[np.bool_], search: SmoothingSearch, polish: bool
) -> _State:
    gram, moment = _normal_equations(mesh, samples)
    rough = _roughness(mesh)
    problem = Problem(gram, moment, samples.square, rough, samples.total, mesh.nodes.shape[1] + 1, active)
    solved, edf = search.run(problem, polish=polish)
    squares = residual_squares(problem, solved)
    if not active.any():
        criterion = 0.0
    elif search.smoothing == 0 or not problem.rough.nnz:
        criterion = cross_validation(problem, solved, edf)
    else:
        criterion = math.exp(evidence(problem, solved))
    return _State(mesh, solved, problem, squares, edf, criterion)


def _normal_equations(mesh: SimplicialMesh, samples: _Samples) -> tuple[sparse.csc_array, Array]:
    n = len(mesh.nodes)
    gram = sparse.csc_array((n, n))
    moment = np.zeros((n, samples.y.shape[1]))
    for start in range(0, len(samples.y), _CHUNK):
        part = slice(start, start + _CHUNK)
        indices = mesh.cells[samples.cell[part]].numpy()
        design = _design(indices, samples.local[part].numpy(), n)
        weighted = _design(indices, samples.local[part].numpy() * samples.weight[part, None], n)
        gram = gram + (weighted.T @ design).tocsc()
        moment += weighted.T @ samples.y[part]
    return gram, moment


def _roughness(mesh: SimplicialMesh) -> sparse.csc_array:
    """sum_F |F| / h_F [df/dn]_F^2: about the integral of the squared second derivatives."""
    facets = interior_facets(mesh.nodes, mesh.simplices)
    scale = (facets.areas / facets.widths).sqrt().unsqueeze(1)
    jumps = _design(facets.nodes.numpy(), (facets.coefficients * scale).numpy(), len(mesh.nodes))
    return (jumps.T @ jumps).tocsc()


def _refined(state: _State, samples: _Samples, max_nodes: int) -> SimplicialMesh | None:
    """The mesh with new nodes where they are worth most; None if none is, or there is no room."""
    mesh = state.mesh
    gain, edge = _gains(state, samples)
    worth = np.flatnonzero(gain > _SIGNIFICANT)
    if len(worth) == 0:
        return None
    worth = worth[np.argsort(-gain[worth], kind="stable")]
    share = gain[worth].cumsum()
    n_marked = min(int(np.searchsorted(share, _BULK * share[-1])) + 1, math.ceil(_GROWTH * len(mesh.nodes)))
    n_marked = min(n_marked, max_nodes - len(mesh.nodes))
    while n_marked > 0:
        chosen = torch.zeros(len(gain), dtype=torch.bool)
        chosen[torch.from_numpy(worth[:n_marked])] = True
        finer = bisect(mesh, mesh.leaves[chosen[edge]])
        if len(finer.nodes) <= max_nodes:
            return finer
        n_marked = n_marked // 2
    return None


def _residual(state: _State, samples: _Samples) -> Array:
    result = samples.y.copy()
    for start in range(0, len(result), _CHUNK):
        part = slice(start, start + _CHUNK)
        indices = state.mesh.cells[samples.cell[part]].numpy()
        result[part] -= _design(indices, samples.local[part].numpy(), len(state.mesh.nodes)) @ state.solved.coefficients
    return result


def _gains(state: _State, samples: _Samples) -> tuple[Array, torch.Tensor]:
    """What a node at the midpoint of each longest edge would take from the squared residual, over the noise.

    (b^T r)^2 / (b^T b) with b the new hat function on the simplices whose longest edge it is; noise alone makes it
    about 1.

    Returns:
        `[n_edges]`, and `[n_simplices]`: which of these edges is the longest of a simplex.
    """
    mesh, residual = state.mesh, _residual(state, samples)
    simplices = mesh.simplices
    ends = longest_edges(mesh.nodes, simplices)
    corners = simplices.gather(1, ends).sort(dim=1).values
    edge = (corners[:, 0] * len(mesh.nodes) + corners[:, 1]).unique(return_inverse=True)[1]
    n_edges = int(edge.max()) + 1
    place = torch.full((len(mesh.cells),), -1)
    place[mesh.leaves] = torch.arange(len(mesh.leaves))
    active = state.problem.active
    noise = np.maximum(state.noise[active], np.finfo(float).tiny)
    cross, power = np.zeros((len(noise), n_edges)), np.zeros(n_edges)
    for start in range(0, len(residual), _CHUNK):
        part = slice(start, start + _CHUNK)
        simplex = place[samples.cell[part]]
        bump = 2 * samples.local[part].gather(1, ends[simplex]).amin(1).numpy()
        which = edge[simplex].numpy()
        weighted = bump * samples.weight[part]
        power += np.bincount(which, weighted * bump, n_edges)
        for k, column in enumerate(residual[part][:, active].T):
            cross[k] += np.bincount(which, weighted * column, n_edges)
    gain = (cross**2 / noise[:, None]).mean(0)
    return np.divide(gain, power, out=np.zeros(n_edges), where=power > 1e-12 * power.max(initial=0)), edge


def _starting_mesh(d: int, total: float, max_nodes: int) -> SimplicialMesh:
    cells = _START_CELLS[d]
    while cells > 1 and (cells + 1) ** d > min(max_nodes, total) / 4:
        cells //= 2
    return grid_mesh(d, cells)
