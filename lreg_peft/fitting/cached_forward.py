"""Calling a model with stored features: `model(features=..., labels=...)` in place of its own inputs."""

import inspect
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..rows import IGNORE_INDEX, LossKind, row_loss
from ..tuner.layer import this_thread
from .output_layer import OutputLayer


def accept_features(output: OutputLayer, loss_kind: LossKind) -> None:
    """Let the model of a shortcut on its output take `features` and `labels` as `FeatureCache` gives them.

    Called so, it computes the loss of the shortcut and its base module on these rows and runs nothing else; called
    with its own inputs it does what it always did. May be called again; `unload()` takes it back.

    Args:
        output: the shortcut.
        loss_kind: what the model minimises over the rows of the cache.
    """
    model = output.model
    own = model.__dict__.get("forward")
    if isinstance(own, _TakesFeatures):
        own = own.own
    model.forward = _TakesFeatures(output, loss_kind, own)  # type: ignore[method-assign,assignment]


class _TakesFeatures:
    """The forward method of a model that takes features too. A copy of the model has one of its own.

    Attributes:
        own: what stood in the model's place for its class's forward; None if nothing did.
    """

    def __init__(self, output: OutputLayer, loss_kind: LossKind, own: Any) -> None:
        self.output, self.loss_kind, self.own = output, loss_kind, own

    def __call__(self, *args: Any, features: Tensor | None = None, **kwargs: Any) -> Any:
        if features is None:
            return self._forward(*args, **kwargs)
        return self._of_rows(features, kwargs.get("labels"), kwargs.get("num_items_in_batch"))

    def release(self, model: nn.Module) -> None:
        """Give the model its own forward method back."""
        del model.__dict__["forward"]
        if self.own is not None:
            model.forward = self.own

    @property
    def _forward(self) -> Any:
        model = self.output.model
        return MethodType(type(model).forward, model) if self.own is None else self.own

    @property
    def __signature__(self) -> inspect.Signature:
        """Trainer reads it to see which columns of the data the model takes."""
        signature = inspect.signature(self._forward)
        parameters = {p.name: p for p in signature.parameters.values()}
        extra = {
            name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in ("features", "labels")
            if name not in parameters
        }
        both = [*parameters.values(), *extra.values()]
        return signature.replace(parameters=sorted(both, key=lambda p: p.kind))

    def _of_rows(
        self, features: Tensor, labels: Tensor | None, n_items: Tensor | int | None
    ) -> SequenceClassifierOutput:
        layer = self.output.layer
        if features.ndim != 2 or features.shape[1] != layer.in_features:
            raise ValueError(
                f"features must be [rows, {layer.in_features}], the input of {self.output.name!r}, got "
                f"{tuple(features.shape)}. Use data_collator=cache.collate."
            )
        if labels is None and self.output.shifts and layer.is_output_layer:
            raise ValueError(
                "features were given without labels; FeatureCache.collate gives both. With label smoothing or "
                "compute_loss_func, a Trainer keeps the labels back and pairs each position with the next label, where "
                "the rows of a cache have their own label already: train without these options, or without the cache."
            )
        features = features.to(next(p for p in layer.parameters() if p.is_floating_point()))
        is_class = self.loss_kind == "cross_entropy"
        counts = None if labels is None or not is_class else labels != IGNORE_INDEX
        if labels is not None and counts is not None and self._fuses():
            this_thread.output_layer_ran = True  # though nobody calls it: the loss has what it adds
            normaliser = counts.sum() if n_items is None else n_items
            return SequenceClassifierOutput(loss=layer.fused_loss(features[counts], labels[counts], normaliser))
        logits = layer(self.output.as_inputs(features))
        if labels is None:
            return SequenceClassifierOutput(logits=logits)
        if counts is not None:  # where nothing counts the loss is what the model's own would be
            wide = logits if logits.dtype == torch.float64 else logits.float()
            total = F.cross_entropy(wide, labels, ignore_index=IGNORE_INDEX, reduction="sum")
            loss = total / (counts.sum() if n_items is None else n_items)
        else:
            loss = row_loss(self.loss_kind, logits, labels) * (1 if n_items is None else len(labels) / n_items)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _fuses(self) -> bool:
        """Whether the loss is computed in chunks, without logits: while the output layer of a language model trains.

        Not with dropout on the shortcut, nor while hooks watch or change the layer: its modules are not called then.
        """
        layer = self.output.layer
        if not (layer.is_output_layer and layer.training and torch.is_grad_enabled()) or layer.disable_adapters:
            return False
        names = layer.stacked_adapters
        watched = any(module._forward_hooks for module in layer.modules())
        plain = not watched and not any(layer.lreg_dropout[name] for name in names)
        return bool(names) and plain
