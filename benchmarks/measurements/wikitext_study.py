"""Where a shortcut should go, how it should start and what may move: LReg beside LoRA at equal parameters.

    python -m benchmarks.measurements.wikitext_study --model MODEL --train_file TRAIN --test_file TEST --output_dir OUT
        [--methods NAME ...] [--seeds 0 1 2] [--steps 80] [--table_only]

A causal language model of the GPT-2 family is adapted to a new text by every method in `METHODS` from the same
checkpoint, with the same blocks in the same order, AdamW without weight decay, linear schedule and gradient clipping
at 1. The learning rate is chosen with the first seed on the last tenth of the training text, from a grid of the same
size for every method; if the best one is at the edge of the grid the table says so. Then every seed trains at that
rate, and the whole test text is read once per seed. There is no dropout, neither in the model nor in the adapters.

Every finished run is one line of `runs.jsonl` in the output folder and is not repeated, so the study can be stopped,
resumed, and split over processes by --methods. The table, a JSON file and a picture are made from these lines.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from lreg_peft import LRegConfig, initialize_lreg_weights, track_statistics, update_meshes

# Ranks, or components, on all linear layers and the head. Equal for LoRA and LReg.
EVERYWHERE = {"attn.c_attn": 2, "attn.c_proj": 2, "mlp.c_fc": 1, "mlp.c_proj": 1, "lm_head": 1}
# With a projection that does not train there is room for more components.
EVERYWHERE_P_FIXED = {"attn.c_attn": 3, "attn.c_proj": 3, "mlp.c_fc": 2, "mlp.c_proj": 2, "lm_head": 1}
LINEAR = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
ADAPT_EVERY = 20
ADAPT_UNTIL = 0.75


@dataclass(frozen=True)
class Method:
    """One row of the study."""

    attach: Callable[[PreTrainedModel], nn.Module]
    learning_rates: tuple[float, ...]
    start: str | None = None
    adapt: bool = False


def _vocabulary_bias(model: PreTrainedModel) -> nn.Module:
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    head.bias = nn.Parameter(head.weight.new_zeros(head.out_features))
    return model


def _lora(ranks: dict[str, int]) -> Callable[[PreTrainedModel], nn.Module]:
    def attach(model: PreTrainedModel) -> nn.Module:
        pattern = {name.replace(".", r"\."): rank for name, rank in ranks.items()}
        # lora_alpha equal to the rank for every module: the scale is one, the search over learning rates does the rest.
        return get_peft_model(
            model,
            LoraConfig(task_type="CAUSAL_LM", target_modules=list(ranks), rank_pattern=pattern, alpha_pattern=pattern),
        )

    return attach


def _lreg(targets: list[str], components: int, n_nodes: int, **options: Any) -> Callable[[PreTrainedModel], nn.Module]:
    def attach(model: PreTrainedModel) -> nn.Module:
        config = LRegConfig(
            task_type="CAUSAL_LM", target_modules=targets, n_components=components, n_nodes=n_nodes, **options
        )
        return get_peft_model(model, config)

    return attach


def _lreg_everywhere(sizes: dict[str, int] = EVERYWHERE, **options: Any) -> Callable[[PreTrainedModel], nn.Module]:
    pattern = {name.replace(".", r"\."): components for name, components in sizes.items()}
    return _lreg(list(sizes), 1, 8, weighting="factored", component_pattern=pattern, **options)


_RATES = (5e-3, 1e-2, 2e-2, 4e-2)
_HIGHER_RATES = (1e-2, 2e-2, 4e-2, 8e-2)
METHODS = {
    "vocab-bias": Method(_vocabulary_bias, (1e-2, 3e-2, 1e-1, 3e-1)),
    "lora c_attn r8": Method(_lora({"attn.c_attn": 8}), _RATES),
    "lora linear r2": Method(_lora(dict.fromkeys(LINEAR, 2)), _RATES),
    "lora linear+head": Method(_lora(EVERYWHERE), _RATES),
    "lreg mlp, P fixed": Method(_lreg(["mlp"], 15, 2, train_projection=False), _HIGHER_RATES),
    "lreg mlp": Method(_lreg(["mlp"], 10, 2), _RATES),
    "lreg linear+head": Method(_lreg_everywhere(), _RATES),
    "lreg linear+head, pca": Method(_lreg_everywhere(), _RATES, start="pca"),
    "lreg linear+head, gradient": Method(_lreg_everywhere(), _RATES, start="gradient"),
    "lreg linear+head, gradient, P fixed": Method(
        _lreg_everywhere(EVERYWHERE_P_FIXED, train_projection=False), _HIGHER_RATES, start="gradient"
    ),
    "lreg linear+head, gradient, moving mesh": Method(_lreg_everywhere(), _RATES, start="gradient", adapt=True),
}


class Study:
    """Text in blocks and the conditions all runs share."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.log = arguments.output_dir / "runs.jsonl"
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        train = self._blocks(tokenizer, arguments.train_file)
        cut = len(train) * 9 // 10
        self.train, self.tuning = train[:cut], train[cut:]
        self.test = self._blocks(tokenizer, arguments.test_file)

    def _blocks(self, tokenizer: Any, path: Path) -> Tensor:
        ids = torch.tensor(tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"])
        size = self.arguments.block_size
        return ids[: len(ids) // size * size].view(-1, size)

    def run(self, name: str) -> None:
        """Search the learning rate with the first seed, then train and test every seed at the best one."""
        seeds, rates = self.arguments.seeds, METHODS[name].learning_rates
        trials = {rate: self._once(name, rate, seeds[0])["tuning"] for rate in rates}
        best = min(trials, key=lambda rate: trials[rate])
        for seed in seeds:
            self._once(name, best, seed, test=True)

    def finished(self) -> list[dict[str, Any]]:
        """The runs so far."""
        if not self.log.exists():
            return []
        return [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]

    def _once(self, name: str, rate: float, seed: int, test: bool = False) -> dict[str, Any]:
        for run in self.finished():
            if (run["method"], run["rate"], run["seed"]) == (name, rate, seed) and (not test or "test" in run):
                return run
        method = METHODS[name]
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(self.arguments.model, **NO_DROPOUT).eval()
        model = method.attach(base).eval()
        order = torch.cat([torch.randperm(len(self.train)) for _ in range(3)])
        if method.start is not None:
            batches = [self._batch(self.train[order[8 * i : 8 * i + 8]]) for i in range(4)]
            initialize_lreg_weights(model, batches, method=method.start, seed=seed, show_progress=False)
        started = time.perf_counter()
        moves = self._train(model, method, rate, order, f"{name} {rate:g} seed {seed}")
        run = {
            "method": name,
            "rate": rate,
            "seed": seed,
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "seconds": time.perf_counter() - started,
            "tuning": self._perplexity(model, self.tuning),
            **moves,
        }
        if test:
            run["test"] = self._perplexity(model, self.test)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        return run

    def _train(self, model: nn.Module, method: Method, rate: float, order: Tensor, label: str) -> dict[str, int]:
        steps, size = self.arguments.steps, self.arguments.batch_size
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / (0.05 * steps)) * (1 - step / steps)
        )
        if method.adapt:
            track_statistics(model)
        moves = {"accepted": 0, "refused": 0} if method.adapt else {}
        model.train()
        for step in tqdm(range(steps), desc=label, leave=False, disable=self.arguments.no_progress):
            batch = self._batch(self.train[order[step * size : (step + 1) * size]])
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            if method.adapt and (step + 1) % ADAPT_EVERY == 0 and step + 1 <= ADAPT_UNTIL * steps:
                update = update_meshes(model, optimizer, accept=lambda batch=batch: model(**batch).loss.item())
                moves["accepted"] += update.accepted
                moves["refused"] += update.refused
        model.eval()
        return moves

    @torch.no_grad()
    def _perplexity(self, model: nn.Module, blocks: Tensor) -> float:
        total = sum(model(**self._batch(part)).loss.item() * len(part) for part in blocks.split(64))
        return math.exp(total / len(blocks))

    @staticmethod
    def _batch(blocks: Tensor) -> dict[str, Tensor]:
        return {"input_ids": blocks, "labels": blocks}


