"""The first-order Lagrange ("hat") basis and sums of piecewise-linear functions.

Source: Li, Cheng & Gu (2025), "A Globally Optimal Alternative to MLP", sections 2.6-2.7.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .mesh import active_nodes, check_coords, check_nodes, locate, take

Form = Literal["auto", "dense", "gather"]

# Largest dof at which one GEMM with the dense basis is faster, forward and backward together, than gathering two
# rows per component. Measured on one CPU core (N = 2048, d = 2 and 8, C = 768; N = 256, C = 50257): the forms cross
# between 8 and 16 nodes. GPUs multiply so much faster than they gather that they cross later.
_DENSE_MAX_DOF = {"cpu": 8}
_DENSE_MAX_DOF_ELSEWHERE = 64


def hat_basis(coords: Tensor, nodes: Tensor, *, validate: bool = True) -> Tensor:
    """Evaluate every basis function of every component: the dense reference.

    psi_ij(p_ik) = [j = k], psi is linear between nodes, each row sums to one, and at most two entries of a row are
    non-zero: `1 - local` and `local` at the ends of the element that holds the coordinate.

    Args:
        coords: `[..., components]`; values outside the mesh are clamped to its ends.
        nodes: `[components, dof]`, strictly increasing, `dof >= 2`.
        validate: see `locate`.

    Returns:
        `[..., components, dof]`, fp32 (fp64 if an input is), differentiable in `coords`.

    Raises:
        ValueError: for invalid nodes, NaN coordinates, or differing component counts.
    """
    element, local = locate(coords, nodes, validate=validate)
    return expand_basis(element, local, nodes.shape[1])


def expand_basis(element: Tensor, local: Tensor, dof: int) -> Tensor:
    """Write the two non-zeros of each component into a dense row.

    Args:
        element: int64 `[..., components]` in `[0, dof - 2]`.
        local: `[..., components]`.
        dof: nodes per component.

    Returns:
        `[..., components, dof]` in the dtype of `local`.
    """
    two = torch.stack((1 - local, local), dim=-1)  # [..., components, 2]
    if dof == 2:
        return two
    index = torch.stack((element, element + 1), dim=-1)
    return local.new_zeros(*local.shape, dof).scatter(-1, index, two)


def design_matrix(coords: Tensor, nodes: Tensor, *, reduced: bool = False) -> Tensor:
    """The basis in one row per sample: what the coefficients, one row per basis function, are weighted by.

    Args:
        coords: `[..., components]`.
        nodes: `[components, dof]`, valid.
        reduced: leave out the first basis function of every component and put a one last. The functions that can be
            represented are the same: each component's basis sums to one, so d - 1 of its directions are redundant.

    Returns:
        `[..., K]`, K = components x dof, or components x (dof - 1) + 1; fp32 or fp64, differentiable in `coords`.
    """
    return design_of_elements(*locate(coords, nodes, validate=False), nodes.shape[1], reduced=reduced)


def design_of_elements(element: Tensor, local: Tensor, dof: int, *, reduced: bool = False) -> Tensor:
    """`design_matrix` for coordinates that `locate` has found already."""
    basis = expand_basis(element, local, dof)  # [..., components, dof]
    if not reduced:
        return basis.flatten(-2)
    return torch.cat((basis[..., 1:].flatten(-2), basis.new_ones(*basis.shape[:-2], 1)), dim=-1)


def evaluate(
    coords: Tensor, nodes: Tensor, coefficients: Tensor, *, form: Form = "auto", validate: bool = True
) -> Tensor:
    """Sum one piecewise-linear function per component.

    y = sum_ij psi_ij(coords_i) coefficients_ij (Li, Cheng & Gu 2025, sec. 2.6-2.7), `hat_basis` contracted with
    `coefficients`.

    Args:
        coords: `[..., components]`; values outside the mesh are clamped to its ends.
        nodes: `[components, dof]`, strictly increasing, `dof >= 2`.
        coefficients: `[components, dof, out_features]`.
        form: "dense" multiplies by the dense basis (cost grows with dof); "gather" reads only the two nodes
            around each coordinate (cost flat in dof); "auto" takes the faster one; inside a transform of `torch.func`,
            the dense one.
        validate: see `locate`.

    Returns:
        `[..., out_features]` in the dtype of `coefficients`; differentiable in `coords` and `coefficients`, twice.

    Raises:
        ValueError: for invalid nodes, NaN coordinates, or shapes that do not fit; the message gives the shapes.
    """
    if validate:
        check_nodes(nodes)
        check_coords(coords, nodes)
        if coefficients.ndim != 3 or coefficients.shape[:2] != nodes.shape:
            raise ValueError(
                f"coefficients must have shape [components, dof, out_features] with the components and dof of nodes, "
                f"got coefficients {tuple(coefficients.shape)} and nodes {tuple(nodes.shape)}."
            )
        if form not in ("auto", "dense", "gather"):
            raise ValueError(f"form must be 'auto', 'dense' or 'gather', got {form!r}.")
    components, dof, out_features = coefficients.shape
    element, local = locate(coords, nodes, validate=False)
    local = local.to(coefficients.dtype)
    table = coefficients.reshape(components * dof, out_features)
    if form == "auto":
        form = "dense" if dense_is_faster(dof, coords.device) or under_transform() else "gather"
    if form == "dense":
        basis = expand_basis(element, local, dof)  # [..., components, dof]
        return basis.flatten(-2) @ table
    return _gather(element, local, table, dof)


def dense_is_faster(dof: int, device: torch.device) -> bool:
    """Whether multiplying by the dense basis beats gathering two rows per component, for meshes of `dof` nodes."""
    return dof <= _DENSE_MAX_DOF.get(device.type, _DENSE_MAX_DOF_ELSEWHERE)


def evaluate_profile(coords: Tensor, nodes: Tensor, profile: Tensor) -> Tensor:
    """One scalar piecewise-linear function per component, at a cost that does not grow with dof.

    Args:
        coords: `[..., components]`; values outside the mesh are clamped to its ends.
        nodes: `[components, dof]`, valid.
        profile: values at the nodes, `[components, dof]`.

    Returns:
        `[..., components]`, fp32 (fp64 if an input is), differentiable in `coords` and `profile`.
    """
    element, local = locate(coords, nodes, validate=False)
    profile = profile.to(local.dtype)
    return torch.lerp(take(profile[:, :-1], element), take(profile[:, 1:], element), local)


def evaluate_factored(
    coords: Tensor, nodes: Tensor, profile: Tensor, direction: Tensor, *, validate: bool = True
) -> Tensor:
    """Sum one scalar piecewise-linear function per component, each times its own output vector.

    y = sum_i s_i(coords_i) v_i with s_i(p_ij) = profile_ij: `evaluate` for coefficients of the rank-one form
    c_ij = profile_ij direction_i, at a cost that does not grow with dof.

    Args:
        coords: `[..., components]`; values outside the mesh are clamped to its ends.
        nodes: `[components, dof]`, strictly increasing, `dof >= 2`.
        profile: s, `[components, dof]`.
        direction: v, `[components, out_features]`.
        validate: see `locate`.

    Returns:
        `[..., out_features]` in the dtype of `direction`; differentiable in all but `nodes`, twice.

    Raises:
        ValueError: for invalid nodes, NaN coordinates, or shapes that do not fit; the message gives the shapes.
    """
    if validate:
        check_nodes(nodes)
        check_coords(coords, nodes)
        if profile.shape != nodes.shape or direction.ndim != 2 or direction.shape[0] != nodes.shape[0]:
            raise ValueError(
                f"profile must have the shape of nodes and direction [components, out_features], got profile "
                f"{tuple(profile.shape)}, direction {tuple(direction.shape)} and nodes {tuple(nodes.shape)}."
            )
    return evaluate_profile(coords, nodes, profile).to(direction.dtype) @ direction


def _gather(element: Tensor, local: Tensor, table: Tensor, dof: int) -> Tensor:
    """Two-row form of `evaluate`: `[..., components]` twice and `[components * dof, out]` -> `[..., out]`."""
    return weighted_rows(*active_nodes(element, local, dof), table)


def weighted_rows(rows: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """Sum some rows of a table with weights: a function from its `active_nodes`, whatever the mesh.

    Args:
        rows: int64 `[..., m]`.
        weights: `[..., m]`, the dtype of `table`.
        table: `[K, out_features]`.

    Returns:
        `[..., out_features]`; differentiable in `weights` and `table`, twice.
    """
    m = rows.shape[-1]
    flat, flat_weights = rows.reshape(-1, m), weights.reshape(-1, m)
    if reverse_mode_only():
        total = _WeightedRows.apply(flat, flat_weights, table)  # type: ignore[no-untyped-call]
    else:
        total = F.embedding_bag(flat, table, per_sample_weights=flat_weights, mode="sum")
    return total.reshape(*rows.shape[:-1], table.shape[1])


def reverse_mode_only() -> bool:
    """Whether plain autograd is at work: compilers, tracers and functorch's transforms want single operations."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or under_transform())


