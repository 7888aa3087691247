"""The best nodes for one feature and one output: a dynamic program, and a last round of exchanges."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .free_knots import fit_piecewise_linear
from .mesh1d import Array
from .optimal_knots import optimal_knots
from .report import Optimality

_RIDGE = 1e-10


@dataclass(frozen=True)
class OptimalFit:
    """Nodes for one count.

    Attributes:
        nodes: `[n_nodes]`.
        objective: weighted sum of squared residuals.
        grid_objective: the same for the best nodes from the grid.
        optimality: of those.
    """

    nodes: Array
    objective: float
    grid_objective: float
    optimality: Optimality


def fit_optimal(x: Array, y: Array, weight: Array, counts: Sequence[int]) -> list[OptimalFit]:
    """One fit for every number of nodes; `x`, `y`, `weight` `[n]`, weights positive."""
    low, span = x.min(), np.ptp(x)
    u, v, w = (torch.from_numpy(np.ascontiguousarray(a)) for a in ((x - low) / span, y, weight))
    about = "sum of squared residuals, over the values and all choices of nodes from a grid of quantiles"
    results = []
    for found in optimal_knots(u, v, counts, weight=w):
        gap = max(found.grid_objective - found.lower_bound, 0.0)
        results.append(
            OptimalFit(
                _in_units(found.nodes, x),
                found.objective,
                found.grid_objective,
                Optimality.of(found.grid_objective, gap, about),
            )
        )
    return results


def exchanged(x: Array, y: Array, weight: Array, fit: OptimalFit) -> OptimalFit:
    """`fit` after single nodes have changed places, if that helps; samples of equal weight only."""
    if np.ptp(weight) > 0 or len(fit.nodes) < 3:
        return fit
    low, span, scale = x.min(), np.ptp(x), y.std() or 1.0
    start = torch.from_numpy((fit.nodes - low) / span)[None]
    start[0, 0], start[0, -1] = 0.0, 1.0
    moved = fit_piecewise_linear(
        torch.from_numpy((x - low) / span)[:, None], torch.from_numpy((y - y.mean()) / scale), len(fit.nodes),
        start=start, ridge=_RIDGE, knot_cost=1.0,
    )  # fmt: skip
    objective = moved.loss * scale**2 * float(weight.sum())
    if objective >= fit.objective:
        return fit
    return OptimalFit(_in_units(moved.nodes[0], x), objective, fit.grid_objective, fit.optimality)


def _in_units(nodes: torch.Tensor, x: Array) -> Array:
    result: Array = nodes.numpy() * np.ptp(x) + x.min()
    result[0], result[-1] = x.min(), x.max()
    return result
