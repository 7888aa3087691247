"""What a training step costs: LReg beside LoRA, full fine-tuning and the frozen model's own forward pass.

    python -m benchmarks.measurements.training_speed --output_dir OUT
        [--parts gpt2 recipe minilm cache roberta inference n_nodes sizes]
        [--model gpt2|gpt2-medium|gpt2-large] [--device cpu|cuda] [--dtype float32|bfloat16] [--rounds 5]

Architectures at full size with random weights, which cost what trained ones cost. The methods of a part take turns,
round by round, and every ratio is formed inside a round. On a CPU the clock is the process's CPU time on --threads
threads, which other programs on the machine disturb least; on a GPU it is wall time between synchronisations. No model
has dropout.

    gpt2       a training step on GPT-2: forward, loss, backward, AdamW
    recipe     the same for recommended_config, with and without the output head, and LoRA in the same places and
               sizes, but for the norm before the head
    minilm     a training step on an encoder of MiniLM's size (6 layers, 384 features), 16 samples of 24, 32, 64 and 128
               tokens, recommended_config against LoRA in the same places and sizes
    cache      three epochs from stored features, building the cache included, against three epochs of LoRA
    roberta    a training step on RoBERTa-base, shortcuts at query and key, against LoRA there
    inference  tokens with a key-value cache, GPT-2, batch 1; LoRA unmerged
    n_nodes        one layer of 768 features, d = 8: from 8 to 1024 nodes
    sizes      a shortcut at the head, length and vocabulary varied

All parts take about 30 minutes on one quiet core; --smoke takes two-layer models and one round.
"""

import argparse
import gc
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.utils import logging

from benchmarks.measurements.machine import command, device_name, versions
from benchmarks.measurements.speed_models import GPT2_SIZES, NO_GPT2_DROPOUT, lora_like, train_step
from lreg_peft import LRegConfig, cache_features, recommended_config

NO_BERT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
MINILM_BATCH, MINILM_LENGTHS = 16, (24, 32, 64, 128)
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
PARTS = ("gpt2", "recipe", "minilm", "cache", "roberta", "inference", "n_nodes", "sizes")


class Bench:
    """Clock, memory and the rounds."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.dtype = getattr(torch, options.dtype)

    def seconds(self, work: Callable[[], object]) -> float:
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        self._wait()
        start = clock()
        work()
        self._wait()
        return clock() - start

    def extra_memory(self, work: Callable[[], object]) -> float:
        """MiB that a piece of work needs at its peak above what was there before."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
        if not clear.exists():
            return float("nan")
        clear.write_text("5")  # resets the peak of the resident set
        before = _status_mib(status, "VmRSS")
        work()
        return _status_mib(status, "VmHWM") - before

    def rounds(self, cases: dict[str, Callable[[], object]], label: str) -> dict[str, list[float]]:
        """Seconds of every case in every round; one warm-up, the order turns."""
        for work in cases.values():
            work()
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        names = list(cases)
        for i in tqdm(range(self.options.rounds), desc=label, disable=self.options.no_progress):
            shift = i % len(names)
            for name in names[shift:] + names[:shift]:
                seconds[name].append(self.seconds(cases[name]))
        return seconds

    def place(self, model: nn.Module) -> nn.Module:
        return model.to(self.device, self.dtype)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _status_mib(status: Path, name: str) -> float:
    match = re.search(rf"{name}:\s+(\d+) kB", status.read_text(encoding="utf-8"))
    return int(match.group(1)) / 1024 if match else float("nan")


# --- models -----------------------------------------------------------------------------------------------------------


def gpt2(bench: Bench, **options: Any) -> PreTrainedModel:
    width, layers, heads = GPT2_SIZES[bench.options.model]
    if bench.options.smoke:
        width, layers, heads = 64, 2, 2
    torch.manual_seed(0)
    config = GPT2Config(n_embd=width, n_layer=layers, n_head=heads, use_cache=False, **NO_GPT2_DROPOUT, **options)
    return bench.place(GPT2LMHeadModel(config).eval())


