"""Dominant eigenvectors of a matrix that is known by its products, and least-squares steps in their span."""

from collections.abc import Callable

import torch
from torch import Tensor

# Columns beyond the wanted rank, as usual for randomised range finders.
_OVERSAMPLE = 8
_POWER_ITERATIONS = 2


def dominant_subspace(
    multiply: Callable[[Tensor], Tensor], size: int, rank: int, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Leading eigenpairs of a symmetric positive semi-definite matrix, by randomised subspace iteration.

    For the matrix A^T A these are the squared singular values and right singular vectors of a randomised SVD of A with
    power iterations (Halko, Martinsson & Tropp 2011, "Finding structure with randomness").

    Args:
        multiply: product of the matrix with a block, `[size, k]` -> `[size, k]`, fp64; called three times, or once if
            k takes up the whole space: the result is exact then.
        size: of the matrix.
        rank: how many pairs are wanted, at least 1.
        seed: of the random start; the global generator is left alone.

    Returns:
        eigenvalues `[k]` in falling order, not negative, and orthonormal vectors `[size, k]`, fp64;
        k = min(size, rank + 8).
    """
    columns = min(size, rank + _OVERSAMPLE)
    if columns == size:
        basis = torch.eye(size, dtype=torch.float64, device="cpu")
    else:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(size, columns, dtype=torch.float64, generator=generator, device="cpu")
        basis = torch.linalg.qr(start).Q
        for _ in range(_POWER_ITERATIONS):
            basis = torch.linalg.qr(multiply(basis)).Q
    small = basis.T @ multiply(basis)
    values, rotation = torch.linalg.eigh((small + small.T) / 2)
    return values.flip(0).clamp_min(0), basis @ rotation.flip(1)


def subspace_step(gradient: Tensor, values: Tensor, vectors: Tensor, damping: float) -> Tensor:
    """The minimiser of g.d + d.M d / 2 + damping |d|^2 / 2 over the span of eigenvectors of M.

    Args:
        gradient: g, `[size]`.
        values: their eigenvalues, `[k]`, not negative.
        vectors: orthonormal, `[size, k]`.
        damping: at least 0.

    Returns:
        d, `[size]`; zero in directions without curvature, which no least-squares step can use.
    """
    curvature = values + damping
    return -vectors @ torch.where(curvature > 0, (vectors.T @ gradient) / curvature, 0.0)
