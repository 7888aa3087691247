"""Mesh updates that fail on one process of two, at one stage after the other.

Each process writes to FOLDER/rank<i>.pt how every stage ended.
"""

import time
from pathlib import Path

import torch
import torch.distributed as dist
from adaptation_run import batch, model
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from lreg_peft import LRegCallback, track_statistics, update_meshes

#: What the error says, by the stage at which process 1 fails.
STAGES = {
    "options": "tolerance",
    "statistics": "no statistics are gathered",
    "meshes": "'the mesh of  (default)'",
    "projection": "'the projection of  (default)'",
    "optimizer": "does not hold the coefficients",
    "first check": "no memory before",
    "second check": "no memory after",
    "check of the callback": "no training batch",
}


def trained():
    layer = model()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.02)
    track_statistics(layer)
    x, y = batch(0)
    (layer(x) - y).square().mean().backward()
    optimizer.step()
    return layer, optimizer


def fail(stage: str, rank: int, folder: str) -> dict:
    layer, optimizer = trained()
    options = {"accept": lambda: 1.0}
    fails = rank == 1
    if stage == "options" and fails:
        options["tolerance"] = -1.0
    if stage == "statistics" and fails:
        track_statistics(layer, False)
    if stage == "meshes" and fails:
        layer.lreg_encoder["default"].nodes.pow_(1.1)
    if stage == "projection" and fails:
        layer.lreg_projection["default"].weight.data.mul_(1.1)
    if stage == "optimizer" and fails:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    if stage.endswith("check"):
        calls = []

        def accept():
            calls.append(1)
            if fails and len(calls) == (1 if stage.startswith("first") else 2):
                raise MemoryError(f"no memory {'before' if len(calls) == 1 else 'after'}")
            return 1.0

        options["accept"] = accept
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    begun, error = time.monotonic(), "none"
    try:
        if stage == "check of the callback":
            call_back(layer, optimizer, folder, keeps_batches=not fails)
        else:
            update_meshes(layer, optimizer, **options)
    except Exception as caught:
        error = str(caught)
    unchanged = all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    return {"error": error, "unchanged": unchanged, "seconds": time.monotonic() - begun}


def call_back(layer: nn.Module, optimizer: torch.optim.Optimizer, folder: str, keeps_batches: bool) -> None:
    """A move by the callback, with a batch to try it on or without."""
    arguments, state, control = TrainingArguments(folder, use_cpu=True), TrainerState(), TrainerControl()
    state.max_steps, own = 10, LRegCallback(every=1)
    own.on_train_begin(arguments, state, control, model=layer)
    handle = layer.register_forward_hook(lambda module, args, output: {"loss": output.square().mean()})
    loss = layer(batch(0)[0])["loss"]
    if not keeps_batches:
        own._calls.clear()
    loss.backward()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    optimizer.step()
    layer.load_state_dict(before)  # so that only a move could leave a trace
    handle.remove()
    layer.register_forward_hook(lambda module, args, output: {"loss": output.square().mean()})
    state.global_step = 1
    own.on_step_end(arguments, state, control, model=layer, optimizer=optimizer)


def run(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    report = {stage: fail(stage, rank, str(folder)) for stage in STAGES}
    # After all that, the processes still understand each other.
    layer, optimizer = trained()
    report["accepted"] = update_meshes(layer, optimizer, accept=lambda: 1.0).accepted
    torch.save(report, folder / f"rank{rank}.pt")
    dist.destroy_process_group()
