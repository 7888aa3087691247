"""The output of another module as the features of a shortcut: a span."""

import threading
from typing import Any

from torch import Tensor, nn

from .layout import first_tensor


class _Here(threading.local):
    """Of one thread: what the source returned in this forward pass, until it is read, and what was read last."""

    output: Tensor | None = None
    seen: Tensor | None = None


class FeatureSource:
    """A module whose output a shortcut reads; registered as that module's forward hook.

    One output is read once: a second reading would be of another forward pass. Copies and pickles hold no output.

    Args:
        name: of the module in the model.
        target: of the module that the shortcut is around.
    """

    def __init__(self, name: str, target: str) -> None:
        self.name, self.target = name, target
        self._here = _Here()

    def begin(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the model: what an interrupted pass has left is not of this one."""
        self._here.output = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep what the module returned."""
        tensor, _ = first_tensor(output)
        if not tensor.is_floating_point():
            raise TypeError(f"feature_source {self.name!r} must return a floating-point tensor, got {tensor.dtype}.")
        self._here.output = tensor

    def read(self) -> Tensor:
        """The output of this forward pass.

        Raises:
            RuntimeError: if the module has not run before in this forward pass, or the pass is a repetition of gradient
                checkpointing that does not repeat the module.
        """
        output = self._here.output
        if output is None:
            raise RuntimeError(
                f"the shortcut around {self.target!r} reads the output of feature_source {self.name!r}, which has not "
                "run before it in this forward pass. Name a module that runs once, and before, in every pass. Gradient "
                "checkpointing, which repeats parts of a pass by themselves, cannot be used with a feature_source."
            )
        self._here.output, self._here.seen = None, output
        return output

    def last_read(self) -> Tensor:
        """What was read last; for forward hooks of the shortcut's own module."""
        seen = self._here.seen if self._here.output is None else self._here.output
        if seen is None:
            raise RuntimeError(f"feature_source {self.name!r} has not run.")
        return seen

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.target)
