"""The tuner: puts shortcuts into a model."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.mesh import spread_rounded
from ..modules import unwrap
from .combine import combined_config, rescale_shortcuts, write_sum
from .config import DATA_STARTS, LRegConfig
from .hooks import backbone, head_loss, native_transformer, output_head, reminder, spans
from .hooks.registry import release_all
from .layer import MERGE_REFUSED, LRegLayer, check_saved_nodes, wrap
from .model_card import TAG
from .names import check_adapter_name, plain_name
from .reading import reading_of, sizes_of_shortcut, source_of
from .source import FeatureSource
from .targets import (
    is_target,
    mesh_size,
    profile_mean,
    resolve_targets,
    settle_targets,
)
from .transaction import all_or_nothing

_PREFIX = "base_model.model."

# A parameter's name in the model, adapter name removed.
_WEIGHT_KEY = re.compile(r"(\.lreg_[a-z_]+)\.weight$")


class LRegModel(BaseTuner):
    """A model with LReg shortcuts; made by `get_peft_model(model, LRegConfig(...))`.

    Args:
        model: the base model; any `torch.nn.Module`.
        config: an `LRegConfig`, or a dictionary of them by adapter name.
        adapter_name: name of the adapter to inject.
    """

    prefix: str = "lreg_"
    tuner_layer_cls = LRegLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (defaults depend on the task, see targets.py)

    # Injection

    def _prepare_adapter_config(self, peft_config: LRegConfig, model_config: dict[str, Any]) -> LRegConfig:
        settle_targets(self.model, peft_config)
        if peft_config.previous_grades:
            # For classification PEFT adds its head names unasked. A grade stands on the head of the grades before it.
            peft_config.modules_to_save = None
        return peft_config

    def _prepare_model(self, peft_config: LRegConfig, model: nn.Module) -> None:
        resolve_targets(model, peft_config)  # raises before anything is wrapped

    def _check_tied_modules(self, model: nn.Module, peft_config: LRegConfig) -> None:
        """Nothing to warn of: a shortcut leaves the tied weight alone, and cannot be merged into it."""

    @staticmethod
    def _check_target_module_exists(peft_config: LRegConfig, key: str) -> Any:
        return is_target(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: LRegConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        current_key = plain_name(current_key)
        layer = target
        if not isinstance(layer, LRegLayer) or not layer.lreg_nodes.keys():
            base = layer.get_base_layer() if isinstance(layer, LRegLayer) else target
            sizes = sizes_of_shortcut(self.model, current_key, base, peft_config)
            source = source_of(self.model, current_key, peft_config)
            if not isinstance(layer, LRegLayer):
                layer = wrap(target, *sizes, linear=_is_linear(target))
            layer.in_features, layer.out_features = sizes
            layer.source = FeatureSource(source, current_key, self.model) if source else None
            self._replace_module(parent, target_name, layer, target)
        n_components, dof = mesh_size(current_key, peft_config)
        layer.update_layer(
            adapter_name,
            n_components,
            dof,
            config=peft_config,
            inference_mode=peft_config.inference_mode,
            profile_mean=profile_mean(current_key, peft_config),
            nodes=self._nodes_of_the_same(layer, adapter_name, peft_config),
            reading=reading_of(current_key, peft_config),
        )
        if next(layer.base_layer.parameters(), None) is None:  # a module without parameters goes with the model
            layer._move_adapter_to_device_of_base_layer(adapter_name, like=next(self.model.parameters(), None))

    def _nodes_of_the_same(self, layer: LRegLayer, adapter_name: str, config: LRegConfig) -> Tensor | None:
        """The mesh of an adapter with this very configuration, if there is one.

        Trainers with a reference policy add a second adapter with the first one's configuration and copy the parameters
        by name. Meshes are buffers; unless the new one begins on the same, the copy would be another function.
        """
        for name, other in self.peft_config.items():
            if name != adapter_name and name in layer.lreg_nodes and other == config:
                return layer.lreg_nodes[name]
        return None

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Not PEFT's version: that one assigns `weight` and `bias`, which a whole block does not have. The adapter
        # goes to its device when it is added.
        setattr(parent, child_name, new_module)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT, then adjust what a wrapped output head, a frozen backbone and a stack of grades ask for."""
        try:
            check_adapter_name(adapter_name, self.peft_config[adapter_name].modules_to_save or ())
            self._check_grade(adapter_name)
            with all_or_nothing(model):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                self._record_grades()
                inner = unwrap(model)  # what compiles is this model, and so are its hooks
                backbone.install(inner)
                output_head.install(inner)
                head_loss.install(inner)
                native_transformer.install(inner)
                spans.install(inner)
                if self.peft_config[adapter_name].init_weights in DATA_STARTS:
                    reminder.install(inner)
                if hasattr(inner, "add_model_tags"):
                    inner.add_model_tags([TAG])  # type: ignore[operator]
        except BaseException:
            if not hasattr(model, "peft_config") and getattr(model, "_hf_peft_config_loaded", False):
                model._hf_peft_config_loaded = False  # type: ignore[assignment]  # transformers sets it before it tries
            raise

    # Training

    def train(self, mode: bool = True) -> "LRegModel":
        """As `nn.Module.train`; with `backbone_eval` the frozen model stays in eval mode."""
        super().train(mode)
        if mode and any(self.peft_config[name].backbone_eval for name in self.active_adapters):
            backbone.hold_in_eval(self.model)
        return self

    # Grades

    def _check_grade(self, adapter_name: str) -> None:
        config = self.peft_config[adapter_name]
        if adapter_name in config.previous_grades:
            raise ValueError(
                f"the adapter is a grade that stands on {config.previous_grades}, so it cannot be called "
                f"{adapter_name!r} itself. load_grades(model, path) loads all grades under their own names."
            )
        absent = [name for name in config.previous_grades if name not in self.peft_config]
        if absent and config.grade_form == "additive":  # a composed grade is refused when its targets are resolved
            warnings.warn(
                f"the adapter {adapter_name!r} was trained on top of {absent}, which the model does not have: its "
                "output is what this grade adds, and no more. load_grades(model, path) loads all grades.",
                UserWarning,
                stacklevel=2,
            )

    def _record_grades(self) -> None:
        """Tell every layer which adapters stand on which, also of adapters that do not cover it."""
        stacks = {
            name: tuple(grade for grade in config.previous_grades if grade in self.peft_config)
            for name, config in self.peft_config.items()
            if getattr(config, "previous_grades", None)
        }
        for layer in self.model.modules():
            if isinstance(layer, LRegLayer):
                layer.previous_grades = dict(stacks)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT. Activating a grade adds the shortcuts of the grades it stands on, which stay frozen."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for module in self.model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper) and not module.active_adapters:
                # What an earlier grade trained in full stays in place, frozen.
                for owner in {self._owner(module, name) for name in self.active_adapters} & module._adapters:
                    module.set_adapter(owner, inference_mode=True)

    def _owner(self, module: AuxiliaryTrainingWrapper, adapter_name: str) -> str:
        """Whose copy of a module in `modules_to_save` belongs to an adapter: its own or that of a grade below."""
        config = self.peft_config.get(adapter_name)
        stack = [*config.previous_grades, adapter_name] if config else []
        return next((name for name in reversed(stack) if name in module._adapters), adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT; the last of a stack of grades can be deleted, and the one before it becomes active.

        Raises:
            ValueError: if another grade stands on this adapter.
        """
        above = [name for name, config in self.peft_config.items() if adapter_name in config.previous_grades]
        if above:
            raise ValueError(f"the grade {above[0]!r} stands on {adapter_name!r}: delete {above[0]!r} first.")
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        if was_active and self.active_adapters:
            self.set_adapter(self.active_adapters)  # modules_to_save of the grade below train again

    # Sums of adapters

    rescale_shortcuts = staticmethod(rescale_shortcuts)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        **options: Any,
    ) -> None:
        """Add the weighted sum of adapters as a new adapter; it is exact, and not active until `set_adapter`.

        Args:
            adapters: names of adapters with the same head, and the same dof in every module.
            weights: one per adapter.
            adapter_name: of the new one.
            combination_type: "cat": the components of all adapters side by side. "linear": no more components than
                one adapter has, for adapters with the same projections and meshes.
            options: those of LoRA's method, which work on low-rank matrices: refused.

        Raises:
            ValueError: if they cannot be combined, with the reason; the model is then as it was.
        """
        if options:
            raise ValueError(
                f"{sorted(options)} work on the low-rank matrices of LoRA, and a sum of shortcuts is exact without: "
                "leave them out."
            )
        if adapter_name in self.peft_config:
            raise ValueError(f"there is an adapter {adapter_name!r} already: give the sum another name.")
        config = combined_config(self.model, self.peft_config, adapters, weights, combination_type)
        with all_or_nothing(self):
            self.peft_config[adapter_name] = config
            self.inject_adapter(self.model, adapter_name)
            write_sum(self.model, adapter_name, adapters, weights, combination_type)
            for layer in self.model.modules():
                if isinstance(layer, LRegLayer) and adapter_name in layer.lreg_nodes:
                    for weight in layer.weights(adapter_name).values():
                        weight.requires_grad_(False)

    # Inference with one adapter per sample

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names works in eval mode only: call model.eval() first.")
        known = {"__base__", *self.peft_config}
        if unknown := sorted(set(names) - known):
            raise ValueError(f"adapter_names {unknown} do not exist. There are: {sorted(known)}.")
        layers = [module for module in self.modules() if isinstance(module, LRegLayer)]
        handles = [
            module.register_forward_pre_hook(
                _AddAdapterNames([self._owner(module, name) for name in names]), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, AuxiliaryTrainingWrapper)
        ]
        try:
            for layer in layers:
                layer.batch_adapter_names = names
            yield
        finally:
            for layer in layers:
                layer.batch_adapter_names = None
            for handle in handles:
                handle.remove()

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(MERGE_REFUSED)

    def unload(self) -> nn.Module:
        """Remove every adapter and return the base model as it was."""
        model = self.model
        release_all(unwrap(model))
        for name, layer in reversed(list(model.named_modules())):  # PEFT does not look for layers inside layers
            if isinstance(layer, LRegLayer):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, layer.base_layer)
        super().unload()
        output_head.restore_tied_keys(unwrap(model))
        return model

    # Saving and loading

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """As in PEFT, by plain names and without the `.weight` of parameters: files keep the keys they always had."""
        return plain_name(_WEIGHT_KEY.sub(r"\1", super()._remove_adapter_name_from_key(key, adapter_name)))

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: LRegConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """As in PEFT, but right where other adapters are called like modules: all of this one's, and none of theirs."""
        saved = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if any(f".{name}." in f"{path}." for name in unwanted_adapter_names for path, _ in model.named_modules()):
            for path, module in model.named_modules():
                if isinstance(module, LRegLayer):
                    for key, value in module.own_state(adapter_name).items():
                        saved.setdefault(f"{path}.{key}", value)
                    for name in unwanted_adapter_names:
                        for key in module.own_state(name):
                            saved.pop(f"{path}.{key}", None)
        return saved

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LRegConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        own = model.state_dict()
        state_dict = {key if key in own else plain_name(key): value for key, value in state_dict.items()}
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        compiled = {plain_name(key): key for key in own if plain_name(key) != key}
        remapped = {compiled.get(key, key): value for key, value in remapped.items()}  # a saved embedding, say
        spread = _meshes_apart(remapped)
        remapped.update(spread)
        _check_saved_adapter(model, adapter_name, remapped)
        if spread:
            _say_that_meshes_were_spread(list(spread))
        for module in model.modules():
            if isinstance(module, LRegLayer):
                module.start_is_owed.discard(adapter_name)  # the file brings projection and mesh
        return remapped


class _AddAdapterNames:
    """Forward pre-hook that passes `adapter_names` on to PEFT's `modules_to_save` wrappers."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": self.names}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) or "Linear" in type(module).__name__


def _meshes_apart(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The meshes of a file cast to half precision in which neighbouring nodes have become equal, repaired."""
    collided = {
        key: nodes
        for key, nodes in state_dict.items()
        if ".lreg_nodes" in key and nodes.ndim == 2 and bool((nodes.diff(dim=1) == 0).any())
    }
    spread = {key: spread_rounded(nodes) for key, nodes in collided.items()}
    return {key: nodes for key, nodes in spread.items() if nodes is not None}


def _say_that_meshes_were_spread(names: list[str]) -> None:
    warnings.warn(
        f"{len(names)} meshes of the adapter file, the first is {names[0]!r}, have equal neighbouring nodes, as a cast "
        "to bfloat16 or float16 leaves them. They were spread apart, so that the adapter is close to the one that was "
        "trained, not equal. Save lreg_nodes in float32.",
        UserWarning,
        stacklevel=2,
    )


def _check_saved_adapter(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Refuse a file that does not fit or is damaged, before any of it reaches the model; drop what changes nothing."""
    saved = {key.removeprefix(_PREFIX): key for key in state_dict}
    state = {key.removeprefix(_PREFIX): value for key, value in model.state_dict().items()}
    missing = []
    for key, own in state.items():
        path, _, owner = key.removesuffix(".weight").rpartition(".")
        if owner != adapter_name or not path.rpartition(".")[2].startswith(LRegModel.prefix):
            continue
        if key not in saved:
            missing.append(path)
            continue
        value = state_dict[saved.pop(key)]
        _check_values(path, value, own)
        if value.shape != own.shape and own.numel():  # a parameter that is partitioned over processes looks empty
            raise ValueError(
                f"size mismatch for {path}: the model and the configuration ask for {tuple(own.shape)}, the adapter "
                f"file holds {tuple(value.shape)}. It was saved for another model or another configuration."
            )
        if path.endswith("lreg_nodes"):
            check_saved_nodes(path, value.to(own.dtype))
    if missing:
        raise ValueError(
            f"the adapter file lacks {len(missing)} tensors of this configuration, the first is {missing[0]!r}. "
            "It was saved for other target modules or is damaged."
        )
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for key in module.adapter_state_dict_load_map(adapter_name).values():
                full = f"{name}.{key}".removeprefix(_PREFIX)
                if full in saved:
                    _check_values(full, state_dict[saved.pop(full)], state[full])
    _check_the_rest(model, saved, state, state_dict)


def _check_values(name: str, value: Tensor, own: Tensor) -> None:
    if (not value.is_floating_point() and own.is_floating_point()) or not torch.isfinite(value).all():
        raise ValueError(f"the adapter file is damaged: {name} holds values that are not finite numbers.")
    if own.is_floating_point() and not torch.isfinite(value.to(own.dtype)).all():
        raise ValueError(
            f"{name} of the adapter file reaches {float(value.abs().max()):.4g}, and {own.dtype}, its dtype in the "
            f"model, ends at {torch.finfo(own.dtype).max:.4g}. Load it into a model of a wider dtype, or mend the file."
        )


def _check_the_rest(
    model: nn.Module, saved: dict[str, str], state: dict[str, Tensor], state_dict: dict[str, Tensor]
) -> None:
    """Refuse what is not of this adapter: it would change the base model, with every other adapter on it, or be lost.

    PEFT writes the embeddings next to an adapter if the vocabulary was enlarged. As far as the base model has them
    already they are let go; rows that stand behind all of those are new, and taken.
    """
    embeddings = _embeddings(model)
    for name, key in saved.items():
        value = state_dict[key]
        own = state.get(name)
        if own is None:
            raise ValueError(
                f"the adapter file holds {len(saved)} tensors that the configuration does not ask for, the first is "
                f"{name!r}, which would be lost. It was saved with another configuration or for another model."
            )
        same = own.shape == value.shape and not own.is_meta
        if same and torch.equal(own, value.to(own)):
            del state_dict[key]
        elif not (same and own.data_ptr() in embeddings and _only_new_rows(own, value.to(own))):
            raise ValueError(
                f"the adapter file holds {name!r}, a weight of the base model, with other values than the model has: "
                "loading it would change the base model and every other adapter on it. Take it out of the file; what "
                "is to be trained in full and saved with an adapter belongs into modules_to_save."
            )


def _embeddings(model: nn.Module) -> set[int]:
    """Where the weights of the input and output embeddings lie."""
    found = set()
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, get)()
        except (AttributeError, NotImplementedError):
            continue
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            found.add(weight.data_ptr())
    return found


def _only_new_rows(own: Tensor, value: Tensor) -> bool:
    differ = (own != value).flatten(1).any(dim=1) if own.ndim > 1 else own != value
    first = int(differ.int().argmax())
    return first > 0 and bool(differ[first:].all())
