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
    coarsen,
    descend,
    grid_mesh,
    interior_facets,
    locate_by_search,
    locate_in_mesh,
    longest_edges,
    removable_nodes,
    shape_quality,
    simplicial_basis,
    simplicial_mesh,
    volumes,
)

# The worked mesh of appendix A; it gives the triangles only, the nodes are any that make them a mesh.
TRIANGLES = torch.tensor([[6, 7, 5], [0, 6, 5], [3, 7, 1], [2, 3, 1], [7, 4, 5], [3, 4, 7], [4, 3, 2]])
NODES = torch.tensor([[-1.5, 2], [1, 0], [0, -1], [0, 0], [-1, 0], [-1, 1], [-0.5, 2], [0, 1]], dtype=torch.float64)
DIMENSIONS = [1, 2, 3, 4]


def refined(d: int, *, n_rounds: int | None = None, seed: int = 0):
    """A grid of which a random sixth of the simplices, nearest to a corner more often, is bisected several times."""
    generator = torch.Generator().manual_seed(seed)
    mesh = grid_mesh(d, 2)
    for _ in range((1 if d == 4 else 4) if n_rounds is None else n_rounds):
        far = mesh.nodes[mesh.simplices].mean(1).norm(dim=1)
        order = (far + torch.rand(len(far), generator=generator, dtype=torch.float64)).argsort()
        mesh = bisect(mesh, mesh.leaves[order[: max(1, len(far) // 6)]])
    return mesh


def uniform(n: int, d: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inside(mesh_nodes, simplices, n: int = 20) -> torch.Tensor:
    """Points inside every simplex: `[n_simplices, n, d]`."""
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(n, simplices.shape[1], generator=generator, dtype=torch.float64)
    return (weights / weights.sum(1, keepdim=True)) @ mesh_nodes[simplices]


class TestAppendixA:
    def test_psi_3_of_the_worked_mesh_lives_on_triangles_2_3_5_and_6(self):
        points = inside(NODES, TRIANGLES)
        psi_3 = simplicial_basis(points.flatten(0, 1), NODES, TRIANGLES)[:, 3].view(len(TRIANGLES), -1)
        assert [j for j in range(len(TRIANGLES)) if (psi_3[j] > 0).all()] == [2, 3, 5, 6]
        assert [j for j in range(len(TRIANGLES)) if (psi_3[j] == 0).all()] == [0, 1, 4]

    @pytest.mark.parametrize("d", DIMENSIONS)
    def test_kronecker_delta_at_the_nodes(self, d):
        mesh = refined(d)
        basis = simplicial_basis(mesh.nodes, mesh.nodes, mesh.simplices)
        # Rounding: coordinates of a node are sums of d products of gradients, up to 1 / smallest height, and offsets.
        torch.testing.assert_close(basis, torch.eye(len(mesh.nodes), dtype=torch.float64), atol=1e-12, rtol=0)

    @pytest.mark.parametrize("d", DIMENSIONS)
    def test_partition_of_unity_and_bounds(self, d):
        mesh = refined(d)
        basis = simplicial_basis(uniform(300, d), mesh.nodes, mesh.simplices)
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

    def test_the_formula_of_the_paper_with_its_average_on_shared_faces(self):
        """psi_i(x) = sum_jk [x in j] M_ijk U_jk(x) / max(sum_jk [x in j] M_ijk, 1), in plain loops."""
        mesh = grid_mesh(2, 2)
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
        np.testing.assert_allclose(simplicial_basis(points, mesh.nodes, mesh.simplices), expected, atol=1e-12)

    @pytest.mark.parametrize("d", [1, 2, 3])
    def test_interpolation_converges_with_the_square_of_the_mesh_size(self, d):
        sizes, errors = [4, 8, 16], []
        points = uniform(4000, d)
        for size in sizes:
            mesh = grid_mesh(d, size)
            cell, weights = locate_in_mesh(points, mesh)
            values = torch.sin(3 * mesh.nodes.sum(1))
            found = (values[mesh.forest.cells[cell]] * weights).sum(1)
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

    @pytest.mark.parametrize(("d", "n_rounds"), [(1, 12), (2, 12), (3, 8), (4, 4)])
    def test_only_the_shapes_of_maubach_arise_and_none_is_a_sliver(self, d, n_rounds):
        """Maubach (1995): d classes. Those of d = 2 look the same, and two of those of d = 4 have the same quality."""
        mesh = refined(d, n_rounds=n_rounds)
        # d! volume / (longest edge)^d, by hand from the simplices of the unit cube and their first d - 1 bisections.
        known = {1: [1], 2: [1 / 2], 3: [1 / 4, 2**-2.5, 3**-1.5], 4: [1 / 8, 1 / 16, 1 / 18]}[d]
        quality = shape_quality(mesh.nodes, mesh.simplices)
        nearest = (quality.unsqueeze(1) - torch.tensor(known, dtype=torch.float64)).abs().amin(1)
        assert nearest.max() < 1e-12

    @pytest.mark.parametrize("d", [2, 3])
    def test_given_meshes_are_refined_at_their_longest_edges_without_losing_shape(self, d):
        """A Delaunay mesh of random points: Rivara's bisection bounds the smallest angle of triangles by half."""
        spatial = pytest.importorskip("scipy.spatial")
        points = uniform(30, d)
        simplices = torch.from_numpy(spatial.Delaunay(points.numpy()).simplices).long()
        simplices = simplices[shape_quality(points, simplices) > 1e-3] if d == 2 else simplices
        mesh = simplicial_mesh(points, simplices)
        before, volume = shape_quality(mesh.nodes, mesh.simplices).min(), volumes(mesh.nodes, mesh.simplices).sum()
        for _ in range(5):
            mesh = bisect(mesh, mesh.leaves[::4])
        interior_facets(mesh.nodes, mesh.simplices)  # raises where more than two simplices share a facet
        assert volumes(mesh.nodes, mesh.simplices).sum() == pytest.approx(volume.item(), rel=1e-12)
        assert shape_quality(mesh.nodes, mesh.simplices).min() > before / 4

    @pytest.mark.parametrize("d", DIMENSIONS)
    def test_marked_simplices_are_bisected_at_their_longest_edge_and_the_old_mesh_is_left_alone(self, d):
        mesh = refined(d, n_rounds=1 if d == 4 else 2)
        before = (mesh.nodes.clone(), mesh.leaves.clone(), mesh.forest.first_child.clone())
        marked = mesh.leaves[::5]
        finer = bisect(mesh, marked)
        assert (finer.forest.first_child[marked] >= 0).all()
        split = finer.forest.split[marked]
        corners = mesh.nodes[mesh.forest.cells[marked]]
        length = (
            corners.gather(1, split[:, :1, None].expand(-1, 1, d))
            - corners.gather(1, split[:, 1:, None].expand(-1, 1, d))
        ).norm(dim=2)
        torch.testing.assert_close(length.squeeze(1), torch.cdist(corners, corners).amax((1, 2)))
        assert torch.equal(split, longest_edges(mesh.nodes, mesh.levels, mesh.forest.cells[marked]))
        for now, was in zip((mesh.nodes, mesh.leaves, mesh.forest.first_child), before, strict=True):
            assert torch.equal(now, was)

    @pytest.mark.parametrize("d", DIMENSIONS)
    def test_functions_of_the_old_mesh_are_functions_of_the_new_one(self, d):
        mesh = refined(d, n_rounds=1 if d == 4 else 2)
        values = uniform(len(mesh.nodes), 1)[:, 0]
        finer = bisect(mesh, mesh.leaves[::3])
        fine_values = values.new_zeros(len(finer.nodes))
        cell, weights = locate_in_mesh(finer.nodes, mesh)
        fine_values = (values[mesh.forest.cells[cell]] * weights).sum(1)
        points = uniform(500, d, seed=3)
        cell, weights = locate_in_mesh(points, mesh)
        old = (values[mesh.forest.cells[cell]] * weights).sum(1)
        cell, weights = locate_in_mesh(points, finer)
        torch.testing.assert_close((fine_values[finer.forest.cells[cell]] * weights).sum(1), old, atol=1e-12, rtol=0)

    @pytest.mark.parametrize("d", DIMENSIONS)
    def test_coarsening_undoes_bisection(self, d):
        mesh = refined(d, n_rounds=1 if d == 4 else 3)
        for _ in range(200):
            removable = removable_nodes(mesh)
            if len(removable) == 0:
                break
            assert torch.equal(mesh.nodes[removable[:, 0]], mesh.nodes[removable[:, 1:]].mean(1))
            old = mesh
            mesh, kept = coarsen(mesh, removable[::2, 0])
            assert torch.equal(mesh.nodes, old.nodes[kept])
            assert volumes(mesh.nodes, mesh.simplices).sum().item() == pytest.approx(1, abs=1e-12)
            interior_facets(mesh.nodes, mesh.simplices)
        grid = grid_mesh(d, 2)
        assert torch.equal(mesh.nodes, grid.nodes) and torch.equal(mesh.simplices, grid.simplices)

    def test_a_coarsened_mesh_can_be_refined_again(self):
        mesh = refined(2)
        coarser, _ = coarsen(mesh, removable_nodes(mesh)[::2, 0])
        finer = bisect(coarser, coarser.leaves[::3])
        points = uniform(200, 2)
        cell, weights = locate_in_mesh(points, finer)
        rebuilt = (finer.nodes[finer.forest.cells[cell]] * weights.unsqueeze(2)).sum(1)
        torch.testing.assert_close(rebuilt, points, atol=1e-13, rtol=0)
        assert (finer.forest.first_child[cell] < 0).all() and weights.min() >= 0

    def test_a_node_that_others_were_built_on_is_not_removed(self):
        with pytest.raises(ValueError, match="node 0 is not the newest"):
            coarsen(refined(2), torch.tensor([0]))

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
    def test_walking_down_the_forest_finds_what_a_search_finds(self, d):
        mesh = refined(d)
        points = uniform(400, d)
        cell, weights = locate_in_mesh(points, mesh)
        dense = weights.new_zeros(400, len(mesh.nodes)).scatter_(1, mesh.forest.cells[cell], weights)
        torch.testing.assert_close(dense, simplicial_basis(points, mesh.nodes, mesh.simplices), atol=1e-11, rtol=0)

    @pytest.mark.parametrize("d", DIMENSIONS)
    def test_samples_kept_in_old_cells_walk_on_to_the_new_ones(self, d):
        mesh = grid_mesh(d, 1)
        points = uniform(200, d)
        cell, weights = locate_in_mesh(points, mesh)
        for _ in range(4):
            mesh = bisect(mesh, mesh.leaves[::2])
            cell, weights = descend(mesh.forest, cell, weights)
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
        rebuilt = (mesh.nodes[mesh.forest.cells[cell]] * weights.unsqueeze(2)).sum(1)
        torch.testing.assert_close(rebuilt, points, atol=1e-12, rtol=0)
        torch.testing.assert_close(weights.sum(1), torch.ones(300, dtype=torch.float64), atol=1e-12, rtol=0)

    def test_a_mesh_of_given_simplices_is_located_and_refined_as_a_grid_is(self):
        mesh = bisect(simplicial_mesh(NODES, TRIANGLES), torch.arange(len(TRIANGLES)))
        points = inside(NODES, TRIANGLES, n=30).flatten(0, 1)
        cell, weights = locate_in_mesh(points, mesh)
        rebuilt = (mesh.nodes[mesh.forest.cells[cell]] * weights.unsqueeze(2)).sum(1)
        torch.testing.assert_close(rebuilt, points, atol=1e-13, rtol=0)
        assert weights.min() > -1e-13 and (mesh.forest.first_child[cell] < 0).all()

    def test_single_precision_points_are_located_in_double(self):
        _, weights = locate_in_mesh(uniform(50, 2).float() * 2 - 0.5, refined(2))
        assert weights.dtype == torch.float64
        assert locate_by_search(uniform(5, 2).float(), NODES.float(), TRIANGLES)[1].dtype == torch.float64


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


class TestBadInput:
    def test_collinear_points_make_no_triangle(self):
        nodes = torch.tensor([[0.0, 0], [1, 1], [2, 2]])
        with pytest.raises(ValueError, match="simplex 0 lie in one hyperplane"):
            simplicial_mesh(nodes, torch.tensor([[0, 1, 2]]))

    def test_duplicated_points_make_no_triangle(self):
        nodes = torch.tensor([[0.0, 0], [1, 1], [0, 0]])
        with pytest.raises(ValueError, match="have a volume"):
            locate_by_search(uniform(1, 2), nodes, torch.tensor([[0, 1, 2]]))

    @pytest.mark.parametrize(
        ("nodes", "simplices", "message"),
        [
            (torch.rand(4, 2), torch.tensor([[0, 1, 2, 3]]), r"\(4, 2\) and \(1, 4\)"),
            (torch.rand(4, 2), torch.tensor([[0, 1, 4]]), "indices of the 4 nodes"),
            (torch.rand(4, 2), torch.tensor([[0, -1, 2]]), "indices of the 4 nodes"),
            (torch.rand(4, 2), torch.tensor([[0.0, 1, 2]]), "float32"),
            (torch.full((4, 2), torch.nan), torch.tensor([[0, 1, 2]]), "must be finite"),
            (torch.rand(4, 2), torch.empty(0, 3, dtype=torch.long), "n_simplices >= 1"),
        ],
    )
    def test_simplices_that_do_not_fit(self, nodes, simplices, message):
        with pytest.raises(ValueError, match=message):
            simplicial_mesh(nodes, simplices)

    def test_points_of_another_dimension(self):
        with pytest.raises(ValueError, match=r"\[n_points, 2\].*\(5, 3\)"):
            locate_by_search(uniform(5, 3), NODES, TRIANGLES)

    @pytest.mark.parametrize(("d", "n_cells"), [(0, 1), (2, 0)])
    def test_empty_grids(self, d, n_cells):
        with pytest.raises(ValueError, match=f"got d={d}, n_cells={n_cells}"):
            grid_mesh(d, n_cells)
