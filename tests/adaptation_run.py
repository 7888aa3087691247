"""A short training with moving meshes, for one or several processes.

The global batch is the same whatever the number of processes. Each writes losses, nodes and coefficients to
FOLDER/rank<i>.pt.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from lreg_peft import LRegConfig, LRegLayer, track_statistics, update_meshes

STEPS, EVERY, BATCH, FEATURES = 60, 5, 64, 3


def model():
    torch.manual_seed(0)
    layer = LRegLayer(nn.Linear(FEATURES, 2), FEATURES, 2)
    layer.update_layer("default", 2, 8, LRegConfig(preset="paper", n_components=2, n_nodes=8))
    layer.set_adapter("default")
    layer.base_layer.requires_grad_(False)
    return layer.train()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, FEATURES, generator=generator)
    return x, torch.stack((x[:, 0].mul(8).tanh(), (x[:, 1] > 0.5).float()), dim=1)


def train() -> dict[str, list]:
    accelerator = Accelerator(cpu=True)
    rank, world = accelerator.process_index, accelerator.num_processes
    layer = model()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.02)
    wrapped, optimizer = accelerator.prepare(layer, optimizer)
    track_statistics(wrapped)
    losses, updates = [], []
    for step in range(STEPS):
        x, y = (part[rank * BATCH // world : (rank + 1) * BATCH // world] for part in batch(step))
        loss = (wrapped(x) - y).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
        if step % EVERY == EVERY - 1:
            # Every second check speaks of this rank's share of the batch alone: the processes have to agree.
            accept = (lambda x=x, y=y: (layer(x) - y).square().mean()) if step // EVERY % 2 else None
            updates.append(update_meshes(wrapped, optimizer, accept=accept))
    state = optimizer.state[layer.nodal_parameter("default")]
    return {
        "losses": losses,
        "accepted": [update.accepted for update in updates],
        "checks": [update.loss_after for update in updates],
        "nodes": layer.lreg_encoder["default"].nodes,
        "coefficients": layer.table("default").detach(),
        "moments": torch.stack((state["exp_avg"], state["exp_avg_sq"])),
    }


def run(folder: Path) -> None:
    result = train()
    torch.save(result, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
