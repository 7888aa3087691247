"""The estimator as scikit-learn sees it, what it reaches, and what it refuses."""

import pickle
import warnings

import numpy as np
import pytest
from data_sets import split
from scipy import stats
from sklearn.base import clone
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold
from sklearn.utils.estimator_checks import check_estimator
from tiers import slow

from lreg_peft.regression import LagrangeClassifier, LagrangeEncoder, LagrangeRegressor, MultigradeRegressor
from lreg_peft.regression.terms import Line


@pytest.mark.no_cover  # hundreds of fits
@pytest.mark.parametrize(
    "estimator", [LagrangeRegressor(), *slow(LagrangeEncoder(), LagrangeClassifier(), MultigradeRegressor())], ids=str
)
def test_scikit_learn_accepts_it(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # skipped checks are announced as warnings
        results = check_estimator(estimator, on_fail=None)
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] not in ("passed", "skipped")}
    assert not failed
    assert len(results) > 40


class TestBars:
    """Test R^2 with the default options, seed 0: a spline with knots by cross-validation, or better."""

    @pytest.mark.parametrize(
        ("name", "bar"),
        [
            ("A1", 0.9597),
            ("B1", 0.9996),
            ("Fig. 4 A", 0.376),
            ("Fig. 4 C", 0.9996),
            ("A2", 0.9915),
            *slow(("B2", 0.9997)),  # 50,000 rows
            ("Friedman-1", 0.958),
        ],
    )
    def test_reached(self, name, bar):
        X, y, X_test, y_test = split(name)
        model = LagrangeRegressor().fit(X, y)
        assert model.score(X_test, y_test) >= bar
        assert model.optimality_.gap <= 1e-9 * model.optimality_.objective
        assert model.basis_ == "additive"

    def test_diabetes_loses_nothing_to_a_linear_model(self):
        """Term selection: among ten features most are linear or useless, and a rough fit loses .07."""
        X, y = load_diabetes(return_X_y=True)
        scores = []
        for train, test in KFold(5, shuffle=True, random_state=0).split(X):
            ours = LagrangeRegressor().fit(X[train], y[train]).score(X[test], y[test])
            scores.append((ours, LinearRegression().fit(X[train], y[train]).score(X[test], y[test])))
        ours, linear = np.mean(scores, axis=0)
        assert ours > linear - 0.01
        assert ours > 0.47


class TestIntervals:
    @pytest.mark.parametrize(
        ("name", "options"), [("B1", {}), ("Fig. 4 A", {}), ("Friedman-1", {}), ("B1", {"n_nodes": 64})]
    )
    def test_cover_nine_in_ten_observations(self, name, options):
        inside = []
        for seed in range(4 if name != "Friedman-1" else 1):
            X, y, X_test, y_test = split(name, seed)
            mean, std = LagrangeRegressor(**options).fit(X, y).predict(X_test, return_std=True)
            inside.append((np.abs(mean - y_test) < 1.645 * std).mean())
        # 800 samples or more: one standard error of the share is 1.1 %.
        assert np.mean(inside) == pytest.approx(0.90, abs=0.03)

    def test_of_the_function_alone(self):
        """Without noise: the truth lies within two deviations at about 95 % of the places."""
        inside = []
        for seed in range(6):
            random = np.random.default_rng(seed)
            x = random.uniform(0, 1, 400)
            y = np.sin(6 * x) + 0.3 * random.standard_normal(400)
            model = LagrangeRegressor().fit(x[:, None], y)
            grid = np.linspace(0.02, 0.98, 200)
            mean, std = model.predict(grid[:, None], return_std=True)
            spread = np.sqrt(std**2 - model.noise_variance_)
            assert (spread > 0).all() and (spread < 0.3).all()
            inside.append((np.abs(mean - np.sin(6 * grid)) < 1.96 * spread).mean())
        # Errors along one curve are correlated, so that six curves leave the mean share uncertain by several per cent.
        assert 0.88 <= np.mean(inside) <= 1.0

    def test_are_the_inverse_of_the_normal_equations(self):
        X, y, X_test, _ = split("A1")
        model = LagrangeRegressor(n_nodes=8, smoothing=1e-3).fit(X, y)
        line = Line.over(0, X[:, 0], np.ones(len(X)), model.nodes_[0], "quantile")
        design, test = (np.column_stack((np.ones(len(x)), line.at(x[:, 0]))) for x in (X, X_test))
        matrix = design.T @ design + 1e-3 * len(X) * np.diag([0.0] + [1.0] * (design.shape[1] - 1))
        np.testing.assert_allclose(model.predict(X_test), test @ np.linalg.solve(matrix, design.T @ y), rtol=1e-9)
        variance = np.einsum("ij,ji->i", test, np.linalg.solve(matrix, test.T))
        _, std = model.predict(X_test, return_std=True)
        wider = stats.t.ppf(0.975, len(X) - model.edf_) / stats.norm.ppf(0.975)
        np.testing.assert_allclose(std**2, wider**2 * model.noise_variance_ * (1 + variance), rtol=1e-9)

    def test_of_sums_exceed_the_sampling_variance(self):
        """The posterior variance A^-1 against A^-1 G A^-1, which the sensitivities to each target sum up to."""
        X, y, X_test, _ = split("A2")
        X, y, X_test = X[:80], y[:80], X_test[:40]
        model = LagrangeRegressor(n_nodes=8, interactions=[(0, 1)], smoothing=1e-3).fit(X, y)
        changed = y[:, None] + np.eye(80)  # one output per target that moves
        sensitivity = clone(model).fit(X, changed).predict(X_test) - model.predict(X_test)[:, None]
        sampling = (sensitivity**2).sum(axis=1)
        _, std = model.predict(X_test, return_std=True)
        variance = std**2 / model.noise_variance_ - 1
        assert (variance > sampling).all()
        assert variance.mean() < 2 * sampling.mean()


