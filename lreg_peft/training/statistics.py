"""What shortcuts note down while they train, for the mesh that follows.

The gradient that arrives at a shortcut's output says, for any loss, how much each sample still asks of the shortcut:
its squared norm, summed over the samples in an element, is the residual energy of that element. It is noted by hooks
on two modules of the shortcut: the curve, whose input says where a sample is, and B, whose output gets the gradient.
Both see a forward pass that gradient checkpointing repeats, and one of the two passes has a backward pass.

A few rows are kept per pass; they are sorted into elements many passes at a time.
"""

import math
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.adapt.indicators import element_moments, element_sums, node_gradient
from ..core.checks import whole
from ..core.mesh import coordinate_dtype, locate
from ..modules import remove_hooks
from ..tuner.layout import Layout
from ..tuner.sites import Site, check_whole, movable_sites

#: Rows noted per backward pass. 50 passes see 6,400 of them, over sixty per element at n_nodes 100.
DEFAULT_ROWS = 128

# Rows to collect before they are sorted into elements. Sorting costs some sixty small kernels, whatever their number.
_ROWS_PER_FOLD = 4096

_NO_GRAPH = (
    "lreg_peft notes gradients down with tensor hooks, which a graph cannot hold. Compile without fullgraph=True, or "
    "call track_statistics(model, False) and keep the meshes as they are."
)


class MeshStatistics(NamedTuple):
    """Sums over the samples of the training passes, per component and element.

    Attributes:
        energy: `[components, n_nodes - 1]`, squared gradient at the shortcut's output.
        moments: `[components, n_nodes - 1, 3]`, see `core.adapt.element_moments`.
        node_gradient: `[components, n_nodes]`, see `core.adapt.node_gradient`.
        hits: `[components, n_nodes - 1]`, the hardest samples (Li, Cheng & Gu 2025, Algorithm 1).
    """

    energy: Tensor
    moments: Tensor
    node_gradient: Tensor
    hits: Tensor


# Some rows of one backward pass: coordinates `[rows, components]`, squared gradient `[rows]`, and the gradient in the
# coordinates `[rows, components]`.
_Rows = tuple[Tensor, Tensor, Tensor]


