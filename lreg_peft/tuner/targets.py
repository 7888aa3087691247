"""Which modules a configuration adapts, and their feature sizes."""

import copy
import dataclasses
import difflib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..core.encoder import shortcut_parameters
from ..modules import unwrap
from .config import LRegConfig
from .example_run import raise_misfits, run_example
from .layer import LRegLayer
from .patterns import by_pattern
from .placement import check_task, nameable_modules, output_embedding
from .reading import check_same_reading, misfits, sizes_of_shortcut, source_of
from .recommend import fill_in, recommended_rate

# What PEFT adds to `modules_to_save` only after shortcuts are in place.
_TRAINED_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


@dataclass(frozen=True)
class Target:
    """One module that gets a shortcut."""

    name: str
    module_type: str
    in_features: int
    out_features: int
    n_components: int
    n_nodes: int
    trainable_parameters: int
    #: What reaches the shortcut and what leaves the module, if `inspect_targets` had example inputs.
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TargetReport:
    """The modules that a configuration matches; printing it gives a table.

    Attributes:
        targets: the modules.
        learning_rate: what to try first with Adam; None for tasks and kinds of shortcuts that were not measured.
    """

    targets: tuple[Target, ...]
    learning_rate: float | None = None

    @property
    def trainable_parameters(self) -> int:
        """Trainable parameters of all shortcuts together, `modules_to_save` not counted."""
        return sum(target.trainable_parameters for target in self.targets)

    def __iter__(self) -> Iterator[Target]:
        return iter(self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __str__(self) -> str:
        head: tuple[str, ...] = ("module", "type", "in", "out", "components", "n_nodes", "trainable")
        rows: list[tuple[str, ...]] = [
            (t.name, t.module_type)
            + tuple(
                f"{n:,}" for n in (t.in_features, t.out_features, t.n_components, t.n_nodes, t.trainable_parameters)
            )
            for t in self.targets
        ]
        rows.append(
            (f"{len(self)} module{'s' * (len(self) != 1)}", "", "", "", "", "", f"{self.trainable_parameters:,}")
        )
        if any(t.input_shape for t in self.targets):
            head += ("takes", "gives")
            shapes = [tuple(str(list(s)) if s else "" for s in (t.input_shape, t.output_shape)) for t in self.targets]
            rows = [row + shape for row, shape in zip(rows, [*shapes, ("", "")], strict=True)]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in [head, *rows]
        ]
        if self.learning_rate is not None:
            lines.append(f"learning rate to try first with Adam: {self.learning_rate:g}")
        return "\n".join(lines)


