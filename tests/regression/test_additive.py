"""Sums of functions of single features and of pairs: penalties, interactions, terms that vanish."""

import numpy as np
import pytest
from data_sets import split
from scipy import optimize

from lreg_peft.regression import LagrangeRegressor
from lreg_peft.regression.interactions import rank_pairs
from lreg_peft.regression.moments import moments
from lreg_peft.regression.samples import collect
from lreg_peft.regression.squares import NormalEquations
from lreg_peft.regression.terms import Line, Pair


def line(x, weight, nodes):
    return Line.over(0, x, weight, np.asarray(nodes), "quantile")


class TestDesign:
    def test_a_line_and_its_bends_are_apart(self):
        """Over the samples: mean zero, the straight part of unit variance, bends orthogonal to it and to each other."""
        random = np.random.default_rng(0)
        x, weight = random.exponential(size=400), random.integers(1, 4, 400).astype(float)
        term = line(x, weight, [0, 0.2, 0.5, 1, 2, x.max()])
        columns = np.stack([np.interp(x, term.nodes, column) for column in term.basis.T], axis=1)
        gram = columns.T * weight @ columns / weight.sum()
        np.testing.assert_allclose(weight @ columns / weight.sum(), 0, atol=1e-12)
        np.testing.assert_allclose(gram, np.diag(term.power), atol=1e-10)
        assert gram[0, 0] == pytest.approx(1) and np.trace(gram) == pytest.approx(2)
        assert term.basis.shape == (6, 5) and np.linalg.matrix_rank(np.column_stack((term.basis, np.ones(6)))) == 6

    def test_moments_are_those_of_the_dense_design(self):
        random = np.random.default_rng(0)
        samples = collect(random.uniform(size=(300, 2)), random.standard_normal((300, 2)), random.uniform(1, 2, 300))
        X, weight = samples.X, samples.weight
        nodes = [np.linspace(x.min(), x.max(), 5) for x in X.T]
        lines = [Line.over(j, X[:, j], weight, nodes[j], "quantile") for j in range(2)]
        terms = [*lines, Pair.of(*lines)]
        columns = np.concatenate([term.columns(X) for term in terms], axis=1)
        centred = columns - weight @ columns / weight.sum()
        found = moments(terms, samples)
        gram, product, *_ = found.centred()
        y = samples.y - weight @ samples.y / weight.sum()
        np.testing.assert_allclose(gram, centred.T * weight @ centred, atol=1e-9)
        np.testing.assert_allclose(product, centred.T * weight @ y, atol=1e-9)
        assert sum(terms[2].groups) == terms[2].basis.shape[1] == columns.shape[1] - 8
        # Errors on a fold from its moments are those at its samples.
        theta = random.standard_normal((columns.shape[1], 2))
        _, _, _, mean, y_mean = found.centred(without=1)
        fold = samples.folds[1]
        rest = samples.y[fold] - found.y_mean - y_mean - (columns[fold] - mean) @ theta
        np.testing.assert_allclose(found.errors(1, theta, mean, y_mean), weight[fold] @ rest**2, rtol=1e-9)


class TestVariances:
    def problem(self):
        random = np.random.default_rng(1)
        design = random.standard_normal((150, 12))
        theta = np.concatenate((random.standard_normal(6), 0.1 * random.standard_normal(6)))
        y = design @ theta + random.standard_normal(150)
        design, y = design - design.mean(0), y - y.mean()
        return design, y

    def fitted(self, design, y, sizes):
        equations = NormalEquations(design.T @ design, design.T @ y, float(y @ y), np.array(sizes), 150.0)
        kinds = np.zeros(len(sizes), dtype=int)
        penalties = equations.choose(None, kinds, np.zeros(len(sizes)))
        return penalties, equations.at(penalties)

    def test_the_fixed_point_maximises_the_restricted_likelihood(self):
        design, y = self.problem()
        penalties, found = self.fitted(design, y, [6, 6])

        def criterion(log):
            penalty = np.repeat(np.exp(log), 6)
            matrix = design.T @ design + np.diag(penalty)
            squares = y @ y - (design.T @ y) @ np.linalg.solve(matrix, design.T @ y)
            return 149 * np.log(squares) + np.linalg.slogdet(matrix)[1] - 6 * np.sum(log)

        best = optimize.minimize(criterion, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9})
        assert criterion(np.log(penalties)) - best.fun < 0.02  # iteration stops at changes of .01
        matrix = design.T @ design + np.diag(np.repeat(penalties, 6))
        assert found.edf.sum() == pytest.approx(np.trace(np.linalg.solve(matrix, design.T @ design)))
        assert found.gap < 1e-12 * found.objective

    def test_nothing_is_left_of_a_group_without_influence(self):
        design, _ = self.problem()
        y = design[:, :6] @ np.arange(1.0, 7.0)
        rest = np.random.default_rng(2).standard_normal(150)
        rest -= design @ np.linalg.lstsq(design, rest, rcond=None)[0]  # noise that no column explains
        y = y + rest
        penalties, found = self.fitted(design, y, [6, 6])
        assert penalties[1] > 1e5 * 150 > penalties[0]
        assert found.edf[1] < 1e-4 and np.abs(found.theta[6:]).max() < 1e-4 * np.abs(found.theta[:6]).max()

    def test_dependent_and_empty_columns(self):
        design, y = self.problem()
        design = np.concatenate((design, design, np.zeros((150, 2))), axis=1)
        _, found = self.fitted(design, y, [12, 12, 2])
        assert np.isfinite(found.theta).all() and (found.theta[24:] == 0).all()


