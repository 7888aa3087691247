"""Meshes that follow the residual: mark, refine, coarsen, interpolate.

Two strategies move the nodes of an LReg shortcut while it trains:

- `"mrc"`: mesh refinement-coarsening as published (Li, Cheng & Gu 2025, Algorithms 1-3);
- `"exchange"` (default): nodes leave where removing them costs least and enter where the residual is largest, and
  the nodes that stay slide along the gradient of the loss in their positions.

All functions are pure, batched over components and return new tensors. Decisions are taken in fp64 from elementwise
arithmetic, fixed-order scans and stable sorts, with ties broken by index, so that processes holding identical inputs
get bit-identical nodes.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .mesh import MIN_RELATIVE_ELEMENT, check_nodes, coordinate_dtype, locate, separate_nodes

Strategy = Literal["exchange", "mrc"]

#: Largest slide of a node, relative to the element it slides into. Two neighbours sliding towards each other keep a
#: tenth of the element between them.
MAX_SHIFT = 0.45

# An element is worth splitting if it holds this much more than the median element. More than rounding, so that equal
# indicators never move a node.
_MARK_MARGIN = 1e-3

# Added to the diagonal of a mass matrix, relative to its mean: elements without samples leave it singular.
_MASS_RIDGE = 1e-9
_SMALLEST_MASS = 1e-90  # stands in for the mean when no element has samples


@dataclass(frozen=True)
class AdaptedMesh:
    """The result of one mesh update.

    Attributes:
        nodes: `[components, dof]`, the new mesh; shape, dtype and ends of the old one.
        old_nodes: `[components, dof]`, the mesh it replaces.
    """

    nodes: Tensor
    old_nodes: Tensor

    def carry(self, values: Tensor) -> Tensor:
        """Bring a per-node tensor `[components, dof, ...]` from the old mesh to the new one; see `interpolate`."""
        return interpolate(self.old_nodes, self.nodes, values)


def element_sums(element: Tensor, values: Tensor, n_elements: int) -> Tensor:
    """Sum a quantity of the samples over the element that holds each: hit counts, residual energy.

    Args:
        element: int64 `[..., components]`, from `locate`.
        values: broadcastable to the shape of `element`, one value per sample and component.
        n_elements: `dof - 1`.

    Returns:
        `[components, n_elements]`, fp32 (fp64 for fp64 values). On a GPU the order of summation, and with it the last
        bit, may change between calls: reduce over processes first, then adapt from the reduced tensor.
    """
    components = element.shape[-1]
    index = (element + torch.arange(components, device=element.device) * n_elements).reshape(-1)
    flat = values.to(coordinate_dtype(values)).expand(element.shape).reshape(-1)
    return flat.new_zeros(components * n_elements).index_add_(0, index, flat).view(components, n_elements)


def element_moments(element: Tensor, local: Tensor, n_elements: int) -> Tensor:
    """Second moments of the two hat functions alive in each element: the mass matrix, element by element.

    Args:
        element: int64 `[..., components]`, from `locate`.
        local: `[..., components]`, from `locate`.
        n_elements: `dof - 1`.

    Returns:
        `[components, n_elements, 3]`: the sums over samples of `(1 - local)**2`, `local * (1 - local)`, `local**2`.
    """
    products = ((1 - local).square(), local * (1 - local), local.square())
    return torch.stack([element_sums(element, product, n_elements) for product in products], dim=-1)


def node_gradient(element: Tensor, local: Tensor, coords_gradient: Tensor, n_elements: int) -> Tensor:
    """Gradient of the loss in the node positions, from its gradient in the coordinates.

    Sliding node j by s lowers the function by s times its slope times psi_j on both sides of the node, so that
    dL/dp_j = - sum over samples of psi_j(u) dL/du: a scatter of what the backward pass has already computed.

    Args:
        element: int64 `[..., components]`, from `locate`.
        local: `[..., components]`, from `locate`.
        coords_gradient: `[..., components]`, dL/du.
        n_elements: `dof - 1`.

    Returns:
        `[components, n_elements + 1]`, one entry per node (`adapt_mesh` ignores the two ends, which are fixed).
    """
    left = element_sums(element, coords_gradient * (1 - local), n_elements)
    right = element_sums(element, coords_gradient * local, n_elements)
    return -_assemble(left, right)


def interpolate(nodes_old: Tensor, nodes_new: Tensor, values: Tensor) -> Tensor:
    """Values at the new nodes of the piecewise-linear functions that have `values` at the old ones.

    The one operator between meshes, for coefficients and for optimiser moments: a convex combination of two old
    values, so that non-negative values stay non-negative; a node present in both meshes keeps its value exactly.

    Args:
        nodes_old: `[components, dof_old]`, strictly increasing.
        nodes_new: `[components, dof_new]`; clamped to the ends of the old mesh.
        values: `[components, dof_old, ...]`.

    Returns:
        `[components, dof_new, ...]` in the dtype of `values`.

    Raises:
        ValueError: for invalid nodes or shapes that do not fit; the message gives the shapes.
    """
    check_nodes(nodes_old)
    check_nodes(nodes_new)
    if nodes_new.shape[0] != nodes_old.shape[0] or values.shape[:2] != nodes_old.shape:
        raise ValueError(
            f"values must have shape [components, dof_old, ...] and both meshes the same components, got values "
            f"{tuple(values.shape)}, nodes_old {tuple(nodes_old.shape)} and nodes_new {tuple(nodes_new.shape)}."
        )
    element, local = locate(nodes_new.T, nodes_old, validate=False)  # [dof_new, components]
    element, local = element.T, local.T  # [components, dof_new]
    row = torch.arange(values.shape[0], device=values.device).unsqueeze(1)
    weight = local.reshape(*local.shape, *[1] * (values.ndim - 2))
    dtype = torch.promote_types(values.dtype, weight.dtype)
    left, right = values[row, element].to(dtype), values[row, element + 1].to(dtype)  # [components, dof_new, ...]
    return torch.lerp(left, right, weight.to(dtype)).to(values.dtype)


def mark(indicator: Tensor, n_refine: int) -> Tensor:
    """The elements with the largest indicator.

    Args:
        indicator: `[components, elements]`, without NaN.
        n_refine: elements to mark per component, in `[0, elements]`.

    Returns:
        int64 `[components, n_refine]`, by decreasing indicator; equal ones by increasing index.

    Raises:
        ValueError: if `n_refine` is out of range or `indicator` is not two-dimensional or has NaN.
    """
    if indicator.ndim != 2 or not 0 <= n_refine <= indicator.shape[-1]:
        raise ValueError(
            f"indicator must have shape [components, elements] and n_refine lie in [0, elements], got "
            f"{tuple(indicator.shape)} and n_refine={n_refine}."
        )
    if torch.isnan(indicator).any():
        raise ValueError(f"indicator must not be NaN, got NaN at {torch.isnan(indicator).nonzero()[0].tolist()}.")
    return indicator.sort(dim=1, descending=True, stable=True).indices[:, :n_refine]


def refine(nodes: Tensor, marked: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Split marked elements at their midpoints and their mass in halves (Li, Cheng & Gu 2025, Algorithm 2).

    Args:
        nodes: `[components, dof]`, strictly increasing; elements must be longer than one ulp of their ends.
        marked: int64 `[components, n_refine]`, distinct elements in each row, from `mark`.
        mass: `[components, dof - 1]`.

    Returns:
        nodes: `[components, dof + n_refine]`, every old node among them. `interpolate` to this mesh leaves a
            piecewise-linear function unchanged.
        mass: `[components, dof - 1 + n_refine]`.

    Raises:
        ValueError: for invalid nodes or shapes that do not fit.
    """
    check_nodes(nodes)
    _check_indicator(mass, nodes, "mass")
    mass = mass.to(coordinate_dtype(mass))
    if marked.ndim != 2 or marked.shape[0] != nodes.shape[0]:
        raise ValueError(
            f"marked must have shape [components, n_refine], got {tuple(marked.shape)} for nodes {tuple(nodes.shape)}."
        )
    fine = torch.cat((nodes, _midpoints(nodes, marked)), dim=1).sort(dim=1).values
    # Fine elements in order, each named by the coarse element it lies in: a marked one appears twice.
    own = torch.arange(mass.shape[1], device=nodes.device).expand(mass.shape)
    parent = torch.cat((own, marked), dim=1).sort(dim=1).values
    parts = torch.ones_like(mass).scatter_(1, marked, 2.0)
    return fine, (mass / parts).gather(1, parent)


