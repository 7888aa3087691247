"""The fused language-model loss inside a model, without a change to the training loop.

While a model with a shortcut on its output head trains and gets labels, its head computes the loss itself, in chunks,
from the rows that have a label. The model is called without the labels, its head returns an empty tensor in place of
logits, and the loss is put into the model's output. Whoever asks the output for its logits has them computed then.
`LRegConfig(fused_loss=False)` switches all of it off.
"""

import weakref
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ...labels import IGNORE_INDEX, shifts_labels
from ...modules import eval_mode, is_compiling, remove_hooks
from ..layer import LRegLayer
from .output_head import wrapped_head
from .registry import remember

logger = logging.get_logger(__name__)

# Loss arguments that are understood; with any other one the model computes its loss as usual.
_LOSS_ARGUMENTS = {"labels", "num_items_in_batch"}
_OTHER_LOSS_ARGUMENTS = {
    "shift_labels",
    "ignore_index",
    "class_weights",
    "reduction",
    "logits_to_keep",
    "next_sentence_label",
}

# The model computes its loss from known logits over this many tokens when it is asked how it does that.
_PROBE_LENGTH = 16
_PROBE_TOLERANCE = 1e-3


class LossRequest:
    """Asks a wrapped output head for a loss in place of logits, for one forward pass.

    Args:
        labels: int64 `[batch, length]`; -100 is left out.
        shift: whether position t predicts label t + 1.
        normaliser: what the summed loss is divided by; None takes the number of labels.
    """

    def __init__(self, labels: Tensor, shift: bool, normaliser: Tensor | float | None) -> None:
        self.labels = labels
        self.shift = shift
        self.normaliser = normaliser
        self.loss: Tensor | None = None
        self.features: Tensor | None = None

    def __call__(self, layer: LRegLayer, features: Tensor) -> Tensor:
        """Compute the loss from the head's input `[batch, length, in_features]`; returns `[batch, length, 0]`."""
        self.features = features
        labels = self.labels.to(features.device)
        if self.shift:
            labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        counts = labels != IGNORE_INDEX
        self.loss = layer.fused_loss(features[counts], labels[counts], self.normaliser)
        return features.new_empty(*features.shape[:-1], 0)


def install(model: nn.Module) -> None:
    """Let the output head of `model` compute the training loss, if it is one that can; may be called again."""
    if isinstance(model, PreTrainedModel) and _begin not in model._forward_pre_hooks.values():
        remember(model, release)
        model.register_forward_pre_hook(_begin, with_kwargs=True)
        model.register_forward_hook(_finish, always_call=True)


def release(model: nn.Module) -> None:
    """Undo `install`."""
    remove_hooks(model, _begin, _finish)
    _verdicts.pop(model, None)


