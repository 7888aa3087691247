"""Doing something to layers whenever an optimiser steps that holds their parameters."""

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch.optim.optimizer import Optimizer

L = TypeVar("L")


class StepHook(Generic[L]):
    """A hook on every optimiser of the process, installed when the first layer is added.

    Layers are held weakly: one that nobody else has any more is not visited.

    Args:
        register: `register_optimizer_step_pre_hook` or `register_optimizer_step_post_hook`.
        visit: called for every layer with the layer, the optimiser and the ids of the parameters that it holds.
    """

    def __init__(self, register: Callable[..., Any], visit: Callable[[L, Optimizer, set[int]], None]) -> None:
        self._register, self._visit = register, visit
        #: Those that are visited.
        self.layers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._is_installed = False

    def add(self, layer: L) -> None:
        """Visit `layer` from now on."""
        if not self._is_installed:
            self._register(self._call)
            self._is_installed = True
        self.layers.add(layer)

    def discard(self, layer: L) -> None:
        """Undo `add`."""
        self.layers.discard(layer)

    def _call(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self.layers:
            return
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for layer in list(self.layers):
            self._visit(layer, optimizer, owned)
