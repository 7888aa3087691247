"""Dictionaries by adapter name that hold what an adapter consists of."""

from collections.abc import Callable
from typing import Any

from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn


def _fetched(holder: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """What stands for a tensor on the meta device: the values, if accelerate has offloaded them.

    Its hooks load what a module owns before that module is called. Those here are never called.
    """
    hook = getattr(holder, "_hf_hook", None)
    weights = getattr(hook, "weights_map", None)
    if weights is None:
        return tensor
    return weights[name].to(hook.execution_device)  # type: ignore[no-any-return,union-attr]


class _Weight(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}"


class WeightDict(nn.ParameterDict):
    """Parameters by adapter name. In the model they are called `lreg_<what>.<adapter>.weight`, as LoRA's are.

    Tools that copy, freeze or count the weights of one adapter look for `.<adapter>.` in their names. In the hand this
    is a ParameterDict: `weights["default"]` is a parameter. Files have no `.weight`, see
    `LRegModel._remove_adapter_name_from_key`.
    """

    def __getitem__(self, key: str) -> nn.Parameter:
        holder = self._modules[key]
        weight: Any = holder.weight  # type: ignore[union-attr]
        return _fetched(holder, "weight", weight) if weight.is_meta else weight  # type: ignore[arg-type,return-value,no-any-return]

    def __setitem__(self, key: str, weight: Any) -> None:
        if not isinstance(weight, nn.Parameter):
            weight = nn.Parameter(weight)
        if key in self._modules:
            self._modules[key].weight = weight  # type: ignore[union-attr]
        else:
            self.add_module(key, _Weight(weight))
            self._keys[key] = None

    def __delitem__(self, key: str) -> None:
        del self._keys[key], self._modules[key]

    def extra_repr(self) -> str:
        """Nothing: the modules say it."""
        return ""


class NodeDict(BufferDict):
    """Mesh nodes by adapter name: persistent buffers that keep their precision.

    `model.half()` or `model.to(torch.bfloat16)` moves them but does not round them: in bf16 neighbouring nodes
    collide, and a mesh with an empty element divides by zero.
    """

    def __init__(self) -> None:
        super().__init__({}, persistent=True)

    def __getitem__(self, key: str) -> Tensor:
        nodes = super().__getitem__(key)
        return _fetched(self, key, nodes) if nodes.is_meta else nodes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NodeDict":
        exact: dict[str, Any] = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, nodes in exact.items():
            moved = self._buffers[name]
            if nodes is not None and moved is not None and moved.dtype != nodes.dtype:
                self._buffers[name] = nodes.to(moved.device)
        return self
