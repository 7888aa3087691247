"""LReg on a GPU: is it right in fp32, bf16 and fp16, what does a step cost beside LoRA, what does the fused loss save?

    python -m benchmarks.measurements.gpu --output_dir OUT [--parts parity features steps memory] [--rounds 20]
        [--models gpt2 gpt2-medium] [--device cuda|cpu] [--smoke]

Random weights of full size (parity and features: two layers of 64 features), no dropout, no data to load; three minutes
on one GPU and 12 cores without what is compiled, which takes longer than that.

    parity     logits and gradients of LReg's recipe, of full weighting around `mlp`, of the fused loss and of LoRA, in
               each precision, against the same model in fp64 on the CPU: norms of differences, relative
    features   what else a user calls, on the GPU and on the CPU from the same weights: the start from data, a training
               (fp32, autocast to bf16 and fp16), moved nodes, the certified fit, the cache, generation, conversion
               to LoRA; how far apart the two end
    steps      forward, loss, backward, AdamW of the recipe, with and without fused loss, and of LoRA on the same
               modules with the same ranks (but for the norm before the head); forward and loss of the frozen model.
               bf16, and fp32 for the first model. Models take turns, each in a process of its own; then those in
               bf16 are compiled, all at once, and take turns again. Wall time between synchronisations, memory that a
               step adds, kernels that it starts
    memory     peak of a step with a vocabulary of 50,257 and 128,256, with and without the fused loss

A part that fails is reported with its error, and the others go on; steps that are not ready after --patience seconds
are left out. With --device cpu everything but `memory` runs, too, which is good for trying the script.
"""

import argparse
import copy
import gc
import json
import operator
import queue
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, multiprocessing, nn
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2LMHeadModel
from transformers.utils import logging

import lreg_peft
from benchmarks.measurements.machine import command, device_name, versions
from benchmarks.measurements.speed_models import GPT2_SIZES, frozen_gpt2, lora_like, train_step

TINY = (64, 2, 2)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
METHODS = ("frozen", "LoRA", "LReg", "LReg, fused loss")
SHAPES = ((8, 512), (1, 128))  # of a batch: arithmetic counts in the first, starting kernels in the second
VOCABULARY, TINY_VOCABULARY = 50_257, 512
WARM_UP = 3


def gpt2(size: str, vocabulary: int = VOCABULARY, positions: int = 1024) -> GPT2LMHeadModel:
    """Random weights, frozen, no dropout."""
    sizes = TINY if size == "tiny" else GPT2_SIZES[size]
    return frozen_gpt2(*sizes, vocab_size=vocabulary, n_positions=positions, use_cache=False)


def recipe(base: nn.Module, **options: Any) -> PeftModel:
    """The recommended adapter, as drawn."""
    config = lreg_peft.recommended_config(base, task_type="CAUSAL_LM", init_weights=True, **options)
    return get_peft_model(base, config)


def lora(base: nn.Module) -> PeftModel:
    """LoRA on the modules of the recipe, with its ranks. It cannot go to a norm."""
    return get_peft_model(base, lora_like(lreg_peft.recommended_config(base, task_type="CAUSAL_LM", final_norm=False)))


def awaken(model: nn.Module) -> nn.Module:
    """Give an adapter, whose outputs start at zero, weights as after some training."""
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.requires_grad]


def ids(batch: int, length: int, device: torch.device | str, vocabulary: int, seed: int = 1) -> dict[str, Tensor]:
    found = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed)).to(device)
    return {"input_ids": found, "labels": found}


def apart(found: Tensor, reference: Tensor) -> float:
    """The norm of a difference, relative."""
    found, reference = found.detach().double().cpu(), reference.detach().double().cpu()
    return (torch.linalg.vector_norm(found - reference) / torch.linalg.vector_norm(reference)).item()


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --- parity -----------------------------------------------------------------------------------------------------------