def under_transform() -> bool:
    """Whether forward-mode differentiation or a transform of `torch.func` is at work."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


class _WeightedRows(torch.autograd.Function):
    """`embedding_bag` with bags of equal size and a faster gradient of the table.

    torch scatters every sample into the table's gradient. Sorted by row, the gradient is an `embedding_bag` as well,
    whose bags are the rows and whose entries are the samples: half the time on a table that does not fit the cache.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, table)
        return F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, Tensor | None]:  # type: ignore[override]
        rows, weights, table = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative will be taken: let autograd see every step
            per_weight = (table[rows] * gradient.unsqueeze(1)).sum(dim=-1)
            parts = weights.unsqueeze(-1) * gradient.unsqueeze(1)
            return None, per_weight, torch.zeros_like(table).index_add(0, rows.flatten(), parts.flatten(0, 1))
        d_weights = d_table = None
        (n, size), flat, gradient = rows.shape, rows.reshape(-1), gradient.contiguous()
        sample = torch.arange(n, device=rows.device).repeat_interleave(size)
        if ctx.needs_input_grad[1]:
            d_weights = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                gradient, table, flat, torch.arange(0, n * size, size, device=rows.device), sample, 0
            ).view(n, size)
        if ctx.needs_input_grad[2]:
            order = flat.argsort(stable=True)
            starts = torch.searchsorted(flat[order], torch.arange(len(table), device=rows.device))
            d_table = F.embedding_bag(
                sample[order], gradient, starts, per_sample_weights=weights.reshape(-1)[order], mode="sum"
            )
        return None, d_weights, d_table


