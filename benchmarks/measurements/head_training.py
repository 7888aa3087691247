"""What the comparisons of certified fits with gradient training share: rows, AdamW, and one way to judge both."""

import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lreg_peft import LRegLayer
from lreg_peft.fitting.output_layer import OutputLayer
from lreg_peft.rows import Rows


class StoredRows:
    """Rows in memory that a fit can read again and again."""

    def __init__(self, features: Tensor, targets: Tensor) -> None:
        self.features, self.targets = features, targets

    def chunks(self, rows_per_chunk: int) -> Iterator[Rows]:
        yield from map(Rows, self.features.split(rows_per_chunk), self.targets.split(rows_per_chunk))

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy and accuracy on some rows."""

    loss: float
    accuracy: float


@torch.no_grad()
def score(output: OutputLayer, rows: StoredRows, per_chunk: int = 256) -> Score:
    """Judge the shortcut as it is in the model, whatever put it there."""
    loss = hits = 0.0
    for features, targets in rows.chunks(per_chunk):
        logits = output.output(features).double()
        loss += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        hits += (logits.argmax(1) == targets).sum().item()
    return Score(loss / len(rows), hits / len(rows))


def penalty(output: OutputLayer, ridge: float) -> Tensor:
    """The second term of the objective: `ridge / 2` times the sum of the squared linear weights."""
    return ridge / 2 * output.layer.table(output.adapter_name).square().sum()


def train(
    output: OutputLayer,
    rows: StoredRows,
    *,
    ridge: float,
    rate: float,
    epochs: int,
    batch_size: int,
    projection: bool = False,
    seed: int = 0,
) -> float:
    """AdamW on the objective of the fit, with a linear schedule; returns the CPU seconds it took.

    Args:
        output: the shortcut, from wherever it stands.
        rows: to train on.
        ridge: weight of the penalty, as in the fit.
        rate: the first learning rate.
        epochs: passes over the rows.
        batch_size: rows per step.
        projection: train projection and bias as well.
        seed: of the order.
    """
    layer, name = output.layer, output.adapter_name
    trained = list(layer.lreg_coefficients[name].parameters())
    if projection:
        trained += layer.lreg_projection[name].parameters()
    steps = epochs * -(-len(rows) // batch_size)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    draw = torch.Generator().manual_seed(seed)
    started = time.process_time()
    for _ in tqdm(range(epochs), f"AdamW {rate:g}", leave=False, mininterval=5):
        for chosen in torch.randperm(len(rows), generator=draw).split(batch_size):
            logits = output.output(rows.features[chosen])
            loss = torch.nn.functional.cross_entropy(logits, rows.targets[chosen]) + penalty(output, ridge)
            for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
    seconds = time.process_time() - started
    for parameter in trained:
        parameter.grad = None
    return seconds


def adapter_state(layer: LRegLayer, name: str) -> dict[str, Tensor]:
    """A copy of everything that an adapter of a layer consists of."""
    parts = zip(layer.adapter_layer_names, layer.parts(name), strict=True)
    return {f"{kind}.{key}": value.clone() for kind, part in parts for key, value in part.state_dict().items()}


@torch.no_grad()
def restore(layer: LRegLayer, name: str, state: dict[str, Tensor]) -> None:
    """Put a copy back, in place."""
    for place, value in state.items():
        kind, key = place.split(".")
        getattr(getattr(layer, kind)[name], key).copy_(value)


def provenance(settings: dict[str, Any]) -> dict[str, Any]:
    """What stands beside figures."""
    names = ("torch", "transformers", "peft")
    return {
        "command": " ".join(Path(part).name if "/" in part else part for part in sys.argv),  # names, not places
        "settings": settings,
        "device": f"{platform.machine()} CPU, fp32, {torch.get_num_threads()} thread",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
    }


def save(folder: Path, name: str, report: dict[str, Any], text: str) -> None:
    """Write what was found as JSON and as Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
