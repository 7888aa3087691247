"""Writes adapters, a stack of grades and checkpoints with the version that is installed, and the logits they give.

Run once by 0.1.0 (`files`, with a feature cache, without "linear" and checkpoints) and by the last version before 0.2
(`files/before-0.2`); the tests load what it wrote: python make_files.py FOLDER
"""

import sys
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

import lreg_peft
from lreg_peft import LRegConfig

CONFIGS = {
    "full": {"n_components": 2, "n_nodes": 3},
    "reduced": {"n_components": 3, "n_nodes": 4, "weighting": "reduced"},
    "factored": {
        "target_modules": ["c_attn", "mlp", "lm_head"],
        "weighting": "factored",
        "n_nodes": 8,
        "component_pattern": {"c_attn": 1},
    },
    "blocks": {"target_modules": ["mlp"], "n_nodes": 12, "curvature_weight": 0.1},
    "linear": {
        "target_modules": ["c_attn", "ln_f", "lm_head"],
        "weighting": "factored",
        "linear_term": True,
        "profile_mean": 0.3,
        "n_nodes": 5,
        "component_pattern": {"c_attn": 3},
    },
}

# Of which the state dict of the whole model is kept too, as far as it is the adapter's.
CHECKPOINTS = ("linear", "reduced")


def base() -> GPT2LMHeadModel:
    """The same weights with every version of torch."""
    config = GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=40, bos_token_id=0, eos_token_id=1)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            flat = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_((0.3 * torch.sin(1.7 * flat + i)).view(parameter.shape))
    return model


def inputs() -> torch.Tensor:
    """`[3, 9]`."""
    return (torch.arange(27) * 7 % 58 + 3).view(3, 9)


def samples() -> list[dict[str, torch.Tensor]]:
    """Five samples of eight tokens; the first three labels of each do not count."""
    result = []
    for i in range(5):
        ids = (torch.arange(8) * (i + 3)) % 58 + 3
        result.append({"input_ids": ids, "labels": torch.cat((torch.full((3,), -100), ids[3:]))})
    return result


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Weights that are neither zero nor random, and meshes that have moved."""
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if "lreg_" in name:
            flat = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_((0.5 * torch.sin(2.3 * flat + i)).view(parameter.shape))
    for name, nodes in model.named_buffers():
        if "nodes" in name:
            nodes.copy_(nodes**1.5)


def main(folder: Path) -> None:
    logits = {}
    for name, options in CONFIGS.items():
        model = get_peft_model(base(), LRegConfig(preset="paper", task_type="CAUSAL_LM", **options))
        fill(model)
        model.save_pretrained(folder / name)
        logits[name] = model.eval()(inputs()).logits.detach().contiguous()
        if name in CHECKPOINTS:
            state = {key: value.contiguous() for key, value in model.state_dict().items() if "lreg_" in key}
            save_file(state, folder / f"{name}-checkpoint.safetensors")
    model = get_peft_model(base(), LRegConfig(target_modules=["mlp"], n_nodes=3, init_weights=False))
    fill(model)
    lreg_peft.add_grade(model, LRegConfig(target_modules=["mlp"], n_nodes=4), form="composed")
    lreg_peft.add_grade(model, LRegConfig(target_modules=["lm_head"], n_nodes=3, weighting="factored"))
    fill(model)
    model.save_pretrained(folder / "grades")
    logits["grades"] = model.eval()(inputs()).logits.detach().contiguous()
    save_file(logits, folder / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