class TestAttributes:
    def test_one_feature(self):
        X, y, X_test, _ = split("A1")
        model = LagrangeRegressor().fit(X, y)
        assert model.nodes_[0].shape == model.values_[0].shape and (np.diff(model.nodes_[0]) > 0).all()
        assert model.simplices_ is None and model.n_features_in_ == 1
        assert 5 < model.edf_ < 40 and 0.01 < model.noise_variance_ < 0.03
        assert model.smoothing_[0].shape == (2, 1)
        assert model.history_[0]["nodes"] == 256
        inside = np.clip(X_test[:, 0], model.nodes_[0][0], model.nodes_[0][-1])
        np.testing.assert_allclose(
            model.predict(inside[:, None]),
            model.intercept_ + np.interp(inside, model.nodes_[0], model.values_[0]),
            atol=1e-12,
        )

    def test_several_features_and_names(self):
        pandas = pytest.importorskip("pandas")
        X, y, _, _ = split("Friedman-1")
        frame = pandas.DataFrame(X, columns=[f"f{j}" for j in range(10)])
        model = LagrangeRegressor().fit(frame, y)
        assert list(model.feature_names_in_) == list(frame.columns)
        assert [term.features for term in model.terms_[10:]] == [(0, 1)]
        # Terms have mean zero over the samples, and sum up to the prediction.
        parts = np.stack([term.evaluate(X)[:, 0] for term in model.terms_])
        assert np.abs(parts[:10].mean(axis=1)).max() < 1e-9
        np.testing.assert_allclose(model.intercept_ + parts.sum(axis=0), model.predict(frame), atol=1e-9)
        # Of five features without influence, little is left.
        used = np.array([term.edf[0] for term in model.terms_])
        assert used[5:10].sum() < 5 < used[:5].sum()
        assert model.feature_importances_[5:].sum() < 0.02
        np.testing.assert_allclose(model.feature_importances_.sum(), 1)

    def test_several_outputs_are_fitted_one_by_one(self):
        X, y, X_test, _ = split("Friedman-1")
        both = np.stack((y, -2 * y + X[:, 5]), axis=1)
        model = LagrangeRegressor(interactions=[(0, 1)]).fit(X, both)
        alone = LagrangeRegressor(interactions=[(0, 1)]).fit(X, y)
        assert model.predict(X_test).shape == (5000, 2)
        assert model.values_[0].shape == (*alone.values_[0].shape, 2)
        assert model.noise_variance_.shape == model.edf_.shape == (2,)
        np.testing.assert_allclose(model.predict(X_test)[:, 0], alone.predict(X_test), atol=1e-6)
        mean, std = model.predict(X_test, return_std=True)
        assert mean.shape == std.shape == (5000, 2)

    def test_survives_pickling_and_cloning(self):
        X, y, X_test, _ = split("A2")
        model = LagrangeRegressor(interactions=0).fit(X, y)
        again = pickle.loads(pickle.dumps(model))
        for a, b in zip(model.predict(X_test, return_std=True), again.predict(X_test, return_std=True), strict=True):
            np.testing.assert_array_equal(a, b)
        assert clone(model).get_params() == model.get_params()

    def test_a_failed_fit_leaves_the_earlier_one(self):
        X, y, X_test, _ = split("A1")
        model = LagrangeRegressor().fit(X, y)
        before = model.predict(X_test)
        model.set_params(interactions=[(0, 3)])
        with pytest.raises(ValueError, match="different columns"):
            model.fit(X, y)
        np.testing.assert_array_equal(model.predict(X_test), before)


