"""Which label belongs to which row of a model's output, and what the model minimises over the rows.

A row is what one label is predicted from: a token, or a sample. Everything here goes by tensors and by the model's own
output; nothing knows of shortcuts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE_INDEX = -100

# Relative difference between two computations of one loss from the same logits, by the dtype of the loss.
_SAME_LOSS = {torch.float64: 1e-9, torch.float32: 5e-6}
_SAME_LOSS_HALF = 1e-2
# Passes with other labels, until every class has been one of them.
_MAX_OTHER_LABELS = 8

LossKind = Literal["cross_entropy", "binary_cross_entropy", "squared_error"]


class Rows(NamedTuple):
    """Values and targets, one row per label; padding and ignored labels are left out.

    Attributes:
        features: `[n, width]`, inputs of a module or logits, in the dtype of the model.
        targets: int64 `[n]` (classes), or `[n, out_features]` (values or 0/1 labels) in the dtype of `features`.
    """

    features: Tensor
    targets: Tensor


class Pairing(NamedTuple):
    """How a model makes its loss of rows.

    Attributes:
        shift: whether position t goes with label t + 1.
        loss_kind: what is minimised.
    """

    shift: bool
    loss_kind: LossKind


def shifts_labels(model: nn.Module) -> bool:
    """Whether token t is likely to be trained to predict label t + 1; `find_pairing` asks the model."""
    names = [kind.__name__ for kind in type(model).__mro__]
    return any(name.endswith(("CausalLM", "LMHeadModel")) for name in names) and not getattr(
        getattr(model, "config", None), "is_encoder_decoder", False
    )


def is_per_token(values: Tensor, labels: Tensor) -> bool:
    """Whether there is one class label for every position of `[batch, length, width]`."""
    return values.ndim == 3 and labels.shape == values.shape[:2] and not labels.is_floating_point()


def rows_per_sample(labels: Tensor, *, shift: bool) -> list[int]:
    """How many rows each sample of class labels `[batch]` or `[batch, length]` gives."""
    counted = labels[:, 1:] if shift and labels.ndim == 2 else labels
    return (counted != IGNORE_INDEX).unsqueeze(-1).flatten(1).sum(dim=1).tolist()  # type: ignore[no-any-return]


def uneven_parts(batch: Mapping[str, Any], *, shift: bool) -> set[str]:
    """Which of labels and attention masks make some samples or positions of a batch count for less than others.

    Where nothing does, a mean over samples and one by the mask look like a mean over rows.
    """
    masks = {name: value for name, value in batch.items() if name.endswith("attention_mask")}
    uneven = {name for name, mask in masks.items() if isinstance(mask, Tensor) and len(mask.unique()) > 1}
    labels = batch["labels"]
    if not labels.is_floating_point() and len(set(rows_per_sample(labels, shift=shift))) > 1:
        uneven.add("labels")
    return uneven


def align(
    values: Tensor, labels: Tensor, *, shift: bool, out_features: int, pool: Callable[[Tensor], Tensor] | None = None
) -> Rows:
    """Bring values and labels together.

    Args:
        values: features or logits, `[batch, (length,) width]`.
        labels: `[batch, length]` or one or several per sample; -100 is left out if they are classes.
        shift: whether position t goes with label t + 1.
        out_features: outputs of the model per row: with one, whole numbers are values and no classes.
        pool: makes `[batch, width]` of `[batch, length, width]` where labels belong to samples.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    if is_per_token(values, labels):
        if shift:
            values, labels = values[:, :-1], labels[:, 1:]
        counts = labels != IGNORE_INDEX
        return Rows(values[counts], labels[counts])
    shape = tuple(values.shape)
    is_value = labels.is_floating_point() or out_features == 1
    if values.ndim == 3 and pool is not None:
        values = pool(values)
    elif is_value and len(labels) == len(values):
        values = values.reshape(len(labels), -1)
    if values.ndim != 2 or len(labels) != len(values) or not (is_value or labels.ndim == 1):
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit outputs of shape {shape}: they fit neither the "
            "tokens nor the samples."
        )
    if is_value:
        return Rows(values, labels.to(values.dtype).reshape(len(labels), -1))
    counts = labels != IGNORE_INDEX
    return Rows(values[counts], labels[counts])


def last_tokens(ids: Tensor, pad: int) -> Tensor:
    """Position `[batch]` of the token that decoders classify by: the last one that is not padding."""
    return (torch.arange(ids.shape[1], device=ids.device) * (ids != pad)).argmax(dim=-1)


def loss_kind_of(model: nn.Module, targets: Tensor, out_features: int, where: str) -> LossKind:
    """What `model` minimises over targets as in `Rows`; `where` names the outputs in errors.

    Raises:
        ValueError: for labels outside the classes, or of another number than the outputs.
    """
    if not targets.is_floating_point():
        low, high = (int(targets.min()), int(targets.max())) if len(targets) else (0, 0)
        if low < 0 or high >= out_features:
            raise ValueError(
                f"labels must lie in [0, {out_features - 1}], the outputs of {where}, got {low if low < 0 else high}."
            )
        return "cross_entropy"
    if targets.shape[1] != out_features:
        raise ValueError(f"{where} has {out_features} outputs, but a sample has {targets.shape[1]} labels.")
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    return "binary_cross_entropy" if kind == "multi_label_classification" else "squared_error"


