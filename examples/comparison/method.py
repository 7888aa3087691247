"""What a method of the comparison is: how it is attached, how it is sized, where its learning rates lie."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

LANGUAGE_MODELS = ("CAUSAL_LM", "MASKED_LM")
CLASSIFICATION = ("SEQ_CLS",)
EVERYWHERE = LANGUAGE_MODELS + CLASSIFICATION
#: No task type of PEFT: it has none for images.
IMAGES = ("IMAGE_CLS",)

#: A placement that only language models have; in a classification model it is the same as that without the head.
WITH_HEAD = "linear layers and head"

Batches = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Fit:
    """What an attachment has to know besides the model.

    Attributes:
        task_type: CAUSAL_LM, MASKED_LM, SEQ_CLS or IMAGE_CLS.
        size: rank or number of components; ignored by methods without one.
        n_nodes: nodes per component of LReg.
        new_modules: modules without pretrained weights (a classification head), trained in full by every method.
        placement: one of the method's placements; ignored by methods that have none.
        longest: tokens of the longest sample, None where that is not known.
        steps: training steps that will follow, None where only parameters are counted.
    """

    task_type: str
    size: int = 1
    n_nodes: int = 2
    new_modules: tuple[str, ...] = ()
    placement: str = ""
    longest: int | None = None
    steps: int | None = None

    @property
    def modules_to_save(self) -> list[str] | None:
        """The same as PEFT wants it."""
        return list(self.new_modules) or None


@dataclass(frozen=True)
class Rates:
    """Centres of the learning-rate grids, by what is adapted.

    Attributes:
        offline: the tiny language model made offline.
        language_model: a pretrained one.
        classification: a pretrained model as a classifier.
        small_encoder: an encoder of some 20 million parameters as a classifier, in a few hundred steps.
        images: a classifier of images.
    """

    offline: float
    language_model: float
    classification: float
    small_encoder: float
    images: float = 1e-3

    @classmethod
    def of_images(cls, rate: float) -> "Rates":
        """Of a method that exists for images alone."""
        return cls(rate, rate, rate, rate, rate)


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        name: what `--methods` calls it.
        summary: one line for the report.
        attach: (model, fit) -> the model to train, with exactly the method's parameters requiring gradients.
        rates: centres of its learning-rate grids.
        size_name: what scales its parameter count, or None if the count is what it is.
        n_nodes: nodes per component unless `--n_nodes` says otherwise; None for methods without a mesh.
        start: "gradient" if the adapter wants to see data before training; "gradient and output" if also the shortcut
            on a language model's head, or a new head, starts from them.
        tasks: the task types it exists for.
        needs_block: whether the architecture must have its feed-forward block as one module.
        beyond_budget: whether a study shows it however many parameters it has, for comparison.
        keeps_head: whether it needs a classifier that is not new to the model.
        by_default: whether it is compared where no methods are named.
        placements: where it may go, the preferred place first; the first one where it fits into the budget counts.
        sizes: (model, fit) -> the sizes it can have, in the order of their counts; None for all whole numbers from one.
        fills_budget: whether its size is the number of parameters that it may have.
        reads_weights: whether its parameters can only be counted on a model that has weights.
        attach_on_data: like `attach`, with a few training batches, for methods whose start is made from data.
        after_step: (model, step) -> None, what the method does after each optimiser step, its gradients still there.
        faster: part of the names of the parameters that learn faster than the others, and how many times faster.
        finish: (model, batches) -> anything, what the method does to the model when training is over, with batches it
            was trained on.
        as_lora: whether what it trained is also shown as the LoRA that it converts to.
    """

    name: str
    summary: str
    attach: Callable[[PreTrainedModel, Fit], nn.Module]
    rates: Rates
    size_name: str | None = None
    n_nodes: int | None = None
    start: Literal["gradient", "gradient and output"] | None = None
    tasks: tuple[str, ...] = EVERYWHERE
    needs_block: bool = False
    beyond_budget: bool = False
    keeps_head: bool = False
    by_default: bool = True
    placements: tuple[str, ...] = ("",)
    sizes: Callable[[PreTrainedModel, Fit], Sequence[int]] | None = None
    fills_budget: bool = False
    reads_weights: bool = False
    attach_on_data: Callable[[PreTrainedModel, Fit, Batches], nn.Module] | None = None
    after_step: Callable[[nn.Module, int], None] | None = None
    faster: tuple[str, float] | None = None
    finish: Callable[[nn.Module, Batches], object] | None = None
    as_lora: bool = False

    def places(self, task_type: str) -> tuple[str, ...]:
        """Where it may go in a task."""
        return tuple(place for place in self.placements if place != WITH_HEAD or task_type in LANGUAGE_MODELS)
