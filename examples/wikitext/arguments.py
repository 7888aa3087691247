"""The options of `run_wikitext.py`, each documented here and nowhere else."""

from dataclasses import dataclass, field
from typing import Any

from errors import UserError
from methods import METHODS
from transformers import HfArgumentParser

MAX_THREADS = 8  # the offline model is too small to feed more


def option(default: Any, text: str) -> Any:
    """A dataclass field with its help text."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """Which model, and how long its base stage is."""

    model_name_or_path: str | None = option(
        None,
        "Hub id or local folder of a causal language model; without it a small GPT-2 is trained from nothing.",
    )
    base_steps: int | None = option(
        None,
        "Steps of full training before the methods start: on Python's docstrings for a model trained from nothing "
        "(default 900, 240 with --smoke), on the training text for a given model (default 0).",
    )
    base_learning_rate: float | None = option(
        None,
        "Learning rate of the base stage (default 3e-3 for a model trained from nothing, 5e-5 for a given one).",
    )


@dataclass
class DataArguments:
    """Which text. Without any of these options, the language reference that Python carries."""

    dataset_name: str | None = option(
        None, "Data set on the hub with the splits train, validation and, if possible, test."
    )
    dataset_config_name: str | None = option(None, "Configuration of that data set, such as wikitext-2-raw-v1.")
    text_column: str = option("text", "Column of that data set that holds the text.")
    train_file: str | None = option(None, "Local UTF-8 text to adapt to.")
    validation_file: str | None = option(None, "Local UTF-8 text to choose learning rates on.")
    test_file: str | None = option(
        None, "Local UTF-8 text to report on; without it the second half of the validation file is held out."
    )
    block_size: int | None = option(None, "Tokens in a sequence (default 128, 64 with --smoke).")


@dataclass
class ComparisonArguments:
    """Which methods, and the conditions they share."""

    methods: list[str] = option(list(METHODS), f"Any of: {', '.join(METHODS)}.")
    budget: int | None = option(
        None,
        "Trainable parameters for the methods with a size (LoRA's rank, LReg's n_components): each gets the largest "
        "size within the budget (default: what lreg-head has with two components).",
    )
    dof: int = option(2, "Nodes per component of LReg.")
    steps: int | None = option(None, "Training steps of every method (default 120, 20 with --smoke).")
    batch_size: int | None = option(None, "Sequences in a step over all processes (default 8).")
    lr_trials: int | None = option(None, "Learning rates tried for every method (default 3, 2 with --smoke).")
    lr_ratio: float = option(3.0, "Ratio of neighbouring learning rates in a grid.")
    learning_rates: list[str] = option([], "Grids to use instead of the built-in ones: NAME=RATE,RATE,... ...")
    seeds: list[int] = option(
        [42],
        "One run per seed, which sets data order and adapter start; the learning rate is chosen on the first.",
    )


@dataclass
class RunArguments:
    """Where the results go and how the script behaves."""

    output_dir: str = option("outputs/wikitext", "Folder for everything that is written.")
    smoke: bool = option(False, "A very small version of everything, to see that it runs.")
    progress: bool = option(True, "Show a progress bar.")
    num_threads: int | None = option(
        None,
        f"Threads per process (default: the usable cores divided among the processes, at most {MAX_THREADS}).",
    )


@dataclass(frozen=True)
class Scale:
    """Defaults that differ between the real run and the smoke run."""

    base_steps: int
    steps: int
    lr_trials: int
    batch_size: int
    block_size: int
    vocab_size: int
    hidden_size: int
    n_layers: int
    max_base_chars: int | None


FULL = Scale(
    base_steps=900,
    steps=120,
    lr_trials=3,
    batch_size=8,
    block_size=128,
    vocab_size=2048,
    hidden_size=128,
    n_layers=2,
    max_base_chars=None,
)
SMOKE = Scale(
    base_steps=240,
    steps=20,
    lr_trials=2,
    batch_size=8,
    block_size=64,
    vocab_size=512,
    hidden_size=64,
    n_layers=2,
    max_base_chars=200_000,
)


@dataclass(frozen=True)
class Arguments:
    """All options, with the defaults that depend on others filled in."""

    model: ModelArguments
    data: DataArguments
    comparison: ComparisonArguments
    run: RunArguments
    scale: Scale


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """Read the command line, fill in defaults, refuse what cannot be."""
    parser = HfArgumentParser((ModelArguments, DataArguments, ComparisonArguments, RunArguments))
    model, data, comparison, run = parser.parse_args_into_dataclasses(argv)
    scale = SMOKE if run.smoke else FULL
    from_nothing = model.model_name_or_path is None
    fill(model, base_steps=scale.base_steps if from_nothing else 0)
    fill(model, base_learning_rate=3e-3 if from_nothing else 5e-5)
    fill(data, block_size=scale.block_size)
    fill(comparison, steps=scale.steps, batch_size=scale.batch_size, lr_trials=scale.lr_trials)
    check_ranges(model, data, comparison, run)
    return Arguments(model, data, comparison, run, scale)


def fill(arguments: Any, **defaults: Any) -> None:
    """Give the options that were left out their defaults."""
    for name, default in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)


def check_ranges(
    model: ModelArguments, data: DataArguments, comparison: ComparisonArguments, run: RunArguments
) -> None:
    """Refuse numbers that mean nothing, before any work is done."""
    lowest = [
        ("base_steps", model.base_steps, 1 if model.model_name_or_path is None else 0),
        ("block_size", data.block_size, 2),
        ("budget", comparison.budget, 1),
        ("dof", comparison.dof, 2),
        ("steps", comparison.steps, 1),
        ("batch_size", comparison.batch_size, 1),
        ("lr_trials", comparison.lr_trials, 1),
        ("num_threads", run.num_threads, 1),
    ]
    for name, value, least in lowest:
        if value is not None and value < least:
            why = " for a model trained from nothing" if name == "base_steps" and least else ""
            raise UserError(f"--{name} must be at least {least}{why}, got {value}.")
    if not comparison.seeds or not comparison.methods:
        raise UserError("--seeds and --methods each need at least one value.")
    if comparison.lr_ratio <= 1.0:
        raise UserError(f"--lr_ratio must be above 1, got {comparison.lr_ratio}.")