def coarsen(nodes: Tensor, mass: Tensor, dof: int) -> Tensor:
    """Nodes that give every element the same mass (Li, Cheng & Gu 2025, Algorithm 3).

    The mass is spread evenly over each element; the new nodes are where its cumulative distribution, a
    piecewise-linear function on the given mesh, reaches equal steps.

    Args:
        nodes: `[components, dof_fine]`, strictly increasing.
        mass: `[components, dof_fine - 1]`, finite, non-negative, positive in sum.
        dof: nodes of the new mesh, at least 2.

    Returns:
        `[components, dof]` in the dtype of `nodes`, same ends, elements at least `MIN_RELATIVE_ELEMENT` of the mesh.

    Raises:
        ValueError: for invalid nodes or mass, or `dof < 2`.
    """
    check_nodes(nodes)
    _check_indicator(mass, nodes, "mass")
    if dof < 2:
        raise ValueError(f"a mesh needs dof >= 2, got dof={dof}.")
    if not (mass.sum(dim=1) > 0).all():
        i = int((~(mass.sum(dim=1) > 0)).nonzero()[0])
        raise ValueError(f"mass must be positive in sum, got {mass[i].tolist()} for component {i}.")
    fine = nodes.double()
    mass = mass.double() / mass.double().sum(dim=1, keepdim=True)
    # Cumulative mass at the right end of each element; rounding must not make it fall where the mass is zero.
    reached = _prefix_sums(mass).cummax(dim=1).values  # [components, dof_fine - 1]
    before = torch.nn.functional.pad(reached[:, :-1], (1, 0))
    level = torch.arange(1, dof - 1, dtype=torch.float64, device=nodes.device) / (dof - 1) * reached[:, -1:]
    # The first element that reaches the level; it has mass, since the one before falls short.
    element = torch.searchsorted(reached[:, :-1].contiguous(), level.contiguous())  # [components, dof - 2]
    before, reached = before.gather(1, element), reached.gather(1, element)
    share = (level - before) / (reached - before)
    inner = torch.lerp(fine.gather(1, element), fine.gather(1, element + 1), share)
    return _as_mesh(torch.cat((fine[:, :1], inner, fine[:, -1:]), dim=1), nodes)