def parity(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Logits and gradients against fp64 on the CPU."""

    def full(base: nn.Module) -> PeftModel:
        config = lreg_peft.LRegConfig(task_type="CAUSAL_LM", target_modules=["mlp"], n_components=3, n_nodes=6)
        return get_peft_model(base, config)

    adapters: dict[str, Callable[[nn.Module], PeftModel]] = {
        "LReg, recipe": recipe,
        "LReg, full weighting around mlp": full,
        "LReg, recipe, fused loss": lambda base: recipe(base, fused_loss=True),
        "LoRA": lora,
    }
    rows = []
    for name, attach in adapters.items():
        model = awaken(attach(gpt2("tiny", TINY_VOCABULARY))).train()
        reference, batch = copy.deepcopy(model).double(), ids(4, 64, "cpu", TINY_VOCABULARY)
        reference_loss = reference(**batch).loss
        reference_loss.backward()
        with torch.no_grad():
            reference_logits = reference.eval()(input_ids=batch["input_ids"]).logits
        for precision, dtype in PRECISIONS.items():
            # As PEFT does it: the base in a precision, what is trained in fp32; then an fp32 base with autocast.
            for autocast in (False,) if precision == "fp32" else (False, True):
                own = copy.deepcopy(model).to(options.device)
                for weight in own.parameters():
                    if not (autocast or weight.requires_grad):
                        weight.data = weight.data.to(dtype)
                moved = {key: value.to(options.device) for key, value in batch.items()}
                with torch.autocast(options.device, dtype) if autocast else nullcontext():
                    own.train()(**moved)  # the first batch of a fused loss is computed both ways, to compare
                    loss = own(**moved).loss
                    with torch.no_grad():
                        logits = own.eval()(input_ids=moved["input_ids"]).logits
                scale = 1024.0 if dtype is torch.float16 else 1.0  # as a GradScaler has it
                (loss * scale).backward()
                gradients = [weight.grad / scale for weight in trained(own)]
                rows.append(
                    {
                        "adapter": name,
                        "precision": f"autocast to {precision}" if autocast else precision,
                        "loss": abs(loss.item() - reference_loss.item()) / reference_loss.item(),
                        "logits": apart(logits, reference_logits),
                        "gradients": apart(
                            torch.cat([grad.flatten() for grad in gradients]),
                            torch.cat([weight.grad.flatten() for weight in trained(reference)]),
                        ),
                    }
                )
    return rows


# --- features ---------------------------------------------------------------------------------------------------------


def features(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What else a user calls, here and on the CPU."""
    checks: dict[str, Callable[[str], dict[str, Tensor]]] = {
        "start from data": started,
        "training, fp32": lambda device: fitted(device, None),
        "training, autocast to bf16": lambda device: fitted(device, torch.bfloat16),
        "training, autocast to fp16": lambda device: fitted(device, torch.float16),
        "training, fused loss": lambda device: fitted(device, None, fused_loss=True),
        "moved nodes": moved_nodes,
        "certified fit": certified_fit,
        "cache": cached,
        "generation": generated,
        "conversion to LoRA": converted,
    }
    rows = []
    for name, check in checks.items():
        torch.manual_seed(0)
        reference = check("cpu")
        torch.manual_seed(0)
        found = check(options.device)
        rows.append({"what": name, **{key: apart(found[key], value) for key, value in reference.items()}})
    return rows


def batches(device: str, n: int = 8) -> list[dict[str, Tensor]]:
    """Tokens of a skewed distribution, so that there is something to learn."""
    found = []
    for seed in range(n):
        uniform = torch.rand(4, 32, generator=torch.Generator().manual_seed(100 + seed))
        tokens = (TINY_VOCABULARY * uniform.square()).long().to(device)
        found.append({"input_ids": tokens, "labels": tokens})
    return found


def started(device: str) -> dict[str, Tensor]:
    base = gpt2("tiny", TINY_VOCABULARY).to(device)
    model = get_peft_model(base, lreg_peft.recommended_config(base, task_type="CAUSAL_LM"))
    lreg_peft.initialize_lreg_weights(model, batches(device), show_progress=False, start_head=True)
    with torch.no_grad():
        return {"logits": model.eval()(input_ids=batches(device)[0]["input_ids"]).logits}


def learn(model: PeftModel, device: str, steps: int = 24, autocast: torch.dtype | None = None) -> list[float]:
    """Some steps of AdamW; the losses."""
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    # As transformers' Trainer has it in fp16, but for a first factor that no gradient here overflows with.
    scaler = torch.amp.GradScaler(device, 1024.0, enabled=autocast is torch.float16 and device == "cuda")
    losses, data = [], batches(device)
    for step in range(steps):
        with torch.autocast(device, autocast) if autocast is not None else nullcontext():
            loss = model.train()(**data[step % len(data)]).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def fitted(device: str, autocast: torch.dtype | None, **options: Any) -> dict[str, Tensor]:
    model = recipe(gpt2("tiny", TINY_VOCABULARY), **options).to(device)
    return {"last loss": torch.tensor(learn(model, device, autocast=autocast)[-1:])}


def moved_nodes(device: str) -> dict[str, Tensor]:
    config = lreg_peft.LRegConfig(
        task_type="CAUSAL_LM", target_modules=["mlp"], n_components=3, n_nodes=8, init_weights="pca"
    )
    model = get_peft_model(gpt2("tiny", TINY_VOCABULARY), config)
    lreg_peft.initialize_lreg_weights(model, batches("cpu"), show_progress=False)
    awaken(model).to(device)
    lreg_peft.track_statistics(model)
    for batch in batches(device):
        model(**batch).loss.backward()
    before = [buffer.clone() for name, buffer in model.named_buffers() if "nodes" in name]
    lreg_peft.update_meshes(model)
    after = [buffer for name, buffer in model.named_buffers() if "nodes" in name]
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True)), "no node has moved"
    with torch.no_grad():
        loss = model.eval()(**batches(device)[0]).loss
    return {"nodes": torch.cat([nodes.flatten() for nodes in after]), "loss": loss[None]}


