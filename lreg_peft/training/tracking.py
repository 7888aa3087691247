"""Switching the gathering of statistics on and off, and counting the hardest samples."""

from torch import Tensor, nn

from ..core.checks import checked, whole
from ..tuner import statistics
from ..tuner.sites import movable_sites
from ..tuner.statistics import DEFAULT_ROWS, RunningStatistics


@checked(n_rows=whole(1), n_hard_samples=whole(1))
def track_statistics(
    model: nn.Module,
    enabled: bool = True,
    *,
    adapter_name: str | None = None,
    n_rows: int = DEFAULT_ROWS,
    n_hard_samples: int | None = None,
) -> None:
    """Gather in training what `update_meshes` looks at, or stop.

    Training passes count when an optimiser that holds the coefficients steps: all micro-batches of a step, the
    recomputation of gradient checkpointing once, evaluation never. A step that a gradient scaler skips does not
    count, provided gradients are cleared with `zero_grad(set_to_none=True)`, the default. (While the scale of the
    loss changes, so does the weight of a step.) Nothing of it is saved with the model.

    A model under `torch.compile` runs, but each adapted module splits its graph; with `fullgraph=True`, which forbids
    that, tracing fails with an error that names this function.

    Args:
        model: any module that contains LReg layers.
        enabled: False forgets what was gathered; the layers cost nothing again.
        adapter_name: which adapter; None takes the active ones of every layer.
        n_rows: rows (samples, or tokens, or pixels) to note per module and backward pass, evenly strided.
        n_hard_samples: count, per backward pass, the noted rows with the largest gradient as hits for
            `strategy="mrc"`. None counts none: `count_hard_samples` does it by the losses of the samples.

    Raises:
        ValueError: if the model has no mesh that can move, or a number is below 1.
        TypeError: for arguments of a wrong type.
    """
    for site in movable_sites(model, adapter_name):
        if site.statistics is not None:
            site.statistics.stop()
        if enabled:
            site.layer.lreg_statistics[site.adapter] = RunningStatistics(n_rows, n_hard_samples)
            statistics.watch(site.layer)
        else:
            site.layer.lreg_statistics.pop(site.adapter, None)
            if not site.layer.lreg_statistics:
                statistics.unwatch(site.layer)


@checked(n_hard_samples=whole(1))
def count_hard_samples(
    model: nn.Module, losses: Tensor, n_hard_samples: int, *, adapter_name: str | None = None
) -> None:
    """Count the hits of the samples with the largest loss (Li, Cheng & Gu 2025, Algorithm 1), for `"mrc"`.

    To be called once per training pass, before the optimiser steps; after `backward()` if gradient checkpointing is
    reentrant. A module that runs several times per pass counts where its last run placed the samples.

    Args:
        model: any module with LReg layers under `track_statistics`.
        losses: one per sample `[batch]`, or per position `[batch, length]`, flattened or not. With one per sample,
            all its positions count.
        n_hard_samples: k, how many of them count.
        adapter_name: which adapter; None takes the active ones of every layer.

    Raises:
        ValueError: if the model has no mesh that can move, the losses do not fit the last training pass, or hits are
            already counted by gradient.
        TypeError: for arguments of a wrong type.
        RuntimeError: if statistics are not tracked, or there was no training pass.
    """
    tracked = [site for site in movable_sites(model, adapter_name) if site.statistics is not None]
    if not tracked:
        raise RuntimeError("no statistics are tracked. Call track_statistics(model) before training.")
    if not any(site.statistics.coords is not None for site in tracked if site.statistics):
        raise RuntimeError(
            "no training pass has reached the LReg layers. Call count_hard_samples after the model has run in train "
            "mode with gradients; after backward() if gradient checkpointing is reentrant."
        )
    losses = losses.detach()
    hardest = losses.flatten().topk(min(n_hard_samples, losses.numel())).indices
    for site in tracked:
        assert site.statistics is not None
        if site.statistics.n_hard_samples is not None:
            raise ValueError(
                "hits are already counted by gradient: leave n_hard_samples out of track_statistics to count them by "
                "loss."
            )
        coords = site.statistics.coords
        if coords is None:
            continue  # this module had no part in the pass
        positions = coords.shape[:-1]
        if losses.shape != positions[: losses.ndim] and losses.numel() != positions.numel():
            raise ValueError(
                f"losses must have one entry per sample or position of the last training pass: the input of "
                f"{site.module} has {tuple(positions)}, got losses of shape {tuple(losses.shape)}. Pad shifted "
                "language model losses with a zero at the last position."
            )
        grouped = coords.reshape(losses.numel(), -1, coords.shape[-1])  # [losses, positions of each, components]
        site.statistics.count(grouped[hardest.to(coords.device)].flatten(0, 1), site.parameter)
