"""The picture of a comparison: the metric against trainable parameters, and against training time."""

from collections.abc import Sequence
from math import isfinite, log10
from pathlib import Path
from typing import Any

import matplotlib

from comparison.report import Report, Row

matplotlib.use("Agg")  # no display is needed, and none may be there
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

PICTURE_FILE = "results.png"
#: Without the grey, which is the base model's.
COLORS = [color for color in plt.get_cmap("tab10").colors if len(set(color)) > 1]  # type: ignore[attr-defined]


def write_picture(report: Report, directory: Path) -> None:
    """Two panels with one vertical axis; names stand in a column of their own beside them."""
    name = report.metric.name
    rows = [row for row in report.rows if (row.trials or row.source) and isfinite(row.mean(name))]
    if not rows:
        return
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True, layout="constrained")
    direction = "higher" if report.metric.higher_is_better else "lower"
    panels[0].set_ylabel(f"test {name} ({direction} is better)")
    panels[0].set_xlabel("trainable parameters")
    panels[1].set_xlabel("seconds of one training run")
    figure.suptitle(report.title, fontsize=10)
    scale = report.metric.scale
    labelled = []
    for index, row in enumerate(rows):
        color = COLORS[index % len(COLORS)]
        marker = "o" if index < len(COLORS) else "s"
        spread = row.spread(name)
        for axes, x in zip(panels, (row.trainable_parameters, row.training_seconds), strict=True):
            error = None if spread is None else spread * scale
            axes.errorbar(x, row.mean(name) * scale, yerr=error, fmt=marker, color=color, capsize=3)
        labelled.append((row.method, row.training_seconds, row.mean(name), color))
    _frame(panels, rows)
    for row in report.rows:
        if not row.trials and not row.source:
            for axes in panels:
                axes.axhline(row.mean(name) * scale, color="0.4", linestyle="--", linewidth=1)
            labelled.append((f"{row.method} model, not adapted", None, row.mean(name), "0.4"))
    panels[0].margins(y=0.08)
    _label(report, panels[1], labelled)
    figure.savefig(directory / PICTURE_FILE, dpi=120)
    plt.close(figure)


def _frame(panels: Any, rows: Sequence[Row]) -> None:
    scales: list[list[float]] = [
        [row.trainable_parameters for row in rows],
        [row.training_seconds or 1.0 for row in rows],
    ]
    for axes, values in zip(panels, scales, strict=True):
        low, high = min(values) / 1.5, max(values) * 1.5
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if log10(high / low) > 2.5 else (1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)


def _label(report: Report, axes: Any, labelled: list[tuple[str, float | None, float, Any]]) -> None:
    """Names and figures beside the axes, each tied to its point."""
    low, high = axes.get_ylim()
    labelled.sort(key=lambda label: label[2])
    wanted = [(value * report.metric.scale - low) / (high - low) for _, _, value, _ in labelled]
    for (name, x, value, color), height in zip(labelled, spread_out(wanted, 0.06), strict=True):
        axes.annotate(
            f"{name}  {report.metric.show(value)}",
            xy=(axes.get_xlim()[1] if x is None else x, value * report.metric.scale),
            xytext=(1.03, height),
            textcoords="axes fraction",
            color=color,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.6},
        )


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
