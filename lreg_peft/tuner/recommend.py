"""The configuration that did best in the measurements of this project, sized to a budget, for any architecture.

The recipe: factored heads with a linear term on every linear layer of the backbone, and, of a language model, around
the output head and the norm before it; a gradient start; twice as many components on the attention as elsewhere, one on
the output head, up to sixteen at the norm.
"""

import re
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel

from ..core.checks import whole
from ..core.encoder import shortcut_parameters
from .config import LRegConfig
from .layer import LRegLayer
from .sizes import feature_sizes, linear_sizes, readable_sizes
from .targets import _LANGUAGE_MODEL_TASKS, _task_of, output_head_name

# Means of the profiles at the start. A change of domain asks a language model's head for a constant shift above all;
# inside the network most of what is asked varies with the input.
_MEAN_AT_THE_HEAD, _MEAN_INSIDE = 1.0, 0.3
# Up to this share of the budget a component at the head does more than components elsewhere: on the tuning part of
# WikiText (a vocabulary of 8,192) at .69 it did, at .83 it did not.
_MOST_FOR_THE_HEAD = 0.7
# Of what the head leaves, the norm before it gets a quarter, and no more than so many components. What is added there
# moves all logits at once, for the price of a hidden state in place of a vocabulary: on the tuning part of WikiText a
# quarter did best or nearly so at all budgets, and sixteen components no better than ten.
_SHARE_OF_THE_NORM, _MOST_AT_THE_NORM = 0.25, 16
# What it gets where every module has its smallest share.
_LEAST_AT_THE_NORM = 4
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass
class _Site:
    """A module that may get components."""

    name: str
    cost: int  # of one component
    share: int  # how many components it gets where the others get one
    is_output_head: bool = False
    is_final_norm: bool = False
    components: int = 0


def recommended_config(
    model: nn.Module,
    budget: int | str | None = None,
    *,
    task_type: str | None = None,
    output_head: bool = True,
    final_norm: bool = True,
    dof: int = 8,
    **options: Any,
) -> LRegConfig:
    """The recommended configuration for a model, with its components divided so that they fill a budget.

    Print `inspect_targets(model, config)` to see what it adapts. Call `initialize_lreg_weights(model, dataloader)`
    after `get_peft_model`, as for every configuration with `init_weights="gradient"`.

    Args:
        model: a Transformers model without adapters.
        budget: trainable parameters of the shortcuts, at most: a number, or "lora:8" for as many as
            `LoraConfig(r=8)` has on its default modules of this architecture, "lora:8:all-linear" on all linear
            layers. None gives every module its smallest share: one component, two on the attention, four at the norm
            before the output head.
        task_type: as in PEFT; None takes that of the model's class.
        output_head: adapt the output head of a language model too. False for trainers that refuse adapters on
            `lm_head`, as those of TRL do; the norm before it stays adapted.
        final_norm: adapt the norm before the output head of a language model, too. Some architectures have none there.
        dof: nodes of every mesh.
        options: further fields of `LRegConfig`.

    Returns:
        The configuration.

    Raises:
        ValueError: if the budget does not pay for one component anywhere or cannot be read, or the model has no
            linear layers that are known to lie inside it; the message says what to give.
        TypeError: for arguments of the wrong type.
    """
    whole("dof", dof, 2)
    if isinstance(model, PeftModel) or any(isinstance(module, LRegLayer) for module in model.modules()):
        raise ValueError("recommended_config wants the base model and got one with adapters: call it before these.")
    taken = {"target_modules", "head", "n_components", "component_pattern", "linear_term"} & options.keys()
    if taken:
        raise ValueError(f"recommended_config chooses {sorted(taken)} itself: leave them out, or write an LRegConfig.")
    task = task_type or _task_of(model)
    is_language_model = task in (*_LANGUAGE_MODEL_TASKS, "MASKED_LM")
    head = output_head_name(model) if output_head and is_language_model else None
    sites = _sites(model, head, dof)
    if final_norm and is_language_model and (norm := _final_norm(model)) is not None:
        sites.insert(0, _Site(norm, _cost(*_feature_sizes(model, norm), dof), _LEAST_AT_THE_NORM, is_final_norm=True))
    _fill(sites, _parameters(model, budget), budget)
    chosen = [site for site in sites if site.components]
    names = [site.name for site in chosen]
    inside = [site for site in chosen if site.name != head]
    config = {
        "task_type": task_type,
        "target_modules": short_names(model, names),
        "head": "factored",
        "linear_term": True,
        "n_components": 1,
        "component_pattern": _pattern(inside),
        "dof": dof,
        "init_weights": "gradient",
        "profile_mean": _MEAN_INSIDE,
        "profile_mean_pattern": {re.escape(head): _MEAN_AT_THE_HEAD} if head in names else {},
    }
    return LRegConfig(**{**config, **options})


def _sites(model: nn.Module, head: str | None, dof: int) -> list[_Site]:
    """The linear layers of the backbone, attention first, and the output head, which comes before all."""
    embedding = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    backbone = _backbone(model)
    sites = []
    for name, module in model.named_modules():
        sizes = linear_sizes(module)
        if sizes is None or isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            continue
        if module is not embedding and name.startswith(backbone) and _is_repeated(name):
            sites.append(_Site(name, _cost(*sizes, dof), 2 if _ATTENTION.search(name) else 1))
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no linear layers in repeated blocks, so there is nothing to recommend: name "
            "modules in LRegConfig(target_modules=[...])."
        )
    if head is not None:
        sites.insert(0, _Site(head, _cost(*_feature_sizes(model, head), dof), 1, is_output_head=True))
    return sites


