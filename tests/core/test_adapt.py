"""Mesh updates: parity with the published algorithms, and the invariants every move must keep."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lreg_peft.core import check_nodes, evaluate, hat_basis, locate, uniform_nodes
from lreg_peft.core.adapt import (
    adapt_mesh,
    coarsen,
    element_moments,
    element_sums,
    independent_nodes,
    interpolate,
    mark,
    node_gradient,
    refine,
    removal_cost,
    remove,
)

DTYPES = (torch.float32, torch.float64)
STRATEGIES = ("relocate", "paper")


# --- Algorithms 2 and 3 of Li, Cheng & Gu (2025), written out in float64 NumPy loops ------------------------------


def reference_refine(nodes: np.ndarray, hits: np.ndarray, n_refine: int, pseudocount: float):
    """Split the most-hit elements of one mesh; each half takes half of the mass."""
    chosen = sorted(range(len(hits)), key=lambda j: (-hits[j], j))[:n_refine]
    fine, mass = [nodes[0]], []
    for j in range(len(hits)):
        m = hits[j] + pseudocount
        if j in chosen:
            fine.append((nodes[j] + nodes[j + 1]) / 2)
            mass.extend([m / 2, m / 2])
        else:
            mass.append(m)
        fine.append(nodes[j + 1])
    return np.array(fine), np.array(mass)


def reference_coarsen(nodes: np.ndarray, mass: np.ndarray, n_nodes: int) -> np.ndarray:
    """Integrate the density mass / length and put the nodes at equal steps of the integral."""
    density = [mass[j] / (nodes[j + 1] - nodes[j]) for j in range(len(mass))]
    total = sum(mass)
    result = [nodes[0]]
    for i in range(1, n_nodes - 1):
        wanted, j = total * i / (n_nodes - 1), 0
        while wanted > mass[j]:
            wanted -= mass[j]
            j += 1
        result.append(nodes[j] + wanted / density[j])
    return np.array([*result, nodes[-1]])


def random_nodes(components: int, n_nodes: int, dtype: torch.dtype, generator: torch.Generator, spread: float = 3.0):
    """Meshes on [0, 1] whose elements differ in length by up to a factor exp(spread)."""
    lengths = (spread * torch.rand(components, n_nodes - 1, dtype=torch.float64, generator=generator)).exp()
    inner = (lengths.cumsum(1) / lengths.sum(1, keepdim=True))[:, :-1]
    ends = torch.zeros(components, 1, dtype=torch.float64), torch.ones(components, 1, dtype=torch.float64)
    return torch.cat((ends[0], inner, ends[1]), 1).to(dtype)


@st.composite
def problems(draw, fewest: int = 2, most: int = 1024):
    """A mesh with coefficients, an indicator and the statistics of samples, in fp32 or fp64."""
    dtype = draw(st.sampled_from(DTYPES))
    components = draw(st.integers(1, 4))
    n_nodes = draw(st.one_of(st.integers(fewest, 12), st.integers(fewest, 200), st.sampled_from((512, 1024))))
    n_nodes = min(n_nodes, most)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    out = draw(st.integers(1, 3))
    nodes = random_nodes(components, n_nodes, dtype, generator)
    samples = torch.rand(draw(st.sampled_from((1, 20, 2000))), components, dtype=dtype, generator=generator)
    element, local = locate(samples, nodes)
    hits = torch.randint(0, draw(st.sampled_from((1, 2, 50))), (components, n_nodes - 1), generator=generator)
    return {
        "nodes": nodes,
        "coefficients": torch.randn(components, n_nodes, out, dtype=dtype, generator=generator),
        "hits": hits.to(dtype),
        "moments": element_moments(element, local, n_nodes - 1),
        "gradient": torch.randn(components, n_nodes, dtype=dtype, generator=generator),
        "generator": generator,
    }


def move(problem, strategy, **options):
    if strategy == "relocate":
        options = {"moments": problem["moments"], "node_gradient": problem["gradient"], **options}
    return adapt_mesh(problem["nodes"], problem["coefficients"], problem["hits"], strategy=strategy, **options)


def eps(*tensors: torch.Tensor) -> float:
    return max(torch.finfo(t.dtype).eps for t in tensors)


class TestPublishedAlgorithms:
    @settings(max_examples=30, deadline=None)
    @given(problems(), st.integers(1, 300), st.sampled_from((0.25, 1.0, 10.0)))
    def test_refine_and_coarsen_agree_with_the_loops(self, problem, n_refine, pseudocount):
        nodes, hits = problem["nodes"].double(), problem["hits"].double()
        n_refine = min(n_refine, hits.shape[1])
        fine, mass = refine(nodes, mark(hits, n_refine), hits + pseudocount)
        new = coarsen(fine, mass, nodes.shape[1])
        for i in range(nodes.shape[0]):
            expected_fine, expected_mass = reference_refine(nodes[i].numpy(), hits[i].numpy(), n_refine, pseudocount)
            np.testing.assert_allclose(fine[i].numpy(), expected_fine, rtol=0, atol=2e-16)
            np.testing.assert_array_equal(mass[i].numpy(), expected_mass)
            expected = reference_coarsen(expected_fine, expected_mass, nodes.shape[1])
            # Sums of up to 2047 masses, in a different order: 2047 eps of the total, as a share of one element.
            np.testing.assert_allclose(new[i].numpy(), expected, rtol=0, atol=1e-12)

    @settings(max_examples=20, deadline=None)
    @given(problems(), st.sampled_from((1.0, 10.0)))
    def test_the_strategy_is_the_two_in_a_row(self, problem, pseudocount):
        nodes, hits = problem["nodes"], problem["hits"]
        n_refine = max(1, nodes.shape[1] // 8)
        adapted = move(problem, "paper", n_refine=n_refine, pseudocount=pseudocount)
        for i in range(nodes.shape[0]):
            fine, mass = reference_refine(nodes[i].double().numpy(), hits[i].double().numpy(), n_refine, pseudocount)
            expected = reference_coarsen(fine, mass, nodes.shape[1])
            np.testing.assert_allclose(adapted.nodes[i].double().numpy(), expected, rtol=0, atol=eps(nodes) + 1e-12)

    def test_splitting_does_not_influence_the_new_nodes(self):
        generator = torch.Generator().manual_seed(0)
        nodes = random_nodes(3, 20, torch.float64, generator)
        hits = torch.randint(0, 30, (3, 19), generator=generator).double()
        few, many = (adapt_mesh(nodes, nodes.unsqueeze(2), hits, strategy="paper", n_refine=k).nodes for k in (1, 19))
        torch.testing.assert_close(few, many, atol=1e-14, rtol=0)

    def test_every_new_element_holds_the_same_mass(self):
        nodes = torch.tensor([[0.0, 0.1, 0.5, 1.0]], dtype=torch.float64)
        new = coarsen(nodes, torch.tensor([[6.0, 2.0, 4.0]], dtype=torch.float64), 5)
        torch.testing.assert_close(new, torch.tensor([[0.0, 0.05, 0.1, 0.625, 1.0]], dtype=torch.float64))

    def test_elements_without_mass_are_skipped(self):
        nodes = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0]], dtype=torch.float64)
        new = coarsen(nodes, torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64), 4)
        expected = torch.tensor([[0.0, 0.25 + 0.25 / 3, 0.25 + 0.5 / 3, 1.0]], dtype=torch.float64)
        torch.testing.assert_close(new, expected)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(2, 1024), st.integers(2, 1024), st.floats(0, 1), st.integers(0, 2**31))
    def test_coarsen_copes_with_empty_elements_anywhere(self, n_nodes, n_new, filled, seed):
        generator = torch.Generator().manual_seed(seed)
        nodes = random_nodes(2, n_nodes, torch.float64, generator)
        mass = torch.rand(2, n_nodes - 1, dtype=torch.float64, generator=generator)
        mass *= torch.rand(mass.shape, generator=generator) < filled
        mass[:, (seed % (n_nodes - 1))] = 0.1
        new = coarsen(nodes, mass, n_new)
        check_nodes(new)
        assert new.shape == (2, n_new)


class TestRefine:
    @settings(max_examples=60, deadline=None)
    @given(problems(), st.integers(0, 300))
    def test_leaves_the_function_unchanged(self, problem, n_refine):
        nodes, coefficients = problem["nodes"], problem["coefficients"]
        components, n_nodes = nodes.shape
        n_refine = min(n_refine, n_nodes - 1)
        fine, mass = refine(nodes, mark(problem["hits"], n_refine), problem["hits"])
        check_nodes(fine)
        assert fine.shape == (components, n_nodes + n_refine)
        torch.testing.assert_close(mass.sum(1), problem["hits"].sum(1))
        coords = torch.rand(200, components, dtype=nodes.dtype, generator=problem["generator"])
        before = evaluate(coords, nodes, coefficients)
        after = evaluate(coords, fine, interpolate(nodes, fine, coefficients))
        # Two roundings of the local coordinate, three of the interpolation, on both meshes, per component.
        tolerance = 10 * components * eps(nodes) * coefficients.abs().max().item()
        torch.testing.assert_close(after, before, atol=tolerance, rtol=0)

    def test_splits_an_element_and_its_mass_in_halves(self):
        nodes = torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.2, 1.0]])
        fine, mass = refine(nodes, torch.tensor([[1], [0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
        torch.testing.assert_close(fine, torch.tensor([[0.0, 0.5, 0.75, 1.0], [0.0, 0.1, 0.2, 1.0]]))
        assert mass.tolist() == [[3, 2, 2], [2.5, 2.5, 6]]

    def test_mark_breaks_ties_by_index(self):
        assert mark(torch.tensor([[1.0, 5.0, 5.0, 2.0, 5.0]]), 3).tolist() == [[1, 2, 4]]


class TestInterpolate:
    @settings(max_examples=60, deadline=None)
    @given(problems(), st.integers(2, 300))
    def test_preserves_functions_that_are_linear_on_each_new_element(self, problem, n_new):
        # Kinks at some nodes of the old mesh, all of them nodes of the new one.
        nodes, generator = problem["nodes"], problem["generator"]
        components, n_nodes = nodes.shape
        keep = torch.unique(
            torch.cat((torch.tensor([0, n_nodes - 1]), torch.randint(0, n_nodes, (5,), generator=generator)))
        )
        kinks = nodes[:, keep]
        more = torch.rand(components, n_new, dtype=torch.float64, generator=generator).to(nodes.dtype)
        new = torch.cat((kinks, more), 1).sort(1).values
        if not (new.diff(dim=1) > 0).all():
            return
        at_kinks = torch.randn(components, len(keep), 2, dtype=nodes.dtype, generator=generator)
        on_new = interpolate(nodes, new, interpolate(kinks, nodes, at_kinks))
        expected = interpolate(kinks, new, at_kinks)
        # Three interpolations of five roundings each; a local coordinate errs by the rounding of the old node it
        # starts from, amplified by no more than the ratio of neighbouring elements, exp(3).
        torch.testing.assert_close(on_new, expected, atol=100 * eps(nodes) * at_kinks.abs().max().item(), rtol=0)

    @settings(max_examples=60, deadline=None)
    @given(problems(), st.sampled_from(STRATEGIES), st.sampled_from((torch.float32, torch.float64, torch.bfloat16)))
    def test_second_moments_stay_non_negative_and_bounded(self, problem, strategy, dtype):
        adapted = move(problem, strategy)
        shape = problem["coefficients"].shape
        squares = torch.randn(shape, generator=problem["generator"]).square() * torch.randint(
            0, 2, shape, generator=problem["generator"]
        )
        carried = adapted.carry(squares.to(dtype))
        assert carried.dtype == dtype and carried.shape == shape
        assert (carried >= 0).all()
        assert (carried.amax(1) <= squares.to(dtype).amax(1)).all()

    @settings(max_examples=30, deadline=None)
    @given(problems(fewest=3), st.sampled_from(STRATEGIES))
    def test_nodes_that_stay_keep_their_values_exactly(self, problem, strategy):
        adapted = move(problem, strategy, **({"node_gradient": None} if strategy == "relocate" else {}))
        carried = adapted.carry(problem["coefficients"])
        same = (adapted.nodes.unsqueeze(2) == problem["nodes"].unsqueeze(1)).nonzero()  # component, new, old
        assert len(same) >= 2 * problem["nodes"].shape[0]
        component, new, old = same.unbind(1)
        assert torch.equal(carried[component, new], problem["coefficients"][component, old])

    def test_per_node_tensors_of_any_rank(self):
        old, new = uniform_nodes(2, 3), uniform_nodes(2, 5)
        values = torch.arange(6.0).view(2, 3)
        expected = torch.tensor([[0.0, 0.5, 1.0, 1.5, 2.0], [3.0, 3.5, 4.0, 4.5, 5.0]])
        torch.testing.assert_close(interpolate(old, new, values), expected)
        torch.testing.assert_close(interpolate(old, new, values.view(2, 3, 1, 1)).view(2, 5), expected)


class TestInvariants:
    @settings(max_examples=150, deadline=None)
    @given(problems(), st.sampled_from(STRATEGIES), st.integers(0, 300), st.floats(0.01, 1))
    def test_a_move_yields_a_mesh_with_the_same_ends_and_shape(self, problem, strategy, n_refine, size):
        nodes = problem["nodes"]
        adapted = move(problem, strategy, n_refine=n_refine, size=size)
        check_nodes(adapted.nodes)
        assert adapted.nodes.shape == nodes.shape and adapted.nodes.dtype == nodes.dtype
        assert torch.equal(adapted.nodes[:, 0], nodes[:, 0]) and torch.equal(adapted.nodes[:, -1], nodes[:, -1])
        carried = adapted.carry(problem["coefficients"])
        assert carried.shape == problem["coefficients"].shape and torch.isfinite(carried).all()

    @settings(max_examples=40, deadline=None)
    @given(problems(), st.sampled_from(STRATEGIES))
    def test_straight_lines_survive_a_move(self, problem, strategy):
        nodes = problem["nodes"]
        problem["coefficients"] = (2 - 3 * nodes).unsqueeze(2)
        adapted = move(problem, strategy)
        expected = (2 - 3 * adapted.nodes).unsqueeze(2)
        torch.testing.assert_close(adapted.carry(problem["coefficients"]), expected, atol=20 * eps(nodes), rtol=0)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(2, 1024), st.sampled_from(DTYPES), st.sampled_from(STRATEGIES), st.sampled_from((0.0, 1.0, 7.0)))
    def test_uniform_counts_leave_a_uniform_mesh_uniform(self, n_nodes, dtype, strategy, count):
        nodes = uniform_nodes(2, n_nodes, dtype=dtype)
        coefficients = torch.randn(2, n_nodes, 3, dtype=dtype, generator=torch.Generator().manual_seed(n_nodes))
        adapted = adapt_mesh(nodes, coefficients, nodes.new_full((2, n_nodes - 1), count), strategy=strategy)
        # The sum of up to 1024 equal masses, taken in fp64, against nodes rounded in `dtype`.
        torch.testing.assert_close(adapted.nodes, nodes, atol=2 * eps(nodes), rtol=0)

    @pytest.mark.parametrize("strategy", STRATEGIES)
    @pytest.mark.parametrize("n_nodes", [8, 33, 128])
    def test_repeated_updates_concentrate_nodes_where_the_losses_are(self, strategy, n_nodes):
        samples = torch.cat((torch.linspace(0, 1, 501), torch.linspace(0.6, 0.65, 4501))).double().unsqueeze(1)
        nodes = uniform_nodes(1, n_nodes)
        for _ in range(40):
            element, _ = locate(samples, nodes)
            hits = element_sums(element, torch.ones(()), n_nodes - 1)
            nodes = adapt_mesh(nodes, torch.zeros(1, n_nodes, 1), hits, strategy=strategy).nodes
        inside = ((nodes >= 0.6) & (nodes <= 0.65)).sum() / n_nodes
        # Nine tenths of the samples; the pseudocount and the median rule keep some nodes outside.
        assert inside > 0.5

    @settings(max_examples=30, deadline=None)
    @given(problems(), st.sampled_from(STRATEGIES))
    def test_components_do_not_influence_each_other_and_repeats_are_bit_identical(self, problem, strategy):
        together = move(problem, strategy)
        assert torch.equal(together.nodes, move(problem, strategy).nodes)
        for i in range(problem["nodes"].shape[0]):
            one = {k: v[i : i + 1] for k, v in problem.items() if k != "generator"}
            assert torch.equal(move(one, strategy).nodes, together.nodes[i : i + 1])

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_without_a_single_hit_the_mesh_stays(self, strategy):
        nodes = random_nodes(2, 12, torch.float64, torch.Generator().manual_seed(0))
        hits = torch.zeros(2, 11)
        new = adapt_mesh(nodes, torch.randn(2, 12, 1), hits, strategy=strategy, pseudocount=0.0).nodes
        torch.testing.assert_close(new, nodes, atol=1e-14, rtol=0)

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_two_nodes_cannot_move(self, strategy):
        nodes = uniform_nodes(3, 2)
        adapted = adapt_mesh(nodes, torch.randn(3, 2, 5), torch.rand(3, 1), strategy=strategy)
        assert torch.equal(adapted.nodes, nodes)

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_elements_do_not_collapse(self, strategy):
        nodes = uniform_nodes(1, 5)
        for _ in range(60):
            hits = torch.zeros(1, 4).index_put((torch.tensor([0]), nodes.diff().argmin().view(1)), torch.tensor(1e9))
            nodes = adapt_mesh(nodes, torch.zeros(1, 5, 1), hits, strategy=strategy).nodes
        assert nodes.diff(dim=1).min() >= 0.9e-5

    def test_a_mesh_its_dtype_cannot_resolve_further_stays(self):
        nodes = 1e4 + torch.tensor([[0.0, 1.0, 2.0, 3.0]]) * 2**-10  # three ulps of fp32
        hits = torch.tensor([[100.0, 0.0, 0.0]])
        for strategy in STRATEGIES:
            check_nodes(adapt_mesh(nodes, torch.zeros(1, 4, 1), hits, strategy=strategy).nodes)


class TestRemovalCost:
    @settings(max_examples=40, deadline=None)
    @given(problems(fewest=3, most=64))
    def test_agrees_with_the_dense_inverse(self, problem):
        nodes, coefficients = problem["nodes"].double(), problem["coefficients"].double()
        generator = problem["generator"]
        components, n_nodes = nodes.shape
        samples = torch.rand(40 * n_nodes, components, dtype=torch.float64, generator=generator)
        element, local = locate(samples, nodes)
        cost = removal_cost(nodes, coefficients, element_moments(element, local, n_nodes - 1))
        basis = hat_basis(samples, nodes)
        for i in range(components):
            mass = basis[:, i].T @ basis[:, i]
            mass = mass + 1e-9 * mass.diagonal().mean() * torch.eye(n_nodes, dtype=torch.float64)
            share = (nodes[i, 1:-1] - nodes[i, :-2]) / (nodes[i, 2:] - nodes[i, :-2])
            rows = torch.zeros(n_nodes - 2, n_nodes, dtype=torch.float64)
            for j in range(n_nodes - 2):
                rows[j, j], rows[j, j + 1], rows[j, j + 2] = 1 - share[j], -1, share[j]
            expected = (rows @ coefficients[i]).square().sum(1) / (rows * torch.linalg.solve(mass, rows.T).T).sum(1)
            # Elements with one or two samples make the mass matrix nearly singular: cond * eps = 1e9 * 2e-16.
            torch.testing.assert_close(cost[i], expected, rtol=1e-5, atol=1e-12 * expected.max().item())

    def test_is_the_rise_of_the_least_squares_residual(self):
        generator = torch.Generator().manual_seed(3)
        samples = torch.rand(300, 1, dtype=torch.float64, generator=generator)
        target = torch.randn(300, 2, dtype=torch.float64, generator=generator)
        nodes = random_nodes(1, 9, torch.float64, generator)

        def fit(mesh):
            basis = hat_basis(samples, mesh)[:, 0]
            solution = torch.linalg.lstsq(basis, target).solution
            return solution.unsqueeze(0), (basis @ solution - target).square().sum()

        coefficients, before = fit(nodes)
        element, local = locate(samples, nodes)
        cost = removal_cost(nodes, coefficients, element_moments(element, local, 8))
        for j in range(7):
            _, after = fit(torch.cat((nodes[:, : j + 1], nodes[:, j + 2 :]), 1))
            torch.testing.assert_close(cost[0, j], after - before, rtol=1e-6, atol=0)

    def test_nodes_on_a_straight_line_cost_nothing(self):
        nodes = random_nodes(2, 10, torch.float64, torch.Generator().manual_seed(0))
        cost = removal_cost(nodes, nodes.unsqueeze(2), torch.ones(2, 9, 3) / 3)
        assert cost.abs().max() < 1e-28

    def test_no_samples_at_all(self):
        cost = removal_cost(uniform_nodes(1, 6), torch.randn(1, 6, 2), torch.zeros(1, 5, 3))
        assert (cost >= 0).all() and cost.max() < 1e-60

    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 1022), st.integers(0, 2**31))
    def test_independent_nodes_are_no_neighbours_and_include_all_local_minima(self, n, seed):
        rank = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).unsqueeze(0)
        free = independent_nodes(rank)[0].tolist()
        row = rank[0].tolist()
        assert not any(a and b for a, b in itertools.pairwise(free))
        assert sum(free) >= n / 4
        for j in range(n):
            if (j == 0 or row[j] < row[j - 1]) and (j == n - 1 or row[j] < row[j + 1]):
                assert free[j]

    def test_remove_takes_the_cheapest_that_are_no_neighbours(self):
        nodes = uniform_nodes(1, 8)
        left = remove(nodes, torch.tensor([[5.0, 1.0, 2.0, 9.0, 0.5, 7.0]]), 2)
        assert torch.equal(left, nodes[:, [0, 1, 3, 4, 6, 7]])


class TestGatheredStatistics:
    def test_sums_and_moments_agree_with_loops(self):
        generator = torch.Generator().manual_seed(0)
        nodes = random_nodes(2, 6, torch.float64, generator)
        samples = torch.rand(7, 5, 2, dtype=torch.float64, generator=generator)
        element, local = locate(samples, nodes)
        values = torch.rand(7, 5, 1, dtype=torch.float64, generator=generator)
        sums, moments = torch.zeros(2, 5).double(), torch.zeros(2, 5, 3).double()
        for a in range(7):
            for b in range(5):
                for i in range(2):
                    t, j = local[a, b, i], element[a, b, i]
                    sums[i, j] += values[a, b, 0]
                    moments[i, j] += torch.stack(((1 - t) ** 2, t * (1 - t), t**2))
        torch.testing.assert_close(element_sums(element, values, 5), sums)
        torch.testing.assert_close(element_moments(element, local, 5), moments)

    def test_node_gradient_agrees_with_autograd(self):
        generator = torch.Generator().manual_seed(1)
        nodes = random_nodes(3, 7, torch.float64, generator).requires_grad_()
        coords = torch.rand(200, 3, dtype=torch.float64, generator=generator).requires_grad_()
        coefficients = torch.randn(3, 7, 4, dtype=torch.float64, generator=generator)
        loss = (evaluate(coords, nodes, coefficients) - 1).square().sum()
        coords_gradient, expected = torch.autograd.grad(loss, (coords, nodes))
        element, local = locate(coords.detach(), nodes.detach())
        torch.testing.assert_close(node_gradient(element, local, coords_gradient, 6), expected)


class TestExchange:
    def test_a_node_leaves_a_straight_line_for_the_largest_residual(self):
        nodes = uniform_nodes(1, 6)  # 0, .2, .4, .6, .8, 1
        coefficients = torch.tensor([0.0, 1.0, 2.0, 5.0, 1.0, 3.0]).view(1, 6, 1)  # straight at node 1 only
        for size in (1.0, 0.1):  # nothing else could move without a node gradient
            indicator = torch.tensor([[1.0, 1.0, 1.0, 9.0, 1.0]])
            new = adapt_mesh(nodes, coefficients, indicator, n_refine=1, size=size).nodes
            torch.testing.assert_close(new, torch.tensor([[0.0, 0.4, 0.6, 0.7, 0.8, 1.0]]))

    def test_an_element_too_short_to_split_is_passed_over(self):
        nodes = torch.tensor([[0.0, 0.3, 0.5, 0.500015, 0.8, 1.0]], dtype=torch.float64)
        coefficients = torch.tensor([0.0, 0.3, 2.0, 5.0, 1.0, 3.0], dtype=torch.float64).view(1, 6, 1)
        coefficients[0, 1] = 2.0 * 0.3 / 0.5  # on the line through its neighbours
        new = adapt_mesh(nodes, coefficients, torch.tensor([[1.0, 1.0, 9.0, 4.0, 1.0]]), n_refine=1).nodes
        expected = torch.tensor([[0.0, 0.5, 0.500015, (0.500015 + 0.8) / 2, 0.8, 1.0]], dtype=torch.float64)
        torch.testing.assert_close(new, expected)

    @settings(max_examples=60, deadline=None)
    @given(problems(fewest=3, most=100))
    def test_neighbours_do_not_leave_together(self, problem):
        nodes = problem["nodes"]
        new = move(problem, "relocate", node_gradient=None, n_refine=nodes.shape[1]).nodes
        stayed = (nodes.unsqueeze(2) == new.unsqueeze(1)).any(dim=2)
        assert (stayed[:, 1:] | stayed[:, :-1]).all()

    def test_a_sliding_node_finds_a_kink(self):
        coords = torch.linspace(0, 1, 2001, dtype=torch.float64).unsqueeze(1)
        target = (coords - 0.5).abs()
        nodes = torch.tensor([[0.0, 0.3, 1.0]], dtype=torch.float64)
        losses, size = [], 1.0
        for _ in range(40):
            basis = hat_basis(coords, nodes)[:, 0]
            coefficients = torch.linalg.lstsq(basis, target).solution.unsqueeze(0)
            points = coords.clone().requires_grad_()
            output = evaluate(points, nodes, coefficients)
            residual = output.detach() - target
            output.backward(residual)
            losses.append(residual.square().sum().item())
            if len(losses) > 1 and losses[-1] > losses[-2]:
                size /= 2
            element, local = locate(coords, nodes)
            nodes = adapt_mesh(
                nodes,
                coefficients,
                element_sums(element, residual.square(), 2),
                n_refine=0,
                moments=element_moments(element, local, 2),
                node_gradient=node_gradient(element, local, points.grad, 2),
                size=size,
            ).nodes
        assert abs(nodes[0, 1].item() - 0.5) < 1e-3
        assert min(losses) < 1e-4 * losses[0]

    def test_small_moves_only_slide(self):
        generator = torch.Generator().manual_seed(0)
        nodes = uniform_nodes(1, 9)
        coefficients = torch.randn(1, 9, 2, generator=generator)
        statistics = {"moments": torch.ones(1, 8, 3), "node_gradient": torch.randn(1, 9, generator=generator)}
        energy = torch.rand(1, 8, generator=generator) + 0.1
        new = adapt_mesh(nodes, coefficients, energy, n_refine=3, size=0.1, **statistics).nodes
        moved = (new - nodes).abs()[:, 1:-1]
        assert (moved > 0).all() and moved.max() <= 0.1 * 0.45 / 8 * (1 + 1e-5)
        assert (torch.sign(new - nodes) == -torch.sign(statistics["node_gradient"]))[:, 1:-1].all()


class TestErrors:
    nodes = uniform_nodes(2, 4)
    coefficients = torch.zeros(2, 4, 3)
    indicator = torch.ones(2, 3)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"strategy": "best"}, "'best'"),
            ({"nodes": torch.tensor([[0.0, 1.0, 0.5, 2.0]] * 2)}, "strictly increasing"),
            ({"coefficients": torch.zeros(2, 5, 3)}, r"\(2, 5, 3\)"),
            ({"indicator": torch.ones(2, 4)}, r"\(2, 4\)"),
            ({"indicator": torch.tensor([[1.0, 1.0, 1.0], [1.0, -2.0, 1.0]])}, r"-2\.0 at index \[1, 1\]"),
            ({"indicator": torch.full((2, 3), torch.nan)}, "nan at index"),
            ({"n_refine": -1}, "-1"),
            ({"pseudocount": -0.5}, "-0.5"),
            ({"size": 0.0}, "0.0"),
            ({"size": 1.5}, "1.5"),
            ({"moments": torch.ones(2, 3)}, r"\(2, 3\)"),
            ({"moments": -torch.ones(2, 3, 3)}, r"-1\.0"),
            ({"node_gradient": torch.ones(2, 4)}, "needs the moments"),
            ({"node_gradient": torch.ones(2, 3), "moments": torch.ones(2, 3, 3)}, r"\(2, 3\)"),
            ({"node_gradient": torch.full((2, 4), torch.inf), "moments": torch.ones(2, 3, 3)}, "inf at index"),
        ],
    )
    def test_adapt_mesh_gives_the_offending_value(self, change, message):
        arguments = {"nodes": self.nodes, "coefficients": self.coefficients, "indicator": self.indicator, **change}
        with pytest.raises(ValueError, match=message):
            adapt_mesh(**arguments)

    def test_pieces_give_the_offending_value(self):
        with pytest.raises(ValueError, match="n_refine=5"):
            mark(self.indicator, 5)
        with pytest.raises(ValueError, match="NaN at"):
            mark(torch.tensor([[1.0, torch.nan]]), 1)
        with pytest.raises(ValueError, match="n_nodes=1"):
            coarsen(self.nodes, self.indicator, 1)
        with pytest.raises(ValueError, match="positive in sum"):
            coarsen(self.nodes, torch.zeros(2, 3), 4)
        with pytest.raises(ValueError, match="marked must have shape"):
            refine(self.nodes, torch.zeros(3, 1, dtype=torch.long), self.indicator)
        with pytest.raises(ValueError, match=r"values \(2, 3\)"):
            interpolate(self.nodes, self.nodes, torch.zeros(2, 3))
        with pytest.raises(ValueError, match="coefficients must have shape"):
            removal_cost(self.nodes, torch.zeros(2, 3, 1), torch.ones(2, 3, 3))
