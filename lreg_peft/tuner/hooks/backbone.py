"""What a frozen model does while an adapter of it trains: it stays in eval mode, and builds no graph for nothing.

Li, Cheng & Gu (2025), section 2.7, train shortcuts on a frozen network with dropout off and fixed batch-norm
statistics. The switch must survive every `model.train()`, which training loops call all the time.
"""

import inspect
from collections.abc import Callable
from functools import partial
from types import CodeType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from ...modules import is_compiling, remove_hooks
from .registry import remember

logger = logging.get_logger(__name__)

_NAME = "_lreg_first_layer"
_SAID = "_lreg_said_what_is_off"
# Of `enable_input_require_grads` in transformers and `prepare_model_for_kbit_training` in PEFT.
_REQUIRE_GRADS = ("make_inputs_require_grads", "make_inputs_require_grad")


class _Checkpoint:
    """A checkpointing function that runs its layer in eval mode, now and when backward recomputes it.

    Transformers checkpoints a layer only if the layer itself is in train mode, so that flag stays set and is lowered
    just while the layer's forward runs (some layers apply dropout of their own there).
    """

    def __init__(self, checkpoint: Callable[..., Any], layer: nn.Module) -> None:
        self.checkpoint = checkpoint
        self.layer = layer
        self.in_eval = False

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def forward_in_eval(*inputs: Any, **named: Any) -> Any:
            mode, self.layer.training = self.layer.training, self.layer.training and not self.in_eval
            try:
                return forward(*inputs, **named)
            finally:
                self.layer.training = mode

        if not torch.is_grad_enabled():  # nothing will be recomputed, and reentrant checkpoints warn of that
            return forward_in_eval(*args, **kwargs)
        # A reentrant checkpoint gives no gradients at all if no input has one. Nothing before this layer needs a graph
        # then, and whatever trains inside the layer gets its own.
        if self.is_reentrant and not any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(args)):
            return forward_in_eval(*args, **kwargs)
        return self.checkpoint(forward_in_eval, *args, **kwargs)

    @property
    def is_reentrant(self) -> bool:
        """Of torch's two kinds of checkpoints; which one is not said, it may be."""
        keywords = self.checkpoint.keywords if isinstance(self.checkpoint, partial) else {}
        return bool(keywords.get("use_reentrant", True))


def hold_in_eval(model: nn.Module) -> bool:
    """Put everything in eval mode but adapter layers, `modules_to_save` and what carries hooks that ask for the mode;
    say whether layers are checkpointed."""
    if isinstance(model, AuxiliaryTrainingWrapper):
        return False
    checkpointed = isinstance(model, GradientCheckpointingLayer) and model.gradient_checkpointing
    if checkpointed:
        _take_over_checkpoint(model, in_eval=True)
        model.training = True
    elif not isinstance(model, BaseTunerLayer):
        model.training = _mode_is_for_hooks(model)
    return any([checkpointed, *map(hold_in_eval, model.children())])


def _take_over_checkpoint(layer: nn.Module, *, in_eval: bool) -> None:
    checkpoint: Any = layer._gradient_checkpointing_func
    if not isinstance(checkpoint, _Checkpoint):
        checkpoint = layer._gradient_checkpointing_func = _Checkpoint(checkpoint, layer)  # type: ignore[assignment]
    checkpoint.in_eval = in_eval


def _mode_is_for_hooks(module: nn.Module) -> bool:
    """Whether somebody's hooks on a module ask for its mode and the module itself does not.

    Noisy embeddings (NEFTune) are such hooks: in train mode they act, and the embedding is the same in both.
    """
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(map(_reads_mode, hooks)) and not _reads_mode_itself(module)


def _reads_mode_itself(module: nn.Module) -> bool:
    methods = (
        value
        for kind in type(module).__mro__
        if kind not in (nn.Module, object)
        for value in vars(kind).values()
        if callable(value)
    )
    return any(map(_reads_mode, methods)) or _reads_mode(module.__dict__.get("forward"))


def _reads_mode(function: Any) -> bool:
    """Whether the code of a function names the attribute `training`."""
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function) if callable(function) else function
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return code is not None and _names_training(code)


def _names_training(code: CodeType) -> bool:
    return "training" in code.co_names or any(
        _names_training(constant) for constant in code.co_consts if isinstance(constant, CodeType)
    )