def inspect_targets(model: nn.Module, config: LRegConfig, example_inputs: Any = None) -> TargetReport:
    """Show what a configuration will adapt, before anything is wrapped.

    Neither `model` nor `config` is changed.

    Args:
        model: the base model, or a model that already carries adapters.
        config: as for `get_peft_model`.
        example_inputs: what the model is called with: a dictionary, a tuple, or a tensor. With these the model runs
            once, in eval mode and without gradients, and every module is compared with the tensors that reach and
            leave it, and must have a part in what the model returns; without them a module that cannot be adapted may
            show only when the adapted model runs.

    Returns:
        One entry per module, with feature sizes and trainable parameters, and a learning rate to try first where one
        was measured; `print` it for a table. With example inputs also the shapes that were seen.

    Raises:
        NoMatchingPeftModuleError: (a ValueError) if nothing matches.
        ValueError, TypeError: as `get_peft_model` would raise for this configuration; with example inputs one
            ValueError that names every module that does not fit, its shapes and what to change.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    config = copy.deepcopy(config)
    settle_targets(model, config)
    if example_inputs is None:
        return TargetReport(tuple(resolve_targets(model, config)), recommended_rate(config))
    modules = {}
    for path in _matched_names(model, config):
        module = model.get_submodule(path)
        modules[path] = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        _check_supported(path, modules[path])
    sources = {name: source for name in modules if (source := source_of(model, name, config))}
    seen = run_example(model, modules, sources, example_inputs)
    raise_misfits(misfits(model, config, modules, seen))
    return TargetReport(
        tuple(
            dataclasses.replace(target, input_shape=shapes[0], output_shape=shapes[1])
            for target in resolve_targets(model, config)
            for shapes in seen[target.name].shapes[:1]
        ),
        recommended_rate(config),
    )


def settle_targets(model: nn.Module, config: LRegConfig) -> None:
    """Write down what `config` adapts in `model`: its preset, or the names that "all-linear" stands for."""
    check_task(unwrap(model), config)
    if config.target_modules is None:
        fill_in(unwrap(model), config)
    _release_targeted_heads(unwrap(model), config)
    _expand_all_linear(model, config)


def resolve_targets(model: nn.Module, config: LRegConfig) -> list[Target]:
    """Match, size and check every module of `config`, whose `target_modules` is set; changes nothing."""
    paths = _matched_names(model, config)
    _warn_of_unmatched_keys(config, paths)
    targets = []
    for name in paths:
        module = model.get_submodule(name)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        _check_is_called(model, name)
        _check_supported(name, base)
        in_features, out_features = sizes_of_shortcut(model, name, base, config)
        check_same_reading(module, name, (in_features, out_features), source_of(model, name, config))
        n_components, n_nodes = mesh_size(name, config)
        width = in_features + _width_of_basis_below(name, module, config)
        count = shortcut_parameters(config.weighting, n_components, n_nodes, width, out_features)
        if not config.train_projection:
            count -= (width + 1) * n_components
        targets.append(Target(name, type(base).__name__, in_features, out_features, n_components, n_nodes, count))
    return targets


def mesh_size(name: str, config: LRegConfig) -> tuple[int, int]:
    """`(n_components, n_nodes)` of the module `name`, patterns considered."""
    return (
        by_pattern("component_pattern", name, config, config.n_components),
        by_pattern("node_pattern", name, config, config.n_nodes),
    )


def profile_mean(name: str, config: LRegConfig) -> float:
    """`profile_mean` of the module `name`, patterns considered."""
    return by_pattern("profile_mean_pattern", name, config, config.profile_mean)  # type: ignore[no-any-return]


def _width_of_basis_below(name: str, module: nn.Module, config: LRegConfig) -> int:
    """How many basis functions the encoder of a composed grade reads besides the features of the module."""
    if config.grade_form != "composed":
        return 0
    layer = module if isinstance(module, LRegLayer) else None
    below = layer and layer.grade_below(config)
    if layer is None or below is None:
        raise ValueError(
            f"a composed grade reads the basis of the grade before it, and none of {config.previous_grades} has a "
            f"shortcut around {name!r}. Load the previous grades first, under these names (load_grades does it), or "
            "give the grade target_modules of a previous one."
        )
    return layer.lreg_encoder[below].nodes.numel()  # type: ignore[union-attr,operator,return-value]


def _leave_out_uncalled(model: nn.Module, names: list[str]) -> list[str]:
    """Take the linear layers that torch never calls out of what "all-linear" stands for, and say so."""
    uncalled = [name for name in names if _is_never_called(model, name)]
    if uncalled:
        warnings.warn(
            f"'all-linear' leaves out {', '.join(map(repr, uncalled))}: nn.MultiheadAttention reads their weights and "
            "never calls them. A shortcut can go around the attention module itself.",
            UserWarning,
            stacklevel=2,
        )
    return [name for name in names if name not in uncalled]


def _is_never_called(model: nn.Module, name: str) -> bool:
    """Whether `name` is the output projection of torch's attention, of which only the weight is used."""
    parent, _, child = name.rpartition(".")
    attention = model.get_submodule(parent)
    attention = attention.get_base_layer() if isinstance(attention, BaseTunerLayer) else attention
    return child == "out_proj" and isinstance(attention, nn.MultiheadAttention)


def _check_is_called(model: nn.Module, name: str) -> None:
    if _is_never_called(model, name):
        raise ValueError(
            f"{name!r} belongs to an nn.MultiheadAttention, which reads its weight and never calls it, so that a "
            f"shortcut there would have no part in anything. Target {name.rpartition('.')[0]!r}, the attention itself."
        )


def _check_supported(name: str, module: nn.Module) -> None:
    kind = type(module)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        raise TypeError(
            f"{name!r} is an embedding: its input is token ids, and a shortcut needs real-valued features. Train rows "
            "of it by LRegConfig(trainable_token_indices=[...]) or all of it by modules_to_save, or target a linear "
            "layer or a block."
        )
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
        raise TypeError(f"{name!r} is a {kind.__name__}, which is never called. Target its members instead.")
    if kind in (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d) and not (
        module.weight.is_floating_point()  # type: ignore[union-attr,operator]
    ):
        raise TypeError(
            f"{name!r} has weights of {module.weight.dtype}: a shortcut is added to floating-point outputs. "  # type: ignore[union-attr]
            "Convert the model to a floating dtype, or load it with a quantisation that Transformers supports."
        )


