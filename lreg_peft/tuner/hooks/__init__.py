"""What is installed in a foreign model: hooks, and a forward method that takes features. `release` takes it out."""

from torch import nn

from ...modules import remove_hooks


def release(model: nn.Module) -> None:
    """Take every hook and forward method of this package out of a model."""
    for module in model.modules():
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        remove_hooks(module, *(hook for hook in hooks if _is_own(hook)))
        forward = module.__dict__.get("forward")
        if forward is not None and _is_own(forward):
            forward.release(module)


def _is_own(hook: object) -> bool:
    kind = hook if hasattr(hook, "__qualname__") else type(hook)
    return str(getattr(kind, "__module__", "")).startswith(__name__.partition(".")[0] + ".")
