"""What a study found: its table, its JSON, its picture."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from examples.comparison.report import finite, format_bytes, markdown_table
from examples.comparison.task import Metric

STUDY_JSON, STUDY_MARKDOWN, STUDY_PICTURE = "study.json", "study.md", "study.png"


@dataclass
class StudyRow:
    """One method in one cell.

    Attributes:
        budget, steps: the cell.
        method, summary: its name, and what it is.
        placement: where it is, "" for methods with one place only.
        size: rank or whatever it is sized by, with its name.
        n_nodes: nodes per component of LReg.
        trainable: parameters that were trained, new modules included.
        learning_rate: the chosen one.
        at_grid_edge: whether a wider grid might do better.
        tuning: all metrics on the tuning split with the first seed.
        seeds, test: of the reported runs, with all metrics on the test split; empty where only the search was made.
        cpu_seconds, seconds: of one training run at the chosen rate with its start, mean over seeds.
        peak_memory: bytes, the most of the reported runs.
        trials: the search, by learning rate.
        curves: per reported run, the tuning figures during training.
    """

    budget: int
    steps: int
    method: str
    summary: str
    placement: str
    size: dict[str, int]
    n_nodes: int | None
    trainable: int
    learning_rate: float
    at_grid_edge: bool
    tuning: dict[str, float]
    seeds: list[int]
    test: list[dict[str, float]]
    cpu_seconds: float
    seconds: float
    peak_memory: int | None
    trials: list[dict[str, float]]
    curves: list[list[dict[str, float]]]

    def figures(self, metric: Metric) -> list[float]:
        """Test figures, one per seed; the tuning figure of the search where there are none."""
        return [test[metric.name] for test in self.test] or [self.tuning[metric.name]]

    def mean(self, metric: Metric) -> float:
        """Mean over seeds."""
        return mean(self.figures(metric))

    def spread(self, metric: Metric) -> float | None:
        """Sample standard deviation over seeds; None for one seed."""
        values = self.figures(metric)
        return stdev(values) if len(values) > 1 and all(map(isfinite, values)) else None

    def seconds_to(self, metric: Metric, wanted: float) -> float | None:
        """Mean CPU seconds until the tuning figure is `wanted` or better; None if any seed does not get there."""
        reached = [
            next((at["cpu_seconds"] for at in curve if metric.score(at[metric.name]) >= metric.score(wanted)), None)
            for curve in self.curves
        ]
        return None if not reached or None in reached else mean(value for value in reached if value is not None)


@dataclass
class StudyReport:
    """Everything a study found out, with its provenance.

    Attributes:
        title: heading of table and picture.
        metric: the figure that decides.
        reference: the method to whose last tuning figure the time is measured.
        left_out: what has no row, and why.
        data, settings, provenance: what the figures rest on.
        base: test figures of the base model, where it means something.
        rows: what was found.
    """

    title: str
    metric: Metric
    reference: str
    left_out: dict[str, str]
    data: dict[str, Any]
    settings: dict[str, Any]
    provenance: dict[str, Any]
    base: dict[str, float] = field(default_factory=dict)
    rows: list[StudyRow] = field(default_factory=list)

    def cells(self) -> dict[tuple[int, int], list[StudyRow]]:
        """The rows of each budget and number of steps, the best first: the tested ones, then the others."""
        cells: dict[tuple[int, int], list[StudyRow]] = {}
        for row in self.rows:
            cells.setdefault((row.budget, row.steps), []).append(row)
        for rows in cells.values():
            rows.sort(key=lambda row: (not row.test, -self.metric.score(row.mean(self.metric))))
        return cells

    def last_row(self) -> str:
        """The newest row as one line."""
        row, metric = self.rows[-1], self.metric
        tried = ", ".join(f"{t['learning_rate']:g}: {metric.show(t[metric.name])}" for t in row.trials)
        line = f"{row.method}: {row.trainable:,} parameters, {row.cpu_seconds:.0f} CPU s"
        line += f", tuning {metric.name} by rate: {tried}"
        if row.test:
            line += f"; test {self._figure(row)}"
        return line + ("; the best rate is at an edge" if row.at_grid_edge else "")

    def table(self, rows: Sequence[StudyRow]) -> str:
        """The table of one cell in Markdown."""
        target = self.target(rows)
        header = [
            *("method", "placement", "size", "trainable", f"tuning {self.metric.name}", f"test {self.metric.name}"),
            *("learning rate", "CPU s", "peak memory"),
            *([] if target is None else [f"CPU s to {self.metric.show(target)}"]),
        ]
        lines = []
        for row in rows:
            reached = None if target is None else row.seconds_to(self.metric, target)
            lines.append(
                [
                    row.method,
                    row.placement or "-",
                    ", ".join(f"{name} {size}" for name, size in row.size.items()) or "-",
                    f"{row.trainable:,}",
                    self.metric.show(row.tuning[self.metric.name]),
                    self._figure(row) if row.test else "-",
                    f"{row.learning_rate:g}{' (edge)' if row.at_grid_edge else ''}",
                    f"{row.cpu_seconds:.1f}",
                    "-" if row.peak_memory is None else format_bytes(row.peak_memory),
                    *([] if target is None else ["-" if reached is None else f"{reached:.1f}"]),
                ]
            )
        return markdown_table([header, *lines], left=3)

    def target(self, rows: Sequence[StudyRow]) -> float | None:
        """What the reference reached at last on the tuning split; None without its curve."""
        reference = next((row for row in rows if row.method == self.reference and any(row.curves)), None)
        return None if reference is None else reference.tuning[self.metric.name]

    def _figure(self, row: StudyRow) -> str:
        spread = row.spread(self.metric)
        return self.metric.show(row.mean(self.metric)) + ("" if spread is None else f" ± {self.metric.show(spread)}")

    def markdown(self) -> str:
        """All tables, with what is left out."""
        parts = [f"# {self.title}"]
        if self.base:
            parts.append(f"Base model: test {self.metric.name} {self.metric.show(self.base[self.metric.name])}.")
        for (budget, steps), rows in self.cells().items():
            parts += [f"## {budget:,} parameters, {steps} steps", self.table(rows)]
        if self.left_out:
            parts += ["## Left out", "\n".join(f"- {reason}" for reason in self.left_out.values())]
        parts += ["## Provenance", "\n".join(f"- {name}: {value}" for name, value in self.provenance.items())]
        return "\n\n".join(parts) + "\n"

    def write(self, directory: Path, draw: Callable[["StudyReport", Path], None] | None = None) -> None:
        """Table, JSON and, if something draws, the picture."""
        content = asdict(self)
        for row, written in zip(self.rows, content["rows"], strict=True):
            written["test_mean"] = row.mean(self.metric) if row.test else None
            written["test_spread"] = row.spread(self.metric) if row.test else None
        text = json.dumps(finite(content), indent=1, ensure_ascii=False) + "\n"
        (directory / STUDY_JSON).write_text(text, encoding="utf-8")
        (directory / STUDY_MARKDOWN).write_text(self.markdown(), encoding="utf-8")
        if draw is not None:
            draw(self, directory / STUDY_PICTURE)

    def closing(self, directory: Path) -> str:
        """What the terminal shows at the end."""
        return f"\n{self.markdown()}\nWritten to {directory}."
