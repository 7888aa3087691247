"""Moving one mesh of a model with everything that lives on it, and taking it back."""

from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..core.adapt.move import AdaptedMesh
from ..core.checks import show
from ..core.distributed import tensor_from_main
from .sites import Site


class Tentative:
    """Restores tensors on exit unless `keep()` was called.

        with Tentative(tensors) as trial:
            ...  # change them in place
            if better:
                trial.keep()

    Whatever else ends the block, an exception or an interruption too, leaves the tensors as they were, bit for bit.

    Args:
        tensors: what may change; the same one twice counts once.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list({id(tensor): tensor for tensor in tensors}.values())
        self._saved: list[Tensor] = []
        self._kept = False

    def keep(self) -> None:
        """Let the values of the end of the block stay."""
        self._kept = True

    def __enter__(self) -> "Tentative":
        self._saved = [tensor.detach().clone() for tensor in self._tensors]
        self._kept = False
        return self

    @torch.no_grad()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None or not self._kept:
            for tensor, value in zip(self._tensors, self._saved, strict=True):
                tensor.copy_(value)
        self._saved = []


@dataclass(frozen=True)
class Move:
    """A proposal for one site, and everything that lives on its mesh.

    Attributes:
        site: where.
        mesh: from where to where.
        values: the parameter on the mesh and the optimiser's state of it.
    """

    site: Site
    mesh: AdaptedMesh
    values: tuple[Tensor, ...]

    def state(self) -> tuple[Tensor, ...]:
        """The nodes and what lives on them."""
        return (self.site.nodes, *self.values)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the proposal in place."""
        for values in self.values:
            values.copy_(self._carry(values))
        self.site.nodes.copy_(self.mesh.nodes)

    def _carry(self, values: Tensor) -> Tensor:
        _, encoder, _ = self.site.layer.parts(self.site.adapter)
        return encoder.from_nodes(self.mesh.carry(encoder.to_nodes(values)), values)


def agreed(mesh: AdaptedMesh) -> AdaptedMesh:
    """What the main process proposes, with an old mesh that stays what it is while the site's nodes move."""
    return AdaptedMesh(tensor_from_main(mesh.nodes), mesh.old_nodes.clone())


def optimizer_state(site: Site, optimizer: Optimizer | None) -> list[Tensor]:
    """The state tensors that belong to single coefficients: moments, momentum, averages.

    Args:
        site: where.
        optimizer: the optimiser that trains the coefficients, or accelerate's wrapper of it; None has no state.

    Raises:
        TypeError: if it is no optimiser.
        ValueError: if the optimiser does not hold the coefficients, or holds state that cannot be interpolated.
    """
    if optimizer is None:
        return []
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    parameter = site.parameter
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer must be a torch optimizer or None, got {show(optimizer)}.")
    if not any(parameter is held for group in optimizer.param_groups for held in group["params"]):
        raise ValueError(
            f"the optimizer ({type(optimizer).__name__}) does not hold the coefficients of {site.module} (adapter "
            f"{site.adapter!r}), so it cannot be the one that trains them. Pass the optimizer that was built from this "
            "model's parameters, after the adapter was added."
        )
    if parameter not in optimizer.state:
        return []
    state = {
        name: value
        for name, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    }
    for name, value in state.items():
        if not value.is_floating_point():
            raise ValueError(
                f"the optimizer ({type(optimizer).__name__}) keeps {name!r} of {site.module} as {value.dtype}, which "
                "cannot be interpolated. Keep the state of the coefficients in floating point, or pass "
                "optimizer=None to leave it as it is."
            )
    return list(state.values())