class TestWeights:
    @pytest.mark.parametrize("options", [{}, {"nodes": "free", "n_nodes": 6}])
    def test_whole_numbers_repeat_samples(self, options):
        X, y, X_test, _ = split("A1")
        X, y = X[:200], y[:200]
        weight = np.random.default_rng(0).integers(0, 4, 200)
        weighted = LagrangeRegressor(**options).fit(X, y, sample_weight=weight)
        repeated = LagrangeRegressor(**options).fit(np.repeat(X, weight, axis=0), np.repeat(y, weight))
        # Sliding of nodes stops at a relative progress of 1e-5.
        tolerance = 1e-6 if options.get("nodes") is None else 5e-3
        np.testing.assert_allclose(weighted.predict(X_test), repeated.predict(X_test), atol=tolerance)

    @pytest.mark.parametrize("options", [{}])
    @pytest.mark.parametrize("d", [1, 5])
    def test_repetitions_and_their_order_are_the_same_to_the_last_bit(self, d, options):
        """Whatever the number of threads: both ways give the solvers the same rows."""
        random = np.random.default_rng(0)
        X, y = random.uniform(size=(60, d)).round(2), random.integers(0, 3, 60)
        weight = random.integers(0, 4, 60)
        weighted = LagrangeRegressor(**options).fit(X, y, sample_weight=weight)
        order = random.permutation(weight.sum())
        repeated = LagrangeRegressor(**options).fit(X.repeat(weight, axis=0)[order], y.repeat(weight)[order])
        np.testing.assert_array_equal(weighted.predict(X), repeated.predict(X))

    def test_moving_nodes_take_repetitions_in_the_samples(self):
        X, y, _, _ = split("A1")
        X, y = X[:100].repeat(2, axis=0)[:150], y[:100].repeat(2)[:150]
        assert LagrangeRegressor(nodes="free", n_nodes=5).fit(X, y).score(X, y) > 0.9

    @pytest.mark.parametrize("name", ["A1", "A2"])
    def test_the_scale_of_precisions_has_no_effect(self, name):
        X, y, X_test, _ = split(name)
        weight = np.random.default_rng(0).uniform(0.5, 2, len(X))
        first = LagrangeRegressor(interactions=0).fit(X, y, sample_weight=weight)
        second = LagrangeRegressor(interactions=0).fit(X, y, sample_weight=1e-6 * weight)
        np.testing.assert_allclose(first.predict(X_test), second.predict(X_test), atol=1e-6)
        assert abs(first.predict(X_test) - LagrangeRegressor(interactions=0).fit(X, y).predict(X_test)).max() > 1e-4

    def test_precisions_help_with_uneven_noise(self):
        X, y, X_test, _ = split("Fig. 4 A")
        deviation = np.abs(np.cos(8 * X[:, 0])) + 0.01
        truth = np.sin(8 * X_test[:, 0])
        plain = LagrangeRegressor().fit(X, y).predict(X_test)
        weighted = LagrangeRegressor().fit(X, y, sample_weight=deviation**-2).predict(X_test)
        assert r2_score(truth, weighted) > r2_score(truth, plain)

    def test_zeros_only(self):
        with pytest.raises(ValueError, match="at least one non-zero"):
            LagrangeRegressor().fit([[0.0], [1.0]], [0.0, 1.0], sample_weight=[0, 0])


