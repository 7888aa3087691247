"""The result of a comparison: rows, and how they are shown on the terminal, in Markdown and in JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from comparison.task import Metric

JSON_FILE, MARKDOWN_FILE = "results.json", "results.md"


@dataclass
class Row:
    """One line of the table: the base model or one method.

    Attributes:
        method: its name.
        summary: what it is.
        adapter_parameters: trainable parameters without new modules.
        head_parameters: trainable parameters of new modules, equal for all methods.
        test: metric -> one figure per seed.
        size: rank or number of components, with its name.
        n_nodes: nodes per component.
        adapter_bytes: of the saved weights.
        units_per_second: tokens or samples, from the median step.
        training_seconds: of one run at the chosen learning rate, mean over seeds.
        peak_memory: bytes, the most of the reported runs.
        learning_rate: the chosen one.
        at_grid_edge: whether a wider grid might do better.
        trials: the search.
        steps: optimiser steps of every reported run, and the ones whose state was kept.
        source: the method whose adapters were converted to these, for what was not trained itself.
    """

    method: str
    summary: str
    test: dict[str, list[float]]
    adapter_parameters: int = 0
    head_parameters: int = 0
    size: dict[str, int] = field(default_factory=dict)
    n_nodes: int | None = None
    adapter_bytes: int = 0
    units_per_second: float | None = None
    training_seconds: float | None = None
    peak_memory: int | None = None
    learning_rate: float | None = None
    at_grid_edge: bool = False
    trials: list[dict[str, float]] = field(default_factory=list)
    steps: list[dict[str, int]] = field(default_factory=list)
    source: str | None = None

    @property
    def trainable_parameters(self) -> int:
        """Everything that was trained."""
        return self.adapter_parameters + self.head_parameters

    def mean(self, metric: str) -> float:
        """Mean over seeds."""
        return mean(self.test[metric])

    def spread(self, metric: str) -> float | None:
        """Sample standard deviation over seeds; None for one seed."""
        values = self.test[metric]
        return stdev(values) if len(values) > 1 and all(map(isfinite, values)) else None


@dataclass
class Report:
    """Everything a comparison found out, with its provenance."""

    title: str
    metrics: tuple[Metric, ...]
    unit: str
    budget: int
    references: dict[str, float]
    rows: list[Row]
    data: dict[str, Any]
    settings: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def metric(self) -> Metric:
        """The figure that decides."""
        return self.metrics[0]

    def opening(self, sizes: dict[str, int | None], grids: dict[str, list[float]]) -> str:
        """What is about to be compared."""
        lines = [f"{self.title}. Budget: {self.budget:,} trainable parameters."]
        lines += [f"  {name}: {self.metric.name} {self.metric.show(value)}" for name, value in self.references.items()]
        for name, grid in grids.items():
            size = "its count is fixed" if sizes[name] is None else f"size {sizes[name]}"
            lines.append(f"  {name}: {size}, learning rates {', '.join(f'{rate:g}' for rate in grid)}")
        return "\n".join(lines)

    def last_row(self) -> str:
        """The newest row as one line."""
        row, name = self.rows[-1], self.metric.name
        line = f"{row.method}: test {name} {self.metric.show(row.mean(name))}"
        if row.trials:
            tried = ", ".join(f"{t['learning_rate']:g}: {self.metric.show(t[name])}" for t in row.trials)
            line += f", {row.trainable_parameters:,} parameters (tuning {name} by learning rate: {tried})"
        if row.at_grid_edge:
            line += "; the best learning rate is at the edge of its grid"
        return line

    def closing(self, directory: Path) -> str:
        """The table, what to know about it, and where everything is."""
        notes = "\n".join(self.notes())
        seconds = self.provenance["wall time in seconds"]
        return f"\n{self.table()}\n\n{notes}\n\nWritten to {directory} in {seconds:.0f} s."

    def notes(self) -> list[str]:
        """What a reader has to know to read the table rightly."""
        sized = [row for row in self.rows if row.size]
        fixed = [row for row in self.rows if not row.size and row.trials]
        notes = [f"{name}: {self.metric.name} {self.metric.show(value)}." for name, value in self.references.items()]
        if sized:
            sizes = ", ".join(f"{row.method} {key} {size}" for row in sized for key, size in row.size.items())
            notes.append(f"Budget {self.budget:,} parameters, filled as far as the sizes allow: {sizes}.")
        over = [row.method for row in sized if row.adapter_parameters > self.budget]
        if over:
            notes.append(f"Above the budget, by a size that was given: {', '.join(over)}.")
        if fixed:
            notes.append(f"No size to choose, their counts are what they are: {', '.join(r.method for r in fixed)}.")
        notes += [
            f"{row.method}: what {row.source} has trained, converted by save_as_lora and loaded on a fresh base model; "
            "parameters are those of that LoRA, and the time is that of training and conversion."
            for row in self.rows
            if row.source
        ]
        edges = [row.method for row in self.rows if row.at_grid_edge]
        if edges:
            notes.append(
                f"The best learning rate is at the edge of the grid, a wider one may do better: {', '.join(edges)}."
            )
        if any(len(values) > 1 for row in self.rows for values in row.test.values()):
            notes.append("Mean over the seeds ± sample standard deviation.")
        notes.append(f"Peak memory: {self.provenance['peak memory']}.")
        notes.append("No dropout in any method: the comparison is not about dropout.")
        return notes

    def table(self) -> str:
        """The table in Markdown, columns padded so that it also reads well on a terminal."""
        with_head = any(row.head_parameters for row in self.rows)
        header = (
            "method",
            "trainable parameters",
            *(["of these the new head"] if with_head else []),
            "saved size",
            *(f"test {metric.name}" for metric in self.metrics),
            f"{self.unit}/s",
            "training time",
            "peak memory",
            "learning rate",
        )
        return markdown_table([header, *(self._cells(row, with_head) for row in self.rows)])

    def _cells(self, row: Row, with_head: bool) -> tuple[str, ...]:
        return (
            row.method,
            f"{row.trainable_parameters:,}",
            *([f"{row.head_parameters:,}"] if with_head else []),
            format_bytes(row.adapter_bytes) if row.adapter_bytes else "-",
            *(self._figure(row, metric) for metric in self.metrics),
            "-" if row.units_per_second is None else f"{row.units_per_second:,.0f}",
            "-" if row.training_seconds is None else f"{row.training_seconds:.1f} s",
            "-" if row.peak_memory is None else format_bytes(row.peak_memory),
            "-" if row.learning_rate is None else f"{row.learning_rate:g}{' (edge)' if row.at_grid_edge else ''}",
        )

    @staticmethod
    def _figure(row: Row, metric: Metric) -> str:
        if metric.name not in row.test:
            return "-"
        spread = row.spread(metric.name)
        return metric.show(row.mean(metric.name)) + ("" if spread is None else f" ± {metric.show(spread)}")

    def write_json(self, directory: Path) -> None:
        """All figures and where they come from."""
        content = asdict(self)
        for row, written in zip(self.rows, content["rows"], strict=True):
            written["trainable_parameters"] = row.trainable_parameters
            written["test"] = {
                name: {"mean": row.mean(name), "std": row.spread(name), "values": values}
                for name, values in row.test.items()
            }
        text = json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n"
        (directory / JSON_FILE).write_text(text, encoding="utf-8")

    def write_markdown(self, directory: Path) -> None:
        """The table with its notes and its provenance."""
        provenance = [f"- {name}: {value}" for name, value in self.provenance.items()]
        notes = [f"- {note}" for note in self.notes()]
        parts = [f"# {self.title}", self.table(), "\n".join(notes), "\n".join(provenance)]
        (directory / MARKDOWN_FILE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def markdown_table(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Cells as a table, the header first, padded so that it also reads well on a terminal.

    Args:
        lines: of cells.
        left: so many columns are aligned to the left, the others to the right.
    """
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]

    def join(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([join(lines[0]), join(rule), *map(join, lines[1:])])


def finite(value: Any) -> Any:
    """The same content with null for NaN and infinity (a diverged trial), which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def format_bytes(n_bytes: int) -> str:
    """Bytes in decimal units, as file managers show them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.2f} {unit}"
    return f"{n_bytes / 1e3:.1f} KB"