def _begin(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook: take the labels out and hand them to the head."""
    if is_compiling() or not torch.is_grad_enabled() or kwargs.get("return_dict") is False:
        return None
    labels = kwargs.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point():
        return None
    if any(kwargs.get(name) is not None for name in _OTHER_LOSS_ARGUMENTS):
        return None
    head = fusable_head(model)
    if head is None or not _agrees(model, head, kwargs):
        return None
    head.loss_request = LossRequest(labels, shifts_labels(model), kwargs.get("num_items_in_batch"))
    return args, {name: value for name, value in kwargs.items() if name not in _LOSS_ARGUMENTS}


def _finish(model: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook, also after an error: put the loss where it belongs."""
    head = wrapped_head(model)
    if head is None or head.loss_request is None:
        return None
    request, head.loss_request = head.loss_request, None
    if request.loss is None or not isinstance(output, dict):  # the forward pass failed, or went past the head
        return None
    rest = {name: value for name, value in output.items() if name not in ("loss", "logits")}
    fused = _with_logits_on_demand(type(output))(loss=request.loss, **rest)
    fused.__dict__["_compute_logits"] = partial(head, request.features)
    return fused


@cache
def _with_logits_on_demand(kind: type) -> type:
    """A model output that computes `logits` when they are asked for, differentiably as usual."""

    def get(self: Any) -> Tensor:
        if "_logits" not in self.__dict__:
            if "_compute_logits" not in self.__dict__:  # somebody has rebuilt the output from its entries
                raise AttributeError(
                    "the loss was computed without logits. LRegConfig(fused_loss=False) makes the model compute them."
                )
            self.__dict__["_logits"] = self.__dict__["_compute_logits"]()
        return self.__dict__["_logits"]  # type: ignore[no-any-return]

    def put(self: Any, value: Tensor | None) -> None:
        if value is not None:
            self.__dict__["_logits"] = value

    return type(kind.__name__, (kind,), {"logits": property(get, put), "__module__": __name__})


def fusable_head(model: nn.Module) -> LRegLayer | None:
    """The wrapped output head of a training model that may compute its loss; None if something speaks against it."""
    head = wrapped_head(model)
    if head is None or not head.training or head.disable_adapters or head.batch_adapter_names is not None:
        return None
    configs = getattr(model, "peft_config", {})
    adapters = head.stacked_adapters
    if not adapters or not all(getattr(configs.get(name), "fused_loss", False) for name in adapters):
        return None
    if getattr(model.config, "is_encoder_decoder", False):  # makes the decoder's input of the labels
        return None
    if any(parameter.requires_grad for parameter in head.get_base_layer().parameters()):
        return None  # trained itself
    return head


# Whether a model computes its loss as the fused one does.
_verdicts: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


def _agrees(model: nn.Module, head: LRegLayer, kwargs: dict[str, Any]) -> bool:
    """Ask the model once: give it known logits for a few tokens and compare its loss with cross-entropy on them."""
    if model not in _verdicts:
        few = _a_few_tokens(kwargs)
        if few is None:
            return False
        _verdicts[model] = agrees = _probe(model, head, few)
        if not agrees:
            logger.warning_once(
                f"{type(model).__name__} does more to its logits or its loss than the fused loss of LReg knows of: it "
                "computes its loss as usual."
            )
    return _verdicts[model]


def _a_few_tokens(kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """A window of one sample with at least one label in it; None if the inputs cannot be cut like that."""
    labels = kwargs["labels"]
    batch, length = labels.shape
    labelled = (labels[:, 1:] != IGNORE_INDEX).nonzero()
    if not len(labelled):
        return None
    row, position = labelled[0].tolist()
    window = slice(max(0, position - _PROBE_LENGTH // 2), position + 1 + _PROBE_LENGTH // 2)
    few = {}
    for name, value in kwargs.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            few[name] = value
        elif value.shape[:2] == (batch, length) and value.ndim <= 3:
            few[name] = value[row : row + 1, window]
        elif value.shape[:2] == (1, length) and value.ndim == 2:
            few[name] = value[:, window]
        else:
            return None
    few.pop("num_items_in_batch", None)
    return few


@torch.no_grad()
def _probe(model: nn.Module, head: LRegLayer, few: dict[str, Any]) -> bool:
    seen: list[Tensor] = []

    def substitute(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # Large and different ones: a cap, a scale or a mask on the logits would show.
        generator = torch.Generator().manual_seed(0)
        logits = 20 * torch.randn(output.shape, generator=generator)
        seen.append(logits)
        return logits.to(output)

    handle = head.register_forward_hook(substitute)
    try:
        with eval_mode(model):
            own = model(**few).loss
    finally:
        handle.remove()
    labels = few["labels"].cpu()
    if len(seen) != 1 or own is None or own.ndim or seen[0].shape[:2] != labels.shape:
        return False
    logits = seen[0]
    if shifts_labels(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
    coarse = own.dtype.itemsize < 4 or next(head.parameters()).dtype.itemsize < 4
    return torch.isclose(own.cpu().float(), expected, rtol=_PROBE_TOLERANCE * (30 if coarse else 1)).item()  # type: ignore[return-value]
