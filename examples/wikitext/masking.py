"""Dynamic masking that can be repeated: the mask of a sample follows from seed, epoch and the sample's number."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

_PRIME = 1_000_003


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