class RunningStatistics:
    """Gathers the statistics of one site; its hooks on the site's modules keep it.

    Copies and pickles start empty, with hooks of their own.

    Args:
        site: where.
        n_rows: rows to note per backward pass, evenly strided, starting one further each time.
        n_hard_samples: rows with the largest gradient that count as hits; None counts none.
    """

    def __init__(self, site: Site, n_rows: int = DEFAULT_ROWS, n_hard_samples: int | None = None) -> None:
        self._site, self._n_rows, self._n_hard_samples = site, n_rows, n_hard_samples
        self._begin()

    def _begin(self) -> None:
        self._n_passes = 0
        # Of the pass that is between the two modules, in each thread: replicas of a model share their hooks.
        self._latent: dict[int, Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Forget what was gathered."""
        self._rows: list[_Rows] = []
        self._hard: list[Tensor] = []  # [samples, components]: coordinates of the hardest samples
        self._sums: MeshStatistics | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_site": self._site, "_n_rows": self._n_rows, "_n_hard_samples": self._n_hard_samples}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def start(self) -> None:
        """Put the hooks in."""
        _, encoder, coefficients = self._site.layer.parts(self._site.adapter)
        encoder.register_forward_hook(self.note_latent)
        coefficients.register_forward_hook(self.note_output)

    def stop(self) -> None:
        """Take the hooks out."""
        _, encoder, coefficients = self._site.layer.parts(self._site.adapter)
        remove_hooks(encoder, self.note_latent)
        remove_hooks(coefficients, self.note_output)

    @torch.compiler.disable(reason=_NO_GRAPH)
    def note_latent(self, encoder: nn.Module, args: tuple[Tensor, ...], design: Tensor) -> None:
        """Forward hook of the curve: where the samples are."""
        if encoder.training and torch.is_grad_enabled():
            self._latent[threading.get_ident()] = args[0].detach()

    @torch.compiler.disable(reason=_NO_GRAPH)
    def note_output(self, coefficients: nn.Module, args: Any, output: Tensor) -> None:
        """Forward hook of B: wait for the gradient."""
        latent = self._latent.pop(threading.get_ident(), None)
        if latent is None or not output.requires_grad:
            return
        flat = latent.reshape(-1, latent.shape[-1])
        stride = -(-len(flat) // self._n_rows) or 1
        picked = slice(self._n_passes % stride, None, stride)
        rows = flat[picked].clone()  # not a view: that would keep all rows alive
        shape = latent.shape
        output.register_hook(lambda gradient: self._note(rows, self._spread(gradient, shape).flatten(0, -2)[picked]))

    def _spread(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """The gradient at B's output for every position of z, of the given shape: where B has fewer, these are averages
        over those of z."""
        if gradient.shape[:-1] == shape[:-1]:
            return gradient
        layer, name = self._site.layer, self._site.adapter
        on_grid = layer.readings[name].layout == "grid"
        space, output_space = (_sides(inner[1:-1], on_grid) for inner in (shape, gradient.shape))
        return Layout(channels_first=True, space=space, output_space=output_space).spread(gradient)

    @torch.no_grad()
    def _note(self, latent: Tensor, gradient: Tensor) -> None:
        """Note z `[rows, components]` and the gradient of the loss at the output, `[rows, out_features]`."""
        _, encoder, coefficients = self._site.layer.parts(self._site.adapter)
        gradient = gradient.to(coordinate_dtype(gradient, latent))
        energy = torch.linalg.vector_norm(gradient, dim=-1).square()
        with torch.autocast(gradient.device.type, enabled=False):
            design_gradient = gradient @ coefficients.weight.to(gradient.dtype)
        slope = encoder.coordinate_gradient(latent, design_gradient * self._site.layer.scaling[self._site.adapter])
        coords = latent.sigmoid()
        self._rows.append((coords, energy, slope))
        if self._n_hard_samples is not None:
            hardest = energy.topk(min(self._n_hard_samples, len(energy))).indices
            self._hard.append(coords[hardest])
        self._n_passes += 1
        if sum(len(coords) for coords, _, _ in self._rows) > _ROWS_PER_FOLD:
            self.read()

    def read(self) -> MeshStatistics:
        """The sums of all training passes; never synchronises."""
        nodes = self._site.nodes
        sums = self._sums
        if sums is None:
            energy = nodes.new_zeros(len(nodes), nodes.shape[1] - 1)
            sums = MeshStatistics(energy, torch.stack([energy] * 3, dim=-1), torch.zeros_like(nodes), energy)
        if self._rows:
            energy, moments, gradient = (part.to(sums.energy.device) for part in _sort_rows(self._rows, nodes))
            sums = MeshStatistics(
                sums.energy + energy, sums.moments + moments, sums.node_gradient + gradient, sums.hits
            )
        if self._hard:
            element, _ = _locate_finite(torch.cat(self._hard), nodes)
            hits = element_sums(element, nodes.new_ones(()), nodes.shape[1])[:, :-1]
            sums = sums._replace(hits=sums.hits + hits.to(sums.hits.device))
        self._rows, self._hard, self._sums = [], [], sums
        return sums


def statistics_of(site: Site) -> RunningStatistics | None:
    """What is gathered at a site, found by its hooks; None if nothing is."""
    _, encoder, _ = site.layer.parts(site.adapter)
    owners = (getattr(hook, "__self__", None) for hook in encoder._forward_hooks.values())
    return next((owner for owner in owners if isinstance(owner, RunningStatistics)), None)


def track_statistics(
    model: nn.Module,
    enabled: bool = True,
    *,
    adapter_name: str | None = None,
    n_rows: int = DEFAULT_ROWS,
    n_hard_samples: int | None = None,
) -> None:
    """Gather in training what `update_meshes` looks at, or stop.

    Every backward pass of a training pass counts (train mode, gradients on), once with gradient checkpointing; rows
    whose gradient is not finite do not. Nothing of it is saved with the model.

    A model under `torch.compile` runs, but each adapted module splits its graph; with `fullgraph=True`, which forbids
    that, tracing fails with an error that names this function. What the process has compiled before is compiled again.

    Args:
        model: any module that contains LReg layers.
        enabled: False forgets what was gathered; the layers cost nothing again.
        adapter_name: which adapter; None takes the active ones of every layer.
        n_rows: rows (samples, or tokens, or pixels) to note per module and backward pass, evenly strided.
        n_hard_samples: count, per backward pass, so many of the noted rows, those with the largest gradient, as hits
            for `strategy="paper"`. None counts none.

    Raises:
        ValueError: if the model has no mesh that can move, or a number is below 1.
        TypeError: for arguments of a wrong type.
        RuntimeError: if parameters are sharded.
    """
    whole("n_rows", n_rows, 1)
    whole("n_hard_samples", n_hard_samples, 1, optional=True)
    sites = movable_sites(model, adapter_name)
    for site in sites if enabled else ():
        check_whole(site)
    for site in sites:
        gathering = statistics_of(site)
        if gathering is not None:
            gathering.stop()
        if enabled:
            RunningStatistics(site, n_rows, n_hard_samples).start()
    torch.compiler.reset()  # compiled code does not notice that a module has got its first hook, or lost the last


def _sides(positions: tuple[int, ...], on_grid: bool) -> tuple[int, ...]:
    """Positions in space, those of a square image for the tokens of one."""
    return (math.isqrt(positions[0]),) * 2 if on_grid and len(positions) == 1 else positions


def _locate_finite(coords: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """`locate`, with rows that are not finite in an element of their own, numbered `n_nodes - 1`."""
    finite = torch.isfinite(coords).all(dim=-1, keepdim=True)
    element, local = locate(torch.where(finite, coords, 0.0), nodes.to(coords.device), validate=False)
    return torch.where(finite, element, nodes.shape[1] - 1), local


def _sort_rows(rows: list[_Rows], nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Energy, moments and node gradient of `MeshStatistics`."""
    device = rows[-1][0].device
    coords, energy, slope = (torch.cat([part.to(device) for part in parts]) for parts in zip(*rows, strict=True))
    # Rows without a gradient (padding, ignored labels) say nothing of the loss; rows that overflowed must not spread.
    # Neither can be left out by an index without waiting for the device, so they get an element of their own.
    counts = torch.isfinite(energy) & torch.isfinite(slope).all(dim=-1) & (energy > 0)
    energy, slope = torch.where(counts, energy, 0.0), torch.where(counts.unsqueeze(-1), slope, 0.0)
    element, local = _locate_finite(torch.where(counts.unsqueeze(-1), coords, torch.nan), nodes)
    n_nodes = nodes.shape[1]
    return (
        element_sums(element, energy.unsqueeze(-1), n_nodes)[:, :-1],
        element_moments(element, local, n_nodes)[:, :-1],
        node_gradient(element, local, slope, n_nodes)[:, :-1],
    )
