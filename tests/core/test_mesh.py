import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lreg_peft.core import check_nodes, locate, quantile_nodes, uniform_nodes
from lreg_peft.core.mesh import MIN_RELATIVE_ELEMENT, separate_nodes


def random_nodes(components: int, n_nodes: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    lengths = torch.rand(components, n_nodes - 1, dtype=torch.float64) + 0.05
    inner = lengths.cumsum(1) / lengths.sum(1, keepdim=True)
    return torch.cat((torch.zeros(components, 1, dtype=torch.float64), inner), 1).to(dtype)


class TestUniformNodes:
    def test_ends_are_exact_and_spacing_is_equal(self):
        nodes = uniform_nodes(3, 7, low=-2, high=5)
        assert nodes.shape == (3, 7)
        assert nodes.dtype == torch.float32
        assert (nodes[:, 0] == -2).all()
        assert (nodes[:, -1] == 5).all()
        # A spacing of 7/6 near 5: two fp32 roundings of numbers below 8.
        torch.testing.assert_close(nodes.diff(dim=1), torch.full((3, 6), 7 / 6), atol=2 * 2**-21, rtol=0)

    def test_rows_are_independent_memory(self):
        nodes = uniform_nodes(2, 3)
        nodes[0, 1] = 0.9
        assert nodes[1, 1] == 0.5

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"n_components": 2, "n_nodes": 1}, "n_nodes=1"),
            ({"n_components": 0, "n_nodes": 2}, "n_components=0"),
            ({"n_components": 1, "n_nodes": 2, "low": 1.0, "high": 1.0}, "low=1.0, high=1.0"),
            ({"n_components": 1, "n_nodes": 2, "dtype": torch.bfloat16}, "bfloat16"),
        ],
    )
    def test_refuses_what_is_no_mesh(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            uniform_nodes(**arguments)


class TestQuantileNodes:
    @pytest.mark.parametrize("n_nodes", [2, 3, 10, 64])
    def test_every_element_holds_the_same_share(self, n_nodes):
        torch.manual_seed(0)
        samples = torch.rand(6300, 2, dtype=torch.float64) ** 2
        nodes = quantile_nodes(samples, n_nodes, low=None, high=None)
        element, _ = locate(samples, nodes)
        for i in range(2):
            share = torch.bincount(element[:, i], minlength=n_nodes - 1) / 6300
            assert (share - 1 / (n_nodes - 1)).abs().max() <= 2 / 6300  # each end of an element rounds to a sample

    def test_ends_are_the_given_ones(self):
        nodes = quantile_nodes(torch.rand(50, 2), 4)
        assert nodes.dtype == torch.float32
        assert (nodes[:, 0] == 0).all() and (nodes[:, -1] == 1).all()

    def test_repeated_samples_give_a_valid_mesh(self):
        samples = torch.full((100, 1), 0.5)
        samples[-1] = 0.7
        nodes = quantile_nodes(samples, 9)
        check_nodes(nodes)
        assert nodes.diff(dim=1).min() >= MIN_RELATIVE_ELEMENT * 0.99

    @pytest.mark.parametrize(
        ("samples", "n_nodes", "message"),
        [
            (torch.rand(5, 1), 1, "n_nodes=1"),
            (torch.rand(0, 1), 3, r"\(0, 1\)"),
            (torch.rand(5), 3, r"\(5,\)"),
            (torch.tensor([[0.1], [float("nan")]]), 3, "finite"),
        ],
    )
    def test_refuses_unusable_samples(self, samples, n_nodes, message):
        with pytest.raises(ValueError, match=message):
            quantile_nodes(samples, n_nodes)

    def test_refuses_an_empty_range(self):
        with pytest.raises(ValueError, match="component 0 would span"):
            quantile_nodes(torch.full((5, 1), 0.25), 3, low=None, high=None)


class TestCheckNodes:
    @pytest.mark.parametrize(
        ("nodes", "message"),
        [
            (torch.zeros(2, 1), "components=2, n_nodes=1"),
            (torch.zeros(3), r"\(3,\)"),
            (torch.tensor([[0, 1]]), "int64"),
            (torch.tensor([[0.0, 0.6, 0.4, 1.0]]), r"component 0 has 0\.6.* at node 1 followed by 0\.4"),
            (torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.5, 0.5]]), "component 1 has 0.5 at node 1 followed by 0.5"),
            (torch.tensor([[0.0, float("nan"), 1.0]]), "nan at component 0, node 1"),
            (torch.tensor([[0.0, 0.5, float("inf")]]), "inf at component 0, node 2"),
        ],
    )
    def test_shows_the_offending_values(self, nodes, message):
        with pytest.raises(ValueError, match=message):
            check_nodes(nodes)