class TestHardData:
    def test_constant_and_repeated_columns(self):
        X, y, X_test, y_test = split("A2")
        wide = np.column_stack((X, np.full(len(X), 3.0), X[:, 0]))
        model = LagrangeRegressor().fit(wide, y)
        wide_test = np.column_stack((X_test, np.full(len(X_test), 3.0), X_test[:, 0]))
        assert model.score(wide_test, y_test) == pytest.approx(0.9916, abs=2e-3)
        assert {term.features for term in model.terms_} == {(0,), (1,), (3,)}

    def test_nothing_but_constants(self):
        for X in (np.ones((6, 1)), np.ones((6, 3))):
            y = np.arange(6.0)
            mean, *_ = (LagrangeRegressor().fit(X, y).predict(X),)
            np.testing.assert_allclose(mean, 2.5, atol=1e-9)
            constant = LagrangeRegressor().fit(X, np.full(6, 7.0))
            np.testing.assert_allclose(constant.predict(X), 7.0, atol=1e-9)

    @pytest.mark.parametrize("d", [1, 3])
    @pytest.mark.parametrize("n", [1, 2, 3, 4])
    @pytest.mark.parametrize("options", [{}, {"nodes": "free", "n_nodes": 5}, {"n_nodes": 50}])
    def test_few_samples(self, n, d, options):
        random = np.random.default_rng(0)
        X, y = random.standard_normal((n, d)), random.standard_normal(n)
        model = LagrangeRegressor(**options).fit(X, y)
        assert np.isfinite(model.predict(random.standard_normal((20, d)))).all()
        _, std = model.predict(X, return_std=True)
        assert np.isfinite(std).all() and (std >= 0).all()

    def test_few_distinct_values(self):
        random = np.random.default_rng(0)
        X = np.column_stack(
            (random.integers(0, 2, 500), random.integers(0, 3, 500), random.exponential(1, 500).round(1))
        )
        y = X[:, 0] - (X[:, 1] == 1) + np.log1p(X[:, 2]) + 0.1 * random.standard_normal(500)
        model = LagrangeRegressor().fit(X, y)
        assert model.score(X, y) > 0.98
        assert [len(nodes) for nodes in model.nodes_[:2]] == [2, 3]

    def test_heavy_tails_and_wild_units(self):
        random = np.random.default_rng(0)
        X = random.standard_cauchy((500, 2)) * [1e9, 1e-9]
        y = 1e8 * np.arctan(X[:, 0] * 1e-9) + 1e6 * random.standard_normal(500)
        model = LagrangeRegressor().fit(X, y)
        assert model.score(X, y) > 0.98

    def test_exact_lines_are_found_exactly(self):
        random = np.random.default_rng(0)
        X = random.standard_normal((100, 3))
        y = X @ [1.0, -2.0, 0.0] + 5
        model = LagrangeRegressor().fit(X, y)
        far = 10 * random.standard_normal((20, 3))
        np.testing.assert_allclose(model.predict(far), far @ [1.0, -2.0, 0.0] + 5, rtol=1e-4, atol=1e-4)
        single = LagrangeRegressor().fit(X[:, :1], 2 * X[:, 0] + 1)
        np.testing.assert_allclose(single.predict(far[:, :1]), 2 * far[:, 0] + 1, rtol=1e-7)

    def test_outside_the_range_it_goes_on_straight(self):
        X, y, _, _ = split("A1")
        model = LagrangeRegressor().fit(X, y)
        steps = np.diff(model.predict(X.max() + np.arange(0, 5)[:, None]))
        np.testing.assert_allclose(steps, steps[0], rtol=1e-9)

    @pytest.mark.parametrize("d", [1, 4])
    def test_many_samples_in_bounded_memory(self, d):
        """A pass in parts: the peak of a fit is a few copies of the data, not a design of n x nodes."""
        import tracemalloc

        random = np.random.default_rng(0)
        X = random.uniform(size=(100_000, d))
        y = np.sin(6 * X).sum(axis=1) + 0.1 * random.standard_normal(len(X))
        tracemalloc.start()
        LagrangeRegressor(interactions=0).fit(X, y)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 15 * X.nbytes + 1e8


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"basis": "fourier"}, "basis must be one of"),
            ({"nodes": "many"}, "nodes must be one of"),
            ({"scale": "log"}, "scale must be one of"),
            ({"n_nodes": 1}, "n_nodes must be"),
            ({"n_nodes": 2.5}, "n_nodes must be"),
            ({"max_nodes": 0}, "max_nodes must be"),
            ({"smoothing": -1.0}, "smoothing must be"),
            ({"smoothing": "gcv"}, "smoothing must be"),
            ({"interactions": "all"}, "interactions must be"),
            ({"interactions": -1}, "interactions must be"),
            ({"interactions": [(0, 0)]}, "different columns"),
            ({"nodes": "free"}, "needs a number of nodes"),
            ({"nodes": "free", "n_nodes": 5, "interactions": [(0, 1)]}, "interactions need nodes='smooth'"),
            ({"basis": "simplicial", "nodes": "free"}, "simplicial"),
            ({"basis": "simplicial", "interactions": 2}, "no interactions to choose"),
            ({"max_nodes": 3}, "raise max_nodes"),
            ({"n_nodes": 5000, "basis": "additive"}, "at most 1024"),
        ],
    )
    def test_options(self, options, message):
        X, y, _, _ = split("A2")
        with pytest.raises(ValueError, match=message):
            LagrangeRegressor(**options).fit(X[:100], y[:100])

    def test_data(self):
        with pytest.raises(ValueError, match="NaN"):
            LagrangeRegressor().fit([[np.nan], [1.0]], [0.0, 1.0])
        with pytest.raises(ValueError, match="Negative"):
            LagrangeRegressor().fit([[0.0], [1.0]], [0.0, 1.0], sample_weight=[-1, 1])
        with pytest.raises(ValueError, match="inconsistent"):
            LagrangeRegressor().fit([[0.0], [1.0]], [0.0, 1.0, 2.0])
