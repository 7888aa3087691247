"""The shortcut on the module that gives a model its output, and the rows of data it sees.

With everything below it frozen, such a shortcut is a small model of its own: features go in, logits come out, and the
base module's output is a constant offset. Training on stored features and convex fitting both start here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modules import accepts, unwrap
from ..output_rows import OutputRows, SeenRows
from ..rows import (
    LossKind,
    Rows,
    are_values,
    check_yes_or_no,
    exact_pass,
    loss_kind_of,
    model_inputs,
    same_output,
    shifts_labels,
    without_labels,
)
from ..tuner.layer import LRegLayer, layers_with_adapter, this_thread
from ..tuner.layout import first_tensor


class _NoLogits:
    """Spares the logits of a language model that nobody will read, nearly half the time of a small one."""

    def take(self, layer: LRegLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        features = layer.seen_features(args, kwargs)
        return features.new_zeros(1).expand(*features.shape[:-1], layer.out_features)


class OutputLayer(OutputRows):
    """A module with a shortcut whose output is the output of the model; made by `find_output_layer`.

    Attributes:
        model: the Transformers or custom model inside any wrapper.
        name: name of the module in `model`.
        layer: the wrapped module.
        adapter_name: the adapter it is looked at for.
        pairing: how the model makes its loss of rows; None until the first batch has been compared.
    """

    def __init__(self, model: nn.Module, layer: LRegLayer, adapter_name: str) -> None:
        instead = "train it in the model, by gradients"
        super().__init__(model, layer, adapter_name, "a fit or a cache of its rows", instead)
        self.layer = layer

    @property
    def shifts(self) -> bool:
        """Whether position t goes with label t + 1."""
        return shifts_labels(self.model) if self.pairing is None else self.pairing.shift

    def loss_kind(self, labels: Tensor) -> LossKind:
        """What the model minimises over labels, or over targets as in `Rows`.

        Raises:
            ValueError: for labels outside the classes, or of another number than the outputs.
        """
        kind = loss_kind_of(self.model, labels, self.out_features)
        values = are_values(labels, self.out_features)
        return self.pairing.loss_kind if values and self.pairing is not None else kind

    def check(self, features: Tensor, targets: Tensor, where: str, before: str | None) -> LossKind:
        """What is minimised over rows.

        Args:
            features: `[n, in_features]`.
            targets: as in `Rows`.
            where: which rows these are, for errors.
            before: what is minimised over the rows that came before; None or "" if none did.

        Raises:
            ValueError: if they are for nothing: not finite, labels that the loss has no minimum for, or of another kind
                than those before.
        """
        kind = self.loss_kind(targets)
        for name, tensor in (("features", features), ("labels", targets)):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"the {name} of {self.name!r} must be finite, got NaN or infinite values {where}.")
        check_yes_or_no(kind, targets)
        if before and before != kind:
            raise ValueError(f"the labels must be all of one kind, got {before} and, {where}, {kind}.")
        return kind

    def rows(self, batch: Mapping[str, Any]) -> Rows:
        """What `seen_rows` gives, without where it comes from."""
        features, targets, *_ = self.seen_rows(batch)
        return Rows(features, targets)

    def seen_rows(self, batch: Mapping[str, Any]) -> SeenRows:
        """The rows of a batch: what reaches the module in a pass in eval mode, without a graph.

        In the first batch with labels that count, the rows are compared with the output and the loss of the model.

        Raises:
            TypeError: if `batch` is not a dictionary.
            ValueError: if it has no labels, these do not fit, or the model does something to the output of this module
                that rows cannot repeat.
        """
        inputs = model_inputs(self.model, batch)
        self.loss_kind(inputs["labels"])  # before they meet the model's loss: on a GPU there is no way back from that
        is_first = self.pairing is None
        given = inputs if is_first and accepts(self.model, "labels") else without_labels(self.model, inputs)
        this_thread.fused_pass = None if is_first else _NoLogits()
        try:
            with self, exact_pass(self.model):
                output = self.model(**given)
                this_thread.fused_pass = None
                seen = self.of_pass(inputs, output, with_logits=is_first)
                if seen.logits is not None and not same_output(self.output(seen.features), seen.logits):
                    raise self.refusal()
        finally:
            this_thread.fused_pass = None
        return seen

    def output(self, features: Tensor) -> Tensor:
        """The module's output for rows: `[n, in_features]` -> `[n, out_features]`, active shortcuts included."""
        return first_tensor(self.layer(self.as_inputs(features)))[0]

    def base_output(self, features: Tensor) -> Tensor:
        """What everything but this adapter gives for rows: the offset of a convex fit, a tensor of its own."""
        # Through whatever lies between, such as an adapter of another method.
        output, _ = first_tensor(self.layer.base_layer(self.as_inputs(features)))
        if output.data_ptr() == features.data_ptr():
            output = output.clone()
        for name in self.layer.stacked_adapters:
            if name != self.adapter_name:
                output = output + self.layer.shortcut(name, features, output)
        return output

    def as_inputs(self, features: Tensor) -> Tensor:
        """Rows `[n, in_features]` in the layout that the module takes: one token, or one pixel, per sample."""
        own = self.layer.get_base_layer()
        # The classification heads of RoBERTa's kin take [batch, length, features] and look at the first position.
        if "ClassificationHead" in type(own).__name__:
            return features.unsqueeze(1)
        # The classifiers of convolutional networks flatten or average [batch, features, height, width].
        images = (nn.Flatten, nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.Conv2d)
        return features[:, :, None, None] if any(isinstance(part, images) for part in own.modules()) else features


