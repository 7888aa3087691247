"""A closed-form start of the shortcut on a model's output: the shift in how often each label comes.

With n_v the count of label v in some batches and q_v the sum of the probabilities that the model gives it there, the
constant log((n_v + a) / (q_v + a)) added to the logits brings these two together, where the shift is the same
everywhere. The pseudocount a shrinks it for rare labels. How much shrinking the data want differs from one task to the
next, so it is chosen on rows that the counts have not seen, down to leaving the start out.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.distributed import rank_and_world, sum_over_processes, together
from ..labels import Rows, align, is_per_token, logits_of, loss_of, row_loss, shifts_labels
from ..modules import eval_mode, unwrap
from ..tuner.layer import LRegLayer
from ..tuner.layout import first_tensor

#: Pseudocounts that are tried.
PSEUDOCOUNTS = (1.0, 3.0, 10.0, 30.0, 100.0)
# A start that raises the loss on its own batches is halved so many times before it is left out.
_HALVINGS = 3
# Rows whose logits exist at the same time while losses are compared.
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class LabelShift:
    """What a start of the output shortcut did; losses are means over the labels of the batches.

    Attributes:
        loss_before: with the base model.
        loss_after: with the start in place; equal if it was left out.
        heldout_after: with what each half of the batches says, on the other half, at the pseudocount that was chosen.
        pseudocount: a; None if the start was left out.
        size: factor in (0, 1] by which it was scaled back so that the loss did not rise; 0 if it was left out.
    """

    loss_before: float
    loss_after: float
    heldout_after: float
    pseudocount: float | None
    size: float


def start_output(
    model: nn.Module, name: str, layer: LRegLayer, adapter_name: str, batches: Iterable[Mapping[str, Any]]
) -> LabelShift:
    """Let the shortcut on the output head begin with the shift in label frequencies, if that pays.

    Args:
        model: the model, with its output head wrapped.
        name: of the head in the model, for errors.
        layer: the wrapped head, its shortcut still the identity.
        adapter_name: the adapter.
        batches: this process's share, with labels; each half of them judges what the other says.

    Returns:
        What was done. The loss on the batches does not rise.

    Raises:
        ValueError: if there is no label that counts, labels are not classes, or the model's logits are not what this
            module gives.
    """
    with torch.no_grad(), eval_mode(model):
        with together():
            halves = _Half.of(model, name, layer, adapter_name, batches)
        counts, expected = sum_over_processes([torch.stack([getattr(half, kind) for half in halves]) for kind in _SUMS])
        if not (n := counts.sum()):
            raise ValueError(f"a start of {name!r} needs labels, and those of the batches are all ignored (-100).")
        with together():
            losses = [half.losses(_shifts(counts[1 - i], expected[1 - i])) for i, half in enumerate(halves)]
        (judged,) = sum_over_processes([losses[0] + losses[1]])
        before, best = judged[0].item() / n.item(), int(judged.argmin())
        if best == 0:
            return LabelShift(before, before, before, None, 0.0)
        shift = _shifts(counts.sum(dim=0), expected.sum(dim=0))[best - 1]
        sizes = [0.5**halvings for halvings in range(_HALVINGS + 1)]
        with together():
            losses = [half.losses(torch.stack([size * shift for size in sizes])) for half in halves]
        (own,) = sum_over_processes([losses[0] + losses[1]])
        heldout = judged[best].item() / n.item()
        for size, loss in zip(sizes, own[1:].tolist(), strict=True):
            if loss <= own[0].item():
                k = layer.heads[adapter_name].constant(layer.weights(adapter_name))
                layer.set_table(adapter_name, torch.outer(k, (size * shift).to(k)))
                return LabelShift(before, loss / n.item(), heldout, PSEUDOCOUNTS[best - 1], size)
    return LabelShift(before, before, heldout, None, 0.0)


def _shifts(counts: Tensor, expected: Tensor) -> Tensor:
    """One row per pseudocount, `[pseudocounts, classes]`, fp64."""
    a = torch.tensor(PSEUDOCOUNTS, dtype=torch.float64, device="cpu").unsqueeze(1)
    return ((counts + a) / (expected + a)).log()


def _pairing(name: str, model: nn.Module, logits: Tensor, labels: Tensor, loss: Tensor | None) -> bool:
    """Whether position t predicts label t + 1: the pairing whose mean cross-entropy is the model's own loss."""
    guess = shifts_labels(unwrap(model))
    for shift in (guess, not guess):
        rows = align(logits, labels, shift=shift, out_features=logits.shape[-1])
        if loss is None or not len(rows.targets):
            return guess
        own = row_loss("cross_entropy", rows.features, rows.targets)
        if torch.isclose(own.float(), loss.float(), rtol=1e-2 if logits.dtype.itemsize < 4 else 1e-4):
            return shift
    raise ValueError(
        f"the loss of {type(unwrap(model)).__name__} is not the mean cross-entropy of its logits, which the start of "
        f"{name!r} is about: start the other modules alone (output_start=False)."
    )