def row_loss(loss_kind: LossKind, logits: Tensor, targets: Tensor) -> Tensor:
    """Mean loss over rows, as Transformers' models compute it: logits `[n, out_features]`, targets as in `Rows`."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if loss_kind == "cross_entropy":
        return F.cross_entropy(logits, targets)
    if loss_kind == "binary_cross_entropy":
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))
    return F.mse_loss(logits, targets.to(logits.dtype))


def logits_of(output: Any) -> Any:
    """The logits in what a model returned: a tensor, a dictionary of any kind, or an object; None without any."""
    if isinstance(output, Tensor):
        return output
    return output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)


def loss_of(output: Any) -> Any:
    """The loss in what a model returned; None without one."""
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)


#: Runs a model with labels; returns its logits and its loss, None without one.
Run = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def find_pairing(
    run: Run,
    labels: Tensor,
    guess: Pairing,
    *,
    out_features: int,
    pool: Callable[[Tensor], Tensor] | None = None,
    is_plain: bool = False,
) -> Pairing | None:
    """Ask a model how it makes its loss of its logits.

    The loss must be, up to rounding, that of rows which are paired one way or another, for the labels given and for
    others that name every class in turn or leave some labels out: a loss that weights some of them, or adds anything,
    is another one.

    Args:
        run: the model, on inputs that fit the labels; in eval mode, without autocast.
        labels: as for `align`, valid.
        guess: what is tried first, and what counts for a model without a loss.
        out_features: as for `align`.
        pool: as for `align`.
        is_plain: it is known that no label counts more than another, so that other labels need not be tried.

    Returns:
        None if the loss is made in a way that rows do not repeat.
    """
    logits, loss = run(labels)
    if loss is None:
        return guess
    shifts = (guess.shift, not guess.shift) if is_per_token(logits, labels) else (guess.shift,)
    kinds: tuple[LossKind, ...] = (guess.loss_kind,)
    if guess.loss_kind != "cross_entropy":
        other: LossKind = "binary_cross_entropy" if guess.loss_kind == "squared_error" else "squared_error"
        kinds = (guess.loss_kind, other)

    agrees = partial(repeats_loss, out_features=out_features, pool=pool)
    for pairing in (Pairing(shift, kind) for shift in shifts for kind in kinds):
        if agrees(pairing, logits, loss, labels):
            break
    else:
        return None
    trials: Iterable[Tensor] = () if is_plain else _other_labels(labels, out_features)
    if pairing.loss_kind == "cross_entropy":
        trials = chain(_fewer_labels(labels, pairing.shift, is_plain), trials)
    return pairing if all(agrees(pairing, *run(others), others) for others in trials) else None


def repeats_loss(
    pairing: Pairing,
    logits: Tensor,
    loss: Tensor | None,
    labels: Tensor,
    *,
    out_features: int,
    pool: Callable[[Tensor], Tensor] | None = None,
) -> bool:
    """Whether the loss that a model made of logits and labels is that of the rows, up to rounding."""
    rows = align(logits, labels, shift=pairing.shift, out_features=out_features, pool=pool)
    if loss is None or loss.numel() != 1:
        return False
    if not len(rows.targets):
        return True
    mine = row_loss(pairing.loss_kind, *rows).reshape(())
    tolerance = _SAME_LOSS.get(loss.dtype, _SAME_LOSS_HALF)
    return torch.allclose(loss.reshape(()).to(mine.dtype), mine, rtol=tolerance, atol=1e-7)


def _fewer_labels(labels: Tensor, shift: bool, is_plain: bool) -> Iterator[Tensor]:
    """The labels without half of the first sample's, if as many count in every sample.

    Only where the model is known to leave labels out: another may take -100 for a class, which is an error that a GPU
    does not recover from.
    """
    is_known = is_plain or bool((labels == IGNORE_INDEX).any())
    if not is_known or len(set(rows_per_sample(labels, shift=shift))) > 1:
        return
    places = (labels != IGNORE_INDEX).nonzero()
    first = places[places[:, 0] == places[0, 0]] if len(places) else places
    if len(first) < len(places):
        fewer = labels.clone()
        fewer[tuple(first[len(first) // 2 :].T)] = IGNORE_INDEX
        yield fewer


def _other_labels(labels: Tensor, out_features: int) -> Iterator[Tensor]:
    """Labels in the same places, that name all classes; two sets of others where labels are values."""
    if labels.is_floating_point() or out_features == 1:
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):  # 0/1 labels are values too
            yield torch.rand(labels.shape, generator=generator, device="cpu").round().to(labels)
        return
    counts = labels != IGNORE_INDEX
    n = int(counts.sum())
    for k in range(min(-(-out_features // n), _MAX_OTHER_LABELS) if n else 0):
        others = labels.clone()
        others[counts] = (torch.arange(n, device=labels.device) + k * n) % out_features
        yield others
