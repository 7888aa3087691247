"""Models of random weights whose steps are timed, and LoRA in the shape of an LReg adapter."""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lreg_peft import LRegConfig

#: Width, layers, heads.
GPT2_SIZES = {"gpt2": (768, 12, 12), "gpt2-medium": (1024, 24, 16), "gpt2-large": (1280, 36, 20)}
NO_GPT2_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def frozen_gpt2(width: int, layers: int, heads: int, **options: Any) -> GPT2LMHeadModel:
    """A GPT-2 without dropout that trains nothing; `options` are of its configuration."""
    torch.manual_seed(0)
    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **NO_GPT2_DROPOUT, **options)).requires_grad_(False)
    model.loss_type = "ForCausalLM"  # left out, it is this one and a warning, which breaks a compiled graph
    return model


def lora_like(config: LRegConfig) -> LoraConfig:
    """LoRA on the same modules, with a rank for every component and a scale of one."""
    return LoraConfig(
        task_type=config.task_type,
        target_modules=config.target_modules,
        r=config.n_components,
        lora_alpha=config.n_components,
        rank_pattern=config.component_pattern,
        alpha_pattern=config.component_pattern,
        fan_in_fan_out=config.task_type == "CAUSAL_LM",  # of GPT-2
    )


def train_step(model: nn.Module) -> Callable[[dict[str, Tensor]], None]:
    """Forward, loss, backward, AdamW; of a compiled model, too."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)

    def step(batch: dict[str, Tensor]) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
