"""Regression on simplices: the basis P1(R^d) on a mesh that is refined where the residual says so.

After Li, Cheng & Gu (2025), appendix A, with the coefficients at their global optimum on every mesh. What is ours: a
roughness penalty on the jumps of the gradient, its weight by REML, marking by what a new node takes from the squared
residual, and a stop by the same restricted likelihood: generalised cross-validation keeps a mesh that interpolates
noise now and then.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import sparse
from scipy.sparse.linalg import SuperLU
from tqdm import tqdm

from .penalized import COST, Problem, Smoothing, SmoothingSearch, Solved, evidence, factorize, residual_squares
from .report import Optimality
from .samples import collect
from .scaling import ColumnScale, Scale, fit_scale
from .simplices import (
    SimplicialMesh,
    ancestors,
    bisect,
    coarsen,
    descend,
    grid_mesh,
    interior_facets,
    locate_in_mesh,
    longest_edges,
    removable_nodes,
)

#: More inputs than this and simplices are the wrong tool: a cube alone holds d! of them.
MAX_DIMENSION = 4

# Nodes of the first mesh: this many cells per axis, fewer for few samples.
_START_CELLS = {1: 32, 2: 4, 3: 2, 4: 1}

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
# When it would end on a mesh of at most so many nodes, up to so many bisections of all of it are looked at for a gain
# that no single one shows; it must be clear.
_AHEAD_NODES = 1000
_AHEAD = 3
_SIGNIFICANT_AHEAD = 8.0

# Nor does it go on for the room that is left when this share of max_nodes is there.
_FULL = 0.9

# Coarsening takes a node back if the squared residual rises by less than this many noise variances, and is not worth a
# fit for a smaller share of the nodes.
_WORTHLESS = 2.0
_FEW = 0.05
# Share by which the criterion may rise in all.
_RISE = 1e-3

_CHUNK = 1 << 17  # rows handled at once


@dataclass(frozen=True)
class Round:
    """One mesh of the refinement: number of nodes, log lambda, effective degrees of freedom, criterion (of REML, its
    exponential per sample)."""

    n_nodes: int
    log_smoothing: float
    edf: float
    criterion: float


@dataclass
class SimplicialFit:
    """A fitted continuous function, linear on every simplex of a mesh in scaled coordinates.

    Outside of the samples' range it goes on linearly: scaled coordinates with the last slope of each column's scale,
    the function as on the nearest simplex. Columns that were constant in the samples have no influence.

    Attributes:
        mesh: in scaled coordinates, on the unit cube; its dimension is the number of columns that vary.
        scale: from input units to scaled coordinates.
        columns: `[d]`, the columns of X that vary.
        coefficients: `[n_nodes, n_outputs]`, the values at the nodes.
        smoothing: lambda.
        edf: effective degrees of freedom, per output.
        noise_variance: `[n_outputs]`, for a row of the mean weight.
        history: every mesh that was tried.
        optimality: certificate of the coefficients.
        cross_validation: generalised, over the variance of y, mean over the outputs that vary.
    """

    mesh: SimplicialMesh
    scale: ColumnScale
    columns: np.ndarray
    n_features: int
    single_output: bool
    coefficients: np.ndarray
    smoothing: float
    edf: float
    noise_variance: np.ndarray
    history: tuple[Round, ...]
    optimality: Optimality
    cross_validation: float
    precision: sparse.csc_array = field(repr=False)
    _factor: SuperLU | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_factor": None}  # SuperLU's own memory; made again when asked for

    @property
    def nodes(self) -> np.ndarray:
        """`[n_nodes, d]` in units of the inputs that vary."""
        return self.scale.inverse_transform(self.mesh.nodes.numpy())

    @property
    def simplices(self) -> np.ndarray:
        """`[n_simplices, d + 1]`, indices of nodes."""
        return self.mesh.simplices.numpy()

    def locate(self, x: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Which coefficients a row takes and with which weights: `indices` and `weights`, both `[n_samples, d + 1]`.

        The prediction is `(weights[..., None] * coefficients[indices]).sum(1)`.
        """
        cell, weights = locate_in_mesh(torch.from_numpy(self._scaled(x)), self.mesh)
        return self.mesh.forest.cells[cell].numpy(), weights.numpy()

    def predict(self, x: ArrayLike, return_std: bool = False) -> Any:
        """The function at `x` `[n_samples, n_features]`.

        Args:
            x: finite.
            return_std: also the standard deviation of a new observation of mean weight there: of the noise, and of the
                function a posteriori, with the penalty as its prior (Wahba 1983).

        Returns:
            `[n_samples]` or `[n_samples, n_outputs]`, as `y` was; with `return_std` a pair of them.
        """
        x = _rows(x, self.n_features)
        mean = np.empty((len(x), self.coefficients.shape[1]))
        spread = np.empty(len(x)) if return_std else None
        for start in range(0, len(x), _CHUNK):
            part = slice(start, start + _CHUNK)
            indices, weights = self.locate(x[part])
            mean[part] = _design(indices, weights, len(self.coefficients)) @ self.coefficients
            if spread is not None:
                spread[part] = self._leverage(indices, weights)
        if self.single_output:
            mean = mean[:, 0]
        if spread is None:
            return mean
        std = np.sqrt(self.noise_variance * (1 + spread[:, None]))
        return mean, std[:, 0] if self.single_output else std

    def _leverage(self, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """phi^T H^-1 phi for rows: by solves for the rows, or for the nodes they touch where those are fewer."""
        if self._factor is None:
            self._factor = factorize(self.precision)
        n = self.precision.shape[0]
        touched, local = np.unique(indices, return_inverse=True)
        local = local.reshape(indices.shape)
        width = max(1, _CHUNK * 32 // n)  # 32 MiB
        result = np.zeros(len(indices))
        if len(indices) <= len(touched):
            for start in range(0, len(indices), width):
                part = slice(start, start + width)
                rows = _design(indices[part], weights[part], n).T.toarray()
                result[part] = (rows * self._factor.solve(rows)).sum(0)
            return result
        for start in range(0, len(touched), width):
            block = touched[start : start + width]
            unit = np.zeros((n, len(block)))
            unit[block, np.arange(len(block))] = 1
            columns = self._factor.solve(unit)
            row, place = np.nonzero((local >= start) & (local < start + len(block)))
            entries = columns[indices[row], (local[row, place] - start)[:, None]]  # [m, d + 1]
            np.add.at(result, row, weights[row, place] * (entries * weights[row]).sum(1))
        return result

    def _scaled(self, x: ArrayLike) -> np.ndarray:
        return self.scale.transform(_rows(x, self.n_features)[:, self.columns])


@dataclass
class _Samples:
    """Rows with weight, and where they are in the mesh."""

    points: torch.Tensor  # [n, d], scaled
    y: np.ndarray  # [n, n_outputs], centred
    weight: np.ndarray | None
    cell: torch.Tensor
    local: torch.Tensor  # [n, d + 1]
    total: float  # sum of the weights
    square: np.ndarray  # [n_outputs]


@dataclass
class _State:
    """A mesh and its fit."""

    mesh: SimplicialMesh
    solved: Solved
    problem: Problem
    residual_square: np.ndarray
    edf: float
    criterion: float

    @property
    def noise(self) -> np.ndarray:
        rest = max(self.problem.n_samples - self.edf, 1e-2 * self.problem.n_samples)
        return self.residual_square / rest


def fit_simplicial(
    x: ArrayLike,
    y: ArrayLike,
    sample_weight: ArrayLike | None = None,
    *,
    scale: Scale = "quantile",
    smoothing: Smoothing | float = "reml",
    max_nodes: int = 4000,
    random_state: int | np.random.RandomState | np.random.Generator | None = None,
    verbose: bool = False,
) -> SimplicialFit:
    """Fit y = f(x) with a continuous f that is linear on each simplex of an adaptive mesh.

    Minimises sum_i w_i |y_i - f(x_i)|^2 + lambda sum_F |F| / h_F [df/dn]_F^2 over the nodal values exactly, on each of
    a sequence of meshes; F are the facets, [df/dn]_F the jump of the gradient, |F| / h_F area over width. Refinement
    bisects the longest edges whose midpoint as a node would take most from the squared residual; it ends when the
    criterion that chooses lambda no longer falls. Nodes that the samples do not speak for are then taken back.

    Memory beyond the inputs is about 300 bytes a sample; 10^6 samples of 2 inputs take about 10 s on one core.

    Args:
        x: `[n_samples, n_features]`; up to 4 columns may vary.
        y: `[n_samples]` or `[n_samples, n_outputs]`.
        sample_weight: `[n_samples]`, not negative, see `collect`; zero removes a row.
        scale: "quantile" maps each column to [0, 1] by its quantiles, "minmax" linearly.
        smoothing: how lambda is chosen: "reml" (restricted maximum likelihood), "gcv" (generalised cross-validation),
            or lambda itself.
        max_nodes: refinement stays below.
        random_state: of the probe vectors that estimate traces, with "gcv" and during refinement; nothing else is
            random. None takes the same ones each time.
        verbose: show a progress bar of the nodes.

    Raises:
        ValueError: for shapes that do not fit, non-finite values, negative weights, no positive weight, options out of
            range, or more than 4 columns that vary.
    """
    x, y, weight, single = _checked(x, y, sample_weight)
    _check_options(scale, smoothing, max_nodes)
    samples = collect(x, y, np.ones(len(x)) if weight is None else weight)
    x, y, weight = samples.X, samples.y, samples.weight
    n_features = x.shape[1]
    columns = np.flatnonzero(x.max(0) > x.min(0))
    if len(columns) > MAX_DIMENSION:
        raise ValueError(
            f"simplices are for up to {MAX_DIMENSION} inputs, got {len(columns)} columns that vary; use additive "
            'terms, basis="additive", or select columns.'
        )
    if len(columns) == 0:
        columns = np.zeros(1, dtype=int)  # one element whose slope nothing determines: it stays flat
        scaler = ColumnScale((x[0, :1] + [0.0, 1.0],), (np.array([0.0, 1.0]),))
    else:
        scaler = fit_scale(x[:, columns], weight, scale)
    d = len(columns)
    total = samples.total
    centre = np.average(y, axis=0, weights=weight)
    y = y - centre
    square = (y**2).sum(0) if weight is None else weight @ y**2
    active = square > 1e-28 * total * np.maximum(centre**2, np.finfo(float).tiny)

    mesh = _starting_mesh(d, total, max_nodes)
    points = torch.from_numpy(scaler.transform(x[:, columns]))
    located = _Samples(points, y, weight, *locate_in_mesh(points, mesh), total, square)
    search = SmoothingSearch(smoothing, _seed(random_state))
    history: list[Round] = []

    def fitted(mesh: SimplicialMesh, polish: bool = False) -> _State:
        state = _fit_on(mesh, located, active, search, polish)
        history.append(Round(len(mesh.nodes), state.solved.log_smoothing, state.edf, state.criterion))
        return state

    state = best = fitted(mesh)
    stale, looked_from = 0, None
    with tqdm(total=max_nodes, initial=len(mesh.nodes), disable=not verbose, desc="nodes", unit="") as bar:
        while active.any() and len(state.mesh.nodes) < _FULL * max_nodes:
            finer = _refined(state, located, max_nodes) if stale < _PATIENCE else None
            if finer is None and looked_from is not best:  # once from each mesh, or this would not end
                stale, looked_from = 0, best
                located.cell, located.local = locate_in_mesh(points, best.mesh)
                finer = _looked_ahead(best, located, max_nodes)
            if finer is None:
                break
            located.cell, located.local = descend(finer.forest, located.cell, located.local)
            state = fitted(finer)
            bar.update(len(finer.nodes) - bar.n)
            stale = 0 if state.criterion < best.criterion * (1 - _BETTER) else stale + 1
            if state.criterion < best.criterion:
                best = state
    if active.any():
        best = _coarsened(best, located, fitted)
        located.cell, located.local = locate_in_mesh(points, best.mesh)
        best = fitted(best.mesh, polish=True)
    return _finished(best, history, scaler, columns, n_features, single, centre, total)


def _finished(
    state: _State,
    history: list[Round],
    scaler: ColumnScale,
    columns: np.ndarray,
    n_features: int,
    single: bool,
    centre: np.ndarray,
    total: float,
) -> SimplicialFit:
    solved, problem = state.solved, state.problem
    objective = float(solved.objective.sum())
    rest = problem.moment - solved.matrix @ solved.coefficients
    gap = float((rest * solved.factor.solve(rest)).sum())
    return SimplicialFit(
        mesh=state.mesh,
        scale=scaler,
        columns=columns,
        n_features=n_features,
        single_output=single,
        coefficients=solved.coefficients + centre,
        smoothing=math.exp(solved.log_smoothing),
        edf=state.edf,
        noise_variance=state.noise,
        history=tuple(history),
        optimality=Optimality.of(
            objective / total,
            gap / total,
            "(|y - Phi c|^2 + smoothing c^T K c) / samples, over the coefficients on the final mesh",
        ),
        cross_validation=_cross_validation(problem, state.residual_square, state.edf, 1.0),
        precision=solved.matrix,
    )


def _coarsened(best: _State, samples: _Samples, fitted: Callable[[SimplicialMesh], _State]) -> _State:
    """Undo bisections whose nodes the samples do not speak for, as long as the criterion hardly rises."""
    bound = best.criterion * (1 + _RISE)
    while True:
        candidates = removable_nodes(best.mesh).numpy()
        middle, first, second = candidates.T
        c = best.solved.coefficients[:, best.problem.active]
        surplus = c[middle] - (c[first] + c[second]) / 2
        # The objective rises by at most this, were the node put on the line between the ends of its edge.
        rise = surplus**2 * best.solved.matrix.diagonal()[middle, None]
        worth = (rise / np.maximum(best.noise[best.problem.active], np.finfo(float).tiny)).mean(1)
        removed = middle[worth < _WORTHLESS]
        if len(removed) < _FEW * len(best.mesh.nodes):
            return best
        mesh, _ = coarsen(best.mesh, torch.from_numpy(removed))
        samples.cell, samples.local = locate_in_mesh(samples.points, mesh)
        state = fitted(mesh)
        if state.criterion > bound:
            return best
        best = state


def _fit_on(
    mesh: SimplicialMesh, samples: _Samples, active: np.ndarray, search: SmoothingSearch, polish: bool
) -> _State:
    gram, moment = _normal_equations(mesh, samples)
    rough = _roughness(mesh)
    problem = Problem(gram, moment, samples.square, rough, samples.total, mesh.nodes.shape[1] + 1, active)
    solved, edf = search.run(problem, polish=polish)
    squares = residual_squares(problem, solved)
    if not active.any():
        criterion = 0.0
    elif search.smoothing in ("gcv", 0) or not problem.rough.nnz:
        criterion = _cross_validation(problem, squares, edf, COST if search.smoothing == "gcv" else 1.0)
    else:
        criterion = math.exp(evidence(problem, solved))
    return _State(mesh, solved, problem, squares, edf, criterion)


def _cross_validation(problem: Problem, squares: np.ndarray, edf: float, cost: float) -> float:
    """Generalised, over the variance of y, mean over the outputs that vary."""
    relative = squares[problem.active] / problem.square[problem.active]
    return float(relative.mean() / max(1 - cost * edf / problem.n_samples, 1e-2) ** 2) if len(relative) else 0.0


def _normal_equations(mesh: SimplicialMesh, samples: _Samples) -> tuple[sparse.csc_array, np.ndarray]:
    n = len(mesh.nodes)
    gram = sparse.csc_array((n, n))
    moment = np.zeros((n, samples.y.shape[1]))
    for start in range(0, len(samples.y), _CHUNK):
        part = slice(start, start + _CHUNK)
        indices = mesh.forest.cells[samples.cell[part]].numpy()
        design = _design(indices, samples.local[part].numpy(), n)
        weighted = (
            design
            if samples.weight is None
            else _design(indices, samples.local[part].numpy() * samples.weight[part, None], n)
        )
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
    gain, edge = _gains(mesh, samples.cell, samples.local, _residual(state, samples), samples.weight, state)
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


def _looked_ahead(state: _State, samples: _Samples, max_nodes: int) -> SimplicialMesh | None:
    """As `_refined`, where a node is worth something only after others: samples that fill but a corner of a simplex."""
    old = state.mesh
    if len(old.nodes) > _AHEAD_NODES:
        return None
    residual = _residual(state, samples)
    mesh, cell, local = old, samples.cell, samples.local
    for _ in range(_AHEAD):
        mesh = bisect(mesh, mesh.leaves)
        cell, local = descend(mesh.forest, cell, local)
        gain, edge = _gains(mesh, cell, local, residual, samples.weight, state)
        # The largest of so many squares of normal deviates is about 2 log of their number.
        found = torch.from_numpy(gain > _SIGNIFICANT_AHEAD + 2 * math.log(len(gain)))
        marked = ancestors(mesh.forest, mesh.leaves[found[edge]], len(old.forest.cells))
        if len(marked):
            finer = bisect(old, marked)
            return finer if len(finer.nodes) <= max_nodes else None
    return None


def _residual(state: _State, samples: _Samples) -> np.ndarray:
    result = samples.y.copy()
    for start in range(0, len(result), _CHUNK):
        part = slice(start, start + _CHUNK)
        indices = state.mesh.forest.cells[samples.cell[part]].numpy()
        result[part] -= _design(indices, samples.local[part].numpy(), len(state.mesh.nodes)) @ state.solved.coefficients
    return result


def _gains(
    mesh: SimplicialMesh,
    cell: torch.Tensor,
    local: torch.Tensor,
    residual: np.ndarray,
    weight: np.ndarray | None,
    state: _State,
) -> tuple[np.ndarray, torch.Tensor]:
    """What a node at the midpoint of each longest edge would take from the squared residual, over the noise.

    (b^T r)^2 / (b^T b) with b the new hat function on the simplices whose longest edge it is; noise alone makes it
    about 1.

    Returns:
        `[n_edges]`, and `[n_simplices]`: which of these edges is the longest of a simplex.
    """
    simplices = mesh.simplices
    ends = longest_edges(mesh.nodes, mesh.levels, simplices)
    corners = simplices.gather(1, ends).sort(dim=1).values
    edge = (corners[:, 0] * len(mesh.nodes) + corners[:, 1]).unique(return_inverse=True)[1]
    n_edges = int(edge.max()) + 1
    place = torch.full((len(mesh.forest.cells),), -1)
    place[mesh.leaves] = torch.arange(len(mesh.leaves))
    active = state.problem.active
    noise = np.maximum(state.noise[active], np.finfo(float).tiny)
    cross, power = np.zeros((len(noise), n_edges)), np.zeros(n_edges)
    for start in range(0, len(residual), _CHUNK):
        part = slice(start, start + _CHUNK)
        simplex = place[cell[part]]
        bump = 2 * local[part].gather(1, ends[simplex]).amin(1).numpy()
        which = edge[simplex].numpy()
        weighted = bump if weight is None else bump * weight[part]
        power += np.bincount(which, weighted * bump, n_edges)
        for k, column in enumerate(residual[part][:, active].T):
            cross[k] += np.bincount(which, weighted * column, n_edges)
    gain = (cross**2 / noise[:, None]).mean(0)
    return np.divide(gain, power, out=np.zeros(n_edges), where=power > 1e-12 * power.max(initial=0)), edge


def _design(indices: np.ndarray, weights: np.ndarray, n: int) -> sparse.csr_array:
    """Rows with the given entries: `[len(indices), n]`."""
    rows, width = indices.shape
    pointers = np.arange(0, rows * width + 1, width)
    return sparse.csr_array((weights.ravel(), indices.ravel(), pointers), shape=(rows, n))


def _starting_mesh(d: int, total: float, max_nodes: int) -> SimplicialMesh:
    cells = _START_CELLS[d]
    while cells > 1 and (cells + 1) ** d > min(max_nodes, total / 4):
        cells //= 2
    return grid_mesh(d, cells)


def _seed(random_state: int | np.random.RandomState | np.random.Generator | None) -> int:
    if random_state is None:
        return 0
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31))
    return int(np.random.default_rng(random_state).integers(2**31))


