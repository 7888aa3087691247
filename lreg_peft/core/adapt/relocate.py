"""Nodes leave where removing them costs least and enter where the residual is largest; the others slide."""

import torch
from torch import Tensor

from ..mesh import MIN_RELATIVE_ELEMENT, as_mesh, midpoints
from .indicators import mark, removal_cost

#: Largest slide of a node, relative to the element it slides into. Two neighbours sliding towards each other keep a
#: tenth of the element between them.
MAX_SHIFT = 0.45

# An element is worth splitting if it holds this much more than the median element. More than rounding, so that equal
# indicators never move a node.
_MARK_MARGIN = 1e-3


def relocate(
    nodes: Tensor,
    coefficients: Tensor,
    energy: Tensor,
    n_refine: int,
    moments: Tensor | None,
    gradient: Tensor | None,
    size: float,
) -> Tensor:
    """The `"relocate"` move."""
    fine, energy = nodes.double(), energy.double()
    n_nodes = nodes.shape[1]
    if moments is None:
        moments = energy.new_tensor((1 / 3, 1 / 6, 1 / 3)).expand(*energy.shape, 3)
    n_relocated = int(size * n_refine)
    if gradient is not None:
        slid = _slide(fine, coefficients, energy, moments.double(), gradient.double(), size * MAX_SHIFT)
    else:
        slid, n_relocated = fine, max(n_relocated, min(n_refine, 1))
    if n_relocated == 0:
        return as_mesh(slid, nodes)

    cost = removal_cost(nodes, coefficients, moments)
    # Coefficients still at zero make every node worthless: then the one amid the smallest residual goes first.
    rank = _ranks(cost, energy[:, :-1] + energy[:, 1:])
    free = independent_nodes(rank)
    leaving = (
        torch.where(free, rank, n_nodes).sort(dim=1, stable=True).indices[:, :n_relocated]
    )  # [components, n_relocated]

    lengths = fine.diff(dim=1)
    long_enough = lengths > 2 * MIN_RELATIVE_ELEMENT * (fine[:, -1:] - fine[:, :1])
    median = energy.sort(dim=1, descending=True).values[:, (n_nodes - 1) // 2, None]
    wanted = (energy > (1 + _MARK_MARGIN) * median) & long_enough
    marked = mark(torch.where(wanted, energy, -1.0), n_relocated)

    # The i-th cheapest node goes to the i-th richest element, if there are both.
    agreed = free.gather(1, leaving) & wanted.gather(1, marked)
    gone = torch.zeros_like(nodes, dtype=torch.bool).scatter_(1, leaving + 1, agreed)
    entering = torch.where(agreed, midpoints(slid, marked), torch.inf)
    kept = slid.masked_fill(gone, torch.inf)
    return as_mesh(torch.cat((kept, entering), dim=1).sort(dim=1).values[:, :n_nodes], nodes)


def _slide(
    nodes: Tensor, coefficients: Tensor, energy: Tensor, moments: Tensor, gradient: Tensor, most: float
) -> Tensor:
    """Interior nodes moved downhill by their correlation with the residual; see `adapt_mesh`. All fp64."""
    lengths = nodes.diff(dim=1)
    rise = coefficients.to(torch.promote_types(coefficients.dtype, torch.float32)).diff(dim=1)
    slope2 = rise.square().sum(dim=-1, dtype=torch.float64) / lengths.square()  # [components, n_nodes - 1]
    power = (slope2 * moments[..., 2])[:, :-1] + (slope2 * moments[..., 0])[:, 1:]  # K, [components, n_nodes - 2]
    scale = ((energy[:, :-1] + energy[:, 1:]) * power).sqrt()
    down = -gradient[:, 1:-1]
    correlation = torch.where(scale > 0, down / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0).clamp(-1, 1)
    room = torch.where(down > 0, lengths[:, 1:], lengths[:, :-1])
    inner = nodes[:, 1:-1] + most * correlation * room
    return torch.cat((nodes[:, :1], inner, nodes[:, -1:]), dim=1)


def independent_nodes(rank: Tensor) -> Tensor:
    """Interior nodes that can be removed together: no two of them are neighbours.

    Removing a node changes what its neighbours are worth, but hardly what the others are. The set contains every
    node that ranks below both its neighbours and at least a quarter of all nodes.

    Args:
        rank: `[components, n_nodes - 2]`, without equal neighbours; low ranks go first.

    Returns:
        bool `[components, n_nodes - 2]`.
    """
    # Nodes are paired (0, 1), (2, 3), ...; the lower of each pair wins. Winners of adjacent pairs can be neighbours,
    # and each has at most one such neighbour: the higher of the two steps back.
    n = rank.shape[1]
    padded = torch.nn.functional.pad(rank.double(), (1, 1), value=torch.inf)  # [components, n + 2]
    before, after = padded[:, :-2], padded[:, 2:]
    even = torch.arange(n, device=rank.device) % 2 == 0
    wins = rank < torch.where(even, after, before)
    framed = torch.nn.functional.pad(wins, (1, 1))
    rival = torch.where(even, framed[:, :-2], framed[:, 2:])
    return wins & ~(rival & (torch.where(even, before, after) < rank))


def remove(nodes: Tensor, cost: Tensor, n_remove: int) -> Tensor:
    """Remove up to `n_remove` of the cheapest nodes of every component, no two of them neighbours.

    Args:
        nodes: `[components, n_nodes]`, strictly increasing.
        cost: `[components, n_nodes - 2]`, from `removal_cost`.
        n_remove: at least 0. All components lose the same number of nodes: as many as the one with the fewest
            `independent_nodes` can spare, which is at least one.

    Returns:
        `[components, n_nodes - removed]`.
    """
    rank = _ranks(cost)
    free = independent_nodes(rank)
    n_remove = min(n_remove, int(free.sum(dim=1).min()))
    order = torch.where(free, rank, rank.shape[1]).sort(dim=1, stable=True).indices[:, :n_remove]
    gone = torch.zeros_like(nodes, dtype=torch.bool).scatter_(1, order + 1, True)
    return nodes.masked_fill(gone, torch.inf).sort(dim=1).values[:, : nodes.shape[1] - n_remove]


def _ranks(cost: Tensor, tie: Tensor | None = None) -> Tensor:
    """Place of each entry in the order by `cost`, then `tie`, then index: int64, all different within a row."""
    order = torch.arange(cost.shape[1], device=cost.device).expand(cost.shape)
    for key in (tie, cost):  # stable, so the last key sorts first
        if key is not None:
            order = order.gather(1, key.gather(1, order).sort(dim=1, stable=True).indices)
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(cost.shape[1], device=cost.device).expand(cost.shape)
    )
