"""Where the tuners of PEFT go in a model: names, widths and sizes of the modules they stand on."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from examples.comparison.methods import Fit, layer_sizes, linear_layers
from examples.comparison.task import longest_sequence

WITH_HEAD = "linear layers and head"  # of language models alone
LINEAR, ATTENTION, ATTENTION_OUTPUT = "linear layers", "attention", "attention output"
NORMS, EMBEDDING, INPUT = "normalisations", "embedding", "before the input"
#: From the widest to the narrowest: where LReg's recipe goes, and where a tuner goes that is too large for that.
ALL_PLACEMENTS = (WITH_HEAD, LINEAR, ATTENTION, ATTENTION_OUTPUT)


@dataclass(frozen=True)
class Site:
    """One model about to be adapted, in one placement."""

    model: PreTrainedModel
    fit: Fit
    placement: str

    @property
    def size(self) -> int:
        """The size of the tuner."""
        return self.fit.size

    @property
    def is_empty(self) -> bool:
        """Whether the model has no weights, so that its parameters can be counted and nothing else."""
        return next(self.model.parameters()).is_meta

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Size per module as the recipe has it: half of it, rounded up, on feed-forward block and head."""
        sizes = layer_sizes(self.model, self.size, with_head=self.placement == WITH_HEAD)
        attention, _ = linear_layers(self.model)
        if self.placement in (ATTENTION, ATTENTION_OUTPUT):
            names = attention if self.placement == ATTENTION else attention[-1:]
            sizes = {name: sizes[name] for name in names}
        return sizes

    @property
    def targets(self) -> list[str]:
        """The modules, as endings of their names."""
        return list(self.sizes)

    @property
    def pattern(self) -> dict[str, int]:
        """Their sizes, as PEFT wants them."""
        return {name.replace(".", r"\."): size for name, size in self.sizes.items()}

    @property
    def modules(self) -> list[nn.Module]:
        """The modules themselves."""
        return [
            module
            for name, module in self.model.named_modules()
            if any(name == ending or name.endswith(f".{ending}") for ending in self.targets)
        ]

    @cached_property
    def shapes(self) -> list[tuple[int, int]]:
        """[outputs, inputs] of every module."""
        return [(module.out_features, module.in_features) for module in self.modules]  # type: ignore[misc]

    @property
    def inputs_share(self) -> int:
        """Greatest common divisor of all numbers of inputs."""
        return gcd(*(inside for _, inside in self.shapes))

    @property
    def outputs_share(self) -> int:
        """Greatest common divisor of all numbers of outputs."""
        return gcd(*(outside for outside, _ in self.shapes))

    @property
    def least_width(self) -> int:
        """The largest rank that every module can have."""
        return min(min(shape) for shape in self.shapes)

    @property
    def free_positions(self) -> int:
        """Tokens the model has positions for beside those of the longest sample."""
        return (longest_sequence(self.model.config) or 1024) - (self.fit.task.longest_sample or 0)

    @property
    def common(self) -> dict[str, Any]:
        """What every configuration of PEFT wants."""
        return {"task_type": self.fit.peft_task, "modules_to_save": self.fit.modules_to_save}


def divisors(number: int, least: int = 1) -> Sequence[int]:
    """All divisors from `least` on, the smallest first."""
    return [divisor for divisor in range(least, number + 1) if number % divisor == 0]
