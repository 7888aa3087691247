"""The mean absolute error: its optimum, the certificate, and what it is good for."""

import numpy as np
import pytest
from data_sets import split
from scipy import optimize

from lreg_peft.regression import LagrangeRegressor
from lreg_peft.regression.mesh1d import second_differences


@pytest.mark.parametrize("name", ["A1", "B1", "A2"])
def test_is_certified(name):
    X, y, X_test, y_test = split(name)
    model = LagrangeRegressor(loss="absolute").fit(X, y)
    found = model.optimality_
    assert 0 <= found.gap <= 2e-6 * found.objective
    squared = LagrangeRegressor().fit(X, y)
    assert np.abs(model.predict(X_test) - y_test).mean() < 1.1 * np.abs(squared.predict(X_test) - y_test).mean()
    bounds = [entry["lower_bound"] for entry in model.history_ if "lower_bound" in entry]
    assert bounds == sorted(bounds)


def test_the_bound_holds_and_the_optimum_is_that_of_a_general_solver():
    """Against L-BFGS on a smoothed problem with the same penalty: it comes down to the bound, and not below."""
    X, y, _, _ = split("A1")
    X, y = X[:150], y[:150]
    model = LagrangeRegressor(loss="absolute", dof=7, smoothing=1e-3).fit(X, y)
    nodes = model.nodes_[0]
    hats = np.stack([np.interp(X[:, 0], nodes, row) for row in np.eye(7)], axis=1)
    rough = np.zeros((5, 7))
    for j, row in enumerate(second_differences(nodes, "quantile")):
        rough[j, j : j + 3] = row

    def objective(values, smooth=0.0):
        residual = y - hats @ values
        return np.sqrt(residual**2 + smooth**2).sum() + 1e-3 * 150 / 2 * np.sum((rough @ values) ** 2)

    assert objective(model.coef_[0]) == pytest.approx(model.optimality_.objective, rel=1e-9)
    values = np.zeros(7)
    for smooth in (1e-1, 1e-2, 1e-3, 1e-4):
        values = optimize.minimize(objective, values, args=(smooth,), method="L-BFGS-B").x
    assert objective(values) >= model.optimality_.lower_bound
    assert objective(values) == pytest.approx(model.optimality_.objective, rel=1e-3)


def test_outliers_hardly_matter():
    random = np.random.default_rng(0)
    x = random.uniform(0, 1, 600)
    y = np.sin(6 * x) + 0.1 * random.standard_normal(600)
    y[random.choice(600, 60, replace=False)] += 20
    truth = np.sin(6 * x)
    absolute = LagrangeRegressor(loss="absolute").fit(x[:, None], y).predict(x[:, None])
    squared = LagrangeRegressor().fit(x[:, None], y).predict(x[:, None])
    assert np.abs(absolute - truth).mean() < 0.06
    assert np.abs(squared - truth).mean() > 1


def test_several_outputs_and_interactions():
    X, y, X_test, y_test = split("Friedman-1")
    X, y = X[:600], y[:600]
    both = LagrangeRegressor(loss="absolute", interactions=[(0, 1)]).fit(X, np.stack((y, 2 * y), axis=1))
    alone = LagrangeRegressor(loss="absolute", interactions=[(0, 1)]).fit(X, y)
    assert alone.score(X_test, y_test) > 0.93
    np.testing.assert_allclose(both.predict(X_test)[:, 0], alone.predict(X_test), atol=0.02)
    np.testing.assert_allclose(both.predict(X_test)[:, 1], 2 * alone.predict(X_test), atol=0.04)
    assert both.terms_[-1].values.shape[-1] == 2
