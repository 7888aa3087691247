"""Calling a model with stored features: `model(features=..., labels=...)` in place of its own inputs."""

import inspect
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..labels import IGNORE_INDEX, LossKind, row_loss
from ..tuner.hooks.head_loss import asks_for_fused_loss, defer_logits
from ..tuner.hooks.output_head import wrapped_head
from ..tuner.hooks.registry import remember
from .output_shortcut import Terminal


def accept_features(terminal: Terminal, loss_kind: LossKind) -> None:
    """Let the model of a terminal shortcut take `features` and `labels` as `FeatureCache` gives them.

    Called so, it computes the loss of the shortcut and its base module on these rows and runs nothing else; called
    with its own inputs it does what it always did. May be called again; undone by `unload()`.

    Args:
        terminal: the shortcut.
        loss_kind: what the model minimises over the rows of the cache.
    """
    model = terminal.model
    remember(model, release)
    own = model.__dict__.get("forward")
    if isinstance(own, _TakesFeatures):
        own = own.own
    model.forward = _TakesFeatures(terminal, loss_kind, own)  # type: ignore[method-assign,assignment]


def release(model: nn.Module) -> None:
    """Undo `accept_features`."""
    forward = model.__dict__.get("forward")
    if isinstance(forward, _TakesFeatures):
        del model.__dict__["forward"]
        if forward.own is not None:  # somebody else had replaced it before
            model.forward = forward.own


class _TakesFeatures:
    """The forward method of a model that takes features too. A copy of the model has one of its own."""

    def __init__(self, terminal: Terminal, loss_kind: LossKind, own: Any) -> None:
        self.terminal = terminal
        self.loss_kind = loss_kind
        #: What stood in the model's place for its class's forward; None if nothing did.
        self.own = own

    def __call__(self, *args: Any, features: Tensor | None = None, **kwargs: Any) -> Any:
        if features is None:
            return self._forward(*args, **kwargs)
        return self._of_rows(features, kwargs.get("labels"), kwargs.get("num_items_in_batch"))

    @property
    def _forward(self) -> Any:
        model = self.terminal.model
        return MethodType(type(model).forward, model) if self.own is None else self.own

    @property
    def __signature__(self) -> inspect.Signature:
        """Trainer reads it to see which columns of the data the model takes."""
        signature = inspect.signature(self._forward)
        parameters = [p for p in signature.parameters.values() if p.name != "features"]
        place = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
        extra = [inspect.Parameter("features", inspect.Parameter.KEYWORD_ONLY, default=None)]
        if not any(p.name == "labels" for p in parameters):
            extra.append(inspect.Parameter("labels", inspect.Parameter.KEYWORD_ONLY, default=None))
        return signature.replace(parameters=[*parameters[:place], *extra, *parameters[place:]])

    def _of_rows(
        self, features: Tensor, labels: Tensor | None, n_items: Tensor | int | None
    ) -> SequenceClassifierOutput:
        layer = self.terminal.layer
        if features.ndim != 2 or features.shape[1] != layer.in_features:
            raise ValueError(
                f"features must be [rows, {layer.in_features}], the input of {self.terminal.name!r}, got "
                f"{tuple(features.shape)}. Use data_collator=cache.collate."
            )
        if labels is None and self.terminal.shifts and wrapped_head(self.terminal.model) is layer:
            raise ValueError(
                "features were given without labels; FeatureCache.collate gives both. With label smoothing or "
                "compute_loss_func, a Trainer keeps the labels back and pairs each position with the next label, where "
                "the rows of a cache have their own label already: train without these options, or without the cache."
            )
        logits = self._logits(features.to(next(p for p in layer.parameters() if p.is_floating_point())))
        if labels is None:
            return SequenceClassifierOutput(logits=logits)
        if self.loss_kind == "cross_entropy":
            # Ignored rows are not counted, and where nothing counts the loss is what the model's own would be.
            reduction = "mean" if n_items is None else "sum"
            wide = logits if logits.dtype == torch.float64 else logits.float()
            loss = F.cross_entropy(wide, labels, ignore_index=IGNORE_INDEX, reduction=reduction)
            loss = loss if n_items is None else loss / n_items
        else:
            loss = row_loss(self.loss_kind, logits, labels)
            loss = loss if n_items is None else loss * len(labels) / n_items
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _logits(self, features: Tensor) -> Tensor:
        """`[rows, out_features]`, through the wrapped module and whatever hooks are on it."""
        terminal = self.terminal
        layer, head = terminal.layer, wrapped_head(terminal.model)
        may_wait = head is layer and asks_for_fused_loss(terminal.model, layer)
        layer.in_thread.loss_request = defer_logits if may_wait else None
        try:
            return layer(features.unsqueeze(1) if terminal.reads_sequences else features)  # type: ignore[no-any-return]
        finally:
            layer.in_thread.loss_request = None
