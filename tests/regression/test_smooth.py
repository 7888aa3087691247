"""Bands, meshes of one feature, and the choice of the smoothing parameter, against dense computations."""

import numpy as np
import pytest
from data_sets import split
from scipy import optimize

from lreg_peft.regression.banded import Pentadiagonal
from lreg_peft.regression.mesh1d import evaluate, find, place_nodes, second_differences
from lreg_peft.regression.scaling import quantile_knots
from lreg_peft.regression.smooth import Grouped, fit_on_nodes, fit_smooth


class TestPentadiagonal:
    @pytest.mark.parametrize("n", [1, 2, 3, 12])
    def test_against_dense_matrices(self, n):
        random = np.random.default_rng(n)
        roots = [np.tril(np.triu(random.standard_normal((n, n)), -2)) + 2 * np.eye(n) for _ in range(3)]
        dense = np.stack([root @ root.T for root in roots], axis=-1)  # [n, n, batch]
        bands = [np.zeros((n, 3)) for _ in range(3)]
        for k in range(min(3, n)):
            bands[k][k:] = np.stack([np.diagonal(dense[:, :, b], -k) for b in range(3)], axis=-1)
        factor = Pentadiagonal.factor(*bands)
        right = random.standard_normal((n, 3, 2))
        inverse = np.stack([np.linalg.inv(dense[:, :, b]) for b in range(3)], axis=-1)
        np.testing.assert_allclose(factor.log_determinant(), [np.linalg.slogdet(dense[:, :, b])[1] for b in range(3)])
        np.testing.assert_allclose(factor.solve(right), np.einsum("ijb,jbq->ibq", inverse, right), atol=1e-8)
        for k, band in enumerate(factor.inverse_band()):
            for b in range(3):
                np.testing.assert_allclose(band[k:, b], np.diagonal(inverse[:, :, b], -k), atol=1e-8)


class TestNodes:
    def test_are_samples_at_equal_steps_of_weight(self):
        x = np.sort(np.random.default_rng(0).uniform(size=1000))
        nodes = place_nodes(x, np.ones(1000), 11, "quantile")
        assert len(nodes) == 11 and np.isin(nodes, x).all() and nodes[[0, -1]].tolist() == x[[0, -1]].tolist()
        counts = np.histogram(x, nodes)[0]
        assert counts.min() >= 99 and counts.max() <= 101

    def test_few_values_get_a_node_each(self):
        x = np.repeat([0.0, 1.0, 5.0], [900, 50, 50])
        assert place_nodes(x, np.ones(1000), 16, "quantile").tolist() == [0, 1, 5]

    def test_ties_leave_nodes_for_the_rest(self):
        x = np.sort(np.concatenate((np.zeros(900), np.random.default_rng(0).uniform(0, 1, 100))))
        nodes = place_nodes(x, np.ones(1000), 16, "quantile")
        assert len(nodes) >= 8 and (np.diff(nodes) > 0).all()

    def test_steps_of_the_range(self):
        x = np.sort(np.random.default_rng(0).exponential(size=100))
        np.testing.assert_allclose(place_nodes(x, np.ones(100), 5, "minmax"), np.linspace(x[0], x[-1], 5))

    def test_evaluation_is_interpolation_and_goes_on_straight(self):
        nodes, values = np.array([0.0, 1.0, 3.0]), np.array([[1.0], [2.0], [0.0]])
        x = np.array([-1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 5.0])
        assert evaluate(x, nodes, values)[:, 0].tolist() == [0.0, 1.0, 1.5, 2.0, 1.0, 0.0, -2.0]
        element, local = find(x, nodes)
        assert element.tolist() == [0, 0, 0, 1, 1, 1, 1] and local[0] == -1 and local[-1] == 2

    @pytest.mark.parametrize("scale", ["quantile", "minmax"])
    def test_lines_are_not_penalised_and_equal_steps_give_second_differences(self, scale):
        random = np.random.default_rng(0)
        nodes = np.sort(random.uniform(size=9))
        for j, row in enumerate(
            second_differences(nodes, np.sort(random.uniform(size=9)) if scale == "quantile" else None)
        ):
            assert abs(row @ (3 * nodes[j : j + 3] + 2)) < 1e-10 * np.abs(row).max()
        even = np.linspace(0, 1, 6) if scale == "quantile" else None
        np.testing.assert_allclose(second_differences(np.arange(6.0) * 7, even), np.tile([1.0, -2.0, 1.0], (4, 1)))


def dense_pieces(data, nodes, scale):
    hats = np.stack([np.interp(data.x, nodes, row) for row in np.eye(len(nodes))], axis=1)
    rough = np.zeros((len(nodes) - 2, len(nodes)))
    level = np.interp(nodes, *quantile_knots(data.x, data.mass)) if scale == "quantile" else None
    for j, row in enumerate(second_differences(nodes, level)):
        rough[j, j : j + 3] = row
    return hats, rough


