"""The curvature penalty, added to the gradient of the coefficients once per optimiser step.

A penalty in the forward pass would count once per micro-batch under gradient accumulation, and again for every layer
that gradient checkpointing recomputes. A hook before the step of every optimiser of the process leaves the user's
loss and loop as they are.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ..core import curvature_penalty
from .step_hooks import StepHook


class Penalised(Protocol):
    """A layer that says which of its coefficients are penalised."""

    def curvature_terms(self) -> Iterator[tuple[float, Tensor, Tensor]]:
        """(weight, nodes `[components, dof]`, parameter) per active adapter.

        The parameter holds values at nodes: `[components, dof, out_features]`, without the first node (which is zero
        then), or `[components, dof]`.
        """
        ...


def value(layers: Iterable[Penalised]) -> Tensor | None:
    """What the penalty adds to the loss, over the given layers; None if none of them is penalised."""
    terms = [
        weight * curvature_penalty(nodes, _nodal(coefficients.detach(), nodes))
        for layer in layers
        for weight, nodes, coefficients in layer.curvature_terms()
    ]
    return sum(terms[1:], terms[0]) if terms else None


def _add_gradients(layer: Penalised, optimizer: Optimizer, owned: set[int]) -> None:
    # A fused optimiser unscales mixed-precision gradients inside its step.
    scale = getattr(optimizer, "grad_scale", None)
    for weight, nodes, coefficients in layer.curvature_terms():
        if id(coefficients) not in owned or coefficients.grad is None:
            continue
        with torch.enable_grad():
            variable = coefficients.detach().requires_grad_()
            penalty = curvature_penalty(nodes, _nodal(variable, nodes))
            (gradient,) = torch.autograd.grad(weight * penalty, variable)
        coefficients.grad.add_(gradient if scale is None else gradient * scale)


penalised: StepHook[Penalised] = StepHook(register_optimizer_step_pre_hook, _add_gradients)
#: Penalise the coefficients of a layer from now on, in every optimiser that holds them.
watch = penalised.add


def _nodal(values: Tensor, nodes: Tensor) -> Tensor:
    """Bring the parameter of any head to `[components, dof, out_features]`."""
    if values.ndim == 2:
        return values.unsqueeze(-1)
    return values if values.shape[1] == nodes.shape[1] else F.pad(values, (0, 0, 1, 0))
