"""One-dimensional meshes: construction, validation and element location.

A *mesh* is a tensor of nodes `[components, n_nodes]`, a strictly increasing row per component. Everything here works in
fp32 or fp64: neighbouring nodes of an adapted mesh are often closer than a bf16 or fp16 ulp.
"""

import torch
from torch import Tensor

from .checks import number

#: Smallest element, relative to the length of the mesh, that the constructors in this package create. In fp32 it
#: leaves a local coordinate inside such an element about 2**-24 / 1e-5 = 0.6 % of rounding error.
MIN_RELATIVE_ELEMENT = 1e-5

# Up to this many nodes comparing with every interior node beats a binary search (measured on CPU: 4x at n_nodes 2-4).
_MAX_COMPARE_NODES = 8


def coordinate_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any of `tensors` is fp64, else fp32: the precision of coordinates and nodes in this package."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_nodes(nodes: Tensor) -> None:
    """Raise a `ValueError` that shows the offending values unless `nodes` is a valid mesh.

    Args:
        nodes: expected `[components, n_nodes]`, floating, finite, `n_nodes >= 2`, every row strictly increasing.
    """
    if nodes.ndim != 2:
        raise ValueError(f"nodes must have shape [components, n_nodes], got {tuple(nodes.shape)}.")
    if not nodes.is_floating_point():
        raise ValueError(f"nodes must be floating point, got {nodes.dtype}.")
    components, n_nodes = nodes.shape
    if components < 1 or n_nodes < 2:
        raise ValueError(
            f"nodes must hold at least 1 component of at least 2 nodes, got components={components}, n_nodes={n_nodes}."
        )
    if nodes.device.type == "meta":
        return
    finite = torch.isfinite(nodes)
    if not finite.all():
        i, j = (~finite).nonzero()[0].tolist()
        raise ValueError(f"nodes must be finite, got {nodes[i, j].item()} at component {i}, node {j}.")
    rising = nodes[:, 1:] > nodes[:, :-1]
    if not rising.all():
        i, j = (~rising).nonzero()[0].tolist()
        raise ValueError(
            f"nodes must be strictly increasing: component {i} has {nodes[i, j].item()!r} at node {j} followed by "
            f"{nodes[i, j + 1].item()!r} at node {j + 1}."
        )


def check_coords(coords: Tensor, nodes: Tensor) -> None:
    """Raise a `ValueError` unless `coords` `[..., components]` fits `nodes` `[components, n_nodes]` and has no NaN."""
    if coords.ndim < 1 or coords.shape[-1] != nodes.shape[0]:
        raise ValueError(
            f"coords must have shape [..., components] with as many components as nodes, got coords "
            f"{tuple(coords.shape)} and nodes {tuple(nodes.shape)}."
        )
    if not coords.is_floating_point():
        raise ValueError(f"coords must be floating point, got {coords.dtype}.")
    if coords.device.type != "meta" and torch.isnan(coords).any():
        where = torch.isnan(coords).nonzero()[0].tolist()
        raise ValueError(f"coords must not be NaN, got NaN at index {where}.")


