"""A few nodes that move."""

import itertools

import numpy as np
import pytest
from data_sets import split

from lreg_peft.regression import LagrangeRegressor


def free(n_nodes: int) -> LagrangeRegressor:
    return LagrangeRegressor(nodes="free", n_nodes=n_nodes)


class TestPlaces:
    @pytest.mark.parametrize("seed", [0, 1])
    def test_sixteen_nodes_find_the_extrema_of_a_wave(self, seed):
        X, y, X_test, y_test = split("B1", seed)
        quantiles = LagrangeRegressor(n_nodes=16, smoothing=1e-10).fit(X, y)
        assert quantiles.score(X_test, y_test) < 0.75
        assert free(16).fit(X, y).score(X_test, y_test) > 0.9

    @pytest.mark.parametrize(("n_nodes", "bar"), [(8, 0.3038), (16, 0.0309), (24, 0.0043)])
    def test_near_the_best_there_are(self, n_nodes, bar):
        """The mean squares of the best nodes of a grid of 160 quantiles, slid, as a dynamic program finds them."""
        X, y, _, _ = split("B1")
        model = free(n_nodes).fit(X, y)
        assert np.mean((model.predict(X) - y) ** 2) < 1.1 * bar

    def test_kinks_are_found(self):
        random = np.random.default_rng(0)
        x = random.uniform(0, 1, 500)
        kinks, values = np.array([0, 0.1, 0.15, 0.6, 1]), np.array([0.0, 2, -1, 3, 1])
        model = free(5).fit(x[:, None], np.interp(x, kinks, values))
        np.testing.assert_allclose(model.nodes_[0][1:-1], kinks[1:-1], atol=1e-3)
        np.testing.assert_allclose(model.predict(x[:, None]), np.interp(x, kinks, values), atol=5e-3)

    def test_a_kink_in_noise(self):
        random = np.random.default_rng(0)
        x = random.uniform(0, 1, 300)
        y = np.abs(x - 0.37) + 0.02 * random.standard_normal(300)
        assert free(3).fit(x[:, None], y).nodes_[0][1] == pytest.approx(0.37, abs=0.01)

    def test_of_several_features_and_outputs(self):
        random = np.random.default_rng(0)

        def truth(x):
            wave, kink = np.sin(1 / (0.05 + x[:, 0])), np.abs(x[:, 1] - 0.3)
            return np.stack((wave + kink, wave - 2 * kink), axis=1)

        X, new = random.uniform(size=(1500, 2)), random.uniform(size=(4000, 2))
        y = truth(X) + 0.01 * random.standard_normal((1500, 2))
        quantiles = LagrangeRegressor(n_nodes=12, smoothing=1e-10, interactions=0).fit(X, y)
        errors = [np.mean((model.predict(new) - truth(new)) ** 2) for model in (free(12).fit(X, y), quantiles)]
        assert errors[0] < 0.1 * errors[1]


class TestPath:
    def test_every_move_of_a_given_number_lowers_the_error(self):
        X, y, _, _ = split("B1")
        errors = [entry["mean_squared_error"] for entry in free(16).fit(X, y).history_]
        assert len(errors) > 3 and all(b < a for a, b in itertools.pairwise(errors))

    def test_no_more_than_samples_tell_apart(self):
        X, y, _, _ = split("B1")
        assert np.isfinite(free(40).fit(X[:20], y[:20]).predict(X)).all()


class TestFit:
    def test_values_are_the_optimum_on_their_meshes(self):
        X, y, X_test, y_test = split("A2")
        model = free(12).fit(X, np.stack((y, 3 - y), axis=1))
        assert model.score(X_test, np.stack((y_test, 3 - y_test), axis=1)) > 0.985
        assert model.optimality_.gap < 1e-9 * model.optimality_.objective
        hats = [
            np.stack([np.interp(x, mesh, row) for row in np.eye(12)], axis=1)
            for x, mesh in zip(X.T, model.nodes_, strict=True)
        ]
        design = np.concatenate(hats, axis=1)
        expected = design @ np.linalg.lstsq(design, y, rcond=None)[0]
        np.testing.assert_allclose(model.predict(X)[:, 0], expected, atol=1e-7)

    def test_deviations_take_the_nodes_as_given(self):
        inside = []
        for seed in range(3):
            X, y, X_test, y_test = split("A1", seed)
            mean, std = free(10).fit(X, y).predict(X_test, return_std=True)
            inside.append((np.abs(mean - y_test) < 1.645 * std).mean())
        assert np.mean(inside) == pytest.approx(0.9, abs=0.05)

    def test_weights_count(self):
        X, y, _, _ = split("A1")
        weight = np.where(X[:, 0] > 0, 50.0, 1.0)
        error = [weight @ (free(6).fit(X, y, w).predict(X) - y) ** 2 for w in (weight, None)]
        assert error[0] < error[1]
