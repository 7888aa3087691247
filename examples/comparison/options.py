"""The options that both comparisons have, and how a command line becomes a namespace. Nothing slow is imported here."""

import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn


class UserError(Exception):
    """Something in the command or its input is wrong; the message is one sentence that says what and what to do."""


class Parser(argparse.ArgumentParser):
    """A parser with the shared options, whose complaint is one sentence and whose defaults stand in its help.

    Args:
        description: of the script, usually its docstring.
        name: of the folder below `outputs/` that results go to.
    """

    def __init__(self, description: str | None, name: str) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        add = self.add_argument_group("comparison").add_argument
        add("--methods", nargs="+", default=[], help="some of the methods (default: all that exist for the task)")
        add(
            "--budget",
            type=int,
            help="trainable parameters of the adapters, without a new head: each gets the largest size within it "
            "(default: what the paper's placement of LReg has with two components, or what the smallest adapters need)",
        )
        add("--sizes", nargs="+", default=[], help="sizes instead of the budget for some methods: NAME=SIZE ...")
        add("--n_nodes", type=int, help="nodes per component of LReg (default: each method's own)")
        add("--steps", type=int, help="training steps of every method")
        add("--batch_size", type=int, help="samples in a step over all processes")
        add("--gradient_accumulation_steps", type=int, default=1, help="parts of a batch, where memory is short")
        add("--bf16", action="store_true", help="bfloat16 autocast instead of float32")
        add("--lr_trials", type=int, help="learning rates tried for every method")
        add("--lr_ratio", type=float, default=3.0, help="ratio of neighbouring learning rates (default: 3)")
        add("--learning_rates", nargs="+", default=[], help="grids of one's own: NAME=RATE,RATE,... ...")
        add(
            "--seeds",
            type=int,
            nargs="+",
            default=[42],
            help="a run each: order of the data, start of adapter and head; the first one chooses the learning rate",
        )
        add("--output_dir", default=f"outputs/{name}", help="folder of all results; a second start resumes there")
        add("--smoke", action="store_true", help="a very small version of everything, to see that it runs")
        add("--no_progress", action="store_true", help="show no bar")
        add("--num_threads", type=int, help="threads per process (default: OMP_NUM_THREADS, or the cores, at most 8)")

    def error(self, message: str) -> NoReturn:
        """Raise what `run_script` turns into a sentence and an exit code."""
        raise UserError(f"{message[0].upper()}{message[1:]} (see --help).")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Options from a command line that may begin with YAML or JSON files of the same options; the last one counts.

        Raises:
            UserError: for what cannot be.
        """
        files = list(itertools.takewhile(lambda argument: argument.endswith((".yaml", ".yml", ".json")), argv))
        arguments = [part for file in files for part in read_config(Path(file))] + list(argv)[len(files) :]
        args, unknown = self.parse_known_args(arguments)
        if unknown:
            self.error(f"there is no option {unknown[0]}")
        return args


def read_config(path: Path) -> list[str]:
    """A YAML or JSON file of options as the command line that says the same."""
    import yaml  # only where there is a file

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
    arguments: list[str] = []
    for name, value in content.items():
        if isinstance(value, dict):  # learning_rates: {lora: [1e-3, 3e-3]} and sizes: {lora: 8}
            value = [f"{key}={','.join(map(str, v)) if isinstance(v, list) else v}" for key, v in value.items()]
        if value is True:
            arguments.append(f"--{name}")
        elif value is not None and value is not False:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def fill(args: argparse.Namespace, **defaults: Any) -> None:
    """Give the options that were left out their defaults."""
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def require_at_least(args: argparse.Namespace, **least: float) -> None:
    """Refuse numbers that mean nothing, before any work is done."""
    for name, limit in least.items():
        value = getattr(args, name)
        if value is not None and not limit <= value < math.inf:  # NaN is in no range
            raise UserError(f"--{name} must be at least {limit}, and finite, got {value}.")


def check(args: argparse.Namespace) -> None:
    """Refuse values of the shared options that cannot be."""
    counts = ("budget", "steps", "batch_size", "gradient_accumulation_steps", "lr_trials", "num_threads")
    require_at_least(args, **dict.fromkeys(counts, 1), n_nodes=2)
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds takes every value only once, got {args.seeds}.")
    if not 1.0 < args.lr_ratio < math.inf:
        raise UserError(f"--lr_ratio must be above 1, and finite, got {args.lr_ratio}.")


def run_script(compare: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Run a script; a mistake in the command or its input is one sentence and exit code 2."""
    try:
        compare(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # one of several processes speaks
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
