"""The first-order Lagrange ("hat") basis and sums of piecewise-linear functions.

Source: Li, Cheng & Gu (2025), "A Globally Optimal Alternative to MLP", sections 2.6-2.7.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .mesh import active_nodes, check_coords, check_nodes, locate, take


def hat_basis(coords: Tensor, nodes: Tensor, *, validate: bool = True) -> Tensor:
    """Evaluate every basis function of every component: the dense reference.

    psi_ij(p_ik) = [j = k], psi is linear between nodes, each row sums to one, and at most two entries of a row are
    non-zero: `1 - local` and `local` at the ends of the element that holds the coordinate.

    Args:
        coords: `[..., components]`; values outside the mesh are clamped to its ends.
        nodes: `[components, n_nodes]`, strictly increasing, `n_nodes >= 2`.
        validate: see `locate`.

    Returns:
        `[..., components, n_nodes]`, fp32 (fp64 if an input is), differentiable in `coords`.

    Raises:
        ValueError: for invalid nodes, NaN coordinates, or differing component counts.
    """
    element, local = locate(coords, nodes, validate=validate)
    two = torch.stack((1 - local, local), dim=-1)  # [..., components, 2]
    if nodes.shape[1] == 2:
        return two
    index = torch.stack((element, element + 1), dim=-1)
    return local.new_zeros(*local.shape, nodes.shape[1]).scatter(-1, index, two)


def evaluate(coords: Tensor, nodes: Tensor, coefficients: Tensor, *, validate: bool = True) -> Tensor:
    """Sum one piecewise-linear function per component.

    y = sum_ij psi_ij(coords_i) coefficients_ij (Li, Cheng & Gu 2025, sec. 2.6-2.7). Only the two nodes around each
    coordinate contribute, so that n_nodes costs nothing. Equivalent to `hat_basis` contracted with `coefficients`.

    Args:
        coords: `[..., components]`; values outside the mesh are clamped to its ends.
        nodes: `[components, n_nodes]`, strictly increasing, `n_nodes >= 2`.
        coefficients: `[components, n_nodes, out_features]`.
        validate: see `locate`.

    Returns:
        `[..., out_features]` in the dtype of `coefficients`; differentiable in `coords` and `coefficients`.

    Raises:
        ValueError: for invalid nodes, NaN coordinates, or shapes that do not fit; the message gives the shapes.
    """
    if validate:
        check_nodes(nodes)
        check_coords(coords, nodes)
        if coefficients.ndim != 3 or coefficients.shape[:2] != nodes.shape:
            raise ValueError(
                f"coefficients must have shape [components, n_nodes, out_features] as nodes has, "
                f"got coefficients {tuple(coefficients.shape)} and nodes {tuple(nodes.shape)}."
            )
    components, n_nodes, out_features = coefficients.shape
    element, local = locate(coords, nodes, validate=False)
    rows, weights = active_nodes(element, local.to(coefficients.dtype), n_nodes)  # [..., 2 components]
    table = coefficients.reshape(components * n_nodes, out_features)
    total = F.embedding_bag(
        rows.reshape(-1, 2 * components), table, per_sample_weights=weights.reshape(-1, 2 * components), mode="sum"
    )
    return total.reshape(*coords.shape[:-1], out_features)


def evaluate_profile(coords: Tensor, nodes: Tensor, profile: Tensor) -> Tensor:
    """One scalar piecewise-linear function per component, at a cost that does not grow with n_nodes.

    Args:
        coords: `[..., components]`; values outside the mesh are clamped to its ends.
        nodes: `[components, n_nodes]`, valid.
        profile: values at the nodes, `[components, n_nodes]`.

    Returns:
        `[..., components]`, fp32 (fp64 if an input is), differentiable in `coords` and `profile`.
    """
    element, local = locate(coords, nodes, validate=False)
    profile = profile.to(local.dtype)
    return torch.lerp(take(profile[:, :-1], element), take(profile[:, 1:], element), local)


def under_transform() -> bool:
    """Whether forward-mode differentiation or a transform of `torch.func` is at work; torch has no public question."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def curvature_penalty(nodes: Tensor, coefficients: Tensor) -> Tensor:
    """Mean absolute curvature of the coefficients along the mesh.

    At every interior node: the distance between its coefficient and the value there of the straight line through its
    two neighbours. On a uniform mesh this is | c_j - (c_{j-1} + c_{j+1}) / 2 |, the penalty of Li, Cheng & Gu (2025,
    Algorithm 1); the weights that follow the node positions keep straight lines unpenalised on every mesh.

    Args:
        nodes: `[components, n_nodes]`.
        coefficients: `[components, n_nodes, out_features]`.

    Returns:
        A scalar in the dtype of `coefficients`; exactly zero for n_nodes 2, which has no interior node.

    Raises:
        ValueError: if `coefficients` does not start with the shape of `nodes`.
    """
    if coefficients.ndim != 3 or coefficients.shape[:2] != nodes.shape:
        raise ValueError(
            f"coefficients must have shape [components, n_nodes, out_features] as nodes has, got "
            f"coefficients {tuple(coefficients.shape)} and nodes {tuple(nodes.shape)}."
        )
    if nodes.shape[1] == 2:
        return coefficients.sum() * 0  # keeps the graph, so that a caller may always call backward()
    share = (nodes[:, 1:-1] - nodes[:, :-2]) / (nodes[:, 2:] - nodes[:, :-2])  # [components, n_nodes - 2]
    line = torch.lerp(coefficients[:, :-2], coefficients[:, 2:], share.unsqueeze(-1).to(coefficients.dtype))
    return (coefficients[:, 1:-1] - line).abs().mean()
