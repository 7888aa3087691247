"""Normalisations of the frozen model keep their running statistics while an adapter trains.

In train mode a batch norm normalises by the batch and moves its running statistics: the frozen model would change with
every batch. LoRA leaves that to the user; here it is part of what "frozen" means.
"""

from typing import Any

from torch import Tensor, nn

from ...modules import remove_hooks


def install(model: nn.Module) -> None:
    """Hold the normalisations with running statistics in eval mode; may be called again."""
    for module in model.modules():
        if isinstance(module._buffers.get("running_mean"), Tensor):
            remove_hooks(module, hold_in_eval)
            module.register_forward_pre_hook(hold_in_eval)


def hold_in_eval(module: nn.Module, args: Any) -> None:
    """Forward pre-hook; what trains itself, such as a copy in `modules_to_save`, stays in train mode."""
    if module.training and not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        module.training = False
