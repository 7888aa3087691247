"""The configuration that did best in the measurements of this project, sized to a budget, for any architecture.

The recipe: factored weighting and a linear term on every linear layer of the backbone, and, of a language model, around
the output head and the norm before it; a gradient start; twice as many components on the attention as elsewhere, one on
the output head, up to sixteen at the norm.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from peft import PeftModel, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from ..core.checks import whole
from ..core.encoder import shortcut_parameters
from .config import LRegConfig
from .layer import LRegLayer
from .placement import LANGUAGE_MODEL_TASKS, output_embedding, output_head_name, paper_targets, task_of
from .sizes import feature_sizes, linear_sizes, readable_sizes

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
# About the width of the models that the rates below were found on: these lose little by it, and wider ones take no
# larger steps. Smaller values bear higher rates (with 64 new classifiers do not end at chance at three times the rate),
# and are worse at the best one.
_BASE_WIDTH = 256
#: Nodes of every mesh.
RECOMMENDED_NODES = 8
# Learning rates for Adam, by task. Of classifiers and regressions of text: no run measured with it ended at chance; of
# those at 3.6e-3 one of forty did, of those at 5e-3, often a little better, one of twenty. Of language models: in the
# middle of what was best on two texts.
_RATES = {"CAUSAL_LM": 2e-2, "SEQ_CLS": 2e-3}
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


# Parts of the names of modules that PEFT adds.
_OF_ADAPTERS = {"base_layer", "modules_to_save", "original_module"}


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
    n_nodes: int = RECOMMENDED_NODES,
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
        task_type: as in PEFT; None takes that of the model's class, and puts it into the configuration, so that the new
            head of a classifier is trained and saved.
        output_head: adapt the output head of a language model too. False for trainers that refuse adapters on
            `lm_head`, as those of TRL do; the norm before it stays adapted.
        final_norm: adapt the norm before the output head of a language model, too. Some architectures have none there.
        n_nodes: nodes of every mesh.
        options: further fields of `LRegConfig`.

    Returns:
        The configuration.

    Raises:
        ValueError: if the budget does not pay for one component anywhere or cannot be read, or the model has no
            linear layers that are known to lie inside it; the message says what to give.
        TypeError: for arguments of the wrong type.
    """
    whole("n_nodes", n_nodes, 2)
    if isinstance(model, PeftModel) or any(isinstance(module, LRegLayer) for module in model.modules()):
        raise ValueError("recommended_config wants the base model and got one with adapters: call it before these.")
    taken = {"target_modules", "weighting", "n_components", "component_pattern", "linear_term"} & options.keys()
    if taken:
        raise ValueError(f"recommended_config chooses {sorted(taken)} itself: leave them out, or write an LRegConfig.")
    task = task_type or task_of(model)
    fields = _recipe(model, task, budget, output_head=output_head, final_norm=final_norm, n_nodes=n_nodes)
    # PEFT trains the new head of a classifier because of the task type.
    known = {"task_type": task} if task in list(TaskType) else {}
    return LRegConfig(**{**known, **fields, **options})


def recommended_rate(config: LRegConfig) -> float | None:
    """The learning rate to try first with Adam; None for tasks and kinds of shortcuts that were not measured."""
    is_measured = config.weighting == "factored" and config.linear_term
    return _RATES.get(config.task_type or "") if is_measured else None


def fill_in(model: nn.Module, config: LRegConfig) -> None:
    """Give a configuration without `target_modules` what its preset has for a model; what was given stays.

    The recommended one has none for models without linear layers in repeated blocks, such as networks of convolutions:
    they get the placement of the paper.

    Raises:
        ValueError: if there is none for this model; the message lists module names that could be given.
    """
    if config.preset == "recommended" and _inside(model):
        task = config.task_type or task_of(model)
        fields = _recipe(model, task, None, n_nodes=config.n_nodes or RECOMMENDED_NODES, without=_left_out(config))
    else:
        fields = {"target_modules": paper_targets(model, config), "n_nodes": config.n_nodes or 2}
    for name, value in fields.items():
        if not config.is_given(name):
            setattr(config, name, value)


def _left_out(config: LRegConfig) -> Callable[[str], bool]:
    """Whether a configuration excludes a module, or trains it in full, by name."""
    expression, names = None, list(config.modules_to_save or [])
    if isinstance(config.exclude_modules, str):
        expression = config.exclude_modules
    else:
        names += config.exclude_modules or []

    def is_left_out(name: str) -> bool:
        matches = expression is not None and re.fullmatch(expression, name) is not None
        return matches or any(name == each or name.endswith(f".{each}") for each in names)

    return is_left_out


