"""Connecting shortcuts with the modules whose output they read."""

from torch import nn

from ...modules import remove_hooks
from ..layer import LRegLayer
from ..source import FeatureSource
from .registry import remember


def install(model: nn.Module) -> None:
    """Register every feature source of `model` at the module of its name, which may have been wrapped meanwhile, and
    where a pass begins and comes near the shortcut."""
    release(model)
    for source in _sources(model):
        remember(model, release)
        model.get_submodule(source.name).register_forward_hook(source)
        model.register_forward_pre_hook(source.begin)
        for block in _blocks_without_source(model, source):
            block.register_forward_pre_hook(source.enter, with_kwargs=True)


def release(model: nn.Module) -> None:
    """Undo `install`."""
    for module in model.modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        own = [hook for hook in hooks if isinstance(getattr(hook, "__self__", hook), FeatureSource)]
        remove_hooks(module, *own)


def _sources(model: nn.Module) -> list[FeatureSource]:
    return [m.source for m in model.modules() if isinstance(m, LRegLayer) and m.source is not None]


def _blocks_without_source(model: nn.Module, source: FeatureSource) -> list[nn.Module]:
    """The modules around the target that the source is not in, the outermost first."""
    parts = source.target.split(".")
    names = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    return [model.get_submodule(name) for name in names if not source.name.startswith(f"{name}.")]
