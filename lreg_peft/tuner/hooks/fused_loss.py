"""The language-model loss in chunks, for `LRegConfig(fused_loss=True)`: no tensor of [batch, length, vocabulary].

While the model trains with labels, its output layer hands over its input instead of computing logits, and the model's
loss is the cross-entropy of these rows (`core.fused_loss`); `output.logits` is None. In the first batch the model
computes its loss as ever and the two are compared: a model that does anything else with its logits is refused.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...modules import is_compiling, remove_hooks
from ...rows import IGNORE_INDEX, same_loss, shifts_labels
from ..layer import LRegLayer, this_thread
from .output_head import wrapped_head

# Whether position t predicts label t + 1, once the first batch has shown it; kept on the output layer.
_SHIFT = "_lreg_fused_loss_shift"


class FusedPass:
    """A forward pass that ends in a loss without logits.

    Args:
        labels: `[batch, length]`.
        n_items: what the summed loss is divided by; None for the number of labels that count.
        is_known: whether the first batch has been compared; until then the output layer computes its logits too.
    """

    def __init__(self, labels: Tensor, n_items: Any, is_known: bool) -> None:
        self.labels, self.n_items, self.is_known = labels, n_items, is_known
        self.features: Tensor | None = None

    def take(self, layer: LRegLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Keep what the output layer reads; returns what stands in for the logits, None if these are to be computed."""
        self.features = layer.seen_features(args, kwargs)
        return self.features.new_empty(*self.features.shape[:-1], 0) if self.is_known else None

    def loss(self, layer: LRegLayer, shift: bool) -> Tensor | None:
        """The loss of the rows with a label; None if rows and labels do not fit together."""
        features, labels = self.features, self.labels
        if features is None or features.shape[:-1] != labels.shape:
            return None
        if shift:
            features, labels = features[:, :-1], labels[:, 1:]
        counts = labels != IGNORE_INDEX
        normaliser = counts.sum() if self.n_items is None else self.n_items
        return layer.fused_loss(features[counts], labels[counts].to(features.device), normaliser)


def install(model: nn.Module) -> None:
    """Let the output layer of `model` compute the training loss; may be called again."""
    remove_hooks(model, begin_fused_pass, finish_fused_pass)
    if isinstance(model, PreTrainedModel) and wrapped_head(model) is not None:
        model.register_forward_pre_hook(begin_fused_pass, with_kwargs=True)
        model.register_forward_hook(finish_fused_pass, always_call=True)


def begin_fused_pass(
    model: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: keep the labels back from the model, which then computes no loss."""
    if is_compiling():
        return None
    this_thread.fused_pass = None
    layer, labels = wrapped_head(model), kwargs.get("labels")
    if layer is None or not isinstance(labels, Tensor) or not _asks_for_it(model, layer):
        return None
    is_known = _SHIFT in layer.__dict__
    this_thread.fused_pass = FusedPass(labels, kwargs.get("num_items_in_batch"), is_known)
    if not is_known:
        return None
    kept = {name: value for name, value in kwargs.items() if name != "labels"}
    if model.config.is_encoder_decoder and kept.get("decoder_input_ids") is None:  # type: ignore[union-attr]
        kept["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)  # type: ignore[operator]
    return args, kept


def finish_fused_pass(model: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook, also after an error: put the loss into the output, or compare it with the model's own."""
    this_pass, this_thread.fused_pass = this_thread.fused_pass, None
    if this_pass is None or output is None or is_compiling():
        return None
    layer = wrapped_head(model)
    assert layer is not None
    if not this_pass.is_known:
        layer.__dict__[_SHIFT] = _find_shift(model, layer, this_pass, output)
        return None
    loss = this_pass.loss(layer, layer.__dict__[_SHIFT])
    if loss is None:
        raise _refusal(model)
    if isinstance(output, tuple):
        return (loss, *output[1:])
    return type(output)(**{**output, "loss": loss, "logits": None})


def _asks_for_it(model: nn.Module, layer: LRegLayer) -> bool:
    """Whether the active adapters on the output layer ask for a fused loss, in a pass that trains them.

    Not while somebody watches the shortcut there, as mesh updates do: its modules are not called in chunks.
    """
    if not (layer.training and torch.is_grad_enabled()) or layer.disable_adapters:
        return False
    names = layer.stacked_adapters
    configs = getattr(model, "peft_config", {})
    watched = any(layer.lreg_coefficients[name]._forward_hooks for name in names)
    return bool(names) and not watched and all(getattr(configs.get(name), "fused_loss", False) for name in names)


@torch.no_grad()
def _find_shift(model: nn.Module, layer: LRegLayer, this_pass: FusedPass, output: Any) -> bool:
    """Which label a position predicts, by the model's own loss."""
    own = output[0] if isinstance(output, tuple) else output.get("loss")
    features = this_pass.features
    if isinstance(own, Tensor) and own.numel() == 1 and features is not None and layer.source is None:
        rounds = torch.is_autocast_enabled(features.device.type)
        # Transformers' losses are fp32 whatever the precision of the model: that of an fp64 one, too.
        precisions = torch.bfloat16 if rounds else features.dtype, own.dtype
        coarsest = max(precisions, key=lambda dtype: torch.finfo(dtype).eps)
        guess = shifts_labels(model)
        for shift in (guess, not guess):
            loss = this_pass.loss(layer, shift)
            if loss is not None and same_loss(own, loss, coarsest):
                return shift
    raise _refusal(model)


def _refusal(model: nn.Module) -> ValueError:
    return ValueError(
        "fused_loss=True computes the mean cross-entropy of the output layer, and the loss of "
        f"{type(model).__name__} is another one: it changes or weights the logits, or adds terms. Leave fused_loss "
        "out; the model then trains with its own loss."
    )
