"""The result of a comparison: rows, and how they are shown on the terminal, in Markdown and in JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from examples.comparison.task import Metric

JSON_FILE, MARKDOWN_FILE = "results.json", "results.md"


@dataclass
class Row:
    """One line of the table: the base model or one method.

    Attributes:
        method: its name.
        summary: what it is.
        test: metric -> one figure per seed.
        adapter_parameters: trainable parameters without new modules.
        head_parameters: trainable parameters of new modules, equal for all methods.
        size: rank or number of components, with its name.
        n_nodes: nodes per component.
        adapter_bytes: of the saved weights.
        units_per_second: tokens or samples, from the median step.
        training_seconds: of one run at the chosen learning rate, mean over seeds.
        peak_memory: bytes, the most of the reported runs; see `environment.peak_memory`.
        learning_rate: the chosen one.
        at_grid_edge: whether a wider grid might do better.
        trials: the search.
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
    source: str | None = None

    @property
    def trainable_parameters(self) -> int:
        """Everything that was trained."""
        return self.adapter_parameters + self.head_parameters

    def spread(self, metric: str) -> float | None:
        """Sample standard deviation over seeds; None for one seed."""
        values = self.test[metric]
        return stdev(values) if len(values) > 1 and all(map(isfinite, values)) else None


@dataclass
class Report:
    """Everything a comparison has found so far.

    Attributes:
        title: what was adapted to what.
        metrics: the columns; the first one decides.
        unit: tokens or samples.
        budget: of parameters.
        references: name -> figure, to read the table against.
        rows: of the table.
        data: sizes and fingerprints.
        settings: all options.
        provenance: command, machine, versions.
    """

    title: str
    metrics: tuple[Metric, ...]
    unit: str
    budget: int
    references: dict[str, float]
    rows: list[Row]
    data: dict[str, Any]
    settings: dict[str, Any]
    provenance: dict[str, Any]

    def opening(self, sizes: Mapping[str, int | None]) -> str:
        """What is about to happen."""
        chosen = ", ".join(f"{name} ({size})" if size else name for name, size in sizes.items())
        grids = "; ".join(f"{name} {', '.join(f'{r:g}' for r in g)}" for name, g in self.settings["grids"].items())
        return f"{self.title}\nBudget {self.budget:,} parameters: {chosen}\nLearning rates: {grids}"

    def add(self, row: Row, progress: Any) -> None:
        """A row that is finished, which is said at once."""
        self.rows.append(row)
        figures = ", ".join(f"{metric.name} {self._figure(row, metric)}" for metric in self.metrics)
        rate = "" if row.learning_rate is None else f" (learning rate {row.learning_rate:g})"
        progress.say(f"{row.method}: {row.trainable_parameters:,} parameters, test {figures}{rate}")

    def notes(self) -> str:
        """What a reader has to know to read the table rightly, as a list in Markdown."""
        first = self.metrics[0]
        notes = [f"{name}: {first.name} {first.show(value)}." for name, value in self.references.items()]
        sizes = ", ".join(f"{row.method} {key} {size}" for row in self.rows for key, size in row.size.items())
        if sizes:
            notes.append(f"Budget {self.budget:,} parameters, filled as far as the sizes allow: {sizes}.")
        over = [row.method for row in self.rows if row.size and row.adapter_parameters > self.budget]
        if over:
            notes.append(f"Above the budget, by a size that was given: {', '.join(over)}.")
        notes += [
            f"{row.method}: what {row.source} has trained, converted by save_as_lora and loaded on a fresh base model; "
            "parameters are those of that LoRA, and the time is that of training and conversion."
            for row in self.rows
            if row.source
        ]
        edges = [row.method for row in self.rows if row.at_grid_edge and not row.source]
        if edges:
            notes.append(
                f"The best learning rate is at the edge of the grid, a wider one may do better: {', '.join(edges)}."
            )
        if any(len(values) > 1 for row in self.rows for values in row.test.values()):
            notes.append("Mean over the seeds ± sample standard deviation.")
        notes.append("No dropout in any method: the comparison is not about dropout.")
        return "\n".join(f"- {note}" for note in notes)

    def table(self) -> str:
        """The table in Markdown, columns padded so that it also reads well on a terminal."""
        shown = {
            "method": lambda row: row.method,
            "trainable parameters": lambda row: f"{row.trainable_parameters:,}",
            "of these the new head": lambda row: f"{row.head_parameters:,}",
            "saved size": lambda row: format_bytes(row.adapter_bytes) if row.adapter_bytes else "-",
            **{f"test {m.name}": (lambda row, m=m: self._figure(row, m)) for m in self.metrics},  # type: ignore[misc]
            f"{self.unit}/s": lambda row: _or_dash(row.units_per_second, ",.0f"),
            "training time": lambda row: _or_dash(row.training_seconds, ".1f", " s"),
            "peak memory": lambda row: "-" if row.peak_memory is None else format_bytes(row.peak_memory),
            "learning rate": lambda row: _or_dash(row.learning_rate, "g", " (edge)" if row.at_grid_edge else ""),
        }
        if not any(row.head_parameters for row in self.rows):
            del shown["of these the new head"]
        if all(row.peak_memory is None for row in self.rows):
            del shown["peak memory"]
        return markdown_table([list(shown), *([show(row) for show in shown.values()] for row in self.rows)])

    @staticmethod
    def _figure(row: Row, metric: Metric) -> str:
        spread = row.spread(metric.name)
        return metric.show(mean(row.test[metric.name])) + ("" if spread is None else f" ± {metric.show(spread)}")

    def content(self) -> dict[str, Any]:
        """All figures and where they come from, as JSON has them."""
        content = asdict(self)
        for row, written in zip(self.rows, content["rows"], strict=True):
            written["trainable_parameters"] = row.trainable_parameters
            written["test"] = {
                name: {"mean": mean(values), "std": row.spread(name), "values": values}
                for name, values in row.test.items()
            }
        return finite(content)

    def write_json(self, folder: Path) -> None:
        """The record."""
        text = json.dumps(self.content(), indent=2, ensure_ascii=False) + "\n"
        (folder / JSON_FILE).write_text(text, encoding="utf-8")

    def write_markdown(self, folder: Path) -> None:
        """The table with its notes and its provenance."""
        provenance = "\n".join(f"- {name}: {value}" for name, value in self.provenance.items())
        parts = [f"# {self.title}", self.table(), self.notes(), provenance]
        (folder / MARKDOWN_FILE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _or_dash(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def markdown_table(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Cells as a table, the header first, padded so that it also reads well on a terminal.

    Args:
        lines: of cells.
        left: so many columns are aligned to the left, the others to the right.
    """
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rule = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]

    def join(cells: Sequence[str]) -> str:
        pairs = enumerate(zip(cells, widths, strict=True))
        return f"| {' | '.join(c.ljust(w) if column < left else c.rjust(w) for column, (c, w) in pairs)} |"

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
