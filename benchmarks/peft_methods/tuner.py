"""What a tuner of PEFT is to the comparison, and the configurations that most of them have in common."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from comparison.base_layers import linear_instead_of_conv1d, untie_head
from comparison.method import EVERYWHERE, Batches, Fit, Method, Rates
from comparison.site import ALL_PLACEMENTS, Site

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
        reads_weights, after_step, faster: as in `Method`.
        start: makes a LoRA from training batches.
    """

    name: str
    summary: str
    config: Callable[[Site], PeftConfig]
    rate: float
    size_name: str | None = "r"
    sizes: Callable[[Site], Sequence[int]] | None = up_to_width
    placements: tuple[str, ...] = ALL_PLACEMENTS
    tasks: tuple[str, ...] = EVERYWHERE
    changes_weights: bool = False
    reads_weights: bool = False
    start: Start | None = None
    after_step: Callable[[nn.Module, int], None] | None = None
    faster: tuple[str, float] | None = None

    def prepared(self, model: PreTrainedModel) -> PreTrainedModel:
        """The base model as the tuner needs it, with the same function."""
        linear_instead_of_conv1d(model)
        return untie_head(model) if self.changes_weights else model

    def attach(self, model: PreTrainedModel, fit: Fit) -> nn.Module:
        """The tuner in the model, without a start from data."""
        with quiet():
            return get_peft_model(self.prepared(model), self.config(Site(model, fit)))

    def attach_on_data(self, model: PreTrainedModel, fit: Fit, batches: Batches) -> nn.Module:
        """The tuner in the model, started from batches."""
        assert self.start is not None
        with quiet():
            return self.start(self.prepared(model), self.config(Site(model, fit)), batches)

    def sizes_at(self, model: PreTrainedModel, fit: Fit) -> Sequence[int]:
        """The sizes it can have."""
        assert self.sizes is not None
        return self.sizes(Site(linear_instead_of_conv1d(model), fit))

    def method(self) -> Method:
        """The same as a row of the comparison."""
        return Method(
            self.name,
            self.summary,
            self.attach,
            # The ratios that LoRA's own centres have.
            Rates(self.rate, self.rate, self.rate / 20, self.rate / 6),
            self.size_name,
            tasks=self.tasks,
            by_default=False,
            placements=self.placements,
            sizes=None if self.sizes is None or self.size_name is None else self.sizes_at,
            reads_weights=self.reads_weights,
            attach_on_data=None if self.start is None else self.attach_on_data,
            after_step=self.after_step,
            faster=self.faster,
        )


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
