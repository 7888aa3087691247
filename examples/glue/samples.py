"""Labelled sentences or sentence pairs, whatever their source."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from examples.comparison.options import UserError
from examples.glue.tasks import Task

Label = int | float


@dataclass(frozen=True)
class Samples:
    """Texts (one or two per sample) and their labels: class numbers, or positions on the scale of a regression."""

    texts: list[tuple[str, ...]]
    labels: list[Label]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Iterable[int]) -> "Samples":
        """The samples at these positions, in their order."""
        chosen = list(indices)
        return Samples([self.texts[index] for index in chosen], [self.labels[index] for index in chosen])

    def describe(self) -> dict[str, int | str]:
        """Size and fingerprint, so that two runs can be seen to have used the same samples in the same order."""
        content = "\0".join(
            "\t".join((*texts, str(label))) for texts, label in zip(self.texts, self.labels, strict=True)
        )
        return {"samples": len(self), "sha256": hashlib.sha256(content.encode()).hexdigest()[:16]}


def parse_labels(task: Task, labels: Sequence[object], where: str) -> list[Label]:
    """Class numbers or scale positions, from numbers or from the spellings of the official files.

    Raises:
        UserError: if a label is neither a class nor on the scale; the message names the row, counted from 1.
    """
    parsed = []
    for row, label in enumerate(labels, start=1):
        value = parse_label(task, label)
        if value is None:
            hint = "; -1 stands for a label that was not published" if str(label) == "-1" else ""
            raise UserError(
                f"Sample {row} of {where} has the label {label!r}, and the labels of {task.title} are "
                f"{describe_labels(task)}{hint}."
            )
        parsed.append(value)
    return parsed


def parse_label(task: Task, label: object) -> Label | None:
    """One label, or None if it is not one of the task's."""
    if label in task.labels:
        return task.labels.index(str(label))
    try:
        value = float(str(label))
    except ValueError:
        return None
    if task.label_range is not None:
        low, high = task.label_range
        return value if math.isfinite(value) and low <= value <= high else None
    return int(value) if value in range(task.num_labels) else None


def describe_labels(task: Task) -> str:
    """What labels a task has, in words."""
    if task.label_range is not None:
        return "numbers from {:g} to {:g}".format(*task.label_range)
    return ", ".join(f"{number} ({name})" for number, name in enumerate(task.labels))