class TestChoice:
    def case(self):
        random = np.random.default_rng(3)
        x, weight = random.uniform(0, 1, 200), random.integers(1, 4, 200).astype(float)
        y = np.sin(6 * x) + 0.3 * random.standard_normal(200) / np.sqrt(weight)
        return Grouped.of(x, y[:, None], weight)

    def test_reml_is_the_likelihood_of_the_mixed_model(self):
        """log N(y; 0, lambda^-1 B D^+ D^+^T B^T + W^-1), the straight line integrated out, at its own minimum."""
        data = self.case()
        nodes = place_nodes(data.x, data.mass, 12, "quantile")
        hats, rough = dense_pieces(data, nodes, "quantile")
        spread = hats @ np.linalg.pinv(rough)
        line = np.stack((np.ones(len(data.x)), data.x), axis=1)
        n = len(data.x)

        def criterion(log_lambda):
            covariance = np.diag(1 / data.weight) + spread @ spread.T / 10**log_lambda
            inverse = np.linalg.inv(covariance)
            information = line.T @ inverse @ line
            projected = inverse - inverse @ line @ np.linalg.solve(information, line.T @ inverse)
            squares = data.y[:, 0] @ projected @ data.y[:, 0]
            return (n - 2) * np.log(squares) + np.linalg.slogdet(covariance)[1] + np.linalg.slogdet(information)[1]

        best = optimize.minimize_scalar(criterion, bounds=(-4, 6), method="bounded").x
        fit = fit_on_nodes(data, nodes, "quantile", "reml", float(n))
        # A grid of 40 values and the vertex of a parabola: to a tenth of the distance of the grid, .38.
        assert np.log10(fit.smoothing[0]) == pytest.approx(best, abs=0.06)

    def test_gcv_and_degrees_of_freedom(self):
        data = self.case()
        nodes = place_nodes(data.x, data.mass, 12, "quantile")
        hats, rough = dense_pieces(data, nodes, "quantile")
        gram = hats.T * data.weight @ hats
        total = data.weight.sum()

        def fitted(lam):
            smoother = hats @ np.linalg.solve(gram + lam * rough.T @ rough, hats.T * data.weight)
            residual = data.weight @ (data.y[:, 0] - smoother @ data.y[:, 0]) ** 2 + data.within[0]
            return residual, np.trace(smoother)

        def criterion(log_lambda):
            residual, edf = fitted(10**log_lambda)
            return total * residual / (total - edf) ** 2

        best = optimize.minimize_scalar(criterion, bounds=(-3, 4), method="bounded").x
        fit = fit_on_nodes(data, nodes, "quantile", "gcv", total)
        assert np.log10(fit.smoothing[0]) == pytest.approx(best, abs=0.06)
        residual, edf = fitted(fit.smoothing[0])
        assert fit.edf[0] == pytest.approx(edf, rel=1e-8)
        assert fit.noise_variance[0] == pytest.approx(residual / (total - edf), rel=1e-8)

    def test_the_gap_is_zero_and_the_objective_the_minimum(self):
        data = self.case()
        fit = fit_smooth(data)
        hats, rough = dense_pieces(data, fit.nodes, "quantile")
        values = fit.values[:, 0]
        objective = data.weight @ (data.y[:, 0] - hats @ values) ** 2 + fit.smoothing[0] * np.sum((rough @ values) ** 2)
        assert fit.objective[0] == pytest.approx(objective + data.within[0], rel=1e-8)
        assert fit.gap[0] < 1e-12 * fit.objective[0]

    def test_noise_gives_little_more_than_a_straight_line(self):
        random = np.random.default_rng(0)
        edf = []
        for _ in range(10):
            x, y = random.uniform(size=300), random.standard_normal(300)
            edf.append(fit_smooth(Grouped.of(x, y[:, None], np.ones(300))).edf[0])
        assert np.median(edf) < 4 and max(edf) < 8  # a line has two; unpenalised, 256

    def test_crowded_meshes_are_doubled(self):
        X, y, _, _ = split("Fig. 4 C")
        fit = fit_smooth(Grouped.of(X[:, 0], y[:, None], np.ones(len(y))))
        assert [entry["nodes"] for entry in fit.history][:2] == [256, 512]

    def test_ties_are_merged_exactly(self):
        random = np.random.default_rng(0)
        x, y = random.integers(0, 5, 50).astype(float), random.standard_normal(50)
        fit = fit_smooth(Grouped.of(x, y[:, None], np.ones(50)), smoothing=0.0)
        means = [y[x == v].mean() for v in range(5)]
        np.testing.assert_allclose(fit.values[:, 0], means, atol=1e-9)
        within = sum(((y[x == v] - m) ** 2).sum() for v, m in enumerate(means))
        assert fit.noise_variance[0] == pytest.approx(within / 45)


def test_the_error_falls_with_the_square_of_the_nodes():
    """Slope -2 in the number of nodes, without noise, on sin(1/x) by quantiles (1/x uniform)."""
    x = 1 / np.random.default_rng(0).uniform(2, 50, 200_000)
    test = 1 / np.random.default_rng(1).uniform(2.1, 49.9, 4000)
    counts, errors = [128, 256, 512], []
    for n in counts:
        fit = fit_smooth(Grouped.of(x, np.sin(1 / x)[:, None], np.ones(len(x))), n_nodes=n, smoothing=0.0)
        errors.append(np.sqrt(np.mean((fit.predict(test)[:, 0] - np.sin(1 / test)) ** 2)))
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-2, abs=0.1)