def uniform_nodes(
    n_components: int,
    n_nodes: int,
    *,
    low: float = 0.0,
    high: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Equally spaced nodes on `[low, high]`, the same for every component.

    Returns:
        `[n_components, n_nodes]` in `dtype` (fp32 or fp64); the first node is exactly `low`, the last exactly `high`.

    Raises:
        ValueError: if `n_nodes < 2`, `n_components < 1`, `low >= high`, `dtype` is neither fp32 nor fp64, or precision
            does not tell the nodes apart.
    """
    number("low", low)
    number("high", high)
    if n_nodes < 2 or n_components < 1:
        raise ValueError(
            f"a mesh needs n_components >= 1 and n_nodes >= 2, got n_components={n_components}, n_nodes={n_nodes}."
        )
    if not low < high:
        raise ValueError(f"low must be below high, got low={low}, high={high}.")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be float32 or float64: nodes are kept in float32 or float64, got {dtype}.")
    nodes = torch.linspace(low, high, n_nodes, dtype=dtype, device=device)
    if nodes.device.type != "meta" and not (nodes.diff() > 0).all():
        raise ValueError(
            f"{n_nodes} nodes between low={low} and high={high} are not all distinct in {dtype}: take fewer, widen the "
            "range or take float64."
        )
    return nodes.expand(n_components, n_nodes).clone()


def quantile_nodes(samples: Tensor, n_nodes: int, *, low: float | None = 0.0, high: float | None = 1.0) -> Tensor:
    """Nodes at the empirical quantiles of `samples`, so that every element holds the same share of them.

    Elements shorter than `MIN_RELATIVE_ELEMENT` of the mesh (repeated samples) are widened to that, at the expense
    of the longer ones.

    Args:
        samples: `[n_samples, components]`, finite; outside `[low, high]` they are clamped to it.
        n_nodes: nodes per component, at least 2.
        low: first node; None takes each component's smallest sample.
        high: last node; None takes each component's largest sample.

    Returns:
        `[components, n_nodes]`, fp64 for fp64 samples and fp32 otherwise.

    Raises:
        ValueError: for an empty, non-finite or wrongly shaped `samples`, `n_nodes < 2`, or an empty range.
    """
    if n_nodes < 2:
        raise ValueError(f"a mesh needs n_nodes >= 2, got n_nodes={n_nodes}.")
    if samples.ndim != 2 or samples.shape[0] < 1 or samples.shape[1] < 1:
        raise ValueError(f"samples must have shape [n_samples >= 1, components >= 1], got {tuple(samples.shape)}.")
    if not samples.is_floating_point():
        raise ValueError(f"samples must be floating point, got {samples.dtype}.")
    dtype = coordinate_dtype(samples)
    # Sorted once in fp64: `torch.quantile` refuses more than 2**24 elements, a size a real pass over data exceeds.
    ordered = samples.detach().double().sort(dim=0).values  # [n_samples, components]
    if not torch.isfinite(ordered).all():
        raise ValueError("samples must be finite, got NaN or infinite values.")
    first = ordered[0] if low is None else ordered.new_full(ordered.shape[1:], low)
    last = ordered[-1] if high is None else ordered.new_full(ordered.shape[1:], high)
    if not (first < last).all():
        i = int((~(first < last)).nonzero()[0])
        raise ValueError(
            f"the mesh of component {i} would span [{first[i].item()}, {last[i].item()}]; its ends must differ."
        )
    ordered = ordered.clamp(first, last)
    position = torch.linspace(0, ordered.shape[0] - 1, n_nodes, dtype=torch.float64, device=ordered.device)
    below = position.floor().long()
    above = position.ceil().long()
    share = (position - below).unsqueeze(-1)  # [n_nodes, 1]
    nodes = torch.lerp(ordered[below], ordered[above], share).T.clone()  # [components, n_nodes]
    nodes[:, 0], nodes[:, -1] = first, last
    return separate_nodes(nodes).to(dtype)


def separate_nodes(nodes: Tensor, min_relative_element: float = MIN_RELATIVE_ELEMENT) -> Tensor:
    """Widen elements that are too short, keeping the ends of the mesh and the order of its nodes.

    An element shorter than `min_relative_element` of the mesh gets that length; the others shrink in proportion to
    what they have above it. A mesh whose elements are all long enough comes back unchanged.

    Args:
        nodes: `[components, n_nodes]`, non-decreasing rows with distinct ends.
        min_relative_element: smallest element over mesh length; `1 / (2 (n_nodes - 1))` where that is smaller.

    Returns:
        `[components, n_nodes]`, strictly increasing, the dtype of `nodes`.
    """
    first, last = nodes[:, :1], nodes[:, -1:]
    floor = min(min_relative_element, 0.5 / (nodes.shape[1] - 1))
    lengths = (nodes.diff(dim=1) / (last - first)).double()  # relative; each row sums to one
    too_short = lengths < floor
    if nodes.device.type != "meta" and not too_short.any():
        return nodes
    excess = (lengths - floor).clamp_min(0)
    lengths = floor + excess * ((1 - floor * lengths.shape[1]) / excess.sum(dim=1, keepdim=True))
    inner = first + (last - first) * lengths.cumsum(dim=1)[:, :-1].to(nodes.dtype)
    return torch.cat((first, inner, last), dim=1)


def locate(coords: Tensor, nodes: Tensor, *, validate: bool = True) -> tuple[Tensor, Tensor]:
    """Find the element that holds each coordinate, and the position inside it.

    Element j is `[p_j, p_{j+1})`; the last one includes its right end. Coordinates outside the mesh are clamped to
    its ends (Li, Cheng & Gu 2025, sec. 2.6).

    Args:
        coords: `[..., components]`.
        nodes: `[components, n_nodes]`, strictly increasing.
        validate: check shapes and values first; the check synchronises a GPU, so inner loops switch it off.

    Returns:
        element: int64 `[..., components]` in `[0, n_nodes - 2]`.
        local: `[..., components]` in `[0, 1]`, fp32 (fp64 if an input is), differentiable in `coords`.

    Raises:
        ValueError: for invalid nodes, NaN coordinates, or differing component counts.
    """
    if validate:
        check_nodes(nodes)
        check_coords(coords, nodes)
    dtype = coordinate_dtype(coords, nodes)
    coords, nodes = coords.to(dtype), nodes.to(dtype)
    inner = nodes[:, 1:-1]  # [components, n_nodes - 2]
    with torch.no_grad():
        if nodes.shape[1] <= _MAX_COMPARE_NODES:
            element = (coords.unsqueeze(-1) >= inner).sum(dim=-1)
        else:
            by_component = coords.movedim(-1, 0)  # [components, ...]
            flat = by_component.reshape(nodes.shape[0], -1).contiguous()
            element = torch.searchsorted(inner.contiguous(), flat, right=True)
            element = element.reshape(by_component.shape).movedim(0, -1)
    left, right = take(nodes[:, :-1], element), take(nodes[:, 1:], element)
    local = ((coords - left) / (right - left)).clamp(0, 1)
    return element, local


def active_nodes(element: Tensor, local: Tensor, n_nodes: int) -> tuple[Tensor, Tensor]:
    """Which coefficients a row reads, and with which weights: two per component; on simplices there are d + 1.

    Args:
        element: int64 `[..., components]`, from `locate`.
        local: `[..., components]`, from `locate`.
        n_nodes: nodes per component.

    Returns:
        rows: int64 `[..., 2 * components]`, rows of the table `[components * n_nodes, ...]` of all components.
        weights: `[..., 2 * components]`, the dtype of `local`; those of a component sum to one.
    """
    first = element + torch.arange(element.shape[-1], device=element.device) * n_nodes
    return torch.stack((first, first + 1), dim=-1).flatten(-2), torch.stack((1 - local, local), dim=-1).flatten(-2)


def take(values: Tensor, element: Tensor) -> Tensor:
    """`values[i, element[..., i]]` for every component i; values `[components, m]`, element `[..., components]`."""
    flat = element.reshape(-1, element.shape[-1])  # [N, components]
    return values.T.gather(0, flat).reshape(element.shape)


def as_mesh(proposal: Tensor, nodes: Tensor) -> Tensor:
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


def midpoints(nodes: Tensor, element: Tensor) -> Tensor:
    """Midpoints of the elements `[components, k]`."""
    left, right = nodes.gather(1, element), nodes.gather(1, element + 1)
    return left + (right - left) / 2
