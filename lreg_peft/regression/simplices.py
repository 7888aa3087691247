"""Simplicial meshes in R^d: the basis P1(R^d), location of points, facets, bisection and its reversal.

The basis is that of Li, Cheng & Gu (2025), appendix A: psi_i is 1 at node i, 0 at every other node, and linear on each
simplex, where its values are the barycentric coordinates.

Meshes are refined by bisection of longest edges (Rivara 1984), which keeps a mesh conforming and nested: what a mesh
was is kept as a binary forest, so that points are located by walking down from a root, and bisections can be undone.
On the Freudenthal grid of `grid_mesh` and up to d = 4 that is Maubach's bisection (1995, SIAM J. Sci. Comput. 16(1)):
only d shapes of simplices ever arise, whatever is refined, and none is a sliver.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Lengths that differ by less than this factor are taken as equal; then the edge of the older nodes is the longest.
_TIE = 1 - 1e-9

_CHUNK = 1 << 22  # numbers held at once where every point meets every simplex


@dataclass(frozen=True)
class Forest:
    """Every simplex that a mesh has had, as binary trees. The leaves are the mesh.

    A simplex bisected at the midpoint m of its vertices at positions (i, j) has the children `first_child`, where m
    stands in place of j, and `first_child + 1`, where it stands in place of i.

    Attributes:
        cells: `[n_cells, d + 1]`, node indices.
        first_child: `[n_cells]`, -1 for leaves.
        split: `[n_cells, 2]`, the positions (i, j); -1 for leaves.
        newest: `[n_cells]`, the node that the bisection of the parent made; -1 for roots.
        n_roots: the roots come first.
        grid: cells per axis if the roots are a `grid_mesh`, else None.
    """

    cells: Tensor
    first_child: Tensor
    split: Tensor
    newest: Tensor
    n_roots: int
    grid: int | None


@dataclass(frozen=True)
class SimplicialMesh:
    """A conforming mesh of simplices.

    Attributes:
        nodes: `[n_nodes, d]`, fp64.
        levels: `[n_nodes]`, the most bisections that a simplex has been through when the node was made; 0 at first.
        forest: the simplices with their history.
        leaves: `[n_simplices]`, which cells of the forest are simplices of the mesh.
    """

    nodes: Tensor
    levels: Tensor
    forest: Forest
    leaves: Tensor

    @property
    def simplices(self) -> Tensor:
        """`[n_simplices, d + 1]`, node indices."""
        return self.forest.cells[self.leaves]


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


def simplicial_mesh(nodes: Tensor, simplices: Tensor) -> SimplicialMesh:
    """A mesh of given simplices, to be refined.

    Args:
        nodes: `[n_nodes, d]`, finite.
        simplices: `[n_simplices, d + 1]`, indices of nodes; conforming (two simplices share a whole face or nothing),
            which is not checked.

    Raises:
        ValueError: for shapes or indices that do not fit, non-finite nodes, or simplices without volume.
    """
    _check_simplices(nodes, simplices)
    cells = simplices.long()
    return _planted(nodes.double(), cells, grid=None)


def grid_mesh(d: int, n_cells: int) -> SimplicialMesh:
    """The Freudenthal (Kuhn) triangulation of [0, 1]^d: `n_cells` cubes per axis, d! simplices each.

    Raises:
        ValueError: if `d` or `n_cells` is below 1.
    """
    if d < 1 or n_cells < 1:
        raise ValueError(f"a grid needs d >= 1 and n_cells >= 1, got d={d}, n_cells={n_cells}.")
    axis = torch.arange(n_cells + 1, dtype=torch.float64) / n_cells
    nodes = torch.cartesian_prod(*[axis] * d).reshape(-1, d)
    strides = torch.tensor([(n_cells + 1) ** (d - 1 - k) for k in range(d)])
    corner = torch.cartesian_prod(*[torch.arange(n_cells)] * d).reshape(-1, d) @ strides  # [cubes]
    paths = torch.tensor(list(itertools.permutations(range(d))))  # [d!, d]
    steps = torch.cat((paths.new_zeros(len(paths), 1), strides[paths].cumsum(1)), dim=1)  # [d!, d + 1]
    cells = (corner.view(-1, 1, 1) + steps).flatten(0, 1)
    return _planted(nodes, cells, grid=n_cells)


def _planted(nodes: Tensor, cells: Tensor, grid: int | None) -> SimplicialMesh:
    none = torch.full((len(cells),), -1)
    forest = Forest(cells, none, none.view(-1, 1).repeat(1, 2), none.clone(), len(cells), grid)
    levels = torch.zeros(len(nodes), dtype=torch.long)
    return SimplicialMesh(nodes, levels, forest, torch.arange(len(cells)))


def barycentric_gradients(nodes: Tensor, simplices: Tensor) -> Tensor:
    """Gradients of the d + 1 barycentric coordinates of every simplex: `[n_simplices, d + 1, d]`."""
    corners = nodes[simplices]  # [n, d + 1, d]
    inverse = _inverse(corners[:, 1:] - corners[:, :1])  # [n, d, d]; its columns are the gradients of 1..d
    rest = inverse.transpose(1, 2)
    return torch.cat((-rest.sum(1, keepdim=True), rest), dim=1)


def _inverse(matrices: Tensor) -> Tensor:
    """`[n, d, d]`. In closed form up to d = 3: LAPACK takes a call for each matrix."""
    d = matrices.shape[-1]
    if d == 1:
        return 1 / matrices
    if d == 2:
        a, b, c, e = matrices.flatten(1).unbind(1)
        adjugate = torch.stack((e, -b, -c, a), dim=1).view(-1, 2, 2)
        return adjugate / (a * e - b * c).view(-1, 1, 1)
    if d == 3:
        rows = matrices.unbind(1)
        columns = [torch.linalg.cross(rows[(i + 1) % 3], rows[(i + 2) % 3]) for i in range(3)]
        return torch.stack(columns, dim=2) / (rows[0] * columns[0]).sum(1).view(-1, 1, 1)
    return torch.linalg.inv(matrices)


def volumes(nodes: Tensor, simplices: Tensor) -> Tensor:
    """`[n_simplices]`, the d-dimensional measure."""
    corners = nodes[simplices]
    edges = corners[:, 1:] - corners[:, :1]
    return torch.linalg.det(edges).abs() / math.factorial(edges.shape[-1])


def shape_quality(nodes: Tensor, simplices: Tensor) -> Tensor:
    """`[n_simplices]`: volume over (longest edge)^d, 1 for the corner of a cube's edges; a sliver is near 0."""
    d = nodes.shape[1]
    longest = _squared_lengths(nodes, simplices).amax(1).sqrt()
    return volumes(nodes, simplices) * math.factorial(d) / longest**d


