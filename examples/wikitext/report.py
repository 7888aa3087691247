"""The result of a comparison: rows, and the four ways they are shown (terminal, Markdown, JSON, picture)."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import accelerate
import matplotlib
import peft
import tokenizers
import torch
import transformers

import lreg_peft

matplotlib.use("Agg")  # no display is needed, and none may be there
import matplotlib.pyplot as plt

JSON_FILE, MARKDOWN_FILE, PICTURE_FILE = "results.json", "results.md", "perplexity.png"


@dataclass
class Row:
    """One line of the table: the base model or one method."""

    method: str
    summary: str
    trainable_parameters: int
    test_perplexities: list[float]  # one per seed
    size: dict[str, int] = field(default_factory=dict)  # rank or number of components
    adapter_bytes: int = 0
    tokens_per_second: float | None = None
    learning_rate: float | None = None
    at_grid_edge: bool = False
    trials: list[dict[str, float]] = field(default_factory=list)

    @property
    def test_perplexity(self) -> float:
        """Mean over seeds."""
        return mean(self.test_perplexities)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over seeds; None for one seed."""
        return stdev(self.test_perplexities) if len(self.test_perplexities) > 1 else None


@dataclass
class Report:
    """Everything a comparison found out, with its provenance."""

    source: str
    budget: int
    unigram_perplexity: float
    rows: list[Row]
    text: dict[str, Any]
    tokens: dict[str, int]
    settings: dict[str, Any]
    provenance: dict[str, Any]

    def opening(self, sizes: dict[str, int | None], grids: dict[str, list[float]]) -> str:
        """What is about to be compared."""
        text = ", ".join(f"{name} {count:,}" for name, count in self.tokens.items())
        lines = [
            f"Text: {self.source} (tokens: {text}). A unigram model has perplexity {self.unigram_perplexity:.1f}.",
            f"Budget: {self.budget:,} trainable parameters.",
        ]
        for name, grid in grids.items():
            size = "its count is fixed" if sizes[name] is None else f"size {sizes[name]}"
            lines.append(f"  {name}: {size}, learning rates {', '.join(f'{rate:g}' for rate in grid)}")
        return "\n".join(lines)

    def last_row(self) -> str:
        """The newest row as one line."""
        row = self.rows[-1]
        line = f"{row.method}: held-out perplexity {row.test_perplexity:.2f}"
        if row.trials:
            tried = ", ".join(f"{t['learning_rate']:g}: {t['tuning_perplexity']:.2f}" for t in row.trials)
            line += f", {row.trainable_parameters:,} parameters (tuning perplexity by learning rate: {tried})"
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
        fixed = [row for row in self.rows if not row.size and row.method != "base"]
        notes = [f"A unigram model has perplexity {self.unigram_perplexity:.1f} on the held-out text."]
        if sized:
            sizes = ", ".join(f"{row.method} {key} {size}" for row in sized for key, size in row.size.items())
            notes.append(f"Budget {self.budget:,} parameters, filled as far as the sizes allow: {sizes}.")
        if fixed:
            notes.append(f"No size to choose, their counts are what they are: {', '.join(r.method for r in fixed)}.")
        edges = [row.method for row in self.rows if row.at_grid_edge]
        if edges:
            notes.append(
                f"The best learning rate is at the edge of the grid, a wider one may do better: {', '.join(edges)}."
            )
        notes.append("No dropout in any method: LReg keeps the frozen backbone in eval mode.")
        return notes

    def table(self) -> str:
        """The table in Markdown, columns padded so that it also reads well on a terminal."""
        header = (
            "method",
            "trainable parameters",
            "saved size",
            "held-out perplexity",
            "tokens/s in training",
            "learning rate",
        )
        lines = [header, *(self._cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

        def join(cells: Sequence[str]) -> str:
            padded = [
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            return f"| {' | '.join(padded)} |"

        rule = ["-" * width if column == 0 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
        return "\n".join([join(header), join(rule), *map(join, lines[1:])])

    @staticmethod
    def _cells(row: Row) -> tuple[str, ...]:
        spread = "" if row.spread is None else f" ± {row.spread:.2f}"
        return (
            row.method,
            f"{row.trainable_parameters:,}",
            format_bytes(row.adapter_bytes) if row.adapter_bytes else "-",
            f"{row.test_perplexity:.2f}{spread}",
            "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
            "-" if row.learning_rate is None else f"{row.learning_rate:g}{' (edge)' if row.at_grid_edge else ''}",
        )

    def write_json(self, directory: Path) -> None:
        """All figures and where they come from."""
        content = asdict(self)
        for row, written in zip(self.rows, content["rows"], strict=True):
            written["test_perplexity"], written["test_perplexity_std"] = row.test_perplexity, row.spread
        text = json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n"
        (directory / JSON_FILE).write_text(text, encoding="utf-8")

    def write_markdown(self, directory: Path) -> None:
        """The table with its notes and its provenance."""
        provenance = [f"- {name}: {value}" for name, value in self.provenance.items()]
        notes = [f"- {note}" for note in self.notes()]
        parts = [f"# Adaptation to: {self.source}", self.table(), "\n".join(notes), "\n".join(provenance)]
        (directory / MARKDOWN_FILE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")

    def write_picture(self, directory: Path) -> None:
        """Held-out perplexity against trainable parameters; names stand in a column of their own beside the axes."""
        base, *methods = self.rows
        figure, axes = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
        axes.set_xscale("log")
        axes.set_xlabel("trainable parameters")
        axes.set_ylabel("held-out perplexity (lower is better)")
        axes.set_title(f"Adaptation to: {self.source}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.axhline(base.test_perplexity, color="0.4", linestyle="--", linewidth=1)
        labelled = [("base model, not adapted", None, base.test_perplexity, "0.4")]
        for index, row in enumerate(methods):
            color = f"C{index}"
            axes.errorbar(
                row.trainable_parameters,
                row.test_perplexity,
                yerr=row.spread,
                fmt="o",
                color=color,
                capsize=3,
            )
            labelled.append((row.method, row.trainable_parameters, row.test_perplexity, color))
        if methods:
            counts = [row.trainable_parameters for row in methods]
            axes.set_xlim(min(counts) / 2, max(counts) * 2)
        axes.margins(y=0.08)

        low, high = axes.get_ylim()
        labelled.sort(key=lambda label: label[2])
        wanted = [(perplexity - low) / (high - low) for _, _, perplexity, _ in labelled]
        for (name, count, perplexity, color), height in zip(labelled, spread_out(wanted, 0.06), strict=True):
            axes.annotate(
                f"{name}  {perplexity:.1f}",
                xy=(axes.get_xlim()[1] if count is None else count, perplexity),
                xytext=(1.03, height),
                textcoords="axes fraction",
                color=color,
                va="center",
                annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.6},
            )
        figure.savefig(directory / PICTURE_FILE, dpi=120)
        plt.close(figure)


def spread_out(wanted: Sequence[float], gap: float) -> list[float]:
    """Move sorted heights apart to at least `gap`, upwards first, then down from the top edge if they do not fit."""
    heights: list[float] = []
    for height in wanted:
        heights.append(max(height, heights[-1] + gap) if heights else max(height, 0.0))
    ceiling = 1.0
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], ceiling)
        ceiling = heights[index] - gap
    return heights


def finite(value: Any) -> Any:
    """The same content with null for NaN and infinity (a diverged trial), which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def format_bytes(n_bytes: int) -> str:
    """Bytes in decimal units, as file managers show them."""
    return f"{n_bytes / 1e6:.2f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.1f} KB"


def versions() -> dict[str, str]:
    """Versions of everything that can move a figure."""
    packages = (lreg_peft, peft, transformers, accelerate, tokenizers, torch)
    return {
        "python": platform.python_version(),
        **{package.__name__: package.__version__ for package in packages},
    }
