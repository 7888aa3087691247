"""Mean ranks and wins over several studies: which method is ahead on data that nobody tuned on?

    python -m benchmarks.peft_methods.ranking --output_dir OUT first/study.json second/study.json ...

Every record of a study is a task; every number of steps in it, at one budget, a cell. In a cell each seed ranks the
methods by their test figure, and ties share the mean of their ranks; a method's rank there is the mean over the seeds,
and what is reported is the mean over the cells with its standard error. A method is first or last in a cell by its mean
over the seeds. "Behind" is how far it is behind the best of a cell at most, in standard errors of that difference, seed
by seed. The control, which no library offers, is shown beside the others and ranked in a column of its own.

Written: ranking.json, ranking.md, ranking.png.
"""

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTROL = "lora-linear, started as lreg"
# Methods that have another name among language models, where the output layer belongs to them, and among classifiers.
SAME = {"lora-linear-head": "lora-linear", "lora-linear-start": CONTROL, "lora-linear-bias": CONTROL}
# Numbers of steps in the picture: marker, its name, place beside the middle of the row.
MARKS = (("o", "circles", 0.12), ("s", "squares", -0.12), ("^", "triangles", 0.24), ("D", "diamonds", -0.24))


@dataclass(frozen=True)
class Cell:
    """One task at one number of steps.

    Attributes:
        task, steps: which.
        unit: what the figures are.
        sign: 1 where more is better, else -1.
        figures: test figures by method, in the order of the seeds.
        seconds: CPU seconds of a run with its start.
    """

    task: str
    steps: int
    unit: str
    sign: int
    figures: Mapping[str, Sequence[float]]
    seconds: Mapping[str, float]

    def ranks(self, methods: Sequence[str]) -> dict[str, float]:
        """The mean over the seeds of the rank among these methods, 1 for the best."""
        found: dict[str, list[float]] = {name: [] for name in methods}
        for scores in zip(*(self.figures[name] for name in methods), strict=True):
            for name, own in zip(methods, scores, strict=True):
                better = sum(self.sign * (other - own) > 0 for other in scores)
                found[name].append(better + (scores.count(own) + 1) / 2)
        return {name: statistics.mean(ranks) for name, ranks in found.items()}

    def sorted(self, methods: Sequence[str]) -> list[str]:
        """The methods from the best mean to the worst."""
        return sorted(methods, key=lambda name: -self.sign * statistics.mean(self.figures[name]))

    def behind(self, name: str, methods: Sequence[str]) -> float:
        """Standard errors between a method and the best one."""
        best = self.figures[self.sorted(methods)[0]]
        gaps = [self.sign * (one - own) for one, own in zip(best, self.figures[name], strict=True)]
        error = standard_error(gaps)
        return statistics.mean(gaps) / error if error else 0.0


