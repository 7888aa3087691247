"""The data-driven start on two processes: every rank sees other batches and ends with the same tensors."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from processes import run_on_two

from lreg_peft import LRegConfig, LRegLayer, initialize_lreg_weights, match_token_frequencies


def test_two_processes_end_with_the_same_start(tmp_path):
    run_on_two(_start, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["rows"] != second["rows"]  # they did see different data
    for method in ("pca", "gradient"):
        for mine, other in zip(first[method], second[method], strict=True):
            assert torch.equal(mine, other)
    # Batches dealt out in turn make the same halves as in one process, so that the same pseudocount is chosen.
    for name, work in (("output", _start_of_the_output), ("head", _start_of_a_head), ("calibration", _calibration)):
        report = work(0, 1)
        for together in (first[name], second[name]):
            assert together == pytest.approx(report, rel=1e-6)


def _start_of_the_output(rank: int, world: int) -> tuple[float, float, float]:
    """Held-out loss, loss and pseudocount of a start from four batches of which every process has its share."""
    from tiny import gpt2

    torch.manual_seed(0)
    model = get_peft_model(gpt2(), LRegConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], n_nodes=4))
    generator = torch.Generator().manual_seed(7)
    ids = [torch.randint(3, 13 + 4 * i, (2, 10), generator=generator) for i in range(4)]
    batches = [{"input_ids": batch, "labels": batch} for batch in ids[rank::world]]
    found = initialize_lreg_weights(model, batches, start_head=True, show_progress=False)
    return found.heldout_after, found.loss_after, found.pseudocount


def _start_of_a_head(rank: int, world: int) -> tuple[float, float, float, float]:
    """The same of a new classifier, with its ridge and what it wrote."""
    from tiny import build

    torch.manual_seed(0)
    config = LRegConfig(task_type="SEQ_CLS", target_modules=["query"], n_nodes=4)
    model = get_peft_model(build("bert", "SEQ_CLS", num_labels=3), config)
    generator = torch.Generator().manual_seed(7)
    ids = [torch.randint(3, 61, (8, 10), generator=generator) for _ in range(4)]
    batches = [{"input_ids": batch, "labels": batch[:, 0] % 3} for batch in ids[rank::world]]
    found = initialize_lreg_weights(model, batches, n_batches=-(-4 // world), show_progress=False)
    assert found.ridge is not None
    written = model.get_base_model().classifier.modules_to_save.default.weight.norm().item()
    return found.heldout_after, found.loss_after, found.ridge, written


def _calibration(rank: int, world: int) -> tuple[float, float, float, float]:
    """The same of a calibration, and what it wrote."""
    from tiny import adapt, gpt2, shake

    torch.manual_seed(0)
    model = adapt(gpt2(), target_modules=["lm_head"], n_nodes=4, weighting="factored", n_components=2, linear_term=True)
    shake(model)
    generator = torch.Generator().manual_seed(8)
    ids = [torch.randint(3, 13 + 4 * i, (2, 10), generator=generator) for i in range(4)]
    batches = [{"input_ids": batch, "labels": batch} for batch in ids[rank::world]]
    found = match_token_frequencies(model, batches, show_progress=False)
    assert found.pseudocount is not None
    written = model.get_base_model().lm_head.table("default").norm().item()
    return found.heldout_after, found.loss_after, found.pseudocount, written


def _start(folder: Path) -> None:
    from tiny import gpt2

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    results = {}
    for method in ("pca", "gradient"):
        model = get_peft_model(gpt2(), LRegConfig(task_type="CAUSAL_LM", target_modules=["mlp"], n_nodes=4))
        size = model.config.vocab_size
        ids = [torch.randint(0, size, (2, 10), generator=generator) for _ in range(3)]
        batches = [{"input_ids": batch, "labels": batch} for batch in ids]
        initialize_lreg_weights(model, batches, method=method, show_progress=False)
        layers = [module for module in model.modules() if isinstance(module, LRegLayer)]
        parts = [part for layer in layers for part in layer.parts("default")]
        results[method] = [value for part in parts for value in part.state_dict().values()]
        results["rows"] = ids[0].tolist()
    results["output"] = _start_of_the_output(rank, 2)
    results["head"] = _start_of_a_head(rank, 2)
    results["calibration"] = _calibration(rank, 2)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
