"""Meshes of one feature, and the choice of the smoothing parameter, against dense computations."""

import numpy as np
import pytest
from data_sets import split
from scipy import optimize

from lreg_peft.regression import LagrangeRegressor
from lreg_peft.regression.mesh1d import evaluate, find, place_nodes, second_differences
from lreg_peft.regression.scaling import quantile_knots


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


class Dense:
    """Hat functions, penalty and weights of a regressor of one feature, all dense."""

    def __init__(self, x, y, weight, model, scale="quantile"):
        nodes = model.nodes_[0]
        self.y, self.weight, self.total = y, weight, weight.sum()
        self.line = np.stack((np.ones(len(x)), x), axis=1)
        self.hats = np.stack([np.interp(x, nodes, row) for row in np.eye(len(nodes))], axis=1)
        level = np.interp(nodes, *quantile_knots(x, weight)) if scale == "quantile" else None
        self.rough = np.zeros((len(nodes) - 2, len(nodes)))
        for j, row in enumerate(second_differences(nodes, level)):
            self.rough[j, j : j + 3] = row

    def reml(self, log_lambda):
        """-2 log N(y; 0, lambda^-1 B D^+ D^+^T B^T + W^-1), the straight line integrated out."""
        spread = self.hats @ np.linalg.pinv(self.rough)
        covariance = np.diag(1 / self.weight) + spread @ spread.T / 10**log_lambda
        inverse = np.linalg.inv(covariance)
        information = self.line.T @ inverse @ self.line
        projected = inverse - inverse @ self.line @ np.linalg.solve(information, self.line.T @ inverse)
        squares = self.y @ projected @ self.y
        logs = np.linalg.slogdet(covariance)[1] + np.linalg.slogdet(information)[1]
        return (self.total - 2) * np.log(squares) + logs

    def fitted(self, lam):
        """Residual squares and degrees of freedom."""
        matrix = self.hats.T * self.weight @ self.hats + lam * self.rough.T @ self.rough
        smoother = self.hats @ np.linalg.solve(matrix, self.hats.T * self.weight)
        return self.weight @ (self.y - smoother @ self.y) ** 2, np.trace(smoother)


class TestChoice:
    def case(self, **options):
        random = np.random.default_rng(3)
        x, weight = random.uniform(0, 1, 200), random.uniform(0.5, 3, 200)
        weight /= weight.mean()
        y = np.sin(6 * x) + 0.3 * random.standard_normal(200) / np.sqrt(weight)
        model = LagrangeRegressor(**options).fit(x[:, None], y, weight)
        return model, Dense(x, y, weight, model, options.get("scale", "quantile"))

    @pytest.mark.parametrize("scale", ["quantile", "minmax"])
    def test_is_at_the_optimum_of_the_criterion(self, scale):
        model, dense = self.case(n_nodes=12, scale=scale)
        best = optimize.minimize_scalar(dense.reml, bounds=(-4, 6), method="bounded").x
        # To a few times the tolerance of the search, .03 of the natural logarithm; the optimum is flat.
        assert np.log10(model.smoothing_[0][0, 0]) == pytest.approx(best, abs=0.04)

    def test_degrees_of_freedom_and_noise(self):
        model, dense = self.case(n_nodes=12)
        residual, edf = dense.fitted(model.smoothing_[0][0, 0])
        assert model.edf_ == pytest.approx(edf, rel=1e-8)
        assert model.noise_variance_ == pytest.approx(residual / (200 - edf), rel=1e-8)

    def test_the_gap_is_zero_and_the_objective_the_minimum(self):
        model, dense = self.case()
        values = model.intercept_ + model.values_[0]
        bent = np.sum((dense.rough @ values) ** 2)
        objective = dense.weight @ (dense.y - dense.hats @ values) ** 2 + model.smoothing_[0][0, 0] * bent
        assert model.optimality_.objective == pytest.approx(objective, rel=1e-6)  # the ridge
        assert model.optimality_.gap < 1e-12 * model.optimality_.objective

    def test_noise_gives_little_more_than_a_straight_line(self):
        random = np.random.default_rng(0)
        edf = []
        for _ in range(10):
            edf.append(LagrangeRegressor().fit(random.uniform(size=(300, 1)), random.standard_normal(300)).edf_)
        assert np.median(edf) < 4 and max(edf) < 8  # a line has two; unpenalised, 256

    def test_crowded_meshes_are_doubled(self):
        X, y, _, _ = split("Fig. 4 C")
        assert [entry["nodes"] for entry in LagrangeRegressor().fit(X, y).history_][:2] == [256, 512]

    def test_ties_are_merged_exactly(self):
        random = np.random.default_rng(0)
        x, y = random.integers(0, 5, 50).astype(float), random.standard_normal(50)
        model = LagrangeRegressor(smoothing=0.0).fit(x[:, None], y)
        means = [y[x == v].mean() for v in range(5)]
        np.testing.assert_allclose(model.predict(np.arange(5.0)[:, None]), means, atol=1e-9)
        within = sum(((y[x == v] - m) ** 2).sum() for v, m in enumerate(means))
        assert model.noise_variance_ == pytest.approx(within / 45)

    def test_outputs_have_penalties_of_their_own(self):
        X, y, X_test, _ = split("A1")
        both = LagrangeRegressor().fit(X, np.stack((y, np.cos(20 * X[:, 0])), axis=1))
        np.testing.assert_allclose(both.predict(X_test)[:, 0], LagrangeRegressor().fit(X, y).predict(X_test), atol=0.01)
        assert both.smoothing_[0][0, 0] > 100 * both.smoothing_[0][0, 1]


def test_the_error_falls_with_the_square_of_the_nodes():
    """Slope -2 in the number of nodes, without noise, on sin(1/x) by quantiles (1/x uniform)."""
    x = 1 / np.random.default_rng(0).uniform(2, 50, 200_000)
    test = 1 / np.random.default_rng(1).uniform(2.1, 49.9, 4000)
    counts, errors = [128, 256, 512], []
    for n in counts:
        model = LagrangeRegressor(n_nodes=n, smoothing=0.0).fit(x[:, None], np.sin(1 / x))
        errors.append(np.sqrt(np.mean((model.predict(test[:, None]) - np.sin(1 / test)) ** 2)))
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-2, abs=0.1)
