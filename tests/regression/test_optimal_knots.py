"""The dynamic program over candidate nodes, and sliding."""

import itertools

import numpy as np
import pytest
import torch

from lreg_peft.core import check_nodes, hat_basis
from lreg_peft.regression.free_knots import fit_piecewise_linear
from lreg_peft.regression.optimal_knots import optimal_knots


def noisy(seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(seed)
    x = random.uniform(0, 1, n) ** 2
    y = np.sin(9 * np.sqrt(x)) + 0.3 * random.standard_normal(n)
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(random.uniform(0.2, 3, n))


def squares(x, y, weight, nodes) -> float:
    """Least squares on a mesh, by QR."""
    basis = hat_basis(x.unsqueeze(1), nodes.unsqueeze(0))[:, 0] * weight.sqrt().unsqueeze(1)
    target = y * weight.sqrt()
    return (basis @ torch.linalg.lstsq(basis, target.unsqueeze(1)).solution[:, 0] - target).square().sum().item()


class TestProgram:
    @pytest.mark.parametrize("seed", range(4))
    def test_nothing_on_the_grid_is_better(self, seed):
        """Against all choices of nodes, sample weights included."""
        x, y, weight = noisy(seed, 60)
        n = 11
        for found in optimal_knots(x, y, [2, 3, 4, 5, 6], weight=weight, n_candidates=n):
            grid = optimal_knots(x, y, [n], weight=weight, n_candidates=n)[0].grid_nodes
            assert len(grid) == n
            best = min(
                squares(x, y, weight, torch.cat((grid[:1], grid[list(inner)], grid[-1:])))
                for inner in itertools.combinations(range(1, n - 1), len(found.nodes) - 2)
            )
            assert found.grid_objective == pytest.approx(best, rel=1e-9)
            assert found.lower_bound == pytest.approx(best, rel=1e-9)

    def test_bounds_from_a_coarse_grid_do_not_prune_the_optimum(self):
        """Against all choices from a grid that is large enough for a coarse one before it."""
        x, y, weight = noisy(0, 60)
        grid = optimal_knots(x, y, [50], weight=weight, n_candidates=50)[0].grid_nodes
        assert len(grid) > 40
        for found in optimal_knots(x, y, [3, 4], weight=weight, n_candidates=50):
            choices = itertools.combinations(range(1, len(grid) - 1), len(found.nodes) - 2)
            best = min(squares(x, y, weight, grid[[0, *inner, -1]]) for inner in choices)
            assert found.grid_objective == pytest.approx(best, rel=1e-9)
            assert found.lower_bound == pytest.approx(best, rel=1e-9)

    def test_kinks_are_found(self):
        random = np.random.default_rng(0)
        x = torch.from_numpy(random.uniform(0, 1, 2000))
        kinks = torch.tensor([0.0, 0.17, 0.31, 0.74, 1.0], dtype=torch.float64)
        y = torch.from_numpy(np.interp(x.numpy(), kinks.numpy(), [0.0, 3.0, -1.0, 2.0, 0.0]))
        (found,) = optimal_knots(x, y, [5])
        torch.testing.assert_close(found.nodes[1:-1], kinks[1:-1], atol=1e-4, rtol=0)
        assert found.objective < 1e-6 * y.square().sum().item()


class TestAgainstTheDescent:
    @pytest.mark.parametrize(("n_nodes", "bar"), [(8, 0.3038), (16, 0.03093), (24, 0.00421)])
    def test_sine_of_inverse(self, n_nodes, bar):
        """The best known, from 160 quantiles and sliding; the descent from quantiles reaches .3429 with 8 nodes."""
        random = np.random.default_rng(0)
        x = 1 / random.uniform(1, 50, 1000)
        x, y = torch.from_numpy(x), torch.from_numpy(np.sin(1 / x) + 0.01 * random.standard_normal(1000))
        (found,) = optimal_knots(x, y, [n_nodes])
        check_nodes(found.nodes.unsqueeze(0))
        assert found.objective / 1000 <= bar
        assert found.objective <= found.grid_objective
        assert found.objective == pytest.approx(squares(x, y, torch.ones_like(x), found.nodes), rel=1e-6)
        assert found.objective / 1000 <= fit_piecewise_linear(x.unsqueeze(1), y, n_nodes, knot_cost=1.0).loss


class TestHardData:
    def test_whole_weights_repeat_samples(self):
        x, y, _ = noisy(1, 80)
        weight = torch.from_numpy(np.random.default_rng(0).integers(1, 4, 80))
        (a,) = optimal_knots(x, y, [6], weight=weight.double())
        (b,) = optimal_knots(x.repeat_interleave(weight), y.repeat_interleave(weight), [6])
        torch.testing.assert_close(a.grid_nodes, b.grid_nodes)
        assert a.lower_bound == pytest.approx(b.lower_bound, rel=1e-9)

    def test_ties_few_samples_and_more_nodes_than_samples(self):
        x = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 2.0]).double()
        y = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0, 0.0]).double()
        results = optimal_knots(x, y, [2, 3, 9])
        assert [len(r.nodes) for r in results] == [2, 3, 3]
        assert results[-1].objective == pytest.approx(4.0)  # what is left within ties: 2 + 2

    @pytest.mark.parametrize("scale", [1e-9, 1e9])
    def test_units_do_not_matter(self, scale):
        x, y, _ = noisy(2, 200)
        (a,) = optimal_knots(x, y, [6])
        (b,) = optimal_knots(x * scale + scale, y * scale, [6])
        torch.testing.assert_close(b.nodes / scale - 1, a.nodes, atol=1e-4, rtol=0)

    def test_refusals(self):
        x = torch.arange(5.0)
        for message, arguments, options in (
            ("shape", (x, x[:4], [2]), {}),
            ("distinct", (torch.ones(5), x, [2]), {}),
            ("at least 2", (x, x, [1]), {}),
            ("at least 2", (x, x, []), {}),
            ("finite", (x, x / 0, [2]), {}),
            ("positive", (x, x, [2]), {"weight": torch.zeros(5)}),
        ):
            with pytest.raises(ValueError, match=message):
                optimal_knots(*arguments, **options)


@pytest.mark.parametrize(("seed", "n"), [(1, 100), (3, 100), (1, 200)])
def test_almost_as_many_nodes_as_the_coarse_grid_has(seed, n):
    """The coarse grid may reach nothing as good as what is known of the fine one: then it has nothing to say."""
    random = np.random.default_rng(seed)
    x = torch.from_numpy(random.uniform(size=n))
    y = torch.sin(6 * x) + 0.2 * torch.from_numpy(random.standard_normal(n))
    (found,) = optimal_knots(x, y, [38])
    assert len(found.nodes) == 38 and (found.nodes.diff() > 0).all()
    # The value is what the grid leaves, up to the ridge of the program.
    assert found.objective <= found.grid_objective <= found.lower_bound * (1 + 1e-6)
