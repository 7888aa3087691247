"""Shortcuts on the module that gives a model its output, and the rows of data they see.

With everything below it frozen, such a shortcut is a small model of its own: features go in, logits come out, and the
base module's output is a constant offset. Training on stored features and convex fitting both start here.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.deferred import is_mean_cross_entropy
from ..labels import (
    LossKind,
    Pairing,
    Rows,
    align,
    find_pairing,
    last_tokens,
    logits_of,
    loss_kind_of,
    loss_of,
    repeats_loss,
    rows_per_sample,
    shifts_labels,
    uneven_parts,
)
from ..modules import accepts, eval_mode, private_inputs, unwrap
from ..tuner.hooks.head_loss import defer_logits
from ..tuner.layer import LRegLayer, layers_with_adapter
from ..tuner.layout import UNSAID, Layout, first_tensor

# Difference between a model's own logits and those computed from its rows that rounding explains.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_TOLERANCE_HALF = 3e-2
_PAIRING = "pairing"


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
    _known: dict[str, Pairing | None] = field(default_factory=dict, repr=False, compare=False)
    _checked: set[str] = field(default_factory=set, repr=False, compare=False)

    def check(self, batch: Mapping[str, Any]) -> LossKind:
        """Run one batch in full and make sure that its rows give the model's own output and loss.

        Args:
            batch: inputs of the model with labels.

        Returns:
            The objective that the model minimises over the rows.

        Raises:
            ValueError: if they do not, with the reason: the model does something to this module's output that rows
                cannot repeat, or the labels do not fit.
        """
        rows = self.rows(batch)  # first: a wrong label would be an error of the model's
        self.loss_kind(rows.targets)
        with self._apart():
            seen, inputs, output = self._run(batch, stop=False)
            own_logits = logits_of(output)
            if isinstance(own_logits, Tensor) and own_logits.ndim == seen.ndim == 3:
                own_logits = self._align(own_logits, inputs).features
            logits = self.base_output(rows.features, without=())
        tolerance = _TOLERANCE.get(logits.dtype, _TOLERANCE_HALF)
        close = partial(torch.allclose, rtol=tolerance, atol=tolerance)
        same = isinstance(own_logits, Tensor) and own_logits.shape == logits.shape and close(own_logits, logits)
        if not same:
            raise self._refusal("changes the output of this module")
        self._check_loss(batch, rows.targets)
        return self.loss_kind(rows.targets)

    def check_what_is_new(self, batch: Mapping[str, Any], rows: Rows) -> None:
        """Check the first batch with rows in full, and the loss again as soon as samples or positions count unevenly.

        Costs a look at the batch where there is nothing new.

        Args:
            batch: inputs of the model with labels.
            rows: what `rows` gave for it.

        Raises:
            ValueError: as `check` does.
        """
        if not len(rows.targets):
            return
        parts = {"logits", *uneven_parts(batch, shift=self.shifts)}
        if "logits" not in self._checked:
            self.check(batch)
        elif not parts <= self._checked:
            self._check_loss(batch, rows.targets)
        self._checked.update(parts)

    def _check_loss(self, batch: Mapping[str, Any], targets: Tensor) -> None:
        """Make sure that the loss of a batch is what `rows` took it for, when the model was asked."""
        inputs = self._inputs(batch)
        logits, loss = self._loss_of_some_logits(batch, inputs["labels"])
        known = self._known.get(_PAIRING, self._guess(targets))
        same = known is not None and (
            loss is None
            or repeats_loss(
                Pairing(known.shift, self.loss_kind(targets)),
                logits,
                loss,
                inputs["labels"],
                out_features=self.layer.out_features,
                pool=partial(self._pool, inputs=inputs),
            )
        )
        if not same:
            raise self._refusal("weights its loss by more than the labels")

    def _refusal(self, what: str) -> ValueError:
        return ValueError(
            f"{type(self.model).__name__} {what} ({self.name!r}), so the shortcut there cannot be trained apart from "
            "the model. Train it in the model."
        )

    def rows(self, batch: Mapping[str, Any]) -> Rows:
        """The rows of a batch; runs the frozen part without a graph, in eval mode, and stops at the terminal module.

        The first time, the model is asked which label it pairs with which row.

        Raises:
            TypeError: if `batch` is not a mapping.
            ValueError: if it has no labels, or their shape fits neither tokens nor sequences.
        """
        with self._apart():
            features, inputs, _ = self._run(batch, stop=True)
        rows = self._align(features, inputs)
        if _PAIRING not in self._known and len(rows.targets):
            self.loss_kind(rows.targets)
            self._known[_PAIRING] = self._ask(batch, rows.targets)
            rows = self._align(features, inputs)
        return rows

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """For passes of our own: exact, without a graph, and nothing is left behind."""
        kind = next(self.model.parameters()).device.type
        with torch.no_grad(), eval_mode(self.model), torch.autocast(kind, enabled=False):
            yield

    def _ask(self, batch: Mapping[str, Any], targets: Tensor) -> Pairing | None:
        """How the model makes its loss of rows; None if rows do not repeat it."""

        inputs = self._inputs(batch)
        return find_pairing(
            partial(self._loss_of_some_logits, batch),
            inputs["labels"],
            self._guess(targets),
            out_features=self.layer.out_features,
            pool=partial(self._pool, inputs=inputs),
            is_plain=self._is_seen_to_be_plain(batch),
        )

    def _loss_of_some_logits(self, batch: Mapping[str, Any], labels: Tensor) -> tuple[Tensor, Tensor | None]:
        output = self._forward_instead({**batch, "labels": labels}, self._some_logits)
        logits = logits_of(output)
        return (logits, loss_of(output)) if isinstance(logits, Tensor) else (torch.empty(0), None)

    def _forward_instead(self, batch: Mapping[str, Any], instead: Any) -> Any:
        """The model's output where `instead`, a function as `InThread.loss_request`, answers for the module."""
        with self._apart():
            self.layer.in_thread.loss_request = instead
            try:
                return self._forward(batch)
            finally:
                self.layer.in_thread.loss_request = None

    def _some_logits(self, layer: LRegLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Logits of ordinary size that cost nothing; the same on every call."""
        features = self._one_row(layer.seen_features(args, kwargs))
        if self.reads_sequences and features.ndim == 3:
            features = features[:, 0]
        generator = torch.Generator().manual_seed(0)
        shape = *features.shape[:-1], layer.out_features
        return (2 * torch.randn(shape, generator=generator, device="cpu")).to(features)

    def _is_seen_to_be_plain(self, batch: Mapping[str, Any]) -> bool:
        """Whether the model is seen to take the mean cross-entropy of its logits, and nothing else."""
        seen: list[Tensor | None] = []

        def watch(layer: LRegLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            seen.append(defer_logits(layer, args, kwargs))
            return self._some_logits(layer, args, kwargs) if seen[-1] is None else seen[-1]

        self._forward_instead(batch, watch)
        return len(seen) == 1 and seen[0] is not None and is_mean_cross_entropy(seen[0])

    def _guess(self, targets: Tensor) -> Pairing:
        guessed = loss_kind_of(self.model, targets, self.layer.out_features, repr(self.name))
        return Pairing(shifts_labels(self.model), guessed)

    @property
    def pairing(self) -> Pairing | None:
        """How the model makes its loss of rows; None before it has been asked, and if rows do not repeat it."""
        return self._known.get(_PAIRING)

    @property
    def shifts(self) -> bool:
        """Whether position t goes with label t + 1."""
        return shifts_labels(self.model) if self.pairing is None else self.pairing.shift

    def rows_per_sample(self, labels: Tensor) -> list[int]:
        """How many rows each sample of token labels `[batch, length]` gives."""
        return rows_per_sample(labels, shift=self.shifts)

    def base_output(self, features: Tensor, without: tuple[str, ...] | None = None) -> Tensor:
        """What everything but this adapter gives for rows: the offset of a convex fit.

        Args:
            features: `[n, in_features]`.
            without: names of the active adapters to leave out; None leaves out `adapter_name`.

        Returns:
            `[n, out_features]`; a tensor of its own, safe to change.
        """
        without = (self.adapter_name,) if without is None else without
        # Through whatever lies between, such as an adapter of another method.
        inputs = features.unsqueeze(1) if self.reads_sequences else features
        if self._reads_images:
            inputs = features[:, :, None, None]
        output, _ = first_tensor(self.layer.base_layer(inputs))
        if output.data_ptr() == features.data_ptr():
            output = output.clone()
        for name in self.layer.stacked_adapters:
            if name not in without:
                output = output + self.layer.shortcut(name, features, output)
        return output

    @property
    def reads_sequences(self) -> bool:
        """Whether the module takes `[batch, length, features]` where its output is one vector per sample."""
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

    def _inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(batch, Mapping):
            raise TypeError(f"a batch must be a dictionary of model inputs with labels, got {type(batch).__name__}.")
        if batch.get("labels") is None:
            raise ValueError(f"a batch needs 'labels' to give rows, it has {sorted(batch)}.")
        return private_inputs(batch, next(self.model.parameters()).device)

    def _forward(self, batch: Mapping[str, Any]) -> Any:
        """The model's output, of labels too if it takes any."""
        inputs = self._inputs(batch)
        if not accepts(self.model, "labels"):
            inputs.pop("labels")
        return self.model(**inputs)

    def _run(self, batch: Mapping[str, Any], *, stop: bool) -> tuple[Tensor, dict[str, Any], Any]:
        """What reaches the module, the inputs with labels, and the model's output, None with `stop`."""
        inputs = self._inputs(batch)
        seen: list[Tensor] = []

        def capture(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append(self._one_row(self.layer.seen_features(args, kwargs)))
            if stop:
                raise _Reached

        handle = self.layer.register_forward_pre_hook(capture, with_kwargs=True)
        output = None
        try:
            if stop and not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
                self.model(**{name: value for name, value in self._inputs(batch).items() if name != "labels"})
            else:
                output = self._forward(batch)
        except _Reached:
            pass
        finally:
            handle.remove()
        if len(seen) != 1:
            raise ValueError(f"{self.name!r} was called {len(seen)} times in a forward pass; exactly once is needed.")
        return seen[0], inputs, output

    def _align(self, values: Tensor, inputs: Mapping[str, Any]) -> Rows:
        """Bring features or logits and labels together."""
        return align(
            values,
            inputs["labels"],
            shift=self.shifts,
            out_features=self.layer.out_features,
            pool=partial(self._pool, inputs=inputs),
        )

    def _pool(self, values: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """The position that a sample is classified by, of `[batch, length, width]`."""
        if self.layer.readings.get(self.adapter_name, UNSAID).readout == "mean":
            return values.mean(dim=1)
        if self.reads_sequences:
            return values[:, 0]
        ids, pad = inputs.get("input_ids"), getattr(getattr(self.model, "config", None), "pad_token_id", None)
        if ids is None or pad is None:
            raise ValueError(
                f"{self.name!r} gives one output per token, and which token counts is not known without input_ids and "
                "config.pad_token_id. Set model.config.pad_token_id."
            )
        return values[torch.arange(len(values), device=values.device), last_tokens(ids, pad)]

    def loss_kind(self, targets: Tensor) -> LossKind:
        """What the model minimises over such targets.

        Raises:
            ValueError: for labels outside the classes, or of another number than the outputs.
        """
        guess = loss_kind_of(self.model, targets, self.layer.out_features, repr(self.name))
        known = None if self.pairing is None else self.pairing.loss_kind
        return known if targets.is_floating_point() and known not in (None, "cross_entropy") else guess


def find_terminal(model: nn.Module, adapter_name: str | None = None) -> Terminal:
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
    if layer.source is not None:
        raise ValueError(
            f"a shortcut that is fitted or cached must read the input of its own module, and the one at {name!r} has "
            f"the feature_source {layer.source.name!r}: do without that option, or train the shortcut in the model."
        )
    return Terminal(inner, name, layer, adapter_name)


def trained_elsewhere(terminal: Terminal) -> list[str]:
    """Names of the parameters that require gradients and are not part of the terminal shortcut's layer."""
    own = {id(parameter) for parameter in terminal.layer.parameters()}
    base = {id(parameter) for parameter in terminal.layer.base_layer.parameters()}
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
