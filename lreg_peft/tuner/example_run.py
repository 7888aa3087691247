"""One forward pass on example inputs, to see which tensors reach and leave the modules that are to be adapted."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import show
from ..modules import eval_mode
from .layout import first_input, first_tensor

Shape = tuple[int, ...]


@dataclass
class Seen:
    """What one module did in the pass.

    Attributes:
        shapes: of input and output, one pair per call.
        error: why a call cannot be used, None if all can.
        n_early: calls before which the module it reads from had not run anew.
    """

    shapes: list[tuple[Shape, Shape]] = field(default_factory=list)
    error: str | None = None
    n_early: int = 0


def run_example(
    model: nn.Module, modules: Mapping[str, nn.Module], sources: Mapping[str, str], inputs: Any
) -> dict[str, Seen]:
    """Run a model once, in eval mode and without a graph, and look at some of its modules.

    Args:
        model: the model; it is not changed.
        modules: what to look at, by name.
        sources: name of a module -> name of the one in `model` whose output is read in place of its input.
        inputs: a dictionary of keyword arguments, a tuple or list of positional ones, or one tensor.

    Raises:
        TypeError: for other inputs. What the model raises goes through.
    """
    seen = {name: Seen() for name in modules}
    fresh: dict[str, Tensor] = {}  # by name of the module that reads it
    handles = []

    def on_source(readers: list[str], module: nn.Module, args: Any, output: Any) -> None:
        fresh.update(dict.fromkeys(readers, first_tensor(output)[0]))

    def on_target(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        note = seen[name]
        try:
            hidden, _ = first_tensor(output)
            if name in sources:
                if name not in fresh:
                    note.n_early += 1
                    return
                features = fresh.pop(name)
            else:
                first = next(iter(inspect.signature(module.forward).parameters), None)
                features = first_input(args, kwargs, first, lambda: module)
        except TypeError as error:
            note.error = str(error).rstrip(".")
            return
        note.shapes.append((tuple(features.shape), tuple(hidden.shape)))

    readers: dict[str, list[str]] = {}
    for name, source in sources.items():
        readers.setdefault(source, []).append(name)
    try:
        for source, names in readers.items():
            handles.append(model.get_submodule(source).register_forward_hook(partial(on_source, names)))
        for name, module in modules.items():
            handles.append(module.register_forward_hook(partial(on_target, name), with_kwargs=True))
        with torch.no_grad(), eval_mode(model):
            _call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _call(model: nn.Module, inputs: Any) -> None:
    place = next((p.device for p in model.parameters()), None)

    def there(value: Any) -> Any:
        return value.to(place) if isinstance(value, Tensor) and place is not None else value

    if isinstance(inputs, Mapping):
        model(**{name: there(value) for name, value in inputs.items()})
    elif isinstance(inputs, (tuple, list)):
        model(*map(there, inputs))
    elif isinstance(inputs, Tensor):
        model(there(inputs))
    else:
        raise TypeError(
            "example_inputs must be what the model is called with: a dictionary of keyword arguments, a tuple of "
            f"positional ones, or a tensor; got {show(inputs)}."
        )


def raise_misfits(misfits: Iterable[str]) -> None:
    """One `ValueError` for all of them, if there are any."""
    found = list(misfits)
    if found:
        lines = "".join(f"\n- {text}" for text in found)
        raise ValueError(f"{len(found)} module{'s' * (len(found) != 1)} cannot be adapted as configured:{lines}")
