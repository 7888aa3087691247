"""Regression on simplices: accuracy against known functions, the certificate, uncertainty, and inputs of all kinds."""

import itertools
import pickle

import numpy as np
import pytest
from scipy import stats
from scipy.special import sph_harm_y
from tiers import slow

from lreg_peft.regression import LagrangeRegressor
from lreg_peft.regression.scaling import fit_scale


def fit_simplicial(x, y, weight=None, **options) -> LagrangeRegressor:
    return LagrangeRegressor(basis="simplicial", **options).fit(x, y, weight)


def located(model: LagrangeRegressor, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hat functions `[n, n_nodes]` and the penalty of a fitted mesh, from its nodes and simplices alone.

    In the coordinates of a "minmax" scale on the unit cube, where samples fill it.
    """
    nodes, simplices = model.nodes_, model.simplices_
    low, span = nodes.min(0), np.ptp(nodes, axis=0)
    u, v = (nodes - low) / span, (x - low) / span
    d = u.shape[1]
    corners = np.concatenate((u[simplices], np.ones((*simplices.shape, 1))), axis=2)
    inverse = np.linalg.inv(corners)  # [s, d + 1, d + 1]
    weights = np.einsum("nk,skj->nsj", np.column_stack((v, np.ones(len(v)))), inverse)
    found = weights.min(2).argmax(1)
    design = np.zeros((len(x), len(u)))
    np.put_along_axis(design, simplices[found], weights[np.arange(len(x)), found], axis=1)
    faces: dict[tuple[int, ...], list[int]] = {}
    for s, vertices in enumerate(simplices):
        for out in range(d + 1):
            faces.setdefault(tuple(sorted(np.delete(vertices, out))), []).append(s)
    rough = np.zeros((len(u), len(u)))
    for face, sides in faces.items():
        if len(sides) == 2:
            # The jump of the gradient is normal to the facet; its length is that of the difference of gradients.
            jump = np.zeros((d, len(u)))
            for sign, s in zip((1, -1), sides, strict=True):
                jump[:, simplices[s]] += sign * inverse[s, :d]
            edges = np.diff(u[list(face)], axis=0)
            area = np.sqrt(max(np.linalg.det(edges @ edges.T), 0)) if d > 1 else 1.0
            area /= max(d - 1, 1) * max(d - 2, 1)
            width = 0.0
            for s in sides:
                apex = next(k for k, vertex in enumerate(simplices[s]) if vertex not in face)
                width += 1 / np.linalg.norm(inverse[s, :d, apex])
            near = np.unique(simplices[sides])
            rough[np.ix_(near, near)] += area / width * jump[:, near].T @ jump[:, near]
    return design, rough


def r2(y: np.ndarray, predicted: np.ndarray) -> float:
    return 1 - float(((y - predicted) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())


def waves(n: int, d: int = 2, noise: float = 0.05, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Smooth, not additive, on the unit cube."""
    generator = np.random.default_rng(seed)
    x = generator.uniform(size=(n, d))
    return x, truth(x) + noise * generator.standard_normal(n)


def truth(x: np.ndarray) -> np.ndarray:
    return np.sin(5 * x.prod(1) + 2 * x[:, 0])


class TestAccuracy:
    """Bounds for held-out R^2; the ceiling is what the noise leaves to the true function."""

    def test_the_reciprocal_wave_of_two_inputs(self):
        """sin(1 / (x1 x2)), 1/x ~ U(1, 5), noise .01: no sum of functions of one input comes above .02."""
        generator = np.random.default_rng(0)
        x = 1 / generator.uniform(1, 5, size=(24_000, 2))
        y = np.sin(1 / x.prod(1)) + 0.01 * generator.standard_normal(24_000)
        fit = fit_simplicial(x[:20_000], y[:20_000])
        assert r2(y[20_000:], fit.predict(x[20_000:])) > 0.9994

    def test_a_spherical_harmonic_with_two_outputs(self):
        """Y_4^2, real and imaginary part, without noise."""
        generator = np.random.default_rng(0)
        x = generator.uniform(size=(22_000, 2)) * [2 * np.pi, np.pi]
        z = sph_harm_y(4, 2, x[:, 1], x[:, 0])
        y = np.column_stack((z.real, z.imag))
        fit = fit_simplicial(x[:20_000], y[:20_000], scale="minmax")
        assert fit.predict(x[20_000:]).shape == (2_000, 2)
        assert r2(y[20_000:], fit.predict(x[20_000:])) > 0.9999

    def test_three_inputs(self):
        """sin(3 pi x1 x2) x3 + x3^2 + .05 N: ceiling .9908; a random forest reaches .9866 with these samples."""
        generator = np.random.default_rng(0)
        x = generator.uniform(size=(25_000, 3))
        y = np.sin(3 * np.pi * x[:, 0] * x[:, 1]) * x[:, 2] + x[:, 2] ** 2 + 0.05 * generator.standard_normal(25_000)
        fit = fit_simplicial(x[:20_000], y[:20_000], max_nodes=1500)
        assert r2(y[20_000:], fit.predict(x[20_000:])) > 0.989

    @pytest.mark.parametrize(("d", "bound"), [(1, 0.9995), (2, 0.999), (3, 0.993)])
    def test_every_dimension(self, d, bound):
        x, y = waves(3000, d, noise=0.02)
        fit = fit_simplicial(x, y, max_nodes=600)
        new = np.random.default_rng(5).uniform(size=(500, d))
        assert r2(truth(new), fit.predict(new)) > bound
        assert fit.simplices_.shape[1] == d + 1 and fit.nodes_.shape == (len(fit.values_), d)

    @pytest.mark.parametrize(
        ("d", "sizes", "slope"), [(1, (20, 40, 80, 160), -2.0), *slow((2, (50, 100, 200, 400, 800), -1.0))]
    )
    def test_the_error_falls_with_n_to_the_minus_two_over_d(self, d, sizes, slope):
        """L2 error without noise against nodes; +-.15 is what the steps of the refinement leave."""
        x, _ = waves(30_000, d)
        nodes, errors = [], []
        new = np.random.default_rng(5).uniform(size=(4000, d))
        for max_nodes in sizes:
            fit = fit_simplicial(x, truth(x), scale="minmax", max_nodes=max_nodes)
            nodes.append(len(fit.values_))
            errors.append(np.sqrt(np.mean((fit.predict(new) - truth(new)) ** 2)))
        assert np.polyfit(np.log(nodes), np.log(errors), 1)[0] == pytest.approx(slope, abs=0.15)

    def test_pure_noise_is_smoothed_away(self):
        generator = np.random.default_rng(0)
        fit = fit_simplicial(generator.uniform(size=(2000, 2)), generator.standard_normal(2000))
        assert fit.edf_ < 25
        assert np.std(fit.predict(generator.uniform(size=(500, 2)))) < 0.15
        assert fit.noise_variance_ == pytest.approx(1, abs=0.1)

    def test_nodes_go_where_the_function_bends(self):
        generator = np.random.default_rng(0)
        x = generator.uniform(size=(10_000, 2))
        fit = fit_simplicial(x, np.tanh(40 * (x[:, 0] - 0.3)), scale="minmax", max_nodes=500)
        near = np.abs(fit.nodes_[:, 0] - 0.3) < 0.1
        assert near.mean() > 0.6  # a fifth of the area

    def test_samples_in_the_corner_of_one_simplex_are_seen(self):
        """Where no single bisection of a coarse mesh gains anything."""
        generator = np.random.default_rng(0)
        x = np.concatenate((generator.uniform(0, 0.1, size=(300, 2)), generator.uniform(0.9, 1, size=(300, 2))))
        fit = fit_simplicial(x, np.sin(6 * x[:, 0]), scale="minmax")
        assert np.abs(fit.predict(x) - np.sin(6 * x[:, 0])).max() < 1e-3

    def test_linear_functions_are_exact_everywhere(self):
        generator = np.random.default_rng(0)
        x = generator.normal(size=(400, 3))
        far = 5 * generator.normal(size=(100, 3))
        fit = fit_simplicial(x, x @ [1.0, -2.0, 0.5] + 3, scale="minmax")
        # Outside linear too; lambda has no optimum, and where it is largest the ridge costs 1e-13 / 1e-8 of the slope.
        np.testing.assert_allclose(fit.predict(far), far @ [1.0, -2.0, 0.5] + 3, atol=1e-3)


class TestFit:
    def test_what_it_holds_fits_together(self):
        x, y = waves(1500)
        fit = fit_simplicial(x, y)
        np.testing.assert_allclose(fit.predict(fit.nodes_), fit.values_, atol=1e-9)
        residual = ((y - fit.predict(x)) ** 2).sum()
        assert fit.noise_variance_ == pytest.approx(residual / (1500 - fit.edf_), rel=1e-6)
        assert fit.history_[-1]["nodes"] == len(fit.values_)
        assert fit.history_[-1]["criterion"] <= min(entry["criterion"] for entry in fit.history_) * 1.05

    @pytest.mark.parametrize("d", [1, 2, 3])
    def test_values_are_at_the_certified_optimum(self, d):
        """Against a dense solve of the normal equations, from the nodes and simplices alone."""
        x, y = waves(400, d)
        fit = fit_simplicial(x, y, max_nodes=60, scale="minmax")
        assert 0 <= fit.optimality_.gap < 1e-12 * fit.optimality_.objective
        assert fit.optimality_.lower_bound <= fit.optimality_.objective
        design, rough = located(fit, x)
        matrix = design.T @ design + fit.smoothing_ * rough
        np.testing.assert_allclose(fit.values_, np.linalg.solve(matrix, design.T @ y), atol=1e-6)
        best = ((y - design @ fit.values_) ** 2).sum() + fit.smoothing_ * fit.values_ @ rough @ fit.values_
        assert best / 400 == pytest.approx(fit.optimality_.objective, rel=1e-6)
        assert fit.edf_ == pytest.approx(np.trace(np.linalg.solve(matrix, design.T @ design)), rel=1e-6)

    def test_reml_is_at_its_optimum(self):
        """The criterion by dense determinants, over a fine grid of lambda."""
        x, y = waves(300, noise=0.2)
        fit = fit_simplicial(x, y, max_nodes=50, scale="minmax")
        design, rough = located(fit, x)
        gram, centred = design.T @ design, y - y.mean()

        def reml(log_smoothing: float) -> float:
            matrix = gram + np.exp(log_smoothing) * rough
            value = centred @ centred - centred @ design @ np.linalg.solve(matrix, design.T @ centred)
            return 297 * np.log(value) + np.linalg.slogdet(matrix)[1] - (len(gram) - 3) * log_smoothing

        best = min(map(reml, np.linspace(-15, 10, 501)))
        assert reml(np.log(fit.smoothing_)) < best + 0.02  # half of the curvature times the tolerance squared

    def test_more_smoothing_means_fewer_degrees_of_freedom(self):
        x, y = waves(500)
        fits = [fit_simplicial(x, y, smoothing=value, max_nodes=100) for value in (0.0, 1e-3, 1.0, 1e3)]
        assert all(a.edf_ > b.edf_ for a, b in itertools.pairwise(fits))
        assert [fit.smoothing_ for fit in fits[1:]] == pytest.approx([1e-3, 1.0, 1e3])
        assert fits[-1].edf_ == pytest.approx(3, abs=0.1)

    def test_the_budget_of_nodes_is_kept(self):
        x, y = waves(5000, noise=0.0)
        for max_nodes in (16, 50, 333):
            fit = fit_simplicial(x, y, max_nodes=max_nodes)
            assert max(entry["nodes"] for entry in fit.history_) <= max_nodes
        assert len(fit.values_) > 200

    def test_the_same_input_gives_the_same_fit(self):
        x, y = waves(800)
        first, second = (fit_simplicial(x, y, random_state=3).predict(x) for _ in range(2))
        assert np.array_equal(first, second)
        fit_simplicial(x, y, random_state=np.random.RandomState(0))

    def test_it_can_be_pickled(self):
        x, y = waves(500)
        fit = fit_simplicial(x, y)
        before = fit.predict(x, return_std=True)
        again = pickle.loads(pickle.dumps(fit)).predict(x, return_std=True)
        for a, b in zip(before, again, strict=True):
            np.testing.assert_array_equal(a, b)


class TestSeveralOutputs:
    def test_outputs_share_the_mesh_and_scaling_them_changes_nothing_else(self):
        x, y = waves(1000)
        both = np.column_stack((y, np.cos(7 * x[:, 1])))
        fit = fit_simplicial(x, both)
        scaled = fit_simplicial(x, both * [1000.0, 1.0] + [5.0, 0.0])
        assert fit.values_.shape[1] == 2 and fit.noise_variance_.shape == (2,)
        # Rounding moves lambda within the tolerance of its search.
        found = (scaled.predict(x) - [5.0, 0.0]) / [1000.0, 1.0]
        np.testing.assert_allclose(found, fit.predict(x), atol=1e-3)

    def test_shapes_follow_y(self):
        x, y = waves(200)
        assert fit_simplicial(x, y).predict(x).shape == (200,)
        mean, std = fit_simplicial(x, y[:, None]).predict(x, return_std=True)
        assert mean.shape == std.shape == (200, 1)


class TestUncertainty:
    @pytest.mark.parametrize("d", [1, 2, 3])
    def test_intervals_cover_new_observations(self, d):
        x, y = waves(4000, d, noise=0.1)
        new, observed = waves(4000, d, noise=0.1, seed=9)
        mean, std = fit_simplicial(x, y).predict(new, return_std=True)
        # Three standard errors of a share of 4000 are .010 at 95 % and .019 at 80 %.
        assert (np.abs(observed - mean) < 1.96 * std).mean() == pytest.approx(0.95, abs=0.012)
        assert (np.abs(observed - mean) < 1.2816 * std).mean() == pytest.approx(0.8, abs=0.022)

    def test_it_is_the_posterior_variance_whichever_way_it_is_solved_for(self):
        x, y = waves(300)
        fit = fit_simplicial(x, y, max_nodes=80, scale="minmax")
        design, rough = located(fit, x)
        matrix = design.T @ design + fit.smoothing_ * rough
        leverage = (design * np.linalg.solve(matrix, design.T).T).sum(1)
        wider = stats.t.ppf(0.975, 300 - fit.edf_) / stats.norm.ppf(0.975)
        expected = wider * np.sqrt(fit.noise_variance_ * (1 + leverage))
        np.testing.assert_allclose(fit.predict(x, return_std=True)[1], expected, rtol=1e-6)
        np.testing.assert_allclose(fit.predict(x[:5], return_std=True)[1], expected[:5], rtol=1e-6)

    @pytest.mark.parametrize(("noise", "edf"), [(0.1, 200), (0.3, 100)])
    def test_no_mesh_interpolates_few_samples(self, noise, edf):
        """By plain cross-validation one run in ten does: 221 degrees of freedom of 300."""
        inside, found = [], []
        for seed in range(10):
            x, y = waves(300, 3, noise=noise, seed=seed)
            new, observed = waves(1000, 3, noise=noise, seed=100 + seed)
            fit = fit_simplicial(x, y)
            mean, std = fit.predict(new, return_std=True)
            inside.append((np.abs(observed - mean) < 1.96 * std).mean())
            found.append(fit.edf_)
        assert max(found) < edf
        # The mesh was chosen by the same samples, which the posterior does not know of: .914 and .935.
        assert np.mean(inside) > 0.9 and min(inside) > 0.85

    def test_it_grows_away_from_the_samples(self):
        x, y = waves(500)
        _, std = fit_simplicial(x, y).predict(np.array([[0.5, 0.5], [2.0, 2.0], [5.0, 5.0]]), return_std=True)
        assert std[0] < std[1] < std[2]


class TestWeights:
    @pytest.mark.parametrize("scale", ["quantile", "minmax"])
    def test_weights_are_repetitions_up_to_a_factor_and_zero_removes_a_row(self, scale):
        x, y = waves(600, noise=0.2)
        x[:3] = [[9, 9], [-9, 9], [9, -9]]  # what would change every scale
        weight = np.random.default_rng(1).integers(0, 4, 600)
        weight[:3] = 0
        weighted = fit_simplicial(x, y, weight, scale=scale)
        repeated = fit_simplicial(np.repeat(x, weight, axis=0), np.repeat(y, weight), scale=scale)
        tiny = fit_simplicial(x, y, weight * 1e-9, scale=scale)
        for other in (repeated, tiny):
            np.testing.assert_allclose(weighted.predict(x[3:]), other.predict(x[3:]), atol=1e-9)
            assert weighted.noise_variance_ == pytest.approx(other.noise_variance_, rel=1e-9)

    def test_repeated_noise_is_not_taken_for_the_function(self):
        """As a bootstrap makes it. Counted as samples, three copies of each row make an interpolant the best model."""
        x, y = waves(400, noise=0.3)
        fit = fit_simplicial(np.repeat(x, 3, axis=0), np.repeat(y, 3))
        assert fit.noise_variance_ == pytest.approx(0.09, rel=0.3)
        assert fit.edf_ < 80

    def test_genuine_replicates_are_samples_each(self):
        x = np.repeat(np.random.default_rng(0).uniform(size=(20, 2)), 100, axis=0)
        y = truth(x) + 0.3 * np.random.default_rng(1).standard_normal(2000)
        fit = fit_simplicial(x, y)
        assert fit.noise_variance_ == pytest.approx(0.09, rel=0.1)
        assert r2(truth(x), fit.predict(x)) > 0.97

    def test_rows_of_more_weight_are_fitted_more_closely(self):
        """Noise of two sizes with the weights that belong to it, against none."""
        generator = np.random.default_rng(0)
        x, size = generator.uniform(size=(2000, 2)), generator.choice([0.02, 0.5], size=2000)
        y = truth(x) + size * generator.standard_normal(2000)
        new = generator.uniform(size=(1000, 2))
        weighted, plain = (fit_simplicial(x, y, w).predict(new) for w in (size**-2.0, None))
        assert ((weighted - truth(new)) ** 2).mean() < 0.2 * ((plain - truth(new)) ** 2).mean()


class TestScantInput:
    """No warning, finite predictions, and the simplest function that the samples leave."""

    def check(self, x, y, **options):
        fit = fit_simplicial(x, y, **options)
        mean, std = fit.predict(x, return_std=True)
        assert np.isfinite(mean).all() and np.isfinite(std).all()
        return fit

    def test_one_sample(self):
        fit = self.check(np.array([[0.3, 0.7]]), [3.0])
        assert fit.predict(np.array([[5.0, -5.0]])) == pytest.approx([3.0])

    @pytest.mark.parametrize("n", [2, 3, 5, 20])
    @pytest.mark.parametrize("d", [1, 2, 3])
    def test_fewer_samples_than_nodes(self, n, d):
        generator = np.random.default_rng(n)
        x, y = generator.uniform(size=(n, d)), generator.uniform(size=n)
        fit = self.check(x, y)
        assert fit.edf_ <= n + 1e-3  # the ridge at the largest lambda
        between = x.min(0) + generator.uniform(size=(50, d)) * np.ptp(x, axis=0)
        assert np.abs(fit.predict(between)).max() < 5

    def test_collinear_points(self):
        """No triangle could be made of them; the function is flat across the line."""
        t = np.random.default_rng(0).uniform(size=500)
        fit = self.check(np.column_stack((t, 2 - t)), np.sin(6 * t), scale="minmax")
        assert r2(np.sin(6 * t), fit.predict(np.column_stack((t, 2 - t)))) > 0.98

    def test_duplicated_points(self):
        generator = np.random.default_rng(0)
        x = np.repeat(generator.uniform(size=(12, 2)), 40, axis=0)
        self.check(x, generator.standard_normal(480))

    def test_constant_columns_have_no_influence(self):
        x, y = waves(500)
        plain = self.check(x, y)
        padded = self.check(np.column_stack((np.ones(500), x, np.zeros(500))), y)
        new = np.column_stack((np.full(500, 7.0), x, np.full(500, -3.0)))
        np.testing.assert_array_equal(padded.predict(new), plain.predict(x))

    def test_only_constant_columns(self):
        y = np.random.default_rng(0).standard_normal(100)
        fit = self.check(np.ones((100, 3)), y)
        np.testing.assert_allclose(fit.predict(np.ones((2, 3))), y.mean())
        assert fit.edf_ == pytest.approx(1, abs=1e-3)  # the ridge

    def test_constant_outputs(self):
        x, y = waves(300)
        fit = self.check(x, np.column_stack((np.full(300, 7.0), y)))
        np.testing.assert_allclose(fit.predict(x)[:, 0], 7.0)
        np.testing.assert_allclose(self.check(x, np.full(300, 1e6)).predict(x), 1e6)

    def test_discrete_columns(self):
        x = np.random.default_rng(0).integers(0, 4, size=(600, 2)).astype(float)
        fit = self.check(x, x.prod(1))
        np.testing.assert_allclose(fit.predict(x), x.prod(1), atol=2e-2)

    @pytest.mark.parametrize("factor", [1e-100, 1e100])
    def test_units_do_not_matter(self, factor):
        x, y = waves(300)
        fit = self.check(x * factor, y * factor)
        np.testing.assert_allclose(fit.predict(x * factor) / factor, fit_simplicial(x, y).predict(x), atol=1e-2)

    @pytest.mark.slow
    def test_heavy_tails(self):
        x = np.random.default_rng(0).standard_cauchy(size=(2000, 2))
        fit = self.check(x, np.tanh(x[:, 0]))
        assert r2(np.tanh(x[:, 0]), fit.predict(x)) > 0.995


class TestBadInput:
    def test_too_many_columns_that_vary(self):
        with pytest.raises(ValueError, match="up to 3 inputs, got 5 columns"):
            fit_simplicial(np.random.default_rng(0).uniform(size=(9, 5)), np.zeros(9))


class TestScale:
    @pytest.mark.parametrize("scale", ["quantile", "minmax"])
    def test_it_is_increasing_onto_the_unit_interval_and_inverted_exactly(self, scale):
        x = np.random.default_rng(0).standard_cauchy(size=(3000, 2))
        map_ = fit_scale(x, np.ones(len(x)), scale)
        u = map_.transform(x)
        assert u.min() == 0 and u.max() == 1
        wide = np.linspace(-1, 2, 500)[:, None] * [1, 1]
        np.testing.assert_allclose(map_.transform(map_.inverse_transform(wide)), wide, atol=1e-9)
        assert (np.diff(map_.inverse_transform(wide), axis=0) > 0).all()

    def test_quantiles_make_uniform_what_is_not_and_leave_alone_what_is(self):
        generator = np.random.default_rng(0)
        x = np.column_stack((1 / generator.uniform(1, 20, 20_000), generator.uniform(3, 4, 20_000)))
        scale = fit_scale(x, np.ones(len(x)), "quantile")
        u = np.sort(scale.transform(x), axis=0)
        assert np.abs(u - np.linspace(0, 1, 20_000)[:, None]).max() < 0.015
        assert len(scale.inputs[0]) > 8 and len(scale.inputs[1]) == 2

    def test_ties_and_neighbouring_floats(self):
        x = np.array([0.0] * 50 + [1.0] * 30 + [1.0 + 1e-15] * 10 + [2.0] * 5)[:, None]
        scale = fit_scale(x, np.ones(len(x)), "quantile")
        assert (np.diff(scale.inputs[0]) > 1e-13).all() and (np.diff(scale.outputs[0]) > 0).all()
