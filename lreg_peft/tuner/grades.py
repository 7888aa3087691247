"""Grades: adapters trained one after the other, each on what the ones before it leave over.

The output of a stack is base + grade 1 + ... + grade L. Only the last grade trains, and it starts at zero: the output
does not change when a grade is added, and with a fixed encoder its training is convex, so that the training loss of
a fitted grade is at most that of the stack below it.

Source: Zhang, Shen & Xu, "Multi-grade deep learning", arXiv 2601.16884.
"""

import copy
import os
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .config import GradeForm, LRegConfig
from .layer import LRegLayer
from .targets import inspect_targets

_CONFIG_FILE = "adapter_config.json"
_HUB_OPTIONS = ("revision", "token")


def add_grade(
    model: nn.Module, config: LRegConfig | None = None, *, form: GradeForm = "additive", name: str | None = None
) -> str:
    """Freeze the active adapter and put a new one, a grade, on top of it.

    The new adapter is the active one: `model.set_adapter(name)` stands for the whole stack below `name`, and
    `model.set_adapter(previous)` or `model.delete_adapter(name)` gives the model before the grade back, exactly. A
    grade saves, loads and pushes as any adapter; its configuration records the stack, and `load_grades` loads one.

    A grade that reads the same coordinates on the same mesh as the one before finds nothing left to fit. Give it other
    directions (they are random unless `init_weights` says otherwise; "gradient" takes those that the present residual
    asks for), a finer mesh, or the composed form.

    Args:
        model: a `PeftModel` with an LReg adapter, or a Transformers model with one of its own (`add_adapter`).
        config: of the new adapter; None repeats that of the active one. Fields that describe the stack are filled in.
        form: "additive": the encoder reads the features of the module. "composed": it reads the features and the
            basis functions of the grade before it, so that grades nest.
        name: of the new adapter; None takes "grade_2", "grade_3", ...

    Returns:
        The name.

    Raises:
        ValueError: if there is no LReg adapter to stand on, the name is taken, nothing matches the targets, the
            configuration cannot be that of a grade, or a composed grade has a target without a previous shortcut. The
            model is then as it was.
        TypeError: if `config` is not an `LRegConfig`.
    """
    previous = _stack(model)
    name = _free_name(model, len(previous) + 1) if name is None else name
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be the name of the grade, a string that is not empty, got {name!r}.")
    if name in model.peft_config:  # type: ignore[operator]
        raise ValueError(f"there is an adapter {name!r} already: give the grade another name.")
    config = _grade_config(model, config, form, previous)
    inspect_targets(model, config)  # raises before anything is changed
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        model.set_adapter(name)
        return name
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # that is what a stack is
        model.add_adapter(config, adapter_name=name)  # type: ignore[operator]
    return name


def _stack(model: nn.Module) -> list[str]:
    """Names of the adapters that the model's output is the sum of, in order."""
    layers = [module for module in model.modules() if isinstance(module, LRegLayer)]
    if not layers or not hasattr(model, "peft_config"):
        raise ValueError(
            f"{type(model).__name__} has no LReg adapter for a grade to stand on: call get_peft_model(model, "
            "LRegConfig(...)) and train that first."
        )
    if any(layer.disable_adapters for layer in layers):
        raise ValueError("the adapters are disabled: enable them first, a grade stands on the active one.")
    if not any(layer.stacked_adapters for layer in layers):
        raise ValueError("no LReg adapter is active: activate the one that the grade is to stand on by set_adapter.")
    if not isinstance(model, PeftModel) and any(isinstance(m, AuxiliaryTrainingWrapper) for m in model.modules()):
        raise ValueError(
            "transformers' own set_adapter cannot activate grades next to modules_to_save: wrap the model by "
            "get_peft_model instead."
        )
    return layers[0].active_stack  # every layer knows that of the whole model


def _free_name(model: nn.Module, number: int) -> str:
    while f"grade_{number}" in model.peft_config:  # type: ignore[operator]
        number += 1
    return f"grade_{number}"


