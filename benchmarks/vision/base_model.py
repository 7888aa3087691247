"""The offline base: a small ResNet that is really trained, on scikit-learn's digits, in less than a minute."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import ResNetConfig, ResNetForImageClassification

from benchmarks.vision.images import of_arrays
from benchmarks.vision.sources import SIDE, base_digits

BATCH = 64
RATE = 3e-3


def offline_config() -> ResNetConfig:
    """0.3 million parameters."""
    names = [str(digit) for digit in range(10)]
    return ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 32, 64, 128],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        image_size=SIDE,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )


def pretrain(offline_data: str, steps: int, show_progress: bool) -> ResNetForImageClassification:
    """Train it, with shifted and noisy copies of the digits; the same weights on every call.

    Args:
        offline_data: what it will be adapted to, which decides what it may see.
        steps: of training.
        show_progress: show a progress bar.
    """
    images, labels = base_digits(offline_data)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = ResNetForImageClassification(offline_config()).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        batches = _batches(images, labels)
        for _ in tqdm(range(steps), desc="pretraining", disable=not show_progress):
            pixels, targets = next(batches)
            loss = nn.functional.cross_entropy(model(pixel_values=pixels).logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _batches(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    samples = of_arrays(images, labels.tolist(), 0.2, 0.35)
    pixels = torch.stack([samples.read(index) for index in range(len(samples))])
    targets = torch.tensor(samples.labels)
    while True:
        chosen = torch.randint(len(targets), (BATCH,))
        moved = pixels[chosen]
        shift = torch.randint(-3, 4, (2,)).tolist()
        moved = torch.roll(moved, shift, dims=(2, 3)) + 0.1 * torch.randn(moved.shape)
        yield moved, targets[chosen]
