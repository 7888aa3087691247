"""Grades of regressors, and shortcuts around models that are there already."""

import numpy as np
import pytest
import torch
from data_sets import split
from sklearn.datasets import make_classification
from sklearn.ensemble import RandomForestRegressor
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from torch import nn

from lreg_peft.regression import LagrangeEncoder, LagrangeRegressor, MultigradeRegressor


def _curved_sum(seed=0):
    """exp of a sum of functions of single features, which sums of functions and pairs only approximate."""
    random = np.random.default_rng(seed)
    X = random.uniform(-1, 1, (3000, 4))
    y = np.exp(X[:, 0] + np.sin(3 * X[:, 1]) + X[:, 2] ** 2 - X[:, 3]) + 0.1 * random.standard_normal(3000)
    return X[:1500], y[:1500], X[1500:], y[1500:]


class TestGrades:
    @pytest.mark.parametrize("form", ["additive", "composed"])
    def test_each_is_fitted_to_what_those_before_leave(self, form):
        X, y, X_test, _ = split("A2")
        X, y = X[:400], y[:400]
        model = MultigradeRegressor([LinearRegression(), LagrangeRegressor(interactions=0)], form=form).fit(X, y)
        first = LinearRegression().fit(X, y)
        wide, wide_test = (np.column_stack((z, first.predict(z))) if form == "composed" else z for z in (X, X_test))
        second = LagrangeRegressor(interactions=0).fit(wide, y - first.predict(X))
        stages = list(model.staged_predict(X_test))
        assert len(stages) == len(model.estimators_) == len(model.losses_) == 2
        np.testing.assert_array_equal(stages[0], first.predict(X_test))
        np.testing.assert_array_equal(stages[1], stages[0] + second.predict(wide_test))
        np.testing.assert_array_equal(model.predict(X_test), stages[1])
        np.testing.assert_allclose(model.losses_[-1], np.mean((y - model.predict(X)) ** 2))
        assert model.losses_[1] < 0.1 * model.losses_[0]

    def test_nested_grades_find_the_curve_over_a_sum(self):
        X, y, X_test, y_test = _curved_sum()
        model = MultigradeRegressor().fit(X, y)
        first, second = (1 - np.var(y_test - stage) / np.var(y_test) for stage in model.staged_predict(X_test))
        assert first < 0.96
        assert second > 0.99

    @pytest.mark.parametrize("name", ["A1", "B1", "A2", "Friedman-1"])
    def test_a_grade_that_is_not_needed_does_no_harm(self, name):
        X, y, X_test, y_test = split(name)
        first, second = (np.mean((y_test - s) ** 2) for s in MultigradeRegressor().fit(X, y).staged_predict(X_test))
        assert second < first * 1.002

    def test_meshes_of_twice_the_elements_reach_twenty_sines(self):
        """The published anchor of grades: 6000 samples, frequencies 10 to 200; 3.99e-6 after 27,629 s there."""
        x = np.linspace(0, 1, 6000)
        phase = np.random.RandomState(0).uniform(0, 2 * np.pi, 40)[:20]
        y = np.sin(2 * np.pi * np.outer(x, np.linspace(10, 200, 20)) + phase).sum(axis=1)
        grades = [
            make_pipeline(LagrangeEncoder(n_nodes=66 * 2**k + 1, scale="minmax"), LinearRegression()) for k in range(7)
        ]
        model = MultigradeRegressor(grades, form="additive").fit(x[:, None], y)
        assert (np.diff(model.losses_) < 0).all()  # least squares: zero is among the choices
        assert model.losses_[-1] / np.mean(y**2) < 1e-6

    def test_a_shared_grid_search_and_weights(self):
        X, y, _, _ = split("A1")
        X, y = X[:120], y[:120]
        search = GridSearchCV(
            MultigradeRegressor([LinearRegression(), LagrangeRegressor()]), {"form": ["additive", "composed"]}
        )
        assert search.fit(X, y).best_score_ > 0.9
        weight = np.random.default_rng(0).integers(0, 4, 120)
        weighted = MultigradeRegressor().fit(X, y, sample_weight=weight)
        repeated = MultigradeRegressor().fit(np.repeat(X, weight, axis=0), np.repeat(y, weight))
        np.testing.assert_allclose(weighted.predict(X), repeated.predict(X), atol=1e-6)
        np.testing.assert_allclose(weighted.losses_, repeated.losses_, rtol=1e-6)

    def test_several_outputs_and_names(self):
        pandas = pytest.importorskip("pandas")
        X, y, X_test, _ = split("A2")
        frame = pandas.DataFrame(X[:300], columns=["a", "b"])
        both = np.stack((y, -y), axis=1)[:300]
        model = MultigradeRegressor([RandomForestRegressor(5, random_state=0), LagrangeRegressor()]).fit(frame, both)
        assert list(model.feature_names_in_) == list(model.estimators_[0].feature_names_in_) == ["a", "b"]
        assert model.predict(pandas.DataFrame(X_test, columns=["a", "b"])).shape == (1500, 2)


