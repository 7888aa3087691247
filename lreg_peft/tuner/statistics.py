"""What a layer notes down while it trains, for the mesh that follows.

The gradient that arrives at the shortcut's output says, for any loss, how much each sample still asks of the shortcut:
its squared norm, summed over the samples in an element, is the residual energy of that element. Everything is noted
in the backward pass. A forward pass repeated by gradient checkpointing, or one of an evaluation, then counts for
nothing by itself. A backward pass counts when the optimiser steps, and not if that step is skipped.

Only rows of a few kilobytes are kept per backward pass; they are sorted into elements many passes at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ..core.adapt.indicators import element_moments, element_sums, node_gradient
from ..core.mesh import coordinate_dtype, locate
from .step_hooks import StepHook

#: Rows noted per backward pass. 50 passes see 6,400 of them, over sixty per element at dof 100.
DEFAULT_ROWS = 128

# Rows to collect before they are sorted into elements. Sorting costs some sixty small kernels, whatever their number.
_ROWS_PER_FOLD = 4096

_NO_GRAPH = (
    "lreg_peft notes gradients down with tensor hooks, which a graph cannot hold. Compile without fullgraph=True, or "
    "call track_statistics(model, False) and keep the meshes as they are."
)


@dataclass(frozen=True)
class MeshStatistics:
    """Sums over the samples of the committed steps, per component and element.

    Attributes:
        energy: `[components, dof - 1]`, squared gradient at the shortcut's output.
        moments: `[components, dof - 1, 3]`, see `core.adapt.element_moments`.
        node_gradient: `[components, dof]`, see `core.adapt.node_gradient`.
        hits: `[components, dof - 1]`, the hardest samples (Li, Cheng & Gu 2025, Algorithm 1).
    """

    energy: Tensor
    moments: Tensor
    node_gradient: Tensor
    hits: Tensor

    @classmethod
    def empty(cls, nodes: Tensor) -> "MeshStatistics":
        """All zero, for meshes `[components, dof]`."""
        components, dof = nodes.shape
        return cls(
            nodes.new_zeros(components, dof - 1),
            nodes.new_zeros(components, dof - 1, 3),
            nodes.new_zeros(components, dof),
            nodes.new_zeros(components, dof - 1),
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four sums, in the order of the attributes."""
        return self.energy, self.moments, self.node_gradient, self.hits

    def __add__(self, other: "MeshStatistics") -> "MeshStatistics":
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return MeshStatistics(*(mine + theirs.to(mine.device) for mine, theirs in pairs))


@dataclass
class _Rows:
    """Some rows of one backward pass.

    `coords` `[rows, components]`, `energy` `[rows]`, and `slope` `[rows, components]`, the gradient in the
    coordinates, which the backward pass reaches after the energy.
    """

    coords: Tensor
    energy: Tensor
    slope: Tensor | None = None


class _Account:
    """Rows and hits not yet sorted, and the sums of those that are."""

    def __init__(self) -> None:
        self.rows: list[_Rows] = []
        self.hard: list[Tensor] = []  # [samples, components]: coordinates of the hardest samples
        self.sums: MeshStatistics | None = None

    def is_empty(self) -> bool:
        return not self.rows and not self.hard and self.sums is None

    def is_full(self) -> bool:
        return sum(len(tensor) for tensor in (*(rows.coords for rows in self.rows), *self.hard)) > _ROWS_PER_FOLD

    def fold(self, nodes: Tensor) -> MeshStatistics:
        """Sort everything into the elements of `nodes`; never synchronises."""
        sums = MeshStatistics.empty(nodes) if self.sums is None else self.sums
        rows = [entry for entry in self.rows if entry.slope is not None]  # without: the backward pass was cut short
        if rows:
            sums = sums + _sort_rows(rows, nodes)
        if self.hard:
            element, _ = _locate_finite(torch.cat(self.hard), nodes)
            hits = element_sums(element, nodes.new_ones(()), nodes.shape[1])[:, :-1]
            sums = MeshStatistics(sums.energy, sums.moments, sums.node_gradient, sums.hits + hits.to(sums.hits.device))
        self.rows, self.hard, self.sums = [], [], sums
        return sums

    def absorb(self, other: "_Account", found_inf: Tensor | None) -> None:
        """Take over what `other` holds, or nothing of it if the one element of `found_inf` is not zero."""
        if found_inf is not None:
            # A fused optimiser is called for skipped steps too and looks at this flag on the device, as done here:
            # rows that are not finite are left out when they are sorted.
            for rows in other.rows:
                rows.energy = torch.where(found_inf.to(rows.energy.device) > 0, torch.nan, rows.energy)
            other.hard = [torch.where(found_inf.to(hard.device) > 0, torch.nan, hard) for hard in other.hard]
            if other.sums is not None:
                sums = (torch.where(found_inf.to(part.device) > 0, 0.0, part) for part in other.sums.tensors())
                other.sums = MeshStatistics(*sums)
        self.rows += other.rows
        self.hard += other.hard
        if other.sums is not None:
            self.sums = other.sums if self.sums is None else self.sums + other.sums


