"""Simplicial meshes in R^d: the basis P1(R^d), location of points, facets and bisection.

The basis is that of Li, Cheng & Gu (2025), appendix A: psi_i is 1 at node i, 0 at every other node, and linear on each
simplex, where its values are the barycentric coordinates.

Meshes begin as a grid and are refined by bisection of longest edges (Rivara 1984), which keeps them conforming and
nested: every simplex that a mesh has had is kept, in binary trees, so that points are located by walking down from a
root.
On the Freudenthal grid of `grid_mesh` and up to d = 3 that is Maubach's bisection (1995, SIAM J. Sci. Comput. 16(1)):
only d shapes of simplices ever arise, whatever is refined, and none is a sliver.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Lengths that differ by less than this factor are taken as equal; then the edge of the older nodes is the longest.
_TIE = 1 - 1e-9


@dataclass(frozen=True)
class SimplicialMesh:
    """A conforming mesh of simplices, and all that it has been: a forest of binary trees whose leaves are the mesh.

    A simplex bisected at the midpoint m of its vertices at positions (i, j) has the children `first_child`, where m
    stands in place of j, and `first_child + 1`, where it stands in place of i.

    Attributes:
        nodes: `[n_nodes, d]`, fp64.
        cells: `[n_cells, d + 1]`, node indices of all simplices, those of the grid first.
        first_child: `[n_cells]`, -1 for leaves.
        split: `[n_cells, 2]`, the positions (i, j); -1 for leaves.
        grid: cells per axis at first.
    """

    nodes: Tensor
    cells: Tensor
    first_child: Tensor
    split: Tensor
    grid: int

    @property
    def leaves(self) -> Tensor:
        """`[n_simplices]`, which cells are simplices of the mesh."""
        return (self.first_child < 0).nonzero().squeeze(1)

    @property
    def simplices(self) -> Tensor:
        """`[n_simplices, d + 1]`, node indices."""
        return self.cells[self.leaves]


@dataclass(frozen=True)
class Facets:
    """The faces of dimension d - 1 between two simplices of a mesh, and the jump of the gradient across each.

    The jump of a function with nodal values c across facet f is `(coefficients[f] * c[nodes[f]]).sum()`: only the
    component normal to the facet can jump.

    Attributes:
        nodes: `[n_facets, d + 2]`: the vertices of one of its simplices, then the opposite vertex of the other.
        coefficients: `[n_facets, d + 2]`.
        areas: `[n_facets]`, measure of dimension d - 1 (1 for d = 1).
        widths: `[n_facets]`, distance across: the sum of the heights of the two simplices over the facet.
    """

    nodes: Tensor
    coefficients: Tensor
    areas: Tensor
    widths: Tensor


def grid_mesh(d: int, n_cells: int) -> SimplicialMesh:
    """The Freudenthal (Kuhn) triangulation of [0, 1]^d: `n_cells` cubes per axis, d! simplices each."""
    axis = torch.arange(n_cells + 1, dtype=torch.float64) / n_cells
    nodes = torch.cartesian_prod(*[axis] * d).reshape(-1, d)
    strides = torch.tensor([(n_cells + 1) ** (d - 1 - k) for k in range(d)])
    corner = torch.cartesian_prod(*[torch.arange(n_cells)] * d).reshape(-1, d) @ strides  # [cubes]
    paths = torch.tensor(list(itertools.permutations(range(d))))  # [d!, d]
    steps = torch.cat((paths.new_zeros(len(paths), 1), strides[paths].cumsum(1)), dim=1)  # [d!, d + 1]
    cells = (corner.view(-1, 1, 1) + steps).flatten(0, 1)
    none = torch.full((len(cells),), -1)
    return SimplicialMesh(nodes, cells, none, none[:, None].repeat(1, 2), n_cells)


def barycentric_gradients(nodes: Tensor, simplices: Tensor) -> Tensor:
    """Gradients of the d + 1 barycentric coordinates of every simplex: `[n_simplices, d + 1, d]`."""
    corners = nodes[simplices]  # [n, d + 1, d]
    inverse = torch.linalg.inv(corners[:, 1:] - corners[:, :1])  # [n, d, d]; its columns are the gradients of 1..d
    rest = inverse.transpose(1, 2)
    return torch.cat((-rest.sum(1, keepdim=True), rest), dim=1)


def volumes(nodes: Tensor, simplices: Tensor) -> Tensor:
    """`[n_simplices]`, the d-dimensional measure."""
    corners = nodes[simplices]
    edges = corners[:, 1:] - corners[:, :1]
    return torch.linalg.det(edges).abs() / math.factorial(edges.shape[-1])


def locate_in_mesh(points: Tensor, mesh: SimplicialMesh) -> tuple[Tensor, Tensor]:
    """For every point the cell that is its leaf, and its barycentric coordinates there.

    A point outside of the cube gets the leaf of the nearest point of it, and weights that continue that simplex
    linearly (some are negative). The nodes that the weights belong to are `mesh.cells[cell]`.

    Args:
        points: `[n_points, d]`, finite.
        mesh: the cost is O(n_points depth).

    Returns:
        `cell` `[n_points]` and `weights` `[n_points, d + 1]`, which sum to one.
    """
    inside = points.double().clamp(0, 1)
    cell, weights = descend(mesh, *_locate_in_grid(inside, mesh.grid))
    beyond = (points != inside).any(1).nonzero().squeeze(1)
    if len(beyond):
        gradients = barycentric_gradients(mesh.nodes, mesh.cells[cell[beyond]])  # [b, d + 1, d]
        weights[beyond] += (gradients @ (points[beyond] - inside[beyond]).unsqueeze(2)).squeeze(2)
    return cell, weights


def _locate_in_grid(points: Tensor, n_cells: int) -> tuple[Tensor, Tensor]:
    """Root and barycentric coordinates of points in [0, 1]^d: inside a cube the simplex is the order of coordinates."""
    d = points.shape[1]
    scaled = points * n_cells
    cube = scaled.floor().clamp_max(n_cells - 1)
    local, order = (scaled - cube).sort(dim=1, descending=True, stable=True)
    one, zero = local.new_ones(len(local), 1), local.new_zeros(len(local), 1)
    weights = torch.cat((one, local), dim=1) - torch.cat((local, zero), dim=1)
    base = torch.tensor([d**k for k in range(d)])
    paths = torch.tensor(list(itertools.permutations(range(d))))
    rank = torch.zeros(d**d, dtype=torch.long)
    rank[paths @ base] = torch.arange(len(paths))
    strides = torch.tensor([n_cells ** (d - 1 - k) for k in range(d)])
    return (cube.long() @ strides) * len(paths) + rank[order @ base], weights


def descend(mesh: SimplicialMesh, cell: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Walk from cells down to leaves: new `cell` `[n]` and the barycentric coordinates `[n, d + 1]` there."""
    cell, weights = cell.clone(), weights.clone()
    moving = (mesh.first_child[cell] >= 0).nonzero().squeeze(1)
    while len(moving):
        at, inner = cell[moving], weights[moving]
        i, j = mesh.split[at].split(1, dim=1)  # [m, 1] each
        a, b = inner.gather(1, i), inner.gather(1, j)
        second = b > a
        inner.scatter_(1, i, torch.where(second, 2 * a, a - b))
        inner.scatter_(1, j, torch.where(second, b - a, 2 * b))
        at = mesh.first_child[at] + second.squeeze(1)
        cell[moving], weights[moving] = at, inner
        moving = moving[mesh.first_child[at] >= 0]
    return cell, weights