class TestInteractions:
    def test_pure_noise_brings_none(self):
        random = np.random.default_rng(0)
        found = 0
        for _ in range(20):
            samples = collect(random.uniform(size=(500, 6)), random.standard_normal((500, 1)), np.ones(500))
            ranked = rank_pairs(samples, samples.y, list(range(6)), random)
            found += sum(energy > 4 for energy, _ in ranked)
        assert found <= 1  # of 300; as a normal deviate, .01 are expected
        edf = []
        for _ in range(5):
            X, y = random.uniform(size=(300, 6)), random.standard_normal(300)
            edf.append(LagrangeRegressor().fit(X, y).edf_)
        # Straight lines alone have seven. By chance, cross-validation confirms pairs in two of the five.
        assert np.mean(edf) < 9 and max(edf) < 13

    @pytest.mark.parametrize("form", ["product", "cells"])
    def test_the_right_pair_comes_first(self, form):
        random = np.random.default_rng(0)
        X = random.uniform(size=(2000, 6))
        signal = (
            (X[:, 1] - 0.5) * (X[:, 4] - 0.5) * 4
            if form == "product"
            else np.sin(9 * X[:, 1]) * np.sin(9 * X[:, 4]) * 0.7
        )
        rest = signal + random.standard_normal(2000)
        samples = collect(X, rest[:, None], np.ones(2000))
        ranked = rank_pairs(samples, samples.y, list(range(6)), random)
        assert ranked[0][1] == (1, 4) and ranked[0][0] > 8 > ranked[1][0]

    def test_given_and_counted(self):
        X, y, X_test, y_test = split("Friedman-1")
        given = LagrangeRegressor(interactions=[(1, 0), (2, 3)]).fit(X, y)
        assert [term.features for term in given.terms_[10:]] == [(0, 1), (2, 3)]
        same = LagrangeRegressor(interactions=np.array([[1, 0], [2, 3]])).fit(X, y)
        np.testing.assert_array_equal(same.predict(X_test), given.predict(X_test))
        counted = LagrangeRegressor(interactions=np.int64(3)).fit(X, y)
        assert counted.terms_[10].features == (0, 1) and len(counted.terms_) == 13
        # Those without effect are shrunk away, not fitted to noise.
        for model in (given, counted):
            assert model.score(X_test, y_test) > 0.956
        assert LagrangeRegressor(interactions=0).fit(X, y).score(X_test, y_test) < 0.9

    def test_stay_at_their_border(self):
        X, y, _, _ = split("Friedman-1")
        model = LagrangeRegressor().fit(X, y)
        pair = model.terms_[10]
        far, border = np.full((1, 10), 9.0), X.max(axis=0)[None]
        np.testing.assert_allclose(pair.evaluate(far), pair.evaluate(border))


class TestMeshes:
    def test_are_refined_where_they_are_used(self):
        X, y, _, _ = split("B2")
        X = np.column_stack((X, np.random.default_rng(0).uniform(size=len(X)), X[:, 0] > 0.1))
        model = LagrangeRegressor(interactions=0).fit(X, y)
        sizes = [len(nodes) for nodes in model.nodes_]
        # The feature without use may get more as well: the variance of its bends is pooled with those of the others.
        assert sizes[0] >= 64 and sizes[1] >= 64 and sizes[3] == 2
        assert model.feature_importances_[2] < 1e-4
        errors = [entry["cross_validation"] for entry in model.history_]
        assert len(errors) >= 2 and min(errors) < errors[0]  # the last ones may be of models that were not kept

    def test_max_nodes_is_kept(self):
        X, y, _, _ = split("Friedman-1")
        for most in (20, 60, 150):
            model = LagrangeRegressor(max_nodes=most).fit(X, y)
            assert sum(term.values[..., 0].size for term in model.terms_) <= most


def test_terms_of_large_data_are_chosen_on_some_rows_and_fitted_to_all():
    random = np.random.default_rng(0)
    X = random.uniform(size=(60_000, 3))
    truth = np.sin(5 * X[:, 0]) + 2 * (X[:, 1] - 0.5) * (X[:, 2] - 0.5)
    y = truth + 0.3 * random.standard_normal(len(X))
    model = LagrangeRegressor(basis="additive").fit(X, y)
    assert (1, 2) in {term.features for term in model.terms_}
    # The normal equations of the intercept, which hold for the rows that were fitted.
    assert abs(np.mean(model.predict(X) - y)) < 1e-9
    assert np.mean((model.predict(X) - truth) ** 2) < 0.01 * truth.var()
