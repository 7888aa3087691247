"""Arguments of public functions, checked at the door: one sentence that names the argument, what it must be, what came.

`checked` reads what an argument may be off the annotation, and the range off a table of rules in the decorator:

    @checked(n_batches=whole(1), tolerance=number(above=0))
    def f(model: nn.Module, n_batches: int, tolerance: float = 1e-6, method: Literal["a", "b"] = "a") -> None:

A value of a wrong type is a `TypeError`, one out of range a `ValueError`. A float must be finite.
"""

import collections.abc
import functools
import inspect
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")

#: Raises an error that begins with the name of the argument unless the value will do.
Rule = Callable[[str, Any], None]


class _Kind(NamedTuple):
    """What an annotation allows."""

    words: str
    accepts: Callable[[Any], bool]
    is_choice: bool = False  # a value that is none of them is a ValueError, whatever its type


def whole(lowest: int | None = None, highest: int | None = None) -> Rule:
    """A whole number in a range."""

    def rule(name: str, value: Any) -> None:
        if not _is_whole(value):
            raise TypeError(f"{name} must be a whole number, got {show(value)}.")
        if lowest is not None and value < lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {value}.")
        if highest is not None and value > highest:
            raise ValueError(f"{name} must be at most {highest}, got {value}.")

    return rule


def number(
    lowest: float | None = None, *, above: float | None = None, highest: float | None = None, below: float | None = None
) -> Rule:
    """A finite number in a range; NaN is in none."""

    def rule(name: str, value: Any) -> None:
        if not _is_number(value):
            raise TypeError(f"{name} must be a number, got {show(value)}.")
        if above is not None and not value > above:
            raise ValueError(f"{name} must be {'positive' if above == 0 else f'above {above}'}, got {value}.")
        if lowest is not None and not value >= lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {value}.")
        if highest is not None and not value <= highest:
            raise ValueError(f"{name} must be at most {highest}, got {value}.")
        if below is not None and not value < below:
            raise ValueError(f"{name} must be below {below}, got {value}.")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}.")

    return rule


def choice(*options: Any) -> Rule:
    """One of some values."""

    def rule(name: str, value: Any) -> None:
        if not _is_one_of(value, options):
            raise ValueError(f"{name} must be {_either(options)}, got {show(value)}.")

    return rule


def named(what: str = "a name") -> Rule:
    """A string that is not empty."""

    def rule(name: str, value: Any) -> None:
        if not isinstance(value, str):
            raise TypeError(f"{name} must be {what}, got {show(value)}.")
        if not value:
            raise ValueError(f"{name} must be {what}, got an empty string.")

    return rule


def real(name: str, value: Any) -> None:
    """A number, whatever its value: for arguments whose range the function checks."""
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, got {show(value)}.")


def anything(name: str, value: Any) -> None:
    """For arguments that the function itself checks."""


def flag(name: str, value: Any) -> None:
    """True or False."""
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


