"""Which label belongs to which row of a model's output, and what the model minimises over the rows.

A row is what one label is predicted from: a token, or a sample. Everything here goes by tensors and by the model's own
output; nothing knows of shortcuts.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from tqdm.auto import tqdm

from .core.distributed import rank_and_world
from .core.solve.cross_entropy import solve_cross_entropy
from .core.solve.least_squares import solve_least_squares
from .core.solve.problem import Solution
from .modules import accepts, eval_mode

IGNORE_INDEX = -100

# Relative difference between two computations of one loss from the same logits, by the dtype of the loss.
_SAME_LOSS = {torch.float64: 1e-9, torch.float32: 1e-5}
_SAME_LOSS_HALF = 1e-2

# Difference between two computations of one output, by its dtype.
_SAME_OUTPUT = {torch.float64: 1e-6, torch.float32: 1e-4}
_SAME_OUTPUT_HALF = 3e-2

#: What functions take that read data: batches, dictionaries of model inputs by name, or a data set of samples.
BatchData = Iterable[Mapping[str, Any]] | Dataset[Any]

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


# Batches


def batches_of(data: Any, batch_size: int = 8, *, in_order: bool = False) -> Iterable[Mapping[str, Any]]:
    """Batches of whatever a caller gave: a data set of samples, of torch or of `datasets`, gets a data loader.

    Its samples come in a random order that is always the same, or `in_order`; of several processes each takes its
    share. They are put together by `transformers.default_data_collator`. Data loaders and other iterables give batches
    as they are.

    Raises:
        TypeError: if it cannot be iterated over.
    """
    if isinstance(data, Mapping) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise TypeError(
            f"data must be a data set or something that gives batches, such as a DataLoader, got a "
            f"{type(data).__name__}" + ("; put a single batch into a list." if isinstance(data, Mapping) else ".")
        )
    is_of_datasets = any(kind.__module__.partition(".")[0] == "datasets" for kind in type(data).__mro__)
    if not (isinstance(data, Dataset) or is_of_datasets):
        return data  # type: ignore[no-any-return]
    from transformers import default_data_collator

    if hasattr(data, "__len__") and not isinstance(data, IterableDataset):  # else it can only be gone through
        rank, world = rank_and_world()
        n = len(data)
        share = -(-n // world)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        data = Subset(data, range(n)[rank * share :][:share] if in_order else order[rank::world].tolist())
    return DataLoader(data, batch_size=batch_size, collate_fn=default_data_collator)


# Calling a model


def first_batches(batches: Iterable[Any], most: int, what: str, hidden: bool) -> Iterable[Any]:
    """At most so many batches, behind a progress bar that ends where they do."""
    total = min(most, len(batches)) if isinstance(batches, Sized) else most
    return tqdm(islice(batches, most), total=total, desc=what, disable=hidden)  # type: ignore[no-any-return]


def check_batch(batch: Any) -> Mapping[str, Any]:
    """The batch, which must be a dictionary of tensors for several samples: else a `TypeError` or a `ValueError`."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch must be a dictionary of model inputs by name, got {type(batch).__name__}.")
    ids = batch.get("input_ids")
    if isinstance(ids, list) or (isinstance(ids, Tensor) and ids.ndim == 1):
        what = f"of shape {list(ids.shape)}" if isinstance(ids, Tensor) else "as a list"
        raise ValueError(
            f"a batch must hold tensors [batch, length], got input_ids {what}, as a sample has: put the samples into a "
            "DataLoader with a collate_fn that pads them, such as DataCollatorWithPadding(tokenizer)."
        )
    return batch


def model_inputs(model: nn.Module, batch: Any, *, labels: bool = True) -> dict[str, Any]:
    """A batch as a pass takes it that the user did not ask for: tensors on the device of the model, copies of objects
    that it may change.

    Args:
        model: the model.
        batch: inputs of the model by name.
        labels: whether the batch must have labels.

    Raises:
        TypeError: if it is not a dictionary.
        ValueError: if labels are missing, or no tensor.
    """
    check_batch(batch)
    if labels and not isinstance(batch.get("labels"), Tensor):
        raise ValueError(f"a batch needs 'labels', a tensor; it has {sorted(batch)}.")
    device = next(model.parameters()).device
    return {
        name: value.to(device) if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in batch.items()
    }