def _grade_config(model: nn.Module, config: LRegConfig | None, form: GradeForm, previous: list[str]) -> LRegConfig:
    given = config is not None
    template: Any = config if given else model.peft_config[previous[-1]]  # type: ignore[index]
    if not isinstance(template, LRegConfig):
        raise TypeError(f"a grade needs an LRegConfig, got {type(template).__name__}.")
    config = copy.deepcopy(template)
    if given and not config.init_weights:
        raise ValueError("init_weights=False starts at random, and a grade must start at zero: leave it out.")
    if given and config.modules_to_save:
        raise ValueError(
            f"modules_to_save={config.modules_to_save}: a grade adds shortcuts and trains no other module, since those "
            "that the grades before it trained stay frozen. Leave modules_to_save out."
        )
    config.init_weights = config.init_weights or True
    config.modules_to_save = None
    config.inference_mode = False
    config.previous_grades, config.grade_form = previous, form
    config.__post_init__()  # checks the stack
    return config


def load_grades(
    model: nn.Module, path: str | os.PathLike, name: str | None = None, *, is_trainable: bool = False, **options: Any
) -> PeftModel:
    """Load a stack of grades, in order, and activate the last one.

    Args:
        model: the base model, or a `PeftModel` whose adapters have other names.
        path: what `save_pretrained` of the `PeftModel` with the stack wrote, or a repository on the Hub.
        name: the last grade to load; None takes the one that stands on all others.
        is_trainable: train the last grade further.
        options: passed on to PEFT when it loads an adapter, such as `revision` and `token`.

    Returns:
        The `PeftModel`.

    Raises:
        ValueError: if there are no such adapters, they are not one stack, names are taken, or a file is damaged.
    """
    path = os.fspath(path)
    folder = path if os.path.isdir(path) else _download(path, options)
    # PEFT saves "default" in the root, others under their names.
    found = {file.parent.name: file.parent for file in Path(folder).glob(f"*/{_CONFIG_FILE}")}
    folders = {"default": Path(folder), **found} if os.path.exists(f"{folder}/{_CONFIG_FILE}") else found
    if not folders:
        raise ValueError(f"{path!r} holds no adapter: there is no {_CONFIG_FILE} in it or one level below.")
    if name is not None and name not in folders:
        raise ValueError(f"{path!r} has no adapter {name!r}. There are: {sorted(folders)}.")
    stacks = {
        each: [*getattr(PeftConfig.from_pretrained(folders[each]), "previous_grades", []), each]
        for each in ([name] if name else folders)
    }
    stack = max(stacks.values(), key=len)
    if beside := sorted(set(stacks) - set(stack)):
        raise ValueError(f"{path!r} has adapters beside the stack {stack}: {beside}. Say which grade is the last.")
    if missing := [grade for grade in stack if grade not in folders]:
        raise ValueError(f"the grade {stack[-1]!r} stands on {missing}, which {path!r} does not have.")
    taken = [grade for grade in stack if grade in getattr(model, "peft_config", {})]
    if taken:
        raise ValueError(f"the model has adapters called {taken} already: load the grades into the base model.")
    for grade in stack:
        here = {**options, "is_trainable": is_trainable and grade == stack[-1]}
        if isinstance(model, PeftModel):
            model.load_adapter(folders[grade], grade, **here)
        else:
            model = PeftModel.from_pretrained(model, folders[grade], adapter_name=grade, **here)  # type: ignore[arg-type]
    assert isinstance(model, PeftModel)
    model.set_adapter(stack[-1], inference_mode=not is_trainable)
    return model


def _download(path: str, options: dict[str, Any]) -> str:
    """The adapters of a repository on the Hub, in a folder."""
    if os.path.isabs(path) or path.count("/") > 1:
        raise ValueError(f"{path!r} is no folder, and no repository on the Hub has such a name.")
    hub = {key: options.pop(key) for key in _HUB_OPTIONS if key in options}
    return snapshot_download(path, allow_patterns=["adapter_*", "*/adapter_*"], **hub)