def lreg(base: PreTrainedModel, d: int, n_nodes: int, **options: Any) -> nn.Module:
    return get_peft_model(
        base, LRegConfig(preset="paper", n_components=d, n_nodes=n_nodes, init_weights=False, **options)
    ).train()


def lora(base: PreTrainedModel, *targets: str, task: str = "CAUSAL_LM") -> nn.Module:
    config = LoraConfig(
        task_type=task, target_modules=list(targets), r=8, lora_alpha=16, fan_in_fan_out=task == "CAUSAL_LM"
    )
    return get_peft_model(base, config).train()


#: Components of `recommended_config` without a budget, on GPT-2, where LoRA can follow with the same ranks. The norm
#: before the head, with four components more, is LReg's alone.
RECIPE = {"attn.c_attn": 2, "attn.c_proj": 2, "mlp.c_fc": 1, "mlp.c_proj": 1, "lm_head": 1}


def recommended(base: PreTrainedModel, *, head: bool, fused: bool = False) -> nn.Module:
    options = {"output_head": head, "init_weights": False, "fused_loss": fused}
    return get_peft_model(base, recommended_config(base, task_type="CAUSAL_LM", **options)).train()


def lora_everywhere(base: PreTrainedModel, *, head: bool) -> nn.Module:
    ranks = {name.replace(".", r"\."): rank for name, rank in RECIPE.items() if head or name != "lm_head"}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=[name for name in RECIPE if head or name != "lm_head"],
        rank_pattern=ranks,
        alpha_pattern=ranks,
        fan_in_fan_out=True,
    )
    return get_peft_model(base, config).train()


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def forward_and_loss(model: nn.Module) -> Callable[[dict[str, Tensor]], None]:
    @torch.no_grad()
    def step(batch: dict[str, Tensor]) -> None:
        model(**batch).loss.item()

    return step


def tokens(bench: Bench, vocabulary: int, batch: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(1)).to(bench.device)
    return {"input_ids": ids, "labels": ids}


# --- parts ------------------------------------------------------------------------------------------------------------


def steps_of(
    bench: Bench, builders: dict[str, Callable[[], tuple[nn.Module, Callable]]], batch: dict[str, Tensor], label: str
) -> list[dict[str, Any]]:
    """Alternate training steps of several models; each keeps its own copy of the weights."""
    models, cases = {}, {}
    for name, build in builders.items():
        models[name], step = build()
        cases[name] = partial(step, batch)
    seconds = bench.rounds(cases, label)
    memory = {name: bench.extra_memory(work) for name, work in cases.items()}
    n_tokens = batch["input_ids"].numel()
    return [
        {
            "case": name,
            "trainable": trainable(models[name]),
            "seconds": seconds[name],
            "tokens_per_second": n_tokens / statistics.median(seconds[name]),
            "extra_memory_mib": memory[name],
        }
        for name in cases
    ]


def part_gpt2(bench: Bench) -> list[dict[str, Any]]:
    def frozen() -> tuple[nn.Module, Callable]:
        model = gpt2(bench).requires_grad_(False)
        return model, forward_and_loss(model)

    def trained(wrap: Callable[[PreTrainedModel], nn.Module]) -> tuple[nn.Module, Callable]:
        model = wrap(gpt2(bench))
        return model, train_step(model)

    builders = {
        "frozen forward + loss": frozen,
        "full fine-tuning": partial(trained, lambda base: base.train()),
        "LoRA r 8 c_attn": partial(trained, lambda base: lora(base, "c_attn")),
        "LReg head K 4": partial(trained, lambda base: lreg(base, 2, 2)),
        "LReg head K 16": partial(trained, lambda base: lreg(base, 2, 8)),
        "LReg head K 16, fused loss": partial(trained, lambda base: lreg(base, 2, 8, fused_loss=True)),
    }
    if bench.options.model != "gpt2":
        del builders["full fine-tuning"]
    batch = tokens(bench, 50257, bench.options.batch, bench.options.length)
    return steps_of(bench, builders, batch, "gpt2")


