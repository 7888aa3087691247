"""The shift in how often each label comes, put into the shortcut on a model's output in closed form.

With n_v the count of label v in some batches and q_v the sum of the probabilities that the model gives it there, the
constant log((n_v + a) / (q_v + a)) added to the logits brings these two together, where the shift is the same
everywhere. The pseudocount a shrinks it for rare labels. How much shrinking the data want differs from one task to the
next, so it is chosen on rows that the counts have not seen, down to leaving the shift out.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.distributed import rank_and_world, sum_over_processes, tensor_from_main, together
from ..modules import unwrap
from ..rows import Rows, align, exact_pass, find_pairing, is_per_token, logits_of, loss_of, model_inputs
from ..tuner.layer import LRegLayer
from ..tuner.layout import first_tensor

#: Pseudocounts that are tried.
PSEUDOCOUNTS = (1.0, 3.0, 10.0, 30.0, 100.0)
# A shift that raises the loss on its own batches is halved so many times before it is left out.
_HALVINGS = 3
# Rows whose logits exist at the same time while losses are compared.
_ROWS_AT_ONCE = 256
# Rows that judge, over all batches and processes: enough to tell pseudocounts apart, however much is counted.
_JUDGES = 4096
# Rows of a batch whose logits are made again from what the head was given, to see that these are the model's own.
_CHECKED = 64
# Singular values of a basis, over the largest one, that its rounding in fp32 cannot be told from.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class LabelShift:
    """What was done about the shift in label frequencies; losses are means over the labels that judge.

    Those are the labels of the batches: all of them up to about 4096, else as many, evenly spaced.

    Attributes:
        loss_before: with the model as it was.
        loss_after: with the shift in place; equal if it was left out.
        heldout_after: with what each half of the batches says, on the other half, at the pseudocount that was chosen.
        pseudocount: a; None if the shift was left out.
        factor: in (0, 1], by which it was scaled back so that the loss did not rise; 0 if it was left out.
    """

    loss_before: float
    loss_after: float
    heldout_after: float
    pseudocount: float | None
    factor: float


@dataclass(frozen=True)
class ShiftedHead:
    """The output head whose shortcut takes the shift, and how errors speak of that.

    Attributes:
        model: the model, with its output head wrapped.
        layer: the wrapped head.
        adapter_name: the adapter.
        purpose: what is done, with the name of the head.
        instead: what to do where it cannot be done.
    """

    model: nn.Module
    layer: LRegLayer
    adapter_name: str
    purpose: str
    instead: str

    def output(self, features: Tensor) -> Tensor:
        """Logits of rows, active shortcuts included, in at least fp32."""
        return first_tensor(self.layer(features))[0].float()

    def design(self, features: Tensor) -> Tensor:
        """What the table of the shortcut is weighted by, `[n, K]`."""
        return self.layer.design(self.adapter_name, features).float()


def shift_labels(
    head: ShiftedHead, batches: Iterable[Mapping[str, Any]], n_batches: int, constant: Tensor | None = None
) -> LabelShift:
    """Add the shift in label frequencies to the shortcut on the output head, if that pays.

    Args:
        head: where.
        batches: this process's share, with labels; the shift of each half of them is tried on the other half.
        n_batches: how many there are at most.
        constant: k `[K]`, the weights of the basis that give the value one; None takes the k that comes closest to one
            on the rows that judge, by least squares.

    Returns:
        What was done. The loss on the rows that judge does not rise.

    Raises:
        ValueError: if there is no label that counts, labels are not classes, or the model's logits are not what this
            module gives.
        TypeError: if a batch is not a dictionary.
    """
    with exact_pass(head.model):
        with together():
            halves = _Half.of(head, batches, n_batches)
        counts, expected = sum_over_processes([torch.stack([getattr(half, kind) for half in halves]) for kind in _SUMS])
        if not counts.sum():
            raise ValueError(
                f"{head.purpose} needs labels, and there are none: no batches, or those of the batches are all ignored "
                "(-100)."
            )
        k = _closest_to_one(halves) if constant is None else constant.float()
        with together():
            losses = [half.losses(k, _shifts(counts[1 - i], expected[1 - i])) for i, half in enumerate(halves)]
        n = torch.tensor([sum(half.n_judges for half in halves)], dtype=torch.float64, device="cpu")
        judged, n = sum_over_processes([losses[0] + losses[1], n])
        judged = judged / n
        before, best = judged[0].item(), int(judged.argmin())
        if best == 0:
            return LabelShift(before, before, before, None, 0.0)
        heldout = judged[best].item()
        shift = _shifts(counts.sum(dim=0), expected.sum(dim=0))[best]
        for halvings in range(_HALVINGS + 1):
            size = 0.5**halvings
            with together():
                losses = [half.losses(k, size * shift.unsqueeze(0)) for half in halves]
            (own,) = sum_over_processes([losses[0] + losses[1]])
            after = (own / n).item()
            if after <= before:
                with together():
                    table = head.layer.table(head.adapter_name)
                    head.layer.set_table(head.adapter_name, table + torch.outer(k, (size * shift).to(k)).to(table))
                return LabelShift(before, after, heldout, PSEUDOCOUNTS[best - 1], size)
    return LabelShift(before, before, heldout, None, 0.0)


def _shifts(counts: Tensor, expected: Tensor) -> Tensor:
    """No shift, then one row per pseudocount, `[1 + pseudocounts, classes]`, fp64."""
    a = torch.tensor(PSEUDOCOUNTS, dtype=torch.float64, device="cpu").unsqueeze(1)
    return F.pad(((counts + a) / (expected + a)).log(), (0, 0, 1, 0))


def _closest_to_one(halves: "tuple[_Half, _Half]") -> Tensor:
    """k `[K]` for which design @ k is closest to one; the shortest one where the basis says one thing twice."""
    with together():
        sums = [half.moments() for half in halves]
    gram, total = sum_over_processes([sums[0][0] + sums[1][0], sums[0][1] + sums[1][1]])
    inverse = torch.linalg.pinv(gram, hermitian=True, rtol=_ROUNDING)
    return tensor_from_main((inverse @ total).float())


def _spaced(n: int, most: int, device: torch.device) -> Tensor:
    """Positions of at most so many of n rows, evenly spaced."""
    few = min(n, most)
    return torch.arange(few, device=device) * n // max(few, 1)


_SUMS = ("counts", "expected")


class _Half:
    """Every other batch: the sums over its rows, and some of them as the head sees them, to judge by."""

    def __init__(self, head: ShiftedHead, judges_per_batch: int) -> None:
        self._head, self._judges_per_batch = head, judges_per_batch
        self._judges: list[Rows] = []
        self.counts, self.expected = torch.zeros(2, head.layer.out_features, dtype=torch.float64, device="cpu")

    @classmethod
    def of(cls, head: ShiftedHead, batches: Iterable[Mapping[str, Any]], n_batches: int) -> "tuple[_Half, _Half]":
        """Both halves, from one pass.

        Batches are counted over all processes, one from each in turn, as they are dealt out: the halves, and what they
        choose, are then those of one process, and with a batch for each process neither half is empty.
        """
        rank, world = rank_and_world()
        judges_per_batch = -(-_JUDGES // (n_batches * world))
        halves = cls(head, judges_per_batch), cls(head, judges_per_batch)
        for i, batch in enumerate(batches):
            halves[(i * world + rank) % 2]._add(batch)
        return halves

    def _add(self, batch: Mapping[str, Any]) -> None:
        """Run the model on a batch."""
        head = self._head
        model, classes = head.model, head.layer.out_features
        inputs = model_inputs(model, batch, labels=False)
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            raise ValueError(f"{head.purpose} needs batches with labels that are classes.")
        seen: list[Tensor] = []
        remove = head.layer.register_input_hook(seen.append)
        try:
            output = model(**inputs)
        finally:
            remove()
        logits = logits_of(output)
        if len(seen) != 1 or not isinstance(logits, Tensor) or not is_per_token(logits, labels):
            raise ValueError(
                f"{type(model).__name__} must give one row of logits per label through its output head, called once, "
                f"for {head.purpose}: {head.instead}."
            )
        if logits.sum().isnan():  # a tenth of the time of looking at each
            raise ValueError(f"{head.purpose} needs finite logits, and some of {type(model).__name__} are NaN.")
        shift = find_pairing(unwrap(model), logits, labels, loss_of(output)).shift
        own, targets = align(logits, labels, shift=shift, out_features=classes)
        features = align(seen[0], labels, shift=shift, out_features=classes).features
        n = len(targets)
        few = _spaced(n, _CHECKED, targets.device)
        if not torch.allclose(head.output(features[few]), own[few].float(), rtol=1e-2, atol=1e-2):
            raise ValueError(
                f"{type(model).__name__} changes what its output head gives before it is the model's output, which "
                f"{head.purpose} does not know of: {head.instead}."
            )
        for logits in own.split(_ROWS_AT_ONCE):
            self.expected += logits.float().softmax(dim=-1).sum(dim=0).double().cpu()
        self.counts += torch.bincount(targets, minlength=classes).double().cpu()
        judges = _spaced(n, self._judges_per_batch, targets.device)
        self._judges.append(Rows(features[judges], targets[judges]))

    @property
    def n_judges(self) -> int:
        """Rows that judge, of this process."""
        return sum(len(rows.targets) for rows in self._judges)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Sums of phi phi^T `[K, K]` and of phi `[K]` over the rows that judge, phi the row of the design; fp64."""
        size = self._head.layer.table(self._head.adapter_name).shape[0]
        gram = torch.zeros(size, size, dtype=torch.float64, device="cpu")
        total = torch.zeros(size, dtype=torch.float64, device="cpu")
        for features, _ in self._pieces():
            design = self._head.design(features).double().cpu()
            gram += design.T @ design
            total += design.sum(dim=0)
        return gram, total

    def losses(self, k: Tensor, shifts: Tensor) -> Tensor:
        """Summed loss with each of the shifts `[m, classes]`: fp64 `[m]`."""
        total = torch.zeros(len(shifts), dtype=torch.float64, device="cpu")
        for features, targets in self._pieces():
            logits = self._head.output(features)
            factor = self._head.design(features) @ k.to(features.device)
            for i, shift in enumerate(shifts.to(logits)):
                moved = torch.addcmul(logits, factor.unsqueeze(1), shift)
                total[i] += F.cross_entropy(moved, targets, reduction="sum").double().cpu()
        return total

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        for features, targets in self._judges:
            yield from zip(features.split(_ROWS_AT_ONCE), targets.split(_ROWS_AT_ONCE), strict=True)
