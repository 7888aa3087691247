"""What `refine_linearized` gains when a training is over, beside going on with AdamW for the same CPU time.

    python -m benchmarks.measurements.refinement_gain --output_dir OUT --tasks numbers
    python -m benchmarks.measurements.refinement_gain --output_dir OUT --tasks sentences [--data_dir SST2] --steps 100
        --rate 0.0055 --budget 64536 --refine_batches 5 --refine_size 16 --rounds 1 --ranks 4 --seeds 0
    python -m benchmarks.measurements.refinement_gain --output_dir OUT --tasks text --model MODEL --train_file TRAIN
        --test_file TEST --steps 200 --rate 0.02 --budget 32768 --batch_size 4 --refine_batches 5 --refine_size 4
        --rounds 1 --ranks 4 --columns_at_once 4 --seeds 0

The recipe of the package is trained and refined on --refine_batches batches of the same data, every fifth of which is
held out. From the same trained state AdamW goes on for as many steps as that CPU time pays for, with a fresh warm-up
and linear decay from each of --again times the first rate. Of these the better counts, by the samples that are reported
on, which flatters AdamW. Loss: the mean on these samples, squared error or cross-entropy. Tasks: `adaptation_tasks.py`.
"""

import argparse
import copy
import json
import math
import statistics
import time
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers.utils import logging

from benchmarks.measurements.adaptation_tasks import FUNCTIONS, FunctionTask, SentenceTask, Task, TextTask, fit
from benchmarks.measurements.machine import command, device_name, versions
from lreg_peft import initialize_lreg_weights, recommended_config, refine_linearized


def once(task: Task, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One training, and both ways to go on from its end."""
    torch.manual_seed(seed)
    base = task.base()
    model = get_peft_model(base, recommended_config(base, options.budget, task_type=task.task_type))
    start = list(islice(task.batches(seed, options.batch_size), 8))
    initialize_lreg_weights(model, start, start_head=task.start_head, show_progress=False)
    started = time.process_time()
    fit(model, task.batches(seed, options.batch_size), options.steps, options.rate)
    seconds = time.process_time() - started
    found = {"task": task.name, "unit": task.unit, "better": task.better, "seed": seed, "training_seconds": seconds}
    found["trained"] = {"score": task.score(model), "loss": task.loss(model)}
    refined = copy.deepcopy(model)
    data = list(islice(task.batches(seed, options.refine_size), options.refine_batches))
    started = time.process_time()
    result = refine_linearized(
        refined,
        [batch for i, batch in enumerate(data) if i % 5 != 4],
        rank=options.ranks,
        eval_data=data[4::5],
        n_rounds=options.rounds,
        columns_at_once=options.columns_at_once,
        show_progress=False,
    )
    found["refinement_seconds"] = time.process_time() - started
    found["refined"] = {"score": task.score(refined), "loss": task.loss(refined)}
    found["status"], found["rounds"] = result.status, len(result.steps)
    found["training_loss"] = [result.loss_before, result.loss_after]
    found["heldout_loss"] = [result.heldout_before, result.heldout_after]
    steps = max(1, round(found["refinement_seconds"] / seconds * options.steps))
    found["more_steps"], found["continued"] = steps, {}
    for factor in options.again:
        again = copy.deepcopy(model)
        fit(again, task.batches(seed + 1000, options.batch_size), steps, options.rate * factor)
        found["continued"][f"{factor:g}"] = {"score": task.score(again), "loss": task.loss(again)}
    return found


def cell(values: list[float]) -> str:
    """Mean, and standard error of several."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.1g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{error}"


def table(runs: list[dict[str, Any]]) -> str:
    """A row for each task."""
    lines = [
        "| task | | trained | refined | AdamW, the same time | steps, more steps | CPU s: training, refinement |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(run["task"] for run in runs):
        rows = [run for run in runs if run["task"] == name]
        for key, sign, words in (("score", rows[0]["better"], rows[0]["unit"]), ("loss", -1, "loss")):
            again = [max((one[key] for one in run["continued"].values()), key=lambda v: sign * v) for run in rows]
            more = statistics.mean(run["more_steps"] for run in rows)
            times = [statistics.mean(run[f"{part}_seconds"] for run in rows) for part in ("training", "refinement")]
            lines.append(
                f"| {name} | {words} | {cell([run['trained'][key] for run in rows])} | "
                f"{cell([run['refined'][key] for run in rows])} | {cell(again)} | {rows[0]['steps']}, {more:.0f} | "
                f"{times[0]:.0f}, {times[1]:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Add the runs to the record in the folder; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["numbers"], choices=[*FUNCTIONS, "sentences", "text"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--again", type=float, nargs="+", default=[0.3])
    parser.add_argument("--budget", type=int, default=1_700)
    parser.add_argument("--refine_batches", type=int, default=5)
    parser.add_argument("--refine_size", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--columns_at_once", type=int, default=64)
    parser.add_argument("--data_dir", type=Path, help="train.tsv and validation.tsv of SST-2; offline pairs without")
    parser.add_argument("--encoder", help="folder or name; the packaged one without")
    parser.add_argument("--model", help="folder or name of the language model, for text")
    parser.add_argument("--train_file", type=Path, help="text to adapt to")
    parser.add_argument("--test_file", type=Path, help="text that judges")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / "refinement_gain.json"
    runs = json.loads(path.read_text("utf-8"))["runs"] if path.exists() else []
    for kind in options.tasks:
        if kind == "sentences":
            task: Task = SentenceTask(options.data_dir, options.encoder)
        elif kind == "text":
            task = TextTask(options.model, options.train_file, options.test_file)
        else:
            task = FunctionTask(kind)
        for seed in options.seeds:
            runs.append({**once(task, seed, options), "steps": options.steps, "command": command()})
            record = {
                "versions": versions("torch", "transformers", "peft", "lreg_peft"),
                "machine": device_name("cpu"),
                "threads": torch.get_num_threads(),
                "runs": runs,
            }
            path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(table(runs))


if __name__ == "__main__":
    main()
