"""A weighted sum of adapters as one adapter, and adapters scaled for a while.

A shortcut is linear in its table, so both are exact.
"""

import copy
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .config import LRegConfig
from .layer import LRegLayer
from .names import plain_name

_KINDS = ("cat", "linear")


def combined_config(
    model: nn.Module, configs: dict[str, LRegConfig], adapters: Sequence[str], weights: Sequence[float], kind: str
) -> LRegConfig:
    """The configuration of `sum_k weights[k] * adapters[k]`.

    Args:
        model: with the adapters in place.
        configs: of all adapters of the model.
        adapters: names.
        weights: one per adapter.
        kind: "cat": the components of all adapters side by side. "linear": one set of components, for adapters with
            the same encoder and mesh in every module, such as those that began as copies and kept their projection.

    Raises:
        ValueError: if there is no such adapter, with what stands in the way.
    """
    if kind not in _KINDS:
        raise ValueError(
            f"combination_type must be 'cat' or 'linear', got {kind!r}: both give the weighted sum of the shortcuts "
            "exactly, and the others work on the low-rank matrices of LoRA."
        )
    if absent := [name for name in adapters if name not in configs]:
        raise ValueError(f"adapters {absent} do not exist. There are: {sorted(configs)}.")
    if not adapters or len(set(adapters)) < len(adapters) or len(weights) != len(adapters):
        raise ValueError(
            "adapters must be different names with one weight each, got "
            f"adapters={list(adapters)} and weights={list(weights)}."
        )
    if not all(isinstance(w, (int, float)) and not isinstance(w, bool) and math.isfinite(w) for w in weights):
        raise ValueError(f"weights must be finite numbers, got {list(weights)}.")
    if graded := [name for name in adapters if configs[name].previous_grades]:
        raise ValueError(f"{graded} are grades, which stand on other adapters and cannot be combined without them.")
    if len(heads := {name: configs[name].head_name for name in adapters}) and len(set(heads.values())) > 1:
        raise ValueError(f"adapters must have the same head to be combined, got {heads}.")
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and (own := set(adapters) & module._adapters):
            raise ValueError(
                f"adapters {sorted(own)} have copies of {path!r} in modules_to_save, and the sum of adapters has no "
                "meaning for a module that is replaced: combine adapters without modules_to_save."
            )
    config = copy.deepcopy(configs[adapters[0]])
    sizes = _sizes(model, adapters, kind)
    config.target_modules = _only(model, list(sizes))
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = config.modules_to_save = None
    config.n_components, config.dof = next(iter(sizes.values()))
    config.component_pattern = {_exact(name): d for name, (d, _) in sizes.items() if d != config.n_components}
    config.dof_pattern = {_exact(name): n for name, (_, n) in sizes.items() if n != config.dof}
    _describe_reading(config, model, configs, adapters)
    config.init_weights, config.inference_mode = True, False
    config.trainable_token_indices = {}
    return config


def _sizes(model: nn.Module, adapters: Sequence[str], kind: str) -> dict[str, tuple[int, int]]:
    """`(n_components, dof)` of the sum, by module."""
    sizes = {}
    for path, layer, here in _layers(model, adapters):
        meshes = {name: layer.lreg_nodes[name] for name in here}
        if len(dofs := {name: mesh.shape[1] for name, mesh in meshes.items()}) and len(set(dofs.values())) > 1:
            raise ValueError(f"adapters must have the same dof in a module to be combined, got {dofs} in {path!r}.")
        if kind == "linear" and not all(_same_encoder(layer, here[0], name) for name in here):
            raise ValueError(
                f"combination_type='linear' adds coefficients, which means something only on the same projection and "
                f"mesh; those of {here} differ in {path!r}. 'cat' puts their components side by side."
            )
        components = sum(mesh.shape[0] for mesh in meshes.values()) if kind == "cat" else meshes[here[0]].shape[0]
        sizes[path] = (components, next(iter(dofs.values())))
    return sizes


def _layers(model: nn.Module, adapters: Sequence[str]) -> Iterator[tuple[str, LRegLayer, list[str]]]:
    """Every layer that has some of the adapters: its plain name, itself, and which."""
    for path, layer in model.named_modules():
        if isinstance(layer, LRegLayer) and (here := [name for name in adapters if name in layer.lreg_nodes]):
            yield plain_name(path), layer, here


