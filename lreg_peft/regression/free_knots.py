"""Least-squares fits of sums of piecewise-linear functions, one per input, with nodes placed by the data.

Coefficients are solved for exactly on every mesh (all of it convex); nodes are moved as long as that lowers the loss:

1. a mesh several times finer is fitted at the quantiles and thinned, cheapest nodes first (`removal_cost`);
2. nodes slide by damped Gauss-Newton steps on the loss with the coefficients eliminated ("variable projection";
   Golub & Pereyra 1973, with the Jacobian of Kaufman 1975);
3. single nodes move from where they are worth least to the element that gains most, and step 2 follows.

The mesh update published by Li, Cheng & Gu (2025), alternating with refits, is available as `strategy="paper"`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from ..core.adapt.indicators import element_sums, removal_cost
from ..core.adapt.move import adapt_mesh
from ..core.adapt.relocate import MAX_SHIFT, remove
from ..core.mesh import MIN_RELATIVE_ELEMENT, active_nodes, check_nodes, coordinate_dtype, locate, quantile_nodes

FitStrategy = Literal["relocate", "paper", "none"]


class _HasLoss(Protocol):
    @property
    def loss(self) -> float: ...


Fit = TypeVar("Fit", bound=_HasLoss)
Model = TypeVar("Model")

# The mesh that is thinned has this many times the elements of the final one, as far as samples support it.
_FINER = 4
_SAMPLES_PER_ELEMENT = 3

# Sliding stops when a step lowers the loss by less than this factor, or after this many steps.
_MIN_PROGRESS = 1e-3
_MAX_SLIDES = 40
_MAX_DAMPINGS = 4
_DAMPING_FACTOR = 8.0

# Pairs of (leaving node, entered element) tried before exchanging nodes is given up.
_MAX_EXCHANGES = 6

_CHUNK = 1 << 22  # products held at once while normal equations are summed: 32 MiB


@dataclass(frozen=True)
class PiecewiseLinearFit:
    """A fitted sum of piecewise-linear functions; evaluate it with `core.evaluate(x, nodes, coefficients)`.

    Attributes:
        nodes: `[components, n_nodes]`.
        coefficients: `[components, n_nodes, out_features]`.
        losses: the loss of the starting mesh, then after every move: mean squared residual plus the ridge term. With
            "relocate" only kept moves are listed, so that it never rises; with "paper" every update is.
        loss: of the returned fit.
    """

    nodes: Tensor
    coefficients: Tensor
    losses: tuple[float, ...]
    loss: float


@dataclass(frozen=True)
class _Solved:
    """The least-squares fit on one mesh, and what its derivatives in the nodes need. All fp64.

    "Halves" are the pieces of the hat functions inside single elements, `1 - local` and `local`: E = 2 components
    (n_nodes - 1) of them. A hat function is the sum of the halves on both sides of its node.
    """

    nodes: Tensor  # [components, n_nodes]
    coefficients: Tensor  # [components, n_nodes, out]
    loss: float
    gram: Tensor  # [E, E], products of halves, mean over samples
    factor: Tensor  # Cholesky factor of the normal matrix, [components * n_nodes, components * n_nodes]
    rest: Tensor  # [E, out], products of halves and residual, mean over samples
    residual: Tensor  # [n_samples, out]
    element: Tensor  # [n_samples, components]
    local: Tensor  # [n_samples, components]


def fit_piecewise_linear(
    x: Tensor,
    y: Tensor,
    n_nodes: int,
    *,
    strategy: FitStrategy = "relocate",
    start: Tensor | None = None,
    n_rounds: int = 20,
    ridge: float = 1e-10,
    knot_cost: float = 3.0,
    n_hard_samples: int | None = None,
) -> PiecewiseLinearFit:
    """Fit y = sum_i f_i(x_i), every f_i continuous and piecewise linear on `n_nodes` nodes, by least squares.

    Minimises mean |y - f(x)|^2 + ridge * |c|^2 / out_features over the coefficients exactly, and over the nodes as
    `strategy` says. Computed in fp64 through dense normal equations: a refit costs O(n_samples components^2 +
    (components n_nodes)^3), and a fit takes from ten to a few hundred of them.

    Args:
        x: `[n_samples, components]`.
        y: `[n_samples]` or `[n_samples, out_features]`.
        n_nodes: nodes per component, at least 2.
        strategy: "relocate" moves nodes as the head of this file says, keeping a move only if the loss falls; "paper"
            applies the published update `n_rounds` times, unconditionally, and returns the best mesh it met; "none"
            keeps the starting mesh.
        start: `[components, n_nodes]`, the starting mesh; None takes the quantiles of `x`.
        n_rounds: most exchanges of single nodes, or updates for "paper".
        ridge: positive if there are several components, whose constants are interchangeable, or elements without
            samples.
        knot_cost: how many parameters an interior node placed by the data counts for, its coefficient included, when
            generalised cross-validation decides between the moved mesh and the start ("relocate" only). Friedman
            (1991, "Multivariate adaptive regression splines", sec. 3.6) recommends 3. 1 always takes the moved mesh.
        n_hard_samples: samples counted as hard by "paper"; None takes a tenth of them.

    Returns:
        A `PiecewiseLinearFit`; nodes and coefficients fp64 for fp64 `x`, else fp32.

    Raises:
        ValueError: for shapes that do not fit, non-finite values, options out of range, or singular normal equations.
    """
    if y.ndim == 1:
        y = y.unsqueeze(1)
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0] or 0 in (*x.shape, *y.shape):
        raise ValueError(
            f"x must have shape [n_samples, components] and y [n_samples] or [n_samples, out_features], got "
            f"{tuple(x.shape)} and {tuple(y.shape)}."
        )
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise ValueError("x and y must be finite, got NaN or infinite values.")
    if strategy not in get_args(FitStrategy):
        raise ValueError(f"strategy must be one of {get_args(FitStrategy)}, got {strategy!r}.")
    if n_rounds < 0 or not 0 <= ridge < math.inf or not 1 <= knot_cost < math.inf:
        raise ValueError(
            f"n_rounds and ridge must be at least 0 and knot_cost at least 1, and finite, got n_rounds={n_rounds}, "
            f"ridge={ridge}, knot_cost={knot_cost}."
        )
    n_hard = max(1, len(x) // 10) if n_hard_samples is None else n_hard_samples
    if not 1 <= n_hard <= len(x):
        raise ValueError(f"n_hard_samples must lie in [1, n_samples], got {n_hard} for {len(x)} samples.")
    dtype = coordinate_dtype(x)
    x, y = x.double(), y.double()
    nodes = quantile_nodes(x, n_nodes, low=None, high=None) if start is None else start.double()
    check_nodes(nodes)
    if nodes.shape != (x.shape[1], n_nodes):
        raise ValueError(
            f"start must have shape [components, n_nodes] = {(x.shape[1], n_nodes)}, got {tuple(nodes.shape)}."
        )

    first = _solve(x, y, nodes, ridge)
    if first.loss == math.inf:
        raise ValueError(
            f"the normal equations of components={x.shape[1]}, n_nodes={n_nodes} are singular with ridge={ridge}; "
            "raise it or lower n_nodes."
        )
    if strategy == "none" or n_nodes == 2:
        best, losses = first, [first.loss]
    elif strategy == "paper":
        best, losses = _published(x, y, first, ridge, n_rounds, n_hard)
    else:
        best, losses = _exchanges(x, y, first, ridge, n_rounds)
        if _gcv(best, len(x), knot_cost) > _gcv(first, len(x), 1.0):
            best, losses = first, [first.loss]
    return PiecewiseLinearFit(best.nodes.to(dtype), best.coefficients.to(dtype), tuple(losses), best.loss)


def _published(
    x: Tensor, y: Tensor, first: _Solved, ridge: float, n_rounds: int, n_hard: int
) -> tuple[_Solved, list[float]]:
    """Alternate refits and `"paper"` updates; the best mesh met and the loss on each."""
    best = fit = first
    losses = [first.loss]
    for _ in range(n_rounds):
        hard = fit.residual.square().sum(dim=1).topk(n_hard).indices
        hits = element_sums(fit.element[hard], x.new_ones(()), fit.nodes.shape[1] - 1)
        nodes = adapt_mesh(fit.nodes, fit.coefficients, hits, strategy="paper").nodes
        fit = _solve(x, y, nodes, ridge)
        if fit.loss == math.inf:
            break
        losses.append(fit.loss)
        if fit.loss < best.loss:
            best = fit
    return best, losses


def _exchanges(x: Tensor, y: Tensor, first: _Solved, ridge: float, n_rounds: int) -> tuple[_Solved, list[float]]:
    """The default: descend from the given and from the thinned mesh, then exchange nodes in the better one."""
    runs = [_slides(x, y, first, ridge)]
    thinned = _thinned(x, y, first, ridge)
    if thinned.loss < first.loss:
        run = _slides(x, y, thinned, ridge)
        runs.append((run[0], [thinned.loss, *run[1]]))
    fit, kept = min(runs, key=lambda run: run[0].loss)
    losses = [first.loss, *kept]
    for _ in range(n_rounds):
        better = _exchange_one(x, y, fit, ridge)
        if better is None:
            break
        fit = better
        losses.append(fit.loss)
    return fit, losses


def _thinned(x: Tensor, y: Tensor, first: _Solved, ridge: float) -> _Solved:
    """A finer quantile mesh, refitted and thinned by the cheapest nodes until it has as many as `first`.

    `first` if samples support no finer mesh; a fit of infinite loss if they do not determine its coefficients.
    """
    n_nodes = first.nodes.shape[1]
    n_fine = min(_FINER * (n_nodes - 1), len(x) // _SAMPLES_PER_ELEMENT) + 1
    if n_fine <= n_nodes:
        return first
    low, high = first.nodes[:, :1], first.nodes[:, -1:]  # [components, 1]
    unit = quantile_nodes((x - low.T) / (high - low).T, n_fine)
    nodes = torch.cat((low, (low + (high - low) * unit)[:, 1:-1], high), dim=1)
    fit = _solve(x, y, nodes, ridge)
    while fit.nodes.shape[1] > n_nodes and fit.loss < math.inf:
        surplus = fit.nodes.shape[1] - n_nodes
        # Half of the surplus at a time: about log2(surplus) refits, and the last nodes to go are chosen singly.
        fit = _solve(x, y, remove(fit.nodes, _cost(fit), (surplus + 1) // 2), ridge)
    return fit


def _cost(fit: _Solved) -> Tensor:
    """`removal_cost`, from the diagonal blocks of the Gram matrix of the halves."""
    components, n_nodes = fit.nodes.shape
    pairs = torch.arange(components * (n_nodes - 1) * 2, device=fit.nodes.device).view(components, n_nodes - 1, 2)
    left, right = pairs.unbind(-1)
    moments = torch.stack((fit.gram[left, left], fit.gram[left, right], fit.gram[right, right]), dim=-1)
    return removal_cost(fit.nodes, fit.coefficients, moments)


def _slides(x: Tensor, y: Tensor, fit: _Solved, ridge: float) -> tuple[_Solved, list[float]]:
    """Damped Gauss-Newton steps on all interior nodes at once; every step lowers the loss."""

    def attempt(fit: _Solved, model: tuple[Tensor, Tensor], damping: float) -> _Solved:
        return _solve(x, y, _slid(fit.nodes, *model, damping), ridge)

    best, losses = fit, []
    for later in damped_descent(fit, _node_model, attempt, _MAX_SLIDES, _MAX_DAMPINGS, _MIN_PROGRESS):
        best = later
        losses.append(later.loss)
    return best, losses


def damped_descent(
    fit: Fit,
    model: Callable[[Fit], Model],
    attempt: Callable[[Fit, Model, float], Fit],
    n_steps: int,
    n_dampings: int,
    min_progress: float,
) -> Iterator[Fit]:
    """Fits whose loss falls, each by a damped step from the one before.

    Args:
        fit: where to begin; it has a `loss`.
        model: what steps from a fit are computed from.
        attempt: the fit after a step, from a fit, its model and a damping.
        n_steps: most steps.
        n_dampings: most dampings that are tried for one.
        min_progress: the step that lowers the loss by less than this share is the last one.
    """
    damping = 1e-2
    for _ in range(n_steps):
        about = model(fit)
        for _ in range(n_dampings):
            trial = attempt(fit, about, damping)
            if trial.loss < fit.loss:
                break
            damping *= _DAMPING_FACTOR
        else:
            return
        progress = 1 - trial.loss / fit.loss
        fit = trial
        yield fit
        damping /= _DAMPING_FACTOR
        if progress < min_progress:
            return


def _node_model(fit: _Solved) -> tuple[Tensor, Tensor]:
    """Gauss-Newton matrix and descent direction of half the loss in the interior nodes, coefficients eliminated.

    Sliding a node changes the function by minus the slope times the hat function of that node, so with Phi the halves
    of all samples, G = Phi^T Phi and T the map from nodal values to halves, the Jacobian of output o is
    -Phi diag(s_o) T, and eliminating the coefficients projects it: G becomes G - G T H^-1 T^T G.
    """
    components, n_nodes = fit.nodes.shape
    slope = fit.coefficients.diff(dim=1) / fit.nodes.diff(dim=1).unsqueeze(-1)  # [components, n_nodes - 1, out]
    slope = slope.repeat_interleave(2, dim=1).flatten(0, 1)  # [E, out]: one per half
    tied = _glue(fit.gram, components)  # T^T G, [components * n_nodes, E]
    projected = fit.gram - tied.T @ torch.cholesky_solve(tied, fit.factor)
    curvature = _glue(_glue(projected * (slope @ slope.T), components).T, components)
    descent = -_glue((slope * fit.rest).sum(dim=1, keepdim=True), components).squeeze(1)
    inner = torch.arange(components * n_nodes, device=fit.nodes.device).view(components, n_nodes)[:, 1:-1].flatten()
    return curvature[inner][:, inner], descent[inner]


def _slid(nodes: Tensor, curvature: Tensor, descent: Tensor, damping: float) -> Tensor:
    """Nodes after one Levenberg-Marquardt step, each kept within `MAX_SHIFT` of the element it slides into."""
    diagonal = curvature.diagonal()
    floor = 1e-12 * diagonal.mean().clamp_min(torch.finfo(diagonal.dtype).tiny)
    damped = curvature + torch.diag(damping * diagonal.clamp_min(0) + floor)
    step = torch.linalg.solve_ex(damped, descent).result.nan_to_num(0.0).view(nodes.shape[0], -1)
    lengths = nodes.diff(dim=1)
    room = (lengths - MIN_RELATIVE_ELEMENT * (nodes[:, -1:] - nodes[:, :1])).clamp_min(0) * MAX_SHIFT
    step = torch.minimum(torch.maximum(step, -room[:, :-1]), room[:, 1:])
    return torch.cat((nodes[:, :1], nodes[:, 1:-1] + step, nodes[:, -1:]), dim=1)


def _exchange_one(x: Tensor, y: Tensor, fit: _Solved, ridge: float) -> _Solved | None:
    """Move one node to the middle of another element and slide; None if no promising pair lowers the loss."""
    n_nodes = fit.nodes.shape[1]
    cost = _cost(fit)  # [components, n_nodes - 2]
    # The gain of a new hat function in the middle of an element, everything else fixed: (b.r)^2 / b.b.
    bump = 1 - (2 * fit.local - 1).abs()  # [n_samples, components]
    power = element_sums(fit.element, bump.square(), n_nodes - 1) / len(x)
    gain = torch.zeros_like(power)
    for out in fit.residual.unbind(1):
        gain += (element_sums(fit.element, bump * out.unsqueeze(1), n_nodes - 1) / len(x)).square()
    long_enough = fit.nodes.diff(dim=1) > 2 * MIN_RELATIVE_ELEMENT * (fit.nodes[:, -1:] - fit.nodes[:, :1])
    gain = torch.where(long_enough & (power > 0), gain / power.clamp_min(1e-300), 0.0)
    # Within one component, so that every mesh keeps its number of nodes.
    net = gain.unsqueeze(1) - cost.unsqueeze(2)  # [components, n_nodes - 2, n_nodes - 1]
    for pair in net.flatten().topk(min(_MAX_EXCHANGES, net.numel())).indices.tolist():
        component, rest = divmod(pair, (n_nodes - 2) * (n_nodes - 1))
        leaving, entered = divmod(rest, n_nodes - 1)
        nodes = fit.nodes.clone()
        nodes[component, leaving + 1] = fit.nodes[component, entered : entered + 2].mean()
        trial, _ = _slides(x, y, _solve(x, y, nodes.sort(dim=1).values, ridge), ridge)
        if trial.loss < fit.loss * (1 - _MIN_PROGRESS):
            return trial
    return None


def _gcv(fit: _Solved, n_samples: int, knot_cost: float) -> float:
    """Generalised cross-validation score; infinite if there are as many parameters as samples."""
    components, n_nodes = fit.nodes.shape
    parameters = 1 + components * (n_nodes - 1) + (knot_cost - 1) * components * (n_nodes - 2)
    return fit.loss / (1 - parameters / n_samples) ** 2 if parameters < n_samples else math.inf


def _solve(x: Tensor, y: Tensor, nodes: Tensor, ridge: float) -> _Solved:
    """Least squares for the coefficients on one mesh; a loss of infinity if they are not determined.

    Normal equations do: hat functions are so well scaled that squaring the condition number costs little.
    """
    components, n_nodes = nodes.shape
    n_samples, out = y.shape
    n_halves = 2 * components * (n_nodes - 1)
    element, local = locate(x, nodes, validate=False)
    # Halves are the hat functions of a mesh that is broken at every node: [n_samples, 2 * components].
    index, weight = active_nodes(2 * element, local, 2 * (n_nodes - 1))
    gram = x.new_zeros(n_halves * n_halves)
    target = x.new_zeros(n_halves, out)
    chunk = max(1, _CHUNK // (2 * components * max(2 * components, out)))
    for i, w, t in zip(index.split(chunk), weight.split(chunk), y.split(chunk), strict=True):
        gram.index_add_(
            0, (i.unsqueeze(2) * n_halves + i.unsqueeze(1)).flatten(), (w.unsqueeze(2) * w.unsqueeze(1)).flatten()
        )
        target.index_add_(0, i.flatten(), (w.unsqueeze(2) * t.unsqueeze(1)).flatten(0, 1))
    gram = gram.view(n_halves, n_halves) / n_samples
    target = target / n_samples
    normal = _glue(_glue(gram, components).T, components)
    normal.diagonal().add_(ridge)
    factor, singular = torch.linalg.cholesky_ex(normal)
    solution = torch.cholesky_solve(_glue(target, components), factor)  # [components * n_nodes, out]
    coefficients = solution.view(components, n_nodes, out)
    halves = torch.stack((coefficients[:, :-1], coefficients[:, 1:]), dim=2).reshape(n_halves, out)
    residual = y.clone()
    for k in range(2 * components):
        residual -= weight[:, k : k + 1] * halves[index[:, k]]
    loss = (residual.square().sum() / n_samples + ridge * coefficients.square().sum()) / out
    rest = target - gram @ halves
    return _Solved(
        nodes, coefficients, math.inf if singular else loss.item(), gram, factor, rest, residual, element, local
    )


def _glue(halves: Tensor, components: int) -> Tensor:
    """Sum the two halves of each hat function: T^T `halves`, `[E, m] -> [components * n_nodes, m]`."""
    left, right = halves.view(components, -1, 2, halves.shape[1]).unbind(2)
    pad = torch.nn.functional.pad
    return (pad(left, (0, 0, 0, 1)) + pad(right, (0, 0, 1, 0))).flatten(0, 1)
