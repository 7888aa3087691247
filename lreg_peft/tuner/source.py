"""The output of another module as the features of a shortcut: a span.

The other module leaves its output here in a forward hook; the shortcut takes it when its own module has run. Gradient
checkpointing runs parts of a pass again in backward, perhaps without the other module and after further passes. It
calls them with what they were called with: the tensors that led to the shortcut tell which pass is repeated.
"""

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layout import first_tensor

# How many numbers of a tensor tell it from that of another pass.
_N_SAMPLES = 64


@dataclass
class _Pass:
    """A forward pass that backward may repeat.

    Attributes:
        output: of the source.
        was_cut: whether the shortcut read it without a graph, as re-entrant checkpoints do.
        samples: some numbers of what reached the shortcut's own module, and of the output.
        is_shared: whether what led to the shortcut led there in a pass with another output, too.
        is_repeated: whether backward has asked for it.
    """

    output: Tensor
    was_cut: bool
    samples: tuple[Tensor, Tensor]
    is_shared: bool = False
    is_repeated: bool = False


class _Here(threading.local):
    """What one thread is about.

    Attributes:
        output: of the source in this forward pass, until it is read.
        without_graph: whether it came about without one.
        seen: what was read last.
        fresh: what the source returned in a repetition, and the node of the graph that runs it.
        way: the inputs of the blocks around the shortcut, and the node that runs them.
    """

    output: Tensor | None = None
    without_graph = False
    seen: Tensor | None = None
    fresh: tuple[Any, Tensor] | None = None
    way: tuple[tuple[Any, weakref.ref[Tensor]], ...] = ()


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
        self._forget()

    def _forget(self) -> None:
        self._here = _Here()
        # By id of a tensor that led to the shortcut, as long as that lives.
        self._passes: dict[int, tuple[weakref.ref[Tensor], _Pass]] = {}
        self._latest: _Pass | None = None
        # Samples of the one before, if backward has not repeated it.
        self._before: tuple[Tensor, Tensor] | None = None

    def begin(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the model: what an interrupted pass has left is not of this one."""
        if not _is_recomputing():
            self._here.output, self._here.way = None, ()

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the blocks around the target that may be checkpointed without the source."""
        if torch.compiler.is_compiling():
            return
        features = _first_floating(args, kwargs)
        if features is not None:
            node = _node()
            kept = tuple(step for step in self._here.way if step[0] is node and step[1]() is not None)
            self._here.way = (*kept, (node, weakref.ref(features)))

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep what the module returned."""
        tensor, _ = first_tensor(output)
        if not tensor.is_floating_point():
            raise TypeError(f"feature_source {self.name!r} must return a floating-point tensor, got {tensor.dtype}.")
        if _is_recomputing():
            # What is recomputed belongs to a forward pass that is over: the next one must not find it.
            self._here.fresh = _node(), tensor
            return
        self._here.output = tensor
        self._here.without_graph = not torch.is_grad_enabled()

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], keep: bool) -> Tensor:
        """The output of this forward pass, or of the one that backward repeats.

        Args:
            args: of the target's call.
            kwargs: of the target's call.
            keep: whether backward, or a hook, may ask for it again.

        Raises:
            RuntimeError: if the module has not run before in this forward pass, or has run without a graph in a pass
                that needs one; if backward repeats a pass whose output is gone.
        """
        here, own = self._here, None if torch.compiler.is_compiling() else _first_floating(args, kwargs)
        if _is_recomputing():
            here.seen = self._of_repeated(own)
            return here.seen
        output = here.output
        if output is None:
            raise RuntimeError(
                f"the shortcut around {self.target!r} reads the output of feature_source {self.name!r}, which has not "
                "run before it in this forward pass. Name a module that runs once, and before, in every pass."
            )
        has_graph = torch.is_grad_enabled()
        # Re-entrant checkpointing runs blocks without a graph, and later again with one of their own, to which tensors
        # that are no arguments of the block do not belong.
        is_cut_here = output.requires_grad and not has_graph
        if ((here.without_graph and has_graph) or is_cut_here) and self._is_wanted():
            raise RuntimeError(
                f"re-entrant gradient checkpointing parts the shortcut around {self.target!r} from its feature_source "
                f"{self.name!r}, so that no gradient could reach what trains below it. Call "
                "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})."
            )
        if keep and own is not None:
            self._remember(_Pass(output, is_cut_here, (_sample(own), _sample(output))), own)
        here.output, here.seen, here.way = None, output if keep else None, ()
        return output

    def peek(self) -> Tensor:
        """What the module returned last; for hooks, which look at a forward pass and have no part in it."""
        seen = self._here.output if self._here.output is not None else self._here.seen
        if seen is None:
            raise RuntimeError(f"feature_source {self.name!r} has not run.")
        return seen

    def _remember(self, known: _Pass, own: Tensor) -> None:
        latest = self._latest
        self._before = latest.samples if latest is not None and not latest.is_repeated else None
        self._latest = known
        way = [tensor for step in self._here.way if (tensor := step[1]()) is not None]
        for tensor in [*way, own]:
            if id(tensor) in self._passes:
                other = self._passes[id(tensor)][1]
                known.is_shared |= not (other.is_repeated or _is_equal(other.output, known.output))
            self._passes[id(tensor)] = _ref_into(self._passes, tensor), known

    def _of_repeated(self, own: Tensor | None) -> Tensor:
        """The output in the pass that backward repeats."""
        here, node = self._here, _node()
        fresh, way = here.fresh, [step[1]() for step in here.way if step[0] is node]
        here.fresh, here.way = None, ()
        if fresh is not None and fresh[0] is node:  # repeated together with the target
            return fresh[1]
        known = self._known([tensor for tensor in [*way, own] if tensor is not None])
        if known is None and own is not None:
            known = self._latest_from(own)
        if known is not None:
            known.is_repeated = True
        if known is None or known.is_shared:
            raise RuntimeError(
                f"gradient checkpointing repeats the shortcut around {self.target!r} for a forward pass whose output "
                f"of feature_source {self.name!r} is not known any more, for other passes came after it: call backward "
                "before the next forward pass, or leave the shortcut out of the checkpointed part."
            )
        return known.output.detach() if known.was_cut else known.output

    def _latest_from(self, own: Tensor) -> _Pass | None:
        """The latest pass, if these numbers reached the target in it and in no other that is not over."""
        sample, latest = _sample(own), self._latest
        if latest is None or not _is_equal(latest.samples[0], sample):
            return None
        if self._before is not None and _is_equal(self._before[0], sample):
            return latest if _is_equal(self._before[1], latest.samples[1]) else None
        return latest

    def _known(self, way: list[Tensor]) -> _Pass | None:
        """The pass in which one of these tensors, or what a re-entrant checkpoint detached it from, led here."""
        for tensor in way:
            for ref, known in list(self._passes.values()):
                other = ref()
                if other is not None and _is_same(other, tensor):
                    return known
        return None

    def _is_wanted(self) -> bool:
        """Whether something before the target trains, going by the order in which modules were registered."""
        for name, parameter in self._model.named_parameters():
            if name.startswith(f"{self.target}."):
                return False
            if parameter.requires_grad:
                return True
        return False

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "target": self.target, "_model": self._model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def _is_recomputing() -> bool:
    """Whether backward runs now; a compiled graph recomputes by itself."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _node() -> Any:
    """The node of the graph that backward is at, one for all that it repeats at once; None outside of backward."""
    return torch._C._current_autograd_node() if _is_recomputing() else None


def _first_floating(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    values = (*args, *kwargs.values())
    return next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)


def _ref_into(table: dict[int, Any], tensor: Tensor) -> "weakref.ref[Tensor]":
    """A reference that takes its entry out of a table when the tensor dies."""
    key = id(tensor)
    return weakref.ref(tensor, lambda _: table.pop(key, None))


def _sample(tensor: Tensor) -> Tensor:
    """Some numbers of a tensor, from all over it."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, len(flat) // _N_SAMPLES)].clone()


def _is_equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.device == other.device and one.dtype == other.dtype and torch.equal(one, other))


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, both alive, are one, or views of all of the same memory."""
    if one is other:
        return True
    alike = (one.shape, one.stride(), one.dtype, one.device) == (other.shape, other.stride(), other.dtype, other.device)
    return alike and one.data_ptr() == other.data_ptr() != 0
