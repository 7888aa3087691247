"""The nine GLUE tasks: columns, labels, metrics, and where the official files keep them.

Names, columns and split names are those of `nyu-mll/glue` on the hub; files, columns and label spellings those of the
official download (Wang et al. 2019, gluebenchmark.com).
"""

from dataclasses import dataclass
from difflib import get_close_matches

from examples.comparison.options import UserError

HUB_NAME = "nyu-mll/glue"
HUB_LABEL = "label"
ENTAILMENT_PAIR = ("entailment", "not_entailment")


@dataclass(frozen=True)
class TsvColumns:
    """Where an official file keeps its columns: by header name, or by position where the file has no header."""

    sentences: tuple[str, ...] | tuple[int, ...]
    label: str | int

    @property
    def has_header(self) -> bool:
        """Whether the first line names the columns; CoLA's files have no such line."""
        return isinstance(self.label, str)


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: what `--task` calls it, and its configuration on the hub.
        title: its name in print.
        folder: its folder in the official download.
        sentences: the columns of text on the hub, one or two.
        labels: names of the classes in the order of their numbers; empty for regression.
        metrics: the official figures; GLUE's score is their mean.
        tsv: the columns of the official files.
        evaluations: what a figure is called -> the suffix of its split on the hub and of its file.
        label_range: of a regression.
    """

    name: str
    title: str
    folder: str
    sentences: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    tsv: TsvColumns
    evaluations: tuple[tuple[str, str], ...] = (("validation", ""),)
    label_range: tuple[float, float] | None = None

    @property
    def is_regression(self) -> bool:
        """Whether labels are numbers on a scale, as in STS-B."""
        return self.label_range is not None

    @property
    def num_labels(self) -> int:
        """Outputs of the classification head."""
        return 1 if self.is_regression else len(self.labels)


PAIR = ("sentence1", "sentence2")
BINARY = ("0", "1")

TASKS = {
    task.name: task
    for task in (
        Task(
            *("cola", "CoLA", "CoLA"),
            ("sentence",),
            ("unacceptable", "acceptable"),
            ("matthews_correlation",),
            TsvColumns((3,), 1),
        ),
        Task(
            *("sst2", "SST-2", "SST-2"),
            ("sentence",),
            ("negative", "positive"),
            ("accuracy",),
            TsvColumns(("sentence",), "label"),
        ),
        Task(
            *("mrpc", "MRPC", "MRPC"),
            PAIR,
            ("not_equivalent", "equivalent"),
            ("accuracy", "f1"),
            TsvColumns(("#1 String", "#2 String"), "Quality"),
        ),
        Task(
            *("qqp", "QQP", "QQP"),
            ("question1", "question2"),
            ("not_duplicate", "duplicate"),
            ("accuracy", "f1"),
            TsvColumns(("question1", "question2"), "is_duplicate"),
        ),
        Task(
            *("stsb", "STS-B", "STS-B"),
            PAIR,
            (),
            ("pearson", "spearmanr"),
            TsvColumns(PAIR, "score"),
            label_range=(0.0, 5.0),
        ),
        Task(
            *("mnli", "MNLI", "MNLI"),
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            TsvColumns(PAIR, "gold_label"),
            (("matched", "_matched"), ("mismatched", "_mismatched")),
        ),
        Task(
            *("qnli", "QNLI", "QNLI"),
            ("question", "sentence"),
            ENTAILMENT_PAIR,
            ("accuracy",),
            TsvColumns(("question", "sentence"), "label"),
        ),
        Task(
            *("rte", "RTE", "RTE"),
            PAIR,
            ENTAILMENT_PAIR,
            ("accuracy",),
            TsvColumns(PAIR, "label"),
        ),
        Task(
            *("wnli", "WNLI", "WNLI"),
            PAIR,
            ("not_entailment", "entailment"),
            ("accuracy",),
            TsvColumns(PAIR, "label"),
        ),
    )
}


def find_task(name: str) -> Task:
    """The task of that name, spelt as on the hub or in print."""
    key = name.lower().replace("-", "").replace("_", "")
    if key in TASKS:
        return TASKS[key]
    close = get_close_matches(key, TASKS, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise UserError(f"There is no GLUE task '{name}'; {hint}The tasks are {', '.join(TASKS)}.")
