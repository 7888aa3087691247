"""Shortcuts on the module that gives a model its output, and the rows of data they see.

With everything below it frozen, such a shortcut is a small model of its own: features go in, logits come out, and the
base module's output is a constant offset. Training on stored features and convex fitting both start here.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..labels import (
    IGNORE_INDEX,
    Objective,
    Rows,
    align,
    last_tokens,
    logits_of,
    loss_of,
    objective_of,
    row_loss,
    shifts_labels,
)
from ..modules import eval_mode, unwrap
from ..tuner.layer import LRegLayer, layers_with_adapter
from ..tuner.layout import UNSAID, Layout, first_tensor

# Difference between a model's own logits and those computed from its rows that rounding explains.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_TOLERANCE_HALF = 3e-2


class _Reached(Exception):
    """Ends a forward pass at the terminal module."""


@dataclass(frozen=True)
class Terminal:
    """A shortcut whose output is the output of the model; made by `find_terminal`.

    Attributes:
        model: the Transformers or custom model inside any wrapper.
        name: name of the module in `model`.
        layer: the wrapped module.
        adapter_name: the adapter it is looked at for.
    """

    model: nn.Module
    name: str
    layer: LRegLayer
    adapter_name: str

    def check(self, batch: Mapping[str, Any]) -> Objective:
        """Run one batch in full and make sure that its rows give the model's own output and loss.

        Args:
            batch: inputs of the model with labels.

        Returns:
            The objective that the model minimises over the rows.

        Raises:
            ValueError: if they do not, with the reason: the model does something to this module's output that rows
                cannot repeat, or the labels do not fit.
        """
        objective = self.objective(self.rows(batch).targets)  # first: a wrong label would be an error of the model's
        with torch.no_grad(), eval_mode(self.model):
            rows, own_logits, own_loss = self._run(batch, stop=False)
            logits = self.base_output(rows.features, without=())
            loss = row_loss(objective, logits, rows.targets)
        tolerance = _TOLERANCE.get(logits.dtype, _TOLERANCE_HALF)
        close = partial(torch.allclose, rtol=tolerance, atol=tolerance)
        same_logits = own_logits is not None and own_logits.shape == logits.shape and close(own_logits, logits)
        same_loss = own_loss is None or not len(logits) or close(own_loss.to(loss.dtype), loss)
        if not (same_logits and same_loss):
            what = "weights its loss by more than the labels" if same_logits else "changes the output of this module"
            raise ValueError(
                f"{type(self.model).__name__} {what} ({self.name!r}), so the shortcut there cannot be trained apart "
                "from the model. Train it in the model."
            )
        return objective

    def rows(self, batch: Mapping[str, Any]) -> Rows:
        """The rows of a batch; runs the frozen part without a graph, in eval mode, and stops at the terminal module.

        Raises:
            TypeError: if `batch` is not a mapping.
            ValueError: if it has no labels, or their shape fits neither tokens nor sequences.
        """
        with torch.no_grad(), eval_mode(self.model):
            return self._run(batch, stop=True)[0]

    def rows_per_sample(self, labels: Tensor) -> list[int]:
        """How many rows each sample of token labels `[batch, length]` gives."""
        counted = labels[:, 1:] if shifts_labels(self.model) else labels
        return (counted != IGNORE_INDEX).sum(dim=1).tolist()  # type: ignore[no-any-return]

    def base_output(self, features: Tensor, without: tuple[str, ...] | None = None) -> Tensor:
        """What everything but this adapter gives for rows: the offset of a convex fit.

        Args:
            features: `[n, in_features]`.
            without: names of the active adapters to leave out; None leaves out `adapter_name`.

        Returns:
            `[n, out_features]`; a tensor of its own, safe to change.
        """
        without = (self.adapter_name,) if without is None else without
        base = self.layer.get_base_layer()
        inputs = features.unsqueeze(1) if self._reads_sequences else features
        if self._reads_images:
            inputs = features[:, :, None, None]
        output, _ = first_tensor(base(inputs))
        if output.data_ptr() == features.data_ptr():
            output = output.clone()
        for name in self.layer.stacked_adapters:
            if name not in without:
                output = output + self.layer.shortcut(name, features, output)
        return output

    @property
    def _reads_sequences(self) -> bool:
        # The classification heads of RoBERTa's kin take [batch, length, features] and look at the first position.
        return "ClassificationHead" in type(self.layer.get_base_layer()).__name__

    @property
    def _reads_images(self) -> bool:
        """Whether the module takes `[batch, features, height, width]`: the classifiers of convolutional networks do,
        which flatten or average it."""
        own = self.layer.get_base_layer().modules()
        return any(isinstance(module, (nn.Flatten, nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.Conv2d)) for module in own)

    def _one_row(self, features: Tensor) -> Tensor:
        """Features of an image `[batch, features, height, width]` as the one row that the shortcut reads."""
        if features.ndim < 4 or features.shape[1] != self.layer.in_features:
            return features
        reading = self.layer.readings.get(self.adapter_name, UNSAID)
        shape = len(features), self.layer.out_features
        layout = Layout.of(
            self.layer.get_base_layer(), self.layer.in_features, self.layer.out_features, features.shape, shape, reading
        )
        return layout.rows(features)

    def _run(self, batch: Mapping[str, Any], *, stop: bool) -> tuple[Rows, Tensor | None, Tensor | None]:
        """Rows; without `stop` also the model's logits in those rows and its loss, where it gives any."""
        if not isinstance(batch, Mapping):
            raise TypeError(f"a batch must be a dictionary of model inputs with labels, got {type(batch).__name__}.")
        if batch.get("labels") is None:
            raise ValueError(f"a batch needs 'labels' to give rows, it has {sorted(batch)}.")
        place = next(self.model.parameters()).device
        inputs = {key: value.to(place) if isinstance(value, Tensor) else value for key, value in batch.items()}
        labels = inputs["labels"]
        takes_labels = _accepts(self.model, "labels")
        if stop or not takes_labels:
            inputs.pop("labels")
        seen: list[Tensor] = []

        def capture(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append(self._one_row(self.layer.seen_features(args, kwargs)))
            if stop:
                raise _Reached

        handle = self.layer.register_forward_pre_hook(capture, with_kwargs=True)
        output = None
        try:
            output = self.model(**inputs)
        except _Reached:
            pass
        finally:
            handle.remove()
        if len(seen) != 1:
            raise ValueError(f"{self.name!r} was called {len(seen)} times in a forward pass; exactly once is needed.")
        rows = self._align(seen[0], labels, inputs)
        logits = logits_of(output)
        if logits is not None and logits.ndim == seen[0].ndim == 3:
            logits = self._align(logits, labels, inputs).features
        return rows, logits, loss_of(output)

    def _align(self, values: Tensor, labels: Tensor, inputs: Mapping[str, Any]) -> Rows:
        """Bring features or logits and labels together."""
        return align(
            values,
            labels,
            shift=shifts_labels(self.model),
            out_features=self.layer.out_features,
            pool=partial(self._pool, inputs=inputs),
        )

    def _pool(self, values: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """The position that a sample is classified by, of `[batch, length, width]`."""
        if self.layer.readings.get(self.adapter_name, UNSAID).readout == "mean":
            return values.mean(dim=1)
        if self._reads_sequences:
            return values[:, 0]
        ids, pad = inputs.get("input_ids"), getattr(getattr(self.model, "config", None), "pad_token_id", None)
        if ids is None or pad is None:
            raise ValueError(
                f"{self.name!r} gives one output per token, and which token counts is not known without input_ids and "
                "config.pad_token_id. Set model.config.pad_token_id."
            )
        return values[torch.arange(len(values), device=values.device), last_tokens(ids, pad)]

    def objective(self, targets: Tensor) -> Objective:
        """What the model minimises over such targets.

        Raises:
            ValueError: for labels outside the classes, or of another number than the outputs.
        """
        return objective_of(self.model, targets, self.layer.out_features, repr(self.name))


def find_terminal(model: nn.Module, adapter_name: str | None = None) -> Terminal:
    """The shortcut on the output of a model.

    Args:
        model: a model with LReg adapters, in a `PeftModel`, a wrapper for several processes, or neither.
        adapter_name: which adapter; None takes the active one.

    Raises:
        ValueError: if the adapter does not exist, or is not on exactly one module that ends the model; with the reason.
    """
    inner = unwrap(model)
    if adapter_name is None:
        layers = [module for module in inner.modules() if isinstance(module, LRegLayer)]
        active = dict.fromkeys(a for layer in layers for a in layer.active_adapters if a in layer.lreg_nodes)
        if len(active) != 1:
            raise ValueError(f"name the adapter: adapter_name must be one of the active {sorted(active)}.")
        (adapter_name,) = active
    own = layers_with_adapter(inner, adapter_name)
    inside = [name for name in own if is_inside_backbone(inner, name)]
    if inside or len(own) != 1:
        raise ValueError(
            f"the adapter {adapter_name!r} has a shortcut at {(inside or list(own))[0]!r}"
            + (f" and {len(own) - 1} more modules" if len(own) > 1 else "")
            + ", inside the network; it must be on the one module that gives the model's output, such as a language "
            "model head or a classifier: LRegConfig(target_modules=[...])."
        )
    ((name, layer),) = own.items()
    return Terminal(inner, name, layer, adapter_name)


def trained_elsewhere(terminal: Terminal) -> list[str]:
    """Names of the parameters that require gradients and are not part of the terminal shortcut's layer."""
    own = {id(parameter) for parameter in terminal.layer.parameters()}
    base = {id(parameter) for parameter in terminal.layer.get_base_layer().parameters()}
    return [
        name
        for name, parameter in terminal.model.named_parameters()
        if parameter.requires_grad and (id(parameter) not in own or id(parameter) in base)
    ]


def is_inside_backbone(model: nn.Module, name: str) -> bool:
    """Whether the module `name` belongs to the backbone of a Transformers model (`transformer`, `roberta`, ...).

    In a custom model nothing does: whether a module ends it shows when it runs.
    """
    if not isinstance(model, PreTrainedModel) or not hasattr(model, model.base_model_prefix):
        return False
    return name.partition(".")[0] == model.base_model_prefix


def _accepts(model: nn.Module, name: str) -> bool:
    forward: Callable[..., Any] = model.forward
    parameters = inspect.signature(forward).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