def output_shortcut(device: str, **options: Any) -> PeftModel:
    config = lreg_peft.LRegConfig(
        task_type="CAUSAL_LM", target_modules=["lm_head"], n_components=2, n_nodes=4, init_weights="pca", **options
    )
    model = get_peft_model(gpt2("tiny", TINY_VOCABULARY), config)
    lreg_peft.initialize_lreg_weights(model, batches("cpu"), show_progress=False)  # its directions depend on the device
    return model.to(device)


def certified_fit(device: str) -> dict[str, Tensor]:
    fit = lreg_peft.fit_coefficients(output_shortcut(device), batches(device), show_progress=False)
    assert fit.gap < 1e-6
    return {"objective": torch.tensor([fit.objective])}


def cached(device: str) -> dict[str, Tensor]:
    model = output_shortcut(device)
    with tempfile.TemporaryDirectory() as folder:
        data = batches(device)
        cache = lreg_peft.cache_features(model, data, Path(folder) / "cache", show_progress=False)
        sample = cache.collate([cache[i] for i in range(4)])
        loss = model.train()(**{key: value.to(device) for key, value in sample.items()}).loss
        loss.backward()
    return {"loss": loss.detach()[None]}


def generated(device: str) -> dict[str, Tensor]:
    model = awaken(recipe(gpt2("tiny", TINY_VOCABULARY))).to(device).eval()
    prompt = batches(device)[0]["input_ids"][:, :8]
    found = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False, use_cache=True
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(gpt2("tiny", TINY_VOCABULARY).to(device), folder).eval()
    with torch.no_grad():
        own, saved = (one(input_ids=prompt).logits for one in (model, loaded))
    assert apart(saved, own) < 1e-5
    return {"tokens": found.float()}


def converted(device: str) -> dict[str, Tensor]:
    model = recipe(gpt2("tiny", TINY_VOCABULARY)).to(device)
    learn(model, device)
    rows = [{"input_ids": batch["input_ids"]} for batch in batches(device)]
    config, state, _ = lreg_peft.convert_to_lora(model, rows, show_progress=False)
    plain = get_peft_model(gpt2("tiny", TINY_VOCABULARY), config).to(device)
    set_peft_model_state_dict(plain, state)
    with torch.no_grad():
        return {"logits": plain.eval()(input_ids=rows[0]["input_ids"]).logits}


# --- steps ------------------------------------------------------------------------------------------------------------


