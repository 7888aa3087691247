"""Images as a model takes them, made with Pillow and NumPy; no torchvision is needed.

The processors of Transformers for many models ask for torchvision. What they do is written in the model's
`preprocessor_config.json`: a size, a crop, a mean and a standard deviation.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig
from transformers.image_processing_base import ImageProcessingMixin

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preparation:
    """From an image to `[channels, size, size]`.

    Attributes:
        size: height and width.
        resize: length of the shorter edge before the middle is cut out.
        mean: per channel, of values in [0, 1].
        std: per channel.
    """

    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image) -> Tensor:
        """Resize, cut out the middle, normalise."""
        channels = len(self.mean)
        image = image.convert("L" if channels == 1 else "RGB")
        scale = self.resize / min(image.size)
        width, height = (max(self.size, round(edge * scale)) for edge in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        values = np.asarray(image, dtype=np.float32).reshape(self.size, self.size, channels) / 255
        values = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def preparation(source: str, config: PretrainedConfig, size: int | None) -> Preparation:
    """What a model's own files say of its images; ImageNet's usual values where they say nothing."""
    try:
        said: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(source)[0]
    except (OSError, ValueError):
        said = {}
    crop = _edge(said.get("crop_size")) or _edge(said.get("size")) or _edge(getattr(config, "image_size", None)) or 224
    shortest = _edge(said.get("size")) or crop
    share = said.get("crop_pct") or (crop / shortest if shortest >= crop else 1.0)
    size = size or crop
    mean, std = said.get("image_mean") or IMAGENET_MEAN, said.get("image_std") or IMAGENET_STD
    channels = getattr(config, "num_channels", 3)
    if channels == 1:
        mean, std = mean[:1], std[:1]
    return Preparation(size, max(size, round(size / share)), tuple(mean), tuple(std))


def _edge(value: Any) -> int | None:
    if isinstance(value, dict):
        value = value.get("shortest_edge") or value.get("height")
    if isinstance(value, (tuple, list)):
        value = value[0]
    return value if isinstance(value, int) else None


class Samples(Sequence[dict[str, Any]]):
    """Labelled images, read when they are asked for.

    Args:
        labels: class of each image.
        read: (position) -> `[channels, size, size]`.
        picture: (position) -> the image as it is shown, `[height, width]` or `[height, width, 3]` in [0, 1].
    """

    def __init__(
        self, labels: Sequence[int], read: Callable[[int], Tensor], picture: Callable[[int], np.ndarray]
    ) -> None:
        self.labels = [int(label) for label in labels]
        self.read, self.picture = read, picture

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        return {"pixel_values": self.read(index), "labels": self.labels[index]}

    def select(self, positions: Sequence[int]) -> "Samples":
        """Some of them, in this order."""
        own = list(positions)
        return Samples(
            [self.labels[position] for position in own],
            lambda index: self.read(own[index]),
            lambda index: self.picture(own[index]),
        )

    def fingerprint(self) -> str:
        """Of the labels and of at most a hundred images, evenly spread."""
        digest = hashlib.sha256(repr(self.labels).encode())
        for position in range(0, len(self), max(1, len(self) // 100)):
            digest.update(self.read(position).numpy().tobytes())
        return digest.hexdigest()[:16]


def of_arrays(images: np.ndarray, labels: Sequence[int], mean: float, std: float) -> Samples:
    """Grey images in memory, `[n, height, width]` in [0, 1]."""
    values = torch.from_numpy(np.ascontiguousarray((images - mean) / std, dtype=np.float32)).unsqueeze(1)
    return Samples(labels, lambda index: values[index], lambda index: images[index])
