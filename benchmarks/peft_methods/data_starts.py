"""Starts of LoRA that PEFT makes from training batches, and one made as LReg's: along the gradients."""

import warnings
from collections.abc import Callable

import torch
from peft import LoraConfig, LoraGAConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn
from transformers import PreTrainedModel

from examples.comparison.methods import Batches


def start_eva(model: PreTrainedModel, config: LoraConfig, batches: Batches) -> nn.Module:
    """A along the principal inputs of each module."""
    adapted = get_peft_model(model, config)
    initialize_lora_eva_weights(adapted, list(batches), show_progress_bar=False)
    return adapted


def start_corda(model: PreTrainedModel, config: LoraConfig, batches: Batches) -> nn.Module:
    """A and B from the weights as the inputs weigh them; these directions leave the frozen weights."""

    def passes() -> None:
        with torch.no_grad():
            for batch in batches:
                for sample in range(len(batch["input_ids"])):  # PEFT takes the inputs of one sample at a time
                    model(**{name: values[sample : sample + 1] for name, values in batch.items()})

    preprocess_corda(model.eval(), config, run_model=passes)
    return get_peft_model(model, config)


def start_lora_ga(model: PreTrainedModel, config: LoraConfig, batches: Batches) -> nn.Module:
    """A and B from the gradients of the weights; what they add is taken from the frozen weights."""
    preprocess_loraga(model.eval(), config, _gradients(model, batches))
    return get_peft_model(model, config)


def start_gradient(model: PreTrainedModel, config: LoraConfig, batches: Batches) -> nn.Module:
    """A along the inputs the loss gradient depends on most, as long as its random rows; B zero: no function changes."""
    # PEFT's own estimate of the gradients, under the configuration it wants to see.
    names = LoraConfig(target_modules=config.target_modules, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    preprocess_loraga(model.eval(), names, _gradients(model, batches))
    gradients = {
        name: module._peft_loraga_grad for name, module in model.named_modules() if hasattr(module, "_peft_loraga_grad")
    }
    for name in gradients:
        del model.get_submodule(name)._peft_loraga_grad
    adapted = get_peft_model(model, config)
    for name, gradient in gradients.items():
        layer = adapted.base_model.model.get_submodule(name)
        assert isinstance(layer, LoraLayer)
        rows = layer.lora_A["default"].weight
        directions = torch.linalg.svd(gradient.float(), full_matrices=False).Vh[: len(rows)]
        rows.data.copy_(directions * rows.data.norm(dim=1, keepdim=True))
    return adapted


def _gradients(model: PreTrainedModel, batches: Batches) -> Callable[[], None]:
    def passes() -> None:
        # PEFT counts passes by hooks, and nothing but weights requires gradients.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        for batch in batches:
            model(**batch).loss.backward()

    return passes
