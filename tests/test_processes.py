"""Functions that processes call together, with one of them failing at each stage (mesh updates: `adaptation_failures`).

All processes end with the same error, within seconds, and with the models they had. One pair of processes goes through
all of it: starting one takes longer than the rest.
"""

import copy
import time
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from peft import get_peft_model
from processes import run_on_two
from torch import nn
from torch.utils.data import DataLoader

import lreg_peft.fitting.coefficients as coefficients_module
import lreg_peft.fitting.feature_cache as cache_module
import lreg_peft.training.initialization as start_module
from lreg_peft import (
    LRegConfig,
    LRegLayer,
    cache_features,
    fit_coefficients,
    initialize_lreg_weights,
    match_token_frequencies,
)
from lreg_peft.core.encoder import LagrangeEncoder

SECONDS = 10.0


class Failure(Exception):
    """What one process meets."""


def at_head(seed: int = 1, **options) -> nn.Module:
    torch.manual_seed(seed)
    return get_peft_model(tiny.gpt2(), LRegConfig(preset="paper", n_nodes=3, **options))


def inside(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return get_peft_model(tiny.gpt2(), LRegConfig(target_modules=["c_attn", "mlp"], n_nodes=4))


def batches(rank: int, n: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    ids = [torch.randint(3, tiny.VOCABULARY, (2, 7), generator=generator) for _ in range(n)]
    return [{"input_ids": each, "labels": each} for each in ids]


def skewed(rank: int) -> list[dict[str, torch.Tensor]]:
    """Text of eight tokens, which a random model does not expect."""
    return [{name: 3 + ids % 8 for name, ids in batch.items()} for batch in batches(rank, 8)]


def samples() -> list[dict[str, torch.Tensor]]:
    return [{name: value[0] for name, value in batch.items()} for batch in batches(0, 6)]


class Breaking:
    """Batches of which the second raises, on one process only."""

    def __init__(self, data, rank):
        self.data, self.rank = data, rank

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        if self.rank == 1 and i == 1:
            raise Failure("the disk of process 1")
        if i >= len(self.data):
            raise IndexError
        return self.data[i]


def failing(rank, where, name, at=1):
    """Let a function of a module or class fail on process 1, when it is called for the `at`-th time."""
    own, calls = getattr(where, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if rank == 1 and len(calls) == at:
            raise Failure(f"{name} of process 1")
        return own(*args, **kwargs)

    return where, name, call


def scenarios(rank: int, folder: Path):
    """Name, what to call with a model, the model, what the error says, and a patch."""
    quiet = {"show_progress": False}
    base = at_head()
    if rank == 1:
        base.get_base_model().transformer.h[0].mlp.c_fc.bias.data.add_(1e-3)

    def start(model, data=None, **options):
        initialize_lreg_weights(model, batches(rank) if data is None else data, **quiet, **options)

    def output(model, data=None, **options):
        match_token_frequencies(model, skewed(rank) if data is None else data, **quiet, **options)

    def fit(model, data=None, **options):
        fit_coefficients(model, batches(rank) if data is None else data, **quiet, **options)

    def meshes(model, data=None, **options):
        fit_coefficients(model, batches(rank) if data is None else data, max_moves=2, **quiet, **options)

    def cache(model, data=None, path="c", **options):
        loader = DataLoader(samples() if data is None else data, batch_size=1)
        cache_features(model, loader, folder / path, **quiet, **options)

    yield "start: other options", lambda m: start(m, n_batches=2 + rank), inside(), "'n_batches' of process 1", None
    yield "start: wrong option", lambda m: start(m, n_batches=3 - 3 * rank), inside(), "n_batches must be at", None
    yield "start: wrong type", lambda m: start(m, seed="1" if rank else 1), inside(), "seed must be a whole", None
    yield "start: no adapter", lambda m: start(m, adapter_name=["default", "x"][rank]), inside(), "called 'x'", None
    yield "start: data", lambda m: start(m, Breaking(batches(rank), rank)), inside(), "the disk of process 1", None
    yield "start: no batch", lambda m: start(m, [1] if rank else batches(0)), inside(), "a batch must be a dict", None
    for at in (1, 2, 3):
        patch = failing(rank, start_module, "standardised_start", at)
        yield f"start: module {at}", start, inside(), "standardised_start of process 1", patch
    for at in (1, 4):
        patch = failing(rank, start_module.LRegLayer, "set_encoder", at)
        yield f"start: at the end {at}", start, inside(), "set_encoder of process 1", patch
    patch = failing(rank, torch.autograd, "grad")
    yield "start: gradients", lambda m: start(m, method="gradient"), inside(), "grad of process 1", patch

    yield "output: other options", lambda m: output(m, n_batches=2 + rank), at_head(), "'n_batches' of process 1", None
    yield "output: no head", output, inside() if rank else at_head(), "add the head to target_modules", None
    yield "output: data", lambda m: output(m, Breaking(batches(rank), rank)), at_head(), "the disk of process 1", None
    for at in (1, 9, 20):  # in the passes of the model, of the direction, of the losses
        patch = failing(rank, LRegLayer, "design", at)
        yield f"output: rows {at}", output, at_head(), "design of process 1", patch
    yield "output: writing", output, at_head(), "set_table of process 1", failing(rank, LRegLayer, "set_table")

    for kind, call in (("fit", fit), ("meshes", meshes)):
        yield f"{kind}: other projections", call, at_head(seed=rank), "lreg_projection", None
        yield f"{kind}: other ridge", lambda m, c=call: c(m, ridge=1e-3 * (1 + rank)), at_head(), "'ridge'", None
        yield f"{kind}: wrong passes", lambda m, c=call: c(m, max_passes=3 - rank), at_head(), "max_passes must", None
        yield f"{kind}: nothing to fit", call, inside() if rank else at_head(), "inside the network", None
        yield f"{kind}: data", lambda m, c=call: c(m, Breaking(batches(rank), rank)), at_head(), "the disk", None
        nothing = [{"input_ids": b["input_ids"], "labels": torch.full_like(b["labels"], -100)} for b in batches(0)]
        yield f"{kind}: no labels", lambda m, c=call, n=nothing: c(m, n), at_head(), "no labels to fit", None
        for at in (1, 4, 9):  # in the passes of the model, then in those of the solver
            patch = failing(rank, LagrangeEncoder, "forward", at)
            yield f"{kind}: pass {at}", call, at_head(), "forward of process 1", patch
        patch = failing(rank, LRegLayer, "set_table", 1 if kind == "fit" else 2)
        yield f"{kind}: writing", call, at_head(), "set_table of process 1", patch
    patch = failing(rank, coefficients_module, "adapt_mesh")
    yield "meshes: proposal", meshes, at_head(), "adapt_mesh of process 1", patch
    patch = failing(rank, coefficients_module, "element_moments", 2)
    yield "meshes: residuals", meshes, at_head(), "element_moments of process 1", patch

    yield (
        "cache: other dtype",
        lambda m: cache(m, dtype=[torch.bfloat16, torch.float32][rank]),
        at_head(),
        "dtype",
        None,
    )
    yield "cache: other weights", cache, copy.deepcopy(base), "'weights below the shortcut' of process 1", None
    yield "cache: data", lambda m: cache(m, Breaking(samples(), 1)), at_head(), "the disk of process 1", None
    yield "cache: one's data", lambda m: cache(m, _late(rank)), at_head(), "late on process 1", None
    patch = failing(rank, cache_module.os, "fsync")
    yield "cache: a shard", lambda m: cache(m, path="shard"), at_head(), "fsync of process 1", patch
    for at in (1, 3):  # the main process writes the first stamp, its shard, the last stamp
        patch = failing(1 - rank, cache_module.os, "fsync", at)
        yield (
            f"cache: a stamp {at}",
            lambda m, a=at: cache(m, path=f"stamp{a}"),
            at_head(),
            "fsync of process 1",
            patch,
        )


def _late(rank):
    """Samples that can be read once, for the fingerprint, and then fail on process 1."""

    class Late(list):
        reads = 0

        def __getitem__(self, i):
            Late.reads += 1
            if rank == 1 and Late.reads > 8:
                raise Failure("late on process 1")
            return super().__getitem__(i)

    return Late(samples())


def _run(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = {}
    for name, call, model, words, patch in scenarios(rank, folder):
        before = tiny.state(model)
        if patch is not None:
            where, attribute, replacement = patch
            own = where.__dict__[attribute]
            setattr(where, attribute, replacement)
        began = time.monotonic()
        try:
            call(model)
            outcome = "no error"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        finally:
            if patch is not None:
                setattr(where, attribute, own)
        after = tiny.state(model)
        same = all(torch.equal(value.nan_to_num(), after[key].nan_to_num()) for key, value in before.items())
        results[name] = (outcome, words, time.monotonic() - began, same)
        dist.barrier()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    run_on_two(_run, folder)
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == ["0.pt", "1.pt"]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_all_processes_end_with_the_same_error(results):
    first, second = results
    assert first.keys() == second.keys() and len(first) > 40
    for name, (outcome, words, _, _) in first.items():
        assert outcome == second[name][0], name
        assert words in outcome, (name, outcome)


def test_within_seconds(results):
    slow = {name: seconds for each in results for name, (_, _, seconds, _) in each.items() if seconds > SECONDS}
    assert not slow


def test_with_the_models_they_had(results):
    changed = [name for each in results for name, (_, _, _, same) in each.items() if not same]
    assert not changed
