"""The picture of a comparison, from its record: the metric against trainable parameters and against training time."""

from collections.abc import Mapping, Sequence
from math import log10
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, and none may be there
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

#: Without the grey, which is the base model's.
COLORS = [color for color in plt.get_cmap("tab10").colors if len(set(color)) > 1]  # type: ignore[attr-defined]


def draw_comparison(record: Mapping[str, Any], path: Path, title: str | None = None) -> None:
    """Two panels with one vertical axis; names stand in a column of their own beside them.

    Args:
        record: what results.json holds.
        path: of the picture.
        title: None makes one of the record's title, metric, budget and number of seeds.
    """
    metric = record["metrics"][0]
    name, scale = metric["name"], metric["scale"]
    rows = [row for row in record["rows"] if row["test"][name]["mean"] is not None]
    trained = [row for row in rows if row["trainable_parameters"]]
    if not trained:
        return
    n_seeds = max(len(row["test"][name]["values"]) for row in trained)
    seeds = "one seed" if n_seeds == 1 else f"mean and standard deviation of {n_seeds} seeds"
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True, layout="constrained")
    figure.suptitle(
        title or f"{record['title']}; adapters of at most {record['budget']:,} parameters; {seeds}", fontsize=10
    )
    panels[0].set_ylabel(f"test {name} ({'higher' if metric['higher_is_better'] else 'lower'} is better)")
    columns = {"trainable parameters": "trainable_parameters", "seconds of one training run": "training_seconds"}
    for axes, (label, column) in zip(panels, columns.items(), strict=True):
        values = [row[column] or 1.0 for row in trained]
        low, high = min(values) / 1.5, max(values) * 1.5
        axes.set(xscale="log", xlim=(low, high), xlabel=label)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if log10(high / low) > 2.5 else (1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    labels = []
    for index, row in enumerate(trained):
        style = {"color": COLORS[index % len(COLORS)], "fmt": "o" if index < len(COLORS) else "s", "capsize": 3}
        y, spread = row["test"][name]["mean"] * scale, row["test"][name]["std"]
        for axes, column in zip(panels, columns.values(), strict=True):
            axes.errorbar(row[column], y, yerr=None if spread is None else spread * scale, **style)
        labels.append((y, f"{row['method']}  {y:.{metric['digits']}f}", row["training_seconds"], style["color"]))
    for row in rows:
        if not row["trainable_parameters"]:
            y = row["test"][name]["mean"] * scale
            for axes in panels:
                axes.axhline(y, color="0.4", linestyle="--", linewidth=1)
            labels.append((y, f"{row['method']} model, not adapted  {y:.{metric['digits']}f}", high, "0.4"))
    panels[0].margins(y=0.08)
    low, top = panels[1].get_ylim()
    labels.sort()
    heights = spread_out([(y - low) / (top - low) for y, *_ in labels], 0.06)
    for (y, text, x, color), height in zip(labels, heights, strict=True):
        panels[1].annotate(
            text,
            xy=(x, y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            color=color,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.6},
        )
    figure.savefig(path, dpi=120)
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
