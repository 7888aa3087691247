"""Arguments that are out of range: one sentence that names the argument, what it must be and what came.

Each of these is called where the value is used. What is of a wrong type is a `TypeError`, else it is a `ValueError`.
"""

import math
import numbers
from typing import Any

from torch import Tensor, nn


def whole(name: str, value: Any, lowest: int, *, optional: bool = False) -> None:
    """Raise an error unless `value` is a whole number from `lowest` on; None passes if it is `optional`."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {show(value)}.")
    if value < lowest:
        raise ValueError(f"{name} must be at least {lowest}, got {value}.")


def number(
    name: str, value: Any, lowest: float = -math.inf, *, above: float = -math.inf, highest: float = math.inf
) -> None:
    """Raise an error unless `value` is finite and in the range; NaN is in none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {show(value)}.")
    size = float(value)
    if above > -math.inf and not size > above:
        raise ValueError(f"{name} must be {'positive' if above == 0 else f'above {above}'}, got {value}.")
    if lowest > -math.inf and not size >= lowest:
        raise ValueError(f"{name} must be at least {lowest}, got {value}.")
    if highest < math.inf and not size <= highest:
        raise ValueError(f"{name} must be at most {highest}, got {value}.")
    if not math.isfinite(size):
        raise ValueError(f"{name} must be finite, got {value}.")


def choice(name: str, value: Any, options: tuple[Any, ...]) -> None:
    """Raise an error unless `value` is one of some strings."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {show(value)}.")


def flag(name: str, value: Any) -> None:
    """Raise an error unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {show(value)}.")


def show(value: Any) -> str:
    """A value as error messages quote it: short, and tensors by dtype and shape."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} {tuple(value.shape)}"
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:70]}... ({type(value).__name__})"
