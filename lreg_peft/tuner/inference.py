"""A factored shortcut without gradients, on the CPU: what generation and evaluation ask for.

For a few rows a layer has microseconds of arithmetic, and every call of torch takes microseconds to come about, most of
it for the sake of autograd and devices. NumPy works on the same memory and asks for neither.
"""

from bisect import bisect_right
from math import tanh

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.basis import reverse_mode_only

# Up to so many coordinates a loop over them takes less time than the calls of torch and NumPy that it stands for.
_FEW = 8
# From so many coordinates on the arithmetic is what takes the time, and torch may spread it over threads.
_MANY = 4096
_PLAIN = (Tensor, nn.Parameter)


def add_factored(
    hidden: Tensor,
    features: Tensor,
    slope: float,
    projection: Tensor,
    bias: Tensor,
    nodes: Tensor,
    profile: Tensor,
    direction: Tensor,
) -> Tensor | None:
    """`hidden + sum_i (slope z_i + s_i(sigmoid(z_i))) v_i` with z = P x + b, in the memory of `hidden`.

    Args:
        hidden: `[..., out_features]`, which nobody else needs.
        features: x, `[..., in_features]`.
        slope: of the linear term, zero for none.
        projection: P, `[components, in_features]`.
        bias: b, `[components]`.
        nodes: `[components, dof]`, valid.
        profile: s at the nodes, `[components, dof]`.
        direction: v, `[components, out_features]`.

    Returns:
        `hidden`, or None where this is not the way: shapes do not fit or rows are very many, something is recorded,
        traced, transformed or cast, or a tensor is not a plain one in the memory of the CPU, or fp64.
    """
    # Before any shape: a trace keeps what was done with it.
    if torch.is_grad_enabled() or not reverse_mode_only() or _may_be_recorded():
        return None
    for tensor in (hidden, features, projection, bias, nodes, profile, direction):
        if type(tensor) not in _PLAIN or not tensor.is_cpu or tensor.dtype == torch.float64:
            return None
    components, width = projection.shape
    if components * features.numel() > _MANY * width:
        return None
    if features.shape[-1:] != (width,) or hidden.shape != (*features.shape[:-1], direction.shape[-1]):
        return None
    if torch.is_autocast_enabled("cpu") or not hidden.is_contiguous():
        return None
    latent = F.linear(features.float(), projection.float(), bias.float()).view(-1, components)
    if latent.numel() <= _FEW and hidden.dtype == torch.float32:  # in half precision, sums are rounded once
        _add_one_by_one(hidden, latent, slope, nodes, profile, direction)
    else:
        design = _design(latent, slope, nodes, profile)
        hidden.view(-1, hidden.shape[-1]).addmm_(design.to(hidden.dtype), direction.to(hidden.dtype))
    return hidden


def _may_be_recorded() -> bool:
    """Whether a mode of torch sees every operation: values that reach it as numbers would be constants to it."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack())


def _design(latent: Tensor, slope: float, nodes: Tensor, profile: Tensor) -> Tensor:
    """What every direction is weighted by: `[rows, components]` as the latent coordinates z."""
    coords = torch.sigmoid(latent).numpy()
    values = np.empty_like(coords)
    meshes, profiles = (tensor.detach().float().numpy() for tensor in (nodes, profile))
    for i, (mesh, at_nodes) in enumerate(zip(meshes, profiles, strict=True)):
        values[:, i] = np.interp(coords[:, i], mesh, at_nodes)
    design = torch.from_numpy(values)
    return design.add_(latent, alpha=slope) if slope else design  # zero times an infinite z is NaN


def _add_one_by_one(
    hidden: Tensor, latent: Tensor, slope: float, nodes: Tensor, profile: Tensor, direction: Tensor
) -> None:
    """Where a loop over the coordinates in Python takes less time than calls that take all at once."""
    meshes, profiles = nodes.tolist(), profile.tolist()
    vectors = direction.float().unbind()
    rows = (hidden,) if len(latent) == 1 else hidden.view(-1, hidden.shape[-1]).unbind()
    for row, latents in zip(rows, latent.tolist(), strict=True):
        for z, mesh, values, vector in zip(latents, meshes, profiles, vectors, strict=True):
            value = _interpolate(0.5 + 0.5 * tanh(0.5 * z), mesh, values)
            row.add_(vector, alpha=value + slope * z if slope else value)  # z may be infinite


def _interpolate(coord: float, mesh: list[float], values: list[float]) -> float:
    """A piecewise-linear function at one point; constant beyond the mesh, NaN for NaN."""
    i = min(max(bisect_right(mesh, coord), 1), len(mesh) - 1)
    left, value = mesh[i - 1], values[i - 1]
    local = min(max((coord - left) / (mesh[i] - left), 0.0), 1.0)
    return value + local * (values[i] - value)
