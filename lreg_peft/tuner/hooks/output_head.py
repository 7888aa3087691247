"""What changes for a Transformers model whose output layer is wrapped.

Weight tying names parameters by path: adjusted. Resizing the vocabulary replaces the layer, and fused losses of others
read its weight without calling it: both would lose the adapter in silence, and are noticed in the next forward pass.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...modules import is_compiling, remove_hooks
from ..layer import LRegLayer, LRegLinear, this_thread
from ..placement import output_head_name

# Where a model keeps the name of its wrapped output layer: looking for it takes longer than a short forward pass.
_NAME = "_lreg_output_head"
_TIED = ("_tied_weights_keys", "all_tied_weights_keys")


def install(model: nn.Module) -> None:
    """Make `model` consistent with its wrapped output layer; without one nothing happens. May be called again."""
    name = output_head_name(model)
    if name is None or not isinstance(layer := model.get_submodule(name), LRegLayer):
        return
    assert isinstance(model, PreTrainedModel)
    layer.is_output_layer = True
    if _NAME in model.__dict__:
        return
    model.__dict__[_NAME] = name
    tied = model.all_tied_weights_keys  # as expanded at construction: patterns no longer match behind a wrapper
    own, wrapped = f"{name}.", f"{name}.base_layer."
    renamed = {_swap(k, own, wrapped): _swap(v, own, wrapped) for k, v in tied.items()}
    for attribute in _TIED:
        if tied:
            setattr(model, attribute, dict(renamed))
    model.register_forward_pre_hook(begin_pass)
    model.register_forward_hook(check_output_layer)


def release(model: nn.Module) -> None:
    """Undo `install`; the tied keys come back when the layer is unwrapped, see `restore_tied_keys`."""
    if model.__dict__.pop(_NAME, None) is not None:
        model.__dict__.pop("_tied_weights_keys", None)
        remove_hooks(model, begin_pass, check_output_layer)


def restore_tied_keys(model: nn.Module) -> None:
    """Recompute the expanded tying map, once the output layer is unwrapped."""
    if isinstance(model, PreTrainedModel):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _swap(key: str, old: str, new: str) -> str:
    return new + key.removeprefix(old) if key.startswith(old) and not key.startswith(new) else key


def wrapped_head(model: nn.Module) -> LRegLayer | None:
    """The output layer of `model` if it carries a shortcut."""
    name = model.__dict__.get(_NAME)
    layer = None if name is None else model.get_submodule(name)
    return layer if isinstance(layer, LRegLayer) else None


def begin_pass(model: nn.Module, args: Any) -> None:
    """Forward pre-hook: the adapter on the output layer is there, and of its size."""
    if is_compiling():
        return
    this_thread.output_layer_ran = False
    layer = wrapped_head(model)
    if layer is None or _is_resized(model, layer):
        raise RuntimeError(
            "the output layer was replaced or resized after the LReg adapter was added to it, and the adapter is lost. "
            "Resize the embeddings first, on the base model, and add the adapter afterwards."
        )


def check_output_layer(model: nn.Module, args: Any, output: Any) -> None:
    """Forward hook: the adapter on the output layer had a part in this pass."""
    layer = None if is_compiling() else wrapped_head(model)
    if layer is None or layer.disable_adapters or layer.ran_compiled or not layer.stacked_adapters:
        return
    if not this_thread.output_layer_ran:
        raise RuntimeError(
            "the model computed its output without calling its output layer, so the LReg adapter there had no part in "
            "it. A fused loss (such as Liger's linear cross-entropy) reads the layer's weight directly: switch it off "
            "(use_liger_kernel=False), or put the adapter on other modules."
        )


def _is_resized(model: nn.Module, layer: LRegLayer) -> bool:
    """Whether the output embedding has other rows than the shortcuts: those of its weight, of which a new vocabulary
    leaves no other trace in a tied layer."""
    embedding = model.get_output_embeddings()  # type: ignore[operator]
    weight = getattr(embedding, "weight", None)
    widths = {part.out_features for part in layer.lreg_coefficients.values()}
    if type(embedding) is LRegLinear:
        embedding = embedding.get_base_layer()
    if type(embedding) is not nn.Linear or not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.numel():
        return False  # packed, or partitioned over processes
    return not widths <= {len(weight)}
