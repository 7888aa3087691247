"""Small tools for modules that are not ours: their mode, their wrappers, their hooks."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for the time of a block; every module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `PeftModel`, the wrappers of several processes and `torch.compile`, in whatever order."""
    while True:
        inner = extract_model_from_parallel(model, keep_torch_compile=False)
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        if inner is model:
            return model
        model = inner


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the forward pass of a model takes a keyword."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def is_compiling() -> bool:
    """Whether torch.compile is tracing; bookkeeping in Python is left out of compiled graphs."""
    return torch.compiler.is_compiling()


def remove_hooks(module: nn.Module, *own: Callable[..., Any]) -> None:
    """Take functions out of the forward hooks and pre-hooks of a module."""
    for hooks, options in (
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
    ):
        for key, hook in list(hooks.items()):
            if hook in own:
                for table in (hooks, *options):
                    table.pop(key, None)
