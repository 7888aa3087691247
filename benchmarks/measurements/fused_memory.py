"""Peak memory and time of a training step with a shortcut on the output layer, with and without the fused loss.

    python -m benchmarks.measurements.fused_memory --output_dir OUT [--vocabularies 50257 128256] [--lengths 1024 4096]
        [--steps 3] [--most_gib 20]

A GPT-2 of two layers of width 64 with random weights, so that the logits are what counts; a shortcut of two components
on the output layer, batch 1, fp32. Every measurement is a process of its own, because the peak of a process
(`ru_maxrss`) never falls: what it had before the steps that count is taken off. The time is the CPU time of a step,
median without the first one. A step of 16 tokens comes before, in which the fused loss is compared with the model's
own: the first batch of a training takes the memory of both. Combinations that would need more than --most_gib, at six
tensors of logits, are left out.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.measurements.machine import command, device_name, versions
from lreg_peft import LRegConfig

WIDTH, LAYERS = 64, 2
GIB = 2**30


def peak() -> int:
    """Largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(vocabulary: int, length: int, fused: bool, steps: int) -> dict[str, Any]:
    """In this process, which should have done nothing else."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocabulary, n_positions=4096, n_embd=WIDTH, n_layer=LAYERS, n_head=2)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, name, 0.0)
    lreg = LRegConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], n_components=2, n_nodes=8, fused_loss=fused)
    model = get_peft_model(GPT2LMHeadModel(config), lreg).train()
    ids = torch.randint(vocabulary, (1, length))
    model(input_ids=ids[:, :16], labels=ids[:, :16]).loss.backward()
    baseline, seconds = peak(), []
    for _ in range(steps):
        started = time.process_time()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        seconds.append(time.process_time() - started)
    return {
        "vocabulary": vocabulary,
        "length": length,
        "fused": fused,
        "logits_gib": 4 * vocabulary * length / GIB,
        "peak_gib": (peak() - baseline) / GIB,
        "seconds": statistics.median(seconds[1:] or seconds),
    }


def child(vocabulary: int, length: int, fused: bool, steps: int) -> dict[str, Any]:
    """`measure` in a fresh process."""
    options = ["--one", str(vocabulary), str(length), str(int(fused)), "--steps", str(steps)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.measurements.fused_memory", *options, "--output_dir", "."],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def table(runs: list[dict[str, Any]]) -> str:
    """A row for each vocabulary and length."""
    lines = [
        "| vocabulary | length | logits once, GiB | peak, GiB | peak, `fused_loss=True`, GiB | of it | its time |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for plain in runs:
        sizes = plain["vocabulary"], plain["length"]
        for fused in (run for run in runs if run["fused"] and (run["vocabulary"], run["length"]) == sizes):
            if plain["fused"]:
                continue
            memory, seconds = fused["peak_gib"], fused["seconds"] / plain["seconds"]
            lines.append(
                f"| {plain['vocabulary']:,} | {plain['length']:,} | {plain['logits_gib']:.2f} | "
                f"{plain['peak_gib']:.2f} | {memory:.2f} | {memory / plain['peak_gib']:.2f} | {seconds:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure all combinations, one process after the other; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[50_257, 128_256])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--most_gib", type=float, default=20.0)
    parser.add_argument("--one", type=int, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        vocabulary, length, fused = arguments.one
        print(json.dumps(measure(vocabulary, length, bool(fused), arguments.steps)))
        return
    runs = [
        child(vocabulary, length, fused, arguments.steps)
        for vocabulary in arguments.vocabularies
        for length in arguments.lengths
        if 6 * 4 * vocabulary * length / GIB <= arguments.most_gib
        for fused in (False, True)
    ]
    print(table(runs))
    record = {
        "command": command(),
        "versions": versions("torch", "transformers", "peft", "lreg_peft"),
        "machine": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "runs": runs,
    }
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "fused_memory.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
