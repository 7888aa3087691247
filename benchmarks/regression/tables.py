"""What was measured, in Markdown."""

from collections.abc import Iterator, Sequence
from math import sqrt
from statistics import mean, stdev

import numpy as np

from benchmarks.regression.benchmark_sets import DataSet
from benchmarks.regression.measure import TRUTH, Measurements
from benchmarks.regression.peers import LREG, METHODS, Method
from examples.comparison.report import markdown_table

FIRST = f"{LREG}, seed 0 alone"


def figure(value: float) -> str:
    """R^2 without its leading zero, five digits near one."""
    if value < -9.995:
        return "< -10"
    return f"{value:.5f}" if value > 0.9985 else f"{value:.4f}"


def seconds(value: float) -> str:
    """Three decimals below a second, one above."""
    return f"{value:.3f}" if value < 1 else f"{value:.1f}"


def scores_table(sets: Sequence[DataSet], methods: Sequence[Method], kept: Measurements, seeds: int) -> str:
    """Rows are methods, columns sets: mean over seeds ± standard deviation, and how many seeds where fewer."""
    lines = [["test R^2", *(data.name for data in sets)]]
    for name in [TRUTH, *(method.name for method in methods)]:
        cells = []
        for data in sets:
            fits = kept.of(data.name, name)
            values = [fit.r2 for fit in fits.values()]
            wanted = 2 * seeds if data.real else seeds
            if not values:
                cells.append("-")
                continue
            spread = stdev(values) / (sqrt(len(values)) if data.real else 1) if len(values) > 1 else None
            cell = figure(mean(values))
            if spread is not None:
                cell += f" ± {spread:.5f}" if mean(values) > 0.9985 else f" ± {spread:.4f}"
            cells.append(cell + (f" ({len(values)})" if len(values) < wanted else ""))
        if any(cell != "-" for cell in cells):
            lines.append([name, *cells])
        if name == LREG:
            lines.append([FIRST, *_first(sets, kept)])
    return markdown_table(lines)


def _first(sets: Sequence[DataSet], kept: Measurements) -> list[str]:
    """LReg with seed 0, what methods with one seed compare with."""
    found = [kept.of(data.name, LREG).get(0) for data in sets]
    return ["-" if fit is None else figure(fit.r2) for fit in found]


def seconds_table(sets: Sequence[DataSet], methods: Sequence[Method], kept: Measurements) -> str:
    """The median over seeds."""
    lines = [["CPU seconds of a fit", *(data.name for data in sets)]]
    for method in methods:
        fits = [kept.of(data.name, method.name).values() for data in sets]
        if any(fits):
            cells = [
                seconds(float(np.median([fit.seconds for fit in of])) if of else 0.0) if of else "-" for of in fits
            ]
            lines.append([method.name, *cells])
    return markdown_table(lines)


def standing(sets: Sequence[DataSet], methods: Sequence[Method], kept: Measurements) -> Iterator[str]:
    """Per set, who is ahead of LReg with its default options on the same seeds."""
    for data in sets:
        own = kept.of(data.name, LREG)
        ahead = []
        for method in methods:
            if method.name.startswith(LREG) or not own:
                continue
            fits = kept.of(data.name, method.name)
            shared = sorted(own.keys() & fits.keys())
            if shared and (gain := mean(fits[seed].r2 - own[seed].r2 for seed in shared)) > 0:
                error = ""
                if len(shared) > 1:
                    error = f" ± {stdev(fits[seed].r2 - own[seed].r2 for seed in shared) / sqrt(len(shared)):.5f}"
                ahead.append((gain, f"{method.name} (+{gain:.5f}{error})"))
        names = ", ".join(text for _, text in sorted(ahead, reverse=True))
        yield f"{data.name}: {'ahead of LReg: ' + names if names else 'no method is ahead of LReg'}."


def left_out(sets: Sequence[DataSet], methods: Sequence[Method] = METHODS) -> Iterator[str]:
    """What was not run, and why."""
    for method in methods:
        reasons: dict[str, list[str]] = {}
        for data in sets:
            if reason := method.refuses(data.n_features, data.n_train, data.n_outputs):
                reasons.setdefault(reason, []).append(data.name)
        for reason, names in reasons.items():
            where = "" if len(names) == len(sets) else f" ({', '.join(names)})"
            yield f"{method.name}: {reason}{where}."
