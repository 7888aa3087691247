"""Samples of one's own: a file to train on and one to report on, csv, tsv or JSON lines.

As in Transformers' run_glue.py: the column `label`, and one or two others with the text. Labels that are words or whole
numbers are classes; other numbers are positions on a scale, which makes it a regression.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.comparison.environment import first_line
from examples.comparison.options import UserError
from examples.glue.samples import Label, Samples
from examples.glue.tasks import Task, TsvColumns

LABEL = "label"
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"delimiter": "\t", "quoting": 3}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
}


def read_own(train_file: str, validation_file: str) -> tuple[Task, Samples, Samples]:
    """The task that the labels make, and the samples to train and to report on."""
    files = [(path, read_columns(path)) for path in (train_file, validation_file)]
    train = files[0][1]
    texts = [name for name in train if name not in (LABEL, "idx")]
    if not 1 <= len(texts) <= 2:
        raise UserError(
            f"'{train_file}' needs the column '{LABEL}' and one or two columns of text; it has {', '.join(train)}."
        )
    for path, columns in files:
        missing = [name for name in (*texts, LABEL) if name not in columns]
        if missing:
            raise UserError(f"'{path}' has no column '{missing[0]}'; it has {', '.join(columns)}.")
        for name in (*texts, LABEL):
            if None in columns[name]:
                row = columns[name].index(None) + 1
                raise UserError(f"Sample {row} of '{path}' has nothing in the column '{name}'.")
    labels = train[LABEL]
    is_regression = any(isinstance(label, float) for label in labels)
    classes = () if is_regression else tuple(sorted(set(labels)))
    if not is_regression and len(classes) < 2:
        raise UserError(f"All labels of '{train_file}' are {classes[0]!r}: there is nothing to tell apart.")
    task = Task(
        name="own",
        title=Path(train_file).name,
        folder="",
        sentences=tuple(texts),
        labels=tuple(map(str, classes)),
        metrics=("pearson", "spearmanr") if is_regression else ("accuracy",),
        tsv=TsvColumns(tuple(texts), LABEL),
        label_range=(min(labels), max(labels)) if is_regression else None,
    )
    parts = []
    for path, columns in files:
        rows = list(zip(*(map(str, columns[name]) for name in texts), strict=True))
        parts.append(Samples(rows, numbered(columns[LABEL], classes, path)))
    return task, parts[0], parts[1]


def read_columns(path: str) -> dict[str, list[Any]]:
    """The columns of a file, by name."""
    if not Path(path).is_file():
        raise UserError(f"The file '{path}' does not exist.")
    kind, options = READERS.get(Path(path).suffix, (None, {}))
    if kind is None:
        raise UserError(f"'{path}' has the ending '{Path(path).suffix}'; known are {', '.join(READERS)}.")
    import datasets  # here, because importing it takes seconds

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(kind, data_files=path, split="train", **options)
    except Exception as error:  # a type of its own for everything that a file can have wrong
        raise UserError(f"'{path}' cannot be read as {kind} ({first_line(error)}).") from error
    return {name: list(rows[name]) for name in rows.column_names}


def numbered(labels: Sequence[Any], classes: Sequence[Any], path: str) -> list[Label]:
    """Class numbers in place of classes; scores as they are."""
    if not classes:
        words = [label for label in labels if not isinstance(label, (int, float))]
        if words:
            raise UserError(f"'{path}' has the label {words[0]!r}, and the others are numbers on a scale.")
        return [float(label) for label in labels]
    numbers = {label: number for number, label in enumerate(classes)}
    unknown = [label for label in labels if label not in numbers]
    if unknown:
        raise UserError(
            f"'{path}' has the label {unknown[0]!r}, which no sample to train on has; these have "
            f"{', '.join(map(repr, classes[:10]))}{', ...' if len(classes) > 10 else ''}."
        )
    return [numbers[label] for label in labels]
