"""SigmoidNorm: from hidden features to coordinates in (0, 1).

Source: Li, Cheng & Gu (2025), section 2.7: u = sigmoid(P x + b).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .mesh import coordinate_dtype, quantile_nodes

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


def principal_start(samples: Tensor, n_components: int, dof: int) -> tuple[Tensor, Tensor, Tensor]:
    """Projection, bias and mesh for the inputs of a module: principal components, logistic scaling, quantiles.

    Row i of P is the i-th principal axis over its standard deviation, times `LOGISTIC_NORMAL_SCALE`, and b centres it,
    so that u = sigmoid(P x + b) is close to uniform ("the built-in PCA can be obtained through standard unsupervised
    methods", Li, Cheng & Gu 2025, sec. 2.7). The nodes are the quantiles of u, which makes the shares of the elements
    equal whatever the distribution.

    Args:
        samples: `[n_samples >= 2, in_features]`, finite.
        n_components: components; those beyond the rank of the samples get random directions.
        dof: nodes per component.

    Returns:
        projection `[n_components, in_features]`, bias `[n_components]`, nodes `[n_components, dof]`; fp32 (fp64 for
        fp64 samples). Equal inputs give equal results.

    Raises:
        ValueError: if samples are not finite or fewer than 2.
    """
    if samples.ndim != 2 or samples.shape[0] < 2 or not torch.isfinite(samples).all():
        raise ValueError(f"samples must be finite and [n_samples >= 2, in_features], got {tuple(samples.shape)}.")
    mean = samples.mean(dim=0)
    centred = samples - mean
    rank = min(n_components, *samples.shape)
    # A randomised SVD: an exact one of a 3072-wide layer takes seconds, times the number of layers.
    with torch.random.fork_rng(devices=[samples.device] if samples.is_cuda else []):
        torch.manual_seed(0)
        axes = torch.svd_lowrank(centred, q=min(rank + 8, *samples.shape), niter=4)[2][:, :rank].T
        spare = initial_projection(n_components, samples.shape[1], dtype=samples.dtype, device=samples.device)
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    axes = axes * largest.sign()  # the sign of an axis is arbitrary: fix it
    deviation = (centred @ axes.T).std(dim=0)  # [rank]
    spread = deviation > 1e-6 * centred.norm() / math.sqrt(centred.numel())
    scaled = axes * (LOGISTIC_NORMAL_SCALE / deviation.clamp_min(torch.finfo(samples.dtype).tiny)).unsqueeze(1)
    projection = spare.clone()
    projection[:rank] = torch.where(spread.unsqueeze(1), scaled, spare[:rank])
    bias = -projection @ mean
    return projection, bias, quantile_nodes(project(samples, projection, bias), dof)
