"""Doing something to layers whenever an optimiser steps that holds their parameters."""

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

L = TypeVar("L")
R = TypeVar("R")


class StepHook(Generic[L, R]):
    """A hook on every optimiser of the process, installed when the first layer is added.

    Layers are held weakly: one that nobody else has any more is not visited.

    Args:
        register: `register_optimizer_step_pre_hook` or `register_optimizer_step_post_hook`.
        visit: called for every layer with the layer, the optimiser and the ids of the parameters that it holds.
    """

    def __init__(self, register: Callable[..., Any], visit: Callable[[L, Optimizer, set[int]], R]) -> None:
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

    def _call(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._visit_all(optimizer)

    def _visit_all(self, optimizer: Optimizer) -> list[R]:
        if not self.layers:
            return []
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [self._visit(layer, optimizer, owned) for layer in list(self.layers)]


class LossHook(StepHook[L, Tensor | None]):
    """Adds a term to the loss of every optimiser of the process, before it steps and after the gradients are there.

    A closure makes the gradients inside the step, as often as the optimiser asks: the term is added after each call.

    Args:
        visit: adds the gradients of one layer and returns what belongs to them in the loss.
    """

    def __init__(self, visit: Callable[[L, Optimizer, set[int]], Tensor | None]) -> None:
        super().__init__(register_optimizer_step_pre_hook, visit)

    def _call(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        # torch counts the optimiser itself among the arguments.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None or not self.layers:
            return super()._call(optimizer, args, kwargs)

        def with_term() -> Any:
            loss = closure()
            for value in self._visit_all(optimizer):
                if loss is not None and value is not None:  # a line search compares losses
                    loss = loss + (value.to(loss.device) if isinstance(loss, Tensor) else value.item())
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": with_term}
        return (args[0], with_term, *args[2:]), kwargs
