"""A classifier or regression head that begins where the features of the frozen model put it.

A new head starts near zero. Where the targets are far from that, or the classes are easy to tell from the features as
they are, the first steps of a training push the same gradient through every adapter below. The last linear layer of the
head is a convex problem of its own: solved on the features of a few batches before training (linear probing before
fine-tuning, Kumar et al. 2022), it leaves to the adapters what the features lack. How far the few batches are to be
trusted is the ridge, and halves that judge each other choose it, down to leaving the head as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.distributed import from_main, gather_objects, rank_and_world, together
from ..core.solve.problem import Chunk, Solution
from ..modules import unwrap
from ..rows import (
    BatchData,
    LossKind,
    Pairing,
    align,
    are_values,
    batches_of,
    exact_pass,
    find_pairing,
    is_per_token,
    last_tokens,
    logits_of,
    loss_of,
    model_inputs,
    row_loss,
    rows_per_sample,
    solver_of,
)
from ..tuner.layer import LRegLayer, layers_with_adapter
from ..tuner.layout import first_tensor
from ..tuner.moves import Tentative
from ..tuner.placement import output_head_name

#: Ridges that are tried: penalties on the squared change of the weights, for features of mean squared length one.
RIDGES = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4)
# The constant feature that goes with the bias, beside others of length one: what is asked of a bias is mostly certain.
_CONSTANT = 10.0
# Rows of a head that are looked at, over all batches and processes, and numbers in their outputs.
_MOST_ROWS, _MOST_ENTRIES = 2048, 1 << 24
# What a solve may leave of the loss, as a share of the loss before, or of one.
_TOLERANCE = 1e-3
# Difference between the output of the head and the model's own logits that rounding explains.
_SAME = {torch.float64: 1e-9, torch.float32: 1e-4}
_SAME_HALF = 3e-2
# Singular values of the features, over the largest one, that stand for nothing.
_ROUNDING = 1e-10


@dataclass(frozen=True)
class HeadStart:
    """What was done about the start of a head; losses are means over the rows of the batches, as the model has them.

    Attributes:
        loss_before: with the head as it was.
        loss_after: with the start in place; equal if it was left out.
        heldout_after: what each half of the rows says, on the other half, at the ridge that was chosen.
        ridge: the penalty that was chosen, see `RIDGES`; None if the start was left out.
        gap: the certificate: no change of the head has a penalised loss that is lower by more than this.
        n_rows: rows, one per label, over all processes.
    """

    loss_before: float
    loss_after: float
    heldout_after: float
    ridge: float | None
    gap: float
    n_rows: int


@dataclass(frozen=True)
class LinearHead:
    """The last linear layer of a head that is trained in full.

    Attributes:
        name: of the layer, in the model.
        layer: the copy of it that an adapter trains.
    """

    name: str
    layer: nn.Linear

    @property
    def out_features(self) -> int:
        """Outputs of the model per row."""
        return self.layer.out_features

    @property
    def has_constant(self) -> bool:
        """Whether it has a bias."""
        return self.layer.bias is not None

    def watch(self, see: Callable[[Tensor, Tensor], None]) -> Callable[[], None]:
        """Call `see` with features `[batch, (length,) width]` and output of every pass; returns what ends that."""
        return self.layer.register_forward_hook(lambda module, args, output: see(args[0], output)).remove

    def design(self, features: Tensor) -> Tensor:
        """What the weights multiply: `[n, width]` -> `[n, K]`."""
        return features

    def tensors(self) -> list[Tensor]:
        """What a start changes."""
        return list(self.layer.parameters())

    @torch.no_grad()
    def add(self, change: Tensor) -> Tensor:
        """Add `[K, out_features]`, with a bias `[K + 1, out_features]`, fp64; returns the same as it was stored."""
        weight, bias = self.layer.weight, self.layer.bias
        stored = [_add(weight, change[: self.layer.in_features].T).T]
        if bias is not None:
            stored.append(_add(bias, change[-1]).unsqueeze(0))
        return torch.cat(stored)


@dataclass(frozen=True)
class ShortcutHead:
    """The shortcut around a classifier; attributes and methods as those of `LinearHead`.

    Attributes:
        name: of the wrapped module.
        layer: the wrapped module.
        adapter_name: whose shortcut.
        has_constant: False: a constant is among the functions of the design, where there is one.
    """

    name: str
    layer: LRegLayer
    adapter_name: str
    has_constant: bool = False

    @property
    def out_features(self) -> int:
        """Outputs of the model per row."""
        return self.layer.out_features

    def watch(self, see: Callable[[Tensor, Tensor], None]) -> Callable[[], None]:
        """As of `LinearHead`."""

        def call(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            hidden, features = first_tensor(output)[0], self.layer.seen_features(args, kwargs)
            see(self.layer.layout(self.adapter_name, features, hidden).rows(features), hidden)

        return self.layer.register_forward_hook(call, with_kwargs=True).remove

    def design(self, features: Tensor) -> Tensor:
        """As of `LinearHead`."""
        features = features.to(self.tensors()[0].device)
        return self.layer.design(self.adapter_name, features) * self.layer.scaling[self.adapter_name]

    def tensors(self) -> list[Tensor]:
        """As of `LinearHead`."""
        return [self.layer.parts(self.adapter_name)[2].weight]

    @torch.no_grad()
    def add(self, change: Tensor) -> Tensor:
        """As of `LinearHead`."""
        return _add(self.layer.parts(self.adapter_name)[2].weight, change.T).T


def _add(tensor: Tensor, change: Tensor) -> Tensor:
    """Add in fp64; returns the difference between what is stored now and before, on the CPU."""
    before = tensor.detach().cpu().double()
    tensor.copy_((before + change).to(tensor.dtype))
    return tensor.detach().cpu().double() - before


#: What ends a model and is linear in some of its weights.
Head = LinearHead | ShortcutHead


def find_head(model: nn.Module, adapter_name: str, *, shortcuts: bool) -> Head | None:
    """What a start of the output can be about; None if there is nothing, as in a language model.

    Args:
        model: a model with an adapter.
        adapter_name: of the adapter.
        shortcuts: whether a shortcut on a module behind the backbone will do, where no module is trained in full.
    """
    inner = unwrap(model)
    if output_head_name(inner) is not None:
        return None
    found: Head | None = None
    for name, wrapper in inner.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
            copies = wrapper.modules_to_save[adapter_name].named_modules(prefix=name)
            linear = [(n, module) for n, module in copies if isinstance(module, nn.Linear) and _is_whole(module)]
            if linear:
                found = LinearHead(*linear[-1])
    if found is None and shortcuts and isinstance(inner, PreTrainedModel):
        prefix = f"{inner.base_model_prefix}."
        for name, layer in layers_with_adapter(inner, adapter_name).items():
            if not name.startswith(prefix) and layer.source is None:
                found = ShortcutHead(name, layer, adapter_name)
    return found


def _is_whole(layer: nn.Linear) -> bool:
    """Whether the weight is there, all of it, as numbers."""
    weight = layer.weight
    shape = layer.out_features, layer.in_features
    return weight.is_floating_point() and tuple(weight.shape) == shape and not hasattr(weight, "full_tensor")


class HeadRows(AbstractContextManager["HeadRows"]):
    """What a head sees in passes of the model that are made for whatever reason, paired with the labels.

    Args:
        model: the model.
        head: its head.
        n_batches: passes there will be at most, in each process.
    """

    def __init__(self, model: nn.Module, head: Head, n_batches: int) -> None:
        self._model, self._head = unwrap(model), head
        most = min(_MOST_ROWS, _MOST_ENTRIES // head.out_features)
        self._quota = -(-most // (n_batches * rank_and_world()[1]))
        self._hooks = ExitStack()
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._pairing: Pairing | None = None
        self._rows: list[tuple[Tensor, ...]] = []
        #: Why the head cannot start from what was seen, one sentence; None if it can.
        self.reason: str | None = None

    def __enter__(self) -> "HeadRows":
        self._hooks.callback(
            self._head.watch(lambda features, output: self._seen.append((features.detach(), output.detach())))
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    @torch.no_grad()
    def take(self, inputs: Mapping[str, Any], output: Any) -> None:
        """Keep the rows of the pass that has just been made, from its inputs and the model's own output."""
        seen, self._seen = self._seen, []
        if self.reason is None:
            try:
                self._take(seen, inputs, logits_of(output), loss_of(output))
            except ValueError as error:
                self.reason = str(error)

    def _take(self, seen: Sequence[tuple[Tensor, Tensor]], inputs: Mapping[str, Any], own: Any, loss: Any) -> None:
        name, width, labels = self._head.name, self._head.out_features, inputs.get("labels")
        if not isinstance(labels, Tensor):
            raise ValueError(f"a start of {name!r} needs labels: give batches with 'labels', a tensor.")
        if len(seen) != 1 or not isinstance(own, Tensor) or not own.ndim or own.shape[-1] != width:
            raise ValueError(
                f"{name!r} does not give the output of {type(self._model).__name__}: it must be called once in a "
                f"forward pass and end the model, and was called {len(seen)} times."
            )
        ((features, made),) = seen
        if self._pairing is None:
            self._pairing = find_pairing(self._model, own, labels, loss)
        pool = partial(last_tokens, inputs=inputs, config=getattr(self._model, "config", None), name=name)
        pair = partial(align, labels=labels, shift=self._pairing.shift, out_features=width, pool=pool)
        kept, logits, found = pair(features), pair(own).features, pair(made).features
        rounding = _SAME.get(made.dtype, _SAME_HALF)
        if not torch.allclose(found.to(logits), logits, rounding, rounding, equal_nan=True):
            raise ValueError(f"{type(self._model).__name__} changes what {name!r} gives before it is the output.")
        halves = torch.arange(len(labels)) % 2  # samples in turn
        if not are_values(labels, width):
            counts = rows_per_sample(labels, shift=self._pairing.shift and is_per_token(features, labels))
            halves = halves.repeat_interleave(torch.tensor(counts))
        n = len(halves)
        few = torch.arange(min(n, self._quota)) * n // max(min(n, self._quota), 1)
        chosen = few.to(features.device)
        rows = kept.features[chosen], logits[chosen], kept.targets[chosen], halves[few]
        self._rows.append(tuple(part.cpu() for part in rows))

    def start(self) -> HeadStart | None:
        """Put the head to where the rows of all processes have their optimum, if that pays.

        Returns:
            What was done; None if there is a `reason` not to. The loss on the rows does not rise.

        Raises:
            ValueError: if features or labels are not finite, or the labels are none that the loss has a minimum for.
        """
        everybody = gather_objects((self.reason, self._rows, self._pairing))
        self.reason = next((reason for reason, _, _ in everybody if reason is not None), None)
        pairing = next((pairing for _, _, pairing in everybody if pairing is not None), None)
        rows = [row for _, own, _ in everybody for row in own]
        if self.reason is None and (pairing is None or not sum(len(row[2]) for row in rows)):
            self.reason = f"a start of {self._head.name!r} needs labels, and the batches have none that count."
        if self.reason is not None or pairing is None:
            return None
        with together():
            problem = _Problem(self._head, pairing.loss_kind, *map(torch.cat, zip(*rows, strict=True)))
            choice = problem.choose()
        before, n = problem.before, len(problem.targets)
        heldout, ridge = from_main(choice)  # processors of different kinds may round differently
        if ridge is None:
            return HeadStart(before, before, before, None, 0.0, n)
        with together():
            solution = problem.solve(ridge)
        change, gap = from_main(solution)
        with Tentative(self._head.tensors()) as trial:
            with together():
                after = problem.loss(self._head.add(change))
            after = from_main(after)
            if after <= before:  # which the rounding of the weights may prevent
                trial.keep()
                return HeadStart(before, after, heldout, ridge, gap, n)
        return HeadStart(before, before, before, None, 0.0, n)


