"""One training run with Trainer, one evaluation over a whole text, one progress bar for everything."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, isfinite
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, reduce
from errors import UserError
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


@dataclass(frozen=True)
class TrainSettings:
    """What all training runs share, whatever the method."""

    batch_size: int
    output_dir: Path


def start_processes() -> PartialState:
    """Join the other processes, if a launcher started several; the first thing a run does.

    Where there is no accelerator this says so: Accelerate would otherwise take the processes of a launcher that did not
    pass `--cpu` on for as many separate runs.
    """
    wants_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=wants_cpu)


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

    def step(self) -> None:
        """One training step is done."""
        self._bar.update()

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._is_main:
            self._bar.write(text)

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


class StepClock(TrainerCallback):
    """Times every optimiser step, from its first batch to its end, and moves the progress bar."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: list[float] = []
        self._progress = progress
        self._start = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start of a step."""
        self._start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End of a step; an accelerator is waited for, since its work is only queued until then."""
        if args.device.type != "cpu":
            torch.accelerator.synchronize()
        self.seconds.append(time.perf_counter() - self._start)
        self._progress.step()


def train(
    model: nn.Module,
    blocks: Sequence[dict[str, list[int]]],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    settings: TrainSettings,
    progress: Progress,
) -> list[float]:
    """Train what requires gradients, in place; return the seconds of every step.

    The order of the data depends on `seed` alone. The batch is divided among the processes, so that their number does
    not change what a step sees.
    """
    state = PartialState()
    if settings.batch_size % state.num_processes:
        raise UserError(f"--batch_size {settings.batch_size} cannot be divided among {state.num_processes} processes.")
    clock = StepClock(progress)
    arguments = TrainingArguments(
        output_dir=str(settings.output_dir),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size // state.num_processes,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, steps // 10),
        weight_decay=0.0,
        seed=seed,
        data_seed=seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        label_names=["labels"],
        use_cpu=state.device.type == "cpu",
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=state.device.type != "cpu",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=list(blocks), callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.seconds


@torch.no_grad()
def perplexity(model: nn.Module, batches: Sequence[torch.Tensor]) -> float:
    """exp of the mean negative log likelihood over all predicted tokens of all batches (and all processes).

    Sums are float64, so the figure does not depend on how the text is divided among processes. A model that diverged
    has infinite perplexity.
    """
    state = PartialState()
    model.eval()
    device = next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64, device=device)  # negative log likelihood, tokens
    for ids in batches[state.process_index :: state.num_processes]:
        ids = ids.to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # [batch, block - 1, vocabulary]
        nll = functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        total[0] += nll.double().sum()
        total[1] += nll.numel()
    total = reduce(total, reduction="sum")
    mean = (total[0] / total[1]).item()
    # Above 700 the exponential leaves float64; such a model is as useless as one with NaN.
    return exp(mean) if isfinite(mean) and mean < 700 else inf