def _recipe(
    model: nn.Module,
    task: str | None,
    budget: int | str | None,
    *,
    output_head: bool = True,
    final_norm: bool = True,
    n_nodes: int,
    without: Callable[[str], bool] = lambda name: False,
) -> dict[str, Any]:
    """Fields of the configuration; `without` says which modules get none."""
    is_language_model = task in (*LANGUAGE_MODEL_TASKS, "MASKED_LM")
    head = output_head_name(model) if output_head and is_language_model else None
    sites = _sites(model, head, n_nodes)
    if final_norm and is_language_model and (norm := _final_norm(model)) is not None:
        sites.insert(
            0, _Site(norm, _cost(*_feature_sizes(model, norm), n_nodes), _LEAST_AT_THE_NORM, is_final_norm=True)
        )
    sites = [site for site in sites if not without(site.name)]
    _fill(sites, _parameters(model, budget), budget)
    chosen = [site for site in sites if site.components]
    names = [site.name for site in chosen]
    inside = [site for site in chosen if site.name != head]
    return {
        "target_modules": short_names(model, names),
        "weighting": "factored",
        "linear_term": True,
        "n_components": 1,
        "component_pattern": _pattern(inside),
        "n_nodes": n_nodes,
        "init_weights": "gradient",
        "base_width": _BASE_WIDTH,
        "profile_mean": _MEAN_INSIDE,
        "profile_mean_pattern": {re.escape(head): _MEAN_AT_THE_HEAD} if head in names else {},
    }


def _sites(model: nn.Module, head: str | None, n_nodes: int) -> list[_Site]:
    """The linear layers of the backbone, attention first, and the output head, which comes before all."""
    sites = [
        _Site(name, _cost(*sizes, n_nodes), 2 if _ATTENTION.search(name) else 1)
        for name, sizes in _inside(model).items()
    ]
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no linear layers in repeated blocks, so there is nothing to recommend: name "
            "modules in LRegConfig(target_modules=[...])."
        )
    if head is not None:
        sites.insert(0, _Site(head, _cost(*_feature_sizes(model, head), n_nodes), 1, is_output_head=True))
    return sites


def _base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that the model has without adapters, by the names that targets have."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module.get_base_layer()
        elif not any(part in _OF_ADAPTERS or part.startswith("lreg_") for part in name.split(".")):
            yield name, module


def _inside(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Sizes of the linear layers in repeated blocks of the backbone, whether adapted already or not, by name."""
    embedding, backbone = output_embedding(model), _backbone(model)
    found = {}
    for name, module in _base_modules(model):
        sizes = linear_sizes(module)
        if sizes is None or isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            continue
        if module is not embedding and name.startswith(backbone) and _is_repeated(name):
            found[name] = sizes
    return found


def _backbone(model: nn.Module) -> str:
    """What the names of the backbone's modules begin with."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and hasattr(model, prefix) else ""


def _final_norm(model: nn.Module) -> str | None:
    """The normalisation between the last layer and the output head; some architectures have none, or in the head."""
    found = None
    for name, module in _base_modules(model):
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


def _cost(in_features: int, out_features: int, n_nodes: int) -> int:
    """Parameters of one component."""
    return shortcut_parameters("factored", 1, n_nodes, in_features, out_features)


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
    embedding = output_embedding(model)
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
            f"{cheapest.name!r}, has {cheapest.cost:,}; give at least that."
        )
    if not any(site.components for site in inside):
        least = min(site.cost for site in inside)
        warnings.warn(
            f"budget={budget!r} ({parameters:,} parameters) pays for shortcuts at "
            f"{', '.join(repr(site.name) for site in sites if site.components)} and for none inside the network, where "
            f"the cheapest has {least:,}, and one everywhere takes {sum(site.cost for site in inside):,}.",
            UserWarning,
            stacklevel=4,
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
            if len(by_count) == 1 and count > 1 and after:
                pattern[rf"\d+\.{re.escape(after)}"] = count
            elif count > 1:
                names = re.escape(before), f"({'|'.join(numbers)})", re.escape(after)
                pattern[r"\.".join(name for name in names if name)] = count
    return pattern
