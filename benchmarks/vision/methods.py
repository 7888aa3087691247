"""The methods for image classifiers, and how each one is attached.

Batch norms: whoever trains them lets their statistics follow the new images; for all others both stay as they were, as
the paper has it for LReg and as a saved adapter needs it, which holds no statistics.
"""

from functools import partial
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from examples.comparison.methods import Batches, Fit, Method, attach_full, start_from_data
from examples.comparison.options import UserError
from lreg_peft import LRegConfig

#: No task type of PEFT: it has none for images.
IMAGES = ("IMAGE_CLS",)


def attach_norm_bias(model: PreTrainedModel, fit: Fit, batches: Batches | None) -> nn.Module:
    """Every norm and every bias, and the new classifier: BitFit where biases are mostly those of norms."""
    model.requires_grad_(False)
    for module in model.modules():
        if "Norm" in type(module).__name__:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(True)
    for name in fit.task.new_modules:
        model.get_submodule(name).requires_grad_(True)
    return model


def attach_classifier(model: PreTrainedModel, fit: Fit, batches: Batches | None) -> nn.Module:
    """The classifier, the model's own or a new one."""
    model.requires_grad_(False)
    for name in fresh_head_names(model):
        model.get_submodule(name).requires_grad_(True)
    return hold_batch_norms(model)


def attach_lora_conv(model: PreTrainedModel, fit: Fit, batches: Batches | None) -> nn.Module:
    """LoRA on all convolutions and linear layers of the backbone."""
    config = LoraConfig(
        r=fit.size,
        lora_alpha=fit.size,  # a scale of one; the learning-rate search does the rest
        lora_dropout=0.0,
        target_modules=backbone_layers(model),
        modules_to_save=fit.modules_to_save,
    )
    return get_peft_model(hold_batch_norms(model), config)


def attach_lreg_stage(model: PreTrainedModel, fit: Fit, batches: Batches | None) -> nn.Module:
    """LReg where the paper has it: around the last stage, over a span, or from the class token to the logits."""
    return _lreg(model, fit, batches)


def attach_lreg_classifier(model: PreTrainedModel, fit: Fit, batches: Batches | None) -> nn.Module:
    """LReg parallel to the classifier."""
    if fit.task.new_modules:
        raise UserError("The method 'lreg-classifier' keeps the classifier, which is new to this model; leave it out.")
    return _lreg(model, fit, batches, target_modules=fresh_head_names(model))


def attach_lreg(model: PreTrainedModel, fit: Fit, batches: Batches | None) -> nn.Module:
    """The recipe: factored shortcuts with a linear term, started from gradients, where LoRA has its matrices."""
    return _lreg(
        model,
        fit,
        batches,
        target_modules=backbone_layers(model),
        weighting="factored",
        linear_term=True,
        profile_mean=0.0,
    )


def _lreg(model: PreTrainedModel, fit: Fit, batches: Batches | None, **options: object) -> nn.Module:
    config = LRegConfig(
        preset="paper",
        n_components=fit.size,
        n_nodes=fit.n_nodes,
        modules_to_save=fit.modules_to_save,
        init_weights="gradient",
        **options,  # type: ignore[arg-type]
    )
    adapted = get_peft_model(model, config)
    if batches is not None:
        start_from_data(adapted, batches, fit.seed, head=False)
    return adapted


def fresh_head_names(model: PreTrainedModel) -> list[str]:
    """Names of the modules beside the backbone that have parameters: the classifier."""
    children = model.named_children()
    return [n for n, child in children if n != model.base_model_prefix and any(True for _ in child.parameters())]


def backbone_layers(model: PreTrainedModel) -> list[str]:
    """Names of the convolutions and linear layers below the classifier, depthwise ones left out."""
    heads = tuple(fresh_head_names(model))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        and name.partition(".")[0] not in heads
        and getattr(module, "groups", 1) == 1
    ]


def hold_batch_norms(model: PreTrainedModel) -> PreTrainedModel:
    """Keep batch norms in eval mode whatever `train()` says."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
            module.train = partial(_stay, module)  # type: ignore[method-assign,assignment]
    return model


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def _method(name: str, summary: str, attach: Any, rate: float, size_name: str | None = None, **more: Any) -> Method:
    if name.startswith("lreg"):
        more["n_nodes"] = 8
    return Method(name, summary, attach, {"images": rate}, size_name, tasks=IMAGES, **more)


METHODS = {
    method.name: method
    for method in (
        _method("ft", "full fine-tuning", attach_full, 3e-3),
        _method("norm-bias", "every norm and bias", attach_norm_bias, 3e-2),
        _method("classifier", "the classifier, nothing else", attach_classifier, 3e-3),
        _method("lora-conv", "LoRA on all convolutions and linear layers", attach_lora_conv, 3e-2, "rank"),
        _method(
            "lreg-stage",
            "LReg in the paper's placement: last stage, span, or class token",
            attach_lreg_stage,
            1e-2,
            "n_components",
            is_paper=True,
        ),
        _method(
            "lreg-classifier",
            "LReg parallel to the classifier (the paper's Table A1)",
            attach_lreg_classifier,
            3e-3,
            "n_components",
        ),
        _method(
            "lreg-conv",
            "LReg on all convolutions and linear layers, factored with a linear term, started from gradients",
            attach_lreg,
            1e-2,
            "n_components",
        ),
    )
}
