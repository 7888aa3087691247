"""Keeping the frozen model in eval mode while an adapter trains.

Li, Cheng & Gu (2025), section 2.7, train shortcuts on a frozen network with dropout off and fixed batch-norm
statistics. The switch must survive every `model.train()`, which training loops call all the time.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ...modules import is_compiling, remove_hooks
from .registry import remember

_NAME = "_lreg_first_layer"


class _CheckpointInEval:
    """A checkpointing function that runs its layer in eval mode, now and when backward recomputes it.

    Transformers checkpoints a layer only if the layer itself is in train mode, so that flag stays set and is lowered
    just while the layer's forward runs (some layers apply dropout of their own there).
    """

    def __init__(self, checkpoint: Callable[..., Any], layer: nn.Module) -> None:
        self.checkpoint = checkpoint
        self.layer = layer

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def forward_in_eval(*inputs: Any, **named: Any) -> Any:
            self.layer.training = False
            try:
                return forward(*inputs, **named)
            finally:
                self.layer.training = True

        if not torch.is_grad_enabled():  # nothing will be recomputed, and reentrant checkpoints warn of that
            return forward_in_eval(*args, **kwargs)
        return self.checkpoint(forward_in_eval, *args, **kwargs)


def hold_in_eval(model: nn.Module) -> bool:
    """Put everything in eval mode but adapter layers and `modules_to_save`; say whether layers are checkpointed."""
    if isinstance(model, AuxiliaryTrainingWrapper):
        return False
    checkpointed = isinstance(model, GradientCheckpointingLayer) and model.gradient_checkpointing
    if checkpointed:
        checkpoint = model._gradient_checkpointing_func
        if not isinstance(checkpoint, _CheckpointInEval):
            model._gradient_checkpointing_func = _CheckpointInEval(checkpoint, model)  # type: ignore[assignment,arg-type]
        model.training = True
    elif not isinstance(model, BaseTunerLayer):
        model.training = False
    return any([checkpointed, *map(hold_in_eval, model.children())])


def hold_before_forward(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook of the base model, for what `LRegModel.train` does not see.

    Adapters injected without a `PeftModel` leave `train()` to the model itself, which switches dropout on; and
    checkpointing may be switched on or off after `train()`. Adapter layers are in train mode whenever the model trains.
    """
    if is_compiling() or not asks_for_eval(model):
        return None
    checkpointed = hold_in_eval(model)
    if checkpointed and "use_cache" in inspect.signature(model.forward).parameters:
        # Transformers switches the key-value cache off if the stack itself is in train mode. With a cache, the layers
        # that backward recomputes would find their own keys in it.
        return args, {**kwargs, "use_cache": False}
    return None


def asks_for_eval(model: nn.Module) -> bool:
    """Whether `model` is training and an active LReg adapter of it wants the backbone in eval mode."""
    configs = getattr(model, "peft_config", {})
    layer = _some_adapter_layer(model)
    if layer is None or not layer.training or layer.disable_adapters:
        return False
    return any(getattr(configs.get(name), "backbone_eval", False) for name in layer.active_adapters)


def _some_adapter_layer(model: nn.Module) -> BaseTunerLayer | None:
    """The first adapter layer; its name is kept, because a walk over all modules costs more than a short forward."""
    name = model.__dict__.get(_NAME)
    if name is not None:
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            layer = None
        if isinstance(layer, BaseTunerLayer):
            return layer
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            model.__dict__[_NAME] = name
            return module
    return None


def leave_out_of_graph(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the backbone: no graph if it holds nothing that trains and gets nothing that does.

    Frozen weights alone do not build a graph. But `gradient_checkpointing_enable()` and the preparation of quantised
    models make the embeddings' output require gradients, which would then be computed for every layer.
    """
    if is_compiling() or not torch.is_grad_enabled():
        return
    inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if any(tensor.requires_grad for tensor in (*inputs, *module.parameters())):
        return
    module._lreg_left_graph = True  # type: ignore[assignment]
    torch.set_grad_enabled(False)


def return_to_graph(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook, also after an error: undo `leave_out_of_graph`."""
    if module.__dict__.pop("_lreg_left_graph", False):
        torch.set_grad_enabled(True)


def install(model: nn.Module) -> None:
    """Register the hooks of this file once."""
    remember(model, release)
    if hold_before_forward not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(hold_before_forward, with_kwargs=True)
        if (backbone := _backbone(model)) is not None:
            backbone.register_forward_pre_hook(leave_out_of_graph, with_kwargs=True)
            backbone.register_forward_hook(return_to_graph, always_call=True)


def _backbone(model: nn.Module) -> nn.Module | None:
    """The part of a Transformers model below its heads; None if it is not a part."""
    prefix = getattr(model, "base_model_prefix", "")
    backbone = getattr(model, prefix, None) if prefix else None
    return backbone if isinstance(backbone, nn.Module) and backbone is not model else None


def release(model: nn.Module) -> None:
    """Undo `install` and `hold_in_eval`'s hold on checkpointing, when the last adapter is removed."""
    model.__dict__.pop(_NAME, None)
    for module in filter(None, (model, _backbone(model))):
        remove_hooks(module, hold_before_forward, leave_out_of_graph, return_to_graph)
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, _CheckpointInEval):
            module._gradient_checkpointing_func = checkpoint.checkpoint  # type: ignore[assignment,arg-type]
