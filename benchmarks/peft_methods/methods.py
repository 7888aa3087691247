"""Everything a study knows: the methods of the comparisons, their variants and controls, and the tuners of PEFT."""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import PreTrainedModel

from benchmarks.peft_methods.site import ALL_PLACEMENTS, Site
from benchmarks.peft_methods.tuner import customized
from benchmarks.peft_methods.tuners import TUNERS
from examples.comparison.methods import (
    METHODS,
    Batches,
    Fit,
    Method,
    layer_sizes,
    lora,
    lora_config,
    quiet_about_lora,
    rates,
    recommended,
    share_of,
    start_from_data,
)
from examples.comparison.options import UserError
from examples.comparison.task import LANGUAGE_MODELS
from lreg_peft import LRegConfig, match_token_frequencies
from lreg_peft.training.head_start import start_head

CLASSIFICATION = ("SEQ_CLS",)
LREG, LORA_LINEAR = METHODS["lreg"], METHODS["lora-linear"]


def attach_vocab_bias(model: PreTrainedModel, fit: Fit, batches: Batches | None) -> nn.Module:
    """A bias on the logits: the control that shows how much of a gain is new token frequencies alone.

    It starts as LReg's output shortcut does, with the shift in how often each token comes.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        kinds = f"that of {type(model).__name__} is a {type(head).__name__}"
        raise UserError(f"The method 'vocab-bias' needs a linear head, and {kinds}; leave it out.")
    model.requires_grad_(False)
    if head.bias is None:
        head.bias = nn.Parameter(head.weight.new_zeros(head.out_features))
    head.bias.requires_grad_(True)
    return model if batches is None else shift_bias(model, batches)


def shift_bias(model: nn.Module, batches: Batches) -> nn.Module:
    """Add to the bias what LReg's output shortcut gets at its start or, since both are closed forms, after training."""
    assert isinstance(model, PreTrainedModel)
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
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
        head.bias.add_(shift)  # type: ignore[union-attr,operator]
    return model


def attach_head_only(model: PreTrainedModel, fit: Fit, batches: Batches | None) -> nn.Module:
    """The new modules alone: the control that shows what the frozen features give by themselves."""
    model.requires_grad_(False)
    for name in fit.task.new_modules:
        model.get_submodule(name).requires_grad_(True)
    return model


def attach_lora_at(place: str, model: PreTrainedModel, fit: Fit, batches: Batches | None) -> nn.Module:
    """LoRA in one of the places that all tuners may have."""
    ranks = Site(model, fit, place).sizes
    return lora(model, fit, list(ranks), ranks)


def attach_lora_bias(model: PreTrainedModel, fit: Fit, batches: Batches | None) -> nn.Module:
    """LoRA on all linear layers of the backbone and a bias on the logits: the control that shows what LReg's start and
    calibration of the output do for LoRA."""
    ranks = layer_sizes(model, fit.size)
    attach_vocab_bias(model, fit, None)
    with warnings.catch_warnings():
        quiet_about_lora()
        inject_adapter_in_model(lora_config(model, fit, list(ranks), ranks), model)
    model.get_output_embeddings().bias.requires_grad_(True)  # type: ignore[union-attr]
    return model if batches is None else shift_bias(model, batches)


def attach_lora_start(model: PreTrainedModel, fit: Fit, batches: Batches | None) -> nn.Module:
    """LoRA on all linear layers with the new head from the start that LReg's gets: same samples, same solver."""
    adapted = LORA_LINEAR.attach(model, fit, None)
    if batches is not None:
        own, n_batches = share_of(batches)
        start_head(adapted, own, n_batches=n_batches)
    return adapted


def attach_lreg_mlp(model: PreTrainedModel, fit: Fit, batches: Batches | None) -> nn.Module:
    """LReg as one shortcut around each whole feed-forward block."""
    if not any(name.rpartition(".")[2] == "mlp" for name, _ in model.named_modules()):
        missing = f"{type(model).__name__} has none"
        raise UserError(
            f"The method 'lreg-mlp' needs the feed-forward block as one module, and {missing}; leave it out."
        )
    options: dict[str, Any] = {"n_components": fit.size, "n_nodes": fit.n_nodes}
    return get_peft_model(model, LRegConfig(preset="paper", task_type=fit.peft_task, target_modules=["mlp"], **options))


