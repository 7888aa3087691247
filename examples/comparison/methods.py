"""The methods that are compared, and how each one is attached to the base model. Another method is another entry."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from examples.comparison.options import UserError
from examples.comparison.task import LANGUAGE_MODELS, Task
from lreg_peft import LRegConfig, LRegLayer, initialize_lreg_weights, match_token_frequencies, recommended_config

Batches = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Fit:
    """What an attachment has to know besides the model.

    Attributes:
        task: what is learned.
        size: rank, number of components or parameters; ignored by methods without one.
        n_nodes: nodes per component of LReg.
        steps: training steps that will follow.
        seed: of the run.
    """

    task: Task
    size: int = 1
    n_nodes: int = 2
    steps: int = 1
    seed: int = 0

    @property
    def peft_task(self) -> str | None:
        """As PEFT wants it; it has no class of its own for masked language models, and its general one does."""
        return self.task.task_type if self.task.task_type in ("CAUSAL_LM", "SEQ_CLS") else None

    @property
    def modules_to_save(self) -> list[str] | None:
        """The new modules, as PEFT wants them."""
        return list(self.task.new_modules) or None


Attach = Callable[[PreTrainedModel, Fit, Batches | None], nn.Module]


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        name: what `--methods` calls it.
        summary: one line for the report.
        attach: (model, fit, batches) -> the model to train, with exactly the method's parameters requiring gradients,
            started from a few training batches if it wants to; None for batches where parameters are counted.
        rates: centre of its learning-rate grid, by what a task says in `Task.rates`.
        size_name: what scales its parameter count; None if the count is what it is, "parameters" if its size is the
            number of parameters that it may have.
        n_nodes: nodes per component unless `--n_nodes` says otherwise; None for methods without a mesh.
        tasks: the task types it exists for.
        place: where it goes, of a method that may go to several places.
        is_paper: whether it is the paper's placement, which sets the budget.
        sizes: (model, fit) -> the sizes it can have, by rising counts; None for all whole numbers from one.
        customize: (trainer) -> None, what it wants of the Trainer before the training.
        finish: (model, batches) -> anything, what it does to the model when training is over, with batches it was
            trained on.
        as_lora: whether what it trained is also shown as the LoRA that it converts to.
    """

    name: str
    summary: str
    attach: Attach
    rates: Mapping[str, float]
    size_name: str | None = None
    n_nodes: int | None = None
    tasks: tuple[str, ...] = (*LANGUAGE_MODELS, "SEQ_CLS")
    place: str = ""
    is_paper: bool = False
    sizes: Callable[[PreTrainedModel, Fit], Sequence[int]] | None = None
    customize: Callable[[Any], None] | None = None
    finish: Callable[[nn.Module, Batches], object] | None = None
    as_lora: bool = False


def rates(offline: float, language_model: float, classification: float, small_encoder: float) -> dict[str, float]:
    """Centres of the grids: the tiny offline language model, a pretrained one, a pretrained model as a classifier, an
    encoder of some 20 million parameters as a classifier in a few hundred steps."""
    return {
        "offline": offline,
        "language_model": language_model,
        "classification": classification,
        "small_encoder": small_encoder,
    }


# --- where adapters go ------------------------------------------------------------------------------------------------

#: Endings of the names of the linear layers in the repeated layers: of the attention, of the feed-forward block.
_BERT = (
    ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    ("intermediate.dense", "output.dense"),
)
_LLAMA = (("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"))
_KNOWN = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), _BERT),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "gpt2": (("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj")),
}


