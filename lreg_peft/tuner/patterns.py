"""Options that are said for some modules: dictionaries with names, name endings or expressions as keys."""

from typing import Any

from peft.utils.other import get_pattern_key

from .config import LRegConfig


def by_pattern(option: str, name: str, config: LRegConfig, default: Any) -> Any:
    """The value of the first key of a pattern that matches, as in PEFT.

    Raises:
        ValueError: if that is another one in alphabetical order, in which files keep the keys: an adapter could be
            saved and not be loaded.
    """
    pattern = getattr(config, option)
    first = get_pattern_key(pattern, name)
    sorted_first = get_pattern_key(sorted(pattern), name)
    if pattern.get(first) != pattern.get(sorted_first):
        raise ValueError(
            f"{option} has two keys for {name!r}, {first!r} and {sorted_first!r}, with different values. Saved files "
            "keep the keys in alphabetical order, so write expressions that exclude each other."
        )
    return pattern.get(first, default)