def locate_by_search(points: Tensor, nodes: Tensor, simplices: Tensor) -> tuple[Tensor, Tensor]:
    """For every point the simplex that holds it, by trying all; costs O(n_points n_simplices), in bounded memory.

    Args:
        points: `[n_points, d]`, finite. Outside of all simplices the one is taken whose smallest barycentric
            coordinate is largest, and the weights continue it linearly: some are negative.
        nodes: `[n_nodes, d]`.
        simplices: `[n_simplices, d + 1]`.

    Returns:
        `simplex` `[n_points]` and the barycentric coordinates in it, `weights` `[n_points, d + 1]`.

    Raises:
        ValueError: for shapes or indices that do not fit, non-finite nodes, or simplices without volume.
    """
    _check_simplices(nodes, simplices)
    if points.ndim != 2 or points.shape[1] != nodes.shape[1]:
        raise ValueError(
            f"points must have shape [n_points, {nodes.shape[1]}] to fit the nodes, got {tuple(points.shape)}."
        )
    gradients = barycentric_gradients(nodes.double(), simplices)  # [s, d + 1, d]
    origin = nodes.double()[simplices[:, 0]]  # [s, d]
    found, coordinates = [], []
    for part in points.double().split(max(1, _CHUNK // simplices.numel())):
        weights = torch.einsum("psd,skd->psk", part.unsqueeze(1) - origin, gradients)
        weights[..., 0] += 1
        simplex = weights.amin(2).argmax(1)
        found.append(simplex)
        coordinates.append(weights[torch.arange(len(part)), simplex])
    return torch.cat(found), torch.cat(coordinates)


def simplicial_basis(points: Tensor, nodes: Tensor, simplices: Tensor) -> Tensor:
    """All basis functions at all points: `[n_points, n_nodes]`; the dense reference, for small meshes.

    Outside of the mesh one simplex is continued, as in `locate_by_search`. On shared faces the paper averages over the
    simplices that hold the point; these agree there, so that taking one of them is the same.

    Raises:
        ValueError: as `locate_by_search`.
    """
    simplex, weights = locate_by_search(points, nodes, simplices)
    return weights.new_zeros(len(points), len(nodes)).scatter_(1, simplices[simplex].long(), weights)


def locate_in_mesh(points: Tensor, mesh: SimplicialMesh) -> tuple[Tensor, Tensor]:
    """For every point the cell of the forest that is its leaf, and its barycentric coordinates there.

    A point outside of a grid gets the leaf of the nearest point of the cube, and weights that continue that simplex
    linearly (some are negative). The nodes that the weights belong to are `mesh.forest.cells[cell]`.

    Args:
        points: `[n_points, d]`, finite.
        mesh: from `grid_mesh` (the cost is then O(n_points depth)) or `simplicial_mesh` (plus a search of the roots).

    Returns:
        `cell` `[n_points]` and `weights` `[n_points, d + 1]`, which sum to one.
    """
    forest = mesh.forest
    if forest.grid is None:
        root, weights = locate_by_search(points, mesh.nodes, forest.cells[: forest.n_roots])
        return descend(forest, root, weights)
    inside = points.double().clamp(0, 1)
    cell, weights = descend(forest, *_locate_in_grid(inside, forest.grid))
    beyond = (points != inside).any(1).nonzero().squeeze(1)
    if len(beyond):
        gradients = barycentric_gradients(mesh.nodes, forest.cells[cell[beyond]])  # [b, d + 1, d]
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


def descend(forest: Forest, cell: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Walk from cells down to leaves: new `cell` `[n]` and the barycentric coordinates `[n, d + 1]` there."""
    cell, weights = cell.clone(), weights.clone()
    moving = (forest.first_child[cell] >= 0).nonzero().squeeze(1)
    while len(moving):
        at, inner = cell[moving], weights[moving]
        i, j = forest.split[at].split(1, dim=1)  # [m, 1] each
        a, b = inner.gather(1, i), inner.gather(1, j)
        second = b > a
        inner.scatter_(1, i, torch.where(second, 2 * a, a - b))
        inner.scatter_(1, j, torch.where(second, b - a, 2 * b))
        at = forest.first_child[at] + second.squeeze(1)
        cell[moving], weights[moving] = at, inner
        moving = moving[forest.first_child[at] >= 0]
    return cell, weights


def ancestors(forest: Forest, cell: Tensor, n_old: int) -> Tensor:
    """The distinct cells below index `n_old` (those of an earlier mesh) that hold the given ones: `[n_distinct]`."""
    parent = torch.arange(len(forest.cells))
    inner = (forest.first_child >= 0).nonzero().squeeze(1)
    parent[forest.first_child[inner]] = inner
    parent[forest.first_child[inner] + 1] = inner
    while len(cell) and cell.max() >= n_old:
        cell = torch.where(cell >= n_old, parent[cell], cell).unique()
    return cell


def longest_edges(nodes: Tensor, levels: Tensor, simplices: Tensor) -> Tensor:
    """Positions of the two ends of each simplex's longest edge: `[n_simplices, 2]`.

    Among edges of the same length it is the one whose ends have the lowest levels (in d = 4 Maubach's bisection needs
    that), then the one of the oldest nodes: the same for every simplex that has both.
    """
    i, j = _edge_positions(simplices.shape[1])
    squared = _squared_lengths(nodes, simplices)
    longest = squared >= squared.amax(1, keepdim=True) * _TIE
    keys, last = _edge_keys(simplices, i, j), torch.iinfo(torch.long).max
    level = levels[simplices]
    level = torch.maximum(level[:, i], level[:, j]).masked_fill(~longest, last)
    lowest = level == level.amin(1, keepdim=True)
    return torch.stack((i, j), dim=1)[keys.masked_fill(~lowest, last).argmin(1)]


def bisect(mesh: SimplicialMesh, marked: Tensor) -> SimplicialMesh:
    """Bisect simplices at their longest edges, and as many more as a conforming mesh needs.

    Nodes and cells that are there keep their indices; new ones follow. The old mesh's functions are functions on the
    new one: a new node's value is the mean of those at the ends of its edge.

    Args:
        mesh: the mesh; not changed.
        marked: `[n_marked]`, cells of the forest that are leaves.
    """
    forest = mesh.forest
    nodes, levels, cells = mesh.nodes, mesh.levels, forest.cells
    first_child, split, newest = forest.first_child.clone(), forest.split.clone(), forest.newest
    keys, middles = cells.new_zeros(0), cells.new_zeros(0)  # edges bisected in this call, sorted, and their midpoints
    pending = marked.unique()
    leaves = mesh.leaves
    positions = _edge_positions(cells.shape[1])
    while len(pending):
        corners = cells[pending]  # [p, d + 1]
        ends = longest_edges(nodes, levels, corners)  # [p, 2]
        edge, which = _edge_keys(corners, *ends.split(1, dim=1)).squeeze(1).unique(return_inverse=True)
        level = levels.new_zeros(len(edge)).scatter_reduce(0, which, levels[corners].amax(1) + 1, "amax")
        known = torch.isin(edge, keys)
        made = edge[~known]
        nodes = torch.cat((nodes, (nodes[made >> 32] + nodes[made & 0xFFFFFFFF]) / 2))
        levels = torch.cat((levels, level[~known]))
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
        newest = torch.cat((newest, middle.repeat(1, 2).flatten()))

        leaves = torch.cat((leaves[first_child[leaves] < 0], born))
        at_end = torch.zeros(len(nodes), dtype=torch.bool)
        at_end[keys >> 32] = True
        at_end[keys & 0xFFFFFFFF] = True
        near = leaves[at_end[cells[leaves]].sum(1) >= 2]
        hanging = torch.isin(_edge_keys(cells[near], *positions), keys).any(1)
        pending = near[hanging]
    return SimplicialMesh(nodes, levels, Forest(cells, first_child, split, newest, forest.n_roots, forest.grid), leaves)


def removable_nodes(mesh: SimplicialMesh) -> Tensor:
    """Nodes whose bisections can all be undone, in any combination: `[n_removable]`, and the ends of their edges.

    Those are the nodes that came last to every simplex around them.

    Returns:
        `[n_removable, 3]`: the node and the two ends of the edge that it halves.
    """
    forest = mesh.forest
    simplices = mesh.simplices
    around = torch.bincount(simplices.flatten(), minlength=len(mesh.nodes))
    newest = forest.newest[mesh.leaves]
    last = torch.bincount(newest[newest >= 0], minlength=len(mesh.nodes))
    removable = (last > 0) & (last == around)
    parents = (forest.first_child >= 0).nonzero().squeeze(1)
    middle = forest.newest[forest.first_child[parents]]
    edges = forest.cells[parents].gather(1, forest.split[parents])  # [parents, 2]
    ends = edges.new_full((len(mesh.nodes), 2), -1)
    ends[middle] = edges
    which = removable.nonzero()
    return torch.cat((which, ends[which.squeeze(1)]), dim=1)


def coarsen(mesh: SimplicialMesh, removed: Tensor) -> tuple[SimplicialMesh, Tensor]:
    """Undo the bisections that made some of the `removable_nodes`.

    Args:
        mesh: the mesh; not changed.
        removed: `[n_removed]`, nodes.

    Returns:
        The mesh, still conforming, and `kept` `[n_nodes of it]`: which nodes of the old mesh its nodes are.

    Raises:
        ValueError: if a node is not removable.
    """
    allowed = torch.isin(removed, removable_nodes(mesh)[:, 0])
    if not allowed.all():
        raise ValueError(f"node {removed[~allowed][0].item()} is not the newest of all simplices around it.")
    forest = mesh.forest
    gone = torch.zeros(len(mesh.nodes), dtype=torch.bool)
    gone[removed] = True
    keep = (forest.newest < 0) | ~gone[forest.newest]
    parent = (forest.first_child >= 0).nonzero().squeeze(1)
    undone = parent[~keep[forest.first_child[parent]]]
    first_child, split = forest.first_child.clone(), forest.split.clone()
    first_child[undone], split[undone] = -1, -1

    cell_number, node_number = keep.cumsum(0) - 1, (~gone).cumsum(0) - 1
    first_child, newest = first_child[keep], forest.newest[keep]
    first_child = torch.where(first_child < 0, -1, cell_number[first_child])
    newest = torch.where(newest < 0, -1, node_number[newest])
    cells = node_number[forest.cells[keep]]
    forest = Forest(cells, first_child, split[keep], newest, forest.n_roots, forest.grid)
    mesh = SimplicialMesh(mesh.nodes[~gone], mesh.levels[~gone], forest, (first_child < 0).nonzero().squeeze(1))
    return mesh, (~gone).nonzero().squeeze(1)


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


def _check_simplices(nodes: Tensor, simplices: Tensor) -> None:
    if nodes.ndim != 2 or simplices.ndim != 2 or simplices.shape[1] != nodes.shape[1] + 1 or len(simplices) < 1:
        raise ValueError(
            "nodes must have shape [n_nodes, d] and simplices [n_simplices >= 1, d + 1], got "
            f"{tuple(nodes.shape)} and {tuple(simplices.shape)}."
        )
    if simplices.is_floating_point() or simplices.min() < 0 or simplices.max() >= len(nodes):
        raise ValueError(
            f"simplices must hold indices of the {len(nodes)} nodes, got {simplices.dtype} from "
            f"{simplices.min().item()} to {simplices.max().item()}."
        )
    if not torch.isfinite(nodes).all():
        raise ValueError("nodes must be finite, got NaN or infinite values.")
    flat = (shape_quality(nodes.double(), simplices) > 1e-12).logical_not().nonzero()
    if len(flat):
        raise ValueError(
            f"simplices must have a volume: the nodes of simplex {flat[0].item()} lie in one hyperplane; leave it out."
        )
