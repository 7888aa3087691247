"""Meshes of one feature, and the choice of the smoothing parameter, against dense computations."""

import numpy as np
import pytest
from data_sets import split
from scipy import optimize

from lreg_peft.regression import LagrangeRegressor
from lreg_peft.regression.mesh1d import evaluate, find, place_nodes
from lreg_peft.regression.terms import Line


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


class TestChoice:
    def case(self, **options):
        random = np.random.default_rng(3)
        x, weight = random.uniform(0, 1, 200), random.uniform(0.5, 3, 200)
        weight /= weight.mean()
        y = np.sin(6 * x) + 0.3 * random.standard_normal(200) / np.sqrt(weight)
        model = LagrangeRegressor(**options).fit(x[:, None], y, weight)
        line = Line.over(0, x, np.ones(200), model.nodes_[0], options.get("scale", "quantile"))
        return model, line.at(x), y, weight

    @pytest.mark.parametrize("scale", ["quantile", "minmax"])
    def test_is_at_the_optimum_of_the_restricted_likelihood(self, scale):
        """-2 log N(y; 0, B diag(1 / lambda) B^T + W^-1), the mean integrated out, over both penalties."""
        model, basis, y, weight = self.case(n_nodes=12, scale=scale)

        def criterion(log):
            variance = np.exp(-np.array([log[0], *[log[1]] * (basis.shape[1] - 1)]))
            inverse = np.linalg.inv(np.diag(1 / weight) + basis * variance @ basis.T)
            information = inverse.sum()
            squares = y @ inverse @ y - (inverse.sum(axis=0) @ y) ** 2 / information
            return 199 * np.log(squares) - np.linalg.slogdet(inverse)[1] + np.log(information)

        best = optimize.minimize(criterion, [0.0, 0.0], method="Nelder-Mead").fun
        # Up to the common factor that cross-validation may add; updates end at changes of .01.
        found = np.log(model.smoothing_[0][:, 0])
        assert min(criterion(found - k * np.log(10) / 2) for k in range(4)) < best + 0.05

    def test_degrees_of_freedom_noise_and_the_optimum(self):
        model, basis, y, weight = self.case(n_nodes=12)
        design = np.column_stack((np.ones(200), basis))
        penalty = np.repeat(np.append(0.0, model.smoothing_[0][:, 0]), [1, 1, basis.shape[1] - 1])
        solved = np.linalg.solve(design.T * weight @ design + np.diag(penalty), design.T * weight)
        theta, edf = solved @ y, np.trace(solved @ design)
        residual = weight @ (y - design @ theta) ** 2
        assert model.edf_ == pytest.approx(edf, rel=1e-8)
        assert model.noise_variance_ == pytest.approx(residual / (200 - edf), rel=1e-8)
        assert model.optimality_.objective == pytest.approx(residual + penalty @ theta**2, rel=1e-9)
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
        assert both.smoothing_[0][1, 0] > 10 * both.smoothing_[0][1, 1]


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
