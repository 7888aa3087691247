"""Randomised eigenpairs and the steps that they give, against dense linear algebra."""

import pytest
import torch

from lreg_peft.core.solve.subspace import dominant_subspace, subspace_step


def matrix(size: int, decay: float) -> torch.Tensor:
    """Symmetric, with eigenvalues decay^0, decay^1, ..."""
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    return basis * decay ** torch.arange(size) @ basis.T


class Counted:
    def __init__(self, dense: torch.Tensor) -> None:
        self.dense, self.columns = dense, []

    def __call__(self, block: torch.Tensor) -> torch.Tensor:
        self.columns.append(block.shape[1])
        return self.dense @ block


@pytest.mark.parametrize(("size", "rank"), [(60, 6), (60, 20), (60, 52), (60, 200), (5, 2), (1, 1)])
def test_leading_eigenpairs(size, rank):
    multiply = Counted(matrix(size, 0.8))
    values, vectors = dominant_subspace(multiply, size, rank)
    columns = min(size, rank + 8)
    products = 1 if columns == size else 3
    assert multiply.columns == [columns] * products
    assert values.shape == (columns,)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(columns, dtype=torch.float64))
    kept = min(rank, size)
    expected = 0.8 ** torch.arange(kept, dtype=torch.float64)
    # Two power iterations damp what lies beyond the block by (0.8 ** 8) ** 5 at the last wanted value.
    torch.testing.assert_close(values[:kept], expected, rtol=1e-3, atol=0)
    residual = multiply.dense @ vectors[:, :kept] - vectors[:, :kept] * values[:kept]
    assert residual.norm(dim=0).max() < 0.03


def test_the_same_seed_gives_the_same_result_and_the_global_generator_is_left_alone():
    dense = matrix(40, 0.9)
    before = torch.get_rng_state()
    one, other, third = (dominant_subspace(lambda x: dense @ x, 40, 4, seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(one, other)
    assert not torch.equal(one, third)
    assert torch.equal(torch.get_rng_state(), before)


def test_steps_minimise_over_their_span():
    dense, gradient = matrix(12, 0.7), torch.randn(12, dtype=torch.float64)
    values, vectors = dominant_subspace(lambda x: dense @ x, 12, 12)
    damped = dense + 0.01 * torch.eye(12, dtype=torch.float64)
    step = subspace_step(gradient, values, vectors, 0.01)
    torch.testing.assert_close(step, -torch.linalg.solve(damped, gradient))
    span = vectors[:, :3]
    reduced = torch.linalg.solve(span.T @ damped @ span, span.T @ gradient)
    torch.testing.assert_close(subspace_step(gradient, values[:3], span, 0.01), -span @ reduced)


def test_no_curvature_gives_no_step():
    values, vectors = dominant_subspace(torch.zeros_like, 6, 3)
    assert not subspace_step(torch.ones(6, dtype=torch.float64), values, vectors, 0.0).any()
