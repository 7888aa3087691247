"""The methods that are compared, and how each one is attached to the base model.

Adding a method is adding an entry to `METHODS`, or to `TUNERS` if it is another tuner of PEFT; nothing else in the
examples knows their names.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from comparison.base_layers import linear_instead_of_conv1d
from comparison.errors import UserError
from comparison.image_methods import IMAGE_METHODS
from comparison.method import (
    CLASSIFICATION,
    EVERYWHERE,
    IMAGES,
    LANGUAGE_MODELS,
    Batches,
    Fit,
    Method,
    Rates,
)
from comparison.placements import fresh_head_names, layer_sizes, linear_layers
from comparison.site import ALL_PLACEMENTS, LINEAR, Site
from comparison.training import share_of
from comparison.tuners import TUNERS
from lreg_peft import LRegConfig, match_token_frequencies, recommended_config
from lreg_peft.modules import unwrap
from lreg_peft.training.head_start import start_head
from lreg_peft.tuner.hooks.output_head import wrapped_head
from lreg_peft.tuner.placement import output_head_name

# --- methods without an adapter -------------------------------------------------------------------------------------


def attach_full(model: PreTrainedModel, fit: Fit) -> nn.Module:
    """Full fine-tuning: every parameter."""
    return model.requires_grad_(True)


def attach_bitfit(model: PreTrainedModel, fit: Fit) -> nn.Module:
    """BitFit: every bias the model has, the new modules, and nothing else."""
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    if not biases:
        raise UserError(f"The method 'bitfit' needs biases, and {type(model).__name__} has none; leave it out.")
    attach_head_only(model, fit)
    for bias in biases:
        bias.requires_grad_(True)
    return model


def attach_vocab_bias(model: PreTrainedModel, fit: Fit) -> nn.Module:
    """A bias on the logits: the control that shows how much of a gain is new token frequencies alone."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"The method 'vocab-bias' needs a linear head, and that of {type(model).__name__} is a "
            f"{type(head).__name__}; leave it out."
        )
    model.requires_grad_(False)
    if head.bias is None:
        head.bias = nn.Parameter(head.weight.new_zeros(head.out_features))
    head.bias.requires_grad_(True)
    return model


def attach_vocab_bias_on_data(model: PreTrainedModel, fit: Fit, batches: Batches) -> nn.Module:
    """The same, from the start that the output shortcut of LReg gets: the shift in how often each label comes."""
    return with_shifted_bias(attach_vocab_bias(model, fit), batches)


def with_shifted_bias(model: nn.Module, batches: Batches) -> nn.Module:
    """Add to the bias what LReg's output shortcut gets at its start or, since both are closed forms, after training."""
    assert isinstance(model, PreTrainedModel)
    name = output_head_name(model) or ""
    # A head that has a constant: the same at every position.
    config = LRegConfig(target_modules=[name], weighting="reduced", n_components=1, n_nodes=2)
    own, n_batches = share_of(batches)
    with warnings.catch_warnings():
        # The model may have an adapter of its own; this is a copy.
        warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT for a second time")
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        adapted = get_peft_model(copy.deepcopy(model), config)
    match_token_frequencies(adapted, own, n_batches=n_batches, show_progress=False)
    shortcut: Any = adapted.get_base_model().get_submodule(name)
    with torch.no_grad():
        features = next(shortcut.base_layer.parameters()).new_zeros(1, shortcut.in_features)
        shift = shortcut(features)[0] - shortcut.base_layer(features)[0]
        model.get_output_embeddings().bias.add_(shift)  # type: ignore[union-attr,operator]
    return model


def attach_head_only(model: PreTrainedModel, fit: Fit) -> nn.Module:
    """The new modules alone: the control that shows what the frozen features give by themselves."""
    model.requires_grad_(False)
    for name in fit.new_modules:
        model.get_submodule(name).requires_grad_(True)
    return model


# --- LoRA -----------------------------------------------------------------------------------------------------------


def attach_lora(model: PreTrainedModel, fit: Fit) -> nn.Module:
    """LoRA on the attention projections PEFT chooses for the architecture (GPT-2: `c_attn`; BERT: query and value)."""
    known = model.config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    return _lora(model, fit, None if known else list(linear_layers(model).attention), {})