def _release_targeted_heads(model: nn.Module, config: LRegConfig) -> None:
    """Take heads that are targets out of `modules_to_save`.

    For classification PEFT adds its head names to `modules_to_save` unasked. A head that is named as a target keeps
    its weights and gets a shortcut instead, with a warning, since a new head would be lost (a contradiction in the
    user's own words was refused by the config).
    """
    if not config.modules_to_save or config.target_modules is None:
        return
    unguarded = copy.copy(config)
    unguarded.modules_to_save = None
    kept = [name for name in config.modules_to_save if not check_target_module_exists(unguarded, name)]
    released = [name for name in config.modules_to_save if name not in kept and hasattr(model, name)]
    if released and not config.inference_mode:
        warnings.warn(
            f"{released[0]!r} is in target_modules: it gets a shortcut, and its own weights are neither trained nor "
            "saved, as those of a head otherwise are. If it is newly drawn, take it out of target_modules.",
            stacklevel=2,
        )
    config.modules_to_save = kept or None


def is_target(config: LRegConfig, path: str) -> Any:
    """Whether the module at `path` is one that `config`, with "all-linear" expanded, adapts: truthy if so."""
    return check_target_module_exists(config, path)


def _expand_all_linear(model: nn.Module, config: LRegConfig) -> None:
    """Replace "all-linear" by the names it stands for, as PEFT would, but only of modules that are adapted.

    PEFT also writes down the names in `modules_to_save` and in `exclude_modules`, which it then passes over.
    """
    if not isinstance(config.target_modules, str) or config.target_modules.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    model = unwrap(model)  # output heads are told by the class of the model
    _maybe_include_all_linear_layers(config, model)
    # PEFT leaves the output head out, but not heads that it trains in full later.
    heads = {name for name, module in model.named_modules() if module is output_embedding(model)}
    trained = _TRAINED_HEADS.get(config.task_type or "", ())
    config.target_modules = [
        name for name in sorted(config.target_modules) if name not in heads and not name.endswith(trained)
    ]
    names = [name for name in config.target_modules if check_target_module_exists(config, name)]
    config.target_modules = _leave_out_uncalled(model, names)


def _matched_names(model: nn.Module, config: LRegConfig) -> list[str]:
    inside = [name + "." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    matched = [name for name, _ in model.named_modules() if name and is_target(config, name)]
    names = [name for name in matched if not name.startswith(tuple(inside))]
    if names:
        return names
    hidden = [name for name in matched if name.startswith(tuple(inside))]
    if hidden:
        raise NoMatchingPeftModuleError(
            f"{hidden[0]!r} lies inside a block that already carries a shortcut, where PEFT cannot add one. Add the "
            "adapter of the inner module first, or put both into one configuration."
        )
    raise NoMatchingPeftModuleError(
        f"Target modules {config.target_modules} not found in the base model"
        + (f" outside exclude_modules={config.exclude_modules}" if config.exclude_modules else "")
        + (f" in layers {config.layers_to_transform}" if config.layers_to_transform is not None else "")
        + f". {_suggestion(model, config)}"
    )


def _suggestion(model: nn.Module, config: LRegConfig) -> str:
    there = nameable_modules(model, limit=1000)
    wanted = config.target_modules if isinstance(config.target_modules, list) else []
    close = [m for name in wanted for m in difflib.get_close_matches(name, there, n=2) if m not in wanted]
    hint = f"Did you mean {', '.join(map(repr, dict.fromkeys(close)))}? " if close else ""
    return f"{hint}The model has for example: {', '.join(there[:12])}."


def _warn_of_unmatched_keys(config: LRegConfig, names: list[str]) -> None:
    """Warn of every entry of the configuration that has no effect, which PEFT would pass over in silence."""
    if isinstance(config.target_modules, list):
        idle = [t for t in config.target_modules if not any(n == t or n.endswith(f".{t}") for n in names)]
        if idle:
            warnings.warn(f"target_modules {idle} match no module and have no effect.", stacklevel=2)
    for option in (
        "component_pattern",
        "node_pattern",
        "profile_mean_pattern",
        "feature_sizes",
        "feature_source",
        "layout",
        "readout",
    ):
        value = getattr(config, option)
        idle = [
            key
            for key in (value if isinstance(value, dict) else ())
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in names)
        ]
        if idle:
            warnings.warn(
                f"{option} keys {idle} match no adapted module and have no effect.", UserWarning, stacklevel=2
            )