def removal_cost(nodes: Tensor, coefficients: Tensor, moments: Tensor) -> Tensor:
    """What each interior node is worth: the squared change of the function when it goes and the rest readjusts.

    Without node j the coefficients must satisfy a^T c = 0, a = (w, -1, 1 - w) on nodes j-1, j, j+1 being the
    second-difference row of the mesh. The closest such function, in the sum of squares over the samples, is
    delta_j = |a^T c|^2 / (a^T H^-1 a) away, H the mass matrix of the component (Li, Cheng & Gu 2025 resample a
    density instead). Where c is a least-squares solution, the residual sum of squares rises by exactly this, the
    other components held fixed.

    Only the band of H^-1 next to its diagonal is needed. It follows from the pivots of H taken from the left and
    from the right, so that the cost is O(components * dof * (out_features + log dof)).

    Args:
        nodes: `[components, dof]`, strictly increasing.
        coefficients: `[components, dof, out_features]`.
        moments: `[components, dof - 1, 3]`, from `element_moments`; its scale sets the scale of the result.

    Returns:
        fp64 `[components, dof - 2]`.

    Raises:
        ValueError: for invalid nodes or shapes that do not fit.
    """
    check_nodes(nodes)
    _check_coefficients(coefficients, nodes)
    _check_moments(moments, nodes)
    share = _left_share(nodes.double())  # [components, dof - 2]
    # The jump is a difference of neighbours: taken in the working precision, squared and summed in fp64.
    working = coefficients.to(torch.promote_types(coefficients.dtype, torch.float32))
    line = torch.lerp(working[:, :-2], working[:, 2:], share.unsqueeze(-1).to(working.dtype))
    jump = (line - working[:, 1:-1]).square().sum(dim=-1, dtype=torch.float64)  # |a^T c|^2

    moments = moments.double()
    diagonal = _assemble(moments[..., 0], moments[..., 2])  # [components, dof]
    off = moments[..., 1]  # [components, dof - 1]
    diagonal = diagonal + _MASS_RIDGE * diagonal.mean(dim=1, keepdim=True).clamp_min(_SMALLEST_MASS)
    from_left = _pivots(diagonal, off)
    from_right = _pivots(diagonal.flip(1), off.flip(1)).flip(1)
    inverse0 = 1 / (from_left + from_right - diagonal)  # (H^-1)_jj
    step = -off / from_right[:, 1:]  # (H^-1)_{j+1, i} = step_j (H^-1)_{j, i} for every i <= j
    inverse1 = step * inverse0[:, :-1]  # (H^-1)_{j+1, j}
    inverse2 = step[:, 1:] * inverse1[:, :-1]  # (H^-1)_{j+2, j}
    left, right = 1 - share, share  # weights of nodes j - 1 and j + 1
    quadratic = (
        left.square() * inverse0[:, :-2]
        + inverse0[:, 1:-1]
        + right.square() * inverse0[:, 2:]
        - 2 * left * inverse1[:, :-1]
        - 2 * right * inverse1[:, 1:]
        + 2 * left * right * inverse2
    )
    return jump / quadratic


