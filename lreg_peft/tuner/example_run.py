"""One forward pass on example inputs, to see which tensors reach and leave the modules that are to be adapted."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
        is_read: whether something that the model returns depends on its output, as far as can be seen.
    """

    shapes: list[tuple[Shape, Shape]] = field(default_factory=list)
    error: str | None = None
    n_early: int = 0
    is_read: bool = True


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
    trace = _Trace()

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
        trace.mark(hidden, name)
        note.shapes.append((tuple(features.shape), tuple(hidden.shape)))

    readers: dict[str, list[str]] = {}
    for name, source in sources.items():
        readers.setdefault(source, []).append(name)
    try:
        for source, names in readers.items():
            handles.append(model.get_submodule(source).register_forward_hook(partial(on_source, names)))
        for name, module in modules.items():
            handles.append(module.register_forward_hook(partial(on_target, name), with_kwargs=True))
        with torch.no_grad(), eval_mode(model), trace:
            result = _call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    leaves = tree_leaves(result)
    if all(leaf is None or isinstance(leaf, (Tensor, int, float, str)) for leaf in leaves):  # nothing hides inside
        read = trace.passed_on.union(*(trace.names(leaf) for leaf in leaves if isinstance(leaf, Tensor)))
        for name, note in seen.items():
            note.is_read = name in read
    return seen


class _Trace(TorchDispatchMode):
    """Follows which tensors come from which marked ones, by the memory that they lie in.

    Attributes:
        passed_on: names of marked tensors that became numbers of Python, of which nothing more is known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.passed_on: frozenset[str] = frozenset()
        self._names: dict[int, frozenset[str]] = {}

    def mark(self, tensor: Tensor, name: str) -> None:
        """Follow `tensor` under this name."""
        self._names[_place(tensor)] = self.names(tensor) | {name}

    def names(self, tensor: Tensor) -> frozenset[str]:
        """Of the marked tensors that this one comes from."""
        return self._names.get(_place(tensor), frozenset())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        names = frozenset[str]().union(*map(self.names, given))
        if not made:
            self.passed_on |= names
        for tensor in made:  # memory that is new may be that of a tensor which is gone: nothing of it is kept
            self._names[_place(tensor)] = names
        if func._schema.is_mutable:
            self._names.update(dict.fromkeys(map(_place, given), names))
        return result


def _place(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # of a kind that has no memory of its own
        return id(tensor)


def _call(model: nn.Module, inputs: Any) -> Any:
    place = next((p.device for p in model.parameters()), None)

    def there(value: Any) -> Any:
        return value.to(place) if isinstance(value, Tensor) and place is not None else value

    if isinstance(inputs, Mapping):
        return model(**{name: there(value) for name, value in inputs.items()})
    if isinstance(inputs, (tuple, list)):
        return model(*map(there, inputs))
    if isinstance(inputs, Tensor):
        return model(there(inputs))
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
