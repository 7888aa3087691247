"""P1(R^d) after appendix A of Li, Cheng & Gu (2025), bisection, location and facets."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lreg_peft.regression.simplices import (
    barycentric_gradients,
    bisect,
    descend,
    grid_mesh,
    interior_facets,
    locate_in_mesh,
    longest_edges,
    volumes,
)

DIMENSIONS = [1, 2, 3]


def refined(d: int, *, n_rounds: int | None = None, seed: int = 0):
    """A grid of which a random sixth of the simplices, nearest to a corner more often, is bisected several times."""
    generator = torch.Generator().manual_seed(seed)
    mesh = grid_mesh(d, 2)
    for _ in range(4 if n_rounds is None else n_rounds):
        far = mesh.nodes[mesh.simplices].mean(1).norm(dim=1)
        order = (far + torch.rand(len(far), generator=generator, dtype=torch.float64)).argsort()
        mesh = bisect(mesh, mesh.leaves[order[: max(1, len(far) // 6)]])
    return mesh


def uniform(n: int, d: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hats(points, mesh) -> torch.Tensor:
    """All basis functions at all points, `[n_points, n_nodes]`."""
    cell, weights = locate_in_mesh(points, mesh)
    return weights.new_zeros(len(points), len(mesh.nodes)).scatter_(1, mesh.cells[cell], weights)


def shape_quality(mesh) -> torch.Tensor:
    """Volume times d! over the longest edge to the power of d, `[n_simplices]`."""
    corners = mesh.nodes[mesh.simplices]
    d = corners.shape[2]
    longest = torch.cdist(corners, corners).amax((1, 2))
    return volumes(mesh.nodes, mesh.simplices) * math.factorial(d) / longest**d


class TestAppendixA:
    @pytest.mark.parametrize("d", DIMENSIONS)
    def test_kronecker_delta_at_the_nodes(self, d):
        mesh = refined(d)
        torch.testing.assert_close(
            hats(mesh.nodes, mesh), torch.eye(len(mesh.nodes), dtype=torch.float64), atol=1e-12, rtol=0
        )

    @pytest.mark.parametrize("d", DIMENSIONS)
    def test_partition_of_unity_and_bounds(self, d):
        basis = hats(uniform(300, d), refined(d))
        assert basis.min() >= -1e-12 and basis.max() <= 1 + 1e-12
        torch.testing.assert_close(basis.sum(1), torch.ones(300, dtype=torch.float64), atol=1e-12, rtol=0)
        assert ((basis.abs() > 1e-12).sum(1) <= d + 1).all()

    @pytest.mark.parametrize("d", DIMENSIONS)
    def test_unisolvence_nodal_values_determine_the_linear_function_on_a_simplex(self, d):
        """The matrix [vertex, 1] of every simplex is regular, and its inverse holds the barycentric coordinates."""
        mesh = refined(d)
        corners = mesh.nodes[mesh.simplices]
        matrix = torch.cat((corners, torch.ones_like(corners[..., :1])), dim=2)
        assert (torch.linalg.det(matrix).abs() > 0).all()
        gradients = torch.linalg.inv(matrix)[:, :d].transpose(1, 2)
        torch.testing.assert_close(barycentric_gradients(mesh.nodes, mesh.simplices), gradients, atol=1e-10, rtol=1e-10)

    @pytest.mark.parametrize("refine", [False, True])
    def test_the_formula_of_the_paper_with_its_average_on_shared_faces(self, refine):
        """psi_i(x) = sum_jk [x in j] M_ijk U_jk(x) / max(sum_jk [x in j] M_ijk, 1), in plain loops."""
        mesh = refined(2, n_rounds=2) if refine else grid_mesh(2, 2)
        points = torch.cat(
            (uniform(40, 2), mesh.nodes, mesh.nodes[mesh.simplices].mean(1), (mesh.nodes[:-1] + mesh.nodes[1:]) / 2)
        )
        nodes, simplices = mesh.nodes.numpy(), mesh.simplices.numpy()
        expected = np.zeros((len(points), len(nodes)))
        for s, x in enumerate(points.numpy()):
            count = np.zeros(len(nodes))
            for vertices in simplices:
                weights = np.append(x, 1) @ np.linalg.inv(np.column_stack((nodes[vertices], np.ones(3))))
                if (weights >= -1e-12).all():
                    expected[s, vertices] += weights
                    count[vertices] += 1
            expected[s] /= np.maximum(count, 1)
        np.testing.assert_allclose(hats(points, mesh), expected, atol=1e-11)

    @pytest.mark.parametrize("d", [1, 2, 3])
    def test_interpolation_converges_with_the_square_of_the_mesh_size(self, d):
        sizes, errors = [4, 8, 16], []
        points = uniform(4000, d)
        for size in sizes:
            mesh = grid_mesh(d, size)
            found = hats(points, mesh) @ torch.sin(3 * mesh.nodes.sum(1))
            errors.append((found - torch.sin(3 * points.sum(1))).square().mean().sqrt().item())
        slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
        assert -2.15 < slope < -1.85


class TestBisection:
    @pytest.mark.parametrize("d", DIMENSIONS)
    def test_it_stays_a_conforming_mesh_of_the_cube(self, d):
        """Every facet is shared by two simplices or lies on the boundary, and the volume is that of the cube."""
        mesh = refined(d)
        simplices = mesh.simplices
        assert volumes(mesh.nodes, simplices).sum().item() == pytest.approx(1, abs=1e-12)
        faces: dict[tuple[int, ...], int] = {}
        for vertices in simplices.tolist():
            for out in vertices:
                face = tuple(sorted(v for v in vertices if v != out))
                faces[face] = faces.get(face, 0) + 1
        for face, count in faces.items():
            corners = mesh.nodes[list(face)]
            boundary = ((corners == 0).all(0) | (corners == 1).all(0)).any().item()
            assert count == (1 if boundary else 2)
        assert sorted(set(simplices.flatten().tolist())) == list(range(len(mesh.nodes)))
        assert len(mesh.nodes.unique(dim=0)) == len(mesh.nodes)

    @pytest.mark.parametrize(("d", "n_rounds"), [(1, 12), (2, 12), (3, 8)])
    def test_only_the_shapes_of_maubach_arise_and_none_is_a_sliver(self, d, n_rounds):
        """Maubach (1995): d classes. Those of d = 2 look the same."""
        mesh = refined(d, n_rounds=n_rounds)
        # d! volume / (longest edge)^d, by hand from the simplices of the unit cube and their first d - 1 bisections.
        known = {1: [1], 2: [1 / 2], 3: [1 / 4, 2**-2.5, 3**-1.5]}[d]
        quality = shape_quality(mesh)
        nearest = (quality.unsqueeze(1) - torch.tensor(known, dtype=torch.float64)).abs().amin(1)
        assert nearest.max() < 1e-12

    @pytest.mark.parametrize("d", DIMENSIONS)
    def test_marked_simplices_are_bisected_at_their_longest_edge_and_the_old_mesh_is_left_alone(self, d):
        mesh = refined(d, n_rounds=2)
        before = (mesh.nodes.clone(), mesh.leaves.clone(), mesh.first_child.clone())
        marked = mesh.leaves[::5]
        finer = bisect(mesh, marked)
        assert (finer.first_child[marked] >= 0).all()
        split = finer.split[marked]
        corners = mesh.nodes[mesh.cells[marked]]
        length = (
            corners.gather(1, split[:, :1, None].expand(-1, 1, d))
            - corners.gather(1, split[:, 1:, None].expand(-1, 1, d))
        ).norm(dim=2)
        torch.testing.assert_close(length.squeeze(1), torch.cdist(corners, corners).amax((1, 2)))
        assert torch.equal(split, longest_edges(mesh.nodes, mesh.cells[marked]))
        for now, was in zip((mesh.nodes, mesh.leaves, mesh.first_child), before, strict=True):
            assert torch.equal(now, was)

    @pytest.mark.parametrize("d", DIMENSIONS)
    def test_functions_of_the_old_mesh_are_functions_of_the_new_one(self, d):
        mesh = refined(d, n_rounds=2)
        values = uniform(len(mesh.nodes), 1)[:, 0]
        finer = bisect(mesh, mesh.leaves[::3])
        points = uniform(500, d, seed=3)
        fine_values = hats(finer.nodes, mesh) @ values
        torch.testing.assert_close(hats(points, finer) @ fine_values, hats(points, mesh) @ values, atol=1e-12, rtol=0)

    @settings(max_examples=25, deadline=None)
    @given(d=st.integers(1, 3), seed=st.integers(0, 10_000), share=st.floats(0.02, 0.9))
    def test_any_marking_leaves_a_conforming_mesh(self, d, seed, share):
        generator = torch.Generator().manual_seed(seed)
        mesh = grid_mesh(d, 1)
        for _ in range(4):
            mesh = bisect(mesh, mesh.leaves[torch.rand(len(mesh.leaves), generator=generator) < share])
        simplices = mesh.simplices
        assert volumes(mesh.nodes, simplices).sum().item() == pytest.approx(1, abs=1e-12)
        # Hanging nodes would lie on edges of simplices that do not have them as vertices.
        i, j = torch.triu_indices(d + 1, d + 1, offset=1)
        middle = (mesh.nodes[simplices[:, i]] + mesh.nodes[simplices[:, j]]) / 2
        assert (torch.cdist(middle.flatten(0, 1), mesh.nodes).amin(1) > 0).all()


class TestLocation:
    @pytest.mark.parametrize("d", DIMENSIONS)
    def test_samples_kept_in_old_cells_walk_on_to_the_new_ones(self, d):
        mesh = grid_mesh(d, 1)
        points = uniform(200, d)
        cell, weights = locate_in_mesh(points, mesh)
        for _ in range(4):
            mesh = bisect(mesh, mesh.leaves[::2])
            cell, weights = descend(mesh, cell, weights)
        fresh_cell, fresh = locate_in_mesh(points, mesh)
        assert torch.equal(cell, fresh_cell)
        torch.testing.assert_close(weights, fresh, atol=1e-13, rtol=0)

    @pytest.mark.parametrize("d", DIMENSIONS)
    def test_outside_the_nearest_simplex_goes_on_linearly(self, d):
        mesh = refined(d)
        points = 3 * uniform(300, d) - 1
        cell, weights = locate_in_mesh(points, mesh)
        near, _ = locate_in_mesh(points.clamp(0, 1), mesh)
        assert torch.equal(cell, near)
        rebuilt = (mesh.nodes[mesh.cells[cell]] * weights.unsqueeze(2)).sum(1)
        torch.testing.assert_close(rebuilt, points, atol=1e-12, rtol=0)
        torch.testing.assert_close(weights.sum(1), torch.ones(300, dtype=torch.float64), atol=1e-12, rtol=0)


class TestFacets:
    @pytest.mark.parametrize("d", DIMENSIONS)
    def test_linear_functions_do_not_jump_and_others_jump_by_the_difference_of_their_gradients(self, d):
        mesh = refined(d)
        simplices = mesh.simplices
        facets = interior_facets(mesh.nodes, simplices)
        linear = mesh.nodes @ torch.arange(1.0, d + 1, dtype=torch.float64) + 2
        jumps = (facets.coefficients * linear[facets.nodes]).sum(1)
        torch.testing.assert_close(jumps, torch.zeros_like(jumps), atol=1e-10, rtol=0)

        values = uniform(len(mesh.nodes), 1)[:, 0]
        jumps = (facets.coefficients * values[facets.nodes]).sum(1)
        slope = (barycentric_gradients(mesh.nodes, simplices) * values[simplices].unsqueeze(2)).sum(1)
        owner = {tuple(sorted(vertices)): k for k, vertices in enumerate(simplices.tolist())}
        for vertices, jump in list(zip(facets.nodes.tolist(), jumps.tolist(), strict=True))[::7]:
            here, apex = vertices[:-1], vertices[-1]
            there = next(
                owner[key] for out in here if (key := tuple(sorted({*vertices} - {out}))) in owner and apex in key
            )
            expected = (slope[there] - slope[owner[tuple(sorted(here))]]).norm().item()
            assert abs(jump) == pytest.approx(expected, rel=1e-9, abs=1e-9)

    def test_areas_widths_and_number(self):
        """Two triangles of a square: one facet, the diagonal; heights are half of the other diagonal."""
        facets = interior_facets(grid_mesh(2, 1).nodes, grid_mesh(2, 1).simplices)
        assert facets.areas.tolist() == pytest.approx([math.sqrt(2)])
        assert facets.widths.tolist() == pytest.approx([math.sqrt(2)])
        line = interior_facets(grid_mesh(1, 4).nodes, grid_mesh(1, 4).simplices)
        assert line.areas.tolist() == pytest.approx([1] * 3) and line.widths.tolist() == pytest.approx([0.5] * 3)
        # Of a conforming mesh: (d + 1) simplices = 2 interior + boundary facets; Euler's formula for triangles.
        mesh = refined(2)
        n_edges = len(mesh.nodes) + len(mesh.simplices) - 1
        facets = interior_facets(mesh.nodes, mesh.simplices)
        assert 3 * len(mesh.simplices) == 2 * len(facets.nodes) + (n_edges - len(facets.nodes))

    def test_what_is_no_mesh_is_refused(self):
        three = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 1, 4]])
        with pytest.raises(ValueError, match="shared by more than two"):
            interior_facets(uniform(5, 2), three)
