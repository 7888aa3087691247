"""The tuner: puts shortcuts into a model."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..modules import unwrap
from .combine import combined_config, write_sum
from .config import LRegConfig
from .hooks import frozen_norms, fused_loss, native_transformer, output_head, release, reminder, spans
from .layer import MERGE_REFUSED, LRegLayer, LRegLinear, this_thread
from .loading import before_loading, before_loading_model, convert_keys
from .model_card import TAG
from .reading import reading_of, sizes_of_shortcut, source_of
from .source import FeatureSource
from .targets import is_target, mesh_size, profile_mean, resolve_targets, settle_targets

logger = logging.get_logger(__name__)


class LRegModel(BaseTuner):
    """A model with LReg shortcuts; made by `get_peft_model(model, LRegConfig(...))`.

    Called as every tuner of PEFT, with the base model (any `torch.nn.Module`), an `LRegConfig` (or a dictionary of them
    by adapter name) and the name of the adapter to inject.
    """

    prefix: str = "lreg_"
    tuner_layer_cls = LRegLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (defaults depend on the task, see targets.py)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(before_loading_model)

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
        if isinstance(target, LRegLayer) and not target.lreg_encoder:  # nothing of earlier adapters is left
            if target.source is not None:
                spans.remove(self.model, target.source)
            target = target.base_layer
        layer = target
        if not isinstance(layer, LRegLayer):
            sizes = sizes_of_shortcut(self.model, current_key, target, peft_config)
            source = source_of(self.model, current_key, peft_config)
            is_linear = isinstance(target, (nn.Linear, Conv1D)) or "Linear" in type(target).__name__
            layer = (LRegLinear if is_linear else LRegLayer)(target, *sizes)
            layer.source = FeatureSource(source, current_key) if source else None
            layer.register_load_state_dict_pre_hook(before_loading)
            self._replace_module(parent, target_name, layer, target)
        n_components, n_nodes = mesh_size(current_key, peft_config)
        layer.update_layer(
            adapter_name,
            n_components,
            n_nodes,
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
            if name != adapter_name and name in layer.lreg_encoder and other == config:
                return layer.lreg_encoder[name].nodes  # type: ignore[union-attr,return-value]
        return None

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Not PEFT's version: that one assigns `weight` and `bias`, which a whole block does not have. The adapter
        # goes to its device when it is added.
        while isinstance(parent, LRegLayer) and child_name not in parent._modules:  # a block that got a shortcut before
            parent = parent.base_layer
        setattr(parent, child_name, new_module)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT, then install what a wrapped output layer, frozen norms and a stack of grades ask for."""
        self._check_grade(adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._record_grades()
        inner = unwrap(model)  # what compiles is this model, and so are its hooks
        frozen_norms.install(inner)
        output_head.install(inner)
        if self.peft_config[adapter_name].fused_loss:
            fused_loss.install(inner)
        native_transformer.install(inner)
        spans.install(inner)
        reminder.install(inner, adapter_name)
        if hasattr(inner, "add_model_tags"):
            inner.add_model_tags([TAG])  # type: ignore[operator]

    # Training

    def train(self, mode: bool = True) -> "LRegModel":
        """As `nn.Module.train`; with `backbone_eval` the frozen model goes into eval mode."""
        super().train(mode)
        if mode and any(self.peft_config[name].backbone_eval for name in self.active_adapters):
            _put_base_in_eval(self.model)
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
            adapters: names of adapters with the same weighting, and the same n_nodes in every module.
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
        self.peft_config[adapter_name] = combined_config(
            self.model, self.peft_config, adapters, weights, combination_type
        )
        self.inject_adapter(self.model, adapter_name)
        write_sum(self.model, adapter_name, adapters, weights, combination_type)
        for layer in self.model.modules():
            if isinstance(layer, LRegLayer):
                layer.set_requires_grad(adapter_name, False)

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
        handles = [
            module.register_forward_pre_hook(
                _AddAdapterNames(names, [self._owner(module, name) for name in names]), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, AuxiliaryTrainingWrapper)
        ]
        outer, this_thread.adapter_names = this_thread.adapter_names, names
        try:
            yield
        finally:
            this_thread.adapter_names = outer
            for handle in handles:
                handle.remove()

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(MERGE_REFUSED)

    def unload(self) -> nn.Module:
        """Remove every adapter and return the base model as it was."""
        model = self.model
        inner = unwrap(model)
        output_head.release(inner)
        native_transformer.release(inner)
        release(inner)
        for name, layer in reversed(list(model.named_modules())):  # PEFT does not look for layers inside layers
            if isinstance(layer, LRegLayer):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, layer.base_layer)
        super().unload()
        output_head.restore_tied_keys(inner)
        return model

    # Saving and loading

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: LRegConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """As in PEFT; nodes that a `state_dict` of what trains lacks come from the model."""
        saved = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        for name, layer in model.named_modules():
            if isinstance(layer, LRegLayer) and adapter_name in layer.lreg_encoder:
                path = name.removeprefix("_fsdp_wrapped_module.")
                if f"{path}.lreg_projection.{adapter_name}.weight" in saved:
                    nodes: Any = layer.lreg_encoder[adapter_name].nodes
                    saved.setdefault(f"{path}.lreg_encoder.{adapter_name}.nodes", nodes.detach())
        return saved

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LRegConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As in PEFT, also for files of earlier versions."""
        state_dict = dict(state_dict)
        convert_keys(state_dict)
        for module in model.modules():
            if isinstance(module, LRegLayer):
                module.needs_data_init.discard(adapter_name)  # the file brings projection and mesh
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


class _AddAdapterNames:
    """Forward pre-hook that passes `adapter_names` on to PEFT's `modules_to_save` wrappers, in the thread it is for."""

    def __init__(self, names: list[str], owners: list[str]) -> None:
        self.names, self.owners = names, owners

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if this_thread.adapter_names is self.names:
            kwargs = {**kwargs, "adapter_names": self.owners}
        return args, kwargs


def _put_base_in_eval(model: nn.Module) -> None:
    """Eval mode for all modules but adapters, `modules_to_save` and what is in these."""
    checkpointed = False
    pending = [model]
    while pending:
        module = pending.pop()
        if isinstance(module, AuxiliaryTrainingWrapper):
            continue
        if isinstance(module, BaseTunerLayer):
            pending.append(module.base_layer)
            continue
        module.training = False
        checkpointed = checkpointed or bool(module.__dict__.get("gradient_checkpointing", False))
        pending.extend(module.children())
    if checkpointed:
        logger.warning_once(
            "backbone_eval=True puts the frozen model into eval mode, in which Transformers' models do not checkpoint: "
            "gradient checkpointing has no effect. Leave backbone_eval out to save memory with it."
        )
