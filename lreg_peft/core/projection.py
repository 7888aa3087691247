"""SigmoidNorm: from hidden features to coordinates in (0, 1).

Source: Li, Cheng & Gu (2025), section 2.7: u = sigmoid(P x + b).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .mesh import coordinate_dtype

#: sigmoid(1.702 z) is within 0.0095 of the normal distribution function at z (Camilli 1994, "Origin of the scaling
#: constant d = 1.7 in item response theory"), so a standard normal z gives a nearly uniform coordinate.
LOGISTIC_NORMAL_SCALE = 1.702


def project(features: Tensor, projection: Tensor, bias: Tensor) -> Tensor:
    """Coordinates u = sigmoid(P x + b), computed in fp32 (fp64 if an input is) whatever the compute dtype.

    Args:
        features: `[..., in_features]`.
        projection: P, `[components, in_features]`.
        bias: b, `[components]`.

    Returns:
        `[..., components]` in (0, 1), fp32 or fp64.
    """
    dtype = coordinate_dtype(features, projection)
    return torch.sigmoid(F.linear(features.to(dtype), projection.to(dtype), bias.to(dtype)))


def initial_projection(
    n_components: int,
    in_features: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """A random projection that spreads coordinates over (0, 1) without having seen data.

    Rows have norm `LOGISTIC_NORMAL_SCALE` and are orthogonal as far as `n_components <= in_features` allows. Features
    of zero mean and unit variance, which is what a layer norm leaves, then give coordinates that are close to uniform;
    with a small random matrix every coordinate would stay near 0.5, inside one or two elements.

    Returns:
        `[n_components, in_features]`.
    """
    projection = torch.empty(n_components, in_features, dtype=dtype, device=device)
    if projection.device.type == "meta":
        return projection
    return torch.nn.init.orthogonal_(projection, gain=LOGISTIC_NORMAL_SCALE)


def standard_profile(nodes: Tensor) -> Tensor:
    """Scalar functions for the factored head to start from: affine in u, mean 0 and variance 1 for uniform u.

    Args:
        nodes: `[components, dof]` on [0, 1].

    Returns:
        `[components, dof]`, the values at the nodes.
    """
    return math.sqrt(12) * (nodes - 0.5)
