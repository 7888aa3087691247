"""Which model: its kind, its architecture without dropout, its tokenizer."""

from pathlib import Path

from accelerate import PartialState
from arguments import Arguments
from comparison.architecture import longest_sequence, without_dropout
from comparison.errors import UserError
from comparison.hub import load_pretrained
from data import Corpus, train_tokenizer
from transformers import AutoConfig, AutoTokenizer, GPT2Config, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

# GPT-2's own 0.02 is meant for widths of 768 and more: at width 128 it learns more slowly (measured after 400 steps:
# perplexity 237 against 168).
INITIALIZER_RANGE = 0.06


def is_masked(arguments: Arguments) -> bool:
    """Whether the model is a masked language model: what it was saved as, or what its architecture is made for."""
    config = given_config(arguments)
    if config is None:
        return False
    saved_as = (getattr(config, "architectures", None) or [""])[0]
    if saved_as.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM")):
        return saved_as.endswith("ForMaskedLM")
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if not masked and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"A model of type '{config.model_type}' is no language model that predicts tokens; give another."
        )
    return masked


def given_config(arguments: Arguments) -> PretrainedConfig | None:
    """The architecture that the options name; None for the small GPT-2."""
    name, architecture = arguments.model.model_name_or_path, arguments.model.architecture
    if name is not None:
        return load_pretrained(AutoConfig, name)
    if architecture is None:
        return None
    try:
        return AutoConfig.for_model(architecture)
    except ValueError as error:
        raise UserError(
            f"Transformers has no model type '{architecture}'; --architecture takes gpt2, roberta, ..."
        ) from error


def base_config(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Architecture of the base model, without dropout, for all methods."""
    block_size = arguments.data.block_size or 0
    config = given_config(arguments)
    if config is None:
        scale = arguments.scale
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=block_size,
            n_embd=scale.hidden_size,
            n_layer=scale.n_layers,
            n_head=4,
            initializer_range=INITIALIZER_RANGE,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    longest = longest_sequence(config)
    if longest is not None and block_size > longest:
        name = arguments.model.model_name_or_path or config.model_type
        raise UserError(f"--block_size {block_size} is more than the {longest} positions of '{name}'.")
    return without_dropout(config)


def prepare_tokenizer(arguments: Arguments, corpus: Corpus, masked: bool, base_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a given model, or one trained on the base and training text only; saved in `base_dir`."""
    state = PartialState()
    name = arguments.model.model_name_or_path
    if state.is_main_process:
        if name is not None:
            tokenizer = load_pretrained(AutoTokenizer, name)
        else:
            tokenizer = train_tokenizer(corpus.base + corpus.train, arguments.scale.vocab_size, masked)
        tokenizer.save_pretrained(base_dir)
    state.wait_for_everyone()
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    if masked and tokenizer.mask_token_id is None:
        raise UserError(f"The tokenizer of '{name}' has no mask token, which a masked language model needs.")
    return tokenizer
