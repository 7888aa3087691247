"""A feature cache after SIGKILL between any two operations on files: the same command goes on."""

from pathlib import Path

import kills
import pytest
import tiny
import torch
from peft import get_peft_model
from tiers import slow
from torch.utils.data import DataLoader

import lreg_peft.fitting.feature_cache as cache_module
from lreg_peft import FeatureCache, LRegConfig, cache_features

pytestmark = pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="kills forked children")


def data(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, tiny.VOCABULARY, (6, 7), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


MODEL = get_peft_model(tiny.gpt2(), LRegConfig(preset="paper"))


def build(path: Path, seed: int = 0, **options) -> FeatureCache:
    return cache_features(MODEL, DataLoader(data(seed), 2), path, show_progress=False, **options)


def rows(cache: FeatureCache) -> torch.Tensor:
    return torch.cat([cache[i]["features"] for i in range(len(cache))])


@pytest.fixture(autouse=True)
def a_shard_for_every_batch(monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 1)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    return rows(build(folder / "one")), rows(build(folder / "other", seed=1))


FILES = ["build.lock", *(f"rows-0-0000{i}.safetensors" for i in range(3)), "stamp.json"]


@pytest.mark.parametrize("at_most", [8, *slow(1000)])
def test_a_kill_at_any_instant_costs_the_work_since_the_last_shard(tmp_path, expected, at_most):
    total = kills.count_operations(lambda: build(tmp_path / "count" / "c"), tmp_path / "count")
    assert total > 20
    for instant in kills.instants(total, at_most):
        folder = tmp_path / str(instant)
        assert kills.kill_at(lambda folder=folder: build(folder / "c"), folder, instant)
        if is_complete(folder / "c"):
            assert torch.equal(rows(FeatureCache(folder / "c")), expected[0])
        assert torch.equal(rows(build(folder / "c")), expected[0])
        assert sorted(file.name for file in (folder / "c").iterdir()) == FILES
        assert [file.name for file in folder.iterdir()] == ["c"]


def is_complete(path: Path) -> bool:
    try:
        FeatureCache(path)
    except FileNotFoundError:
        return False
    return True


def test_shards_are_used(tmp_path, expected):
    """Killed in the third batch of three, the second run computes no more than that one."""
    ran = []
    total = kills.count_operations(lambda: build(tmp_path / "count" / "c"), tmp_path / "count")
    assert kills.kill_at(lambda: build(tmp_path / "k" / "c"), tmp_path / "k", total - 6)
    handle = MODEL.get_base_model().transformer.register_forward_hook(lambda *inputs: ran.append(1))
    assert torch.equal(rows(build(tmp_path / "k" / "c")), expected[0])
    handle.remove()
    assert len(ran) <= 1


@pytest.mark.parametrize("at_most", [6, *slow(1000)])
def test_a_kill_while_another_cache_is_replaced(tmp_path, expected, at_most):
    """A complete cache is the old one or the new one, never parts of both; the same command leads to the new one."""
    (tmp_path / "count").mkdir()
    build(tmp_path / "count" / "c", seed=1)
    total = kills.count_operations(lambda: build(tmp_path / "count" / "c", overwrite=True), tmp_path / "count")
    for instant in kills.instants(total, at_most, seed=1):
        folder = tmp_path / str(instant)
        build(folder / "c", seed=1)
        assert kills.kill_at(lambda folder=folder: build(folder / "c", overwrite=True), folder, instant)
        if is_complete(folder / "c"):
            found = rows(FeatureCache(folder / "c"))
            assert torch.equal(found, expected[0]) or torch.equal(found, expected[1])
        assert torch.equal(rows(build(folder / "c", overwrite=True)), expected[0])
        assert sorted(file.name for file in (folder / "c").iterdir()) == FILES


def test_killed_again_and_again(tmp_path, expected):
    for instant in kills.instants(25, at_most=8, seed=2):
        kills.kill_at(lambda: build(tmp_path / "c"), tmp_path, instant)
    assert torch.equal(rows(build(tmp_path / "c")), expected[0])
