"""Changes to a model that happen as a whole or not at all."""

import copy
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (dict, list, set, deque)


@contextmanager
def all_or_nothing(model: nn.Module, tensors: Iterable[Tensor] = ()) -> Iterator[None]:
    """If the block ends with an error or an interruption, give the model back as it was, and let the error go on.

    What comes back: which modules, parameters and buffers the model has, hooks, flags (`training`, `requires_grad`) and
    all other attributes of its modules, with the contents of dictionaries and lists among them.

    Args:
        model: the model that the block changes.
        tensors: those whose values the block may change in place; they are copied.
    """
    modules = {id(module): module for module in model.modules()}
    attributes = [(module, _copied(module.__dict__)) for module in modules.values()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    values = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except BaseException:
        for module, before in attributes:
            _restore(module.__dict__, before)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        raise


def _copied(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Every attribute, and the contents of those that are containers."""
    return {
        name: (value, copy.copy(value) if isinstance(value, _CONTAINERS) else None)
        for name, value in attributes.items()
    }


def _restore(attributes: dict[str, Any], before: dict[str, tuple[Any, Any]]) -> None:
    for name in [name for name in attributes if name not in before]:
        del attributes[name]
    for name, (value, contents) in before.items():
        attributes[name] = value
        if contents is None:
            continue
        # Others may hold the same container: its contents go back, not a copy of it.
        value.clear()
        if isinstance(value, (dict, set)):
            value.update(contents)
        else:
            value.extend(contents)