def _backbone(model: nn.Module) -> str:
    """What the names of the backbone's modules begin with."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and hasattr(model, prefix) else ""


def _final_norm(model: nn.Module) -> str | None:
    """The normalisation between the last layer and the output head; some architectures have none, or in the head."""
    found = None
    for name, module in model.named_modules():
        is_norm = "norm" in type(module).__name__.lower() and not list(module.children())
        inside = name.startswith(_backbone(model)) and not _is_repeated(name) and "embed" not in name.lower()
        if is_norm and inside and readable_sizes(module) is not None:
            found = name  # the last one: decoders come after encoders, language models after those of images
    return found


def _feature_sizes(model: nn.Module, name: str) -> tuple[int, int]:
    return feature_sizes(name, model.get_submodule(name), LRegConfig())


def _is_repeated(name: str) -> bool:
    """Whether a module lies in a list of layers, not beside them (poolers, projections of embeddings)."""
    return any(part.isdigit() for part in name.split("."))


def _cost(in_features: int, out_features: int, dof: int) -> int:
    """Parameters of one component."""
    return shortcut_parameters("factored", 1, dof, in_features, out_features)


def _parameters(model: nn.Module, budget: int | str | None) -> int | None:
    """The budget as a number."""
    if budget is None:
        return None
    if isinstance(budget, bool) or not isinstance(budget, (int, str)):
        raise TypeError(f"budget must be a number of parameters or a text such as 'lora:8', got {budget!r}.")
    if isinstance(budget, int):
        return budget
    words = budget.split(":")
    if not (2 <= len(words) <= 3 and words[0] == "lora" and words[1].isdigit() and int(words[1]) > 0):
        raise ValueError(f"budget must be a number, 'lora:RANK' or 'lora:RANK:MODULES', got {budget!r}.")
    kind = getattr(getattr(model, "config", None), "model_type", None)
    default = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    modules = words[2].split(",") if len(words) == 3 else default
    if modules is None:
        raise ValueError(f"PEFT has no default modules for LoRA on {kind!r} models: say 'lora:{words[1]}:all-linear'.")
    embedding = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    total = 0
    for name, module in model.named_modules():
        sizes = linear_sizes(module)
        wanted = modules == ["all-linear"] or name.rpartition(".")[2] in modules
        if sizes is not None and wanted and module is not embedding:
            total += int(words[1]) * sum(sizes)
    if not total:
        raise ValueError(f"LoRA has nothing to adapt in {type(model).__name__} at {modules}: name other modules.")
    return total


def _fill(sites: list[_Site], parameters: int | None, budget: int | str | None) -> None:
    """Give out components: to head and norm first, then singly to whoever has the least of its share."""
    if parameters is None:
        for site in sites:
            site.components = site.share
        return
    rest = parameters
    inside = [site for site in sites if not (site.is_output_head or site.is_final_norm)]
    for head in sites:
        # Once, and before all others: without it the same budget reaches far less. A second component there never pays.
        if head.is_output_head and head.cost <= _MOST_FOR_THE_HEAD * rest:
            head.components, rest = 1, rest - head.cost
    for norm in sites:
        if norm.is_final_norm and norm.cost <= rest:
            norm.components = min(max(round(_SHARE_OF_THE_NORM * rest / norm.cost), 1), _MOST_AT_THE_NORM)
            rest -= norm.components * norm.cost
    while open_sites := [site for site in inside if site.cost <= rest]:
        site = min(reversed(open_sites), key=_turn)
        site.components += 1
        rest -= site.cost
    if not any(site.components for site in sites):
        cheapest = min(sites, key=lambda site: site.cost)
        raise ValueError(
            f"budget={budget!r} ({parameters:,} parameters) does not pay for one component: the cheapest, at "
            f"{cheapest.name!r}, has {cheapest.cost:,}."
        )


def _turn(site: _Site) -> tuple[float, int]:
    """What is lowest for the site that gets the next component.

    The first ones go to the attention before they go elsewhere. Other ties go to the layers near the output, whose
    gradients cross fewer layers.
    """
    return site.components / site.share, 0 if site.components else -site.share


def short_names(model: nn.Module, names: list[str]) -> list[str]:
    """Endings where all modules of an ending are meant, whole names elsewhere."""
    wanted = set(names)
    short: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        inner = next((i for i in reversed(range(len(parts))) if parts[i].isdigit()), -1)
        ending = ".".join(parts[inner + 1 :])
        same = {other for other, _ in model.named_modules() if other == ending or other.endswith(f".{ending}")}
        short[ending if same <= wanted else name] = None
    return list(short)


def _pattern(sites: list[_Site]) -> dict[str, int]:
    """`component_pattern`, of keys that exclude each other: files keep it in alphabetical order."""
    groups: dict[tuple[str, str], dict[int, list[str]]] = {}
    norms = [site for site in sites if site.is_final_norm]
    for site in sites:
        if site.is_final_norm:
            continue
        parts = site.name.split(".")
        number = max(i for i, part in enumerate(parts) if part.isdigit())
        around = ".".join(parts[:number]), ".".join(parts[number + 1 :])
        groups.setdefault(around, {}).setdefault(site.components, []).append(parts[number])
    pattern = {re.escape(site.name): site.components for site in norms if site.components > 1}
    for (before, after), by_count in groups.items():
        for count, numbers in by_count.items():
            if len(by_count) == 1 and count > 1:
                pattern[rf"\d+\.{re.escape(after)}"] = count
            elif count > 1:
                pattern[rf"{re.escape(before)}\.({'|'.join(numbers)})\.{re.escape(after)}"] = count
    return pattern
