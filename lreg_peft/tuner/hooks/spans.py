"""Connecting shortcuts with the modules whose output they read."""

from torch import nn

from ...modules import remove_hooks
from ..layer import LRegLayer
from ..source import FeatureSource


def install(model: nn.Module) -> None:
    """Register every feature source of `model` at the module of its name, which may have been wrapped meanwhile, and
    where a pass begins; may be called again."""
    for layer in [module for module in model.modules() if isinstance(module, LRegLayer)]:
        if (source := layer.source) is None:
            continue
        remove(model, source)
        model.get_submodule(source.name).register_forward_hook(source)
        model.register_forward_pre_hook(source.begin)


def remove(model: nn.Module, source: FeatureSource) -> None:
    """Take the hooks of a feature source out of `model`."""
    for module in model.modules():
        remove_hooks(module, source, source.begin)