def attach_lora_linear(model: PreTrainedModel, fit: Fit) -> nn.Module:
    """LoRA on all linear layers of the backbone."""
    ranks = layer_sizes(linear_layers(model), fit.size)
    return _lora(model, fit, list(ranks), ranks)


def attach_lora_linear_on_data(model: PreTrainedModel, fit: Fit, batches: Batches) -> nn.Module:
    """The same with the new head from the start that LReg's gets: same samples, same solver."""
    adapted = attach_lora_linear(model, fit)
    own, n_batches = share_of(batches)
    start_head(adapted, own, n_batches=n_batches)
    return adapted


def attach_lora_everywhere(model: PreTrainedModel, fit: Fit) -> nn.Module:
    """LoRA on all linear layers and on the layer that makes the logits, or on part of them where that is too large."""
    ranks = Site(model, fit).sizes
    return _lora(model, fit, list(ranks), ranks)


def attach_lora_bias(model: PreTrainedModel, fit: Fit) -> nn.Module:
    """LoRA on all linear layers of the backbone and a bias on the logits: the control that shows what LReg's start and
    calibration of the output do for LoRA."""
    ranks = layer_sizes(linear_layers(model), fit.size)
    attach_vocab_bias(model, fit)
    inject_adapter_in_model(_lora_config(model, fit, list(ranks), ranks), model)
    model.get_output_embeddings().bias.requires_grad_(True)  # type: ignore[union-attr]
    return model


def attach_lora_bias_on_data(model: PreTrainedModel, fit: Fit, batches: Batches) -> nn.Module:
    """The same with the bias started from token frequencies."""
    return with_shifted_bias(attach_lora_bias(model, fit), batches)


def _lora(model: PreTrainedModel, fit: Fit, targets: list[str] | None, ranks: dict[str, int]) -> nn.Module:
    with warnings.catch_warnings():
        # GPT-2 has both kinds of layer, and PEFT sets this flag right for each of them, with a warning.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        # A head whose weight is the embedding's: only merging would be a problem, and nothing is merged here.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        warnings.filterwarnings("ignore", message=".*tied_target_modules")
        return get_peft_model(model, _lora_config(model, fit, targets, ranks))


def _lora_config(model: PreTrainedModel, fit: Fit, targets: list[str] | None, ranks: dict[str, int]) -> LoraConfig:
    pattern = as_pattern(ranks)
    return LoraConfig(
        task_type=_peft_task(fit),
        r=fit.size,
        lora_alpha=fit.size,  # a scale of one in every module; the learning-rate search does the rest
        lora_dropout=0.0,
        target_modules=targets,
        rank_pattern=pattern,
        alpha_pattern=pattern,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        modules_to_save=fit.modules_to_save,
    )


# --- LReg -----------------------------------------------------------------------------------------------------------


def attach_lreg_default(model: PreTrainedModel, fit: Fit) -> nn.Module:
    """LReg where the paper has it: parallel to the head of a language model; query and key for classification."""
    return _lreg(model, fit)


def attach_lreg_mlp(model: PreTrainedModel, fit: Fit) -> nn.Module:
    """LReg as one shortcut around each whole feed-forward block."""
    block = linear_layers(model).block
    if block is None:
        raise UserError(
            f"The method 'lreg-mlp' needs the feed-forward block as one module, and {type(model).__name__} has none; "
            "leave it out."
        )
    return _lreg(model, fit, target_modules=[block])


def attach_lreg(model: PreTrainedModel, fit: Fit) -> nn.Module:
    """LReg as `recommended_config` has it, filling a budget of `fit.size` parameters."""
    return get_peft_model(model, _recommended(model, fit))


def finish_lreg(model: nn.Module, batches: Batches) -> None:
    """What the output shortcut has not learned of label frequencies, in closed form; without one nothing is done."""
    if wrapped_head(unwrap(model)) is not None:
        own, n_batches = share_of(batches)
        match_token_frequencies(model, own, n_batches=n_batches, show_progress=False)


def attach_lreg_inside(model: PreTrainedModel, fit: Fit) -> nn.Module:
    """The same on the linear layers of the backbone alone."""
    return get_peft_model(model, _recommended(model, fit, output_head=False, final_norm=False))


def attach_lreg_no_norm(model: PreTrainedModel, fit: Fit) -> nn.Module:
    """The same without the norm before the output head."""
    return get_peft_model(model, _recommended(model, fit, final_norm=False))


