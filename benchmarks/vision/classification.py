"""The task: an image and its class."""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel

from benchmarks.vision.base_model import offline_config, pretrain
from benchmarks.vision.gallery import GALLERY_FILE, write_gallery
from benchmarks.vision.images import Samples, preparation
from benchmarks.vision.sources import Data, class_names, labelled_images, offline_digits
from examples.comparison.environment import load_pretrained
from examples.comparison.task import Metric, Task, without_dropout

#: Whose predictions are shown, the first that was compared.
SHOWN = ("lreg-conv", "lreg-stage", "lreg-classifier", "lora-conv")
EVALUATION_BATCH = 64
OFFLINE_NAME = "ResNet trained on scikit-learn's digits"


class ImageTask(Task):
    """Adapt an image classifier.

    Args:
        data: images and classes.
        config: of the model, with these classes.
        source: hub id or folder of the model; None for the offline ResNet.
        has_new_head: whether the classes are others than those the model was trained for.
        offline_data: what the offline ResNet is adapted to.
        base_steps: its training steps.
        base_dir: where it is kept.
        show_progress: show a bar while it trains.
    """

    script = "run_vision.py"
    task_type = "IMAGE_CLS"
    auto_class = AutoModelForImageClassification
    rates = "images"
    unit = "samples"
    start_samples = 128  # each has one label only
    metrics = (Metric("accuracy", True, scale=100.0),)

    def __init__(
        self,
        data: Data,
        config: PretrainedConfig,
        source: str | None,
        *,
        has_new_head: bool,
        offline_data: str,
        base_steps: int,
        base_dir: Path,
        show_progress: bool,
    ) -> None:
        self.data, self.config, self._source = data, config, source
        self._offline_data, self._base_steps, self._base_dir = offline_data, base_steps, base_dir
        self._show_progress = show_progress
        self.has_base_row = not has_new_head
        self._name = OFFLINE_NAME if source is None else Path(source).name
        self.title = f"{data.source}: {self._name}"
        self.train_data = data.train
        if not has_new_head:
            # The classifier is the model's own and stays as it is, unless a method trains it.
            self.new_modules = ()

    def loss(self) -> Callable[[Any, Tensor, Tensor], Tensor]:
        """The mean over the whole batch, which no process alone can know."""
        return cross_entropy

    def make_base(self, train: Callable[[PreTrainedModel, Sequence[dict[str, Any]], float], nn.Module]) -> None:
        """Train the offline ResNet; other models are used as they are."""
        state = PartialState()
        if self._source is None and state.is_main_process:
            model = pretrain(self._offline_data, self._base_steps, self._show_progress)
            model.save_pretrained(self._base_dir)

    def load_base(self) -> PreTrainedModel:
        """A fresh copy on this process's device, a new classifier drawn from torch's seed."""
        source = self._source or str(self._base_dir)
        options = {"config": self.config, "dtype": torch.float32, "ignore_mismatched_sizes": True}
        model = load_pretrained(self.auto_class, source, **options)
        model.name_or_path = self._source or OFFLINE_NAME
        return model.to(PartialState().device)

    def evaluate(self, model: nn.Module, split: Literal["tuning", "test"]) -> dict[str, float]:
        """Share of the images that are given their class."""
        samples = self.data.tuning if split == "tuning" else self.data.test
        return {"accuracy": float((predict(model, samples) == np.asarray(samples.labels)).mean())}

    def references(self) -> dict[str, float]:
        """The same answer for all images."""
        ((label, _),) = Counter(self.data.train.labels).most_common(1)
        return {"the most frequent class for all": self.data.test.labels.count(label) / len(self.data.test)}

    def settings(self) -> dict[str, Any]:
        """Model and images."""
        sizes = {} if self._source is not None else {"base_steps": self._base_steps}
        return {"model": self._name, **sizes, "data": {name: part["sha256"] for name, part in self._parts().items()}}

    def describe(self) -> dict[str, Any]:
        """Sizes and fingerprints."""
        return {"images": self._parts(), "classes": list(self.data.classes)}

    def _parts(self) -> dict[str, dict[str, Any]]:
        parts = {"train": self.data.train, "tuning": self.data.tuning, "test": self.data.test}
        return {name: {"number": len(part), "sha256": part.fingerprint()} for name, part in parts.items()}


def cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """Sum over the images of this process, divided by their number over all processes."""
    logits = outputs.logits
    return functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


@torch.no_grad()
def predict(model: nn.Module, samples: Samples, alone: bool = False) -> np.ndarray:
    """Class of every image, on every process: `[samples]`; `alone` if one process calls it without the others."""
    state = PartialState()
    n_processes, own = (1, 0) if alone else (state.num_processes, state.process_index)
    model.eval()
    device = next(model.parameters()).device
    starts = range(0, len(samples), EVALUATION_BATCH)
    found: list[tuple[int, np.ndarray]] = []
    for first in starts[own::n_processes]:
        stop = min(first + EVALUATION_BATCH, len(samples))
        pixels = torch.stack([samples.read(index) for index in range(first, stop)])
        found.append((first, model(pixel_values=pixels.to(device)).logits.argmax(dim=-1).cpu().numpy()))
    if n_processes > 1:
        found = gather_object(found)
    return np.concatenate([classes for _, classes in sorted(found, key=lambda part: part[0])])


def model_config(source: str | None, classes: Sequence[str]) -> tuple[PretrainedConfig, bool]:
    """The configuration for some classes, without dropout, and whether the classes are new to the model."""
    if source is None:
        return offline_config(), False
    config = without_dropout(load_pretrained(AutoConfig, source))
    if list(config.id2label.values()) == list(classes):
        return config, False
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: number for number, name in enumerate(classes)}
    return config, True


def make_task(args: argparse.Namespace, show_progress: bool) -> ImageTask:
    """Model and images that the options name."""
    source = args.model_name_or_path
    if source is None:
        data = offline_digits(args)
        config, has_new_head = model_config(None, data.classes)
    else:
        config, has_new_head = model_config(source, class_names(args))
        data = labelled_images(args, preparation(source, config, args.image_size))
    return ImageTask(
        data,
        config,
        source,
        has_new_head=has_new_head,
        offline_data=args.offline_data,
        base_steps=args.base_steps,
        base_dir=Path(args.output_dir) / "base",
        show_progress=show_progress,
    )


def show_predictions(task: ImageTask, folder: Path) -> None:
    """Test images with what the base model and the adapted one say of them."""
    state = PartialState()
    adapter = next((path for name in SHOWN if (path := folder / "adapters" / name).is_dir()), None)
    if adapter is None or not state.is_main_process:
        return
    samples = task.data.test.select(range(min(400, len(task.data.test))))
    base = task.load_base()
    before = predict(base, samples, alone=True) if task.has_base_row else None
    after = predict(PeftModel.from_pretrained(base, adapter), samples, alone=True)
    title = f"{task.title}. Test images: {'before → ' if before is not None else ''}after {adapter.name}"
    write_gallery(samples, before, after, task.data.classes, title, folder / GALLERY_FILE)
    print(f"Predictions: {folder / GALLERY_FILE}")
