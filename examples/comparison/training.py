"""One training run with Trainer, and one progress bar for everything."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from comparison.errors import UserError
from comparison.method import Batches
from comparison.sampling import LengthGroupedSampler
from comparison.sharding import shard_by_layer
from comparison.trained_state import State, put_back, trained_state
from lreg_peft import initialize_lreg_weights
from lreg_peft.tuner.hooks.output_head import wrapped_head

START_BATCH = 8  # samples in a batch of a start from data
KEPT_BATCHES = 32  # batches of a run, the last ones, that a method may see again when training is over


@dataclass(frozen=True)
class TrainSettings:
    """What all training runs share, whatever the method."""

    batch_size: int
    output_dir: Path
    accumulation: int = 1
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    bf16: bool = False
    report_to: tuple[str, ...] = ("none",)

    @property
    def per_device(self) -> int:
        """Samples one process takes at a time."""
        parts = PartialState().num_processes * self.accumulation
        if self.batch_size % parts:
            raise UserError(
                f"--batch_size {self.batch_size} cannot be divided among {PartialState().num_processes} processes"
                + (f" and {self.accumulation} accumulation steps." if self.accumulation > 1 else ".")
            )
        return self.batch_size // parts


class Progress:
    """One bar over all training steps of the comparison, on the main process only."""

    def __init__(self, total_steps: int, is_main: bool, enabled: bool) -> None:
        self._is_main = is_main
        self._bar = tqdm(
            total=total_steps,
            disable=not (is_main and enabled),
            unit="step",
            mininterval=1.0,
            dynamic_ncols=True,
        )

    def stage(self, description: str) -> None:
        """Name what is running now."""
        self._bar.set_description(description)

    def advance(self, steps: int = 1) -> None:
        """Training steps that are done, or need not be done."""
        self._bar.update(steps)

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._is_main:
            self._bar.write(text)

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


class StepClock(TrainerCallback):
    """Times every optimiser step, from its first batch to its end, moves the progress bar, numbers the epochs."""

    def __init__(self, progress: Progress, collator: Any) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self._progress = progress
        self._set_epoch = getattr(collator, "set_epoch", None)
        self._epoch = 0
        self._start = self._cpu_start = 0.0

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first batch of an epoch is made."""
        if self._set_epoch is not None:
            self._set_epoch(self._epoch)
        self._epoch += 1

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start of a step."""
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End of a step; an accelerator is waited for, since its work is only queued until then."""
        if args.device.type != "cpu":
            torch.accelerator.synchronize()
        self.seconds.append(time.perf_counter() - self._start)
        self.cpu_seconds.append(time.process_time() - self._cpu_start)
        self._progress.advance()


class AfterStep(TrainerCallback):
    """Lets a method do its own after each optimiser step, while the gradients are still there."""

    def __init__(self, act: Callable[[nn.Module, int], None]) -> None:
        self._act = act

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """The step that has just been taken, counted from one."""
        self._act(model, state.global_step + 1)


