"""The methods that are compared: how each one is attached to the base model, sized and saved.

Adding a method is adding an entry to `METHODS`; nothing else in the example knows their names.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from errors import UserError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lreg_peft import LRegConfig

TRAINED_FILE = "trained.safetensors"


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        name: what `--methods` calls it.
        summary: one line for the report.
        attach: (model, size, dof) -> the model to train, with exactly the method's parameters requiring gradients.
        learning_rate: centre of the grid for a model that `run_wikitext.py` trained itself.
        pretrained_learning_rate: centre of the grid for a model given with --model_name_or_path.
        size_name: the option that scales its parameter count (linearly), or None if the count is what it is.
    """

    name: str
    summary: str
    attach: Callable[[PreTrainedModel, int, int], nn.Module]
    learning_rate: float
    pretrained_learning_rate: float
    size_name: str | None = None


# --- how each method is attached ------------------------------------------------------------------------------------


def attach_full(model: PreTrainedModel, size: int, dof: int) -> nn.Module:
    """Full fine-tuning: every parameter."""
    return model.requires_grad_(True)


def attach_bitfit(model: PreTrainedModel, size: int, dof: int) -> nn.Module:
    """BitFit: every bias the model has, and nothing else."""
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    if not biases:
        raise UserError(f"The method 'bitfit' needs biases, and {type(model).__name__} has none; leave it out.")
    model.requires_grad_(False)
    for bias in biases:
        bias.requires_grad_(True)
    return model


def attach_vocab_bias(model: PreTrainedModel, size: int, dof: int) -> nn.Module:
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


def attach_lora(model: PreTrainedModel, size: int, dof: int) -> nn.Module:
    """LoRA on the attention projections PEFT chooses for the architecture (GPT-2: the fused `c_attn`)."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=size,
        lora_alpha=size,  # a scale of one; the learning-rate search does the rest
        lora_dropout=0.0,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    return get_peft_model(model, config)


def attach_lreg_head(model: PreTrainedModel, size: int, dof: int) -> nn.Module:
    """LReg where the paper has it: from the last hidden state to the logits, parallel to `lm_head`."""
    return get_peft_model(model, LRegConfig(task_type="CAUSAL_LM", n_components=size, dof=dof))


def attach_lreg_mlp(model: PreTrainedModel, size: int, dof: int) -> nn.Module:
    """LReg as one shortcut around each whole `mlp` block."""
    return get_peft_model(model, LRegConfig(task_type="CAUSAL_LM", n_components=size, dof=dof, target_modules=["mlp"]))


METHODS = {
    method.name: method
    for method in (
        Method("ft", "full fine-tuning", attach_full, 2e-3, 5e-4),
        Method("bitfit", "every bias of the backbone", attach_bitfit, 3e-2, 1e-2),
        Method("vocab-bias", "a bias on the logits, nothing else", attach_vocab_bias, 1e-1, 5e-2),
        Method("lora", "LoRA on the attention projections", attach_lora, 1e-2, 5e-3, "rank"),
        Method("lreg-head", "LReg at the LM head", attach_lreg_head, 3e-2, 2e-2, "n_components"),
        Method("lreg-mlp", "LReg around every MLP block", attach_lreg_mlp, 3e-2, 2e-2, "n_components"),
    )
}


# --- which methods, with which learning rates -----------------------------------------------------------------------


def select_methods(names: Sequence[str]) -> list[Method]:
    """The named methods in the order given, each once."""
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise UserError(f"There is no method {', '.join(map(repr, unknown))}; the methods are {', '.join(METHODS)}.")
    return [METHODS[name] for name in dict.fromkeys(names)]


def learning_rate_grids(
    methods: Sequence[Method], n_trials: int, ratio: float, pretrained: bool, overrides: Sequence[str]
) -> dict[str, list[float]]:
    """The same number of learning rates for every method, a constant ratio apart around its own centre.

    Args:
        overrides: `NAME=RATE,RATE,...` replaces the grid of one method; its length must be `n_trials`.
    """
    grids = {}
    for method in methods:
        centre = method.pretrained_learning_rate if pretrained else method.learning_rate
        grids[method.name] = [
            float(f"{centre * ratio ** (trial - (n_trials - 1) // 2):.3g}") for trial in range(n_trials)
        ]
    for override in overrides:
        name, _, rates = override.partition("=")
        try:
            grid = sorted(float(rate) for rate in rates.split(","))
        except ValueError:
            grid = []
        if name not in grids or len(grid) != n_trials or min(grid, default=0.0) <= 0.0:
            raise UserError(
                f"--learning_rates wants NAME=RATE,RATE,... with a chosen method ({', '.join(grids)}) and as many "
                f"positive rates as --lr_trials ({n_trials}), got '{override}'."
            )
        grids[name] = grid
    return grids


# --- sizes ----------------------------------------------------------------------------------------------------------


def count_trainable(model: nn.Module) -> int:
    """Number of parameters an optimiser would move."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_for(method: Method, config: PretrainedConfig, size: int, dof: int) -> int:
    """Trainable parameters of a method on an architecture, without allocating any."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    try:
        return count_trainable(method.attach(model, size, dof))
    except ValueError as error:
        raise UserError(f"The method '{method.name}' cannot be attached to {type(model).__name__}: {error}") from error


def default_budget(config: PretrainedConfig, dof: int) -> int:
    """The paper's smallest placement sets the budget: LReg at the head with two components."""
    return count_for(METHODS["lreg-head"], config, 2, dof)


def fit_sizes(methods: Sequence[Method], config: PretrainedConfig, budget: int, dof: int) -> dict[str, int | None]:
    """The largest rank or number of components with which each method stays within the budget."""
    sizes: dict[str, int | None] = {}
    too_big = {}
    for method in methods:
        if method.size_name is None:
            sizes[method.name] = None
            continue
        unit = count_for(method, config, 1, dof)  # the count is proportional to the size
        sizes[method.name] = budget // unit
        if unit > budget:
            too_big[method.name] = unit
    if too_big:
        raise UserError(
            f"A budget of {budget} parameters is impossible: the smallest adapter of "
            + ", ".join(f"{name} has {unit}" for name, unit in too_big.items())
            + f"; give --budget {max(too_big.values())} or more, or leave the method out."
        )
    return sizes


# --- saving ---------------------------------------------------------------------------------------------------------


def save_trained(model: nn.Module, directory: Path) -> int:
    """Save what was trained and nothing else; return the bytes its weights take on disk.

    PEFT adapters and the fully fine-tuned model are saved as such; BitFit and the vocabulary bias have no format of
    their own, so their parameters go into one safetensors file under their names.
    """
    directory.mkdir(parents=True, exist_ok=True)
    trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    if isinstance(model, PeftModel) or len(trained) == len(list(model.parameters())):
        model.save_pretrained(directory)
    else:
        save_file(trained, directory / TRAINED_FILE)
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
