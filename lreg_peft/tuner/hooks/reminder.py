"""A warning where an adapter is used without the start from data that its configuration promised."""

import warnings

import torch
from torch import nn

from ...modules import is_compiling, remove_hooks
from ..layer import LRegLayer
from .registry import remember


def install(model: nn.Module) -> None:
    """Warn if training begins before the start from data."""
    remember(model, release)
    remove_hooks(model, _remind)
    model.register_forward_pre_hook(_remind)


def release(model: nn.Module) -> None:
    """Undo `install`."""
    remove_hooks(model, _remind)


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


def _remind(model: nn.Module, args: tuple[object, ...]) -> None:
    if is_compiling() or not torch.is_grad_enabled():
        return
    owing = [module for module in model.modules() if isinstance(module, LRegLayer) and module.start_is_owed]
    if not any(module.training for module in owing):
        return
    for module in owing:
        module.start_is_owed.clear()
    warn("training", "the adapter starts from a random projection and uniform meshes", stacklevel=2)