def longest_edges(nodes: Tensor, simplices: Tensor) -> Tensor:
    """Positions of the two ends of each simplex's longest edge: `[n_simplices, 2]`.

    Among edges of the same length it is the one of the oldest nodes: the same for every simplex that has both.
    """
    i, j = _edge_positions(simplices.shape[1])
    squared = _squared_lengths(nodes, simplices)
    longest = squared >= squared.amax(1, keepdim=True) * _TIE
    keys, last = _edge_keys(simplices, i, j), torch.iinfo(torch.long).max
    return torch.stack((i, j), dim=1)[keys.masked_fill(~longest, last).argmin(1)]


def bisect(mesh: SimplicialMesh, marked: Tensor) -> SimplicialMesh:
    """Bisect simplices at their longest edges, and as many more as a conforming mesh needs.

    Nodes and cells that are there keep their indices; new ones follow. The old mesh's functions are functions on the
    new one: a new node's value is the mean of those at the ends of its edge.

    Args:
        mesh: the mesh; not changed.
        marked: `[n_marked]`, cells that are leaves.
    """
    nodes, cells = mesh.nodes, mesh.cells
    first_child, split = mesh.first_child.clone(), mesh.split.clone()
    keys, middles = cells.new_zeros(0), cells.new_zeros(0)  # edges bisected in this call, sorted, and their midpoints
    pending = marked.unique()
    leaves = mesh.leaves
    positions = _edge_positions(cells.shape[1])
    while len(pending):
        corners = cells[pending]  # [p, d + 1]
        ends = longest_edges(nodes, corners)  # [p, 2]
        edge, which = _edge_keys(corners, *ends.split(1, dim=1)).squeeze(1).unique(return_inverse=True)
        known = torch.isin(edge, keys)
        made = edge[~known]
        nodes = torch.cat((nodes, (nodes[made >> 32] + nodes[made & 0xFFFFFFFF]) / 2))
        keys, order = torch.cat((keys, made)).sort()
        middles = torch.cat((middles, torch.arange(len(nodes) - len(made), len(nodes))))[order]
        middle = middles[torch.searchsorted(keys, edge)][which].unsqueeze(1)  # [p, 1]

        children = torch.stack(
            (corners.scatter(1, ends[:, 1:], middle), corners.scatter(1, ends[:, :1], middle)), dim=1
        )
        split[pending] = ends
        first_child[pending] = len(cells) + 2 * torch.arange(len(pending))
        born = torch.arange(len(cells), len(cells) + 2 * len(pending))
        cells = torch.cat((cells, children.flatten(0, 1)))
        none = torch.full((len(born),), -1)
        first_child = torch.cat((first_child, none))
        split = torch.cat((split, none.view(-1, 1).repeat(1, 2)))

        leaves = torch.cat((leaves[first_child[leaves] < 0], born))
        at_end = torch.zeros(len(nodes), dtype=torch.bool)
        at_end[keys >> 32] = True
        at_end[keys & 0xFFFFFFFF] = True
        near = leaves[at_end[cells[leaves]].sum(1) >= 2]
        hanging = torch.isin(_edge_keys(cells[near], *positions), keys).any(1)
        pending = near[hanging]
    return SimplicialMesh(nodes, cells, first_child, split, mesh.grid)


