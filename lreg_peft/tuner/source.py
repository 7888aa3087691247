"""The output of another module as the features of a shortcut: a span.

The other module leaves its output here in a forward hook; the shortcut takes it when its own module has run.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .layout import first_tensor


class FeatureSource:
    """A module whose output a shortcut reads; registered as that module's forward hook.

    One output is read once: a second reading would be of another forward pass. What backward recomputes for gradient
    checkpointing may read it again.

    Copies and pickles hold no output.

    Args:
        name: of the module in the model.
        target: of the module that the shortcut is around.
        model: the model.
    """

    def __init__(self, name: str, target: str, model: nn.Module) -> None:
        self.name, self.target = name, target
        self._model = model
        self._output: Tensor | None = None
        self._is_read = False
        self._without_graph = False
        self._was_cut = False

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep what the module returned."""
        tensor, _ = first_tensor(output)
        if not tensor.is_floating_point():
            raise TypeError(f"feature_source {self.name!r} must return a floating-point tensor, got {tensor.dtype}.")
        self._output = tensor
        self._without_graph = not torch.is_grad_enabled()
        # What is recomputed belongs to a forward pass that is over: the next one must not find it.
        self._is_read = _is_recomputing()
        self._was_cut = False

    def read(self, keep: bool) -> Tensor:
        """The output of this forward pass.

        Args:
            keep: whether backward may ask for it again.

        Raises:
            RuntimeError: if the module has not run before in this forward pass, or has run without a graph in a pass
                that needs one.
        """
        output = self._output
        if output is None or (self._is_read and not _is_recomputing()):
            raise RuntimeError(
                f"the shortcut around {self.target!r} reads the output of feature_source {self.name!r}, which has not "
                "run before it in this forward pass. Name a module that runs once, and before, in every pass."
            )
        recomputes, has_graph = _is_recomputing(), torch.is_grad_enabled()
        # Re-entrant checkpointing runs blocks without a graph, and later again with one of their own, to which tensors
        # that are no arguments of the block do not belong.
        is_cut = self._without_graph and has_graph and not recomputes
        is_cut_here = output.requires_grad and not has_graph
        if (is_cut or is_cut_here) and self._is_wanted():
            raise RuntimeError(
                f"re-entrant gradient checkpointing parts the shortcut around {self.target!r} from its feature_source "
                f"{self.name!r}, so that no gradient could reach what trains below it. Call "
                "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})."
            )
        if recomputes and self._was_cut:
            output = output.detach()
        elif not recomputes:
            self._was_cut = is_cut_here
        self._is_read = True
        if not keep:
            self._output = None
        return output

    def peek(self) -> Tensor:
        """What the module returned last; for hooks, which look at a forward pass and have no part in it."""
        if self._output is None:
            raise RuntimeError(f"feature_source {self.name!r} has not run.")
        return self._output

    def _is_wanted(self) -> bool:
        """Whether something before the target trains, going by the order in which modules were registered."""
        for name, parameter in self._model.named_parameters():
            if name.startswith(f"{self.target}."):
                return False
            if parameter.requires_grad:
                return True
        return False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_output": None, "_is_read": False}


def _is_recomputing() -> bool:
    """Whether backward runs now; a compiled graph recomputes by itself."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