def attach_lreg(
    model: PreTrainedModel,
    fit: Fit,
    batches: Batches | None,
    *,
    head: bool = True,
    plain: bool = False,
    **options: Any,
) -> nn.Module:
    """LReg's recipe with one part changed.

    Args:
        model: to adapt.
        fit: as for every method.
        batches: of its start.
        head: start the output layer or the new head, too.
        plain: without a linear term, and with profiles whose mean is one.
        options: of `recommended_config`.
    """
    config = recommended(model, fit, **options)
    if plain:
        config = replace(config, linear_term=False, profile_mean=1.0, profile_mean_pattern={})
    adapted = get_peft_model(model, config)
    if batches is not None:
        start_from_data(adapted, batches, fit.seed, head=head)
    return adapted


def variant(name: str, summary: str, **changes: Any) -> Method:
    """LReg with something changed."""
    return replace(LREG, name=name, summary=summary, **{"as_lora": False, **changes})


_LORA = METHODS["lora-linear-head"]
VARIANTS = (
    Method(
        "vocab-bias",
        "a bias on the logits, started as that of LReg, nothing else",
        attach_vocab_bias,
        rates(1e-1, 5e-2, 1e-2, 1e-2),
        tasks=LANGUAGE_MODELS,
    ),
    Method(
        "head-only", "the new head, nothing else", attach_head_only, rates(1e-2, 1e-2, 1e-2, 1e-1), tasks=CLASSIFICATION
    ),
    replace(LORA_LINEAR, tasks=(*LANGUAGE_MODELS, *CLASSIFICATION)),
    *(replace(_LORA, attach=partial(attach_lora_at, place), place=place) for place in ALL_PLACEMENTS),
    Method(
        "lora-linear-bias",
        "LoRA on all linear layers and a bias on the logits, started and calibrated as the output shortcut of LReg",
        attach_lora_bias,
        rates(2e-2, 2e-2, 1e-3, 3e-3),
        "rank",
        tasks=LANGUAGE_MODELS,
        finish=shift_bias,
    ),
    Method(
        "lora-linear-start",
        "LoRA on all linear layers, its new head started as that of LReg",
        attach_lora_start,
        LORA_LINEAR.rates,
        "rank",
        tasks=CLASSIFICATION,
    ),
    Method(
        "lreg-mlp",
        "LReg around every MLP block",
        attach_lreg_mlp,
        rates(3e-2, 2e-2, 3e-3, 3e-3),
        "n_components",
        n_nodes=2,
        tasks=LANGUAGE_MODELS,
    ),
    variant(
        "lreg-inside",
        "lreg on the linear layers of the backbone alone, for servers that refuse a LoRA at the LM head",
        attach=partial(attach_lreg, output_head=False, final_norm=False),
        tasks=LANGUAGE_MODELS,
    ),
    variant(
        "lreg-fast-profiles",
        "the same with profiles that learn four times faster",
        customize=customized(faster=("lreg_encoder", 4.0)),
    ),
    variant(
        "lreg-random-head",
        "the same with the new head as it is drawn",
        attach=partial(attach_lreg, head=False),
        tasks=CLASSIFICATION,
    ),
    variant(
        "lreg-no-base-width",
        "the same with a projection that learns as fast as the rest, however wide its input",
        attach=partial(attach_lreg, base_width=None),
    ),
    variant("lreg-uncalibrated", "lreg as training leaves it", finish=None),
    variant(
        "lreg-no-norm",
        "lreg as training leaves it, without the norm before the output head",
        attach=partial(attach_lreg, final_norm=False),
        finish=None,
    ),
    variant(
        "lreg-plain",
        "the same without a linear term, started from gradients alone",
        attach=partial(attach_lreg, head=False, plain=True, final_norm=False),
        rates=rates(2e-2, 2e-2, 3e-3, 3e-3),
        finish=None,
    ),
)


def everything() -> Mapping[str, list[Method]]:
    """Name -> the same method in each of the places that it may have, the preferred one first."""
    own = {name: [replace(method, as_lora=False)] for name, method in METHODS.items()}
    found: dict[str, list[Method]] = {}
    for method in (*VARIANTS, *(method for tuner in TUNERS for method in tuner.methods())):
        found.setdefault(method.name, []).append(method)
    return {**own, **found}


#: Parameters of these can only be counted on a model that has weights.
READS_WEIGHTS = {tuner.name for tuner in TUNERS if tuner.reads_weights}