def interior_facets(nodes: Tensor, simplices: Tensor) -> Facets:
    """The facets between two simplices, with the functional that gives the jump of the gradient across each.

    Raises:
        ValueError: if more than two simplices share a facet: then they are no mesh.
    """
    vertices = simplices.shape[1]
    d = vertices - 1
    ordered, position = simplices.sort(dim=1)
    faces = torch.stack([ordered[:, [k for k in range(vertices) if k != out]] for out in range(vertices)], dim=1)
    _, label = _unique_rows(faces.flatten(0, 1), len(nodes))  # [n (d + 1)]
    label, order = label.sort(stable=True)
    same = label[1:] == label[:-1]
    if (same[1:] & same[:-1]).any():
        raise ValueError("simplices must form a mesh: a facet is shared by more than two of them.")
    first, second = order[:-1][same], order[1:][same]
    here, there = first // vertices, second // vertices
    near = position[here, first % vertices]  # position of the vertex opposite to the facet
    far = position[there, second % vertices]

    gradients = barycentric_gradients(nodes, simplices)
    height = 1 / gradients.norm(dim=2)  # [n, d + 1]
    apex = simplices[there, far]
    inside = (gradients[here] @ (nodes[apex] - nodes[simplices[here, 0]]).unsqueeze(2)).squeeze(2)
    inside[:, 0] += 1  # barycentric coordinates of the apex in the simplex on this side
    rise = height[there, far]
    # Continued across the facet, this side's function misses the value at the other side's apex by rise * jump.
    coefficients = torch.cat((-inside, torch.ones_like(rise).unsqueeze(1)), dim=1) / rise.unsqueeze(1)
    areas = volumes(nodes, simplices)[there] * d / rise
    facets = torch.cat((simplices[here], apex.unsqueeze(1)), dim=1)
    return Facets(facets, coefficients, areas, rise + height[here, near])


def _unique_rows(rows: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """Distinct rows of integers below `bound`, and which each row is; through one number per row where that fits."""
    width = rows.shape[1]
    if width * math.log2(max(bound, 2)) < 62:
        base = torch.tensor([bound**k for k in range(width)])
        return (rows @ base).unique(return_inverse=True)
    return rows.unique(dim=0, return_inverse=True)


def _edge_positions(vertices: int) -> tuple[Tensor, Tensor]:
    i, j = torch.triu_indices(vertices, vertices, offset=1)
    return i, j


def _squared_lengths(nodes: Tensor, simplices: Tensor) -> Tensor:
    """`[n_simplices, n_edges]`."""
    i, j = _edge_positions(simplices.shape[1])
    corners = nodes[simplices]
    return (corners[:, i] - corners[:, j]).square().sum(2)


def _edge_keys(simplices: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """One number per edge: the larger node index in the high half, so that edges of older nodes come first.

    `i` and `j` are positions, the same for all simplices `[n_edges]` or one pair for each `[n_simplices, 1]`.
    """
    if i.ndim == 1:
        a, b = simplices[:, i], simplices[:, j]
    else:
        a, b = simplices.gather(1, i), simplices.gather(1, j)
    return (torch.maximum(a, b) << 32) | torch.minimum(a, b)