def attach_lreg_plain(model: PreTrainedModel, fit: Fit) -> nn.Module:
    """Without that norm and without a linear term, and with profiles whose mean is one."""
    config = _recommended(model, fit, final_norm=False)
    return get_peft_model(model, replace(config, linear_term=False, profile_mean=1.0, profile_mean_pattern={}))


def _recommended(model: PreTrainedModel, fit: Fit, **options: bool) -> LRegConfig:
    with warnings.catch_warnings():  # sizes are tried from the smallest on
        warnings.filterwarnings("ignore", message="budget=.* for none inside the network")
        return recommended_config(
            model,
            fit.size,
            task_type=_peft_task(fit),
            n_nodes=fit.n_nodes,
            modules_to_save=fit.modules_to_save,
            **options,
        )


def lreg_budgets(model: PreTrainedModel, fit: Fit) -> Sequence[int]:
    """From a single component on the smallest linear layer on."""
    shapes = Site(linear_instead_of_conv1d(model), replace(fit, placement=LINEAR)).shapes
    return range(min(map(sum, shapes)) + 1 + fit.n_nodes, 1 << 40)


def _lreg(model: PreTrainedModel, fit: Fit, **options: object) -> nn.Module:
    config = LRegConfig(
        task_type=_peft_task(fit),
        preset="paper",
        n_components=fit.size,
        n_nodes=fit.n_nodes,
        modules_to_save=fit.modules_to_save,
        **options,  # type: ignore[arg-type]
    )
    return get_peft_model(model, config)


def as_pattern(sizes: dict[str, int]) -> dict[str, int]:
    """Name endings as the regular expressions PEFT's patterns are."""
    return {name.replace(".", r"\."): size for name, size in sizes.items()}


def _peft_task(fit: Fit) -> str | None:
    # PEFT has no class of its own for masked language models; its general one does what is needed.
    return None if fit.task_type == "MASKED_LM" else fit.task_type