def standard_error(values: Sequence[float]) -> float:
    """Of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def cells_of(record: dict[str, Any], task: str) -> list[Cell]:
    """The cells of a record of a study.

    Raises:
        ValueError: if the methods of a cell were not all run with the same seeds.
    """
    metric, cells = record["metric"], []
    for steps in sorted({row["steps"] for row in record["rows"]}):
        rows = [row for row in record["rows"] if row["steps"] == steps and row["test"]]
        seeds = {tuple(row["seeds"]) for row in rows}
        if len(seeds) != 1:
            raise ValueError(f"{task}, {steps} steps: every method needs the same seeds, got {sorted(seeds)}.")
        named = {SAME.get(row["method"], row["method"]): row for row in rows}
        scale, key = metric["scale"], metric["name"]
        cells.append(
            Cell(
                task,
                steps,
                key,
                1 if metric["higher_is_better"] else -1,
                {name: [scale * test[key] for test in row["test"]] for name, row in named.items()},
                {name: row["cpu_seconds"] for name, row in named.items()},
            )
        )
    return cells


def summary(cells: Sequence[Cell]) -> dict[str, Any]:
    """Ranks, wins and distances of every method."""
    everyone = [name for name in cells[0].figures if all(name in cell.figures for cell in cells)]
    offered = [name for name in everyone if name != CONTROL]
    found: dict[str, Any] = {}
    for name in everyone:
        among = offered if name in offered else everyone
        ranks = [cell.ranks(among)[name] for cell in cells]
        found[name] = {
            "mean_rank": statistics.mean(ranks),
            "standard_error": standard_error(ranks),
            "rank_with_controls": statistics.mean(cell.ranks(everyone)[name] for cell in cells),
            "wins": sum(cell.sorted(among)[0] == name for cell in cells),
            "last": sum(cell.sorted(among)[-1] == name for cell in cells),
            "most_behind": max(cell.behind(name, among) for cell in cells),
            "cpu_seconds": sum(cell.seconds[name] for cell in cells),
        }
    return dict(sorted(found.items(), key=lambda item: (item[0] not in offered, item[1]["mean_rank"])))


def markdown(cells: Sequence[Cell], found: Mapping[str, Mapping[str, float]]) -> str:
    """The two tables."""
    lines = [
        f"| {len(cells)} cells | mean rank | with the control | first | last | behind the best, at most | CPU s, all |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, one in found.items():
        rank = "" if name == CONTROL else f"{one['mean_rank']:.2f} ± {one['standard_error']:.2f}"
        lines.append(
            f"| {name} | {rank} | {one['rank_with_controls']:.2f} | {one['wins']} | {one['last']} | "
            f"{one['most_behind']:.1f} standard errors | {one['cpu_seconds']:.0f} |"
        )
    lines += ["", f"| task | steps | {' | '.join(found)} |", "|---|---:|" + "---:|" * len(found)]
    for cell in cells:
        best = cell.sorted([name for name in found if name != CONTROL])[0]
        figures = []
        for name in found:
            values = cell.figures[name]
            text = f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.1f}"
            figures.append(f"**{text}**" if name == best else text)
        lines.append(f"| {cell.task} ({cell.unit}) | {cell.steps} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def draw(cells: Sequence[Cell], found: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Mean ranks in the first panel, the figures of every task in the others, standard errors at all of them."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed, and none may be there
    import matplotlib.pyplot as plt

    from benchmarks.peft_methods.study_picture import OTHERS, OURS

    tasks = list(dict.fromkeys(cell.task for cell in cells))
    names = list(found)[::-1]
    width = 3.0 * (1 + len(tasks)) + 1.5
    figure, panels = plt.subplots(1, 1 + len(tasks), figsize=(width, 3.4), sharey=True, layout="constrained")
    for position, name in enumerate(names):
        colour = OURS if name == "lreg" else OTHERS
        if name != CONTROL:
            rank, error = found[name]["mean_rank"], found[name]["standard_error"]
            panels[0].errorbar(rank, position, xerr=error, fmt="o", color=colour, capsize=3)
            panels[0].annotate(f"first in {found[name]['wins']}", (rank, position + 0.2), ha="center", fontsize=7)
        for task, panel in zip(tasks, panels[1:], strict=True):
            there = [cell for cell in cells if cell.task == task]
            for cell, (marker, _, shift) in zip(there, MARKS, strict=False):
                values = cell.figures[name]
                mean, error = statistics.mean(values), standard_error(values)
                face = "white" if name == CONTROL else colour
                place = position + shift
                panel.errorbar(mean, place, xerr=error, fmt=marker, color=colour, mfc=face, markersize=5, capsize=2)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(-0.6, len(names) - 0.3)
    panels[0].set_xlabel("mean rank")
    for task, panel in zip(tasks, panels[1:], strict=True):
        there = [cell for cell in cells if cell.task == task]
        direction = "higher" if there[0].sign > 0 else "lower"
        panel.set_title(task, fontsize=9)
        panel.set_xlabel(f"{there[0].unit}, {direction} is better", fontsize=8)
        steps = [f"{mark}: {cell.steps} steps" for cell, (_, mark, _) in zip(there, MARKS, strict=False)]
        panel.annotate("\n".join(steps), (0.02, 0.02), xycoords="axes fraction", fontsize=6)
    for panel in panels:
        panel.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Read, rank, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", help="[NAME=]study.json; without a name that of the folder")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/ranking"))
    options = parser.parse_args()
    cells = []
    for word in options.records:
        name, _, path = word.rpartition("=")
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        cells += cells_of(record, name or Path(path).resolve().parent.name)
    found = summary(cells)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    content = {"methods": found, "cells": [vars(cell) for cell in cells]}
    (options.output_dir / "ranking.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = markdown(cells, found)
    (options.output_dir / "ranking.md").write_text(text, encoding="utf-8")
    draw(cells, found, options.output_dir / "ranking.png")
    print(text)


if __name__ == "__main__":
    main()