def independent_nodes(rank: Tensor) -> Tensor:
    """Interior nodes that can be removed together: no two of them are neighbours.

    Removing a node changes what its neighbours are worth, but hardly what the others are. The set contains every
    node that ranks below both its neighbours and at least a quarter of all nodes.

    Args:
        rank: `[components, dof - 2]`, without equal neighbours; low ranks go first.

    Returns:
        bool `[components, dof - 2]`.
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
        nodes: `[components, dof]`, strictly increasing.
        cost: `[components, dof - 2]`, from `removal_cost`.
        n_remove: at least 0. All components lose the same number of nodes: as many as the one with the fewest
            `independent_nodes` can spare, which is at least one.

    Returns:
        `[components, dof - removed]`.
    """
    rank = _ranks(cost)
    free = independent_nodes(rank)
    n_remove = min(n_remove, int(free.sum(dim=1).min()))
    order = torch.where(free, rank, rank.shape[1]).sort(dim=1, stable=True).indices[:, :n_remove]
    gone = torch.zeros_like(nodes, dtype=torch.bool).scatter_(1, order + 1, True)
    return nodes.masked_fill(gone, torch.inf).sort(dim=1).values[:, : nodes.shape[1] - n_remove]


def adapt_mesh(
    nodes: Tensor,
    coefficients: Tensor,
    indicator: Tensor,
    *,
    strategy: Strategy = "exchange",
    n_refine: int | None = None,
    pseudocount: float = 1.0,
    moments: Tensor | None = None,
    node_gradient: Tensor | None = None,
    size: float = 1.0,
) -> AdaptedMesh:
    """Propose a mesh that follows the residual. Whether to keep it is the caller's decision.

    Decide after the coefficients have been refitted or trained for some steps: a node that enters does not change the
    function yet, whereas the one that leaves does.

    `"mrc"` (Li, Cheng & Gu 2025, Algorithms 2-3): `pseudocount` is added to each hit count, the most-hit elements are
    split, and the new nodes are the quantiles of the resulting density. (Halving an element and its count does not
    change a density, so `n_refine` does not influence the new nodes.)

    `"exchange"`: up to `n_refine` nodes per component move from where `removal_cost` is lowest to the midpoints of the
    elements with the largest indicator, provided these hold more than the median element. With `node_gradient`, the
    other nodes slide downhill, each by `size * MAX_SHIFT * r` of the element it slides into, where

        r_j = |dL/dp_j| / sqrt(E_j K_j) in [0, 1],
        K_j = sum over samples of |slope|^2 psi_j^2,  E_j = indicator of the two elements at the node,

    is the correlation, over the samples at the node, between the residual and what sliding would change. It needs
    no knowledge of the scale or the curvature of the loss, and vanishes where the position is optimal for coefficients
    that are.

    Args:
        nodes: `[components, dof]`, strictly increasing, fp32 or fp64. With dof 2 nothing moves.
        coefficients: `[components, dof, out_features]`.
        indicator: `[components, dof - 1]`, non-negative: for `"mrc"` the hits of the hardest samples, for
            `"exchange"` the sum over the samples in the element of the squared gradient at the output.
        strategy: `"exchange"` or `"mrc"`.
        n_refine: elements to split per component; None takes an eighth of the nodes, at least one. More than the
            mesh has room for is reduced to that.
        pseudocount: hits added to every element of the given mesh, before splitting (`"mrc"` only).
        moments: `[components, dof - 1, 3]`, from `element_moments` over the samples that made the indicator
            (`"exchange"` only); None assumes the same number of samples, evenly spread, in every element.
        node_gradient: `[components, dof]`, from the function of that name, in the units of the gradients in the
            indicator (`"exchange"` only); needs `moments`.
        size: in (0, 1], scales the move (`"exchange"` only): halve it when a move is refused. Once it has come below
            `1 / n_refine`, nodes only slide, if a `node_gradient` is given.

    Returns:
        An `AdaptedMesh`. Its `carry` brings coefficients and optimiser moments to the new nodes.

    Raises:
        ValueError: for an unknown strategy, invalid nodes, shapes that do not fit, a negative or non-finite
            indicator, or options out of range; the message gives the offending values.
    """
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy must be one of {get_args(Strategy)}, got {strategy!r}.")
    check_nodes(nodes)
    _check_coefficients(coefficients, nodes)
    _check_indicator(indicator, nodes, "indicator")
    if n_refine is not None and n_refine < 0:
        raise ValueError(f"n_refine must be at least 0, got {n_refine}.")
    if not pseudocount >= 0:
        raise ValueError(f"pseudocount must be at least 0, got {pseudocount}.")
    if not 0 < size <= 1:
        raise ValueError(f"size must lie in (0, 1], got {size}.")
    if moments is not None:
        _check_moments(moments, nodes)
    if node_gradient is not None:
        if moments is None:
            raise ValueError("node_gradient needs the moments of the same samples; pass element_moments(...).")
        if node_gradient.shape != nodes.shape or not torch.isfinite(node_gradient).all():
            raise ValueError(
                f"node_gradient must be finite with the shape of nodes {tuple(nodes.shape)}, got shape "
                f"{tuple(node_gradient.shape)} and values {_first_bad(node_gradient)}."
            )
    dof = nodes.shape[1]
    if dof == 2:
        return AdaptedMesh(nodes.clone(), nodes)
    n_refine = max(1, dof // 8) if n_refine is None else n_refine
    with torch.no_grad():
        if strategy == "mrc":
            new = _resample(nodes, indicator, min(n_refine, dof - 1), pseudocount)
        else:
            new = _exchange(nodes, coefficients, indicator, min(n_refine, dof - 2), moments, node_gradient, size)
    return AdaptedMesh(new, nodes)


def _resample(nodes: Tensor, hits: Tensor, n_refine: int, pseudocount: float) -> Tensor:
    """The `"mrc"` move."""
    hits = hits.double()
    seen = hits.sum(dim=1, keepdim=True) + pseudocount > 0
    hits = torch.where(seen, hits, 1.0)  # equal masses keep the mesh
    fine, mass = refine(nodes.double(), mark(hits, n_refine), hits + pseudocount)
    return _as_mesh(coarsen(fine, mass, nodes.shape[1]), nodes)


def _exchange(
    nodes: Tensor,
    coefficients: Tensor,
    energy: Tensor,
    n_refine: int,
    moments: Tensor | None,
    gradient: Tensor | None,
    size: float,
) -> Tensor:
    """The `"exchange"` move."""
    fine, energy = nodes.double(), energy.double()
    dof = nodes.shape[1]
    if moments is None:
        moments = energy.new_tensor((1 / 3, 1 / 6, 1 / 3)).expand(*energy.shape, 3)
    n_exchange = int(size * n_refine)
    if gradient is not None:
        slid = _slide(fine, coefficients, energy, moments.double(), gradient.double(), size * MAX_SHIFT)
    else:
        slid, n_exchange = fine, max(n_exchange, min(n_refine, 1))
    if n_exchange == 0:
        return _as_mesh(slid, nodes)

    cost = removal_cost(nodes, coefficients, moments)
    # Coefficients still at zero make every node worthless: then the one amid the smallest residual goes first.
    rank = _ranks(cost, energy[:, :-1] + energy[:, 1:])
    free = independent_nodes(rank)
    leaving = torch.where(free, rank, dof).sort(dim=1, stable=True).indices[:, :n_exchange]  # [components, n_exchange]

    lengths = fine.diff(dim=1)
    long_enough = lengths > 2 * MIN_RELATIVE_ELEMENT * (fine[:, -1:] - fine[:, :1])
    median = energy.sort(dim=1, descending=True).values[:, (dof - 1) // 2, None]
    wanted = (energy > (1 + _MARK_MARGIN) * median) & long_enough
    marked = mark(torch.where(wanted, energy, -1.0), n_exchange)

    # The i-th cheapest node goes to the i-th richest element, if there are both.
    agreed = free.gather(1, leaving) & wanted.gather(1, marked)
    gone = torch.zeros_like(nodes, dtype=torch.bool).scatter_(1, leaving + 1, agreed)
    entering = torch.where(agreed, _midpoints(slid, marked), torch.inf)
    kept = slid.masked_fill(gone, torch.inf)
    return _as_mesh(torch.cat((kept, entering), dim=1).sort(dim=1).values[:, :dof], nodes)


def _slide(
    nodes: Tensor, coefficients: Tensor, energy: Tensor, moments: Tensor, gradient: Tensor, most: float
) -> Tensor:
    """Interior nodes moved downhill by their correlation with the residual; see `adapt_mesh`. All fp64."""
    lengths = nodes.diff(dim=1)
    rise = coefficients.to(torch.promote_types(coefficients.dtype, torch.float32)).diff(dim=1)
    slope2 = rise.square().sum(dim=-1, dtype=torch.float64) / lengths.square()  # [components, dof - 1]
    power = (slope2 * moments[..., 2])[:, :-1] + (slope2 * moments[..., 0])[:, 1:]  # K, [components, dof - 2]
    scale = ((energy[:, :-1] + energy[:, 1:]) * power).sqrt()
    down = -gradient[:, 1:-1]
    correlation = torch.where(scale > 0, down / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0).clamp(-1, 1)
    room = torch.where(down > 0, lengths[:, 1:], lengths[:, :-1])
    inner = nodes[:, 1:-1] + most * correlation * room
    return torch.cat((nodes[:, :1], inner, nodes[:, -1:]), dim=1)


def _ranks(cost: Tensor, tie: Tensor | None = None) -> Tensor:
    """Place of each entry in the order by `cost`, then `tie`, then index: int64, all different within a row."""
    order = torch.arange(cost.shape[1], device=cost.device).expand(cost.shape)
    for key in (tie, cost):  # stable, so the last key sorts first
        if key is not None:
            order = order.gather(1, key.gather(1, order).sort(dim=1, stable=True).indices)
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(cost.shape[1], device=cost.device).expand(cost.shape)
    )


def _pivots(diagonal: Tensor, off: Tensor) -> Tensor:
    """Pivots d_0 = h_0, d_j = h_j - o_{j-1}^2 / d_{j-1} of symmetric positive definite tridiagonal matrices.

    d_j is a ratio of two entries of the product of the 2 x 2 matrices [[h_j, -o_{j-1}^2], [1, 0]], and the products
    come from a scan of log2(dof) rounds, each O(components * dof), in place of a loop over nodes.
    """
    below = torch.nn.functional.pad(off.square(), (1, 0))  # o_{j-1}^2, zero for the first
    zero, one = torch.zeros_like(diagonal), torch.ones_like(diagonal)
    products = torch.stack((diagonal, -below, one, zero), dim=-1).unflatten(-1, (2, 2))  # [components, dof, 2, 2]
    span = 1
    while span < diagonal.shape[1]:
        later, earlier = products[:, span:], products[:, :-span]
        joined = (later.unsqueeze(-1) * earlier.unsqueeze(-3)).sum(dim=-2)  # matrix products
        joined = joined / joined.abs().amax(dim=(-2, -1), keepdim=True)  # only ratios matter: avoids overflow
        products = torch.cat((products[:, :span], joined), dim=1)
        span *= 2
    return products[..., 0, 0] / products[..., 1, 0]


def _prefix_sums(values: Tensor) -> Tensor:
    """Inclusive sums along dim 1 in log2 rounds. `torch.cumsum` on a GPU does not fix the order of summation."""
    span = 1
    while span < values.shape[1]:
        values = torch.cat((values[:, :span], values[:, span:] + values[:, :-span]), dim=1)
        span *= 2
    return values


def _assemble(left: Tensor, right: Tensor) -> Tensor:
    """Per-element contributions to the left and right node, `[components, dof - 1]` twice -> `[components, dof]`."""
    pad = torch.nn.functional.pad
    return pad(left, (0, 1)) + pad(right, (1, 0))


def _left_share(nodes: Tensor) -> Tensor:
    """Where each interior node lies between its neighbours, in (0, 1): `[components, dof - 2]`."""
    return (nodes[:, 1:-1] - nodes[:, :-2]) / (nodes[:, 2:] - nodes[:, :-2])


def _midpoints(nodes: Tensor, element: Tensor) -> Tensor:
    """Midpoints of the elements `[components, k]`."""
    left, right = nodes.gather(1, element), nodes.gather(1, element + 1)
    return left + (right - left) / 2


def _as_mesh(proposal: Tensor, nodes: Tensor) -> Tensor:
    """`proposal` with elements that are long enough and the dtype and ends of `nodes`.

    A mesh far from zero for its length may not be resolved by its dtype: such a component keeps its old nodes when
    the proposal, rounded, has equal neighbours.
    """
    new = separate_nodes(proposal).to(nodes.dtype)
    new = torch.cat((nodes[:, :1], new[:, 1:-1], nodes[:, -1:]), dim=1)
    if new.shape != nodes.shape:
        return new
    rising = (new.diff(dim=1) > 0).all(dim=1, keepdim=True)
    return torch.where(rising, new, nodes)


def _check_coefficients(coefficients: Tensor, nodes: Tensor) -> None:
    if coefficients.ndim != 3 or coefficients.shape[:2] != nodes.shape:
        raise ValueError(
            f"coefficients must have shape [components, dof, out_features] with the components and dof of nodes, got "
            f"coefficients {tuple(coefficients.shape)} and nodes {tuple(nodes.shape)}."
        )


def _check_indicator(indicator: Tensor, nodes: Tensor, name: str) -> None:
    expected = (nodes.shape[0], nodes.shape[1] - 1)
    if tuple(indicator.shape) != expected:
        raise ValueError(f"{name} must have shape [components, dof - 1] = {expected}, got {tuple(indicator.shape)}.")
    if not (torch.isfinite(indicator) & (indicator >= 0)).all():
        raise ValueError(f"{name} must be finite and non-negative, got {_first_bad(indicator, minimum=0)}.")


def _check_moments(moments: Tensor, nodes: Tensor) -> None:
    expected = (nodes.shape[0], nodes.shape[1] - 1, 3)
    if tuple(moments.shape) != expected:
        raise ValueError(f"moments must have shape [components, dof - 1, 3] = {expected}, got {tuple(moments.shape)}.")
    if not (torch.isfinite(moments) & (moments >= 0)).all():
        raise ValueError(f"moments must be finite and non-negative, got {_first_bad(moments, minimum=0)}.")


def _first_bad(values: Tensor, minimum: float = -torch.inf) -> str:
    bad = ~(torch.isfinite(values) & (values >= minimum))
    where = bad.nonzero()
    return "none out of range" if len(where) == 0 else f"{values[bad][0].item()} at index {where[0].tolist()}"
