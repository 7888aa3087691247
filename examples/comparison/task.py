"""What a script has to say about its task: its model, its data and its figures, the same for all methods."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

LANGUAGE_MODELS = ("CAUSAL_LM", "MASKED_LM")


@dataclass(frozen=True)
class Metric:
    """One column of the table.

    Attributes:
        name: its key in what `Task.evaluate` returns.
        higher_is_better: which way it should go.
        digits: after the point in the table.
        scale: what the table multiplies it with: 100 for a share shown in per cent.
    """

    name: str
    higher_is_better: bool
    digits: int = 2
    scale: float = 1.0

    def score(self, value: float) -> float:
        """The same with higher always better; a figure that is no number is worst of all."""
        if value != value:
            return float("-inf")
        return value if self.higher_is_better else -value

    def show(self, value: float) -> str:
        """As the table has it."""
        return f"{value * self.scale:.{self.digits}f}"


class Task(ABC):
    """One task.

    Attributes:
        script: name of the file that is run, for the record.
        title: heading of table and picture.
        task_type: CAUSAL_LM, MASKED_LM or SEQ_CLS.
        auto_class: the Auto class of the model.
        config: its configuration, without dropout.
        rates: which centres of the learning-rate grids apply.
        metrics: what the table shows; the first one decides.
        unit: what a sample consists of, for the speed: tokens or samples.
        units_per_sample: how many of them.
        train_data: the samples, in a sequence.
        train_lengths: their lengths, if batches are to be made of samples of similar length.
        longest_sample: tokens of the longest of them; None where that is not known.
        start_samples: how many of them a start from data sees.
        base_steps: training steps before the methods start, 0 for none.
        has_base_row: whether the model means something before any method has trained it.
    """

    script: str
    title: str
    task_type: str
    auto_class: Any
    config: PretrainedConfig
    rates: str
    metrics: tuple[Metric, ...]
    unit: Literal["tokens", "samples"]
    units_per_sample: int = 1
    train_data: Sequence[dict[str, Any]]
    train_lengths: Sequence[int] | None = None
    longest_sample: int | None = None
    start_samples: int = 32
    base_steps: int = 0
    has_base_row: bool = True

    def empty_model(self) -> PreTrainedModel:
        """The architecture on the meta device."""
        with torch.device("meta"):
            return self.auto_class.from_config(self.config)

    @cached_property
    def new_modules(self) -> tuple[str, ...]:
        """Modules without pretrained weights, which every method trains in full: the head of a classifier."""
        if self.task_type in LANGUAGE_MODELS:
            return ()
        model = self.empty_model()
        return tuple(
            name for name, child in model.named_children()
            if name != model.base_model_prefix and any(True for _ in child.parameters())
        )  # fmt: skip

    def metric_score(self, figures: dict[str, float]) -> float:
        """The figure that decides, with higher always better."""
        return self.metrics[0].score(figures[self.metrics[0].name])

    def collator(self, seed: int) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]] | None:
        """What makes a batch of samples, reproducible from `seed`; None takes the samples as they are.

        If it has a method `set_epoch`, that is called with the number of each epoch before its first batch.
        """
        return None

    def loss(self) -> Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor] | None:
        """(outputs, labels, number of labels in the whole batch) -> training loss; None takes the model's own."""
        return None

    def make_base(self, train: Callable[[PreTrainedModel, Sequence[dict[str, Any]], float], nn.Module]) -> None:
        """The base stage: make what `load_base` loads, by `train(model, samples, learning_rate)` where needed.

        Called once; not called again when an interrupted comparison is resumed.
        """
        return

    @abstractmethod
    def load_base(self) -> PreTrainedModel:
        """A fresh copy of the base model on this process's device; new modules follow torch's seed."""

    @abstractmethod
    def evaluate(self, model: nn.Module, split: Literal["tuning", "test"]) -> dict[str, float]:
        """All metrics over the whole split, the same on every process; must put the model into eval mode."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that moves the figures and is no option of the comparison: model, data, lengths."""

    def references(self) -> dict[str, float]:
        """Figures to read the table against, in the metric that decides: a trivial predictor, for example."""
        return {}

    def describe(self) -> dict[str, Any]:
        """What else the record should hold: sizes and fingerprints of the data."""
        return {}


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """The same configuration without dropout, changed in place: all methods train as the paper trains LReg."""
    for option, value in vars(config).items():
        if isinstance(value, float) and (
            "dropout" in option or option.endswith("_pdrop") or option.startswith("drop_")
        ):
            setattr(config, option, 0.0)
    return config


def longest_sequence(config: PretrainedConfig) -> int | None:
    """Tokens a model has positions for; RoBERTa counts its positions from the one after the padding token."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and "roberta" in config.model_type:
        return positions - config.pad_token_id - 1
    return positions
