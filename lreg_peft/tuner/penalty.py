"""The curvature penalty, added to the gradient of the coefficients once per optimiser step, or per call of its closure.

A penalty in the forward pass would count once per micro-batch under gradient accumulation, and again for every layer
that gradient checkpointing recomputes. A hook before the step of every optimiser of the process leaves the user's
loss and loop as they are.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..core.basis import curvature_penalty
from .step_hooks import LossHook


class CurvatureTerm(NamedTuple):
    """One penalised adapter.

    Attributes:
        weight: of the penalty.
        nodes: `[components, dof]`.
        parameter: the one that lives on the mesh, in the shape that its head keeps it in.
        to_nodes: brings it to one entry per node, `[components, dof, ...]`.
    """

    weight: float
    nodes: Tensor
    parameter: Tensor
    to_nodes: Callable[[Tensor], Tensor]

    def of(self, values: Tensor) -> Tensor:
        """The penalty for such values of the parameter."""
        nodal = self.to_nodes(values)
        return self.weight * curvature_penalty(self.nodes, nodal.flatten(2) if nodal.ndim > 2 else nodal.unsqueeze(2))


class Penalised(Protocol):
    """A layer that says which of its coefficients are penalised."""

    def curvature_terms(self) -> Iterator[CurvatureTerm]:
        """One per active adapter with a penalty."""
        ...


def value(layers: Iterable[Penalised]) -> Tensor | None:
    """What the penalty adds to the loss, over the given layers; None if none of them is penalised."""
    terms = [term.of(term.parameter.detach()) for layer in layers for term in layer.curvature_terms()]
    return sum(terms[1:], terms[0]) if terms else None


def _add_gradients(layer: Penalised, optimizer: Optimizer, owned: set[int]) -> Tensor | None:
    # A fused optimiser unscales mixed-precision gradients inside its step.
    scale = getattr(optimizer, "grad_scale", None)
    total: Tensor | None = None
    for term in layer.curvature_terms():
        if id(term.parameter) not in owned or term.parameter.grad is None:
            continue
        with torch.enable_grad():
            variable = term.parameter.detach().requires_grad_()
            own = term.of(variable)
            (gradient,) = torch.autograd.grad(own, variable)
        term.parameter.grad.add_(gradient if scale is None else gradient * scale)
        total = own.detach() if total is None else total + own.detach()
    return total


penalised: LossHook[Penalised] = LossHook(_add_gradients)
#: Penalise the coefficients of a layer from now on, in every optimiser that holds them.
watch = penalised.add