_SUMS = ("counts", "expected")


class _Half:
    """Every other batch: what its rows look like to the head, and the sums over them."""

    def __init__(self, layer: LRegLayer, adapter_name: str) -> None:
        self._layer, self._adapter_name = layer, adapter_name
        self._rows: list[Rows] = []
        self.counts, self.expected = torch.zeros(2, layer.out_features, dtype=torch.float64, device="cpu")

    @classmethod
    def of(
        cls, model: nn.Module, name: str, layer: LRegLayer, adapter_name: str, batches: Iterable[Mapping[str, Any]]
    ) -> "tuple[_Half, _Half]":
        """Both halves, from one pass.

        Batches are counted over all processes, one from each in turn, as they are dealt out: the halves, and what they
        choose, are then those of one process, and with a batch for each process neither half is empty.
        """
        halves = cls(layer, adapter_name), cls(layer, adapter_name)
        rank, world = rank_and_world()
        for i, batch in enumerate(batches):
            halves[(i * world + rank) % 2].add(model, name, batch)
        return halves

    def add(self, model: nn.Module, name: str, batch: Mapping[str, Any]) -> None:
        """Run the model on a batch."""
        device = next(model.parameters()).device
        inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            raise ValueError(f"a start of {name!r} needs batches with labels that are classes.")
        seen: list[Tensor] = []
        remove = self._layer.register_input_hook(seen.append)
        try:
            output = model(**inputs)
        finally:
            remove()
        logits = logits_of(output)
        if len(seen) != 1 or not isinstance(logits, Tensor) or not is_per_token(logits, labels):
            raise ValueError(
                f"{type(model).__name__} must give one row of logits per label through {name!r}, called once: start "
                "the other modules alone (output_start=False)."
            )
        shift = _pairing(name, model, logits, labels, loss_of(output))
        rows = align(seen[0], labels, shift=shift, out_features=self._layer.out_features)
        theirs = align(logits, labels, shift=shift, out_features=self._layer.out_features).features
        at_once = zip(rows.features.split(_ROWS_AT_ONCE), theirs.split(_ROWS_AT_ONCE), strict=True)
        for features, own in at_once:
            if not torch.allclose(self._base(features), own.float(), rtol=1e-2, atol=1e-2):
                raise ValueError(
                    f"{type(model).__name__} changes what {name!r} gives before it is the model's output: start the "
                    "other modules alone (output_start=False)."
                )
            self.expected += own.float().softmax(dim=-1).sum(dim=0).double().cpu()
        self.counts += torch.bincount(rows.targets, minlength=self._layer.out_features).double().cpu()
        self._rows.append(rows)

    def losses(self, shifts: Tensor) -> Tensor:
        """Summed loss of the base model, then with each of the shifts `[m, classes]`: fp64 `[1 + m]`."""
        total = torch.zeros(1 + len(shifts), dtype=torch.float64, device="cpu")
        layer, adapter = self._layer, self._adapter_name
        k = layer.heads[adapter].constant(layer.weights(adapter)).float()
        for features, targets in self._pieces():
            logits = self._base(features)
            factor = layer.design(adapter, layer.encode(adapter, features)).float() @ k
            for i, shift in enumerate([None, *shifts.to(logits)]):
                moved = logits if shift is None else torch.addcmul(logits, factor.unsqueeze(1), shift)
                total[i] += F.cross_entropy(moved, targets, reduction="sum").double().cpu()
        return total

    def _base(self, features: Tensor) -> Tensor:
        return first_tensor(self._layer.base_layer(features))[0].float()

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        for features, targets in self._rows:
            yield from zip(features.split(_ROWS_AT_ONCE), targets.split(_ROWS_AT_ONCE), strict=True)
