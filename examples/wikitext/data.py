"""Where the text comes from, and how it becomes blocks of tokens.

Three sources, one result: `load_corpus` returns documents for the base stage, for adaptation, for choosing learning
rates (tuning) and for the reported figure (test).
"""

import argparse
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from examples.comparison.environment import load_dataset
from examples.comparison.options import UserError
from examples.wikitext.offline_text import load_offline_text

IGNORED = -100  # label of tokens that need not be found
END_OF_TEXT = "<|endoftext|>"
_PRIME = 1_000_003  # masks follow from seed, epoch and sample by it


@dataclass(frozen=True)
class Corpus:
    """Documents per use; `base` is empty where the base stage has no text of its own."""

    source: str
    base: list[str]
    train: list[str]
    tuning: list[str]
    test: list[str]

    @property
    def _parts(self) -> dict[str, list[str]]:
        return {"base": self.base, "train": self.train, "tuning": self.tuning, "test": self.test}

    def fingerprints(self) -> dict[str, str]:
        """By which two runs can be seen to have used the same text."""
        return {
            name: hashlib.sha256("\0".join(documents).encode()).hexdigest()[:16]
            for name, documents in self._parts.items()
        }

    def describe(self) -> dict[str, dict[str, int | str]]:
        """Size and fingerprint of every part."""
        return {
            name: {
                "documents": len(documents),
                "characters": sum(map(len, documents)),
                "sha256": self.fingerprints()[name],
            }
            for name, documents in self._parts.items()
        }


# --- sources --------------------------------------------------------------------------------------------------------


def load_corpus(options: argparse.Namespace) -> Corpus:
    """Read the text from the hub, from local files or from Python itself, whichever the options name.

    A model that starts from nothing gets docstrings, English of another domain, for its base stage.
    """
    check_source(options)
    max_base_chars = 200_000 if options.smoke else None
    needs_base_text = options.model_name_or_path is None
    if options.dataset_name is not None:
        source = "/".join(filter(None, (options.dataset_name, options.dataset_config_name)))
        train, tuning, test = read_hub_dataset(options.dataset_name, options.dataset_config_name, options.text_column)
    elif options.train_file:
        source = Path(options.train_file).name
        train = [read_text_file(options.train_file)]
        tuning = [read_text_file(options.validation_file)] if options.validation_file else []
        test = [read_text_file(options.test_file)] if options.test_file else []
    else:
        offline = load_offline_text(max_base_chars)
        base = offline.base if needs_base_text else []
        return Corpus("Python's language reference", base, offline.train, offline.tuning, offline.test)

    if not tuning:
        train, tuning = cut(train, 0.9, "training", "--validation_file")
    if not test:
        tuning, test = cut(tuning, 0.5, "validation", "--test_file")
    base = load_offline_text(max_base_chars).base if needs_base_text else []
    limit, eval_limit = options.max_train_chars, options.max_eval_chars
    return Corpus(source, base, [train[0][:limit]], [tuning[0][:eval_limit]], [test[0][:eval_limit]])


