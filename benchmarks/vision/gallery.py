"""A grid of test images with what the model says of them before and after the adaptation."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from benchmarks.vision.images import Samples

matplotlib.use("Agg")  # no display is needed, and none may be there
import matplotlib.pyplot as plt

GALLERY_FILE = "predictions.png"
ROWS, COLUMNS = 4, 10


def write_gallery(
    samples: Samples,
    before: np.ndarray | None,
    after: np.ndarray,
    classes: Sequence[str],
    title: str,
    path: Path,
) -> None:
    """The first images, two in three of them such as the adaptation changed, as far as there are any.

    Args:
        samples: the images.
        before: class that the base model gives each, `[samples]`; None where it has no classifier for them.
        after: class that the adapted model gives each.
        classes: names of the classes.
        title: heading.
        path: file to write.
    """
    labels = np.asarray(samples.labels)
    changed = np.flatnonzero(after != before) if before is not None else np.flatnonzero(after != labels)
    same = np.setdiff1d(np.arange(len(labels)), changed)
    n_changed = min(len(changed), 2 * ROWS * COLUMNS // 3)
    chosen = sorted([*changed[:n_changed], *same[: ROWS * COLUMNS - n_changed]])
    figure, panels = plt.subplots(ROWS, COLUMNS, figsize=(1.25 * COLUMNS, 1.6 * ROWS), layout="constrained")
    for axes in panels.flat:
        axes.axis("off")
    for axes, index in zip(panels.flat, chosen, strict=False):
        image = samples.picture(int(index))
        axes.imshow(image, cmap="gray", vmin=0, vmax=1)
        was = "" if before is None else f"{classes[before[index]]} → "
        color = "tab:green" if after[index] == labels[index] else "tab:red"
        axes.set_title(f"{was}{classes[after[index]]}"[:24], fontsize=8, color=color)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=100)
    plt.close(figure)
