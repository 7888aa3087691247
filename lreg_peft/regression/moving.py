"""Few nodes, placed by the data: moving ones, the best ones there are, or the published mesh update."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from .free_knots import fit_piecewise_linear
from .mesh1d import Array, evaluate, find
from .optimal import OptimalFit, exchanged, fit_optimal
from .report import Optimality, SumModel, widening
from .samples import Samples
from .terms import FittedTerm

Nodes = Literal["free", "optimal", "paper"]

# Node counts that generalised cross-validation chooses from.
_COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)

_MAX_OPTIMAL = 32
_PATIENCE = 2  # counts without a better score before larger ones are not tried

# Parameters that a node placed by the data counts for, its coefficient included (Friedman 1991, sec. 3.6).
_KNOT_COST = 3.0
_RIDGE = 1e-10


@dataclass(frozen=True, eq=False)
class _Candidate:
    nodes: Array  # [d, n_nodes]
    squares: float  # residual, all outputs
    losses: tuple[float, ...]
    optimality: Optimality | None = None

    def score(self, total: float) -> float:
        """Generalised cross-validation."""
        free = total - _parameters(self.nodes)
        return self.squares / free**2 if free > 0 else math.inf


def _parameters(nodes: Array) -> float:
    d, n_nodes = nodes.shape
    return 1 + d * (n_nodes - 1) + (_KNOT_COST - 1) * d * (n_nodes - 2)


def moving_model(
    samples: Samples,
    X: Array,
    y: Array,
    weight: Array,
    *,
    nodes: Nodes,
    n_nodes: int | None,
    max_nodes: int,
    verbose: bool,
) -> SumModel:
    """Fit functions of single features on `n_nodes` nodes each.

    Args:
        samples: distinct rows with weights, for "optimal".
        X: `[n, d]`, for the others all rows as they came.
        y: `[n, q]`.
        weight: `[n]`, equal where not zero, unless `nodes` is "optimal".
        nodes: how they are placed. "optimal" is for one feature and one output.
        n_nodes: None chooses by generalised cross-validation.
        max_nodes: most nodes of all features together.
        verbose: show a bar.

    Returns:
        The fit.

    Raises:
        ValueError: for what `nodes` cannot do.
    """
    if nodes == "optimal":
        X, y, weight = samples.X, samples.y, samples.weight
    else:
        X, y, weight = X[weight > 0], y[weight > 0], weight[weight > 0]
    total = samples.total if nodes == "optimal" else float(len(X))
    varying = np.flatnonzero(X.min(axis=0) < X.max(axis=0))
    if nodes == "optimal" and (X.shape[1] > 1 or y.shape[1] > 1):
        raise ValueError(
            f"nodes='optimal' is for one feature and one output, got {X.shape[1]} features and {y.shape[1]} outputs; "
            "use nodes='free' or 'smooth'."
        )
    if nodes != "optimal" and np.ptp(weight) > 0:
        raise ValueError(
            f"nodes={nodes!r} treats all samples alike, got differing sample_weight; use nodes='smooth' or 'optimal'."
        )
    counts = _counts(
        X[:, varying], n_nodes, min(max_nodes, _MAX_OPTIMAL) if nodes == "optimal" and n_nodes is None else max_nodes
    )
    if not len(varying) or not counts:
        return _constant(y, weight, total)
    inputs = X[:, varying]
    if nodes == "optimal":
        x, column = inputs[:, 0], y[:, 0]
        fits = fit_optimal(x, column, weight, counts)
        candidates = [_candidate(fit) for fit in fits]
    else:
        candidates = list(_moved(inputs, y, nodes, counts, verbose))
    best = min(candidates, key=lambda candidate: candidate.score(total))
    if nodes == "optimal":
        best = _candidate(exchanged(x, column, weight, fits[candidates.index(best)]))
    history = tuple(
        {
            "nodes": float(candidate.nodes.size),
            "mean_squared_error": candidate.squares / (weight.sum() * y.shape[1]),
            "criterion": candidate.score(total),
        }
        for candidate in candidates
    )
    if n_nodes is not None:
        history = tuple({"nodes": float(best.nodes.size), "loss": loss} for loss in best.losses)
    return _on_meshes(inputs, y, weight, total, varying, best, history)


def _counts(X: Array, n_nodes: int | None, max_nodes: int) -> list[int]:
    if not X.shape[1]:
        return []
    most = min(min(len(np.unique(column)) for column in X.T), max_nodes // X.shape[1])
    if n_nodes is not None:
        return [max(2, min(n_nodes, most))]
    return [count for count in _COUNTS if count == 2 or count <= min(most, len(X) // 3)]


def _moved(X: Array, y: Array, nodes: Nodes, counts: list[int], verbose: bool) -> Iterator[_Candidate]:
    low, span = X.min(axis=0), np.ptp(X, axis=0)
    scale = y.std() or 1.0
    scores: list[float] = []
    inputs, outputs = torch.from_numpy((X - low) / span), torch.from_numpy((y - y.mean(axis=0)) / scale)
    for count in tqdm(counts, desc="nodes", disable=not verbose):
        fit = fit_piecewise_linear(
            inputs, outputs, count,
            strategy="paper" if nodes == "paper" else "relocate", ridge=_RIDGE,
            knot_cost=1.0 if len(counts) == 1 else 3.0,
        )  # fmt: skip
        meshes = fit.nodes.numpy() * span[:, None] + low[:, None]
        meshes[:, 0], meshes[:, -1] = low, X.max(axis=0)
        factor = scale**2
        losses = tuple(loss * factor for loss in fit.losses)
        candidate = _Candidate(meshes, fit.loss * factor * y.size, losses)
        yield candidate
        scores.append(candidate.score(len(X)))
        if len(scores) > _PATIENCE and min(scores[-_PATIENCE:]) > min(scores):
            break


def _candidate(fit: OptimalFit) -> _Candidate:
    return _Candidate(fit.nodes[None], fit.objective, (fit.grid_objective, fit.objective), fit.optimality)


def _constant(y: Array, weight: Array, total: float) -> SumModel:
    mean = weight @ y / weight.sum()
    squares = weight @ (y - mean) ** 2
    noise = squares / max(total - 1, 1.0)
    optimality = Optimality.of(float(squares.sum()), 0.0, "sum of squared residuals, over the constant")
    return SumModel(
        (),
        mean,
        np.ones(len(mean)),
        noise,
        (),
        optimality,
        _ConstantVariance(noise / total),
        widening(total - 1 + 0 * noise),
    )


@dataclass(frozen=True)
class _ConstantVariance:
    variance: Array

    def __call__(self, X: Array) -> Array:
        return np.repeat(self.variance[None], len(X), axis=0)


@dataclass(frozen=True)
class _GivenNodes:
    """Posterior with a flat prior, the nodes taken as given."""

    features: NDArray[np.int64]
    meshes: Array
    inverse: Array
    noise: Array

    def __call__(self, X: Array) -> Array:
        design = _design(X[:, self.features], self.meshes)
        return ((design @ self.inverse) * design).sum(axis=1)[:, None] * self.noise


def _design(X: Array, meshes: Array) -> Array:
    """Hat functions of all features but the first of each, then a one: `[n, d (n_nodes - 1) + 1]`."""
    n, (d, n_nodes) = len(X), meshes.shape
    result = np.zeros((n, d, n_nodes))
    rows = np.arange(n)
    for i in range(d):
        element, right = find(X[:, i], meshes[i])
        result[rows, i, element] = 1 - right
        result[rows, i, element + 1] = right
    return np.concatenate((result[:, :, 1:].reshape(n, -1), np.ones((n, 1))), axis=1)


def _on_meshes(
    X: Array,
    y: Array,
    weight: Array,
    total: float,
    features: NDArray[np.int64],
    best: _Candidate,
    history: tuple[dict[str, float], ...],
) -> SumModel:
    """The least-squares fit on given meshes."""
    d, n_nodes = best.nodes.shape
    root = np.sqrt(weight)[:, None]
    design = _design(X, best.nodes) * root
    # Singular values of the design, without squaring its condition.
    _, singular, rows = np.linalg.svd(np.linalg.qr(design, mode="r"), full_matrices=False)
    known = singular > 1e-10 * singular[0]
    inverse = (rows[known].T / singular[known] ** 2) @ rows[known]
    theta = inverse @ (design.T @ (y * root))
    theta += inverse @ (design.T @ (y * root - design @ theta))
    rest = y * root - design @ theta
    squares = (rest**2).sum(axis=0)
    gradient = design.T @ rest
    gap = float(np.maximum((gradient * (inverse @ gradient)).sum(), 0.0))
    edf = float(known.sum())
    noise = squares / max(total - _parameters(best.nodes), 1e-3 * total)
    tables = np.concatenate((np.zeros((d, 1, y.shape[1])), theta[:-1].reshape(d, n_nodes - 1, -1)), axis=1)
    intercept = theta[-1].copy()
    terms: list[FittedTerm] = []
    for feature, mesh, table in zip(features, best.nodes, tables, strict=True):
        value = evaluate(X[:, len(terms)], mesh, table)
        mean = weight @ value / weight.sum()
        variance = weight @ (value - mean) ** 2 / weight.sum()
        table, intercept = table - mean, intercept + mean
        used = np.full(y.shape[1], edf if len(features) == 1 else n_nodes - 1.0)
        terms.append(FittedTerm((int(feature),), (mesh,), table, np.zeros((1, y.shape[1])), used, variance))
    about = "sum of squared residuals, over the values at the nodes"
    return SumModel(
        tuple(terms),
        intercept,
        np.full(y.shape[1], edf),
        noise,
        history,
        best.optimality or Optimality.of(float(squares.sum()), gap, about),
        _GivenNodes(np.asarray(features), best.nodes, inverse, noise),
        widening(np.full(y.shape[1], total - edf)),
    )
