"""One training run with Trainer, and one progress bar for everything."""

import random
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from examples.comparison.options import UserError
from examples.comparison.task import Task

START_BATCH = 8  # samples in a batch of a start from data
KEPT_BATCHES = 32  # batches of a run, the last ones, that a method may see again when training is over
STRETCH = 50  # batches' worth of random samples that are sorted together by their lengths


@dataclass(frozen=True)
class Settings:
    """What all training runs share, whatever the method."""

    batch_size: int
    output_dir: Path
    accumulation: int = 1
    bf16: bool = False

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

    def __init__(self, total_steps: int, enabled: bool) -> None:
        self._is_main = PartialState().is_main_process
        self._bar = tqdm(total=total_steps, disable=not (self._is_main and enabled), unit="step", mininterval=1.0)
        self.stage, self.advance, self.close = self._bar.set_description, self._bar.update, self._bar.close

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._is_main:
            self._bar.write(text)


class StepClock(TrainerCallback):
    """Times every optimiser step, from its first batch to its end, moves the progress bar, numbers the epochs."""

    def __init__(self, progress: Progress, collator: Any) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self._progress, self._epoch = progress, 0
        self._set_epoch = getattr(collator, "set_epoch", lambda epoch: None)
        self._began = self._cpu_began = 0.0

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Before the first batch of an epoch is made."""
        self._set_epoch(self._epoch)
        self._epoch += 1

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start of a step."""
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def on_step_end(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        """End of a step; an accelerator is waited for, since its work is only queued until then."""
        if args.device.type != "cpu":
            torch.accelerator.synchronize()
        self.seconds.append(time.perf_counter() - self._began)
        self.cpu_seconds.append(time.process_time() - self._cpu_began)
        self._progress.advance()


@dataclass(frozen=True)
class Training:
    """What a training run took.

    Attributes:
        seconds: of all steps together.
        cpu_seconds: processor time of each step, over all threads of this process.
        step_seconds: median of a step.
        batches: the last ones that the model was trained on, the same on all processes.
        state: what was trained, whole, where it was sharded over processes.
    """

    seconds: float
    cpu_seconds: list[float]
    step_seconds: float
    batches: list[dict[str, Any]]
    state: dict[str, Tensor] | None


class LengthGroupedSampler(Sampler[int]):
    """Every sample once per epoch, in batches of samples of similar length, the batches in random order.

    Args:
        lengths: of the samples.
        batch_size: samples in a step over all processes.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._random = lengths, batch_size, random.Random(seed)

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        order = self._random.sample(range(len(self)), len(self))
        size, stretch = self._batch_size, STRETCH * self._batch_size
        batches = []
        for first in range(0, len(order), stretch):
            alike = sorted(order[first : first + stretch], key=lambda position: self._lengths[position])
            batches += [alike[start : start + size] for start in range(0, len(alike), size)]
        # The incomplete batch stays last: anywhere else it would shift the borders of those behind it.
        whole = [batch for batch in batches if len(batch) == size]
        self._random.shuffle(whole)
        rest = [batch for batch in batches if len(batch) < size]
        return (position for batch in [*whole, *rest] for position in batch)


class _Trainer(Trainer):
    """Trainer with an order of the samples, where one is given, that keeps the last batches."""

    order: LengthGroupedSampler | None = None
    kept: deque[dict[str, Any]]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """A step on one batch, or on a part of it."""
        self.kept.append(dict(inputs))
        return super().training_step(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:  # Trainer's own seam
        return self.order or super()._get_train_sampler(train_dataset)


def train(
    model: nn.Module,
    task: Task,
    settings: Settings,
    progress: Progress,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    samples: Sequence[dict[str, Any]] | None = None,
    customize: Any = None,
) -> Training:
    """Train what requires gradients, in place.

    The order of the data depends on `seed` alone. The batch is divided among the processes, so that their number does
    not change what a step sees.

    Args:
        model: what is trained.
        task: its data, collator and loss.
        settings: of all runs.
        progress: moved on by every step.
        steps: of the optimiser.
        learning_rate: its peak, after a tenth of the steps; then it falls linearly.
        seed: of the order of the data.
        samples: in place of the training data of the task.
        customize: (trainer) -> None, called before the training.
    """
    state = PartialState()
    samples, lengths = (task.train_data, task.train_lengths) if samples is None else (samples, None)
    if len(samples) < settings.batch_size:
        raise UserError(
            f"There are {len(samples)} training samples, fewer than --batch_size {settings.batch_size}; give more data "
            "or a smaller batch."
        )
    collator = task.collator(seed)
    clock = StepClock(progress, collator)
    arguments = TrainingArguments(
        output_dir=str(settings.output_dir),
        max_steps=steps,
        per_device_train_batch_size=settings.per_device,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, steps // 10),
        weight_decay=0.0,
        bf16=settings.bf16,
        seed=seed,
        data_seed=seed,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
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
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=samples,
        data_collator=collator,
        compute_loss_func=task.loss(),
        callbacks=[clock],
    )
    trainer.kept = deque(maxlen=KEPT_BATCHES * settings.accumulation)  # as many samples, however they are taken
    if lengths is not None:
        trainer.order = LengthGroupedSampler(lengths, settings.batch_size, seed)
    if customize is not None:
        customize(trainer)
    if trainer.is_fsdp_enabled:
        shard_by_layer(model)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    batches = _of_all_processes(list(trainer.kept))
    return Training(sum(clock.seconds), clock.cpu_seconds, median(clock.seconds), batches, whole_state(model))


def _of_all_processes(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The shares that the processes had of each batch, put together again in the order of the ranks."""
    shares = gather_object([[{name: values.cpu() for name, values in batch.items()} for batch in batches]])
    return [
        {name: _joined([share[name] for share in parts]).to(PartialState().device) for name in parts[0]}
        for parts in zip(*shares, strict=True)
    ]


def _joined(shares: list[Tensor]) -> Tensor:
    """Rows of tensors that were padded to different lengths; what is added is hidden by an attention mask of zeros."""
    longest = max(share.shape[-1] for share in shares)
    rows = [share if share.ndim < 2 else F.pad(share, (0, longest - share.shape[-1])) for share in shares]
    return torch.cat(rows)


def batches_to_start_from(task: Task, seed: int, n_samples: int) -> list[dict[str, Tensor]]:
    """A few training samples in batches on this process's device, the same on all processes."""
    state = PartialState()
    collate = task.collator(seed) or default_data_collator
    return [
        {name: values.to(state.device) for name, values in collate([task.train_data[i] for i in batch]).items()}
        for batch in start_batches(n_samples, len(task.train_data), seed, state.num_processes)
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


# --- parameters that are sharded over processes -----------------------------------------------------------------------


def shard_by_layer(model: nn.Module) -> None:
    """Prepare a model for FSDP2 in Accelerate 1.15, which shards word embeddings and output layer by themselves.

    The other units are to be the layers, and not the embeddings of BERT and RoBERTa: these would be sharded twice, and
    torch refuses that. It also refuses a parameter in two places, unless embeddings and output layer share it.
    """
    backbone: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    units = getattr(backbone, "_no_split_modules", None) or ()
    backbone._no_split_modules = [name for name in units if not name.endswith("Embeddings")]  # what Accelerate reads
    ends = (backbone.get_input_embeddings(), backbone.get_output_embeddings())
    weights = {getattr(module, "weight", None) for module in ends}
    names: dict[nn.Parameter, str] = {}
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        if names.setdefault(parameter, name) != name and parameter not in weights:
            raise UserError(
                f"FSDP cannot shard {type(backbone).__name__}: '{names[parameter]}' and '{name}' are one parameter. "
                "Use data parallelism, configs/accelerate_ddp.yaml."
            )


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """What was trained, and the nodes of all meshes, whole and on the CPU; None where nothing is sharded."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    nodes = re.compile(r"\.lreg_encoder\..*\.nodes$")
    tensors = {name: buffer for name, buffer in model.named_buffers() if nodes.search(name)}
    tensors |= {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()
        for name, tensor in tensors.items()
    }


@torch.no_grad()
def put_back(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Give an equally attached model the values of `whole_state`."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, values in state.items():
        own[name].copy_(values)
    return model
