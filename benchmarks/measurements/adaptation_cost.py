"""What adapting meshes adds to a training step.

Two copies of a small GPT-2 with random weights take turns, step by step: one gathers statistics and updates its meshes
every 50 steps, the other does neither. One round is 50 steps of each and one update; its ratio is the time of the first
copy, update included, over the time of the second. Time is that of the process on the CPU, one thread: on a shared
machine it varies less than the clock on the wall, which is reported beside it.

    mlp      a shortcut around every block's mlp (full weighting)
    factored the same, factored weighting
    lm_head  one shortcut from the last hidden state to a vocabulary of 50,257

Run from the repository root; about ten minutes on one core:

    python -m benchmarks.measurements.adaptation_cost
    python -m benchmarks.measurements.adaptation_cost --rounds 1 --steps 5 --placements mlp --output_dir OUT
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peft
import torch
import transformers
from peft import get_peft_model

from lreg_peft import LRegConfig, track_statistics, update_meshes

VOCABULARY = 50257
PLACEMENTS = {
    "mlp": {"target_modules": ["mlp"], "n_components": 8, "n_nodes": 8},
    "factored": {"target_modules": ["mlp"], "n_components": 8, "n_nodes": 16, "weighting": "factored"},
    "lm_head": {"target_modules": ["lm_head"], "n_components": 2, "n_nodes": 8},
}


class Copy:
    """One of the two models, with its optimiser and its clocks."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        self.cpu = self.wall = 0.0

    def run(self, work: Callable[[], object]) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        self.cpu += time.process_time() - cpu
        self.wall += time.perf_counter() - wall

    def step(self, ids: torch.Tensor) -> None:
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(placement: str, options: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=options.length,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    base = transformers.GPT2LMHeadModel(config)
    still = Copy(get_peft_model(base, LRegConfig(preset="paper", task_type="CAUSAL_LM", **PLACEMENTS[placement])))
    moving = Copy(copy.deepcopy(still.model))
    track_statistics(moving.model)
    batches = torch.randint(VOCABULARY, (8, options.batch, options.length))
    for arm in (still, moving):  # memory pools and lazy imports
        for ids in batches[:2]:
            arm.step(ids)
    update_meshes(moving.model, moving.optimizer)
    rounds = []
    for i in range(options.rounds):
        for arm in (still, moving):
            arm.cpu = arm.wall = 0.0
        for step in range(options.steps):
            arms = (still, moving) if (i + step) % 2 else (moving, still)
            for arm in arms:
                arm.run(partial(arm.step, batches[step % len(batches)]))
        steps = moving.cpu
        moving.run(partial(update_meshes, moving.model, moving.optimizer))
        rounds.append(
            {
                "cpu_ratio": moving.cpu / still.cpu,
                "wall_ratio": moving.wall / still.wall,
                "gathering_ratio": steps / still.cpu,
                "update_ms": 1000 * (moving.cpu - steps),
                "step_ms": 1000 * still.cpu / options.steps,
            }
        )
        print(placement, json.dumps({name: round(value, 4) for name, value in rounds[-1].items()}), flush=True)
    shortcut = sum(p.numel() for p in moving.model.parameters() if p.requires_grad)
    return {"placement": placement, "trainable_parameters": shortcut, "rounds": rounds}


def spread(result: dict, name: str) -> tuple[float, float, float]:
    """Median and quartiles over the rounds."""
    values = [entry[name] for entry in result["rounds"]]
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return statistics.median(values), low, high


def table(results: list[dict]) -> str:
    lines = [
        "| placement | trainable parameters | step, ms | gathering | gathering and update | on the wall | update, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        cells = [result["placement"], f"{result['trainable_parameters']:,}", f"{spread(result, 'step_ms')[0]:.0f}"]
        for name in ("gathering_ratio", "cpu_ratio", "wall_ratio"):
            median, low, high = spread(result, name)
            cells.append(f"{median:.4f} ({low:.4f} to {high:.4f})")
        cells.append(f"{spread(result, 'update_ms')[0]:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: list[dict], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for i, result in enumerate(results):
        values = [entry["cpu_ratio"] for entry in result["rounds"]]
        axes.plot([i] * len(values), values, "o", color="#0b5394", alpha=0.5)
        axes.plot([i - 0.2, i + 0.2], [statistics.median(values)] * 2, color="#0b5394")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.axhline(1.03, color="#e08214", linewidth=0.8, linestyle="--", label="1.03")
    axes.set_xticks(range(len(results)), [result["placement"] for result in results])
    axes.set_xlim(-0.5, len(results) - 0.5)
    axes.set_ylabel("CPU time, moving / still")
    axes.set_title(title, fontsize=8)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50, help="steps per round, followed by one update")
    parser.add_argument("--placements", nargs="+", choices=PLACEMENTS, default=list(PLACEMENTS))
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/adaptation_cost"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    results = [measure(placement, options) for placement in options.placements]
    provenance = {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "device": f"CPU, 1 thread, {platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "seed": 0,
        "width": options.width,
        "layers": options.layers,
        "batch": options.batch,
        "length": options.length,
        "steps_per_update": options.steps,
    }
    report = {**provenance, "results": results}
    (options.output_dir / "adaptation_cost.json").write_text(json.dumps(report, indent=2) + "\n")
    text = table(results)
    (options.output_dir / "adaptation_cost.md").write_text(text + "\n")
    title = (
        f"GPT-2, width {options.width}, {options.layers} layers, vocabulary {VOCABULARY:,}, {options.batch} x "
        f"{options.length} tokens,\none update per {options.steps} steps; torch {torch.__version__}, CPU, 1 thread"
    )
    draw(results, title, options.output_dir / "adaptation_cost.png")
    print(text)


if __name__ == "__main__":
    main()