def checked(
    *,
    stage: Callable[[], AbstractContextManager[None]] | None = None,
    shapes: Mapping[str, str] | None = None,
    **rules: Rule,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Check the arguments of a function before it begins; see the head of this file.

    Args:
        shapes: of tensors, by name: the sizes with blanks between, the same word for the same size, "..." in front for
            any further ones ("... components"). The tensor must be floating point, or int64 if "int64" stands first.
        stage: what the checks run in: for functions that several processes call together, what makes the error of
            one the error of all.
        rules: ranges of arguments, by name; for None in place of a value of an optional argument they are not asked.
            A rule for an argument stands in place of what the annotation says of numbers.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        checks = _checks(function, rules)
        layout = _Layout(function, shapes) if shapes else None

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
                if stage is None:
                    _run(checks, args, kwargs)
                    if layout is not None:
                        layout.check(args, kwargs)
                else:
                    with stage():
                        _run(checks, args, kwargs)
            return function(*args, **kwargs)

        call._lreg_checks = checks  # type: ignore[attr-defined]
        return call

    return decorate


def _checks(function: Callable[..., Any], rules: dict[str, Rule]) -> list[tuple[int, str, Rule]]:
    """Place among the positional arguments, name and rule of every argument that has one."""
    parameters = inspect.signature(function).parameters
    if unknown := sorted(rules.keys() - parameters.keys()):
        raise TypeError(f"{function.__name__} has no arguments {unknown} to check.")
    found = []
    for place, (name, parameter) in enumerate(parameters.items()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        rule = _rule_of(parameter.annotation, rules.get(name))
        if rule is not None:
            position = -1 if parameter.kind is parameter.KEYWORD_ONLY else place
            found.append((position, name, rule))
    return found


def _run(checks: list[tuple[int, str, Rule]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for place, name, rule in checks:
        if 0 <= place < len(args):
            rule(name, args[place])
        elif name in kwargs:
            rule(name, kwargs[name])


def check_doors(namespace: dict[str, Any], shapes: Mapping[str, Mapping[str, str]]) -> None:
    """Put checked functions in place of those that a package hands on: its own modules call each other unchecked.

    Args:
        namespace: `globals()` of the package.
        shapes: for every function the `shapes` of `checked`.
    """
    for name, layout in shapes.items():
        namespace[name] = checked(shapes=layout)(namespace[name])


class _Layout:
    """The shapes of some arguments, and which sizes they share."""

    def __init__(self, function: Callable[..., Any], shapes: Mapping[str, str]) -> None:
        places = list(inspect.signature(function).parameters)
        self._entries = []
        for name, text in shapes.items():
            words = text.split()
            is_whole = words[0] == "int64"
            words = words[is_whole:]
            self._entries.append((places.index(name), name, is_whole, words[0] == "...", words))

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise a `ValueError` that names the first tensor that does not fit."""
        sizes: dict[str, tuple[int, str]] = {}
        for place, name, is_whole, is_open, words in self._entries:
            tensor = args[place] if place < len(args) else kwargs.get(name)
            if tensor is None:
                continue
            named = words[1:] if is_open else words
            shape = tensor.shape[tensor.ndim - len(named) :] if is_open else tensor.shape
            fits = len(shape) == len(named) and (
                tensor.dtype == torch.int64 if is_whole else tensor.is_floating_point()
            )
            if not fits:
                kind = "int64" if is_whole else "floating point"
                raise ValueError(
                    f"{name} must be {kind} [{', '.join(words)}], got {tensor.dtype} {tuple(tensor.shape)}."
                )
            for word, size in zip(named, shape, strict=True):
                known, first = sizes.setdefault(word, (size, name))
                if size != known:
                    raise ValueError(
                        f"{name} must have shape [{', '.join(words)}] with {word}={known} as {first} has it, got "
                        f"{tuple(tensor.shape)}."
                    )


def _rule_of(annotation: Any, given: Rule | None) -> Rule | None:
    kind = kind_of(annotation)
    if given is anything:
        return _plain_choice(kind) if kind is not None and kind.is_choice else None
    if kind is None:
        return given
    optional = kind.accepts(None)

    def rule(name: str, value: Any) -> None:
        if not kind.accepts(value):
            error = ValueError if kind.is_choice else TypeError
            raise error(f"{name} must be {kind.words}, got {show(value)}.")
        if value is None and optional:
            return
        if given is not None:
            given(name, value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}.")

    return rule


def _plain_choice(kind: _Kind) -> Rule:
    """For a choice that the function checks: refuses what cannot even be compared with the options."""

    def rule(name: str, value: Any) -> None:
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise ValueError(f"{name} must be {kind.words}, got {show(value)}.")

    return rule


def kind_of(annotation: Any) -> _Kind | None:
    """What an annotation allows; None if it says nothing."""
    if annotation is None or annotation is type(None):
        return _Kind("None", lambda value: value is None)
    if annotation in (Any, object, inspect.Parameter.empty) or isinstance(annotation, (str, TypeVar)):
        return None
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return _Kind(_either(inner), lambda value: _is_one_of(value, inner), is_choice=True)
    if origin in (typing.Union, types.UnionType):
        kinds = [kind_of(each) for each in inner]
        known = [kind for kind in kinds if kind is not None]
        if len(known) < len(kinds):
            return None
        choices = all(kind.is_choice or kind.words == "None" for kind in known)
        words = " or ".join(dict.fromkeys(kind.words for kind in known if not (choices and kind.words == "None")))
        return _Kind(words, lambda value: any(kind.accepts(value) for kind in known), choices)
    if origin is not None:
        return _container(origin, inner)
    return _plain(annotation)


def _plain(annotation: Any) -> _Kind | None:
    simple: dict[Any, _Kind] = {
        int: _Kind("a whole number", _is_whole),
        float: _Kind("a number", _is_number),
        bool: _Kind("True or False", lambda value: isinstance(value, bool)),
        str: _Kind("a string", lambda value: isinstance(value, str)),
        Tensor: _Kind("a tensor", lambda value: isinstance(value, Tensor)),
        nn.Module: _Kind("a model (torch.nn.Module)", lambda value: isinstance(value, nn.Module)),
        torch.dtype: _Kind("a torch.dtype", lambda value: isinstance(value, torch.dtype)),
        os.PathLike: _Kind("a path", lambda value: isinstance(value, os.PathLike)),
    }
    if annotation in simple:
        return simple[annotation]
    if not isinstance(annotation, type):
        return None
    if issubclass(annotation, os.PathLike):
        return simple[os.PathLike]
    article = "an" if annotation.__name__[0] in "AEIOU" else "a"
    return _Kind(f"{article} {annotation.__name__}", lambda value: isinstance(value, annotation))


def _container(origin: Any, inner: tuple[Any, ...]) -> _Kind | None:
    if origin is collections.abc.Callable:
        return _Kind("a function", callable)
    if origin in (collections.abc.Iterable, collections.abc.Iterator):
        return _Kind("something to iterate over", _is_iterable)
    if not (isinstance(origin, type) and issubclass(origin, collections.abc.Collection)):
        return _plain(origin)
    words = {collections.abc.Sequence: "a sequence", collections.abc.Mapping: "a mapping"}.get(
        origin, f"a {origin.__name__}"
    )
    is_mapping = issubclass(origin, collections.abc.Mapping)
    kinds = [kind_of(each) for each in inner if each is not Ellipsis]
    if is_mapping or len(kinds) == 1 or Ellipsis in inner:
        of = [kind.words if kind else "anything" for kind in kinds]
        words += f" ({' to '.join(of)})" if is_mapping and len(of) == 2 else f" (of {of[0]} each)" if of else ""

    def accepts(value: Any) -> bool:
        if not isinstance(value, origin) or isinstance(value, (str, bytes)):
            return False
        if isinstance(value, collections.abc.Mapping):
            parts = list(value.keys()), list(value.values())
            return all(_all_are(kind, part) for kind, part in zip(kinds, parts, strict=False))
        if issubclass(origin, tuple) and Ellipsis not in inner and inner:
            pairs = zip(kinds, value, strict=False)
            return len(value) == len(kinds) and all(kind is None or kind.accepts(each) for kind, each in pairs)
        return not kinds or _all_are(kinds[0], value)

    return _Kind(words, accepts)


def _all_are(kind: _Kind | None, values: Any) -> bool:
    return kind is None or all(map(kind.accepts, values))


def _is_whole(value: Any) -> bool:
    return type(value) is int or (isinstance(value, numbers.Integral) and not isinstance(value, bool))


def _is_number(value: Any) -> bool:
    return type(value) is float or (isinstance(value, numbers.Real) and not isinstance(value, bool))


def _is_iterable(value: Any) -> bool:
    # A data set with items by number, as torch has them, is iterated over by Python too.
    return (hasattr(value, "__iter__") or hasattr(value, "__getitem__")) and not isinstance(value, (str, bytes, Tensor))


def _is_one_of(value: Any, options: Iterable[Any]) -> bool:
    # Not `in`: True == 1, and tensors compare by element.
    return any(type(value) is type(option) and value == option for option in options)


def _either(options: Iterable[Any]) -> str:
    *first, last = map(repr, options)
    return f"{', '.join(first)} or {last}" if first else last