def linear_layers(model: PreTrainedModel) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Linear layers of attention and feed-forward block; in an unknown architecture all count as attention."""
    if model.config.model_type in _KNOWN:
        return _KNOWN[model.config.model_type]
    endings: dict[str, None] = {}
    for name, module in model.named_modules():
        inside = [position for position, part in enumerate(name.split(".")) if part.isdigit()]
        if inside and isinstance(module, nn.Linear | Conv1D):
            endings[".".join(name.split(".")[inside[-1] + 1 :])] = None
    return tuple(ending for ending in endings if ending), ()


def layer_sizes(model: PreTrainedModel, size: int, with_head: bool = False) -> dict[str, int]:
    """Rank per layer: `size` on the attention, half of it (rounded up) on the feed-forward block and the head.

    The attention comes first: `output.dense` is also an ending of `attention.output.dense`, and the first match counts.
    """
    attention, feed_forward = linear_layers(model)
    sizes = {**dict.fromkeys(attention, size), **dict.fromkeys(feed_forward, -(-size // 2))}
    if with_head:
        head = model.get_output_embeddings()
        sizes[next(name for name, module in model.named_modules() if module is head)] = -(-size // 2)
    return sizes


# --- methods ----------------------------------------------------------------------------------------------------------


def attach_full(model: PreTrainedModel, fit: Fit, batches: Batches | None) -> nn.Module:
    """Full fine-tuning: every parameter."""
    return model.requires_grad_(True)


def attach_bitfit(model: PreTrainedModel, fit: Fit, batches: Batches | None) -> nn.Module:
    """BitFit: every bias the model has, the new modules, and nothing else."""
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    if not biases:
        raise UserError(f"The method 'bitfit' needs biases, and {type(model).__name__} has none; leave it out.")
    model.requires_grad_(False)
    for parameter in [*biases, *(p for name in fit.task.new_modules for p in model.get_submodule(name).parameters())]:
        parameter.requires_grad_(True)
    return model


def attach_lora(model: PreTrainedModel, fit: Fit, batches: Batches | None) -> nn.Module:
    """LoRA on the attention projections PEFT chooses for the architecture (GPT-2: `c_attn`; BERT: query and value)."""
    known = model.config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    return lora(model, fit, None if known else list(linear_layers(model)[0]), {})


def attach_lora_linear(model: PreTrainedModel, fit: Fit, batches: Batches | None) -> nn.Module:
    """LoRA on all linear layers of the backbone."""
    ranks = layer_sizes(model, fit.size)
    return lora(model, fit, list(ranks), ranks)


def attach_lora_linear_head(model: PreTrainedModel, fit: Fit, batches: Batches | None) -> nn.Module:
    """The same and the layer that makes the logits."""
    ranks = layer_sizes(model, fit.size, with_head=True)
    return lora(model, fit, list(ranks), ranks)


def lora(model: PreTrainedModel, fit: Fit, targets: list[str] | None, ranks: dict[str, int]) -> nn.Module:
    """LoRA with ranks of their own for some modules, with a scale of one in every module."""
    with warnings.catch_warnings():
        quiet_about_lora()
        return get_peft_model(model, lora_config(model, fit, targets, ranks))


def lora_config(model: PreTrainedModel, fit: Fit, targets: list[str] | None, ranks: dict[str, int]) -> LoraConfig:
    """Its configuration."""
    pattern = {name.replace(".", r"\."): rank for name, rank in ranks.items()}  # PEFT reads regular expressions
    return LoraConfig(
        task_type=fit.peft_task,
        r=fit.size,
        lora_alpha=fit.size,  # a scale of one: the learning-rate search does the rest
        lora_dropout=0.0,
        target_modules=targets,
        rank_pattern=pattern,
        alpha_pattern=pattern,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        modules_to_save=fit.modules_to_save,
    )


def quiet_about_lora() -> None:
    """GPT-2 has layers of both layouts, which PEFT sees by itself, and tied heads would only trouble a merge."""
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to|.*tie_word_embeddings|.*tied_target_modules")


def attach_lreg_paper(model: PreTrainedModel, fit: Fit, batches: Batches | None) -> nn.Module:
    """LReg where the paper has it: parallel to the head of a language model; query and key for classification."""
    options: dict[str, Any] = {"n_components": fit.size, "n_nodes": fit.n_nodes, "modules_to_save": fit.modules_to_save}
    return get_peft_model(model, LRegConfig(preset="paper", task_type=fit.peft_task, **options))


def attach_lreg(model: PreTrainedModel, fit: Fit, batches: Batches | None) -> nn.Module:
    """LReg as `recommended_config` has it, filling a budget of `fit.size` parameters, started from data."""
    adapted = get_peft_model(model, recommended(model, fit))
    if batches is not None:
        start_from_data(adapted, batches, fit.seed)
    return adapted


def recommended(model: PreTrainedModel, fit: Fit, **options: Any) -> LRegConfig:
    """The recommended configuration."""
    with warnings.catch_warnings():  # sizes are tried from the smallest on
        warnings.filterwarnings("ignore", message="budget=.* for none inside the network")
        return recommended_config(
            model,
            fit.size,
            task_type=fit.peft_task,
            n_nodes=fit.n_nodes,
            modules_to_save=fit.modules_to_save,
            **options,
        )


def start_from_data(model: nn.Module, batches: Batches, seed: int, head: bool = True) -> None:
    """Projections along gradients, meshes at quantiles, and the start of an adapted output layer or a new head.

    Args:
        model: with an LReg adapter.
        batches: the same on all processes, each of which takes its share.
        seed: of the run.
        head: whether to start output layer or head, too.
    """
    own, n_batches = share_of(batches)
    start = (adapts_output(model) or None) if head else False  # None starts a new head, if there is one
    options: dict[str, Any] = {"n_batches": n_batches, "seed": seed, "start_head": start, "show_progress": False}
    initialize_lreg_weights(model, own, method="gradient", **options)


def calibrate(model: nn.Module, batches: Batches) -> None:
    """What the output shortcut has not learned of token frequencies, in closed form; without one nothing is done."""
    if adapts_output(model):
        own, n_batches = share_of(batches)
        match_token_frequencies(model, own, n_batches=n_batches, show_progress=False)


def adapts_output(model: nn.Module) -> bool:
    """Whether LReg stands beside the layer that makes the logits."""
    return any(isinstance(module, LRegLayer) and module.is_output_layer for module in model.modules())


def share_of(batches: Batches) -> tuple[Batches, int]:
    """This process's share of batches that all have, and the most that any process gets."""
    state = PartialState()
    return batches[state.process_index :: state.num_processes], -(-len(batches) // state.num_processes)


METHODS = {
    method.name: method
    for method in (
        Method("ft", "full fine-tuning", attach_full, rates(2e-3, 5e-4, 5e-5, 1e-4)),
        Method("bitfit", "every bias", attach_bitfit, rates(3e-2, 1e-2, 1e-3, 3e-3)),
        Method(
            "lora", "LoRA on PEFT's choice of attention projections", attach_lora, rates(1e-2, 1e-2, 1e-3, 3e-3), "rank"
        ),
        Method(
            "lora-linear",
            "LoRA on all linear layers",
            attach_lora_linear,
            rates(1e-2, 2e-2, 1e-3, 3e-3),
            "rank",
            tasks=("SEQ_CLS",),
        ),
        Method(
            "lora-linear-head",
            "LoRA on all linear layers and the LM head",
            attach_lora_linear_head,
            rates(2e-2, 2e-2, 1e-3, 3e-3),
            "rank",
            tasks=LANGUAGE_MODELS,
        ),
        Method(
            "lreg-head",
            "LReg at the LM head (the paper's placement)",
            attach_lreg_paper,
            rates(3e-2, 2e-2, 1e-3, 1e-3),
            "n_components",
            n_nodes=2,
            tasks=LANGUAGE_MODELS,
            is_paper=True,
        ),
        Method(
            "lreg-attention",
            "LReg on query and key (the paper's placement)",
            attach_lreg_paper,
            rates(3e-3, 3e-3, 3e-3, 1e-2),
            "n_components",
            n_nodes=6,
            tasks=("SEQ_CLS",),
            is_paper=True,
        ),
        Method(
            "lreg",
            "LReg as recommended: all linear layers (and the LM head), factored with a linear term, started from data",
            attach_lreg,
            rates(2e-2, 2e-2, 2e-3, 3e-3),
            "parameters",
            n_nodes=8,
            finish=calibrate,
            as_lora=True,
        ),
    )
}


def select_methods(
    names: Sequence[str], task_type: str, has_bias: bool = True, known: Mapping[str, Method] = METHODS
) -> list[Method]:
    """The named methods in the order given, each once; without names all that exist for the task.

    Args:
        names: of the methods.
        task_type: of the task.
        has_bias: whether the model has biases, without which there is no BitFit.
        known: the methods to choose from.

    Raises:
        UserError: for a name that is none of these; the message lists them.
    """
    there = {name: method for name, method in known.items() if task_type in method.tasks}
    if task_type == "MASKED_LM":  # its output head is a block, beside which no LoRA can stand
        there = {name: replace(method, as_lora=False) for name, method in there.items()}
    unknown = [name for name in names if name not in there]
    if unknown:
        raise UserError(
            f"There is no method {', '.join(map(repr, unknown))} for {task_type}; the methods are {', '.join(there)}."
        )
    if names:
        return [there[name] for name in dict.fromkeys(names)]
    return [method for method in there.values() if has_bias or method.name != "bitfit"]