class KeepBest(TrainerCallback):
    """Evaluates every so many steps and after the last, keeps the best state, and stops a run that has ceased to gain.

    The same rule for every method. Ties go to the earlier step.

    Args:
        every: steps between evaluations.
        patience: evaluations without improvement that end the run; None never ends it.
        evaluate: the figures of a model on the tuning split.
        score: one number from the figures, higher is better.
    """

    def __init__(
        self,
        every: int,
        patience: int | None,
        evaluate: Callable[[nn.Module], dict[str, float]],
        score: Callable[[dict[str, float]], float],
    ) -> None:
        self._every, self._patience = every, patience
        self._evaluate, self._score = evaluate, score
        self._in_vain = 0
        self._best_score = float("-inf")
        self.best_step = 0
        self.curve: list[tuple[int, dict[str, float]]] = []
        self.figures: dict[str, float] | None = None
        self.state: State | None = None
        self.report: Callable[[dict[str, float]], None] = lambda figures: None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Evaluate if it is time."""
        if state.global_step % self._every and state.global_step < state.max_steps:
            return
        figures = self._evaluate(model)
        self.report(figures)
        self.curve.append((state.global_step, figures))
        if self.figures is None or self._score(figures) > self._best_score:
            self._best_score, self._in_vain = self._score(figures), 0
            self.figures, self.best_step, self.state = figures, state.global_step, trained_state(model)
            return
        self._in_vain += 1
        if self._patience is not None and self._in_vain >= self._patience:
            control.should_training_stop = True


@dataclass(frozen=True)
class Training:
    """What a training run took.

    Attributes:
        seconds: of all steps together.
        step_seconds: median of a step.
        steps: optimiser steps.
        cpu_seconds: processor time of each step, over all threads of this process.
        batches: the last ones that the model was trained on, where they are to be kept: the same on all processes.
    """

    seconds: float
    step_seconds: float
    steps: int
    cpu_seconds: list[float]
    batches: list[dict[str, Any]]


class _Trainer(Trainer):
    """Trainer with an order of the samples and learning rates of some parameters, where these are given."""

    slow: tuple[tuple[str, ...], float] | None = None  # modules, learning rate
    faster: tuple[str, float] | None = None  # part of the names, factor on the learning rate
    order: LengthGroupedSampler | None = None
    kept: deque[dict[str, Any]] | None = None  # the last batches

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As there."""
        if self.kept is not None:
            self.kept.append(dict(inputs))
        return super().training_step(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        return self.order or super()._get_train_sampler(train_dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The usual optimiser, with the given modules and parameters in groups of their own."""
        optimizer = super().create_optimizer(model)
        named = list((self.model if model is None else model).named_parameters())
        if self.faster is not None:
            part, factor = self.faster
            own = {parameter for name, parameter in named if part in name}
            _set_apart(optimizer, own, factor * self.args.learning_rate)
        if self.slow is not None:
            modules, rate = self.slow
            _set_apart(optimizer, {parameter for name, parameter in named if set(modules) & set(_prefixes(name))}, rate)
        return optimizer


def _set_apart(optimizer: torch.optim.Optimizer, own: set[nn.Parameter], rate: float) -> None:
    for group in list(optimizer.param_groups):
        taken = [parameter for parameter in group["params"] if parameter in own]
        group["params"] = [parameter for parameter in group["params"] if parameter not in own]
        if taken:
            optimizer.add_param_group({**group, "params": taken, "lr": rate})


def _prefixes(name: str) -> list[str]:
    """All runs of parts of a parameter's name, which wrappers lengthen at both ends, but for those with the last."""
    parts = name.split(".")
    return [".".join(parts[start:end]) for start in range(len(parts)) for end in range(start + 1, len(parts))]


def train(
    model: nn.Module,
    samples: Sequence[dict[str, Any]],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    settings: TrainSettings,
    progress: Progress,
    name: str,
    collator: Any = None,
    loss: Any = None,
    keep_best: KeepBest | None = None,
    fixed_rate: tuple[tuple[str, ...], float] | None = None,
    lengths: Sequence[int] | None = None,
    faster: tuple[str, float] | None = None,
    after_step: Callable[[nn.Module, int], None] | None = None,
    keep_batches: bool = False,
) -> Training:
    """Train what requires gradients, in place.

    The order of the data depends on `seed` alone. The batch is divided among the processes, so that their number does
    not change what a step sees.

    Args:
        name: of the run, for trackers.
        collator: makes a batch of samples; None takes them as they are.
        loss: (outputs, labels, number of labels in the whole batch) -> loss; None takes the model's own.
        keep_best: if given, evaluates during training; the model ends in its best state.
        fixed_rate: modules and the learning rate they have whatever `learning_rate` is.
        lengths: of the samples, if batches are to be made of samples of similar length.
        faster: part of the names of parameters, and how many times `learning_rate` they have.
        after_step: (model, step) -> None, called after each optimiser step.
        keep_batches: keep the last batches for what follows the training.
    """
    state = PartialState()
    if len(samples) < settings.batch_size:
        raise UserError(
            f"There are {len(samples)} training samples, fewer than --batch_size {settings.batch_size}; give more data "
            "or a smaller batch."
        )
    clock = StepClock(progress, collator)
    tracked = settings.report_to != ("none",)
    arguments = TrainingArguments(
        output_dir=str(settings.output_dir / "tracking" / name if tracked else settings.output_dir),
        run_name=name,
        max_steps=steps,
        per_device_train_batch_size=settings.per_device,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, int(steps * settings.warmup_ratio)),
        weight_decay=settings.weight_decay,
        bf16=settings.bf16,
        seed=seed,
        data_seed=seed,
        logging_strategy="steps" if tracked else "no",
        logging_steps=10,
        save_strategy="no",
        report_to=list(settings.report_to),
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        label_names=["labels"],
        remove_unused_columns=False,  # samples hold what the model takes
        use_cpu=state.device.type == "cpu",
        ddp_find_unused_parameters=False,
        dataloader_drop_last=True,  # an incomplete batch is filled up where there are several processes, and else not
        dataloader_pin_memory=state.device.type != "cpu",
    )
    callbacks = [clock, *([keep_best] if keep_best else []), *([AfterStep(after_step)] if after_step else [])]
    try:
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=samples,
            data_collator=collator,
            compute_loss_func=loss,
            callbacks=callbacks,
        )
    except (RuntimeError, ValueError) as error:
        if not tracked:
            raise
        # A tracker that does not exist or is not installed.
        raise UserError(f"--report_to {' '.join(settings.report_to)}: {str(error).splitlines()[0]}") from error
    trainer.slow, trainer.faster = fixed_rate, faster
    if keep_batches:
        trainer.kept = deque(maxlen=KEPT_BATCHES * settings.accumulation)  # as many samples, however they are taken
    if lengths is not None:
        trainer.order = LengthGroupedSampler(lengths, settings.batch_size, seed)
    if trainer.is_fsdp_enabled:
        shard_by_layer(model)
    trainer.remove_callback(PrinterCallback)
    if keep_best is not None:
        keep_best.report = lambda figures: trainer.log({f"eval_{key}": value for key, value in figures.items()})
    trainer.train()
    if keep_best is not None and keep_best.state is not None:
        put_back(model, keep_best.state)
    batches = _of_all_processes(list(trainer.kept or ()))
    return Training(sum(clock.seconds), median(clock.seconds), len(clock.seconds), clock.cpu_seconds, batches)


