"""Makes PEFT know the method LREG. The only file that touches PEFT's private tables.

PEFT keeps its methods in the str-enum `PeftType` and has no plugin discovery, so importing this package has to add a
member. PEFT is not imported at module level: `add_enum_member` is plain Python and is tested on every interpreter.
"""

import functools
import os
import re
from enum import Enum
from typing import Any

METHOD = "lreg"
_ORIGINAL = "_before_lreg_peft"
_OWN_PACKAGE = __name__.partition(".")[0]


def add_enum_member(enum_class: type[Enum], name: str) -> Enum:
    """Add the member `name = "name"` to a str-enum whose members equal their names, or return the one it has.

    The member behaves like one from the class body: lookup by name, value and attribute, iteration, pickle, deepcopy
    and JSON. Works on CPython 3.11 to 3.14.
    """
    if name in enum_class.__members__:
        return enum_class[name]
    member = str.__new__(enum_class, name)  # type: ignore[type-var]
    member._name_ = name
    member._value_ = name
    member.__objclass__ = enum_class  # type: ignore[attr-defined]
    member._sort_order_ = len(enum_class._member_names_)  # type: ignore[attr-defined]
    # From 3.12 on members are found as class attributes. EnumType refuses to set those, so its __setattr__ is bypassed.
    type.__setattr__(enum_class, name, member)
    enum_class._member_names_.append(name)
    enum_class._member_map_[name] = member
    enum_class._value2member_map_[name] = member
    return member