LREG = Method(
    "lreg",
    "LReg as recommended: all linear layers (and the LM head), factored with a linear term, started from data",
    attach_lreg,
    Rates(2e-2, 3e-2, 3e-3, 3e-3),
    "parameters",
    n_nodes=8,
    start="gradient and output",
    sizes=lreg_budgets,
    fills_budget=True,
    finish=finish_lreg,
    as_lora=True,
)
METHODS = {
    method.name: method
    for method in (
        Method(
            "ft",
            "full fine-tuning",
            attach_full,
            Rates(2e-3, 5e-4, 5e-5, 1e-4, images=3e-3),
            tasks=EVERYWHERE + IMAGES,
            beyond_budget=True,
        ),
        Method("bitfit", "every bias", attach_bitfit, Rates(3e-2, 1e-2, 1e-3, 3e-3)),
        Method(
            "vocab-bias",
            "a bias on the logits, started as that of LReg, nothing else",
            attach_vocab_bias,
            Rates(1e-1, 5e-2, 1e-2, 1e-2),
            tasks=LANGUAGE_MODELS,
            attach_on_data=attach_vocab_bias_on_data,
        ),
        Method(
            "head-only",
            "the new head, nothing else",
            attach_head_only,
            Rates(1e-2, 1e-2, 1e-2, 1e-1),
            tasks=CLASSIFICATION,
        ),
        Method(
            "lora", "LoRA on PEFT's choice of attention projections", attach_lora, Rates(1e-2, 1e-2, 1e-3, 3e-3), "rank"
        ),
        Method("lora-linear", "LoRA on all linear layers", attach_lora_linear, Rates(1e-2, 2e-2, 1e-3, 3e-3), "rank"),
        Method(
            "lora-linear-head",
            "LoRA on all linear layers and the LM head",
            attach_lora_everywhere,
            Rates(2e-2, 2e-2, 1e-3, 3e-3),
            "rank",
            tasks=LANGUAGE_MODELS,
            placements=ALL_PLACEMENTS,
        ),
        Method(
            "lora-linear-bias",
            "LoRA on all linear layers and a bias on the logits, started and calibrated as the output shortcut of LReg",
            attach_lora_bias,
            Rates(2e-2, 2e-2, 1e-3, 3e-3),
            "rank",
            tasks=LANGUAGE_MODELS,
            by_default=False,
            attach_on_data=attach_lora_bias_on_data,
            finish=with_shifted_bias,
        ),
        Method(
            "lreg-head",
            "LReg at the LM head (the paper's placement)",
            attach_lreg_default,
            Rates(3e-2, 2e-2, 1e-3, 1e-3),
            "n_components",
            n_nodes=2,
            tasks=LANGUAGE_MODELS,
        ),
        Method(
            "lreg-mlp",
            "LReg around every MLP block",
            attach_lreg_mlp,
            Rates(3e-2, 2e-2, 3e-3, 3e-3),
            "n_components",
            n_nodes=2,
            tasks=LANGUAGE_MODELS,
            needs_block=True,
        ),
        Method(
            "lreg-attention",
            "LReg on query and key (the paper's placement)",
            attach_lreg_default,
            Rates(3e-3, 3e-3, 3e-3, 1e-2),
            "n_components",
            n_nodes=6,
            tasks=CLASSIFICATION,
        ),
        LREG,
        replace(
            LREG,
            name="lreg-inside",
            summary="lreg on the linear layers of the backbone alone, for servers that refuse a LoRA at the LM head",
            attach=attach_lreg_inside,
            tasks=LANGUAGE_MODELS,
            by_default=False,
        ),
        replace(
            LREG,
            name="lreg-fast-profiles",
            summary="the same with profiles that learn four times faster, as parameter_groups has it",
            by_default=False,
            as_lora=False,
            faster=("lreg_encoder", 4.0),
        ),
        Method(
            "lora-linear-start",
            "LoRA on all linear layers, its new head started as that of LReg",
            attach_lora_linear,
            Rates(1e-2, 2e-2, 1e-3, 3e-3),
            "rank",
            tasks=CLASSIFICATION,
            by_default=False,
            attach_on_data=attach_lora_linear_on_data,
        ),
        replace(
            LREG,
            name="lreg-random-head",
            summary="the same with the new head as it is drawn",
            tasks=CLASSIFICATION,
            start="gradient",
            by_default=False,
        ),
        replace(
            LREG,
            name="lreg-uncalibrated",
            summary="lreg as training leaves it",
            by_default=False,
            as_lora=False,
            finish=None,
        ),
        replace(
            LREG,
            name="lreg-no-norm",
            summary="lreg as training leaves it, without the norm before the output head",
            attach=attach_lreg_no_norm,
            by_default=False,
            as_lora=False,
            finish=None,
        ),
        replace(
            LREG,
            name="lreg-plain",
            summary="the same without a linear term, started from gradients alone",
            attach=attach_lreg_plain,
            rates=Rates(2e-2, 2e-2, 3e-3, 3e-3),
            start="gradient",
            by_default=False,
            as_lora=False,
            finish=None,
        ),
        *IMAGE_METHODS,
        *(tuner.method() for tuner in TUNERS),
    )
}
#: Left out unless named: beside its variant with the head it says little.
NOT_BY_DEFAULT = {"CAUSAL_LM": ("lora-linear",), "MASKED_LM": ("lora-linear",), "SEQ_CLS": (), "IMAGE_CLS": ()}


def select_methods(
    names: Sequence[str], task_type: str, model: PreTrainedModel, everything: bool = False
) -> list[Method]:
    """The named methods in the order given, each once; without names those that make sense for task and architecture.

    Args:
        names: of the methods.
        task_type: of PEFT.
        model: of the architecture.
        everything: whether all that exist are meant where none are named.
    """
    there = [method for method in METHODS.values() if task_type in method.tasks]
    if not names:
        has_block = linear_layers(model).block is not None
        has_bias = any(name.endswith("bias") for name, _ in model.named_parameters())
        return [
            method
            for method in there
            if (everything or (method.by_default and method.name not in NOT_BY_DEFAULT[task_type]))
            and (has_block or not method.needs_block)
            and (has_bias or method.name != "bitfit")
        ]
    unknown = [name for name in names if name not in {method.name for method in there}]
    if unknown:
        raise UserError(
            f"There is no method {', '.join(map(repr, unknown))} for {task_type}; "
            f"the methods are {', '.join(method.name for method in there)}."
        )
    return [METHODS[name] for name in dict.fromkeys(names)]


def new_module_names(model: PreTrainedModel, task_type: str) -> tuple[str, ...]:
    """The modules without pretrained weights: none in a language model, the head of a classification model."""
    return () if task_type in LANGUAGE_MODELS else tuple(fresh_head_names(model))
