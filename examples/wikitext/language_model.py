"""The task: a language model, its text and its perplexity. Causal or masked, whichever the model is."""

import argparse
from collections.abc import Callable, Sequence
from math import exp, inf, isfinite
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from examples.comparison.environment import load_pretrained
from examples.comparison.options import UserError
from examples.comparison.task import Metric, Task, longest_sequence, without_dropout
from examples.wikitext.data import (
    IGNORED,
    SeededMasking,
    causal_blocks,
    causal_evaluation_batches,
    encode,
    load_corpus,
    masked_blocks,
    masked_evaluation_batches,
    train_tokenizer,
    unigram_perplexity,
)

Batch = dict[str, torch.Tensor]
EVALUATION_SEED = 0  # of the masks that every method is evaluated on


class LanguageModelTask(Task):
    """Adapt a language model to a text.

    Args:
        args: all options.
    """

    script = "run_wikitext.py"
    metrics = (Metric("perplexity", higher_is_better=False),)
    unit = "tokens"

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._name, self._base_dir = args, args.model_name_or_path, Path(args.output_dir) / "base"
        self._corpus = corpus = load_corpus(args)
        given = given_config(args)
        masked = given is not None and is_masked(given)
        self.title = f"Adaptation to: {corpus.source}"
        self.task_type = "MASKED_LM" if masked else "CAUSAL_LM"
        self.auto_class = AutoModelForMaskedLM if masked else AutoModelForCausalLM
        self._tokenizer = self._prepare_tokenizer(masked)
        self.config = without_dropout(given or small_config(self._tokenizer, args.block_size, args.smoke))
        longest = longest_sequence(self.config)
        if longest is not None and args.block_size > longest:
            name = self._name or self.config.model_type
            raise UserError(f"--block_size {args.block_size} is more than the {longest} positions of '{name}'.")
        self.rates = "offline" if given is None else "language_model"
        self.base_steps = args.base_steps
        self.units_per_sample = self.longest_sample = self._block_size = args.block_size
        self._tokens = {name: encode(self._tokenizer, getattr(corpus, name)) for name in ("train", "tuning", "test")}
        self.train_data = self._blocks(self._tokens["train"], "training")
        self._evaluation = {split: self._batches(self._tokens[split]) for split in ("tuning", "test")}

    def _prepare_tokenizer(self, masked: bool) -> PreTrainedTokenizerBase:
        """That of a given model, or one trained on the base and training text only; saved beside the base model."""
        if PartialState().is_main_process:
            if self._name is not None:
                tokenizer = load_pretrained(AutoTokenizer, self._name)
            else:
                vocab_size = 512 if self._args.smoke else 2048
                tokenizer = train_tokenizer(self._corpus.base + self._corpus.train, vocab_size, masked)
            tokenizer.save_pretrained(self._base_dir)
        PartialState().wait_for_everyone()
        tokenizer = AutoTokenizer.from_pretrained(self._base_dir)
        if masked and tokenizer.mask_token_id is None:
            raise UserError(f"The tokenizer of '{self._name}' has no mask token, which a masked language model needs.")
        return tokenizer

    # --- text -------------------------------------------------------------------------------------------------------

    def _blocks(self, tokens: torch.Tensor, what: str) -> Sequence[dict[str, Any]]:
        if self.task_type == "MASKED_LM":
            return masked_blocks(tokens, self._block_size, what, self._tokenizer)
        return causal_blocks(tokens, self._block_size, what)

    def _batches(self, tokens: torch.Tensor) -> list[Batch]:
        batch_size = self._args.batch_size
        if self.task_type == "MASKED_LM":
            masking = self._masking(EVALUATION_SEED)
            return masked_evaluation_batches(tokens, self._block_size, batch_size, self._tokenizer, masking)
        return causal_evaluation_batches(tokens, self._block_size, batch_size)

    def _masking(self, seed: int) -> SeededMasking:
        return SeededMasking(self._tokenizer, self._args.mlm_probability, seed)

    def collator(self, seed: int) -> Callable[[list[dict[str, Any]]], Batch] | None:
        """Masks, for a masked language model."""
        return self._masking(seed) if self.task_type == "MASKED_LM" else None

    def loss(self) -> Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor] | None:
        """The mean over the masked tokens of the whole batch, which no process alone can know."""
        return masked_loss if self.task_type == "MASKED_LM" else None

    # --- model ------------------------------------------------------------------------------------------------------

    @property
    def _is_made_here(self) -> bool:
        return self._name is None or self.base_steps > 0

    def make_base(self, train: Callable[[PreTrainedModel, Sequence[dict[str, Any]], float], nn.Module]) -> None:
        """Train a model from nothing, or a given one further; a given one without base steps is used as it is."""
        if not self._is_made_here:
            return
        model = self.auto_class.from_config(self.config) if self._name is None else self._load(self._name)
        documents = self._corpus.base or self._corpus.train
        blocks = self._blocks(encode(self._tokenizer, documents), "base" if self._corpus.base else "training")
        trained: Any = train(model, blocks, self._args.base_learning_rate)
        if PartialState().is_main_process:
            trained.save_pretrained(self._base_dir)

    def load_base(self) -> PreTrainedModel:
        """A fresh copy on this process's device."""
        model = self._load(str(self._base_dir) if self._is_made_here else str(self._name))
        return model.to(PartialState().device)

    def _load(self, name: str) -> PreTrainedModel:
        return load_pretrained(self.auto_class, name, config=self.config, dtype=torch.float32)

    # --- figures ----------------------------------------------------------------------------------------------------

    def evaluate(self, model: nn.Module, split: Literal["tuning", "test"]) -> dict[str, float]:
        """Perplexity over the whole split."""
        return {"perplexity": perplexity(model, self._evaluation[split], self.task_type == "CAUSAL_LM")}

    def references(self) -> dict[str, float]:
        """What token frequencies alone reach on the test text."""
        frequencies = unigram_perplexity(self._tokens["train"], self._tokens["test"], len(self._tokenizer))
        return {"unigram model on the test text": frequencies}

    def settings(self) -> dict[str, Any]:
        """Model and text."""
        args = self._args
        return {
            "model_name_or_path": self._name,
            "architecture": args.architecture,
            "smoke": args.smoke,
            "base_steps": self.base_steps,
            "base_learning_rate": args.base_learning_rate if self.base_steps else None,
            "task_type": self.task_type,
            "mlm_probability": args.mlm_probability if self.task_type == "MASKED_LM" else None,
            "block_size": args.block_size,
            "text": self._corpus.fingerprints(),
        }

    def describe(self) -> dict[str, Any]:
        """Sizes and fingerprints of the texts."""
        return {"text": self._corpus.describe(), "tokens": {name: len(ids) for name, ids in self._tokens.items()}}