class RunningStatistics:
    """Gathers the statistics of one adapter in one layer.

    Backward passes go to a pending account, a step of the optimiser moves that to the committed one. A skipped step
    leaves it pending, and it is dropped when the next backward pass finds the gradients cleared.

    Copies and pickles start empty.

    Args:
        n_rows: rows to note per backward pass, evenly strided, starting one further each time.
        n_hard_samples: rows with the largest gradient that count as hits; None counts none.
    """

    def __init__(self, n_rows: int = DEFAULT_ROWS, n_hard_samples: int | None = None) -> None:
        self.n_rows = n_rows
        self.n_hard_samples = n_hard_samples
        #: Coordinates of the last training pass, `[..., components]`.
        self.coords: Tensor | None = None
        self._committed = _Account()
        self._pending = _Account()
        self._n_passes = 0
        self._saw_gradient = False  # whether the coefficients received a gradient since the last step
        self._watched: Tensor | None = None
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.n_rows, self.n_hard_samples)

    @torch.compiler.disable(reason=_NO_GRAPH)
    def observe(
        self, coords: Tensor, parameter: Tensor, nodes: Tensor, head: Callable[[Tensor], Tensor]
    ) -> "Observation | None":
        """Prepare to note down what the backward pass of a head will see.

        Args:
            coords: `[..., components]`.
            parameter: the coefficients behind `head`; statistics count when an optimiser steps on them.
            nodes: `[components, dof]`.
            head: from coordinates to the shortcut's output `[..., out_features]`.

        Returns:
            What to call `follow` of with the shortcut's output; None if there is nothing to train.
        """
        self.coords = coords.detach()
        if not (coords.requires_grad or parameter.requires_grad):
            return None
        self._watch(parameter)
        return Observation(self, coords, parameter, nodes, head)

    def count(self, hard: Tensor, parameter: Tensor) -> None:
        """Count samples `[samples, components]` of coordinates as hits of the step in progress."""
        self._forget_skipped_step(parameter)
        self._pending.hard.append(hard)

    def commit(self, nodes: Tensor, found_inf: Tensor | None) -> None:
        """The optimiser has stepped: what is pending counts."""
        if not self._pending.is_empty():
            self._committed.absorb(self._pending, found_inf)
            self._pending = _Account()
            if self._committed.is_full():
                self._committed.fold(nodes)
        self._saw_gradient = False

    def read(self, nodes: Tensor) -> MeshStatistics:
        """The sums of the committed steps."""
        return self._committed.fold(nodes)

    def reset(self) -> None:
        """Forget the committed steps."""
        self._committed = _Account()

    def stop(self) -> None:
        """Take the hook off the coefficients."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._watched = None

    def _watch(self, parameter: Tensor) -> None:
        if self._watched is parameter or not (parameter.requires_grad and parameter.is_leaf):
            return
        self.stop()

        def saw_gradient(parameter: Tensor) -> None:
            self._saw_gradient = True

        self._watched, self._handle = parameter, parameter.register_post_accumulate_grad_hook(saw_gradient)

    def _forget_skipped_step(self, parameter: Tensor) -> None:
        # A gradient came, no step followed, and the gradient is gone.
        if self._saw_gradient and parameter.grad is None:
            self._pending = _Account()
            self._saw_gradient = False


class Observation:
    """One forward pass that is being watched; see `RunningStatistics.observe`."""

    def __init__(
        self,
        account: RunningStatistics,
        coords: Tensor,
        parameter: Tensor,
        nodes: Tensor,
        head: Callable[[Tensor], Tensor],
    ) -> None:
        flat = coords.detach().reshape(-1, coords.shape[-1])
        stride = -(-len(flat) // account.n_rows) or 1
        #: The rows that are noted.
        self.picked = slice(account._n_passes % stride, None, stride)
        self._coords = flat[self.picked].clone()  # not a view: that would keep all rows alive
        self._account, self._parameter, self._nodes, self._head = account, parameter, nodes, head
        self._awaits_slope: list[_Rows] = []
        self._slope_comes = coords.requires_grad
        if self._slope_comes:
            coords.register_hook(self._note_slope)

    def follow(self, output: Tensor, spread: Callable[[Tensor], Tensor] | None = None) -> None:
        """Watch `[..., out_features]`: the shortcut's value, or a sum it is part of.

        Args:
            output: what is watched.
            spread: where the output has other positions than the coordinates, what takes the gradient to theirs.
        """
        if output.requires_grad:
            to_rows = spread or (lambda gradient: gradient)
            output.register_hook(lambda gradient: self.note(_pick(to_rows(gradient), self.picked)))

    def note(self, gradient: Tensor) -> None:
        """Note the gradient of the loss in the picked rows of the output, `[picked, out_features]`."""
        energy = torch.linalg.vector_norm(gradient, dim=-1, dtype=coordinate_dtype(gradient)).square()
        self.record(energy, None if self._slope_comes else _slope(self._head, self._coords, gradient))

    def record(self, energy: Tensor, slope: Tensor | None = None) -> None:
        """As `note`, from the squared norms `[picked]` of that gradient and, where the backward pass does not reach
        the coordinates, the gradient in them `[picked, components]`."""
        account = self._account
        account._forget_skipped_step(self._parameter)
        if account._pending.is_full():
            account._pending.fold(self._nodes)
        rows = _Rows(self._coords, energy, slope)
        if slope is None:
            self._awaits_slope.append(rows)
        account._pending.rows.append(rows)
        if account.n_hard_samples is not None:
            hardest = energy.topk(min(account.n_hard_samples, len(energy))).indices
            account._pending.hard.append(self._coords[hardest])
        account._n_passes += 1

    def _note_slope(self, gradient: Tensor) -> None:
        if self._awaits_slope:
            self._awaits_slope.pop().slope = _pick(gradient, self.picked).clone()


def _pick(gradient: Tensor, picked: slice) -> Tensor:
    """Rows of `[..., features]`, without a copy of the others."""
    if gradient.is_contiguous() or gradient.ndim < 3:
        return gradient.reshape(-1, gradient.shape[-1])[picked]
    shape = gradient.shape[:-1]
    rows = torch.arange(*picked.indices(shape.numel()), device=gradient.device)
    return gradient[torch.unravel_index(rows, shape)]


def _slope(head: Callable[[Tensor], Tensor], coords: Tensor, gradient: Tensor) -> Tensor:
    """dL/du where autograd does not compute it: nothing below the coordinates is trained."""
    with torch.enable_grad(), torch.autocast(coords.device.type, enabled=False):
        variable = coords.clone().requires_grad_()
        (slope,) = torch.autograd.grad(head(variable), variable, gradient)
    return slope


def _locate_finite(coords: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """`locate`, with rows that are not finite in an element of their own, numbered `dof - 1`."""
    finite = torch.isfinite(coords).all(dim=-1, keepdim=True)
    element, local = locate(torch.where(finite, coords, 0.0), nodes.to(coords.device), validate=False)
    return torch.where(finite, element, nodes.shape[1] - 1), local


def _sort_rows(rows: list[_Rows], nodes: Tensor) -> MeshStatistics:
    device = rows[-1].coords.device
    coords = torch.cat([entry.coords.to(device) for entry in rows])
    energy = torch.cat([entry.energy.to(device) for entry in rows])
    slope = torch.cat([entry.slope.to(device) for entry in rows if entry.slope is not None])
    # Rows without a gradient (padding, ignored labels) say nothing of the loss; rows that overflowed must not spread.
    # Neither can be left out by an index without waiting for the device, so they get an element of their own.
    counts = torch.isfinite(energy) & torch.isfinite(slope).all(dim=-1) & (energy > 0)
    energy, slope = torch.where(counts, energy, 0.0), torch.where(counts.unsqueeze(-1), slope, 0.0)
    element, local = _locate_finite(torch.where(counts.unsqueeze(-1), coords, torch.nan), nodes)
    dof = nodes.shape[1]
    return MeshStatistics(
        element_sums(element, energy.unsqueeze(-1), dof)[:, :-1],
        element_moments(element, local, dof)[:, :-1],
        node_gradient(element, local, slope, dof)[:, :-1],
        nodes.new_zeros(nodes.shape[0], dof - 1, device=device),
    )


class Observed(Protocol):
    """A layer that gathers statistics."""

    #: By adapter name.
    lreg_statistics: dict[str, RunningStatistics]
    lreg_nodes: Any

    def nodal_parameter(self, adapter_name: str) -> nn.Parameter:
        """The parameter that lives on the mesh."""
        ...


def _commit(layer: Observed, optimizer: Optimizer, owned: set[int]) -> None:
    found_inf = getattr(optimizer, "found_inf", None)
    for name, statistics in layer.lreg_statistics.items():
        if id(layer.nodal_parameter(name)) in owned:
            statistics.commit(layer.lreg_nodes[name], found_inf)


_committed: StepHook[Observed, None] = StepHook(register_optimizer_step_post_hook, _commit)
#: Commit what a layer gathers whenever an optimiser that holds its coefficients steps.
watch = _committed.add
#: Undo `watch`.
unwatch = _committed.discard
