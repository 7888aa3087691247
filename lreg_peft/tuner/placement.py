"""What a model says of itself: its task, its output head, its linear layers; and the paper's placement for the task."""

import inspect

from torch import nn
from transformers import PreTrainedModel

from .config import LRegConfig
from .image_placements import image_placement
from .sizes import linear_sizes

# Query and key projections, the placement of Li, Cheng & Gu (2025) for classification. Fused projections are taken
# whole: a shortcut around them also reaches the values.
_ATTENTION_PROJECTIONS = {
    "albert": ["query", "key"],
    "bert": ["query", "key"],
    "camembert": ["query", "key"],
    "deberta": ["in_proj"],
    "deberta-v2": ["query_proj", "key_proj"],
    "distilbert": ["q_lin", "k_lin"],
    "electra": ["query", "key"],
    "gemma": ["q_proj", "k_proj"],
    "gemma2": ["q_proj", "k_proj"],
    "gemma3_text": ["q_proj", "k_proj"],
    "gpt2": ["c_attn"],
    "gpt_neo": ["q_proj", "k_proj"],
    "gpt_neox": ["query_key_value"],
    "llama": ["q_proj", "k_proj"],
    "mistral": ["q_proj", "k_proj"],
    "modernbert": ["Wqkv"],
    "opt": ["q_proj", "k_proj"],
    "phi3": ["qkv_proj"],
    "qwen2": ["q_proj", "k_proj"],
    "qwen3": ["q_proj", "k_proj"],
    "roberta": ["query", "key"],
    "t5": ["q", "k"],
    "vit": ["q_proj", "k_proj", "query", "key"],  # two generations of names
    "xlm-roberta": ["query", "key"],
}
LANGUAGE_MODEL_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
_CLASSIFICATION_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


def paper_targets(model: nn.Module, config: LRegConfig) -> list[str]:
    """The placement of the paper for the task of `config`, or of the model's class if it names none.

    Language models: the whole head that ends in the output embedding. Classification of text: the attention query and
    key projections. Image models: see `image_placements`; `config` gets the feature source that belongs to one.

    Raises:
        ValueError: if there is no default for this model; the message lists module names that could be given.
    """
    task = config.task_type or task_of(model)
    if task in LANGUAGE_MODEL_TASKS or task == "MASKED_LM":
        head = output_head_name(model)
        if head is not None and config.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform has no effect on the default target {head!r}, which lies in no layer. "
                "Name the target_modules inside the layers, or leave layers_to_transform out."
            )
        if head is not None:
            return [head]
    elif task in _CLASSIFICATION_TASKS:
        trains_head = config.task_type in ("SEQ_CLS", "TOKEN_CLS") or bool(config.modules_to_save)
        if (placement := image_placement(model, trains_head)) is not None:
            names, sources = placement
            config.feature_source = config.feature_source or sources
            return names
        model_type = str(getattr(getattr(model, "config", None), "model_type", None))
        there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        projections = [name for name in _ATTENTION_PROJECTIONS.get(model_type, ()) if name in there]
        if projections:
            return projections
    raise ValueError(
        f"no default target_modules for {type(model).__name__} (task_type={config.task_type}). Set "
        f"LRegConfig(target_modules=...) to names from this model, for example: {', '.join(nameable_modules(model))}."
    )


def task_of(model: nn.Module) -> str | None:
    """The task of a model by the name of its class, as PEFT calls it, or "MASKED_LM"; None if it does not say."""
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")):
        return "MASKED_LM" if name.endswith("ForMaskedLM") else "CAUSAL_LM"
    for ending, task in (
        ("ForSequenceClassification", "SEQ_CLS"),
        ("ForImageClassification", "SEQ_CLS"),
        ("ForMultipleChoice", "SEQ_CLS"),
        ("ForTokenClassification", "TOKEN_CLS"),
        ("ForQuestionAnswering", "QUESTION_ANS"),
        ("Model", "FEATURE_EXTRACTION"),
    ):
        if name.endswith(ending):
            return task
    return None


def check_task(model: nn.Module, config: LRegConfig) -> None:
    """Raise a `ValueError` if a language model is to be a classifier: PEFT would notice when it computes the loss."""
    if config.task_type in ("SEQ_CLS", "TOKEN_CLS") and task_of(model) in (*LANGUAGE_MODEL_TASKS, "MASKED_LM"):
        kind = "SequenceClassification" if config.task_type == "SEQ_CLS" else "TokenClassification"
        raise ValueError(
            f"task_type={str(config.task_type)!r} is about a classifier, and {type(model).__name__} is a language "
            f"model: load the base with AutoModelFor{kind}.from_pretrained(..., num_labels=...), or give the task_type "
            "of a language model."
        )


def output_head_name(model: nn.Module) -> str | None:
    """Name of the direct child of `model` that holds its output embedding: `lm_head`, `cls`, ...; None without one.

    The child rather than the embedding itself: the masked language model head of RoBERTa or BERT is a block (dense,
    norm, decoder), and the shortcut runs parallel to all of it. A block that takes more than the features has an
    output that is more than logits: there it is the embedding.
    """
    embedding = output_embedding(model)
    if embedding is None:
        return None
    name, block = next(
        ((name, child) for name, child in model.named_children() if embedding in set(child.modules())), (None, None)
    )
    if block is None or block is embedding or not _takes_more_than_features(block):
        return name
    return next(path for path, module in model.named_modules() if module is embedding)


def _takes_more_than_features(block: nn.Module) -> bool:
    """Whether a block has a second input. XLM's head takes the labels and returns the loss before the logits."""
    kinds = [parameter.kind for parameter in inspect.signature(block.forward).parameters.values()]
    return kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) > 1


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The output embedding of a Transformers model; None without one."""
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


def nameable_modules(model: nn.Module, limit: int = 12) -> list[str]:
    """Distinct last parts of the names of the modules that can be targeted without further information."""
    endings: dict[str, None] = {}
    for name, module in model.named_modules():
        if name and linear_sizes(module) is not None:
            ending = name.rpartition(".")[2]
            endings[name if ending.isdigit() else ending] = None
    return list(endings)[:limit] or [name for name, _ in model.named_children()][:limit]
