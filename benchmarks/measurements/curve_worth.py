"""What the curve of a shortcut is worth, and what moving its nodes is: the same adapter with other curves.

    python -m benchmarks.measurements.curve_worth --output_dir OUT --tasks kinks steep numbers
    python -m benchmarks.measurements.curve_worth --output_dir OUT --tasks sentences [--data_dir SST2] --steps 200
        --rates 0.0055 --budget 64536
    python -m benchmarks.measurements.curve_worth --output_dir OUT --tasks text --model MODEL --train_file TRAIN
        --test_file TEST --variants "4 nodes" "4 nodes, moved" --budget 32768 --rates 0.02 --batch_size 4 --no_lora

Tasks are those of `adaptation_tasks.py`: networks that know one function are adapted to another one; a sentence encoder
classifies; a language model goes on with another text. Every variant has the gradient start, the same batches and the
same steps. Of several --rates the first seed takes the best, by samples that are not reported on.

Every adapter is then converted to a LoRA, without and with biases (`convert_to_lora`, 16 training batches, run by
PEFT); of the two the better counts. The difference says how much of this adapter is curved. What a curve is worth to a
training says the variant "profiles fixed": profiles stay constants, which makes every shortcut a LoRA with a bias.

Nodes are moved by `LRegCallback` as it is, 16 times before three quarters of the training, each move tried on the last
two batches ("moved") or kept untried ("moved, all kept"). Finished runs are lines of `runs.jsonl` and not repeated.
"""

import argparse
import json
import math
import statistics
import time
import warnings
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers.utils import logging

from benchmarks.measurements.adaptation_tasks import FUNCTIONS, FunctionTask, SentenceTask, Task, TextTask, fit
from benchmarks.measurements.machine import command, device_name, versions
from lreg_peft import (
    LRegCallback,
    LRegConfig,
    LRegLayer,
    convert_to_lora,
    initialize_lreg_weights,
    recommended_config,
)
from lreg_peft.core import uniform_nodes


@dataclass(frozen=True)
class Variant:
    """One curve.

    Attributes:
        n_nodes: nodes.
        moved: "no", "checked" or "kept".
        uniform: whether nodes begin at equal steps in place of quantiles.
        profile: "constant" at the start, "hinge" (what a ReLU of z would be, to both sides), or "fixed" constants.
        full: components of full weighting in place of factored ones; 0 for factored.
        block: one shortcut with a full weighting around the whole network, of functions only.
    """

    n_nodes: int = 8
    moved: str = "no"
    uniform: bool = False
    profile: str = "constant"
    full: int = 0
    block: bool = False


VARIANTS = {
    "profiles fixed": Variant(profile="fixed"),
    "4 nodes": Variant(4),
    "4 nodes, moved": Variant(4, "checked"),
    "16 nodes": Variant(16),
    "16 nodes, moved": Variant(16, "checked"),
    "8 nodes": Variant(),
    "8 nodes, moved": Variant(8, "checked"),
    "8 nodes, moved, all kept": Variant(8, "kept"),
    "8 nodes, uniform": Variant(uniform=True),
    "8 nodes, uniform, moved": Variant(8, "checked", uniform=True),
    "32 nodes": Variant(32),
    "8 nodes, hinge": Variant(profile="hinge"),
    "full weighting, 8 nodes": Variant(full=1),
    "full weighting, 8 nodes, moved": Variant(8, "checked", full=1),
    "around, 8 nodes": Variant(block=True),
    "around, 8 nodes, moved": Variant(8, "checked", block=True),
    "around, 8 nodes, moved, all kept": Variant(8, "kept", block=True),
    "around, 8 nodes, uniform": Variant(uniform=True, block=True),
    "around, 8 nodes, uniform, moved": Variant(8, "checked", uniform=True, block=True),
    "around, 8 nodes, uniform, moved, all kept": Variant(8, "kept", uniform=True, block=True),
    "around, 16 nodes": Variant(16, block=True),
    "around, 32 nodes": Variant(32, block=True),
}


