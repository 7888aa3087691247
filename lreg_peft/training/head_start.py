"""A classifier or regression head that begins where the features of the frozen model put it.

A new head starts near zero. Where the targets are far from that, or the classes are easy to tell from the features as
they are, the first steps of a training push the same gradient through every adapter below. The last linear layer of the
head is a convex problem of its own: solved on the features of a few batches before training (linear probing before
fine-tuning, Kumar et al. 2022), it leaves to the adapters what the features lack. How far the few batches are to be
trusted is the ridge, and halves that judge each other choose it, down to leaving the head as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..core.distributed import from_main, gather_objects, rank_and_world, together
from ..core.solve.problem import Chunk, Solution
from ..modules import unwrap
from ..output_rows import OutputRows, per_pass
from ..rows import BatchData, LossKind, batches_of, check_yes_or_no, row_loss, solver_of
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


def find_head(model: nn.Module, adapter_name: str) -> nn.Linear | None:
    """The last linear layer of a head that an adapter trains in full; None if there is none, as in a language model."""
    inner = unwrap(model)
    if output_head_name(inner) is not None:
        return None
    found = None
    for wrapper in inner.modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
            for module in wrapper.modules_to_save[adapter_name].modules():
                if isinstance(module, nn.Linear) and _is_whole(module):
                    found = module
    return found


def _is_whole(layer: nn.Linear) -> bool:
    """Whether the weight is there, all of it, as numbers."""
    weight = layer.weight
    shape = layer.out_features, layer.in_features
    return weight.is_floating_point() and tuple(weight.shape) == shape and not hasattr(weight, "full_tensor")


class HeadRows(OutputRows):
    """What the last linear layer of a head sees, and its start from that.

    Args:
        model: the model.
        head: its last linear layer, the copy of it that an adapter trains.
        n_batches: passes there will be at most, in each process.
        must_start: whether it is an error if the head cannot start from what was seen.
    """

    def __init__(self, model: nn.Module, head: nn.Linear, n_batches: int, must_start: bool = True) -> None:
        super().__init__(model, head, adapter_name="", instead="there is none for such a head")
        self._quota = per_pass(min(_MOST_ROWS, _MOST_ENTRIES // head.out_features), n_batches)
        self.head, self._must_start = head, must_start
        # Features, logits, targets and half of some rows of each pass.
        self._rows: list[tuple[Tensor, ...]] = []
        # Why the head cannot start from what was seen, one sentence; None if it can.
        self._reason: str | None = None

    def take(self, inputs: Mapping[str, Any], output: Any) -> None:
        """Keep rows of the pass; what stands in the way is kept."""
        if self._reason is None:
            try:
                seen = self.of_pass(inputs, output).few(self._quota)
            except ValueError as error:
                self._reason = str(error)
                return
            assert seen.logits is not None
            kept = seen.features, seen.logits, seen.targets, seen.samples % 2  # samples in turn judge
            self._rows.append(tuple(part.cpu() for part in kept))

    def start(self) -> HeadStart | None:
        """Put the head to where the rows of all processes have their optimum, if that pays.

        Returns:
            What was done; None if the head cannot start from what was seen. The loss on the rows does not rise.

        Raises:
            ValueError: if features or labels are not finite, or the labels are none that the loss has a minimum for; if
                the head must start and cannot.
        """
        everybody = gather_objects((self._reason, self._rows, self.pairing))
        reason = next((reason for reason, _, _ in everybody if reason is not None), None)
        pairing = next((pairing for _, _, pairing in everybody if pairing is not None), None)
        rows = [row for _, own, _ in everybody for row in own]
        if reason is None and (pairing is None or not sum(len(row[2]) for row in rows)):
            reason = f"{self.purpose} needs labels, and the batches have none that count."
        if reason is not None and self._must_start:
            raise ValueError(f"{reason} Or leave the head as it is: start_head=False.")
        if reason is not None or pairing is None:
            return None
        found = None
        with together():
            if rank_and_world()[0] == 0:  # processors of another kind may round differently
                parts = map(torch.cat, zip(*rows, strict=True))
                found = _solve(self.name, self.head, pairing.loss_kind, *parts)
        report, weights = from_main(found)  # type: ignore[misc]
        with Tentative(self.head.parameters()) as trial:
            with together(), torch.no_grad():
                for parameter, weight in zip(self.head.parameters(), weights, strict=False):
                    parameter.copy_(weight)
            trial.keep()
        return report


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
    head = find_head(model, adapter_name)
    if head is None:
        raise ValueError(f"{type(unwrap(model)).__name__} has no new head: name it in modules_to_save.")
    rows = HeadRows(model, head, n_batches)
    rows.read(model, islice(batches_of(data), n_batches), rows.take)
    report = rows.start()
    assert report is not None  # it must start
    return report


def _solve(
    name: str, head: nn.Linear, kind: LossKind, features: Tensor, logits: Tensor, targets: Tensor, halves: Tensor
) -> tuple[HeadStart, list[Tensor]]:
    """What to report, and the weights of the head if a start pays; rows and halves, 0 or 1, are on the CPU."""
    for what, tensor in (("features", features), ("output", logits), ("labels", targets)):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(
                f"the {what} of {name!r} must be finite, got NaN or infinite values in {len(tensor)} rows."
            )
    check_yes_or_no(kind, targets)
    problem = _Problem(kind, features, logits, targets, has_bias=head.bias is not None)
    before, n = problem.before, len(targets)
    heldout, ridge = problem.choose(halves)
    if ridge is not None:
        solution = problem.fit(ridge, torch.ones_like(halves, dtype=torch.bool))
        change = problem.change(solution.coefficients)
        weights, stored = [], []
        for parameter, part in zip(head.parameters(), (change[: head.in_features].T, change[-1]), strict=False):
            now = parameter.detach().cpu()
            weights.append((now.double() + part).to(now.dtype))
            stored.append((weights[-1].double() - now.double()).reshape(head.out_features, -1))
        after = problem.loss(torch.cat(stored, dim=1).T)
        if after <= before:  # which the rounding of the weights may prevent
            return HeadStart(before, after, heldout, ridge, solution.gap, n), weights
    return HeadStart(before, before, before, None, 0.0, n), []


class _Problem:
    """Changes of the weights of a linear layer, `[in_features, out_features]`, with a bias one row more.

    Everything is in fp64: rows are few. Features are centred where there is a bias, and scaled to a mean squared length
    of one.

    Args:
        kind: of the loss.
        features: `[n, in_features]`.
        logits: the output of the model as it is, `[n, out_features]`.
        targets: as in `rows.Rows`.
        has_bias: whether there is a bias.
    """

    def __init__(self, kind: LossKind, features: Tensor, logits: Tensor, targets: Tensor, *, has_bias: bool) -> None:
        self._kind, self._logits = kind, logits.double()
        self._targets = targets.double() if targets.is_floating_point() else targets
        self._inputs = F.pad(features.double(), (0, int(has_bias)), value=1.0)
        self.before = row_loss(kind, self._logits, self._targets).item()
        mean = features.double().mean(dim=0) * has_bias
        length = float((features.double() - mean).square().sum(dim=1).mean().sqrt()) or 1.0
        scaling = torch.eye(self._inputs.shape[1], dtype=torch.float64, device="cpu") / length
        if has_bias:
            scaling[-1, :-1] = -mean / length
            scaling[-1, -1] = _CONSTANT
        # An orthonormal change of coordinates: the penalty sees none, and few rows have few.
        u, singular, axes = torch.linalg.svd(self._inputs @ scaling, full_matrices=False)
        self._basis, self._back = u * singular, scaling @ axes.T

    def change(self, coefficients: Tensor) -> Tensor:
        """The change of the weights that coefficients of the scaled problem stand for."""
        return self._back @ coefficients

    def loss(self, change: Tensor) -> float:
        """Mean loss with the weights changed."""
        return row_loss(self._kind, self._logits + self._inputs @ change, self._targets).item()

    def choose(self, halves: Tensor) -> tuple[float, float | None]:
        """The loss of what each half says on the other one, and the ridge at which it is lowest; None leaves the head
        as it is."""
        first, second = halves == 0, halves == 1
        best: tuple[float, float | None] = (self.before, None)
        if not first.any() or not second.any():
            return best
        if self._kind == "cross_entropy" and bool((self._targets == self._targets[0]).all()):
            return best  # nothing is known of the other classes
        starts: list[Tensor | None] = [None, None]
        for ridge in RIDGES:
            total = 0.0
            for i, (fitted, judged) in enumerate(((first, second), (second, first))):
                starts[i] = found = self.fit(ridge, fitted, starts[i]).coefficients
                moved = self._logits[judged] + self._basis[judged] @ found
                total += row_loss(self._kind, moved, self._targets[judged]).item() * int(judged.sum())
            if total / len(halves) < best[0]:
                best = total / len(halves), ridge
        return best

    def fit(self, ridge: float, which: Tensor, start: Tensor | None = None) -> Solution:
        """The optimum on some rows, from an earlier solution or from nothing."""
        chunk = Chunk(self._basis[which], self._targets[which], self._logits[which])
        if start is None:
            start = self._logits.new_zeros(self._basis.shape[1], self._logits.shape[1])
        tolerance = _TOLERANCE * (max(self.before, 1.0) if self._kind == "squared_error" else 1.0)
        return solver_of(self._kind, self._logits.shape[1])(lambda: [chunk], start, ridge=ridge, tolerance=tolerance)
