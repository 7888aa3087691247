"""The picture of a study: the methods of the centre in order, and curves along the axes of budget and steps."""

from math import isfinite
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.peft_methods.study_report import StudyReport, StudyRow

matplotlib.use("Agg")  # no display is needed, and none may be there
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, NullFormatter

OURS, OTHERS = "#c23b22", "#4a5568"
_FAR_APART = 5  # times the smallest figure, from which on they stand on a logarithmic axis


def draw_study(report: StudyReport, path: Path, title: str | None = None) -> None:
    """One panel with all methods of the largest cell, one per axis, one of figures against time where there are any."""
    cells = report.cells()
    if not cells:
        return
    centre = max(cells, key=lambda cell: len(cells[cell]))
    rows = [row for row in cells[centre] if isfinite(row.mean(report.metric))]
    axes_of = {
        "trainable parameters": [row for row in report.rows if row.steps == centre[1]],
        "steps": [row for row in report.rows if row.budget == centre[0]],
    }
    curves = {name: by_method(found, name) for name, found in axes_of.items()}
    curves = {name: lines for name, lines in curves.items() if lines}
    timed = [row for row in rows if any(row.curves)]
    n_panels = 1 + len(curves) + bool(timed)
    figure, panels = plt.subplots(
        1, n_panels, figsize=(6.5 * n_panels, max(4.0, 0.24 * len(rows) + 1.5)), layout="constrained", squeeze=False
    )
    figure.suptitle(title or report.title, fontsize=10, wrap=True)
    _ranking(report, panels[0][0], rows, centre)
    for panel, (name, lines) in zip(panels[0][1:], curves.items(), strict=False):
        _axis(report, panel, name, lines)
    if timed:
        _time(report, panels[0][-1], timed)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def by_method(rows: list[StudyRow], axis: str) -> dict[str, list[StudyRow]]:
    """Methods with more than one point on an axis, in the order of the axis."""
    lines: dict[str, list[StudyRow]] = {}
    for row in sorted(rows, key=lambda row: (row.budget, row.steps)):
        lines.setdefault(row.method, []).append(row)
    return {name: line for name, line in lines.items() if len(line) > 1}


def _label(report: StudyReport, row: StudyRow) -> str:
    direction = "higher" if report.metric.higher_is_better else "lower"
    return f"{'test' if row.test else 'tuning'} {report.metric.name} ({direction} is better)"


def _ranking(report: StudyReport, axes: Any, rows: list[StudyRow], cell: tuple[int, int]) -> None:
    scale = report.metric.scale
    for position, row in enumerate(reversed(rows)):
        spread = row.spread(report.metric)
        axes.errorbar(
            row.mean(report.metric) * scale,
            position,
            xerr=None if spread is None else spread * scale,
            fmt="o" if row.test else "x",
            color=OURS if row.method.startswith("lreg") else OTHERS,
            capsize=3,
        )
    means = [row.mean(report.metric) for row in rows]
    if min(means, default=0.0) > 0 and max(means) > _FAR_APART * min(means):
        axes.set_xscale("log")  # a few that diverged would press all others together
    axes.set_yticks(range(len(rows)), [row.method for row in reversed(rows)], fontsize=8)
    axes.set_title(f"{cell[0]:,} parameters, {cell[1]} steps", fontsize=9)
    axes.set_xlabel(_label(report, rows[0]) if rows else "")
    axes.grid(axis="x", alpha=0.3)


def _axis(report: StudyReport, axes: Any, name: str, lines: dict[str, list[StudyRow]]) -> None:
    scale = report.metric.scale
    for method, line in lines.items():
        x = [row.trainable if name == "trainable parameters" else row.steps for row in line]
        y = [row.mean(report.metric) * scale for row in line]
        error = [(row.spread(report.metric) or 0.0) * scale for row in line]
        axes.errorbar(
            x, y, yerr=error, marker="o", capsize=3, label=method, linewidth=2 if method.startswith("lreg") else 1
        )
    axes.set_xscale("log")
    # At the points themselves: powers of ten may be none or one between them.
    axes.set_xticks(sorted({row.budget if name == "trainable parameters" else row.steps for row in report.rows}))
    axes.xaxis.set_major_formatter(EngFormatter(sep="", places=0))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(name)
    axes.set_ylabel(_label(report, next(iter(lines.values()))[0]))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _time(report: StudyReport, axes: Any, rows: list[StudyRow]) -> None:
    for row in rows[:10]:  # the best of them: more lines could not be told apart
        curve = row.curves[0]
        axes.plot(
            [at["cpu_seconds"] for at in curve],
            [at[report.metric.name] * report.metric.scale for at in curve],
            label=row.method,
            linewidth=2 if row.method.startswith("lreg") else 1,
        )
    axes.set_xlabel("CPU seconds, with the start")
    axes.set_ylabel(f"tuning {report.metric.name}")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