class TestSeparateNodes:
    def test_leaves_a_good_mesh_untouched(self):
        nodes = random_nodes(4, 30)
        assert torch.equal(separate_nodes(nodes), nodes)

    @settings(max_examples=50, deadline=None)
    @given(st.integers(0, 10**6), st.integers(2, 300), st.booleans())
    def test_result_is_a_mesh_with_the_same_ends(self, seed, n_nodes, double):
        torch.manual_seed(seed)
        dtype = torch.float64 if double else torch.float32
        steps = torch.rand(3, n_nodes - 1, dtype=dtype) * (torch.rand(3, n_nodes - 1) < 0.3)
        steps[:, 0] += 0.1
        nodes = torch.cat((torch.zeros(3, 1, dtype=dtype), steps.cumsum(1)), 1)
        nodes = nodes / nodes[:, -1:]
        separated = separate_nodes(nodes)
        check_nodes(separated)
        assert separated.dtype == dtype
        assert torch.equal(separated[:, [0, -1]], nodes[:, [0, -1]])


class TestLocate:
    @pytest.mark.parametrize("n_nodes", [2, 3, 8, 9, 200])  # both sides of the switch to a binary search
    def test_element_holds_the_coordinate_and_local_rebuilds_it(self, n_nodes):
        torch.manual_seed(n_nodes)
        nodes = random_nodes(3, n_nodes)
        coords = torch.rand(5, 7, 3, dtype=torch.float64)
        element, local = locate(coords, nodes)
        assert element.shape == local.shape == coords.shape
        component = torch.arange(3)
        left, right = nodes[component, element], nodes[component, element + 1]
        assert ((left <= coords) & (coords < right)).all()
        torch.testing.assert_close(left + local * (right - left), coords, atol=1e-15, rtol=0)

    @pytest.mark.parametrize("n_nodes", [3, 12])
    def test_nodes_belong_to_the_element_on_their_right_but_for_the_last(self, n_nodes):
        nodes = random_nodes(1, n_nodes)
        element, local = locate(nodes.T, nodes)
        assert element.squeeze(1).tolist() == [*range(n_nodes - 1), n_nodes - 2]
        assert local.squeeze(1).tolist() == [0.0] * (n_nodes - 1) + [1.0]

    @pytest.mark.parametrize("n_nodes", [2, 5, 20])
    def test_coordinates_outside_are_clamped(self, n_nodes):
        nodes = uniform_nodes(1, n_nodes)
        element, local = locate(torch.tensor([[-3.0], [4.0]]), nodes)
        assert element.squeeze(1).tolist() == [0, n_nodes - 2]
        assert local.squeeze(1).tolist() == [0.0, 1.0]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_coordinates_are_located_in_fp32(self, dtype):
        nodes = uniform_nodes(1, 513)
        coords = torch.rand(64, 1).to(dtype)
        element, local = locate(coords, nodes)
        assert local.dtype == torch.float32
        assert torch.equal(element, locate(coords.float(), nodes)[0])

    def test_refuses_nan_and_wrong_component_counts(self):
        nodes = uniform_nodes(2, 3)
        with pytest.raises(ValueError, match=r"NaN at index \[1, 0\]"):
            locate(torch.tensor([[0.1, 0.2], [float("nan"), 0.3]]), nodes)
        with pytest.raises(ValueError, match=r"coords \(4, 3\) and nodes \(2, 3\)"):
            locate(torch.rand(4, 3), nodes)
        with pytest.raises(ValueError, match="int64"):
            locate(torch.zeros(4, 2, dtype=torch.long), nodes)
