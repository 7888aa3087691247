"""What a tuner of PEFT is to the comparison, and the configurations that most of them have in common."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.peft_methods.base_layers import linear_instead_of_conv1d, untie_head
from benchmarks.peft_methods.site import ALL_PLACEMENTS, WITH_HEAD, Site
from examples.comparison.methods import Batches, Fit, Method, rates
from examples.comparison.task import LANGUAGE_MODELS

Start = Callable[[PreTrainedModel, LoraConfig, Batches], nn.Module]


def up_to_width(site: Site) -> Sequence[int]:
    """Ranks up to the smallest width: a larger one adds nothing that could be expressed."""
    return range(1, site.least_width + 1)


@dataclass(frozen=True)
class Tuner:
    """One tuner of PEFT, or one way to start or train it.

    Attributes:
        name: what `--methods` calls it.
        summary: one line for the report.
        config: its configuration at a site.
        rate: centre of the learning rates for a pretrained language model.
        size_name: what its size is; None if its count is what it is.
        sizes: the sizes it can have at a site, in the order of their counts; None for 1, 2, 3, ...
        placements: where it may go.
        tasks: the task types it exists for.
        changes_weights: whether the frozen weights change under it, so that a tied head needs its own.
        reads_weights: whether its parameters can only be counted on a model that has weights.
        after_step: (model, step) -> None, what it does after each optimiser step, its gradients still there.
        faster: part of the names of the parameters that learn faster than the others, and how many times faster.
        start: makes a LoRA from training batches.
    """

    name: str
    summary: str
    config: Callable[[Site], PeftConfig]
    rate: float
    size_name: str | None = "r"
    sizes: Callable[[Site], Sequence[int]] | None = up_to_width
    placements: tuple[str, ...] = ALL_PLACEMENTS
    tasks: tuple[str, ...] = (*LANGUAGE_MODELS, "SEQ_CLS")
    changes_weights: bool = False
    reads_weights: bool = False
    start: Start | None = None
    after_step: Callable[[nn.Module, int], None] | None = None
    faster: tuple[str, float] | None = None

    def prepared(self, model: PreTrainedModel) -> PreTrainedModel:
        """The base model as the tuner needs it, with the same function."""
        linear_instead_of_conv1d(model)
        return untie_head(model) if self.changes_weights else model

    def attach(self, placement: str, model: PreTrainedModel, fit: Fit, batches: Batches | None) -> nn.Module:
        """The tuner in the model, started from batches if it has such a start and they are given."""
        with quiet():
            config = self.config(Site(self.prepared(model), fit, placement))
            if self.start is not None and batches is not None:
                return self.start(model, config, batches)
            return get_peft_model(model, config)

    def sizes_at(self, placement: str, model: PreTrainedModel, fit: Fit) -> Sequence[int]:
        """The sizes it can have."""
        assert self.sizes is not None
        return self.sizes(Site(linear_instead_of_conv1d(model), fit, placement))

    def methods(self) -> list[Method]:
        """The same as rows of the comparison, one for each place."""
        own_sizes = self.size_name is not None and self.sizes is not None
        return [
            Method(
                self.name,
                self.summary,
                partial(self.attach, place),
                # The ratios that LoRA's own centres have.
                rates(self.rate, self.rate, self.rate / 20, self.rate / 6),
                self.size_name,
                tasks=tuple(task for task in self.tasks if place != WITH_HEAD or task in LANGUAGE_MODELS),
                place=place,
                sizes=partial(self.sizes_at, place) if own_sizes else None,
                customize=customized(self.after_step, self.faster),
            )
            for place in self.placements
        ]


def customized(
    after_step: Callable[[nn.Module, int], None] | None = None, faster: tuple[str, float] | None = None
) -> Callable[[Any], None] | None:
    """What makes a Trainer call something after each step, or lets some parameters learn faster."""
    if after_step is None and faster is None:
        return None

    def customize(trainer: Any) -> None:
        if after_step is not None:
            trainer.add_callback(AfterStep(after_step))
        if faster is not None:
            part, factor = faster
            optimizer = trainer.create_optimizer()
            own = {parameter for name, parameter in trainer.model.named_parameters() if part in name}
            for group in list(optimizer.param_groups):
                taken = [parameter for parameter in group["params"] if parameter in own]
                group["params"] = [parameter for parameter in group["params"] if parameter not in own]
                if taken:
                    optimizer.add_param_group({**group, "params": taken, "lr": factor * group["lr"]})

    return customize


class AfterStep(TrainerCallback):
    """Lets a method do its own after each optimiser step, while the gradients are still there."""

    def __init__(self, act: Callable[[nn.Module, int], None]) -> None:
        self._act = act

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """The step that has just been taken, counted from one."""
        self._act(model, state.global_step + 1)


class quiet(warnings.catch_warnings):
    """Without what PEFT has to say about configurations that are what they should be."""

    def __enter__(self) -> None:
        super().__enter__()
        # Tied heads, which only merging would trouble; random projections that are made anew when an adapter is loaded;
        # a CUDA extension that is not there.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"peft\.")
        warnings.filterwarnings("ignore", message=".*on meta device")
        warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")


# --- configurations -------------------------------------------------------------------------------------------------


def lora(**options: Any) -> Callable[[Site], LoraConfig]:
    """LoRA with options; a scale of one in every module, the learning-rate search does the rest."""

    def config(site: Site) -> LoraConfig:
        given = dict(options)
        if site.is_empty:  # parameters are counted: no start that reads weights
            given.pop("init_lora_weights", None)
        return LoraConfig(
            r=site.size,
            lora_alpha=site.size,
            target_modules=site.targets,
            rank_pattern=site.pattern,
            alpha_pattern=site.pattern,
            **given,
            **site.common,
        )

    return config


def of(kind: type[PeftConfig], size: str | None = "r", **options: Any) -> Callable[[Site], PeftConfig]:
    """A configuration whose size is one option; options that are functions are asked about the site."""

    def config(site: Site) -> PeftConfig:
        given = {name: value(site) if callable(value) else value for name, value in options.items()}
        if size is not None:
            given[size] = site.size
        return kind(target_modules=site.targets, **given, **site.common)

    return config


def prompt(kind: type[PeftConfig], size: str = "num_virtual_tokens", **options: Any) -> Callable[[Site], PeftConfig]:
    """A configuration of something that stands before the input."""
    return lambda site: kind(**{size: site.size}, **options, task_type=site.common["task_type"])