def table(runs: list[dict[str, Any]], seeds: list[int]) -> tuple[str, list[dict[str, Any]]]:
    """Markdown and rows of the methods whose seeds are all tested."""
    rows = []
    for name, method in METHODS.items():
        tested = [run for run in runs if run["method"] == name and "test" in run and run["seed"] in seeds]
        if len({run["seed"] for run in tested}) < len(seeds):
            continue
        values = [run["test"] for run in tested]
        rate = tested[0]["rate"]
        rows.append(
            {
                "method": name,
                "parameters": tested[0]["parameters"],
                "mean": statistics.mean(values),
                "std": statistics.stdev(values) if len(values) > 1 else 0.0,
                "rate": rate,
                "at_grid_edge": rate in (method.learning_rates[0], method.learning_rates[-1]),
                "moves": f"{sum(run.get('accepted', 0) for run in tested)} kept, "
                f"{sum(run.get('refused', 0) for run in tested)} undone"
                if method.adapt
                else "",
            }
        )
    rows.sort(key=lambda row: row["mean"])
    lines = ["| method | trainable | test perplexity | learning rate | mesh moves |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['method']} | {row['parameters']:,} | {row['mean']:.1f} ± {row['std']:.1f} | {row['rate']:g}"
        f"{' (edge of the grid)' if row['at_grid_edge'] else ''} | {row['moves']} |"
        for row in rows
    ]
    return "\n".join(lines), rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Test perplexity per method, with the spread over seeds."""
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(rows) + 1.2))
    for position, row in enumerate(reversed(rows)):
        colour = "#c23b22" if row["method"].startswith("lreg") else "#4a5568"
        axes.errorbar(row["mean"], position, xerr=row["std"], fmt="o", color=colour, capsize=3)
        axes.annotate(f"{row['mean']:.1f}", (row["mean"], position), (0, 7), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(rows)), [row["method"] for row in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.3)
    axes.set_xlabel("test perplexity, mean and spread over seeds")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of a GPT-2 language model")
    parser.add_argument("--train_file", type=Path, required=True)
    parser.add_argument("--test_file", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--no_progress", action="store_true")
    parser.add_argument("--table_only", action="store_true", help="write the files from the runs that are finished")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    study = Study(arguments)
    if not arguments.table_only:
        for name in arguments.methods:
            study.run(name)
    text, rows = table(study.finished(), arguments.seeds)
    print(text)
    names = ("torch", "transformers", "peft")
    provenance = {
        "command": " ".join(Path(part).name if "/" in part else part for part in sys.argv),  # names, not places
        "settings": {name: getattr(arguments, name) for name in ("seeds", "steps", "batch_size", "block_size")},
        "learning_rates": {name: method.learning_rates for name, method in METHODS.items()},
        "device": f"{platform.machine()} CPU, fp32, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
    }
    result = {"rows": rows, "provenance": provenance}
    (arguments.output_dir / "study.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (arguments.output_dir / "study.md").write_text(text + "\n", encoding="utf-8")
    draw(rows, arguments.output_dir / "study.png")


if __name__ == "__main__":
    main()
