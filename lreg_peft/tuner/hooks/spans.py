"""Connecting shortcuts with the modules whose output they read."""

from torch import nn

from ..layer import LRegLayer
from ..source import FeatureSource
from .registry import remember


def install(model: nn.Module) -> None:
    """Register every feature source of `model` at the module of its name, which may have been wrapped meanwhile."""
    release(model)
    for source in _sources(model):
        remember(model, release)
        model.get_submodule(source.name).register_forward_hook(source)


def release(model: nn.Module) -> None:
    """Undo `install`."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, FeatureSource):
                del module._forward_hooks[key]


def _sources(model: nn.Module) -> list[FeatureSource]:
    return [m.source for m in model.modules() if isinstance(m, LRegLayer) and m.source is not None]
