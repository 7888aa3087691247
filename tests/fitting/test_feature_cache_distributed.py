"""The feature cache on two processes: one cache for both, the same training as on one."""

from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import get_peft_model
from processes import run_on_two
from torch import nn

import lreg_peft.fitting.feature_cache as cache_module
from lreg_peft import LRegConfig, cache_features


def test_two_processes_build_one_cache_and_train_as_one_process(tmp_path):
    run_on_two(_both, tmp_path)
    ours = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = _train(tmp_path / "alone", 0, 1)
    for mine, other in zip(ours[0]["weights"], ours[1]["weights"], strict=True):
        assert torch.equal(mine, other)
    for mine, expected in zip(ours[0]["weights"], alone["weights"], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)
    for result in ours:
        assert torch.equal(result["features"], alone["features"])
        assert "No space left on device" in result["error"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.pt", "1.pt", "alone", "both", "full"]


def _train(folder: Path, rank: int, world: int) -> dict:
    """Two steps on all data; every process takes its part of the samples."""
    from tiny import VOCABULARY, gpt2

    torch.manual_seed(1)
    model = get_peft_model(gpt2(), LRegConfig(preset="paper", init_weights=False, n_nodes=3)).train()
    ids = torch.randint(3, VOCABULARY, (6, 8), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids.tolist()])
    cache = cache_features(model, data, folder, show_progress=False)
    wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        batch = cache.collate([cache[i] for i in range(rank, 6, world)])
        wrapped(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        "weights": [p.detach() for p in model.parameters() if p.requires_grad],
        "features": torch.cat([cache[i]["features"] for i in range(6)]),
    }


def _full_disk(folder: Path, rank: int) -> str:
    """One process runs out of space; both hear of it."""
    from tiny import gpt2

    own = cache_module.os.fsync

    def fsync(descriptor):
        if rank == 1:
            raise OSError(28, "No space left on device")
        own(descriptor)

    cache_module.os.fsync = fsync
    data = [{"input_ids": torch.arange(3, 9)[None], "labels": torch.arange(3, 9)[None]} for _ in range(4)]
    try:
        cache_features(get_peft_model(gpt2(), LRegConfig(preset="paper")), data, folder, show_progress=False)
    except (OSError, RuntimeError) as error:  # its own, and that of the other
        return str(error)
    finally:
        cache_module.os.fsync = own
    return "none"


def _both(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    outcome = _train(folder / "both", rank, 2)
    outcome["error"] = _full_disk(folder / "full", rank)
    torch.save(outcome, folder / f"{rank}.pt")
    dist.destroy_process_group()
