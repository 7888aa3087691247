"""All pictures: the results, and the figures of the paper."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from benchmarks.regression.benchmark_sets import DataSet
from benchmarks.regression.measure import TRUTH, Fit, Measurements
from benchmarks.regression.paper_figures import FIGURES, plt, save
from benchmarks.regression.peers import LREG, Method

RESULTS = "results"
PICTURES = (RESULTS, *FIGURES)


def draw_pictures(
    folder: Path, names: Sequence[str], sets: Sequence[DataSet], methods: Sequence[Method], kept: Measurements,
    progress: bool,
) -> None:  # fmt: skip
    """Draw some of `PICTURES` into a folder."""
    for name in tqdm(names, desc="pictures", disable=not progress):
        with threadpool_limits(1):
            if name == RESULTS:
                draw_results(folder, sets, methods, kept)
            else:
                FIGURES[name](folder)


def comparable(kept: Measurements, data: DataSet, method: str) -> list[Fit]:
    """Fits on the same samples as those of LReg."""
    fits = kept.of(data.name, method)
    if data.real:
        return list(fits.values()) if fits.keys() == kept.of(data.name, LREG).keys() else []
    return [fits[0]] if 0 in fits else []


def draw_results(folder: Path, sets: Sequence[DataSet], methods: Sequence[Method], kept: Measurements) -> None:
    """1 - R^2 against CPU seconds, a panel per set; the dashed line is what the noise leaves to the true function.

    Seed 0, which all methods have; of real data the mean over the folds, for methods that have them all.
    """
    columns = min(len(sets), 5)
    rows = -(-len(sets) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(3.1 * columns, 2.7 * rows + 0.8), squeeze=False, layout="constrained"
    )
    colors = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    handles = {}
    for panel, data in zip(panels.flat, sets, strict=False):
        for index, method in enumerate(methods):
            fits = comparable(kept, data, method.name)
            if not fits:
                continue
            own = method.name.startswith(LREG)
            (point,) = panel.plot(
                max(np.median([fit.seconds for fit in fits]), 1e-3),
                max(1 - np.mean([fit.r2 for fit in fits]), 1e-7),
                "*" if own else "o", markersize=11 if own else 6, color=colors[index % len(colors)],
            )  # fmt: skip
            handles[method.name] = point
        if ceiling := kept.of(data.name, TRUTH).get(0):
            left = 1 - ceiling.r2
            if left > 1e-7:
                panel.axhline(left, linestyle="--", color="0.5", linewidth=1)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_title(data.name, fontsize=9)
        panel.tick_params(labelsize=7, which="both")
    for panel in panels.flat[len(sets) :]:
        panel.axis("off")
    figure.supxlabel("CPU seconds of a fit, one thread", fontsize=9)
    figure.supylabel("1 - test R^2 (lower is better)", fontsize=9)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=6, fontsize=8)
    save(figure, folder, RESULTS)
