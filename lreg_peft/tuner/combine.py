"""A weighted sum of adapters as one adapter. A shortcut is linear in its table, so the sum is exact."""

import copy
import math
import re
from collections.abc import Iterator, Sequence

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .config import LRegConfig
from .layer import LRegLayer

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
    for field in ("weighting", "linear_term", "base_width"):
        values = {name: getattr(configs[name], field) for name in adapters}
        if len(set(values.values())) > 1:
            raise ValueError(f"adapters must have the same {field} to be combined, got {values}.")
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
    config.n_components, config.n_nodes = next(iter(sizes.values()))
    config.component_pattern = {_exact(name): d for name, (d, _) in sizes.items() if d != config.n_components}
    config.node_pattern = {_exact(name): n for name, (_, n) in sizes.items() if n != config.n_nodes}
    _describe_reading(config, model, configs, adapters)
    config.init_weights, config.inference_mode = True, False
    config.trainable_token_indices = {}
    return config


def _sizes(model: nn.Module, adapters: Sequence[str], kind: str) -> dict[str, tuple[int, int]]:
    """`(n_components, n_nodes)` of the sum, by module."""
    sizes = {}
    for path, layer, here in _layers(model, adapters):
        meshes = {name: layer.parts(name)[1].nodes for name in here}
        if len(counts := {name: mesh.shape[1] for name, mesh in meshes.items()}) and len(set(counts.values())) > 1:
            raise ValueError(
                f"adapters must have the same n_nodes in a module to be combined, got {counts} in {path!r}."
            )
        if kind == "linear" and not all(_same_encoder(layer, here[0], name) for name in here):
            raise ValueError(
                f"combination_type='linear' adds coefficients, which means something only on the same projection and "
                f"mesh; those of {here} differ in {path!r}. 'cat' puts their components side by side."
            )
        components = sum(mesh.shape[0] for mesh in meshes.values()) if kind == "cat" else meshes[here[0]].shape[0]
        sizes[path] = (components, next(iter(counts.values())))
    return sizes


def _layers(model: nn.Module, adapters: Sequence[str]) -> Iterator[tuple[str, LRegLayer, list[str]]]:
    """Every layer that has some of the adapters: its name, itself, and which."""
    for path, layer in model.named_modules():
        if isinstance(layer, LRegLayer) and (here := [name for name in adapters if name in layer.lreg_encoder]):
            yield path, layer, here


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
    others = {path for path, _ in model.named_modules()} - set(names)
    if any(other.endswith(f".{name}") for other in others for name in names):
        return "|".join(map(re.escape, names))
    return names


def _same_encoder(layer: LRegLayer, one: str, other: str) -> bool:
    """Whether two adapters have equal projections, meshes and profiles."""
    pairs = zip(layer.parts(one)[:2], layer.parts(other)[:2], strict=True)
    return all(
        torch.equal(mine, theirs)
        for own, others in pairs
        for mine, theirs in zip(own.state_dict().values(), others.state_dict().values(), strict=True)
    )


@torch.no_grad()
def write_sum(model: nn.Module, name: str, adapters: Sequence[str], weights: Sequence[float], kind: str) -> None:
    """Fill the adapter `name`, made from `combined_config`, with the weighted sum."""
    for _, layer, _ in _layers(model, [name]):
        here = [(adapter, w) for adapter, w in zip(adapters, weights, strict=True) if adapter in layer.lreg_encoder]
        terms = [(*layer.parts(adapter), w * layer.scaling[adapter]) for adapter, w in here]
        projection, encoder, coefficients = layer.parts(name)
        if kind == "linear":
            projection.load_state_dict(terms[0][0].state_dict())
            encoder.load_state_dict(terms[0][1].state_dict())
            coefficients.weight.copy_(torch.stack([b.weight * w for *_, b, w in terms]).sum(dim=0))
            continue
        projection.weight.copy_(torch.cat([a.weight for a, *_ in terms]))
        projection.bias.copy_(torch.cat([a.bias for a, *_ in terms]))
        encoder.nodes.copy_(torch.cat([curve.nodes for _, curve, *_ in terms]))
        if encoder.weight is not None:
            encoder.weight.copy_(torch.cat([curve.weight for _, curve, *_ in terms if curve.weight is not None]))
        scaled = [b.weight * w for *_, b, w in terms]
        if encoder.weighting == "reduced":  # every component can carry the constant: there is one for all
            constant = torch.stack([weight[:, -1:] for weight in scaled]).sum(dim=0)
            scaled = [*(weight[:, :-1] for weight in scaled), constant]
        coefficients.weight.copy_(torch.cat(scaled, dim=1))
