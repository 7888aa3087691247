"""The one operator between meshes, for coefficients and for the moments of an optimiser."""

import torch
from torch import Tensor

from ..mesh import check_nodes, locate


def interpolate(nodes_old: Tensor, nodes_new: Tensor, values: Tensor) -> Tensor:
    """Values at the new nodes of the piecewise-linear functions that have `values` at the old ones.

    The one operator between meshes, for coefficients and for optimiser moments: a convex combination of two old
    values, so that non-negative values stay non-negative; a node present in both meshes keeps its value exactly.

    Args:
        nodes_old: `[components, n_old]`, strictly increasing.
        nodes_new: `[components, n_new]`; clamped to the ends of the old mesh.
        values: `[components, n_old, ...]`.

    Returns:
        `[components, n_new, ...]` in the dtype of `values`.

    Raises:
        ValueError: for invalid nodes or shapes that do not fit; the message gives the shapes.
    """
    check_nodes(nodes_old)
    check_nodes(nodes_new)
    if nodes_new.shape[0] != nodes_old.shape[0] or values.shape[:2] != nodes_old.shape:
        raise ValueError(
            f"values must have shape [components, n_old, ...] and both meshes the same components, got values "
            f"{tuple(values.shape)}, nodes_old {tuple(nodes_old.shape)} and nodes_new {tuple(nodes_new.shape)}."
        )
    element, local = locate(nodes_new.T, nodes_old, validate=False)  # [n_new, components]
    element, local = element.T, local.T  # [components, n_new]
    row = torch.arange(values.shape[0], device=values.device).unsqueeze(1)
    weight = local.reshape(*local.shape, *[1] * (values.ndim - 2))
    dtype = torch.promote_types(values.dtype, weight.dtype)
    left, right = values[row, element].to(dtype), values[row, element + 1].to(dtype)  # [components, n_new, ...]
    return torch.lerp(left, right, weight.to(dtype)).to(values.dtype)
