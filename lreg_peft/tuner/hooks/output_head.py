"""What changes for a Transformers model whose output head is wrapped.

Weight tying names parameters by path, resizing the vocabulary replaces the head, and fused losses read its weight
without calling it. The first is adjusted, the other two would lose the adapter in silence and are refused.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...modules import is_compiling, remove_hooks
from ..layer import LRegLayer
from ..targets import output_head_name
from .registry import remember

# Where a model keeps the name of its wrapped head: looking for it takes longer than a small model's forward pass.
_NAME = "_lreg_output_head"
_TIED = ("_tied_weights_keys", "all_tied_weights_keys")


def install(model: nn.Module) -> None:
    """Make `model` consistent with its wrapped output head; without one nothing happens. May be called again."""
    name = output_head_name(model)
    if name is None or not isinstance(model.get_submodule(name), LRegLayer):
        return
    assert isinstance(model, PreTrainedModel)
    if _NAME in model.__dict__:
        return
    remember(model, release)
    model.__dict__[_NAME] = name
    tied = model.all_tied_weights_keys  # as expanded at construction: patterns no longer match behind a wrapper
    own, wrapped = f"{name}.", f"{name}.base_layer."
    renamed = {_swap(k, own, wrapped): _swap(v, own, wrapped) for k, v in tied.items()}
    for attribute in _TIED:
        if tied:
            setattr(model, attribute, dict(renamed))
    model.resize_token_embeddings = partial(_refuse_resize, model)  # type: ignore[method-assign]
    model.register_forward_pre_hook(_clear_call_flag)
    model.register_forward_hook(_check_head_was_called)


def release(model: nn.Module) -> None:
    """Undo `install`."""
    if _NAME not in model.__dict__:
        return
    del model.__dict__["resize_token_embeddings"], model.__dict__[_NAME]
    model.__dict__.pop("_tied_weights_keys", None)
    remove_hooks(model, _clear_call_flag, _check_head_was_called)


def restore_tied_keys(model: nn.Module) -> None:
    """Recompute the expanded tying map, once the head is unwrapped."""
    if isinstance(model, PreTrainedModel):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _swap(key: str, old: str, new: str) -> str:
    return new + key.removeprefix(old) if key.startswith(old) and not key.startswith(new) else key


def _refuse_resize(
    model: PreTrainedModel,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> nn.Module:
    embedding = model.get_input_embeddings()
    if pad_to_multiple_of is None and new_num_tokens in (None, embedding.weight.shape[0]):
        return embedding
    raise ValueError(
        "the output head carries an LReg adapter of the present vocabulary size and cannot be resized. "
        "Resize the embeddings first, on the base model, and add the adapter afterwards."
    )


def wrapped_head(model: nn.Module) -> LRegLayer | None:
    """The output head of `model` if it carries a shortcut."""
    name = model.__dict__.get(_NAME)
    head = None if name is None else model.get_submodule(name)
    return head if isinstance(head, LRegLayer) else None


def _clear_call_flag(model: nn.Module, args: Any) -> None:
    if not is_compiling() and (head := wrapped_head(model)) is not None:
        head.was_called = head.in_thread.was_called = False


def _check_head_was_called(model: nn.Module, args: Any, output: Any) -> Tensor | None:
    if is_compiling() or (head := wrapped_head(model)) is None or head.disable_adapters:
        return None
    if head.in_thread.was_called or head.was_called or not head.stacked_adapters:
        return None
    raise RuntimeError(
        "the model computed its output without calling its output head, so the LReg adapter on that head had no part "
        "in it. A fused loss (such as Liger's linear cross-entropy) reads the head's weight directly: switch it off "
        "(use_liger_kernel=False), or put the adapter on other modules."
    )