def part_recipe(bench: Bench) -> list[dict[str, Any]]:
    def trained(wrap: Callable[[PreTrainedModel], nn.Module]) -> tuple[nn.Module, Callable]:
        model = wrap(gpt2(bench))
        return model, train_step(model)

    builders = {
        f"{name} {'with' if head else 'without'} head": partial(trained, partial(wrap, head=head))
        for head in (True, False)
        for name, wrap in (("LoRA", lora_everywhere), ("LReg recommended", recommended))
    }
    builders["LReg recommended, fused loss, with head"] = partial(trained, partial(recommended, head=True, fused=True))
    return steps_of(bench, builders, tokens(bench, 50257, bench.options.batch, bench.options.length), "recipe")


def part_minilm(bench: Bench) -> list[dict[str, Any]]:
    def build(method: str) -> tuple[nn.Module, Callable]:
        torch.manual_seed(0)
        sizes = SMALL if bench.options.smoke else MINILM
        base = bench.place(BertForSequenceClassification(BertConfig(**sizes, **NO_BERT_DROPOUT)))
        config: PeftConfig = recommended_config(base, task_type="SEQ_CLS", init_weights=False)
        if method == "LoRA":
            config = lora_like(config)
        model = get_peft_model(base, config).train()
        return model, train_step(model)

    rows = []
    for length in MINILM_LENGTHS:
        batch = tokens(bench, 30522, MINILM_BATCH, length)
        batch["labels"] = batch["labels"][:, 0] % 2
        builders = {f"{method}, {length} tokens": partial(build, method) for method in ("LoRA", "LReg recommended")}
        rows += steps_of(bench, builders, batch, f"minilm, {length} tokens")
    return rows


