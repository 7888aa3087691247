"""Mesh refinement-coarsening as published (Li, Cheng & Gu 2025, Algorithms 2-3)."""

import torch
from torch import Tensor

from ..mesh import as_mesh, check_nodes, coordinate_dtype, midpoints
from .indicators import check_indicator, mark


def resample(nodes: Tensor, hits: Tensor, n_refine: int, pseudocount: float) -> Tensor:
    """The `"paper"` move."""
    hits = hits.double()
    seen = hits.sum(dim=1, keepdim=True) + pseudocount > 0
    hits = torch.where(seen, hits, 1.0)  # equal masses keep the mesh
    fine, mass = refine(nodes.double(), mark(hits, n_refine), hits + pseudocount)
    return as_mesh(coarsen(fine, mass, nodes.shape[1]), nodes)


def refine(nodes: Tensor, marked: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Split marked elements at their midpoints and their mass in halves (Li, Cheng & Gu 2025, Algorithm 2).

    Args:
        nodes: `[components, n_nodes]`, strictly increasing; elements must be longer than one ulp of their ends.
        marked: int64 `[components, n_refine]`, distinct elements in each row, from `mark`.
        mass: `[components, n_nodes - 1]`.

    Returns:
        nodes: `[components, n_nodes + n_refine]`, every old node among them. `interpolate` to this mesh leaves a
            piecewise-linear function unchanged.
        mass: `[components, n_nodes - 1 + n_refine]`.

    Raises:
        ValueError: for invalid nodes or shapes that do not fit.
    """
    check_nodes(nodes)
    check_indicator(mass, nodes, "mass")
    mass = mass.to(coordinate_dtype(mass))
    if marked.ndim != 2 or marked.shape[0] != nodes.shape[0]:
        raise ValueError(
            f"marked must have shape [components, n_refine], got {tuple(marked.shape)} for nodes {tuple(nodes.shape)}."
        )
    fine = torch.cat((nodes, midpoints(nodes, marked)), dim=1).sort(dim=1).values
    # Fine elements in order, each named by the coarse element it lies in: a marked one appears twice.
    own = torch.arange(mass.shape[1], device=nodes.device).expand(mass.shape)
    parent = torch.cat((own, marked), dim=1).sort(dim=1).values
    parts = torch.ones_like(mass).scatter_(1, marked, 2.0)
    return fine, (mass / parts).gather(1, parent)


def coarsen(nodes: Tensor, mass: Tensor, n_nodes: int) -> Tensor:
    """Nodes that give every element the same mass (Li, Cheng & Gu 2025, Algorithm 3).

    The mass is spread evenly over each element; the new nodes are where its cumulative distribution, a
    piecewise-linear function on the given mesh, reaches equal steps.

    Args:
        nodes: `[components, n_fine]`, strictly increasing.
        mass: `[components, n_fine - 1]`, finite, non-negative, positive in sum.
        n_nodes: nodes of the new mesh, at least 2.

    Returns:
        `[components, n_nodes]` in the dtype of `nodes`, same ends, elements at least
        `MIN_RELATIVE_ELEMENT` of the mesh.

    Raises:
        ValueError: for invalid nodes or mass, or `n_nodes < 2`.
    """
    check_nodes(nodes)
    check_indicator(mass, nodes, "mass")
    if n_nodes < 2:
        raise ValueError(f"a mesh needs n_nodes >= 2, got n_nodes={n_nodes}.")
    if not (mass.sum(dim=1) > 0).all():
        i = int((~(mass.sum(dim=1) > 0)).nonzero()[0])
        raise ValueError(f"mass must be positive in sum, got {mass[i].tolist()} for component {i}.")
    fine = nodes.double()
    mass = mass.double() / mass.double().sum(dim=1, keepdim=True)
    # Cumulative mass at the right end of each element; rounding must not make it fall where the mass is zero.
    reached = _prefix_sums(mass).cummax(dim=1).values  # [components, n_fine - 1]
    before = torch.nn.functional.pad(reached[:, :-1], (1, 0))
    level = torch.arange(1, n_nodes - 1, dtype=torch.float64, device=nodes.device) / (n_nodes - 1) * reached[:, -1:]
    # The first element that reaches the level; it has mass, since the one before falls short.
    element = torch.searchsorted(reached[:, :-1].contiguous(), level.contiguous())  # [components, n_nodes - 2]
    before, reached = before.gather(1, element), reached.gather(1, element)
    share = (level - before) / (reached - before)
    inner = torch.lerp(fine.gather(1, element), fine.gather(1, element + 1), share)
    return as_mesh(torch.cat((fine[:, :1], inner, fine[:, -1:]), dim=1), nodes)


def _prefix_sums(values: Tensor) -> Tensor:
    """Inclusive sums along dim 1 in log2 rounds. `torch.cumsum` on a GPU does not fix the order of summation."""
    span = 1
    while span < values.shape[1]:
        values = torch.cat((values[:, :span], values[:, span:] + values[:, :-span]), dim=1)
        span *= 2
    return values
