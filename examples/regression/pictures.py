"""The figures of the paper, drawn from own fits."""

from collections.abc import Callable, Sequence
from pathlib import Path

PICTURES: dict[str, Callable[[Path], None]] = {}


def draw_pictures(folder: Path, names: Sequence[str], progress: bool) -> None:
    """Draw some of them into a folder."""