def curvature_penalty(nodes: Tensor, coefficients: Tensor) -> Tensor:
    """Mean absolute curvature of the coefficients along the mesh.

    At every interior node: the distance between its coefficient and the value there of the straight line through its
    two neighbours. On a uniform mesh this is | c_j - (c_{j-1} + c_{j+1}) / 2 |, the penalty of Li, Cheng & Gu (2025,
    Algorithm 1); the weights that follow the node positions keep straight lines unpenalised on every mesh.

    Args:
        nodes: `[components, dof]`.
        coefficients: `[components, dof, out_features]`.

    Returns:
        A scalar in the dtype of `coefficients`; exactly zero for dof 2, which has no interior node.

    Raises:
        ValueError: if `coefficients` does not start with the shape of `nodes`.
    """
    if coefficients.ndim != 3 or coefficients.shape[:2] != nodes.shape:
        raise ValueError(
            f"coefficients must have shape [components, dof, out_features] with the components and dof of nodes, got "
            f"coefficients {tuple(coefficients.shape)} and nodes {tuple(nodes.shape)}."
        )
    if nodes.shape[1] == 2:
        return coefficients.sum() * 0  # keeps the graph, so that a caller may always call backward()
    share = (nodes[:, 1:-1] - nodes[:, :-2]) / (nodes[:, 2:] - nodes[:, :-2])  # [components, dof - 2]
    line = torch.lerp(coefficients[:, :-2], coefficients[:, 2:], share.unsqueeze(-1).to(coefficients.dtype))
    return (coefficients[:, 1:-1] - line).abs().mean()
