"""The curvature penalty of a model, a term for the training loss."""

import torch
from torch import Tensor, nn

from ..core.basis import curvature_penalty as penalty_of
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
    for layer in model.modules():
        if not isinstance(layer, LRegLayer):
            continue
        for name in layer.active_adapters:
            weight = layer.curvature_weight.get(name, 0)
            if weight > 0:
                _, encoder, _ = layer.parts(name)
                term = weight * penalty_of(encoder.nodes, encoder.to_nodes(layer.nodal_parameter(name)))
                total = total.to(term.device) + term.float()
    return total
