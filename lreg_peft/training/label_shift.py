"""The shift in how often each token comes, put into the shortcut on a language model's output in closed form.

With n_v the count of token v in some batches and q_v the sum of the probabilities that the model gives it there, the
constant log((n_v + a) / (q_v + a)) added to the logits brings these two together, where the shift is the same
everywhere. The pseudocount a shrinks it for rare tokens. How much shrinking the data want differs from one task to the
next, so it is chosen on rows that the counts have not seen, down to leaving the shift out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.checks import whole
from ..core.distributed import rank_and_world, require_equal, sum_over_processes, tensor_from_main, together
from ..core.fingerprint import is_sharded
from ..modules import unwrap
from ..output_rows import OutputRows, per_pass
from ..rows import BatchData, batches_of, exact_pass, first_batches, is_per_token, logits_of
from ..tuner.hooks import reminder
from ..tuner.hooks.output_head import wrapped_head
from ..tuner.layer import LRegLayer
from ..tuner.layout import first_tensor
from ..tuner.moves import Tentative

#: Pseudocounts that are tried.
PSEUDOCOUNTS = (1.0, 3.0, 10.0, 30.0, 100.0)
# Rows whose logits exist at the same time while losses are compared.
_ROWS_AT_ONCE = 256
# Rows that judge, over all batches and processes: enough to tell pseudocounts apart, however much is counted.
_JUDGES = 4096
# Singular values of a basis, over the largest one, that its rounding in fp32 cannot be told from.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class LabelShift:
    """What was done about the shift in token frequencies; losses are means over the labels that judge.

    Those are the labels of the batches: all of them up to about 4096, else as many, evenly spaced.

    Attributes:
        loss_before: with the model as it was.
        loss_after: with the shift in place; equal if it was left out.
        heldout_after: with what each half of the batches says, on the other half, at the pseudocount that was chosen.
        pseudocount: a; None if the shift was left out.
    """

    loss_before: float
    loss_after: float
    heldout_after: float
    pseudocount: float | None


def match_token_frequencies(
    model: nn.Module,
    data: BatchData,
    *,
    adapter_name: str | None = None,
    n_batches: int = 32,
    show_progress: bool = True,
) -> LabelShift:
    """Make a trained language model expect every token as often as it comes, in one forward pass over some batches.

    A short training leaves the expected frequencies of most tokens where an optimiser with equal steps for all of them
    got to. What is missing has a closed form: n times a token comes in the batches where the model expects q, and
    log((n + a) / (q + a)) goes into the shortcut on the output head, along the direction in which this is closest to
    a constant. That is the step of `initialize_lreg_weights(..., start_head=True)`, from where the model is now.
    The shift that one half of the batches suggests is tried on the other half, and the reverse: the a that lowers these
    losses most is taken, and if none lowers them the model stays as it was.

    Parameters and cost of the model stay what they are. Call it when training is over, with batches it was trained on:

        trainer.train()
        lreg_peft.match_token_frequencies(model, trainer.get_train_dataloader())

    Args:
        model: a language model with an active LReg adapter that has a shortcut on the output head.
        data: a data set, or batches as the model takes them, dictionaries with labels, of which every process gives
            its own share; only the first `n_batches` are read.
        adapter_name: which adapter; None takes the active one.
        n_batches: batches to run, of each process. The gain grows with the labels in them.
        show_progress: show a progress bar on the main process.

    Returns:
        What was done, with the losses before and after.

    Raises:
        ValueError: if the model has no shortcut of an active adapter on its output head, is sharded (FSDP: load the
            saved adapter into a whole model first), or changes the logits behind the head; if its loss is not the mean
            cross-entropy of the logits; if no label counts; and if processes differ in model or options. The model is
            then as it was.
        TypeError: if a batch is not a dictionary.
            What one process raises, all raise.

    Warns:
        UserWarning: if the start from data that the configuration promises has not been made.
    """
    while isinstance(model, nn.parallel.DistributedDataParallel):  # which waits for the others in every forward pass
        model = model.module
    with together():
        whole("n_batches", n_batches, 1)
        layer, adapter_name = _head(model, adapter_name)
        found = batches_of(data)
    options = {"adapter_name": adapter_name, "n_batches": n_batches}
    require_equal(
        {**options, **layer.state_of(adapter_name)}, "Give every process the same options, and load the same adapter."
    )
    if adapter_name in layer.needs_data_init:
        reminder.warn("the calibration", "projection and mesh are random and uniform", stacklevel=3)
    hidden = not show_progress or rank_and_world()[0] > 0
    instead = "do without match_token_frequencies"
    rows = TokenRows(model, layer, adapter_name, n_batches, False, "a calibration of the output", instead)
    rows.read(model, first_batches(found, n_batches, "LReg calibration", hidden), rows.take)
    with Tentative([layer.parts(adapter_name)[2].weight]) as trial:
        report = rows.start()
        trial.keep()
    return report


def _head(model: nn.Module, adapter_name: str | None) -> tuple[LRegLayer, str]:
    """The output head and the adapter on it."""
    inner = unwrap(model)
    layer = wrapped_head(inner)
    if layer is None:
        raise ValueError(
            "match_token_frequencies is about a shortcut on the output head of a language model, and "
            f"{type(inner).__name__} has none: add the head to target_modules and train it there."
        )
    if is_sharded(inner):
        raise ValueError(
            "match_token_frequencies needs whole parameters, and those of this model are sharded: save the adapter, "
            "load it into a model that is not, and calibrate that."
        )
    active = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lreg_encoder]
    chosen = active[0] if adapter_name is None and len(active) == 1 else adapter_name
    if chosen is None or chosen not in active:
        raise ValueError(
            f"adapter_name must be one of the active adapters on the output head, {active}, got {adapter_name!r}: "
            "activate it with set_adapter."
        )
    return layer, chosen


class TokenRows(OutputRows):
    """What a language model's output head sees, and the shift that follows from that.

    Batches in turn make two halves. They are counted over all processes, one from each in turn, as they are dealt out:
    the halves, and what they choose, are then those of one process, and with a batch for each process neither is empty.

    Args:
        model: with its output head wrapped.
        layer: the wrapped head.
        adapter_name: whose shortcut takes the shift.
        n_batches: passes there will be at most, in each process.
        is_new: whether the basis of the shortcut can give a constant exactly, as it does until it is trained. Else the
            shift goes along what comes closest to one on the rows that judge, by least squares.
        errors: `purpose` and `instead` of `OutputRows`.
    """

    def __init__(
        self, model: nn.Module, layer: LRegLayer, adapter_name: str, n_batches: int, is_new: bool, *errors: str
    ) -> None:
        super().__init__(model, layer, adapter_name, *errors)
        self.layer, self._is_new = layer, is_new
        self._quota = per_pass(_JUDGES, n_batches)
        self._turn, self._world = rank_and_world()  # of the next batch, among those of all processes
        # How often each token comes, and is expected, in each half.
        self._counts, self._expected = torch.zeros(2, 2, layer.out_features, dtype=torch.float64, device="cpu")
        # Features and targets of the rows that judge, of each half.
        self._judges: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [])

    def take(self, inputs: Mapping[str, Any], output: Any) -> None:
        """Count the labels of the pass, and keep some rows.

        Raises:
            ValueError: if labels are not classes, one per token, or the model's logits are not what this module gives.
        """
        labels, logits = inputs.get("labels"), logits_of(output)
        if not isinstance(labels, Tensor) or not isinstance(logits, Tensor) or not is_per_token(logits, labels):
            raise ValueError(f"{self.purpose} needs batches with labels that are classes, one for every token.")
        seen = self.of_pass(inputs, output)
        assert seen.logits is not None
        half = self._turn % 2
        self._turn += self._world
        for part in seen.logits.split(_ROWS_AT_ONCE):
            self._expected[half] += part.float().softmax(dim=-1).sum(dim=0).double().cpu()
        self._counts[half] += torch.bincount(seen.targets, minlength=self.out_features).double().cpu()
        kept = seen.few(self._quota)
        self._judges[half].append((kept.features, kept.targets))

    def start(self) -> LabelShift:
        """Add the shift to the shortcut on the output head, if that pays.

        Returns:
            What was done. The loss on the rows that judge does not rise.

        Raises:
            ValueError: if there was no label that counts, or a logit was NaN.
        """
        counts, expected = sum_over_processes([self._counts, self._expected])
        if not counts.sum():
            raise ValueError(
                f"{self.purpose} needs labels, and there are none: no batches, or those of the batches are all ignored "
                "(-100)."
            )
        if not torch.isfinite(expected).all():
            raise ValueError(
                f"{self.purpose} needs finite logits, and some of {type(self.model).__name__} are NaN or infinite."
            )
        scale = self.layer.scaling[self.adapter_name]
        with exact_pass(self.model):
            if self._is_new and scale:
                k = self.layer.parts(self.adapter_name)[1].constant().float() / scale  # [K], weights of the basis
            else:
                k = self._closest_to_one()
            before, *tried = self._mean_losses(k, [_shifts(counts[1 - half], expected[1 - half]) for half in (0, 1)])
            heldout = min(tried)
            best = tried.index(heldout)
            shift = _shifts(counts.sum(dim=0), expected.sum(dim=0))[1 + best]
            (after,) = self._mean_losses(k, [shift.unsqueeze(0)] * 2)
            if not (heldout < before and after <= before):
                return LabelShift(before, before, before, None)
            with together():
                table = self.layer.table(self.adapter_name)
                self.layer.set_table(self.adapter_name, table + torch.outer(k, shift.to(k)).to(table))
        return LabelShift(before, after, heldout, PSEUDOCOUNTS[best])

    def _mean_losses(self, k: Tensor, shifts: list[Tensor]) -> list[float]:
        """Mean loss of the rows of all processes with shifts `[m, classes]`, other ones for each half: m numbers."""
        total = torch.zeros(len(shifts[0]) + 1, dtype=torch.float64, device="cpu")
        with together():
            for half, own in enumerate(shifts):
                for features, targets in self._pieces(half):
                    logits = first_tensor(self.layer(features))[0].float()
                    factor = self._design(features) @ k.to(logits)
                    total[-1] += len(targets)
                    for i, shift in enumerate(own.to(logits)):
                        moved = torch.addcmul(logits, factor.unsqueeze(1), shift)
                        total[i] += F.cross_entropy(moved, targets, reduction="sum").double().cpu()
        (total,) = sum_over_processes([total])
        return (total[:-1] / total[-1]).tolist()  # type: ignore[no-any-return]

    def _closest_to_one(self) -> Tensor:
        """k `[K]` for which design @ k is closest to one; the shortest one where the basis says one thing twice."""
        size = self.layer.table(self.adapter_name).shape[0]
        gram, total = (torch.zeros(*shape, dtype=torch.float64, device="cpu") for shape in ((size, size), (size,)))
        with together():
            for features, _ in (*self._pieces(0), *self._pieces(1)):
                design = self._design(features).double().cpu()
                gram += design.T @ design
                total += design.sum(dim=0)
        gram, total = sum_over_processes([gram, total])
        inverse = torch.linalg.pinv(gram, hermitian=True, rtol=_ROUNDING)
        return tensor_from_main((inverse @ total).float())

    def _design(self, features: Tensor) -> Tensor:
        """What the table of the shortcut is weighted by, `[n, K]`, the scale of the adapter included."""
        return self.layer.scaled_design(self.adapter_name, features).float()

    def _pieces(self, half: int) -> Iterator[tuple[Tensor, Tensor]]:
        for features, targets in self._judges[half]:
            yield from zip(features.split(_ROWS_AT_ONCE), targets.split(_ROWS_AT_ONCE), strict=True)


def _shifts(counts: Tensor, expected: Tensor) -> Tensor:
    """No shift, then one row per pseudocount, `[1 + pseudocounts, classes]`, fp64."""
    a = torch.tensor(PSEUDOCOUNTS, dtype=torch.float64, device="cpu").unsqueeze(1)
    return F.pad(((counts + a) / (expected + a)).log(), (0, 0, 1, 0))