def before_forward(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook of the base model, for what `LRegModel.train` does not see.

    Adapters injected without a `PeftModel` leave `train()` to the model itself, which switches dropout on; and
    checkpointing may be switched on or off after `train()`. Adapter layers are in train mode whenever the model trains.
    """
    if is_compiling():
        return None
    in_eval = asks_for_eval(model)
    checkpointed = hold_in_eval(model) if in_eval else False
    if in_eval:
        _say_what_is_off(model)
    if torch.is_grad_enabled():
        _let_autograd_decide(model, in_eval=in_eval)
    if checkpointed and "use_cache" in inspect.signature(model.forward).parameters:
        # Transformers switches the key-value cache off if the stack itself is in train mode. With a cache, the layers
        # that backward recomputes would find their own keys in it.
        return args, {**kwargs, "use_cache": False}
    return None


def _say_what_is_off(model: nn.Module) -> None:
    """Name, once for a model, the settings that have no effect in eval mode."""
    if _SAID in model.__dict__:
        return
    model.__dict__[_SAID] = True
    found: dict[str, float] = {}
    blind = []
    for path, module in model.named_modules():
        if module.training or isinstance(module, AuxiliaryTrainingWrapper):
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            found.setdefault(f"{path.rpartition('.')[2]} (p={module.p:g})", module.p)
        for name, value in vars(module).items():
            switched = any(word in name.lower() for word in ("dropout", "drop_path", "layerdrop", "jitter"))
            if switched and isinstance(value, float) and value > 0:
                found.setdefault(f"{name}={value:g}", value)
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(_reads_mode(hook) for hook in hooks if not getattr(hook, "__module__", "").startswith("lreg_peft.")):
            blind.append(path or type(module).__name__)
    if found:
        logger.warning(
            f"backbone_eval=True keeps the frozen model in eval mode while its LReg adapter trains, so these have no "
            f"effect: {', '.join(found)}. LRegConfig(backbone_eval=False) leaves them on."
        )
    if blind:
        logger.warning(
            f"hooks on {', '.join(map(repr, blind))} ask whether the module trains, and are told that it does not: "
            "backbone_eval=True keeps it in eval mode. LRegConfig(backbone_eval=False) lets them act."
        )


def _let_autograd_decide(model: nn.Module, *, in_eval: bool) -> None:
    """Have no graph built because of `enable_input_require_grads` alone.

    Reentrant checkpoints want an input that requires gradients, and so does the preparation of quantised models. With a
    frozen network that would send gradients through every layer, down to the embeddings, for nobody. Where the
    embeddings are cut off from that request, a graph begins at whatever really trains: a parameter, keys of a prefix,
    something that a hook adds.
    """
    embedding = _input_embeddings(model)
    hooks = [] if embedding is None else list(embedding._forward_hooks.values())
    if embedding is None or not any(getattr(hook, "__name__", None) in _REQUIRE_GRADS for hook in hooks):
        return
    checkpoints = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    for layer in checkpoints:
        _take_over_checkpoint(layer, in_eval=in_eval)
    below = _backbone(model)
    trains = below is None or any(parameter.requires_grad for parameter in below.parameters())
    if checkpoints:  # reentrant ones save memory only from the first layer on whose input requires gradients
        wanted = not (trains and any(layer._gradient_checkpointing_func.is_reentrant for layer in checkpoints))
    else:  # what we do not see as checkpoints may be some all the same, and need the request if anything trains
        wanted = not trains and below is not None and not _has_company(below)
    if not wanted or hooks[-1] is not cut_off:
        remove_hooks(embedding, cut_off)
    if wanted and (not hooks or hooks[-1] is not cut_off):
        embedding.register_forward_hook(cut_off)


def cut_off(module: nn.Module, args: Any, output: Any) -> Tensor | None:
    """Forward hook of the embedding, after all others: take back a request that is for nothing else.

    A tensor with a history is something that trains. One without was asked to require gradients here.
    """
    if is_compiling() or not isinstance(output, Tensor) or not (output.requires_grad and output.is_leaf):
        return None
    return output.detach()


def _has_company(module: nn.Module) -> bool:
    """Whether somebody has hooks in a module, besides those that ask for gradients."""
    return any(
        getattr(hook, "__name__", None) not in _REQUIRE_GRADS and hook is not cut_off
        for part in module.modules()
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    )


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return embedding if isinstance(embedding, nn.Module) else None


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


def install(model: nn.Module) -> None:
    """Register the hooks of this file once."""
    remember(model, release)
    if before_forward not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(before_forward, with_kwargs=True)


def _backbone(model: nn.Module) -> nn.Module | None:
    """The part of a Transformers model below its heads; None if it is not a part."""
    prefix = getattr(model, "base_model_prefix", "")
    backbone = getattr(model, prefix, None) if prefix else None
    return backbone if isinstance(backbone, nn.Module) and backbone is not model else None


def release(model: nn.Module) -> None:
    """Undo `install` and the hold on checkpointing, when the last adapter is removed."""
    for name in (_NAME, _SAID):
        model.__dict__.pop(name, None)
    remove_hooks(model, before_forward)
    if (embedding := _input_embeddings(model)) is not None:
        remove_hooks(embedding, cut_off)
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, _Checkpoint):
            module._gradient_checkpointing_func = checkpoint.checkpoint  # type: ignore[assignment,arg-type]
