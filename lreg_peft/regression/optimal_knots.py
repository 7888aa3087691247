"""The best nodes there are for a continuous piecewise-linear fit in one dimension, chosen from a grid.

A dynamic program over the nodes. V_m(j, v), the least squares left of candidate j with m elements and the value v at
it, is the smallest of finitely many parabolas in v; adding an element and minimising over the value at its other end
maps parabolas to parabolas. What keeps their number small is exact:

- parabolas that are nowhere the smallest go (functional pruning: Fearnhead, Maidstone & Letchford 2019);
- so do those that cannot lead below a fit already known, given that the rest costs at least what it costs without
  continuity, which a plain dynamic program tells.

The fit already known comes from the same program on a coarser grid. Afterwards the nodes leave the grid: they slide by
damped Gauss-Newton steps with the values eliminated (Golub & Pereyra 1973, with the Jacobian of Kaufman 1975).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.mesh import MIN_RELATIVE_ELEMENT
from .free_knots import damped_descent

_CANDIDATES = 160
_COARSE = 40
_MARGIN = 1e-9  # relative, of bounds: rounding must not prune the optimum

# A first, cheap round of pruning if there are more than so many pieces per candidate: against those that are smallest
# at these places, as shares of the interval that matters.
_FEW = 24
_REFERENCES = (0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9)

_MAX_SLIDES = 60
_MIN_PROGRESS = 1e-5
_MAX_DAMPINGS = 5
_MAX_SHIFT = 0.45  # of the element a node slides into
_RIDGE = 1e-12  # relative, where values are not determined by samples


@dataclass(frozen=True)
class OptimalKnots:
    """The fit with one number of nodes. All fp64.

    Attributes:
        nodes: `[n_nodes]`, after sliding.
        values: `[n_nodes]`.
        objective: weighted sum of squared residuals.
        grid_nodes: `[n_nodes]`, the best choice of candidates.
        grid_objective: what they leave, solved for afresh.
        lower_bound: no choice of `n_nodes` candidates leaves less, ends included: the value of the program.
    """

    nodes: Tensor
    values: Tensor
    objective: float
    grid_nodes: Tensor
    grid_objective: float
    lower_bound: float


def optimal_knots(
    x: Tensor, y: Tensor, counts: Sequence[int], *, weight: Tensor | None = None, n_candidates: int = _CANDIDATES
) -> list[OptimalKnots]:
    """Place nodes at the global optimum over a grid of sample quantiles, then slide them.

    The cost grows with n_candidates squared and the largest number of nodes; of the samples only sums are used.

    Args:
        x: `[n_samples]`, with at least two distinct values.
        y: `[n_samples]`.
        counts: numbers of nodes, at least 2 each; all come from one run of the program. Those above the candidates
            (of distinct samples) are lowered to it.
        weight: `[n_samples]`, positive; None for ones.
        n_candidates: size of the grid.

    Returns:
        One result per entry of `counts`, on the device of `x`.

    Raises:
        ValueError: for shapes that do not fit, values that are not finite, or numbers out of range.
    """
    weight = torch.ones_like(x) if weight is None else weight
    if x.ndim != 1 or x.shape != y.shape or x.shape != weight.shape or len(x) < 2:
        raise ValueError(
            f"x, y and weight must have shape [n_samples >= 2], got {tuple(x.shape)}, {tuple(y.shape)} and "
            f"{tuple(weight.shape)}."
        )
    if not all(torch.isfinite(t).all() for t in (x, y, weight)) or not (weight > 0).all():
        raise ValueError("x, y and weight must be finite and weights positive.")
    if not counts or min(counts) < 2 or n_candidates < 2:
        raise ValueError(f"counts and n_candidates must be at least 2, got {list(counts)} and {n_candidates}.")
    x, order = x.double().sort()
    y, weight = y.double()[order], weight.double()[order]
    if not x[0] < x[-1]:
        raise ValueError(f"x must hold at least two distinct values, got only {x[0].item()}.")
    mean = (weight * y).sum() / weight.sum()
    data = _Data(x, y - mean, weight)
    grid = _candidates(data, n_candidates)
    elements = [min(n_nodes, len(grid)) - 1 for n_nodes in counts]
    known = {m: data.fit(_spread(grid, m)).loss for m in set(elements)}
    coarse = _candidates(data, min(_COARSE, n_candidates))
    if len(coarse) < len(grid):
        few = {m: value for m, value in known.items() if m < len(coarse)}
        if few:
            for m, (nodes, _) in _program(data, coarse, few).items():
                # Slid, then moved to the fine grid, where what is known must be reached.
                slid = _slide(data, data.fit(nodes)).nodes
                known[m] = min(known[m], *(data.fit(_snapped(place, grid)).loss for place in (nodes, slid)))
    found = _program(data, grid, known)
    results = {}
    for m, (nodes, bound) in found.items():
        start = data.fit(nodes)
        end = _slide(data, start)
        results[m] = OptimalKnots(end.nodes, end.values + mean, end.loss, nodes, start.loss, bound)
    return [results[m] for m in elements]


@dataclass(frozen=True)
class _Fitted:
    """Least squares on a mesh, and what its derivatives in the nodes need."""

    nodes: Tensor  # [k]
    values: Tensor  # [k]
    loss: float
    moments: Tensor  # [k - 1, 3]: sums of (1 - t)^2, t (1 - t), t^2
    rest: Tensor  # [k - 1, 2]: sums of residual times 1 - t and t
    normal: Tensor  # [k, k]


@dataclass(frozen=True)
class _Data:
    x: Tensor  # [n], ascending
    y: Tensor
    weight: Tensor

    def fit(self, nodes: Tensor) -> _Fitted:
        k = len(nodes)
        element = torch.searchsorted(nodes[1:-1].contiguous(), self.x, right=True)
        t = (self.x - nodes[element]) / (nodes[element + 1] - nodes[element])
        halves = torch.stack((1 - t, t), dim=1)  # [n, 2]
        weighted = self.weight.unsqueeze(1) * halves
        products = torch.stack((weighted[:, 0] * halves[:, 0], weighted[:, 0] * t, weighted[:, 1] * t), dim=1)
        moments = products.new_zeros(k - 1, 3).index_add_(0, element, products)
        target = products.new_zeros(k - 1, 2).index_add_(0, element, weighted * self.y.unsqueeze(1))
        normal = torch.diag(_glued(moments[:, 0], moments[:, 2]))
        normal += torch.diag(moments[:, 1], 1) + torch.diag(moments[:, 1], -1)
        normal.diagonal().add_(_RIDGE * normal.diagonal().mean())
        values = torch.linalg.solve(normal, _glued(target[:, 0], target[:, 1]))
        residual = self.y - (halves[:, 0] * values[element] + t * values[element + 1])
        rest = products.new_zeros(k - 1, 2).index_add_(0, element, weighted * residual.unsqueeze(1))
        return _Fitted(nodes, values, (self.weight * residual.square()).sum().item(), moments, rest, normal)


def _glued(left: Tensor, right: Tensor) -> Tensor:
    """Sums over the two halves of each hat function: `[k - 1, ...] -> [k, ...]`."""
    result = left.new_zeros(len(left) + 1, *left.shape[1:])
    result[:-1] += left
    result[1:] += right
    return result


def _candidates(data: _Data, n: int) -> Tensor:
    """Samples at equal steps of weight, the first and the last among them; far enough apart to carry a slope."""
    values = data.x.unique_consecutive()
    if len(values) > n:
        reached = data.weight.cumsum(0)
        level = torch.linspace(0, 1, n, dtype=torch.float64, device=values.device) * reached[-1] * (1 - 1e-12)
        values = torch.cat((values[:1], data.x[torch.searchsorted(reached, level)][1:-1], values[-1:]))
    apart = 2 * MIN_RELATIVE_ELEMENT * (values[-1] - values[0])
    kept = [values[0]]
    for value in values[1:-1]:
        if value - kept[-1] > apart and values[-1] - value > apart:
            kept.append(value)
    return torch.stack((*kept, values[-1]))


def _spread(grid: Tensor, m: int) -> Tensor:
    """m elements of about equally many candidates."""
    return grid[torch.linspace(0, len(grid) - 1, m + 1, device=grid.device).round().long()]


def _snapped(nodes: Tensor, grid: Tensor) -> Tensor:
    """The nearest candidates, kept distinct."""
    index = torch.searchsorted(((grid[1:] + grid[:-1]) / 2).contiguous(), nodes).tolist()
    for i in range(1, len(index)):
        index[i] = max(index[i], index[i - 1] + 1)
    index[-1] = len(grid) - 1
    for i in range(len(index) - 2, -1, -1):
        index[i] = min(index[i], index[i + 1] - 1)
    return grid[torch.tensor(index, device=grid.device)]


@dataclass(frozen=True)
class _Elements:
    """Squares of every element [i, j] between candidates, as a quadratic function of the values u, v at its ends.

    left u^2 + right v^2 + 2 mixed u v - 2 to_left u - 2 to_right v + squares; all `[K, K]`, meant for i < j.
    """

    left: Tensor
    right: Tensor
    mixed: Tensor
    to_left: Tensor
    to_right: Tensor
    squares: Tensor

    @classmethod
    def between(cls, data: _Data, grid: Tensor) -> "_Elements":
        k = len(grid)
        cell = torch.searchsorted(grid[1:-1].contiguous(), data.x, right=True)
        offset = data.x - grid[cell]
        w, y = data.weight, data.y
        columns = torch.stack((w, w * offset, w * offset**2, w * y, w * y * offset, w * y * y), dim=1)
        s0, s1, s2, r0, r1, q = columns.new_zeros(k - 1, 6).index_add_(0, cell, columns).unbind(1)
        # Moments about candidate i of all cells to its right: sums of positive numbers, which do not cancel.
        far = grid[:-1].unsqueeze(0) - grid.unsqueeze(1)  # [i, cell]
        inside = (far >= 0).double()

        def reached(cells: Tensor) -> Tensor:
            """Sums up to the cell that ends at j, `[i, j]`."""
            return torch.nn.functional.pad((cells * inside).cumsum(dim=1), (1, 0))

        m0, m1 = reached(s0.expand_as(far)), reached(s1 + far * s0)
        m2 = reached(s2 + 2 * far * s1 + far**2 * s0)
        n0, n1 = reached(r0.expand_as(far)), reached(r1 + far * r0)
        length = grid.unsqueeze(0) - grid.unsqueeze(1)
        length = torch.where(length > 0, length, 1.0)
        t1, t2, e1 = m1 / length, m2 / length**2, n1 / length
        left = (m0 - 2 * t1 + t2).clamp_min(0)
        return cls(left, t2, t1 - t2, n0 - e1, e1, reached(q.expand_as(far)))

    def least(self) -> Tensor:
        """What the best line leaves in each element, `[K, K]`; infinite unless i < j."""
        determinant = self.left * self.right - self.mixed**2
        scale = self.left * self.right
        line = (
            self.right * self.to_left**2 + self.left * self.to_right**2 - 2 * self.mixed * self.to_left * self.to_right
        ) / determinant
        mean = torch.where(self.left > 0, self.to_left**2 / self.left, 0.0)
        explained = torch.where(determinant > 1e-13 * scale, line, mean)
        upper = torch.ones_like(explained).triu(1) > 0
        return torch.where(upper, (self.squares - explained).clamp_min(0), math.inf)


@dataclass(frozen=True)
class _Parabolas:
    """Pieces of V_m: a v^2 - 2 b v + c at candidate `knot`, reached from piece `parent` of V_{m-1}; all `[P]`."""

    knot: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    parent: Tensor

    def least(self) -> Tensor:
        """The minimum over v, `[P]`; a piece without curvature, the start, is constant."""
        return self.c - torch.where(self.a > 0, self.b**2 / self.a, 0.0)

    def below(self, limit: Tensor, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """The interval in which each piece is below the limit of its candidate, `[P]` each."""
        half = ((limit[self.knot] - self.least()).clamp_min(0) / self.a).sqrt()
        middle = self.b / self.a
        return (middle - half).clamp(*bounds), (middle + half).clamp(*bounds)


def _program(data: _Data, grid: Tensor, known: dict[int, float]) -> dict[int, tuple[Tensor, float]]:
    """The best meshes for the numbers of elements in `known`, and their values.

    Those that would exceed the known value are left out: none is found where it was reached on another grid.
    """
    k, most = len(grid), max(known)
    elements = _Elements.between(data, grid)
    total = elements.squares[0, -1].item()
    limits = _limits(elements.least(), {m: v + _MARGIN * total for m, v in known.items()}, most)  # [most + 1, K]
    spread = (data.y.max() - data.y.min()).item() or 1.0
    bounds = (data.y.min().item() - 1e3 * spread, data.y.max().item() + 1e3 * spread)
    floor = _RIDGE * data.weight.mean().item()
    zero, first = grid.new_zeros(1), grid.new_zeros(1, dtype=torch.long)
    levels = [_Parabolas(first, zero, zero, zero, first)]
    for m in range(1, most + 1):
        levels.append(_pruned(_extended(levels[-1], elements, limits[m], floor), limits[m], bounds))
    results = {}
    for m in known:
        last = levels[m]
        at_end = torch.where(last.knot == k - 1, last.least(), math.inf)
        if not (at_end < math.inf).any():
            continue
        piece = int(at_end.argmin())
        value = at_end[piece].item()
        index = []
        for level in range(m, 0, -1):
            index.append(int(levels[level].knot[piece]))
            piece = int(levels[level].parent[piece])
        results[m] = (grid[torch.tensor([0, *reversed(index)], device=grid.device)], value)
    return results


def _limits(least: Tensor, known: dict[int, float], most: int) -> Tensor:
    """Above this value a piece of V_m at candidate j cannot be part of a mesh as good as the known one; `[m, K]`."""
    k = len(least)
    ahead = least.new_full((most + 1, k), math.inf)  # what r elements from candidate j to the end leave at least
    ahead[0, -1] = 0.0
    for r in range(1, most + 1):
        ahead[r] = (least + ahead[r - 1].unsqueeze(0)).min(dim=1).values
    limits = least.new_full((most + 1, k), -math.inf)
    for target, value in known.items():
        for m in range(target + 1):
            limits[m] = torch.maximum(limits[m], value - ahead[target - m])
    return limits


def _extended(pieces: _Parabolas, elements: _Elements, limit: Tensor, floor: float) -> _Parabolas:
    """All pieces with one more element, without those above the limit."""
    knots = torch.arange(len(limit), device=limit.device)
    allowed = (knots.unsqueeze(0) > pieces.knot.unsqueeze(1)) & (limit > -math.inf)
    allowed &= pieces.least().unsqueeze(1) <= limit.unsqueeze(0)
    piece, j = allowed.nonzero(as_tuple=True)
    i = pieces.knot[piece]
    curvature = pieces.a[piece] + elements.left[i, j] + floor
    pull = pieces.b[piece] + elements.to_left[i, j]
    mixed = elements.mixed[i, j]
    a = (elements.right[i, j] - mixed**2 / curvature).clamp_min(0) + floor
    b = elements.to_right[i, j] - mixed * pull / curvature
    c = pieces.c[piece] + elements.squares[i, j] - pull**2 / curvature
    result = _Parabolas(j, a, b, c, piece)
    keep = (result.least() <= limit[j]).nonzero().squeeze(1)
    return _picked(result, keep)


def _picked(pieces: _Parabolas, index: Tensor) -> _Parabolas:
    return _Parabolas(pieces.knot[index], pieces.a[index], pieces.b[index], pieces.c[index], pieces.parent[index])


@dataclass(frozen=True)
class _Table:
    """The pieces of each candidate in one row, filled up with parabolas that are nowhere smallest."""

    row: Tensor  # [P]
    slot: Tensor  # [P]
    a: Tensor  # [rows, width]
    b: Tensor
    c: Tensor
    low: Tensor  # [rows], where the limit is first met by a piece
    high: Tensor  # [rows], where it is last met

    @classmethod
    def of(cls, pieces: _Parabolas, limit: Tensor, bounds: tuple[float, float]) -> "_Table":
        """For pieces sorted by candidate."""
        counts = torch.bincount(pieces.knot)
        slot = torch.arange(len(pieces.knot), device=limit.device) - (counts.cumsum(0) - counts)[pieces.knot]
        used = counts > 0
        row = (used.cumsum(0) - 1)[pieces.knot]
        shape = (int(used.sum()), int(counts.max()))

        def table(values: Tensor, empty: float) -> Tensor:
            return values.new_full(shape, empty).index_put((row, slot), values)

        low, high = pieces.below(limit, bounds)
        return cls(
            row, slot, table(pieces.a, 1.0), table(pieces.b, 0.0), table(pieces.c, math.inf),
            table(low, math.inf).min(dim=1).values, table(high, -math.inf).max(dim=1).values,
        )  # fmt: skip

    def smallest(self, v: Tensor) -> Tensor:
        """Which piece of each row is smallest at `v` `[rows]`."""
        v = v.unsqueeze(1)
        return ((self.a * v - 2 * self.b) * v + self.c).argmin(dim=1)


def _pruned(pieces: _Parabolas, limit: Tensor, bounds: tuple[float, float]) -> _Parabolas:
    """The pieces that are somewhere the smallest of their candidate, and below its limit there."""
    if not len(pieces.knot):
        return pieces
    pieces = _picked(pieces, pieces.knot.argsort(stable=True))
    if len(pieces.knot) > _FEW * len(limit):
        pieces = _undominated(pieces, limit, bounds)
    table = _Table.of(pieces, limit, bounds)
    a, b, c, high, at = table.a, table.b, table.c, table.high, table.low
    step = 1e-12 * (high - at) + 1e-300
    seen = torch.zeros(a.shape, dtype=torch.bool, device=limit.device)
    rows = torch.arange(len(a), device=limit.device)
    # From left to right along each row: the piece that is smallest, and where the next one takes over.
    while len(rows):
        v = at.unsqueeze(1)
        here = ((a * v - 2 * b) * v + c).argmin(dim=1)
        seen[rows, here] = True
        pick = here.unsqueeze(1)
        da, db, dc = a - a.gather(1, pick), b - b.gather(1, pick), c - c.gather(1, pick)
        square = db**2 - da * dc
        root = square.clamp_min(0).sqrt()
        # Where the difference da v^2 - 2 db v + dc becomes negative.
        crossing = torch.where(db > 0, dc / (db + root), (db - root) / da)
        crossing = torch.where((square > 0) & (crossing > v), crossing, math.inf)  # never for NaN
        at = crossing.min(dim=1).values + step
        going = at < high
        if not going.all():
            rows, a, b, c, at, high, step = (t[going] for t in (rows, a, b, c, at, high, step))
    return _picked(pieces, seen[table.row, table.slot].nonzero().squeeze(1))


def _undominated(pieces: _Parabolas, limit: Tensor, bounds: tuple[float, float]) -> _Parabolas:
    """Without pieces that, wherever they are below the limit, lie above one of a few that are smallest somewhere."""
    table = _Table.of(pieces, limit, bounds)
    low, high = pieces.below(limit, bounds)
    keep = torch.ones_like(pieces.knot, dtype=torch.bool)
    rows = torch.arange(len(table.low), device=limit.device)
    for share in _REFERENCES:
        smallest = table.smallest(torch.lerp(table.low, table.high, share))
        own = smallest[table.row] == table.slot
        da, db, dc = (
            values - full[rows, smallest][table.row]
            for values, full in ((pieces.a, table.a), (pieces.b, table.b), (pieces.c, table.c))
        )
        # The difference is not negative on [low, high]: not at its ends, and not at its minimum if that lies inside.
        ends = torch.minimum((da * low - 2 * db) * low + dc, (da * high - 2 * db) * high + dc) >= 0
        inside = (da > 0) & (db > da * low) & (db < da * high)
        keep &= own | ~(ends & (~inside | (da * dc >= db**2)))
    return _picked(pieces, keep.nonzero().squeeze(1))


def _slide(data: _Data, fit: _Fitted) -> _Fitted:
    """Damped Gauss-Newton steps on the interior nodes; every step lowers the loss."""

    def attempt(fit: _Fitted, model: tuple[Tensor, Tensor], damping: float) -> _Fitted:
        curvature, descent = model
        diagonal = curvature.diagonal()
        floor = 1e-12 * diagonal.mean().clamp_min(torch.finfo(diagonal.dtype).tiny)
        damped = curvature + torch.diag(damping * diagonal.clamp_min(0) + floor)
        step = torch.linalg.solve_ex(damped, descent).result.nan_to_num(0.0)
        return data.fit(_slid(fit.nodes, step))

    n_steps = _MAX_SLIDES if len(fit.nodes) > 2 else 0
    best = fit
    for later in damped_descent(fit, _node_model, attempt, n_steps, _MAX_DAMPINGS, _MIN_PROGRESS):
        best = later
    return best


def _node_model(fit: _Fitted) -> tuple[Tensor, Tensor]:
    """Gauss-Newton matrix and descent direction of half the loss in the interior nodes, the values eliminated.

    Sliding a node by s changes the function by minus its slope times the hat function of the node, on both sides.
    """
    k = len(fit.nodes)
    slope = fit.values.diff() / fit.nodes.diff()  # [k - 1]
    own = fit.moments * slope.unsqueeze(1).square()  # with the slope on both sides
    curvature = torch.diag(_glued(own[:, 0], own[:, 2]))
    curvature += torch.diag(own[:, 1], 1) + torch.diag(own[:, 1], -1)
    once = fit.moments * slope.unsqueeze(1)  # hat functions with slopes times hat functions
    cross = torch.diag(_glued(once[:, 0], once[:, 2])) + torch.diag(once[:, 1], 1) + torch.diag(once[:, 1], -1)
    curvature = curvature - cross @ torch.linalg.solve(fit.normal, cross.T)
    descent = -_glued(slope * fit.rest[:, 0], slope * fit.rest[:, 1])
    return curvature[1 : k - 1, 1 : k - 1], descent[1 : k - 1]


def _slid(nodes: Tensor, step: Tensor) -> Tensor:
    """Nodes after a step, each kept within `_MAX_SHIFT` of the element it slides into."""
    room = (nodes.diff() - MIN_RELATIVE_ELEMENT * (nodes[-1] - nodes[0])).clamp_min(0) * _MAX_SHIFT
    step = torch.minimum(torch.maximum(step, -room[:-1]), room[1:])
    return torch.cat((nodes[:1], nodes[1:-1] + step, nodes[-1:]))
