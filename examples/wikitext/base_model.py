"""The checkpoint every method starts from: given or trained from nothing, saved once, loaded afresh for every run."""

from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from arguments import Arguments
from data import Corpus, encode, train_tokenizer, training_blocks
from errors import UserError
from hub import load_pretrained
from training import Progress, TrainSettings, train
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

DROPOUT_OPTIONS = (
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "attention_dropout",
    "hidden_dropout",
    "dropout",
)

# GPT-2's own 0.02 is meant for widths of 768 and more: at width 128 it learns more slowly (measured after 400 steps:
# perplexity 237 against 168).
INITIALIZER_RANGE = 0.06


def prepare_tokenizer(arguments: Arguments, corpus: Corpus, base_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a given model, or one trained on the base and training text only; saved in `base_dir`."""
    state = PartialState()
    name = arguments.model.model_name_or_path
    if name is not None:
        tokenizer = load_pretrained(AutoTokenizer, name)
    elif state.is_main_process:
        tokenizer = train_tokenizer(corpus.base + corpus.train, arguments.scale.vocab_size)
    if state.is_main_process:
        tokenizer.save_pretrained(base_dir)
    state.wait_for_everyone()
    return AutoTokenizer.from_pretrained(base_dir)


def prepare_base(
    arguments: Arguments,
    config: PretrainedConfig,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    base_dir: Path,
    settings: TrainSettings,
    progress: Progress,
) -> None:
    """Load or create the model, run the base stage, save the result in `base_dir`."""
    state = PartialState()
    set_seed(arguments.comparison.seeds[0])
    name = arguments.model.model_name_or_path
    if name is not None:
        model = load_pretrained(AutoModelForCausalLM, name, config=config, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(config)
    if arguments.model.base_steps:
        progress.stage("base stage")
        text = corpus.base or corpus.train
        train(
            model,
            training_blocks(encode(tokenizer, text), arguments.data.block_size, "base" if corpus.base else "training"),
            steps=arguments.model.base_steps,
            learning_rate=arguments.model.base_learning_rate,
            seed=arguments.comparison.seeds[0],
            settings=settings,
            progress=progress,
        )
    if state.is_main_process:
        model.save_pretrained(base_dir)
    state.wait_for_everyone()


def base_config(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Architecture of the base model, without dropout: LReg keeps the backbone in eval mode, the others would not."""
    name, scale, block_size = arguments.model.model_name_or_path, arguments.scale, arguments.data.block_size
    if name is None:
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
    else:
        config = load_pretrained(AutoConfig, name)
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and block_size > longest:
            raise UserError(f"--block_size {block_size} is more than the {longest} positions of '{name}'.")
    for option in DROPOUT_OPTIONS:
        if isinstance(getattr(config, option, None), float):
            setattr(config, option, 0.0)
    return config


def load_base(base_dir: Path) -> PreTrainedModel:
    """A fresh copy of the base checkpoint on this process's device."""
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    return model.to(PartialState().device)
