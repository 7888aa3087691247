"""SigmoidNorm: from hidden features to coordinates in (0, 1).

Source: Li, Cheng & Gu (2025), section 2.7: u = sigmoid(P x + b).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import whole
from .mesh import coordinate_dtype, quantile_nodes

#: sigmoid(1.702 z) is within 0.0095 of the normal distribution function at z (Camilli 1994, "Origin of the scaling
#: constant d = 1.7 in item response theory"), so a standard normal z gives a nearly uniform coordinate.
LOGISTIC_NORMAL_SCALE = 1.702

# Rows of a matrix whose product with itself is decomposed exactly in a few milliseconds.
_FEW_ROWS = 256


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
    whole("n_components", n_components, 1)
    whole("in_features", in_features, 1)
    projection = torch.empty(n_components, in_features, dtype=dtype, device=device)
    if projection.device.type == "meta":
        return projection
    return torch.nn.init.orthogonal_(projection, gain=LOGISTIC_NORMAL_SCALE)


def standard_profile(nodes: Tensor, mean: float = 1.0) -> Tensor:
    """Scalar functions for the factored weighting to start from: affine in u, variance 1 for uniform u.

    With a mean of zero the output vector would first learn what varies with u alone. A change of domain asks for a
    constant shift above all, and with a mean of one the same vector starts on both.

    Args:
        nodes: `[components, n_nodes]` on [0, 1].
        mean: for uniform u.

    Returns:
        `[components, n_nodes]`, the values at the nodes.
    """
    return mean + math.sqrt(12) * (nodes - 0.5)


def principal_axes(samples: Tensor, n_components: int) -> Tensor:
    """Directions of largest variance of `samples` `[n_samples, in_features]`: orthonormal `[k, in_features]`.

    k is `n_components`, or the smaller side of `samples` if that is less. The samples are centred first.
    """
    return leading_axes(samples - samples.mean(dim=0), n_components)


def leading_axes(matrix: Tensor, n_components: int) -> Tensor:
    """Leading right singular vectors of `[m, in_features]`: orthonormal `[k, in_features]`.

    From the eigenvectors of the smaller product for few rows, else by a randomised SVD: an exact one of a 3072-wide
    layer takes seconds, times the number of layers. Equal inputs give equal results.
    """
    rank = min(n_components, *matrix.shape)
    if len(matrix) <= _FEW_ROWS:
        wide = matrix.double()
        left = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:].flip(1)
        return _with_signs(torch.linalg.qr(wide.T @ left).Q.T.to(matrix.dtype))
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        axes = torch.svd_lowrank(matrix, q=min(rank + 8, *matrix.shape), niter=4)[2][:, :rank].T
    return _with_signs(axes)


def _with_signs(axes: Tensor) -> Tensor:
    """The sign of an axis is arbitrary: fix it."""
    return axes * axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor that is not empty has neither NaN nor infinities, in one reading."""
    return all(math.isfinite(bound) for bound in tensor.aminmax())


def standardised_start(samples: Tensor, axes: Tensor, n_components: int, n_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Projection, bias and mesh along given axes: logistic scaling, and nodes at the quantiles.

    Row i of P is the i-th axis over the standard deviation of the samples along it, times `LOGISTIC_NORMAL_SCALE`, and
    b centres it, so that u = sigmoid(P x + b) is close to uniform. The nodes are the quantiles of u, which makes the
    shares of the elements equal whatever the distribution.

    Args:
        samples: `[n_samples >= 2, in_features]`, finite.
        axes: `[k, in_features]`, orthonormal. Components beyond k, and those along which the samples do not vary, get
            random directions.
        n_components: components.
        n_nodes: nodes per component.

    Returns:
        projection `[n_components, in_features]`, bias `[n_components]`, nodes `[n_components, n_nodes]`; fp32 (fp64 for
        fp64 samples). Equal inputs give equal results.

    Raises:
        ValueError: if samples are not finite or fewer than 2.
    """
    if samples.ndim != 2 or samples.shape[0] < 2 or not all_finite(samples):
        raise ValueError(f"samples must be finite and [n_samples >= 2, in_features], got {tuple(samples.shape)}.")
    mean = samples.mean(dim=0)
    centred = samples - mean
    axes = axes[:n_components]
    deviation = (centred @ axes.T).std(dim=0)  # [k]
    varies = deviation > 1e-6 * centred.norm() / math.sqrt(centred.numel())
    projection = axes * (LOGISTIC_NORMAL_SCALE / deviation.clamp_min(torch.finfo(samples.dtype).tiny)).unsqueeze(1)
    if len(axes) < n_components or not varies.all():
        with torch.random.fork_rng(devices=[samples.device] if samples.is_cuda else []):
            torch.manual_seed(0)
            drawn = initial_projection(n_components, samples.shape[1], dtype=samples.dtype, device=samples.device)
        drawn[: len(axes)] = torch.where(varies.unsqueeze(1), projection, drawn[: len(axes)])
        projection = drawn
    bias = -projection @ mean
    return projection, bias, quantile_nodes(project(samples, projection, bias), n_nodes)
