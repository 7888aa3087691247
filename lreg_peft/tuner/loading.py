"""What is read from files: the keys of earlier versions, and whether it is an adapter of this model.

Keys are named like LoRA's: `<module>.lreg_projection.weight`, `.lreg_projection.bias`, `.lreg_encoder.nodes`,
`.lreg_encoder.weight` (profiles) and `.lreg_coefficients.weight`; in a model the name of the adapter stands before the
last part. Before version 0.2 they were `lreg_projection`, `lreg_projection_bias`, `lreg_nodes`, `lreg_profile`,
`lreg_direction`, `lreg_coefficients` `[d, n, C]` and `lreg_constant`, in a model with the adapter's name and `.weight`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.mesh import check_nodes
from .layer import LRegLayer

_PREFIX = "lreg_"
_RENAMED = {
    "projection": "projection{}.weight",
    "projection_bias": "projection{}.bias",
    "nodes": "encoder{}.nodes",
    "profile": "encoder{}.weight",
    "direction": "coefficients{}.weight",
    "coefficients": "coefficients{}.weight",
}


def convert_keys(state: dict[str, Tensor]) -> None:
    """Bring the entries of earlier versions in a state dict to the names and shapes of today, in place."""
    for key in [key for key in state if _is_old(key, state[key])]:
        path, name, adapter = _split(key)
        if name == "constant":
            continue  # goes into the coefficients
        value = state.pop(key)
        if name == "direction":
            value = value.T
        elif name == "coefficients":
            value = value.flatten(0, -2)  # [K, C]
            constant = key.replace("lreg_coefficients", "lreg_constant")
            if constant in state:
                value = torch.cat((value, state.pop(constant).unsqueeze(0)))
            value = value.T
        state[path + _PREFIX + _RENAMED[name].format(adapter)] = value.contiguous()


def _split(key: str) -> tuple[str, str, str]:
    """Path of the module with its dot, old name, and the adapter with a dot before it, if the key has one."""
    path, _, rest = key.rpartition(_PREFIX)
    name, *tail = rest.split(".")
    adapter = [part for part in tail if part != "weight"]
    return path, name, "".join(f".{part}" for part in adapter)


def _is_old(key: str, value: Tensor) -> bool:
    if _PREFIX not in key:
        return False
    name, *tail = key.rpartition(_PREFIX)[2].split(".")
    if name == "projection":
        return tail[-1:] not in (["weight"], ["bias"])
    if name == "coefficients":
        return tail[-1:] != ["weight"] or value.ndim == 3
    return name in (*_RENAMED, "constant")


def before_loading(layer: LRegLayer, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """State-dict pre-hook of a layer: convert what is old, refuse what cannot be right.

    Raises:
        ValueError: see `check_entries`.
    """
    own = {key: state[key] for key in state if key.startswith(f"{prefix}{_PREFIX}")}
    for key in own:
        del state[key]
    convert_keys(own)
    state.update(own)
    check_entries(layer, own, prefix)


def before_loading_model(model: nn.Module, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """State-dict pre-hook of `LRegModel`: the same for every layer, before any of it is copied.

    Raises:
        ValueError: see `check_entries`; if there are entries of shortcuts that the model does not have, or none for
            some of those that it has.
    """
    convert_keys(state)
    adapters = {key.split(".")[-2] for key in state if f".{_PREFIX}" in key}
    known = []
    for name, layer in _layers(model):
        path = f"{prefix}{name}.{_PREFIX}"
        known.append(path)
        entries = {key: state[key] for key in state if key.startswith(path)}
        if not entries and (absent := adapters.intersection(layer.lreg_encoder)):
            raise ValueError(
                f"the file has nothing for {name!r}, where the adapter {min(absent)!r} has a shortcut. It was saved "
                "for another base model, for one of fewer layers perhaps, for other target modules, or is damaged."
            )
        check_entries(layer, entries, f"{prefix}{name}.")
    lost = [
        key for key in state if key.startswith(prefix) and f".{_PREFIX}" in key and not key.startswith(tuple(known))
    ]
    if lost:
        raise ValueError(
            f"the file holds {len(lost)} tensors of shortcuts that the model does not have, the first is {lost[0]!r}. "
            "It was saved for other target modules or for another base model."
        )


def _layers(model: nn.Module) -> Iterator[tuple[str, LRegLayer]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LRegLayer))


def check_entries(layer: LRegLayer, entries: dict[str, Tensor], prefix: str) -> None:
    """Refuse entries for one layer that are no adapter of it.

    Args:
        layer: the layer.
        entries: of its adapters, by key.
        prefix: what stands before `lreg_` in these keys.

    Raises:
        ValueError: if a part of an adapter is missing (weights mean nothing on another mesh), shapes differ, numbers
            are not finite, a mesh is not strictly increasing, or there is no such adapter.
    """
    if not entries:
        return
    own = {f"{prefix}{key}": value for key, value in layer.state_dict().items() if key.startswith(_PREFIX)}
    if unknown := sorted(entries.keys() - own.keys()):
        raise ValueError(
            f"the file holds {unknown[0]!r}, which this model and its configuration do not have. It was saved with "
            "another configuration or for another model."
        )
    adapters = {key.split(".")[-2] for key in entries}
    wanted = {key for key in own if key.split(".")[-2] in adapters}
    if missing := sorted(wanted - entries.keys()):
        nodes = " The nodes are buffers: a file of what requires gradients lacks them." if "nodes" in missing[0] else ""
        raise ValueError(
            f"the file lacks {missing[0]!r}, without which the rest of this adapter would be another function.{nodes} "
            "Save with save_pretrained(), or the whole state_dict of the model."
        )
    for key, value in entries.items():
        # A parameter that is partitioned over processes looks empty.
        if value.shape != own[key].shape and own[key].numel():
            raise ValueError(
                f"size mismatch for {key}: the model and its configuration ask for {tuple(own[key].shape)}, the file "
                f"holds {tuple(value.shape)}. It was saved for another model or another configuration."
            )
        if value.is_meta:
            continue
        if not value.is_floating_point() or not torch.isfinite(value).all():
            raise ValueError(f"the file is damaged: {key} holds values that are not finite numbers.")
        if key.endswith(".nodes"):
            _check_saved_nodes(key, value)


def _check_saved_nodes(key: str, nodes: Tensor) -> None:
    try:
        check_nodes(nodes)
    except ValueError as error:
        hint = (
            ""
            if nodes.dtype.itemsize > 2
            else f" They were saved in {nodes.dtype}, which rounds: save them in float32."
        )
        raise ValueError(f"the file is damaged: {key}: {error}{hint}") from None
    if nodes[:, 0].ne(0).any() or nodes[:, -1].ne(1).any():
        raise ValueError(f"the file is damaged: {key}: every mesh must span [0, 1].")
