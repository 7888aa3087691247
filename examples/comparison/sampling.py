"""The order of the training samples where they are of unequal length."""

import itertools
import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

STRETCH = 50  # batches' worth of random samples that are sorted together


class LengthGroupedSampler(Sampler[int]):
    """Every sample once per epoch, in batches of samples of similar length, the batches in random order.

    Transformers' sampler of that name goes from long to short within stretches of fifty batches, so that an epoch ends
    on the shortest samples, and draws from the global generator.

    Args:
        lengths: of the samples.
        batch_size: samples in a step over all processes.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size = lengths, batch_size
        self._random = random.Random(seed)

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        order = self._random.sample(range(len(self)), len(self))
        stretch = STRETCH * self._batch_size
        batches = []
        for first in range(0, len(order), stretch):
            alike = sorted(order[first : first + stretch], key=lambda position: self._lengths[position])
            batches += [alike[start : start + self._batch_size] for start in range(0, len(alike), self._batch_size)]
        # The incomplete batch stays last: anywhere else it would shift the borders of those behind it.
        whole = [batch for batch in batches if len(batch) == self._batch_size]
        self._random.shuffle(whole)
        rest = [batch for batch in batches if len(batch) < self._batch_size]
        return itertools.chain.from_iterable([*whole, *rest])
