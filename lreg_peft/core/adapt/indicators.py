"""What the samples say of a mesh: sums over elements and nodes, and what every node is worth."""

import torch
from torch import Tensor

from ..mesh import check_nodes, coordinate_dtype

# Added to the diagonal of a mass matrix, relative to its mean: elements without samples leave it singular.
_MASS_RIDGE = 1e-9
_SMALLEST_MASS = 1e-90  # stands in for the mean when no element has samples


def element_sums(element: Tensor, values: Tensor, n_elements: int) -> Tensor:
    """Sum a quantity of the samples over the element that holds each: hit counts, residual energy.

    Args:
        element: int64 `[..., components]`, from `locate`.
        values: broadcastable to the shape of `element`, one value per sample and component.
        n_elements: `n_nodes - 1`.

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
        n_elements: `n_nodes - 1`.

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
        n_elements: `n_nodes - 1`.

    Returns:
        `[components, n_elements + 1]`, one entry per node (`adapt_mesh` ignores the two ends, which are fixed).
    """
    left = element_sums(element, coords_gradient * (1 - local), n_elements)
    right = element_sums(element, coords_gradient * local, n_elements)
    return -assemble(left, right)


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


def removal_cost(nodes: Tensor, coefficients: Tensor, moments: Tensor) -> Tensor:
    """What each interior node is worth: the squared change of the function when it goes and the rest readjusts.

    Without node j the coefficients must satisfy a^T c = 0, a = (w, -1, 1 - w) on nodes j-1, j, j+1 being the
    second-difference row of the mesh. The closest such function, in the sum of squares over the samples, is
    delta_j = |a^T c|^2 / (a^T H^-1 a) away, H the mass matrix of the component (Li, Cheng & Gu 2025 resample a
    density instead). Where c is a least-squares solution, the residual sum of squares rises by exactly this, the
    other components held fixed.

    Only the band of H^-1 next to its diagonal is needed. It follows from the pivots of H taken from the left and
    from the right, so that the cost is O(components * n_nodes * (out_features + log n_nodes)).

    Args:
        nodes: `[components, n_nodes]`, strictly increasing.
        coefficients: `[components, n_nodes, out_features]`.
        moments: `[components, n_nodes - 1, 3]`, from `element_moments`; its scale sets the scale of the result.

    Returns:
        fp64 `[components, n_nodes - 2]`.

    Raises:
        ValueError: for invalid nodes or shapes that do not fit.
    """
    check_nodes(nodes)
    check_coefficients(coefficients, nodes)
    check_moments(moments, nodes)
    share = _left_share(nodes.double())  # [components, n_nodes - 2]
    # The jump is a difference of neighbours: taken in the working precision, squared and summed in fp64.
    working = coefficients.to(torch.promote_types(coefficients.dtype, torch.float32))
    line = torch.lerp(working[:, :-2], working[:, 2:], share.unsqueeze(-1).to(working.dtype))
    jump = (line - working[:, 1:-1]).square().sum(dim=-1, dtype=torch.float64)  # |a^T c|^2

    moments = moments.double()
    diagonal = assemble(moments[..., 0], moments[..., 2])  # [components, n_nodes]
    off = moments[..., 1]  # [components, n_nodes - 1]
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


def _pivots(diagonal: Tensor, off: Tensor) -> Tensor:
    """Pivots d_0 = h_0, d_j = h_j - o_{j-1}^2 / d_{j-1} of symmetric positive definite tridiagonal matrices.

    d_j is a ratio of two entries of the product of the 2 x 2 matrices [[h_j, -o_{j-1}^2], [1, 0]], and the products
    come from a scan of log2(n_nodes) rounds, each O(components * n_nodes), in place of a loop over nodes.
    """
    below = torch.nn.functional.pad(off.square(), (1, 0))  # o_{j-1}^2, zero for the first
    zero, one = torch.zeros_like(diagonal), torch.ones_like(diagonal)
    products = torch.stack((diagonal, -below, one, zero), dim=-1).unflatten(-1, (2, 2))  # [components, n_nodes, 2, 2]
    span = 1
    while span < diagonal.shape[1]:
        later, earlier = products[:, span:], products[:, :-span]
        joined = (later.unsqueeze(-1) * earlier.unsqueeze(-3)).sum(dim=-2)  # matrix products
        joined = joined / joined.abs().amax(dim=(-2, -1), keepdim=True)  # only ratios matter: avoids overflow
        products = torch.cat((products[:, :span], joined), dim=1)
        span *= 2
    return products[..., 0, 0] / products[..., 1, 0]


def assemble(left: Tensor, right: Tensor) -> Tensor:
    """Per-element shares of the left and right node, `[components, n_nodes - 1]` twice -> `[components, n_nodes]`."""
    pad = torch.nn.functional.pad
    return pad(left, (0, 1)) + pad(right, (1, 0))


def _left_share(nodes: Tensor) -> Tensor:
    """Where each interior node lies between its neighbours, in (0, 1): `[components, n_nodes - 2]`."""
    return (nodes[:, 1:-1] - nodes[:, :-2]) / (nodes[:, 2:] - nodes[:, :-2])


def check_coefficients(coefficients: Tensor, nodes: Tensor) -> None:
    """Raise a `ValueError` unless `coefficients` is `[components, n_nodes, out_features]` for `nodes`."""
    if coefficients.ndim != 3 or coefficients.shape[:2] != nodes.shape:
        raise ValueError(
            f"coefficients must have shape [components, n_nodes, out_features] as nodes has, got "
            f"coefficients {tuple(coefficients.shape)} and nodes {tuple(nodes.shape)}."
        )


def check_indicator(indicator: Tensor, nodes: Tensor, name: str) -> None:
    """Raise a `ValueError` that names it unless `indicator` is `[components, n_nodes - 1]`, finite and non-negative."""
    expected = (nodes.shape[0], nodes.shape[1] - 1)
    if tuple(indicator.shape) != expected:
        raise ValueError(
            f"{name} must have shape [components, n_nodes - 1] = {expected}, got {tuple(indicator.shape)}."
        )
    if not (torch.isfinite(indicator) & (indicator >= 0)).all():
        raise ValueError(f"{name} must be finite and non-negative, got {first_bad(indicator, minimum=0)}.")


def check_moments(moments: Tensor, nodes: Tensor) -> None:
    """Raise a `ValueError` unless `moments` is `[components, n_nodes - 1, 3]`, finite and non-negative."""
    expected = (nodes.shape[0], nodes.shape[1] - 1, 3)
    if tuple(moments.shape) != expected:
        raise ValueError(
            f"moments must have shape [components, n_nodes - 1, 3] = {expected}, got {tuple(moments.shape)}."
        )
    if not (torch.isfinite(moments) & (moments >= 0)).all():
        raise ValueError(f"moments must be finite and non-negative, got {first_bad(moments, minimum=0)}.")


def first_bad(values: Tensor, minimum: float = -torch.inf) -> str:
    """The first value that is not finite or below `minimum`, in words for an error message."""
    bad = ~(torch.isfinite(values) & (values >= minimum))
    where = bad.nonzero()
    return "none out of range" if len(where) == 0 else f"{values[bad][0].item()} at index {where[0].tolist()}"