def _of_all_processes(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The shares that the processes had of each batch, put together again in the order of the ranks."""
    shares = gather_object([[{name: values.cpu() for name, values in batch.items()} for batch in batches]])
    return [
        {name: torch.cat([share[name] for share in whole]).to(PartialState().device) for name in whole[0]}
        for whole in zip(*shares, strict=True)
    ]


def start_from_data(
    model: nn.Module, samples: Sequence[dict[str, Any]], collator: Any, seed: int, n_samples: int, *, output: bool
) -> None:
    """The data-driven start of an LReg adapter from a few training samples.

    Every process takes its share of the batches.

    Args:
        output: start the shortcut on the output head from label frequencies, and a new head from the features, where
            there is one.
    """
    start = output and (wrapped_head(model.get_base_model()) is not None or None)  # type: ignore[operator]
    own, n_batches = share_of(batches_to_start_from(samples, collator, seed, n_samples))
    initialize_lreg_weights(
        model, own, method="gradient", n_batches=n_batches, seed=seed, start_head=start, show_progress=False
    )


def share_of(batches: Batches) -> tuple[Batches, int]:
    """This process's share of batches that all have, and the most that any process gets."""
    state = PartialState()
    return batches[state.process_index :: state.num_processes], -(-len(batches) // state.num_processes)


def batches_to_start_from(
    samples: Sequence[dict[str, Any]], collator: Any, seed: int, n_samples: int
) -> list[dict[str, torch.Tensor]]:
    """A few training samples in batches on this process's device, the same on all processes."""
    state = PartialState()
    collate = collator or default_data_collator
    return [
        {name: values.to(state.device) for name, values in collate([samples[index] for index in batch]).items()}
        for batch in start_batches(n_samples, len(samples), seed, state.num_processes)
    ]


def start_batches(n_samples: int, n_available: int, seed: int, num_processes: int) -> list[list[int]]:
    """Positions of some samples in batches, at least one for every process.

    The batches are formed before they are dealt out: a loss is a mean over its batch, and what the start sees must not
    depend on the number of processes, unless there are too many of them for whole batches.
    """
    n_samples = min(max(n_samples, num_processes), n_available)
    size = min(START_BATCH, n_samples // num_processes)
    order = torch.randperm(n_available, generator=torch.Generator().manual_seed(seed)).tolist()[:n_samples]
    return [order[first : first + size] for first in range(0, len(order), size)]
