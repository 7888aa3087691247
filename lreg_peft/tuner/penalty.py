"""The curvature penalty of a model, a term for the training loss."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..core.basis import curvature_penalty as penalty_of
from ..core.encoder import LagrangeEncoder
from .layer import LRegLayer


def curvature_penalty(model: nn.Module) -> Tensor:
    """`curvature_weight` times the mean absolute curvature of the coefficients along the mesh, over all shortcuts.

    Add it to the loss once per optimiser step (`LRegCallback` does so in a Trainer):

        loss = model(**batch).loss + lreg_peft.curvature_penalty(model)

    Li, Cheng & Gu (2025), Algorithm 1; see `core.curvature_penalty` for meshes that are not uniform.

    Args:
        model: any module with LReg layers; active adapters with a positive `curvature_weight` count.

    Returns:
        A scalar in fp32, differentiable; zero where nothing is penalised.
    """
    total = torch.zeros(())
    for weight, encoder, parameter in _penalised(model):
        term = weight * penalty_of(encoder.nodes, encoder.to_nodes(parameter))
        total = total.to(term.device) + term.float()
    return total


def add_penalty_gradient(model: nn.Module) -> None:
    """Add the gradient of `curvature_penalty(model)` to what a backward pass has left in `.grad`.

    Raises:
        RuntimeError: if something is penalised and no gradient is there.
    """
    parameters = [parameter for _, _, parameter in _penalised(model) if parameter.requires_grad]
    reached = [parameter for parameter in parameters if parameter.grad is not None]
    if parameters and not reached:
        raise RuntimeError(
            "the curvature penalty is added to the gradients of the coefficients, and there are none: engines such as "
            "DeepSpeed keep them elsewhere. Train without such an engine, or with LRegConfig(curvature_weight=0)."
        )
    if reached:
        with torch.enable_grad():  # not backward(): wrappers of several processes listen to that
            gradients = torch.autograd.grad(curvature_penalty(model), reached)
        for parameter, gradient in zip(reached, gradients, strict=True):
            parameter.grad.add_(gradient)  # type: ignore[union-attr]


def is_penalised(model: nn.Module) -> bool:
    """Whether an active adapter has a positive `curvature_weight`."""
    return any(True for _ in _penalised(model))


def _penalised(model: nn.Module) -> Iterator[tuple[float, LagrangeEncoder, nn.Parameter]]:
    """Weight of the penalty, the curve, and the parameter on its mesh."""
    for layer in model.modules():
        if isinstance(layer, LRegLayer):
            for name in layer.active_adapters:
                if layer.curvature_weight.get(name, 0) > 0:
                    yield layer.curvature_weight[name], layer.parts(name)[1], layer.nodal_parameter(name)