def configuration(task: Task, base: nn.Module, variant: Variant, budget: int) -> LRegConfig:
    """The recipe of the package with another curve; full weighting and networks on functions have one of their own."""
    own = {"n_nodes": variant.n_nodes, "init_weights": "gradient", "task_type": task.task_type}
    if variant.block:
        sizes = (base.layers[0].linear.in_features, 1)
        return LRegConfig(target_modules=["layers"], feature_sizes={"layers": sizes}, n_components=2, **own)
    if not variant.full:
        return recommended_config(base, budget, task_type=task.task_type, n_nodes=variant.n_nodes)
    linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name in linear if isinstance(task, FunctionTask) or "attention" in name]
    return LRegConfig(target_modules=names, n_components=variant.full, **own)


def _as_lora(task: Task, model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """Scores of the adapter as a LoRA without and with biases."""
    found = {}
    for bias in ("none", "lora"):
        config, state, _ = convert_to_lora(model, batches, bias=bias, max_rise=1e9, show_progress=False)
        found[bias] = task.score(_lora(task, config, state))
    return found


def _lora(task: Task, config: LoraConfig, state: dict[str, Tensor]) -> nn.Module:
    lora = get_peft_model(task.base(), config)
    set_peft_model_state_dict(lora, state)
    return lora


@torch.no_grad()
def shape(model: nn.Module, variant: Variant) -> None:
    """Give the shortcuts of a model that has its start the curve of the variant."""
    for layer in (module for module in model.modules() if isinstance(module, LRegLayer)):
        encoder = layer.lreg_encoder["default"]
        if variant.uniform:
            encoder.set_nodes(uniform_nodes(encoder.n_components, encoder.n_nodes))
        if variant.profile == "fixed":
            encoder.weight.requires_grad_(False)
        if variant.profile == "hinge":
            bend = encoder.nodes.clamp(0.02, 0.98).logit().abs() / 1.702
            side = torch.ones(len(bend), 1)
            side[1::2] = -1
            encoder.weight += side * (bend - bend.mean(dim=1, keepdim=True))


def train(task: Task, name: str, seed: int, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """Train and judge one adapter."""
    variant, started = VARIANTS[name], time.process_time()
    torch.manual_seed(seed)
    base = task.base()
    model = get_peft_model(base, configuration(task, base, variant, options.budget))
    start = list(islice(task.batches(seed, options.batch_size), 8))
    initialize_lreg_weights(model, start, method="gradient", start_head=task.start_head, show_progress=False)
    shape(model, variant)
    callback = None
    if variant.moved != "no":
        every = max(1, int(0.75 * options.steps) // 16)
        callback = LRegCallback(every, n_check_batches=2 if variant.moved == "checked" else 0)
    fit(model, task.batches(seed, options.batch_size), options.steps, rate, callback)
    seen = list(islice(task.batches(seed, options.batch_size), 16))
    seconds = time.process_time() - started
    convertible = not variant.block and variant.moved == "no" and not options.no_lora
    return {
        "task": task.name,
        "unit": task.unit,
        "better": task.better,
        "variant": name,
        "seed": seed,
        "rate": rate,
        "steps": options.steps,
        "parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "tuning": task.tuning_score(model) if len(options.rates) > 1 else None,
        "score": task.score(model),
        "loss": task.loss(model),
        "as_lora": _as_lora(task, model, seen) if convertible else None,
        "moves": None if callback is None else [callback.n_accepted, callback.n_refused],
        "seconds": seconds,
    }


def mean_and_error(values: list[float]) -> str:
    """Mean, and of several values the standard error."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{error}"


def best(run: dict[str, Any]) -> float:
    """The better of the two conversions."""
    return max(run["as_lora"].values(), key=lambda score: run["better"] * score)


def beside(name: str) -> str:
    """The variant that another one is compared with, seed by seed."""
    if ", moved" in name:
        return name.partition(", moved")[0]
    return "around, 8 nodes" if VARIANTS[name].block else "profiles fixed"


def table(runs: list[dict[str, Any]]) -> str:
    """A row per task and variant; means over seeds with their standard error, positive differences for the better."""
    lines = [
        "| task | steps | variant | parameters | score | better than | by | as LoRA | than it by | moves | CPU s |",
        "|---|---:|---|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    kinds = {}
    for one in runs:
        kinds.setdefault((one["task"], one["steps"], one["variant"]), {})[one["seed"]] = one  # the last rate counts
    for (task, steps, name), by_seed in kinds.items():
        rows, better, other = list(by_seed.values()), next(iter(by_seed.values()))["better"], beside(name)
        reference = {} if other == name else kinds.get((task, steps, other), {})
        pairs = [(by_seed[seed], reference[seed]) for seed in by_seed if seed in reference]
        gain = mean_and_error([better * (own["score"] - its["score"]) for own, its in pairs]) if pairs else ""
        lora = share = moves = ""
        if rows[0]["as_lora"]:
            lora = mean_and_error([best(one) for one in rows])
            share = mean_and_error([better * (one["score"] - best(one)) for one in rows])
        if rows[0]["moves"]:
            moves = "{} kept, {} undone".format(*(sum(one["moves"][i] for one in rows) for i in (0, 1)))
        lines.append(
            f"| {task}, {rows[0]['unit']} | {steps} | {name} | {rows[0]['parameters']:,} | "
            f"{mean_and_error([one['score'] for one in rows])} | {other if gain else ''} | {gain} | {lora} | {share} | "
            f"{moves} | {statistics.mean(one['seconds'] for one in rows):.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(FUNCTIONS), choices=[*FUNCTIONS, "sentences", "text"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01])
    parser.add_argument("--budget", type=int, default=1_700, help="parameters of factored shortcuts")
    parser.add_argument("--data_dir", type=Path, help="train.tsv and validation.tsv of SST-2; offline pairs without")
    parser.add_argument("--encoder", help="folder or name; the packaged one without")
    parser.add_argument("--model", help="folder or name of the language model, for text")
    parser.add_argument("--train_file", type=Path, help="text to adapt to")
    parser.add_argument("--test_file", type=Path, help="text that judges")
    parser.add_argument("--no_lora", action="store_true", help="without the conversions")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    ledger = options.output_dir / "runs.jsonl"
    runs = [json.loads(line) for line in ledger.read_text("utf-8").splitlines()] if ledger.exists() else []

    def once(task: Task, name: str, seed: int, rate: float) -> dict[str, Any]:
        """A run, unless it is finished."""
        key = {"task": task.name, "variant": name, "seed": seed, "rate": rate, "steps": options.steps}
        done = [run for run in runs if key.items() <= run.items()]
        if not done:
            done = [{**train(task, name, seed, rate, options), "command": command()}]
            runs.extend(done)
            with ledger.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[0]) + "\n")
        return done[0]

    for kind in options.tasks:
        if kind == "sentences":
            task: Task = SentenceTask(options.data_dir, options.encoder)
        elif kind == "text":
            task = TextTask(options.model, options.train_file, options.test_file)
        else:
            task = FunctionTask(kind)
        own = [name for name, variant in VARIANTS.items() if kind in FUNCTIONS or not variant.block]
        for name in options.variants or own:
            rates = list(options.rates)
            for seed in options.seeds:
                found = [once(task, name, seed, rate) for rate in rates]
                rates = [max(found, key=lambda run: run["better"] * (run["tuning"] or 0))["rate"]]
    record = {
        "versions": versions("torch", "transformers", "peft", "lreg_peft"),
        "machine": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "commands": sorted({run["command"] for run in runs}),
        "runs": [{key: value for key, value in run.items() if key != "command"} for run in runs],
    }
    (options.output_dir / "curve_worth.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(table(runs))


if __name__ == "__main__":
    main()
