"""Moving the nodes of a model in training: the step between `core.adapt` and a training loop."""

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.adapt.move import AdaptedMesh, Strategy, adapt_mesh, check_strategy
from ..core.checks import number, show, whole
from ..core.distributed import (
    communication_device,
    rank_and_world,
    require_equal,
    sum_over_processes,
    tensor_from_main,
    together,
)
from ..tuner.layer import LRegLayer
from ..tuner.moves import Move, Tentative, agreed, optimizer_state
from ..tuner.sites import Site, check_whole, movable_sites
from .statistics import MeshStatistics, RunningStatistics, statistics_of

# Relative distance from which projections of two processes are two, not one rounded in two ways.
_ENCODERS_DIFFER = 1e-3


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
    pseudocount: float = 1.0,
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
        pseudocount: as in `adapt_mesh`.
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
        TypeError: for arguments of a wrong type, or an `accept` that does not return one number.
        RuntimeError: if no statistics were gathered since the last update, or parameters are sharded.
    """
    # Every step that can fail on one process alone ends on all of them; communication stands between the steps.
    with together():
        if not (optimizer is None or hasattr(optimizer, "param_groups") or hasattr(optimizer, "optimizer")):
            raise TypeError(f"optimizer must be a torch optimizer, a wrapper of one, or None, got {show(optimizer)}.")
        check_strategy(strategy)
        whole("n_refine", n_refine, 0, optional=True)
        number("size", size, above=0, highest=1)
        number("pseudocount", pseudocount, 0)
        number("tolerance", tolerance, 0)
        gathering = _gathering(movable_sites(model, adapter_name))
        own = [(site, running.read()) for site, running in gathering]
    options = {"strategy": strategy, "n_refine": n_refine, "size": size, "tolerance": tolerance}
    _check_agreement([site for site, _ in own], {**options, "accept": accept is None})
    sites = _with_samples(own, strategy)
    with together():
        proposals = [_propose(site, sums, optimizer, strategy, n_refine, pseudocount, size) for site, sums in sites]
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
    return tracked


def _check_agreement(sites: list[Site], options: dict[str, Any]) -> None:
    """Raise on every process unless all move the same meshes in the same way, from the same samples' coordinates.

    Meshes must agree bit by bit, which updates see to; encoders may round differently on processors of different kinds.
    """
    if rank_and_world()[1] == 1:
        return
    meshes = {f"the mesh of {site.module} ({site.adapter})": site.nodes for site in sites}
    require_equal(
        {**options, **meshes}, "Build the model from the same weights on all processes, and update meshes alike."
    )
    different = []
    for site in sites:
        projection, _, _ = site.layer.parts(site.adapter)
        for weight in (projection.weight.detach(), projection.bias.detach()):
            if not hasattr(weight, "full_tensor"):  # sharded: refused where the coefficients are looked at
                main = tensor_from_main(weight.float())
                if (weight.float() - main).norm() > _ENCODERS_DIFFER * (1 + main.norm()):
                    different.append(site.module)
    with together():
        if different:
            raise ValueError(
                f"the projection of {different[0]} is not the one that process 0 has, so that their statistics are of "
                "different coordinates. Train with DistributedDataParallel or accelerate, which keep the parameters of "
                "all processes equal, or begin with the same seed."
            )


def _with_samples(own: list[tuple[Site, MeshStatistics]], strategy: Strategy) -> list[tuple[Site, MeshStatistics]]:
    """The sites that saw samples on any process, with their sums over all."""
    tensors = sum_over_processes([tensor for _, entry in own for tensor in entry])
    sums = [MeshStatistics(*tensors[4 * i : 4 * i + 4]) for i in range(len(own))]
    seen = [
        (site, entry)
        for (site, _), entry in zip(own, sums, strict=True)
        if (entry.hits if strategy == "paper" else entry.energy).any()
    ]
    if seen:
        return seen
    if strategy == "paper" and any(entry.energy.any() for entry in sums):
        raise RuntimeError(
            "strategy='paper' looks at the hits of the hardest samples, and none were counted since the last update. "
            "Call count_hard_samples(model, losses, k) in every training step, or let the layers count them: "
            "track_statistics(model, n_hard_samples=k)."
        )
    for site, _ in own:
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


def _propose(
    site: Site,
    sums: MeshStatistics,
    optimizer: Optimizer | None,
    strategy: Strategy,
    n_refine: int | None,
    pseudocount: float,
    size: float,
) -> tuple[Site, AdaptedMesh, tuple[Tensor, ...]]:
    """What this process would do, and what lives on the mesh."""
    check_whole(site)
    mesh = adapt_mesh(
        site.nodes,
        site.layer.nodal_coefficients(site.adapter).detach(),
        sums.hits if strategy == "paper" else sums.energy,
        strategy=strategy,
        n_refine=n_refine,
        pseudocount=pseudocount,
        moments=sums.moments,
        node_gradient=sums.node_gradient,
        size=size,
    )
    return site, mesh, (site.parameter.detach(), *optimizer_state(site, optimizer))


def copy_meshes(copy: nn.Module, model: nn.Module) -> None:
    """Bring a copy of a model to the model's meshes, after these have moved: averages of weights (EMA, SWA).

    Coefficients of two meshes cannot be averaged. The copy gets the model's nodes, and what lives on its own mesh (the
    profiles of a factored weighting, else the weight of B) is interpolated there, as `update_meshes` does in the model:

        update_meshes(model, optimizer)
        copy_meshes(averaged, model)          # e.g. torch.optim.swa_utils.AveragedModel
        averaged.update_parameters(model)

    Args:
        copy: a copy of the model, wrapped in other modules or not; changed in place.
        model: the model whose meshes have moved.

    Raises:
        ValueError: if the two do not have the same LReg layers with the same adapters and shapes. The copy is then as
            it was.
        TypeError: for arguments of a wrong type.
    """
    moves = []
    for own, leader in _pairs(copy, model):
        if not torch.equal(own.nodes, leader.nodes.to(own.nodes)):
            mesh = AdaptedMesh(leader.nodes.detach().to(own.nodes, copy=True), own.nodes.clone())
            moves.append(Move(own, mesh, (own.parameter.detach(),)))
    with Tentative(tensor for move in moves for tensor in move.state()) as trial:
        for move in moves:
            move.apply()
        trial.keep()


def _pairs(copy: nn.Module, model: nn.Module) -> list[tuple[Site, Site]]:
    """The sites of all adapters in both models, in the order of their layers."""
    own, leading = ([item for item in m.named_modules() if isinstance(item[1], LRegLayer)] for m in (copy, model))
    if len(own) != len(leading) or not own:
        raise ValueError(
            f"the copy must have the {len(leading)} LReg layers of the model, and it has {len(own)}: make it of the "
            "adapted model, by copy.deepcopy for example."
        )
    pairs = []
    for (path, layer), (model_path, model_layer) in zip(own, leading, strict=True):
        names, wanted = sorted(layer.lreg_encoder), sorted(model_layer.lreg_encoder)
        if names != wanted:
            raise ValueError(f"the adapters of {path!r} in the copy are {names}, those of {model_path!r} are {wanted}.")
        for name in names:
            pair = Site(path, layer, name), Site(model_path, model_layer, name)
            shapes = [(tuple(site.nodes.shape), tuple(site.parameter.shape)) for site in pair]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"the adapter {name!r} of {path!r} in the copy has nodes and coefficients of shapes {shapes[0]}, "
                    f"that of {model_path!r} has {shapes[1]}: they are not copies of one model."
                )
            pairs.append(pair)
    return pairs


def _n_moved(mesh: AdaptedMesh) -> int:
    """How many nodes are where none was."""
    new, old = mesh.nodes, mesh.old_nodes
    nearest = torch.searchsorted(old, new).clamp_max(old.shape[1] - 1)
    return int((old.gather(1, nearest) != new).sum())


def node_spread(nodes: Tensor) -> float:
    """Standard deviation of the lengths of the elements of `[components, n_nodes]` over their mean: 0 if uniform."""
    lengths = nodes.diff(dim=1)
    return float((lengths.std(dim=1, correction=0) / lengths.mean(dim=1)).mean())


@torch.no_grad()
def _loss(accept: Callable[[], float]) -> float:
    """Mean over processes, the same number on all of them."""
    with together():
        loss = _as_number(accept())
    _, world = rank_and_world()
    if world == 1:
        return loss
    (total,) = sum_over_processes([torch.tensor([loss], device=communication_device(torch.device("cpu")))])
    return float(total) / world


def _as_number(loss: Any) -> float:
    if (isinstance(loss, Tensor) and loss.numel() == 1) or isinstance(loss, numbers.Real):
        return float(loss)
    got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
    raise TypeError(f"accept must return the loss as one number, got {got}.")