def steps(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every model in a process of its own: eager ones take turns, all compile, compiled ones take turns."""
    cases = [
        (size, precision, method)
        for i, size in enumerate(options.models)
        for precision in (("bf16", "fp32") if i == 0 else ("bf16",))
        for method in METHODS
    ]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    turns = {"eager": Turns(context, cases), "compiled": Turns(context, [case for case in cases if compiles(case)])}
    workers = [context.Process(target=work, args=(case, turns, results, options), daemon=True) for case in cases]
    for worker in workers:
        worker.start()
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    deadline = time.monotonic() + options.patience
    for _ in range(sum(len(own.cases) for own in turns.values())):
        try:
            case, way, rows = results.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            print(f"given up after {options.patience:.0f} s; what is missing was not ready", flush=True)
            break
        found[(*case, way)] = rows
    for worker in workers:
        worker.terminate()
    return [row for case in cases for way in turns for row in found.get((*case, way), [])]


def compiles(case: tuple[str, str, str]) -> bool:
    """The fused loss does not go with torch.compile; without matrices of half precision there is less to gain."""
    _, precision, method = case
    return precision == "bf16" and "fused" not in method


class Turns:
    """Several processes, one of which works while the others wait."""

    def __init__(self, context: Any, cases: list[tuple[str, str, str]]) -> None:
        self.cases, self.barrier = cases, context.Barrier(len(cases))

    def take(self, case: tuple[str, str, str], work: Callable[[], float], rounds: int) -> list[float]:
        """The results of this process, one of each round."""
        found = []
        for _ in range(rounds):
            for other in self.cases:
                self.barrier.wait()
                if other == case:
                    found.append(work())
        self.barrier.wait()
        return found


def work(case: tuple[str, str, str], turns: dict[str, Turns], results: Any, options: argparse.Namespace) -> None:
    """A process: one model, eager and, where it goes, compiled."""
    size, precision, method = case
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    base = gpt2("tiny" if options.smoke else size).to(options.device, PRECISIONS[precision])
    if method == "frozen":
        model: nn.Module = base
    elif method == "LoRA":
        model = lora(base).train()
    else:
        model = recipe(base, fused_loss="fused" in method).train()
    shapes = ((2, 32), (1, 16)) if options.smoke else SHAPES
    for way, own in turns.items():
        if case not in own.cases:
            continue
        called = torch.compile(model, fullgraph=True, dynamic=False) if way == "compiled" else model
        step = step_of(called, method)
        rows = []
        for shape in shapes if way == "eager" else shapes[:1]:
            batch = ids(*shape, options.device, VOCABULARY)
            try:
                for _ in range(WARM_UP):
                    step(batch)
            except Exception:
                own.barrier.abort()
                rows.append({"model": size, "precision": precision, "method": method, "way": way})
                rows[-1]["error"] = traceback.format_exc()
                break
            row = {"model": size, "precision": precision, "method": method, "way": way, "batch": list(shape)}
            row["trainable"] = sum(weight.numel() for weight in trained(model))
            rows.append(row | (footprint(step, batch) if options.device == "cuda" else {}))
        try:
            for row in rows:
                own.barrier.wait()
                if case == own.cases[0]:
                    print(f"timing {way} models", flush=True)
                    time.sleep(options.pause)
                batch = ids(*row["batch"], options.device, VOCABULARY)
                row["seconds"] = own.take(case, partial(seconds, step, batch, options), options.rounds)
            if case == own.cases[0]:
                print(f"{way} models timed", flush=True)
        except BrokenBarrierError:
            pass  # another one has failed and says so
        results.put((case, way, rows))


def seconds(step: Callable[..., None], batch: dict[str, Tensor], options: argparse.Namespace) -> float:
    """Of a step, the mean of several, after one that does not count."""
    step(batch)
    wait(options.device)
    start = time.perf_counter()
    for _ in range(options.repeat):
        step(batch)
    wait(options.device)
    return (time.perf_counter() - start) / options.repeat


def footprint(step: Callable[..., None], batch: dict[str, Tensor]) -> dict[str, Any]:
    """Memory that a step needs above what was there, MiB, and how many kernels, copies and fills it starts."""
    gc.collect()
    wait("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(batch)
    wait("cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step(batch)
        wait("cuda")
    kernels = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events())
    return {"memory_mib": (torch.cuda.max_memory_allocated() - before) / 2**20, "kernels": kernels}


def step_of(model: nn.Module, method: str) -> Callable[[dict[str, Tensor]], None]:
    """A step of training; of the frozen model forward and loss."""
    if method != "frozen":
        return train_step(model)

    @torch.no_grad()
    def forward(batch: dict[str, Tensor]) -> None:
        model(**batch)

    return forward


def ratios(rows: list[dict[str, Any]]) -> str:
    """A table: milliseconds and kernels of each, and LReg's time as a part of LoRA's, round by round."""
    lines = [
        "| model | precision | | batch | | ms a step | of LoRA's (quartiles) | of the frozen forward | kernels | MiB |",
        "|---|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    case = operator.itemgetter("model", "precision", "way")
    timed = {(*case(row), *row["batch"], row["method"]): row["seconds"] for row in rows if "seconds" in row}
    for row in rows:
        if "error" in row:
            last = row["error"].strip().splitlines()[-1]
            lines.append(f"| {row['model']} | {row['precision']} | {row['method']} | | {row['way']} | {last} |")
        if "seconds" not in row:
            continue
        cells = {}
        for other in ("LoRA", "frozen"):
            theirs = timed.get((*case(row), *row["batch"], other))
            if theirs is None or row["method"] == other:
                cells[other] = ""
                continue
            found = [own / their for own, their in zip(row["seconds"], theirs, strict=True)]
            low, middle, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
            cells[other] = f"{middle:.2f} ({low:.2f}-{high:.2f})" if other == "LoRA" else f"{middle:.2f}"
        lines.append(
            f"| {row['model']} | {row['precision']} | {row['method']} | {row['batch'][0]} x {row['batch'][1]} | "
            f"{row['way']} | {1000 * statistics.median(row['seconds']):.2f} | {cells['LoRA']} | {cells['frozen']} | "
            f"{row.get('kernels', '')} | {row.get('memory_mib', 0):.0f} |"
        )
    return "\n".join(lines)


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak of a step above what was there, with a shortcut on the output layer of a narrow model."""
    if options.device != "cuda":
        return []
    rows = []
    for vocabulary in (50_257, 128_256):
        for length in (1024, 4096):
            for fused in (False, True):
                base = gpt2("tiny", vocabulary, positions=4096)
                config = lreg_peft.LRegConfig(
                    task_type="CAUSAL_LM", target_modules=["lm_head"], n_components=2, n_nodes=8, fused_loss=fused
                )
                model = get_peft_model(base, config).to("cuda").train()
                step, batch = train_step(model), ids(1, length, "cuda", vocabulary)
                step({key: value[:, :16] for key, value in batch.items()})  # the first is computed both ways
                step(batch)
                rows.append(
                    {
                        "vocabulary": vocabulary,
                        "length": length,
                        "fused": fused,
                        "peak_gib": footprint(step, batch)["memory_mib"] / 1024,
                        "milliseconds": 1000 * seconds(step, batch, options),
                    }
                )
                del model, base, step
                gc.collect()
                torch.cuda.empty_cache()
    return rows


def plain(rows: list[dict[str, Any]]) -> str:
    """Rows as they are."""
    return "\n".join(
        ", ".join(f"{key} {value:.2g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
        for row in rows
    )


PARTS: dict[str, tuple[Callable[[argparse.Namespace], list[dict[str, Any]]], Callable[[list[dict[str, Any]]], str]]] = {
    "parity": (parity, plain),
    "features": (features, plain),
    "memory": (memory, plain),
    "steps": (steps, ratios),
}


def main() -> None:
    """Run the parts; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=["gpt2", "gpt2-medium"], default=["gpt2", "gpt2-medium"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rounds", type=int, default=20, help="turns of every model in which steps are timed")
    parser.add_argument("--repeat", type=int, default=5, help="steps of a turn")
    parser.add_argument(
        "--patience", type=float, default=420, help="seconds after which steps that are missing are left"
    )
    parser.add_argument("--pause", type=float, default=1.0, help="seconds before models are timed")
    parser.add_argument("--smoke", action="store_true", help="small models in place of full size")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use, and there is none.")
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    record: dict[str, Any] = {
        "command": command(),
        "device": device_name(options.device),
        "versions": versions("torch", "transformers", "peft"),
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        measure, table = PARTS[part]
        start = time.perf_counter()
        try:
            record[part] = measure(options)
            print(f"--- {part}, {time.perf_counter() - start:.0f} s\n{table(record[part])}", flush=True)
        except Exception:
            record[part] = {"error": traceback.format_exc()}
            print(f"--- {part} failed\n{record[part]['error']}", flush=True)
        (options.output_dir / "gpu.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