def check_source(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other or name half a source."""
    evaluation = (options.validation_file, options.test_file)
    if options.dataset_name is not None and any((options.train_file, *evaluation)):
        raise UserError("Give either --dataset_name or local files, not both.")
    if any(evaluation) and not options.train_file:
        raise UserError("Local text needs a --train_file; it is missing.")
    if options.train_file and not any(evaluation):
        raise UserError("Local text needs a --validation_file or a --test_file beside --train_file; both are missing.")
    if options.dataset_config_name is not None and options.dataset_name is None:
        raise UserError("--dataset_config_name needs --dataset_name.")


def read_hub_dataset(name: str, config: str | None, column: str) -> tuple[list[str], list[str], list[str]]:
    """The train, validation and test texts of a hub data set; test is empty where the data set has none."""
    splits = load_dataset(name, config)
    texts = {}
    for split in ("train", "validation", "test"):
        if split not in splits:
            texts[split] = ""
            continue
        if column not in splits[split].column_names:
            raise UserError(
                f"The data set '{name}' has no column '{column}'; choose one of "
                f"{', '.join(splits[split].column_names)} with --text_column."
            )
        rows = [row for row in splits[split][column] if row]
        if rows and not isinstance(rows[0], str):
            raise UserError(f"The column '{column}' of the data set '{name}' holds no text; choose another.")
        texts[split] = "".join(row if row.endswith("\n") else row + "\n" for row in rows)
    for split in ("train", "validation"):
        if not texts[split].strip():
            raise UserError(f"The data set '{name}' has no text in its split '{split}'.")
    return [texts["train"]], [texts["validation"]], [texts["test"]] if texts["test"].strip() else []


def read_text_file(path: str) -> str:
    """A local UTF-8 text file, refused with one sentence if there is nothing in it to learn from."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"The file '{path}' is not UTF-8 text (byte {error.object[error.start]:#04x} at position "
            f"{error.start}); convert it to UTF-8 first."
        ) from error
    except OSError as error:
        raise UserError(f"The file '{path}' cannot be read: {error.strerror}.") from error
    if not text.strip():
        raise UserError(f"The file '{path}' has no text in it.")
    return text


def cut(documents: list[str], share: float, what: str, instead: str) -> tuple[list[str], list[str]]:
    """Divide one document at the line end after `share` of it."""
    (text,) = documents
    position = text.find("\n", int(len(text) * share)) + 1
    first, second = text[:position], text[position:]
    if not first.strip() or not second.strip():
        raise UserError(
            f"The {what} text has too few lines to be divided into two parts; give more lines, or a {instead}."
        )
    return [first], [second]


# --- tokens ---------------------------------------------------------------------------------------------------------


def train_tokenizer(documents: Iterable[str], vocab_size: int, masked: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE of its own for a model that starts from nothing; every byte has a token, nothing is unknown.

    Args:
        documents: what it learns from.
        vocab_size: of the tokenizer; it has fewer tokens if the text is short.
        masked: whether it is for a masked language model, with RoBERTa's special tokens in RoBERTa's places.
    """
    if masked:
        special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>"}
        names = {**special, "cls_token": "<s>", "sep_token": "</s>"}
    else:
        special = names = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(dict.fromkeys(special.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def encode(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> torch.Tensor:
    """All documents as one row of token ids; several documents are separated by the end-of-text token.

    Line by line, because one call on a whole book is slow and needs memory out of proportion.
    """
    separator = [] if tokenizer.eos_token_id is None or len(documents) < 2 else [tokenizer.eos_token_id]
    ids: list[int] = []
    for document in documents:
        lines = document.splitlines(keepends=True)
        encoded = tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]
        ids.extend(itertools.chain.from_iterable(encoded))
        ids.extend(separator)
    return torch.tensor(ids, dtype=torch.long)


def causal_blocks(tokens: torch.Tensor, block_size: int, what: str) -> list[dict[str, list[int]]]:
    """Whole blocks side by side for a causal language model; the rest that fills no block is left out."""
    blocks = side_by_side(tokens, block_size, what).tolist()
    return [{"input_ids": block, "labels": block} for block in blocks]


def masked_blocks(
    tokens: torch.Tensor, block_size: int, what: str, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """The same for a masked language model: each block between its special tokens, numbered, not masked yet."""
    begin, end = block_ends(tokenizer)
    blocks = side_by_side(tokens, block_size - len(begin) - len(end), what).tolist()
    return [{"input_ids": [*begin, *block, *end], "index": index} for index, block in enumerate(blocks)]


def block_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What stands before and after a block in a masked language model."""
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    return [] if begin is None else [begin], [] if end is None else [end]


def side_by_side(tokens: torch.Tensor, block_size: int, what: str) -> torch.Tensor:
    """[blocks, block size], without the rest."""
    n_blocks = len(tokens) // block_size
    if n_blocks == 0:
        raise UserError(
            f"The {what} text has {len(tokens)} tokens, fewer than one block of {block_size}; "
            "give more text or a smaller --block_size."
        )
    return tokens[: n_blocks * block_size].view(n_blocks, block_size)


class SeededMasking:
    """Transformers' masking of one sample at a time, each with a generator of its own.

    Another method, or another number of processes, changes the order in which random numbers are drawn; with one
    generator for all samples it would also change what has to be found.

    Args:
        tokenizer: with a mask token.
        probability: share of the tokens that have to be found.
        seed: another one gives other masks.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float, seed: int) -> None:
        self._collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability, seed=seed)
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Other masks for the same samples from now on."""
        self._epoch = epoch

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Samples of one length, with `input_ids` and `index`, as masked `input_ids` and `labels`: [batch, block]."""
        masked = [self._mask(sample["input_ids"], sample["index"]) for sample in samples]
        return {name: torch.cat([sample[name] for sample in masked]) for name in ("input_ids", "labels")}

    def _mask(self, ids: list[int], index: int) -> dict[str, torch.Tensor]:
        seed = ((self._seed * _PRIME + self._epoch) * _PRIME + index) % 2**63
        self._collator.generator = torch.Generator().manual_seed(seed)
        return self._collator([{"input_ids": ids}])


def masked_evaluation_batches(
    tokens: torch.Tensor, block_size: int, batch_size: int, tokenizer: PreTrainedTokenizerBase, masking: SeededMasking
) -> list[dict[str, torch.Tensor]]:
    """The whole text as masked batches, every token in one block; the ragged end is a batch of its own.

    The mask of a block depends on `masking` and the number of the block alone, so every method has to find the same
    tokens.
    """
    begin, end = block_ends(tokenizer)
    parts = tokens.split(block_size - len(begin) - len(end))
    samples: list[dict[str, Any]] = [
        {"input_ids": [*begin, *part.tolist(), *end], "index": index} for index, part in enumerate(parts)
    ]
    full = [sample for sample in samples if len(sample["input_ids"]) == block_size]
    groups = [full[start : start + batch_size] for start in range(0, len(full), batch_size)]
    batches = [masking(group) for group in [*groups, samples[len(full) :]] if group]
    if not any((batch["labels"] != IGNORED).any() for batch in batches):
        raise UserError(f"An evaluation text of {len(tokens)} tokens has none to be masked; give more text.")
    return batches


def causal_evaluation_batches(tokens: torch.Tensor, block_size: int, batch_size: int) -> list[dict[str, torch.Tensor]]:
    """The whole text as batches whose labels are the inputs; see `overlapping`."""
    return [{"input_ids": ids, "labels": ids} for ids in overlapping(tokens, block_size, batch_size)]


def overlapping(tokens: torch.Tensor, block_size: int, batch_size: int) -> list[torch.Tensor]:
    """The whole text as [batch, block] tensors, each block starting at the last token of the one before.

    A block predicts every token but its first, so with an overlap of one token each token of the text but the very
    first is predicted exactly once. The ragged end is a batch of its own.
    """
    if len(tokens) < 2:
        raise UserError(f"An evaluation text of {len(tokens)} tokens predicts nothing; give more text.")
    stride = block_size - 1
    n_full = (len(tokens) - 1) // stride
    full = tokens.unfold(0, block_size, stride)[:n_full] if n_full else tokens.new_empty(0, block_size)
    batches = list(full.split(batch_size)) if n_full else []
    rest = tokens[n_full * stride :]  # starts with the last token of the last full block
    if len(rest) > 1:
        batches.append(rest.unsqueeze(0))
    return batches


def unigram_perplexity(train: torch.Tensor, test: torch.Tensor, vocab_size: int) -> float:
    """Perplexity of token frequencies with add-one smoothing: what a model without any context reaches."""
    counts = Counter(train.tolist())
    total = len(train) + vocab_size
    nll = sum(n * -log((counts[token] + 1) / total) for token, n in Counter(test.tolist()).items())
    return exp(nll / len(test))
