"""Calling a model with stored features: `model(features=..., labels=...)` in place of its own inputs."""

import functools
import inspect
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..labels import IGNORE_INDEX, row_loss
from ..tuner.hooks.output_head import wrapped_head
from ..tuner.hooks.registry import remember
from .output_shortcut import Terminal


def accept_features(terminal: Terminal) -> None:
    """Let the model of a terminal shortcut take `features` and `labels` as `FeatureCache` gives them.

    Called so, it computes the loss of the shortcut and its base module on these rows and runs nothing else; called
    with its own inputs it does what it always did. May be called again; undone by `unload()`.
    """
    model = terminal.model
    remember(model, release)
    own = model.forward
    if hasattr(own, "_lreg_own_forward"):
        own = own._lreg_own_forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        features = kwargs.pop("features", None)
        if features is None:
            return own(*args, **kwargs)
        return _loss_of_rows(terminal, features, kwargs.get("labels"), kwargs.get("num_items_in_batch"))

    signature = inspect.signature(own)
    parameters = [p for p in signature.parameters.values() if p.name != "features"]
    place = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    extra = [inspect.Parameter("features", inspect.Parameter.KEYWORD_ONLY, default=None)]
    if not any(p.name == "labels" for p in parameters):
        extra.append(inspect.Parameter("labels", inspect.Parameter.KEYWORD_ONLY, default=None))
    # Trainer reads the signature to see which columns of the data the model takes.
    forward.__signature__ = signature.replace(parameters=[*parameters[:place], *extra, *parameters[place:]])  # type: ignore[attr-defined]
    forward._lreg_own_forward = own  # type: ignore[attr-defined]
    model.forward = forward  # type: ignore[method-assign]


def release(model: nn.Module) -> None:
    """Undo `accept_features`."""
    own = getattr(model.__dict__.get("forward"), "_lreg_own_forward", None)
    if own is None:
        return
    del model.__dict__["forward"]
    if getattr(own, "__func__", None) is not type(model).forward:  # somebody else had replaced it before
        model.forward = own  # type: ignore[method-assign]


def _loss_of_rows(
    terminal: Terminal, features: Tensor, labels: Tensor | None, n_items: Tensor | int | None
) -> SequenceClassifierOutput:
    layer = terminal.layer
    if labels is None:
        raise ValueError("features were given without labels; FeatureCache.collate gives both.")
    if features.ndim != 2 or features.shape[1] != layer.in_features:
        raise ValueError(
            f"features must be [rows, {layer.in_features}], the input of {terminal.name!r}, got "
            f"{tuple(features.shape)}. Use data_collator=cache.collate."
        )
    layer.was_called = True
    features = features.to(next(layer.parameters()).dtype)
    counts = slice(None) if labels.is_floating_point() else labels != IGNORE_INDEX
    features, labels = features[counts], labels[counts]
    if wrapped_head(terminal.model) is layer and not layer.disable_adapters:
        return SequenceClassifierOutput(loss=layer.fused_loss(features, labels, n_items))
    logits = terminal.base_output(features, without=())
    loss = row_loss(terminal.objective(labels), logits, labels)
    return SequenceClassifierOutput(loss=loss if n_items is None else loss * len(labels) / n_items, logits=logits)