def upstream_has_lreg() -> bool:
    """Whether PEFT itself (not this package) provides a method called LREG."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import PeftType

    if METHOD.upper() not in PeftType.__members__:
        return False
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[METHOD.upper()])
    return config_class is not None and config_class.__module__.partition(".")[0] != _OWN_PACKAGE


def register(config_class: type, model_class: type) -> bool:
    """Register LReg with PEFT; safe to call again, also after this package was re-imported.

    Returns:
        False, after a warning, if PEFT has an LREG of its own: that one is left in place.
    """
    import warnings

    from peft import mapping
    from peft.utils import register_peft_method
    from peft.utils.peft_types import PeftType

    if upstream_has_lreg():
        warnings.warn(
            "This version of PEFT ships its own LREG method, which lreg_peft leaves in place: "
            "use peft.LRegConfig, or an earlier PEFT together with lreg_peft.",
            UserWarning,
            stacklevel=3,
        )
        return False
    peft_type = add_enum_member(PeftType, METHOD.upper())
    # A second import of this package made new classes: PEFT must not go on with the old ones.
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING.pop(peft_type, None)
    mapping.PEFT_TYPE_TO_TUNER_MAPPING.pop(peft_type, None)
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING.pop(peft_type, None)
    register_peft_method(name=METHOD, config_cls=config_class, model_cls=model_class)
    _extend_model_cards(peft_type)
    _extend_loading(peft_type)
    _extend_weights(peft_type)
    _extend_native_loading(peft_type)
    _extend_scaling(model_class)
    return True


def _extend_model_cards(peft_type: Any) -> None:
    """Have PEFT's model cards say how to load an LReg adapter; cards of other methods stay as they are.

    A tuner has no hook for the card: `save_pretrained` writes it before the tuner's turn, and `push_to_hub` replaces
    that one by a card of its own that names neither the method nor the base model.
    """
    from peft import PeftModel

    from .model_card import add_usage_to_card, push_model_card

    def is_ours(model: Any) -> bool:
        return any(config.peft_type == peft_type for config in model.peft_config.values())

    write_card = _original(PeftModel.create_or_update_model_card)
    push = _original(PeftModel.push_to_hub)

    @functools.wraps(write_card)
    def create_or_update_model_card(self: Any, output_dir: str) -> None:
        write_card(self, output_dir)
        if is_ours(self):
            add_usage_to_card(os.path.join(output_dir, "README.md"), self)

    @functools.wraps(push)
    def push_to_hub(self: Any, repo_id: str, **kwargs: Any) -> Any:
        commit = push(self, repo_id, **kwargs)
        if is_ours(self):
            revision = getattr(commit, "pr_revision", None) or kwargs.get("revision")
            push_model_card(self, repo_id, token=kwargs.get("token"), revision=revision)
        return commit

    for replacement, original in ((create_or_update_model_card, write_card), (push_to_hub, push)):
        setattr(replacement, _ORIGINAL, original)
        setattr(PeftModel, replacement.__name__, replacement)


def _extend_loading(peft_type: Any) -> None:
    """Have PEFT give a model back as it was if loading fails: it adds an adapter before it reads the file.

    And have it find the file of a grade: `Trainer` asks for the best weights of any adapter in the root of a
    checkpoint, where those of "default" are.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    from .transaction import all_or_nothing

    load = _original(PeftModel.load_adapter)
    open_ = _original(PeftModel.from_pretrained.__func__)

    @functools.wraps(load)
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        is_new = adapter_name not in self.peft_config
        if not is_new and getattr(self.peft_config[adapter_name], "previous_grades", None):
            own = os.path.join(str(model_id), adapter_name)
            model_id = own if os.path.isdir(own) else model_id
        replaced = [value for key, value in self.state_dict().items() if not is_new and adapter_name in key.split(".")]
        try:
            with all_or_nothing(self, replaced):
                return load(self, model_id, adapter_name, *args, **kwargs)
        except Exception as error:
            config = self.peft_config.get(adapter_name)
            if isinstance(error, SafetensorError) and (config is None or config.peft_type == peft_type):
                raise ValueError(
                    f"the adapter file in {model_id!r} is damaged or incomplete ({error}). Copy or download it again."
                ) from error
            raise

    @functools.wraps(open_)
    def from_pretrained(cls: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        with all_or_nothing(model):
            return open_(cls, model, *args, **kwargs)

    setattr(load_adapter, _ORIGINAL, load)
    setattr(from_pretrained, _ORIGINAL, open_)
    PeftModel.load_adapter = load_adapter
    PeftModel.from_pretrained = classmethod(from_pretrained)


def _extend_weights(peft_type: Any) -> None:
    """Have PEFT find the weights of `modules_to_save` in a model with `torch.compile` inside.

    The tuner is asked for its names only after these were looked up under the names that the compiled model has.
    """
    import peft
    from peft import functional, peft_model, utils
    from peft.utils import save_and_load

    from .names import restore_compiled_names

    load = _original(save_and_load.set_peft_model_state_dict)

    @functools.wraps(load)
    def set_peft_model_state_dict(
        model: Any, peft_model_state_dict: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        if model.peft_config[adapter_name].peft_type == peft_type:
            peft_model_state_dict = restore_compiled_names(model, peft_model_state_dict, adapter_name)
        return load(model, peft_model_state_dict, adapter_name, *args, **kwargs)

    setattr(set_peft_model_state_dict, _ORIGINAL, load)
    for place in (peft, functional, peft_model, utils, save_and_load):
        place.set_peft_model_state_dict = set_peft_model_state_dict


def _extend_native_loading(peft_type: Any) -> None:
    """Have transformers' own `load_adapter`, which renames keys by PEFT's rules, find `<weight>.<adapter>.weight`."""
    from peft.utils import transformers_weight_conversion as conversion
    from transformers.core_model_loading import WeightRenaming
    from transformers.integrations import peft as integration

    def extended(build: Any) -> Any:
        @functools.wraps(build)
        def build_peft_weight_mapping(weight_conversions: Any, adapter_name: str, peft_config: Any = None) -> Any:
            rules = build(weight_conversions, adapter_name, peft_config=peft_config)
            if getattr(peft_config, "peft_type", None) == peft_type and rules:
                saved = rf"({METHOD}_(?!nodes)[a-z_]+\.{re.escape(adapter_name)})(?!\.weight)$"
                rules = [*rules, WeightRenaming(source_patterns=saved, target_patterns=r"\1.weight")]
            return rules

        setattr(build_peft_weight_mapping, _ORIGINAL, build)
        return build_peft_weight_mapping

    for module in (conversion, integration):  # early versions of transformers have a copy of their own
        build = getattr(module, "build_peft_weight_mapping", None)
        if build is not None:
            module.build_peft_weight_mapping = extended(_original(build))  # type: ignore[attr-defined]


def _extend_scaling(model_class: Any) -> None:
    """Have `peft.helpers.rescale_adapter_scale`, which looks for LoRA's layers, scale shortcuts too."""
    from peft import helpers

    rescale = _original(helpers.rescale_adapter_scale)

    @functools.wraps(rescale)
    def rescale_adapter_scale(model: Any, multiplier: float) -> Any:
        ours = any(isinstance(module, model_class.tuner_layer_cls) for module in model.modules())
        return (model_class.rescale_shortcuts if ours else rescale)(model, multiplier)

    setattr(rescale_adapter_scale, _ORIGINAL, rescale)
    helpers.rescale_adapter_scale = rescale_adapter_scale


def _original(method: Any) -> Any:
    """PEFT's own method, also if an earlier import of this package has extended it."""
    return getattr(method, _ORIGINAL, method)
