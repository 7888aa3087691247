"""A warning where an adapter is used without the start from data that its configuration asks for."""

import warnings
from typing import Any

import torch
from torch import nn

from ...modules import is_compiling, remove_hooks
from ..layer import LRegLayer


def install(model: nn.Module, adapter_name: str) -> None:
    """Warn if training begins before the start from data.

    One layer stands for all: the start is made for every layer or none.
    """
    for layer in model.modules():
        if isinstance(layer, LRegLayer) and adapter_name in layer.needs_data_init:
            remove_hooks(layer, remind)
            layer.register_forward_pre_hook(remind)
            return


def warn(before: str, consequence: str, *, stacklevel: int) -> None:
    """Warn that the start from data has not been made.

    Args:
        before: what begins now.
        consequence: what that means for projection and mesh.
        stacklevel: as in `warnings.warn`, seen from the caller.
    """
    warnings.warn(
        "The init_weights of this LRegConfig asks for a start from data, but initialize_lreg_weights(model, "
        f"dataloader) was not called before {before}: {consequence}.",
        UserWarning,
        stacklevel=stacklevel + 1,
    )


def remind(layer: Any, args: tuple[object, ...]) -> None:
    """Forward pre-hook that acts once, in the first pass that trains the layer."""
    if is_compiling() or not (torch.is_grad_enabled() and layer.training):
        return
    remove_hooks(layer, remind)
    if layer.needs_data_init.intersection(layer.active_adapters):
        warn("training", "the adapter starts from a random projection and uniform meshes", stacklevel=2)