def given_config(args: argparse.Namespace) -> PretrainedConfig | None:
    """The architecture that the options name; None for the small GPT-2."""
    if args.model_name_or_path is not None:
        return load_pretrained(AutoConfig, args.model_name_or_path)
    if args.architecture is None:
        return None
    try:
        return AutoConfig.for_model(args.architecture)
    except ValueError as error:
        raise UserError(
            f"Transformers has no model type '{args.architecture}'; --architecture takes gpt2, roberta, ..."
        ) from error


def is_masked(config: PretrainedConfig) -> bool:
    """Whether the model is a masked language model: what it was saved as, or what its architecture is made for."""
    saved_as = (getattr(config, "architectures", None) or [""])[0]
    if saved_as.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM")):
        return saved_as.endswith("ForMaskedLM")
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if not masked and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"A model of type '{config.model_type}' is no language model that predicts tokens; give another."
        )
    return masked


def small_config(tokenizer: PreTrainedTokenizerBase, block_size: int, smoke: bool) -> PretrainedConfig:
    """The small GPT-2 that is trained from nothing."""
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=block_size,
        n_embd=64 if smoke else 128,
        n_layer=2,
        n_head=4,
        # GPT-2's own 0.02 is meant for widths of 768 and more: at width 128 it learns more slowly (measured after 400
        # steps: perplexity 237 against 168).
        initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def masked_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    """Negative log likelihood of the masked tokens of one process's share, over the number of all of them."""
    total = functional.cross_entropy(
        outputs["logits"].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / num_items_in_batch


@torch.no_grad()
def perplexity(model: nn.Module, batches: Sequence[Batch], causal: bool) -> float:
    """exp of the mean negative log likelihood over all tokens to be found in all batches (and all processes).

    Sums are float64, so the figure does not depend on how the text is divided among processes. A model that diverged
    has infinite perplexity.

    Args:
        model: a language model.
        batches: of `input_ids` and `labels`.
        causal: whether a label is found one position earlier.
    """
    if not batches:
        raise UserError("There is no text to evaluate on.")
    state = PartialState()
    model.eval()
    device = next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64, device=device)  # negative log likelihood, tokens
    for first in range(0, len(batches), state.num_processes):
        # Every process takes part in every round, which sharded models need; past the end it does not count.
        index = first + state.process_index
        batch = {name: tensor.to(device) for name, tensor in batches[min(index, len(batches) - 1)].items()}
        options = {"use_cache": False} if causal else {}
        logits = model(input_ids=batch["input_ids"], **options).logits  # [batch, block, vocabulary]
        labels = batch["labels"]
        logits = logits[:, -labels.shape[1] :]  # a prompt that was learned stands before the text
        if causal:
            labels = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if index < len(batches):
            # One sample at a time, for the processor's cache: three times as fast as all logits at once.
            for sample, wanted in zip(logits, labels, strict=True):
                nll = functional.cross_entropy(sample.float(), wanted, ignore_index=IGNORED, reduction="none")
                total[0] += nll.double().sum()
                total[1] += (wanted != IGNORED).sum()
    total = reduce(total, reduction="sum")
    mean = (total[0] / total[1]).item()
    # Above 700 the exponential leaves float64; such a model is as useless as one with NaN.
    return exp(mean) if isfinite(mean) and mean < 700 else inf