def start_head(model: nn.Module, data: BatchData, *, adapter_name: str = "default", n_batches: int = 8) -> HeadStart:
    """The same for a model without shortcuts, in a forward pass of its own.

    Args:
        model: a model with an adapter of any kind and a head in `modules_to_save`.
        data: a data set, or batches as the model takes them, dictionaries with labels; the first `n_batches` are used.
        adapter_name: of the adapter.
        n_batches: batches to run, of each process.

    Returns:
        What was done.

    Raises:
        ValueError: as `initialize_lreg_weights(..., start_head=True)`.
    """
    head = find_head(model, adapter_name, shortcuts=True)
    if head is None:
        raise ValueError(f"{type(unwrap(model)).__name__} has no new head: name it in modules_to_save.")
    rows = HeadRows(model, head, n_batches)
    with together(), rows, exact_pass(model):
        for batch in islice(batches_of(data), n_batches):
            inputs = model_inputs(model, batch)
            rows.take(inputs, model(**inputs))
    report = rows.start()
    if report is None:
        raise ValueError(rows.reason)
    return report


class _Problem:
    """The rows of all processes, and what is solved on them. Everything is in fp64 on the CPU: rows are few.

    Args:
        head: what is to change.
        kind: of the loss.
        features: `[n, width]`.
        logits: the output of the model as it is, `[n, out_features]`.
        targets: as in `rows.Rows`.
        halves: int64 `[n]`, 0 or 1.
    """

    def __init__(
        self,
        head: Head,
        kind: LossKind,
        features: Tensor,
        logits: Tensor,
        targets: Tensor,
        halves: Tensor,
    ) -> None:
        for name, tensor in (("features", features), ("output", logits), ("labels", targets)):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(
                    f"the {name} of {head.name!r} must be finite, got NaN or infinite values in {len(tensor)} rows."
                )
        if kind == "binary_cross_entropy" and not 0 <= float(targets.min()) <= float(targets.max()) <= 1:
            raise ValueError(
                f"labels must lie in [0, 1] for problem_type='multi_label_classification', got values from "
                f"{float(targets.min()):.6g} to {float(targets.max()):.6g}; other values are for 'regression'."
            )
        self.kind, self.logits = kind, logits.double()
        self.targets = targets.double() if targets.is_floating_point() else targets
        #: Mean loss with the head as it is.
        self.before = row_loss(self.kind, self.logits, self.targets).item()
        self._halves = halves
        with torch.no_grad():
            self._design = head.design(features).double().cpu()
        self._has_constant = head.has_constant
        n = len(self._design)
        self._mean = self._design.mean(dim=0) if head.has_constant else torch.zeros_like(self._design[0])
        centred = self._design - self._mean
        length = float(centred.square().sum(dim=1).mean().sqrt())
        self._length = length if length > 0 else 1.0
        basis = centred / self._length
        if head.has_constant:
            basis = torch.cat((basis, basis.new_full((n, 1), _CONSTANT)), dim=1)
        # An orthonormal change of coordinates: the penalty sees none, and few rows have few.
        u, singular, self._axes = torch.linalg.svd(basis, full_matrices=False)
        self._basis = u * singular

    def loss(self, change: Tensor) -> float:
        """Mean loss, with weights changed as `LinearHead.add` takes it."""
        moved = self._design @ change[: self._design.shape[1]]
        if self._has_constant:
            moved = moved + change[-1]
        return row_loss(self.kind, self.logits + moved, self.targets).item()

    def choose(self) -> tuple[float, float | None]:
        """The loss of what each half says on the other one, and the ridge at which it is lowest; None leaves the head
        as it is."""
        first, second = (self._halves == half for half in (0, 1))
        before = self.before
        if not first.any() or not second.any():
            return before, None
        if self.kind == "cross_entropy" and bool((self.targets == self.targets[0]).all()):
            return before, None  # nothing is known of the other classes
        best: tuple[float, float | None] = (before, None)
        starts = [self._nothing(), self._nothing()]
        for ridge in RIDGES:
            total = 0.0
            for i, (fitted, judged) in enumerate(((first, second), (second, first))):
                starts[i] = self._solve(ridge, fitted, starts[i]).coefficients
                moved = self.logits[judged] + self._basis[judged] @ starts[i]
                total += row_loss(self.kind, moved, self.targets[judged]).item() * int(judged.sum())
            heldout = total / len(self.targets)
            if heldout < best[0]:
                best = heldout, ridge
        return best

    def solve(self, ridge: float) -> tuple[Tensor, float]:
        """The optimum on all rows, as `LinearHead.add` takes it, and its certificate."""
        solution = self._solve(ridge, torch.ones_like(self._halves, dtype=torch.bool), self._nothing())
        weights = self._axes.T @ solution.coefficients
        if self._has_constant:
            change, constant = weights[:-1] / self._length, weights[-1:] * _CONSTANT
            return torch.cat((change, constant - self._mean @ change)), solution.gap
        return weights / self._length, solution.gap

    def _nothing(self) -> Tensor:
        return self.logits.new_zeros(self._basis.shape[1], self.logits.shape[1])

    def _solve(self, ridge: float, which: Tensor, start: Tensor) -> Solution:
        chunk = Chunk(self._basis[which], self.targets[which], self.logits[which])
        tolerance = _TOLERANCE * max(self.before, 1.0) if self.kind == "squared_error" else _TOLERANCE
        solve = solver_of(self.kind, self.logits.shape[1])
        return solve(lambda: [chunk], start, ridge=ridge, tolerance=tolerance)
