"""Which label belongs to which row of a model's output, and what the model minimises over the rows.

A row is what one label is predicted from: a token, or a sample. Everything here goes by tensors and by the model's own
output; nothing knows of shortcuts.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE_INDEX = -100

Objective = Literal["cross_entropy", "binary_cross_entropy", "squared_error"]


class Rows(NamedTuple):
    """Values and targets, one row per label; padding and ignored labels are left out.

    Attributes:
        features: `[n, width]`, inputs of a module or logits, in the dtype of the model.
        targets: int64 `[n]` (classes), or `[n, out_features]` (values or 0/1 labels) in the dtype of `features`.
    """

    features: Tensor
    targets: Tensor


def shifts_labels(model: nn.Module) -> bool:
    """Whether token t is trained to predict label t + 1."""
    return type(model).__name__.endswith(("CausalLM", "LMHeadModel")) and not getattr(
        getattr(model, "config", None), "is_encoder_decoder", False
    )


def is_per_token(values: Tensor, labels: Tensor) -> bool:
    """Whether there is one class label for every position of `[batch, length, width]`."""
    return values.ndim == 3 and labels.shape == values.shape[:2] and not labels.is_floating_point()


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


def objective_of(model: nn.Module, targets: Tensor, out_features: int, where: str) -> Objective:
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


def row_loss(objective: Objective, logits: Tensor, targets: Tensor) -> Tensor:
    """Mean loss over rows, as Transformers' models compute it: logits `[n, out_features]`, targets as in `Rows`."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if objective == "cross_entropy":
        return F.cross_entropy(logits, targets)
    if objective == "binary_cross_entropy":
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
