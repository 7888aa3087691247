"""Moving the nodes of a model in training: the step between `core.adapt` and a training loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..core.adapt.move import AdaptedMesh, Strategy, adapt_mesh, check_strategy
from ..core.checks import number
from ..core.distributed import rank_and_world, require_equal, sum_over_processes, together
from ..tuner.moves import Move, Tentative, agreed, optimizer_state
from ..tuner.sites import Site, check_whole, movable_sites
from .statistics import MeshStatistics, RunningStatistics, statistics_of


@dataclass(frozen=True)
class MeshUpdate:
    """The result of `update_meshes`.

    Attributes:
        n_moved: nodes that the proposal moved, over all modules.
        accepted: whether the proposed meshes are in place; False if they were refused, or no node was to move.
        refused: whether `accept` spoke against the move; everything is then as it was.
        loss_before: what `accept` gave before the move, averaged over processes; None if it was not asked.
        loss_after: the same after the move.
    """

    n_moved: int
    accepted: bool
    refused: bool
    loss_before: float | None = None
    loss_after: float | None = None


def update_meshes(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    strategy: Strategy = "relocate",
    adapter_name: str | None = None,
    n_refine: int | None = None,
    size: float = 1.0,
    accept: Callable[[], float] | None = None,
    tolerance: float = 0.0,
) -> MeshUpdate:
    """Move the nodes of every LReg mesh to where the model underfits.

    Looks at what `track_statistics` has gathered since the last update. Coefficients and the optimiser's state of
    them follow by interpolation, in place, so that the step after the update sees moments that belong to the new
    nodes (a convex combination of old ones: second moments stay non-negative). To be called between optimiser steps,
    by every process of a distributed run: statistics are summed over processes, and all end with the same nodes.

    What fails on one process ends the call on all of them. Whatever ends it before its time, an interruption too, the
    model, the optimiser and the statistics are then as they were.

    Args:
        model: any module that contains LReg layers, wrapped in other modules or not.
        optimizer: the optimiser that trains the coefficients, or accelerate's wrapper of it. None leaves its state
            alone: right for one without state, such as plain SGD.
        strategy: `"relocate"` or `"paper"`, see `core.adapt.adapt_mesh`. `"paper"` needs hits: see `track_statistics`.
        adapter_name: which adapter; None takes the active ones of every layer.
        n_refine: as in `adapt_mesh`.
        size: as in `adapt_mesh`.
        accept: returns the loss on data of your choice, best on recent batches in eval mode; called without
            gradients before and after the move. The move is undone, exactly, if the loss rises or is NaN; averaged
            over processes. The move is undone too if this raises, and on every process. None keeps every move.
        tolerance: how far the loss may rise for a move to be kept, relative to the loss before.

    Returns:
        A `MeshUpdate`. The statistics start anew, whatever was decided.

    Raises:
        ValueError: if the model has no mesh that can move; if `optimizer` does not hold the coefficients of a mesh
            that would move, or holds state of them that cannot be interpolated; for options out of range; or if the
            processes have different meshes or projections.
        TypeError: for arguments of a wrong type, or an `accept` that returns no number.
        RuntimeError: if no statistics were gathered since the last update, or parameters are sharded.
    """
    # Every step that can fail on one process alone ends on all of them; communication stands between the steps.
    with together():
        check_strategy(strategy)
        number("tolerance", tolerance, 0)
        gathering = _gathering(movable_sites(model, adapter_name))
        own = [running.read() for _, running in gathering]
    alike: dict[str, Any] = {"strategy": strategy, "n_refine": n_refine, "size": size, "tolerance": tolerance}
    alike["accept"] = accept is None
    for site, _ in gathering:
        projection, encoder, _ = site.layer.parts(site.adapter)
        parts = {"mesh": encoder.nodes, "projection": projection.weight, "bias": projection.bias}
        alike |= {f"the {name} of {site.module} ({site.adapter})": tensor for name, tensor in parts.items()}
    require_equal(
        alike, "Train with DistributedDataParallel or accelerate, from the same weights, and update meshes alike."
    )
    tensors = sum_over_processes([tensor for statistics in own for tensor in statistics])
    sums = [MeshStatistics(*tensors[4 * i : 4 * i + 4]) for i in range(len(own))]
    proposals = []
    with together():
        for site, statistics in _with_samples([site for site, _ in gathering], sums, strategy):
            mesh = adapt_mesh(
                site.nodes,
                site.layer.nodal_coefficients(site.adapter).detach(),
                statistics.hits if strategy == "paper" else statistics.energy,
                strategy=strategy,
                n_refine=n_refine,
                moments=statistics.moments,
                node_gradient=statistics.node_gradient,
                size=size,
            )
            proposals.append((site, mesh, (site.parameter.detach(), *optimizer_state(site, optimizer))))
    moves = [Move(site, agreed(mesh), values) for site, mesh, values in proposals]
    moved = [move for move in moves if _n_moved(move.mesh)]
    before = after = None
    refused = False
    if moved:
        with Tentative(tensor for move in moved for tensor in move.state()) as trial:
            before = None if accept is None else _loss(accept)
            with together():
                for move in moved:
                    move.apply()
            after = None if accept is None else _loss(accept)
            refused = before is not None and after is not None and not after <= before + tolerance * abs(before)
            if not refused:
                trial.keep()
    for _, running in gathering:
        running.reset()
    n_moved = sum(_n_moved(move.mesh) for move in moved)
    return MeshUpdate(n_moved, bool(moved) and not refused, refused, before, after)


def _gathering(sites: list[Site]) -> list[tuple[Site, RunningStatistics]]:
    """The sites that are tracked, and what gathers there."""
    found = [(site, statistics_of(site)) for site in sites]
    tracked = [(site, running) for site, running in found if running is not None]
    if not tracked:
        raise RuntimeError("no statistics are gathered. Call track_statistics(model) before training.")
    for site, _ in tracked:
        check_whole(site)
    return tracked


def _with_samples(
    sites: list[Site], sums: list[MeshStatistics], strategy: Strategy
) -> list[tuple[Site, MeshStatistics]]:
    """The sites that saw samples on any process."""
    both = list(zip(sites, sums, strict=True))
    seen = [(site, entry) for site, entry in both if (entry.hits if strategy == "paper" else entry.energy).any()]
    if seen:
        return seen
    if any(entry.energy.any() for entry in sums):
        raise RuntimeError(
            "strategy='paper' looks at the hits of the hardest samples, and none were counted since the last update. "
            "Let the layers count them: track_statistics(model, n_hard_samples=k)."
        )
    for site in sites:
        if not torch.isfinite(site.parameter).all():
            raise RuntimeError(
                f"the coefficients of {site.module} (adapter {site.adapter!r}) are NaN or infinite: the training has "
                "diverged, and no statistics come from it. Lower the learning rate; weights in torch.float16 need an "
                "optimiser made for them: train in bfloat16, or in float32 with autocast."
            )
    raise RuntimeError(
        "no statistics were gathered since the last update. They come from the backward passes of training passes "
        "(train mode, gradients on); passes through a copy of the model do not count."
    )


def _n_moved(mesh: AdaptedMesh) -> int:
    """How many nodes are where none was."""
    new, old = mesh.nodes, mesh.old_nodes
    nearest = torch.searchsorted(old, new).clamp_max(old.shape[1] - 1)
    return int((old.gather(1, nearest) != new).sum())


@torch.no_grad()
def _loss(accept: Callable[[], float]) -> float:
    """Mean over processes, the same number on all of them."""
    with together():
        loss = float(accept())
    (total,) = sum_over_processes([torch.tensor(loss, dtype=torch.float64, device="cpu")])
    return total.item() / rank_and_world()[1]