def without_labels(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs for a pass that computes no loss; an encoder-decoder reads the labels as inputs too."""
    others = {name: value for name, value in inputs.items() if name != "labels"}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and accepts(model, "decoder_input_ids"):
        prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if others.get("decoder_input_ids") is None and prepare is not None:
            others["decoder_input_ids"] = prepare(inputs["labels"])
    return others


@contextmanager
def exact_pass(model: nn.Module) -> Iterator[None]:
    """For passes of our own: in eval mode, without autocast and without a graph."""
    device = next(model.parameters()).device.type
    with torch.no_grad(), eval_mode(model), torch.autocast(device, enabled=False):
        yield


def logits_of(output: Any) -> Any:
    """The logits in what a model returned: a tensor, a dictionary, an object or a tuple; None without any."""
    return _part_of(output, "logits", lambda part: part.ndim > 0)


def loss_of(output: Any) -> Any:
    """The loss in what a model returned; None without one."""
    return _part_of(output, "loss", lambda part: part.ndim == 0)


def _part_of(output: Any, name: str, fits: Callable[[Tensor], bool]) -> Any:
    if isinstance(output, Mapping):
        return output.get(name)
    if isinstance(output, (Tensor, tuple, list)):
        parts = [output] if isinstance(output, Tensor) else output[:2]  # the loss, if there is one, and the logits
        return next((part for part in parts if isinstance(part, Tensor) and fits(part)), None)
    return getattr(output, name, None)


def width_of(logits: Tensor) -> int:
    """How many outputs there are per row of `[batch, (length,) width]`; one if there is no such dimension."""
    return logits.shape[-1] if logits.ndim > 1 else 1


# Pairing


def shifts_labels(model: nn.Module) -> bool:
    """Whether token t is trained to predict label t + 1, by the kind of the model."""
    names = [kind.__name__ for kind in type(model).__mro__]
    return any(name.endswith(("CausalLM", "LMHeadModel")) for name in names) and not getattr(
        getattr(model, "config", None), "is_encoder_decoder", False
    )


def is_per_token(values: Tensor, labels: Tensor) -> bool:
    """Whether there is one class label for every position of `[batch, length, width]`."""
    return values.ndim == 3 and labels.shape == values.shape[:2] and not labels.is_floating_point()


def are_values(labels: Tensor, out_features: int) -> bool:
    """Whether labels are values or 0/1 and no classes: with one output, whole numbers are values too."""
    return labels.is_floating_point() or out_features == 1


def align(
    values: Tensor, labels: Tensor, *, shift: bool, out_features: int, pool: Callable[[Tensor], Tensor] | None = None
) -> Rows:
    """Bring values and labels together.

    Args:
        values: features or logits, `[batch, (length,) width]`.
        labels: `[batch, length]` or one or several per sample; -100 is left out if they are classes.
        shift: whether position t goes with label t + 1.
        out_features: outputs of the model per row.
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
    is_value = are_values(labels, out_features)
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


def last_tokens(values: Tensor, inputs: Mapping[str, Any], config: Any, name: str) -> Tensor:
    """What decoders classify a sample by, of `[batch, length, width]`: the last position that is not padding.

    Args:
        values: features or outputs of every token.
        inputs: of the model.
        config: of the model, which knows the token that pads.
        name: of the module, for the error.

    Raises:
        ValueError: if it is not known which tokens are padding.
    """
    ids, pad = inputs.get("input_ids"), getattr(config, "pad_token_id", None)
    if ids is None or pad is None:
        raise ValueError(
            f"{name!r} gives one output per token, and which token counts is not known without input_ids and "
            "config.pad_token_id. Set model.config.pad_token_id."
        )
    last = (torch.arange(ids.shape[1], device=ids.device) * (ids != pad)).argmax(dim=-1)
    return values[torch.arange(len(values), device=values.device), last]


def loss_kind_of(model: nn.Module, labels: Tensor, out_features: int) -> LossKind:
    """What `model` minimises over labels, as Transformers' models choose it.

    Raises:
        ValueError: for labels outside the classes, or of another number than the outputs.
    """
    if not are_values(labels, out_features):
        classes = labels[labels != IGNORE_INDEX]
        low, high = (int(classes.min()), int(classes.max())) if len(classes) else (0, 0)
        if low < 0 or high >= out_features:
            raise ValueError(
                f"labels must lie in [0, {out_features - 1}], the classes of {type(model).__name__}, or be "
                f"{IGNORE_INDEX}, got {low if low < 0 else high}."
            )
        return "cross_entropy"
    width = labels[0].numel() if len(labels) else out_features
    if width != out_features:
        raise ValueError(f"{type(model).__name__} has {out_features} outputs, but a sample has {width} labels.")
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    return "binary_cross_entropy" if kind == "multi_label_classification" else "squared_error"


def check_yes_or_no(loss_kind: LossKind, targets: Tensor) -> None:
    """Raise a `ValueError` if targets of yes-or-no questions lie outside [0, 1]: their loss has no minimum."""
    if loss_kind == "binary_cross_entropy" and len(targets):
        low, high = float(targets.min()), float(targets.max())
        if not 0 <= low <= high <= 1:
            raise ValueError(
                "labels must lie in [0, 1] for problem_type='multi_label_classification', got values from "
                f"{low:.6g} to {high:.6g}; other values are for 'regression'."
            )


def row_loss(loss_kind: LossKind, logits: Tensor, targets: Tensor) -> Tensor:
    """Mean loss over rows, as Transformers' models compute it: logits `[n, out_features]`, targets as in `Rows`."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if loss_kind == "cross_entropy":
        return F.cross_entropy(logits, targets)
    if loss_kind == "binary_cross_entropy":
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))
    return F.mse_loss(logits, targets.to(logits.dtype))


def solver_of(loss_kind: LossKind, out_features: int) -> Callable[..., Solution]:
    """The convex solver of `row_loss`: solvers sum over outputs and halve squares, models average over outputs."""
    if loss_kind == "squared_error":
        return partial(solve_least_squares, scale=2 / out_features)
    if loss_kind == "binary_cross_entropy":
        return partial(solve_cross_entropy, targets="labels", scale=1 / out_features)
    return solve_cross_entropy


def same_loss(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether two scalars computed in `dtype` are one loss, up to rounding."""
    tolerance = _SAME_LOSS.get(dtype, _SAME_LOSS_HALF)
    return bool(torch.isclose(one.reshape(()).to(other), other, tolerance, 1e-7, equal_nan=True))


def same_output(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs of one shape differ by rounding alone."""
    tolerance = _SAME_OUTPUT.get(one.dtype, _SAME_OUTPUT_HALF)
    return one.shape == other.shape and torch.allclose(
        other.to(one), one, rtol=tolerance, atol=tolerance, equal_nan=True
    )


def find_pairing(model: nn.Module, logits: Tensor, labels: Tensor, loss: Tensor | None) -> Pairing:
    """Which label a row goes with, and what is minimised: what gives the loss that the model itself made of a batch.

    What Transformers' models do is tried first, then the other shift of token labels, and the other kind of loss for
    values. One batch shows what it shows: a weight of a class that it does not hold goes unseen.

    Args:
        model: the model, for what its kind and configuration say.
        logits: its own, `[batch, (length,) out_features]`; computed in eval mode, without autocast.
        labels: of the batch.
        loss: its own; None for a model without one, which is then taken at its word.

    Raises:
        ValueError: if labels do not fit, or no pairing gives the loss.
    """
    width = width_of(logits)
    kind, shift = loss_kind_of(model, labels, width), shifts_labels(model)
    kinds: tuple[LossKind, ...] = (kind,)
    if kind != "cross_entropy":
        kinds = (kind, "squared_error" if kind == "binary_cross_entropy" else "binary_cross_entropy")
    for pairing in (Pairing(s, k) for s in (shift, not shift) for k in kinds):
        rows = align(logits, labels, shift=pairing.shift, out_features=width)
        if loss is None or not len(rows.targets):
            return pairing
        if loss.numel() == 1 and same_loss(loss, row_loss(pairing.loss_kind, *rows), loss.dtype):
            return pairing
    raise ValueError(
        f"the loss of {type(model).__name__} is not the {kind.replace('_', ' ')} of its outputs averaged over the "
        "labels, which is all that is known here: it weights labels, changes the outputs or adds terms, so train "
        "the adapter in the model, by gradients."
    )
