"""The search for a learning rate: a grid, then further rates by one rule for every method."""

from collections.abc import Mapping
from math import sqrt


def next_rate(scores: Mapping[float, float], ratio: float, may_refine: bool) -> float | None:
    """The rate to try after some have been tried; None if there is no reason to try another.

    Beyond the edge where the best one is at an edge; else, if `may_refine`, between the best one and the better of its
    neighbours.

    Args:
        scores: rate -> score, higher is better, -inf for a run that diverged.
        ratio: of neighbouring rates in the grid.
        may_refine: whether to go on where the best rate is not at an edge.
    """
    rates = sorted(scores)
    best = max(rates, key=lambda rate: scores[rate])  # of equal ones the smallest
    if best == rates[0]:
        return rounded(best / ratio)
    if best == rates[-1]:
        return rounded(best * ratio)
    if not may_refine:
        return None
    position = rates.index(best)
    neighbour = max(rates[position - 1], rates[position + 1], key=lambda rate: scores[rate])
    between = rounded(sqrt(best * neighbour))
    return None if between in scores else between


def rounded(rate: float) -> float:
    """Three digits: what is written is what was used."""
    return float(f"{rate:.3g}")