def _describe_reading(
    config: LRegConfig, model: nn.Module, configs: dict[str, LRegConfig], adapters: Sequence[str]
) -> None:
    """Write down, module by module, what the shortcuts read and how; the layers know it of all adapters."""
    config.feature_sizes, config.feature_source = {}, {}
    layouts, readouts = {}, {}
    for path, layer, here in _layers(model, adapters):
        key, readings = _exact(path), {name: layer.readings[name] for name in here}
        reading = readings[here[0]]
        if len(set(readings.values())) > 1:
            raise ValueError(
                f"adapters must have the same layout and readout in a module to be combined, got {readings} in "
                f"{path!r}."
            )
        if any(configs[name].feature_sizes for name in here):
            config.feature_sizes[key] = (layer.in_features, layer.out_features)
        if layer.source is not None:
            config.feature_source[key] = layer.source.name
        if reading.layout is not None:
            layouts[key] = reading.layout
        if reading.readout is not None:
            readouts[key] = reading.readout
    config.layout, config.readout = layouts or None, readouts or None


def _exact(name: str) -> str:
    """A key of a pattern that stands for the module `name`, and for none whose name ends like it."""
    return f"^{re.escape(name)}"


def _only(model: nn.Module, names: list[str]) -> list[str] | str:
    """`target_modules` for these modules alone: an expression if another one's name ends like one of theirs."""
    others = {plain_name(path) for path, _ in model.named_modules()} - set(names)
    if any(other.endswith(f".{name}") for other in others for name in names):
        return "|".join(map(re.escape, names))
    return names


def _same_encoder(layer: LRegLayer, one: str, other: str) -> bool:
    parts: tuple[Any, ...] = (layer.lreg_projection, layer.lreg_projection_bias, layer.lreg_nodes, layer.lreg_profile)
    return all(torch.equal(part[one], part[other]) for part in parts if one in part)


@torch.no_grad()
def write_sum(model: nn.Module, name: str, adapters: Sequence[str], weights: Sequence[float], kind: str) -> None:
    """Fill the adapter `name`, made from `combined_config`, with the weighted sum."""
    for layer in model.modules():
        if not isinstance(layer, LRegLayer) or name not in layer.lreg_nodes:
            continue
        terms = [(adapter, w) for adapter, w in zip(adapters, weights, strict=True) if adapter in layer.lreg_nodes]
        encoder: tuple[Any, ...] = (layer.lreg_projection, layer.lreg_projection_bias, layer.lreg_nodes)
        for part in encoder:
            values = [part[adapter] for adapter, _ in terms]
            part[name].copy_(torch.cat(values) if kind == "cat" else values[0])
        linear = layer.heads[name].linear_weights
        for key, weight in layer.weights(name).items():
            if key in ("projection", "projection_bias"):
                continue
            values = [layer.weights(adapter)[key] * (w if key in linear else 1) for adapter, w in terms]
            if key == "constant":
                weight.copy_(torch.stack(values).sum(dim=0))  # every component can carry it: there is one for all
            elif kind == "cat":
                weight.copy_(torch.cat(values))
            else:
                weight.copy_(torch.stack(values).sum(dim=0) if key in linear else values[0])


@contextmanager
def rescale_shortcuts(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply every shortcut of a model by a number for the time of a block.

    The weights are scaled in place and restored exactly, so that what is trained inside the block is lost.

    Args:
        model: with LReg adapters.
        multiplier: any finite number; between 0 and 1 the output lies between that of the base and the adapted model.

    Raises:
        ValueError: if the model has no shortcut or the number is not finite.
        TypeError: if it is not a number.
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, (int, float)):
        raise TypeError(f"multiplier must be a number, got {multiplier!r}.")
    if not math.isfinite(multiplier):
        raise ValueError(f"multiplier must be finite, got {multiplier}.")
    layers = [module for module in model.modules() if isinstance(module, LRegLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LReg adapter whose shortcuts could be scaled.")
    weights = [weight for layer in layers for name in layer.lreg_nodes for weight in layer.output_weights(name)]
    with torch.no_grad():
        originals = [weight.clone() for weight in weights]
        for weight in weights:
            weight.mul_(multiplier)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)
