"""The shortcut on the module that gives a model its output, and the rows of data it sees.

With everything below it frozen, such a shortcut is a small model of its own: features go in, logits come out, and the
base module's output is a constant offset. Training on stored features and convex fitting both start here.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modules import accepts, unwrap
from ..rows import (
    LossKind,
    Pairing,
    Rows,
    align,
    are_values,
    check_yes_or_no,
    exact_pass,
    find_pairing,
    last_tokens,
    logits_of,
    loss_kind_of,
    loss_of,
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


class OutputLayer:
    """A module with a shortcut whose output is the output of the model; made by `find_output_layer`.

    Attributes:
        model: the Transformers or custom model inside any wrapper.
        name: name of the module in `model`.
        layer: the wrapped module.
        adapter_name: the adapter it is looked at for.
        pairing: how the model makes its loss of rows; None until the first batch has been compared.
    """

    def __init__(self, model: nn.Module, name: str, layer: LRegLayer, adapter_name: str) -> None:
        self.model, self.name, self.layer, self.adapter_name = model, name, layer, adapter_name
        self.pairing: Pairing | None = None

    @property
    def shifts(self) -> bool:
        """Whether position t goes with label t + 1."""
        return shifts_labels(self.model) if self.pairing is None else self.pairing.shift

    def loss_kind(self, labels: Tensor) -> LossKind:
        """What the model minimises over labels, or over targets as in `Rows`.

        Raises:
            ValueError: for labels outside the classes, or of another number than the outputs.
        """
        kind = loss_kind_of(self.model, labels, self.layer.out_features)
        values = are_values(labels, self.layer.out_features)
        return self.pairing.loss_kind if values and self.pairing is not None else kind

    def check(self, rows: Rows, where: str) -> LossKind:
        """What is minimised over rows; `where` says in errors which ones they are.

        Raises:
            ValueError: if they are for nothing: not finite, or labels that the loss has no minimum for.
        """
        kind = self.loss_kind(rows.targets)
        for name, tensor in (("features", rows.features), ("labels", rows.targets)):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"the {name} of {self.name!r} must be finite, got NaN or infinite values {where}.")
        check_yes_or_no(kind, rows.targets)
        return kind

    def rows(self, batch: Mapping[str, Any]) -> Rows:
        """The rows of a batch: what reaches the module in a pass in eval mode, without a graph.

        In the first batch with labels that count, the rows are compared with the output and the loss of the model.

        Raises:
            TypeError: if `batch` is not a dictionary.
            ValueError: if it has no labels, these do not fit, or the model does something to the output of this module
                that rows cannot repeat.
        """
        inputs = model_inputs(self.model, batch)
        seen: list[Tensor] = []

        def see(features: Tensor) -> None:
            # Refused here, labels that do not fit never meet the model's loss: on a GPU there is no way back from that.
            self.loss_kind(inputs["labels"])
            self._align(features, inputs)
            seen.append(features)

        compares = self.pairing is None and accepts(self.model, "labels")
        remove = self.layer.register_input_hook(see, self.adapter_name)
        this_thread.fused_pass = None if self.pairing is None else _NoLogits()
        try:
            with exact_pass(self.model):
                output = self.model(**(inputs if compares else without_labels(self.model, inputs)))
        finally:
            this_thread.fused_pass = None
            remove()
        if len(seen) != 1:
            raise ValueError(f"{self.name!r} was called {len(seen)} times in a forward pass; exactly once is needed.")
        if self.pairing is None and len(self._align(seen[0], inputs).targets):
            self._compare(seen[0], output, inputs)
        return self._align(seen[0], inputs)

    def _compare(self, features: Tensor, output: Any, inputs: Mapping[str, Any]) -> None:
        """Find the pairing, and make sure that rows give the model's own output and loss."""
        own, labels, width = logits_of(output), inputs["labels"], self.layer.out_features
        same = isinstance(own, Tensor) and (own.shape[-1] == width or own.ndim == 1)
        if same:
            self.pairing = find_pairing(self.model, own, labels, loss_of(output))
            expected = align(own, labels, shift=self.shifts, out_features=width).features
            with exact_pass(self.model):
                logits = self.output(self._align(features, inputs).features)
            same = same_output(logits, expected)
        if not same:
            raise ValueError(
                f"{type(self.model).__name__} changes the output of this module ({self.name!r}), so the shortcut there "
                "cannot be trained apart from the model. Train it in the model."
            )

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

    def _align(self, values: Tensor, inputs: Mapping[str, Any]) -> Rows:
        """Bring features and labels together."""
        pool = partial(last_tokens, inputs=inputs, config=getattr(self.model, "config", None), name=self.name)
        return align(values, inputs["labels"], shift=self.shifts, out_features=self.layer.out_features, pool=pool)


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
    return OutputLayer(inner, name, layer, adapter_name)


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