class TestShortcuts:
    """f(x) + LReg(x) around an f that stays as it is."""

    def test_around_a_fitted_regressor(self):
        X, y, X_test, y_test = split("Friedman-1")
        base = LinearRegression().fit(X[:1000], y[:1000])
        before = base.coef_.copy()
        model = MultigradeRegressor([FrozenEstimator(base), LagrangeRegressor()], form="additive").fit(
            X[1000:], y[1000:]
        )
        np.testing.assert_array_equal(model.estimators_[0].coef_, before)
        assert model.score(X_test, y_test) > 0.94 > base.score(X_test, y_test) + 0.15
        mean, std = model.predict(X_test, return_std=True)
        np.testing.assert_array_equal(mean, model.predict(X_test))
        # 5,000 observations and errors shared between them: about .01 around .9.
        assert (np.abs(mean - y_test) < 1.645 * std).mean() == pytest.approx(0.9, abs=0.03)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_around_a_network(self, dtype):
        X, y, X_test, _ = split("A1")
        network = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 1)).to(dtype)
        network[1].eval()  # one part of it in eval mode: found so again afterwards
        before = {name: value.clone() for name, value in network.state_dict().items()}
        model = MultigradeRegressor([network, LagrangeRegressor()], form="additive").fit(X, y)
        assert model.estimators_[0] is network and network.training and not network[1].training
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        network.eval()
        with torch.no_grad():
            base = network(torch.from_numpy(X_test).to(dtype)).double().numpy()[:, 0]
            own = network(torch.from_numpy(X).to(dtype)).double().numpy()[:, 0]
        shortcut = LagrangeRegressor().fit(X, y - own)
        np.testing.assert_allclose(model.predict(X_test), base + shortcut.predict(X_test), atol=1e-12)

    def test_zero_leaves_the_regressor_itself(self):
        X, y, X_test, _ = split("A2")
        zero = nn.Linear(2, 1).requires_grad_(False)
        zero.weight.zero_(), zero.bias.zero_()
        model = MultigradeRegressor([zero, LagrangeRegressor()], form="additive").fit(X, y)
        alone = LagrangeRegressor().fit(X, y)
        for found, expected in zip(model.predict(X_test, True), alone.predict(X_test, return_std=True), strict=True):
            np.testing.assert_array_equal(found, expected)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"form": "nested"}, ValueError, "form must be one of"),
            ({"estimators": []}, ValueError, "at least one grade"),
            ({"estimators": [LagrangeRegressor]}, TypeError, "a class: make an instance"),
            ({"estimators": ["linear"]}, TypeError, "got str"),
            ({"estimators": [nn.Linear(1, 3)]}, ValueError, r"must predict \(100,\) values.*got \(100, 3\)"),
            ({"estimators": [nn.Linear(1, 1), FrozenEstimator(LinearRegression())]}, ValueError, "not fitted"),
        ],
    )
    def test_grades(self, options, error, message):
        X, y, _, _ = split("A1")
        with pytest.raises(error, match=message):
            MultigradeRegressor(**options).fit(X[:100], y[:100])

    def test_predictions_that_are_no_numbers(self):
        X, y, _, _ = split("A1")
        network = nn.Linear(1, 1)
        nn.init.constant_(network.weight, torch.nan)
        with pytest.raises(ValueError, match=r"grade 0 .Linear. predicts NaN"):
            MultigradeRegressor([network, LagrangeRegressor()]).fit(X, y)
        labels = np.array(["a", "b"])[make_classification(50, random_state=0)[1]]
        classifier = LogisticRegression().fit(X[:50], labels)
        with pytest.raises(ValueError, match="could not convert"):
            MultigradeRegressor([FrozenEstimator(classifier), LagrangeRegressor()]).fit(X[:50], y[:50])

    def test_weights_that_a_grade_does_not_take(self):
        X, y, _, _ = split("A1")
        with pytest.raises(ValueError, match="KNeighborsRegressor does not"):
            MultigradeRegressor([KNeighborsRegressor(), LagrangeRegressor()]).fit(X, y, sample_weight=np.ones(len(X)))

    def test_deviations_of_grades_fitted_to_the_same_samples(self):
        X, y, _, _ = split("A1")
        with pytest.raises(ValueError, match="return_std needs fixed grades"):
            MultigradeRegressor().fit(X[:50], y[:50]).predict(X, return_std=True)

    def test_a_failed_fit_leaves_the_earlier_one(self):
        X, y, X_test, _ = split("A1")
        model = MultigradeRegressor([LinearRegression(), LagrangeRegressor()]).fit(X[:100], y[:100])
        before = model.predict(X_test)
        with pytest.raises(ValueError, match="NaN"):
            model.fit(np.where(X > 3, np.nan, X), y)
        np.testing.assert_array_equal(model.predict(X_test), before)
