"""The options all comparisons share, each documented here and nowhere else, and how a command line becomes them."""

import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from comparison.errors import UserError
from comparison.methods import METHODS

MAX_THREADS = 8  # small models cannot feed more


def option(default: Any, text: str) -> Any:
    """A dataclass field with its help text."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class ComparisonArguments:
    """Which methods, and the conditions they share."""

    methods: list[str] = option(
        [], f"Any of {', '.join(METHODS)} that exist for the task (default: all of those that make sense for it)."
    )
    budget: int | None = option(
        None,
        "Trainable parameters for the methods with a size (LoRA's rank, LReg's n_components): each gets the largest "
        "size within the budget. Default: what the paper's placement of LReg has with two components, or the smallest "
        "adapter of the most expensive method if that is more. A new classification head is not counted.",
    )
    sizes: list[str] = option([], "Sizes instead of the budget, for single methods: NAME=SIZE ...")
    n_nodes: int | None = option(
        None,
        "Nodes per component for all LReg methods (default: 2 at the head and MLP, 6 on query and key, 8 in lreg).",
    )
    steps: int | None = option(None, "Training steps of every method.")
    batch_size: int | None = option(None, "Samples in a step over all processes.")
    gradient_accumulation_steps: int = option(1, "Parts a batch is divided into, where memory is short.")
    warmup_ratio: float = option(0.1, "Share of the steps in which the learning rate rises; then it falls linearly.")
    weight_decay: float = option(0.0, "AdamW's weight decay.")
    head_learning_rate: float | None = option(
        None, "Fixed learning rate of a new classification head, for every method (default: that of the method)."
    )
    bf16: bool = option(False, "Train in bfloat16 autocast instead of float32.")
    lr_trials: int | None = option(None, "Learning rates tried for every method.")
    lr_ratio: float = option(3.0, "Ratio of neighbouring learning rates in a grid.")
    lr_refine: int = option(
        0,
        "So many further learning rates for every method: beyond the edge of the grid where the best one is at an "
        "edge, else between the best one and the better of its neighbours.",
    )
    lr_extend: int = option(
        0, "After those, at most so many further learning rates for methods whose best one is still at an edge."
    )
    learning_rates: list[str] = option([], "Grids to use instead of the built-in ones: NAME=RATE,RATE,... ...")
    seeds: list[int] = option(
        [42], "One run per seed: data order and start of adapter and new head; the first one chooses the learning rate."
    )
    eval_steps: int | None = option(
        None,
        "Evaluate on the tuning split every so many steps and keep the best state (default: only at the end, and the "
        "last state is kept).",
    )
    patience: int | None = option(
        None, "Stop a run after so many evaluations without improvement (needs --eval_steps)."
    )


@dataclass
class RunArguments:
    """Where the results go and how the script behaves."""

    output_dir: str = option(
        f"outputs/{Path(sys.argv[0]).stem.removeprefix('run_')}",  # outputs/wikitext for run_wikitext.py
        "Folder for everything that is written; a second start resumes there.",
    )
    smoke: bool = option(False, "A very small version of everything, to see that it runs.")
    progress: bool = option(True, "Show a progress bar.")
    num_threads: int | None = option(
        None,
        "Threads per process (default: OMP_NUM_THREADS where it is set, else the usable cores divided among the "
        f"processes, at most {MAX_THREADS}).",
    )
    report_to: list[str] = option(["none"], "Trackers, as in TrainingArguments: tensorboard, trackio, wandb, ...")
    push_to_hub: str | None = option(
        None, "Repository to send the best adapter to (best on the tuning split), with its figures in the model card."
    )
    hub_private: bool = option(False, "Make that repository private.")


class Parser(HfArgumentParser):
    """An argument parser whose complaint is one sentence, and whose help of `--no_x` is not that of `--x`."""

    def add_argument(self, *names: str, **options: Any) -> Any:
        """Where an option is on by default, `HfArgumentParser` adds its opposite with the same help."""
        if options.get("action") == "store_false" and names[0].startswith("--no_"):
            options["help"] = f"Switch --{names[0].removeprefix('--no_')} off."
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        """Raise what the script turns into a sentence and an exit code."""
        raise UserError(f"{message[0].upper()}{message[1:]} (see --help).")


def parse(kinds: Sequence[type], argv: Sequence[str]) -> tuple[Any, ...]:
    """Dataclasses from a command line that may begin with YAML or JSON files of the same options.

    What comes later counts more: the second file more than the first, the command line more than both.
    """
    given = list(argv)
    files = list(itertools.takewhile(lambda argument: argument.endswith((".yaml", ".yml", ".json")), given))
    arguments = [part for file in files for part in read_config(Path(file))] + given[len(files) :]
    parser = Parser(kinds, allow_abbrev=False)
    *parsed, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if unknown:
        parser.error(f"there is no option {unknown[0]}")
    return tuple(parsed)


def read_config(path: Path) -> list[str]:
    """A YAML or JSON file of options as the command line that says the same."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"The config file '{path}' cannot be read: {error.strerror}.") from error
    except (ValueError, yaml.YAMLError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"The config file '{path}' is not valid {path.suffix[1:].upper()}: {first}.") from error
    if not isinstance(content, dict):
        raise UserError(f"The config file '{path}' must hold options and their values, like 'steps: 200'.")
    arguments = []
    for name, value in content.items():
        if isinstance(value, dict):  # learning_rates: {lora: [1e-3, 3e-3]} and sizes: {lora: 8}
            value = [f"{key}={','.join(map(str, v)) if isinstance(v, list) else v}" for key, v in value.items()]
        if value is not None:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def fill(arguments: Any, **defaults: Any) -> None:
    """Give the options that were left out their defaults."""
    for name, default in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)


def require_at_least(**limits: tuple[float | None, float]) -> None:
    """Refuse numbers that mean nothing, before any work is done: `name=(value, least)`."""
    for name, (value, least) in limits.items():
        if value is not None and not least <= value < math.inf:  # NaN is in no range
            raise UserError(f"--{name} must be at least {least}, and finite, got {value}.")


def check(comparison: ComparisonArguments, run: RunArguments) -> None:
    """Refuse values that cannot be, alone or together."""
    require_at_least(
        budget=(comparison.budget, 1),
        n_nodes=(comparison.n_nodes, 2),
        steps=(comparison.steps, 1),
        batch_size=(comparison.batch_size, 1),
        gradient_accumulation_steps=(comparison.gradient_accumulation_steps, 1),
        warmup_ratio=(comparison.warmup_ratio, 0),
        weight_decay=(comparison.weight_decay, 0),
        lr_trials=(comparison.lr_trials, 1),
        lr_refine=(comparison.lr_refine, 0),
        lr_extend=(comparison.lr_extend, 0),
        eval_steps=(comparison.eval_steps, 1),
        patience=(comparison.patience, 1),
        num_threads=(run.num_threads, 1),
    )
    if not comparison.seeds or len(set(comparison.seeds)) < len(comparison.seeds):
        raise UserError(f"--seeds needs at least one value and each only once, got {comparison.seeds}.")
    if not 1.0 < comparison.lr_ratio < math.inf:
        raise UserError(f"--lr_ratio must be above 1, and finite, got {comparison.lr_ratio}.")
    if comparison.head_learning_rate is not None and not 0.0 < comparison.head_learning_rate < math.inf:
        raise UserError(f"--head_learning_rate must be above 0, and finite, got {comparison.head_learning_rate}.")
    if comparison.patience is not None and comparison.eval_steps is None:
        raise UserError("--patience counts evaluations during training: give --eval_steps too.")