def part_cache(bench: Bench) -> list[dict[str, Any]]:
    n = 4 if bench.options.smoke else 16
    data = [{name: value[0] for name, value in tokens(bench, 50257, 1, bench.options.length).items()} for _ in range(n)]
    for i, sample in enumerate(data):
        sample["input_ids"] = sample["labels"] = (sample["input_ids"] + i) % 50257
    model, other = lreg(gpt2(bench), 2, 8), lora(gpt2(bench), "c_attn")
    steps = {"LReg": train_step(model), "LoRA": train_step(other)}
    rows = []
    for i in tqdm(range(max(1, bench.options.rounds // 2)), desc="cache", disable=bench.options.no_progress):
        with tempfile.TemporaryDirectory() as folder:
            built: list[Any] = []
            build = bench.seconds(
                lambda folder=folder, built=built: built.append(
                    cache_features(model, DataLoader(data, 1), Path(folder) / "cache", show_progress=False)
                )
            )
            cache = built[0]

            def epoch_from_cache(cache: Any = cache) -> None:
                for k in range(n):
                    steps["LReg"]({name: value.to(bench.device) for name, value in cache[k].items()})

            def epoch(name: str) -> None:
                for sample in data:
                    steps[name]({key: value[None] for key, value in sample.items()})

            rows.append(
                {
                    "round": i,
                    "build": build,
                    "cached epoch": bench.seconds(epoch_from_cache),
                    "LReg epoch": bench.seconds(partial(epoch, "LReg")),
                    "LoRA epoch": bench.seconds(partial(epoch, "LoRA")),
                }
            )
            row = rows[-1]
            for epochs in (3, 10):
                row[f"LoRA / cached, {epochs} epochs"] = (
                    epochs * row["LoRA epoch"] / (build + epochs * row["cached epoch"])
                )
    names = [name for name in rows[0] if name != "round"]
    return [{"case": name, "seconds": [row[name] for row in rows]} for name in names]


def part_roberta(bench: Bench) -> list[dict[str, Any]]:
    def build(wrap: Callable[[PreTrainedModel], nn.Module], frozen: bool = False) -> tuple[nn.Module, Callable]:
        torch.manual_seed(0)
        sizes = SMALL if bench.options.smoke else {}
        config = RobertaConfig(num_labels=2, max_position_embeddings=514, **sizes, **NO_BERT_DROPOUT)
        model = wrap(bench.place(RobertaForSequenceClassification(config).eval()))
        return model, forward_and_loss(model) if frozen else train_step(model)

    builders = {
        "frozen forward + loss": partial(build, lambda base: base.requires_grad_(False), frozen=True),
        "LoRA r 8 query, key": partial(build, lambda base: lora(base, "query", "key", task="SEQ_CLS")),
        "LReg d 2, n_nodes 6 query, key": partial(
            build, lambda base: lreg(base, 2, 6, task_type="SEQ_CLS", target_modules=["query", "key"])
        ),
        "LReg d 4, n_nodes 8 factored query, key": partial(
            build,
            lambda base: lreg(base, 4, 8, weighting="factored", task_type="SEQ_CLS", target_modules=["query", "key"]),
        ),
    }
    batch = tokens(bench, 50000, bench.options.batch * 2, bench.options.length // 2)
    batch["labels"] = torch.zeros(len(batch["input_ids"]), dtype=torch.long, device=bench.device)
    return steps_of(bench, builders, batch, "roberta")


@torch.no_grad()
def part_inference(bench: Bench) -> list[dict[str, Any]]:
    def generation(model: nn.Module) -> Callable[[], None]:
        model.eval()
        prompt = tokens(bench, 50257, 1, 32)["input_ids"]
        n = 4 if bench.options.smoke else 16

        def run() -> None:
            past, ids = None, prompt
            for _ in range(n):
                output = model(input_ids=ids, past_key_values=past, use_cache=True)
                past, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)

        return run

    models = {
        "base": gpt2(bench),
        "LReg head K 16": lreg(gpt2(bench), 2, 8),
        "LoRA r 8 c_attn": lora(gpt2(bench), "c_attn"),
        "LoRA with head": lora_everywhere(gpt2(bench), head=True),
        "LReg recommended with head": recommended(gpt2(bench), head=True),
    }
    cases = {name: generation(model) for name, model in models.items()}
    # A token takes milliseconds: more rounds cost little and steady the median.
    rounds, bench.options.rounds = bench.options.rounds, bench.options.rounds * 4
    seconds = bench.rounds(cases, "inference")
    bench.options.rounds = rounds
    return [{"case": name, "seconds": values} for name, values in seconds.items()]


def part_dof(bench: Bench) -> list[dict[str, Any]]:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(768, 768)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    x = torch.randn(2048, 768, device=bench.device, dtype=bench.dtype, requires_grad=True)
    gradient = torch.randn_like(x)

    def step(model: nn.Module) -> None:
        model(x).backward(gradient)
        model.zero_grad()
        x.grad = None

    base = bench.place(Layer()).requires_grad_(False)
    cases: dict[str, Callable[[], object]] = {"linear layer alone": partial(step, base)}
    for head in ("full", "factored"):
        for n_nodes in (8, 64, 256, 1024):
            model = lreg(bench.place(Layer()), 8, n_nodes, target_modules=["linear"], weighting=head)
            cases[f"{head}, n_nodes {n_nodes}"] = partial(step, bench.place(model))
    seconds = bench.rounds(cases, "n_nodes")
    return [{"case": name, "seconds": values} for name, values in seconds.items()]


def part_sizes(bench: Bench) -> list[dict[str, Any]]:
    rows = []
    for vocabulary, length in ((8192, 256), (50257, 64), (50257, 256), (50257, 1024)):
        frozen = gpt2(bench, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0).requires_grad_(False)
        models = {
            "frozen": (frozen, forward_and_loss(frozen)),
            "LReg": None,
            "LReg, fused loss": None,
        }
        for name, fused in (("LReg", False), ("LReg, fused loss", True)):
            base = gpt2(bench, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0)
            model = lreg(base, 2, 8, fused_loss=fused)
            models[name] = (model, train_step(model))
        batch = tokens(bench, vocabulary, 1, length)
        label = f"vocabulary {vocabulary:,}, length {length}"
        rows += [
            {**row, "case": f"{label}: {row['case']}"}
            for row in steps_of(bench, {n: (lambda pair=pair: pair) for n, pair in models.items()}, batch, label)
        ]
    return rows


# --- report -----------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return statistics.median(values), low, high


def ratio(row: dict[str, Any], to: dict[str, Any] | None) -> str:
    if to is None:
        return ""
    median, low, high = spread([a / b for a, b in zip(row["seconds"], to["seconds"], strict=True)])
    return f"{median:.3f} ({low:.3f}-{high:.3f})"


#: What the rows of a part are compared with, where it is not the first of them.
BESIDE = {"sizes": "frozen", "minilm": "LoRA"}


def table(part: str, rows: list[dict[str, Any]]) -> str:
    by_name = {row["case"]: row for row in rows}
    default_lora = next((row for row in rows if row["case"].startswith("LoRA r")), None)
    first = rows[0]
    lines = [
        f"**{part}**",
        "",
        f"| case | trainable | seconds | / {BESIDE.get(part, first['case'])} | / LoRA | tokens/s | extra memory, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        base = first
        if part == "sizes":
            base = by_name[row["case"].rsplit(":", 1)[0] + ": frozen"]
        # The recipe beside LoRA in the same places, or with samples of the same length.
        where = " ".join(row["case"].split()[-2:])
        lora_row = by_name.get(f"LoRA {where}") or by_name.get(f"LoRA, {where}", default_lora)
        if part == "minilm":
            base = lora_row
        median, low, high = spread(row["seconds"])
        cells = [
            row["case"],
            f"{row['trainable']:,}" if "trainable" in row else "",
            f"{median:.4g} ({low:.4g}-{high:.4g})",
            "" if part == "cache" else ratio(row, base),
            "" if part == "cache" else ratio(row, lora_row),
            f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "",
            f"{row['extra_memory_mib']:,.0f}" if "extra_memory_mib" in row else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    from matplotlib.figure import Figure

    shown = {part: rows for part, rows in results.items() if part != "cache"}
    if not shown:
        return
    figure = Figure(figsize=(8, 0.34 * sum(map(len, shown.values())) + 0.9 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=[len(rows) + 1 for rows in shown.values()])
    for (part, rows), axes in zip(shown.items(), panels[:, 0], strict=True):
        medians = [statistics.median(row["seconds"]) for row in rows]
        colours = ["#c23b22" if "LReg" in row["case"] or "n_nodes" in row["case"] else "#4a5568" for row in rows]
        axes.barh([row["case"] for row in rows], medians, color=colours)
        axes.invert_yaxis()
        axes.set_title(part, fontsize=9)
        axes.set_xlabel("seconds")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--model", default="gpt2", choices=list(GPT2_SIZES))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="tiny models, one round: only shows that everything runs")
    parser.add_argument("--no_progress", action="store_true")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use, and there is none.")
    if options.smoke:
        options.rounds = 1
    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    bench, results, texts = Bench(options), {}, []
    for part in options.parts:
        results[part] = globals()[f"part_{part}"](bench)
        texts.append(table(part, results[part]))
        print(texts[-1], "\n", flush=True)
        gc.collect()
        provenance = {
            "command": command(),
            "device": device_name(options.device),
            "clock": "wall" if options.device == "cuda" else "CPU time of the process",
            "dropout": "none in any model",
            **{name: getattr(options, name) for name in ("model", "dtype", "batch", "length", "rounds", "threads")},
            "versions": versions("torch", "transformers", "peft"),
        }
        record = {"provenance": provenance, "results": results}
        (options.output_dir / "training_speed.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (options.output_dir / "training_speed.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    draw(results, options.output_dir / "training_speed.png")


if __name__ == "__main__":
    main()
