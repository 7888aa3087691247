"""What a step costs where starting operations is what costs: many small layers, as a GPU sees a small model.

    OMP_NUM_THREADS=1 python -m benchmarks.measurements.launch_counts --output_dir OUT [--compile] [--rounds 25]
        [--layers 24] [--width 32] [--device cpu|cuda]

A GPT-2 of narrow layers, frozen, with a shortcut or a LoRA matrix on each of its linear layers: LReg's recipe without
output layer and norm, and LoRA with the same ranks in the same places. Counted are the operations that reach the
backends (those that only change how a tensor is looked at are left out) in forward and loss, and in the backward pass,
beyond those of the frozen model, per adapted module. Timed are whole steps (forward, loss, backward, AdamW), the models
taking turns; ratios are formed within a turn. No dropout anywhere. The frozen model trains its position embeddings, so
that a gradient runs through all of its layers in every case.

On a CPU the clock is the CPU time of the process on one thread, on a GPU wall time between synchronisations. --compile
times steps of `torch.compile(model, fullgraph=True)`, too, after the eager ones; compiling takes minutes.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2LMHeadModel
from transformers.utils import logging

from benchmarks.measurements.machine import command, device_name, versions
from benchmarks.measurements.speed_models import frozen_gpt2, lora_like
from lreg_peft import recommended_config

VOCABULARY = 128
WARM_UP = 2
#: Operations that start nothing: they make another view of a tensor.
VIEWS = {
    *("view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "unsqueeze", "squeeze", "detach"),
    *("permute", "alias", "as_strided", "split", "unbind", "reshape", "_reshape_alias", "unfold"),
}


class Count(TorchDispatchMode):
    """Counts the operations below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func.__name__.split(".")[0] not in VIEWS
        return func(*args, **(kwargs or {}))


def frozen(options: argparse.Namespace) -> GPT2LMHeadModel:
    return frozen_gpt2(options.width, options.layers, heads=2, vocab_size=VOCABULARY)


def models(options: argparse.Namespace) -> dict[str, nn.Module]:
    """The frozen model, LoRA and LReg."""
    base = frozen(options)
    base.transformer.wpe.requires_grad_(True)
    places = {"output_head": False, "final_norm": False, "init_weights": True}
    lreg = recommended_config(frozen(options), task_type="CAUSAL_LM", **places)
    made = {
        "frozen": base,
        "LoRA": get_peft_model(frozen(options), lora_like(lreg)),
        "LReg": get_peft_model(frozen(options), lreg),
    }
    return {name: model.train().to(options.device) for name, model in made.items()}


def counts(made: dict[str, nn.Module], ids: Tensor, n_modules: int) -> dict[str, dict[str, float]]:
    """Operations forward and backward beyond those of the frozen model, per adapted module."""
    found = {}
    for name, model in made.items():
        for _ in range(WARM_UP):
            model(input_ids=ids, labels=ids).loss.backward()
        with Count() as forward:
            loss = model(input_ids=ids, labels=ids).loss
        with Count() as backward:
            loss.backward()
        model.zero_grad()
        found[name] = {"forward": forward.n, "backward": backward.n}
    return {
        name: {way: (found[name][way] - found["frozen"][way]) / n_modules for way in ("forward", "backward")}
        for name in ("LoRA", "LReg")
    }


def steps(made: dict[str, nn.Module], ids: Tensor, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every step of every model, taking turns."""
    on_cpu = options.device == "cpu"
    clock: Callable[[], float] = time.process_time if on_cpu else time.perf_counter
    wait: Callable[[], object] = (lambda: None) if on_cpu else torch.cuda.synchronize
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=True)
        for name, model in made.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in made}
    names = list(made)
    for turn in range(options.rounds + WARM_UP):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            wait()
            start = clock()
            made[name](input_ids=ids, labels=ids).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            wait()
            if turn >= WARM_UP:
                seconds[name].append(clock() - start)
    return seconds


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and how many times LoRA's step LReg's takes, with quartiles."""
    ratios = [own / theirs for own, theirs in zip(seconds["LReg"], seconds["LoRA"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {
        "milliseconds": {name: 1000 * statistics.median(values) for name, values in seconds.items()},
        "LReg / LoRA": median,
        "quartiles": [low, high],
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, help="where launch_counts.json goes; none is written without it")
    parser.add_argument("--rounds", type=int, default=25, help="steps of every model that are timed")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="time compiled steps, too")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    made = models(options)
    ids = torch.randint(VOCABULARY, (1, options.length), device=options.device)
    operations = counts(made, ids, n_modules=4 * options.layers)
    for name, found in operations.items():
        print(f"{name}: {found['forward']:.1f} operations forward, {found['backward']:.1f} backward per adapted module")
    timed = {"eager": summary(steps(made, ids, options))}
    if options.compile:
        compiled = {name: torch.compile(model, fullgraph=True) for name, model in made.items()}
        timed["compiled"] = summary(steps(compiled, ids, options))
    for way, found in timed.items():
        each = ", ".join(f"{name} {value:.1f} ms" for name, value in found["milliseconds"].items())
        low, high = found["quartiles"]
        print(f"{way}: {each}; LReg / LoRA {found['LReg / LoRA']:.2f} ({low:.2f}-{high:.2f})")
    if options.output_dir is None:
        return
    record = {
        "command": command(),
        "device": device_name(options.device),
        "clock": "CPU time of the process, one thread" if options.device == "cpu" else "wall",
        **{name: getattr(options, name) for name in ("layers", "width", "length", "rounds")},
        "versions": versions("torch", "transformers", "peft"),
        "operations per adapted module": operations,
        "steps": timed,
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "launch_counts.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