def find_output_layer(model: nn.Module, adapter_name: str | None = None) -> OutputLayer:
    """The shortcut on the output of a model.

    Args:
        model: a model with LReg adapters, in a `PeftModel`, a wrapper for several processes, or neither.
        adapter_name: which adapter; None takes the active one.

    Raises:
        ValueError: if the adapter does not exist, is not on exactly one module that ends the model, or reads the output
            of another one; with the reason.
    """
    inner = unwrap(model)
    if adapter_name is None:
        layers = [module for module in inner.modules() if isinstance(module, LRegLayer)]
        active = dict.fromkeys(a for layer in layers for a in layer.active_adapters if a in layer.lreg_encoder)
        if len(active) != 1:
            raise ValueError(f"name the adapter: adapter_name must be one of the active {sorted(active)}.")
        (adapter_name,) = active
    own = layers_with_adapter(inner, adapter_name)
    inside = [name for name in own if _is_inside_backbone(inner, name)]
    if inside or len(own) != 1:
        raise ValueError(
            f"the adapter {adapter_name!r} has a shortcut at {(inside or list(own))[0]!r}"
            + (f" and {len(own) - 1} more modules" if len(own) > 1 else "")
            + ", inside the network; it must be on the one module that gives the model's output, such as a language "
            "model head or a classifier: LRegConfig(target_modules=[...])."
        )
    ((name, layer),) = own.items()
    if layer.source is not None:
        raise ValueError(
            f"a shortcut that is fitted or cached must read the input of its own module, and the one at {name!r} has "
            f"the feature_source {layer.source.name!r}: do without that option, or train the shortcut in the model."
        )
    return OutputLayer(inner, layer, adapter_name)


def trained_elsewhere(output: OutputLayer) -> list[str]:
    """Names of the parameters that require gradients and are not part of the shortcut's layer."""
    own = {id(parameter) for parameter in output.layer.parameters()}
    base = {id(parameter) for parameter in output.layer.base_layer.parameters()}
    return [
        name
        for name, parameter in output.model.named_parameters()
        if parameter.requires_grad and (id(parameter) not in own or id(parameter) in base)
    ]


def _is_inside_backbone(model: nn.Module, name: str) -> bool:
    """Whether the module `name` belongs to the backbone of a Transformers model (`transformer`, `roberta`, ...).

    In a custom model nothing does: whether a module ends it shows when it runs.
    """
    if not isinstance(model, PreTrainedModel) or not hasattr(model, model.base_model_prefix):
        return False
    return name.partition(".")[0] == model.base_model_prefix
