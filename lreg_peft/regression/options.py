"""Checks of options that more than one estimator has."""

import numbers
from typing import Any

import numpy as np


def is_integer(value: Any, least: int) -> bool:
    """Whether it is a whole number, and not less than `least`."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= least)


def plain(interactions: Any) -> Any:
    """A string, a number, or a list of tuples; whole numbers of NumPy become Python's."""
    if isinstance(interactions, (str, numbers.Number)):
        return int(interactions) if isinstance(interactions, np.integer) else interactions
    return [tuple(j.item() if isinstance(j, np.integer) else j for j in pair) for pair in interactions]


def check_interactions(pairs: Any, d: int) -> None:
    """Raises a `ValueError` for what are no interactions of `d` features."""
    if isinstance(pairs, (str, numbers.Number)):
        if pairs != "auto" and not is_integer(pairs, 0):
            raise ValueError(f"interactions must be 'auto', a number of pairs or a list of pairs, got {pairs!r}.")
    elif not all(
        len(pair) == 2 and all(is_integer(j, 0) and j < d for j in pair) and pair[0] != pair[1] for pair in pairs
    ):
        raise ValueError(f"interactions must be pairs of two different columns in [0, {d - 1}], got {pairs!r}.")