def _rows(x: ArrayLike, n_features: int | None = None) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or (n_features is not None and x.shape[1] != n_features):
        width = "n_features" if n_features is None else f"n_features={n_features}"
        raise ValueError(f"x must have shape [n_samples, {width}], got {x.shape}.")
    if not np.isfinite(x).all():
        raise ValueError("x must be finite, got NaN or infinite values.")
    return x


def _checked(
    x: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, bool]:
    """Arrays in fp64 without rows of weight zero, and whether y was one column without a second axis."""
    x = _rows(x)
    y = np.asarray(y, dtype=np.float64)
    single = y.ndim == 1
    if y.ndim not in (1, 2) or len(y) != len(x) or 0 in (*x.shape, *y.shape):
        raise ValueError(
            f"x must have shape [n_samples, n_features] and y [n_samples] or [n_samples, n_outputs], none empty, got "
            f"{x.shape} and {y.shape}."
        )
    if not np.isfinite(y).all():
        raise ValueError("y must be finite, got NaN or infinite values.")
    y = y.reshape(len(y), -1)
    if sample_weight is None:
        return x, y, None, single
    weight = np.asarray(sample_weight, dtype=np.float64)
    if weight.shape != (len(x),):
        raise ValueError(f"sample_weight must have shape [n_samples] = ({len(x)},), got {weight.shape}.")
    if not np.isfinite(weight).all() or (weight < 0).any() or not (weight > 0).any():
        raise ValueError("sample_weight must be finite, not negative, and positive somewhere.")
    there = weight > 0
    return x[there], y[there], weight[there], single


def _check_options(scale: str, smoothing: Smoothing | float, max_nodes: int) -> None:
    if scale not in get_args(Scale):
        raise ValueError(f"scale must be one of {get_args(Scale)}, got {scale!r}.")
    if isinstance(smoothing, str):
        if smoothing not in get_args(Smoothing):
            raise ValueError(f"smoothing must be a number >= 0 or one of {get_args(Smoothing)}, got {smoothing!r}.")
    elif not (math.isfinite(smoothing) and smoothing >= 0):
        raise ValueError(f"smoothing must be a number >= 0 or one of {get_args(Smoothing)}, got {smoothing}.")
    if max_nodes < 2**MAX_DIMENSION:
        raise ValueError(f"max_nodes must be at least {2**MAX_DIMENSION}, got {max_nodes}.")
