"""Few nodes, placed by the data."""

import numpy as np
import pytest
from data_sets import split

from lreg_peft.regression import LagrangeRegressor


def mse(model, X, y) -> float:
    return float(np.mean((model.predict(X) - y) ** 2))


class TestOptimal:
    @pytest.mark.parametrize(
        ("name", "n_nodes", "bar"), [("B1", 8, 0.3037), ("B1", 16, 0.03092), ("A1", 8, 0.01620), ("A1", 16, 0.01524)]
    )
    def test_reaches_the_best_known(self, name, n_nodes, bar):
        X, y, _, _ = split(name)
        model = LagrangeRegressor(nodes="optimal", n_nodes=n_nodes).fit(X, y)
        assert mse(model, X, y) <= bar
        assert len(model.nodes_[0]) == n_nodes
        found = model.optimality_
        # Certified on the grid: what its best nodes leave, solved for afresh, is the value of the program.
        assert abs(found.gap) <= 1e-9 * found.objective and "grid" in found.about
        assert mse(model, X, y) * len(X) <= found.objective
        assert mse(model, X, y) <= mse(LagrangeRegressor(nodes="free", n_nodes=n_nodes).fit(X, y), X, y)

    def test_cross_validation_chooses_the_number(self):
        random = np.random.default_rng(0)
        x = random.uniform(0, 1, 400)
        y = np.interp(x, [0, 0.3, 0.6, 1], [0, 2, -1, 1]) + 0.1 * random.standard_normal(400)
        model = LagrangeRegressor(nodes="optimal").fit(x[:, None], y)
        assert len(model.nodes_[0]) == 4
        np.testing.assert_allclose(model.nodes_[0][1:3], [0.3, 0.6], atol=0.02)
        assert [entry["nodes"] for entry in model.history_][:4] == [2, 3, 4, 6]

    def test_weights_count(self):
        X, y, _, _ = split("A1")
        weight = np.where(X[:, 0] > 0, 4.0, 1.0)
        weighted = LagrangeRegressor(nodes="optimal", n_nodes=6).fit(X, y, sample_weight=weight)
        plain = LagrangeRegressor(nodes="optimal", n_nodes=6).fit(X, y)
        error = [weight @ (model.predict(X) - y) ** 2 for model in (weighted, plain)]
        assert error[0] < error[1]


class TestOthers:
    @pytest.mark.parametrize("nodes", ["free", "paper"])
    def test_coefficients_are_the_optimum_on_their_meshes(self, nodes):
        X, y, X_test, y_test = split("A2")
        model = LagrangeRegressor(nodes=nodes, n_nodes=12).fit(X, np.stack((y, 3 - y), axis=1))
        assert model.score(X_test, np.stack((y_test, 3 - y_test), axis=1)) > 0.985
        assert model.optimality_.gap < 1e-9 * model.optimality_.objective
        hats = [
            np.stack([np.interp(x, mesh, row) for row in np.eye(12)], axis=1)
            for x, mesh in zip(X.T, model.nodes_, strict=True)
        ]
        design = np.concatenate((hats[0], hats[1]), axis=1)
        expected = design @ np.linalg.lstsq(design, y, rcond=None)[0]
        np.testing.assert_allclose(model.predict(X)[:, 0], expected, atol=1e-7)

    def test_the_published_update_is_kept_for_comparison(self):
        X, y, _, _ = split("B1")
        published = LagrangeRegressor(nodes="paper", n_nodes=16).fit(X, y)
        assert len(published.history_) > 2  # one entry per update
        assert mse(published, X, y) > 2 * mse(LagrangeRegressor(nodes="free", n_nodes=16).fit(X, y), X, y)

    def test_moving_nodes_find_what_smoothness_hides(self):
        random = np.random.default_rng(0)
        x = random.uniform(0, 1, 300)
        y = np.abs(x - 0.37) + 0.02 * random.standard_normal(300)
        model = LagrangeRegressor(nodes="free", n_nodes=3).fit(x[:, None], y)
        assert model.nodes_[0][1] == pytest.approx(0.37, abs=0.01)

    @pytest.mark.parametrize("nodes", ["free", "optimal"])
    def test_deviations_take_the_nodes_as_given(self, nodes):
        inside = []
        for seed in range(3):
            X, y, X_test, y_test = split("A1", seed)
            mean, std = LagrangeRegressor(nodes=nodes, n_nodes=10).fit(X, y).predict(X_test, return_std=True)
            inside.append((np.abs(mean - y_test) < 1.645 * std).mean())
        assert np.mean(inside) == pytest.approx(0.9, abs=0.05)
