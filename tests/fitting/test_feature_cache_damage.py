"""Feature caches that are damaged, shared, foreign, or of another model; and rows that cannot be stored."""

import os
import shutil

import numpy as np
import pytest
import tiny
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import lreg_peft.fitting.feature_cache as cache_module
from lreg_peft import FeatureCache, LRegConfig, cache_features, fit_coefficients


def data(n: int = 6, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, tiny.VOCABULARY, (n, 7), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def adapted(base=None, **options):
    torch.manual_seed(1)
    return get_peft_model(base or tiny.gpt2(), LRegConfig(preset="paper", **options))


MODEL = adapted()


def build(path, samples=None, model=None, batch_size=2, **options) -> FeatureCache:
    loader = DataLoader(data() if samples is None else samples, batch_size=batch_size)
    return cache_features(model or MODEL, loader, path, show_progress=False, **options)


def rows(cache: FeatureCache) -> torch.Tensor:
    return torch.cat([cache[i]["features"] for i in range(len(cache))])


SHARD = "rows-0-00001.safetensors"


def replaced(folder, name, **changes):
    """A shard with other tensors, under the marks of the old one."""
    with safe_open(folder / name, "pt") as stored:
        marks = stored.metadata()
    save_file({**load_file(folder / name), **changes}, folder / name, marks)


DAMAGES = {
    "a shard cut off": lambda f: os.truncate(f / SHARD, (f / SHARD).stat().st_size - 1),
    "an empty shard": lambda f: os.truncate(f / SHARD, 0),
    "a shard missing": lambda f: (f / SHARD).unlink(),
    "a shard of nothing": lambda f: save_file({}, f / SHARD),
    "a shard of another cache": lambda f: shutil.copy(build(f.parent / "other", data(seed=1)).path / SHARD, f / SHARD),
    "features of another width": lambda f: replaced(f, SHARD, features=torch.zeros(12, 3, dtype=torch.bfloat16)),
    "fewer labels than rows": lambda f: replaced(f, SHARD, targets=torch.zeros(3, dtype=torch.int64)),
    "offsets of other rows": lambda f: replaced(f, SHARD, offsets=torch.tensor([0, 3, 50])),
    "a stamp cut off": lambda f: os.truncate(f / "stamp.json", 40),
    "a stamp that is a list": lambda f: (f / "stamp.json").write_text("[]"),
    "a stamp of the future": lambda f: (f / "stamp.json").write_text('{"format": 5}'),
}


@pytest.fixture(autouse=True)
def a_shard_for_every_batch(monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 1)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_on_opening(tmp_path, damage):
    whole = build(tmp_path / "whole")
    folder = tmp_path / "c"
    shutil.copytree(whole.path, folder)
    damage(folder)
    for call in (FeatureCache, build):
        with pytest.raises(ValueError, match=r"damaged.*Build it again|build it again"):
            call(folder)
    assert torch.equal(rows(build(folder, overwrite=True)), rows(whole))


def test_what_a_damaged_cache_has_whole_is_kept(tmp_path):
    expected = rows(build(tmp_path / "c"))
    os.truncate(tmp_path / "c" / SHARD, 50)
    before = (tmp_path / "c" / "rows-0-00000.safetensors").stat().st_mtime_ns
    assert torch.equal(rows(build(tmp_path / "c", overwrite=True)), expected)
    assert (tmp_path / "c" / "rows-0-00000.safetensors").stat().st_mtime_ns == before


class TestRows:
    def test_what_fp16_cannot_hold_is_refused(self, tmp_path):
        base = tiny.gpt2()
        base.transformer.ln_f.weight.data.mul_(1e6)
        with pytest.raises(ValueError, match=r"features .* must be finite.*to be stored as torch.float16"):
            build(tmp_path / "c", model=adapted(base), dtype=torch.float16)

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda s: s[5]["labels"].fill_(tiny.VOCABULARY + 2), "labels must lie in"),
            (lambda s: s[5]["labels"].fill_(-7), "labels must lie in"),
            (lambda s: s[5]["inputs_embeds"].fill_(torch.nan), r"features of 'lm_head' must be finite.*in batch 2"),
        ],
    )
    def test_every_batch_is_checked(self, tmp_path, spoil, message):
        generator = torch.Generator().manual_seed(0)
        samples = [
            {"inputs_embeds": torch.randn(7, tiny.HIDDEN, generator=generator), "labels": each["labels"].clone()}
            for each in data()
        ]
        spoil(samples)
        with pytest.raises(ValueError, match=message):
            build(tmp_path / "c", samples)

    def test_yes_or_no_labels(self, tmp_path):
        base = tiny.roberta("SEQ_CLS", num_labels=2, problem_type="multi_label_classification")
        model = adapted(base, target_modules=["classifier"])
        samples = [{"input_ids": each["input_ids"], "labels": torch.tensor([0.0, 1.0])} for each in data()]
        samples[3]["labels"] = torch.tensor([5.0, 1.0])
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 1\]"):
            build(tmp_path / "c", samples, model)
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 1\]"):
            fit_coefficients(model, [{k: v[None] for k, v in s.items()} for s in samples], show_progress=False)

    def test_arrays_of_samples_are_told_apart(self, tmp_path):
        """The repr of a long array leaves its middle out."""

        def batches(middle):
            values = np.zeros(5000)
            values[2500] = middle
            return [
                {"input_ids": each["input_ids"][None], "labels": each["labels"][None], "note": values}
                for each in data(2)
            ]

        caches = [tmp_path / str(middle) for middle in (0, 1)]
        for middle, path in enumerate(caches):
            cache_features(MODEL, batches(middle), path, show_progress=False)
        stamps = [FeatureCache(path).stamp["made_from"]["data"] for path in caches]
        assert stamps[0] != stamps[1]


class TestPlaces:
    def test_a_link_to_a_folder(self, tmp_path):
        (tmp_path / "disk").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "disk" / "c")
        cache = build(tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "c" / "stamp.json").is_file()
        assert torch.equal(rows(build(tmp_path / "link")), rows(cache))
        assert torch.equal(rows(FeatureCache(tmp_path / "link")), rows(cache))
        assert len(build(tmp_path / "link", data(3), overwrite=True)) == 3
        assert (tmp_path / "link").is_symlink()

    def test_overwrite_deletes_nothing_foreign(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("precious")
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=r"is not a feature cache: it holds 'thesis.txt'"):
                build(tmp_path, overwrite=overwrite)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    def test_nor_what_stands_in_a_cache(self, tmp_path):
        build(tmp_path / "c")
        (tmp_path / "c" / "notes.txt").write_text("precious")
        assert len(build(tmp_path / "c")) == 6  # opening it is no matter
        assert len(build(tmp_path / "c", data(3), overwrite=True)) == 3
        assert (tmp_path / "c" / "notes.txt").read_text() == "precious"

    def test_a_file(self, tmp_path):
        (tmp_path / "c").write_text("x")
        with pytest.raises(NotADirectoryError):
            build(tmp_path / "c", overwrite=True)

    def test_a_cache_that_lost_its_stamp(self, tmp_path):
        expected = rows(build(tmp_path / "c"))
        (tmp_path / "c" / "stamp.json").unlink()
        with pytest.raises(FileNotFoundError, match="no complete feature cache"):
            FeatureCache(tmp_path / "c")
        assert torch.equal(rows(build(tmp_path / "c")), expected)

    def test_overwriting_leaves_nothing_of_the_old(self, tmp_path):
        build(tmp_path / "c", data(40))
        cache = build(tmp_path / "c", overwrite=True)
        names = sorted(path.name for path in cache.path.iterdir())
        assert names == ["build.lock", *(f"rows-0-0000{i}.safetensors" for i in range(3)), "stamp.json"]


class TestBelonging:
    def other(self):
        model = adapted()
        model.get_base_model().transformer.h[0].mlp.c_fc.weight.data.mul_(1.5)
        return model

    def test_a_fit_takes_no_cache_of_another_model(self, tmp_path):
        cache = build(tmp_path / "c")
        model = self.other()
        before = tiny.state(model)
        with pytest.raises(ValueError, match=r"does not belong to this model: weights below the shortcut differ"):
            fit_coefficients(model, cache, show_progress=False)
        assert tiny.same_state(before, tiny.state(model))
        fit_coefficients(adapted(n_nodes=3), cache, max_moves=2, show_progress=False)

    def test_weights_in_another_order_are_other_weights(self, tmp_path):
        cache = build(tmp_path / "c")
        model = adapted()
        weight = model.get_base_model().transformer.wte.weight.data
        weight[[30, 31]] = weight[[31, 30]]
        with pytest.raises(ValueError, match="weights below the shortcut"):
            fit_coefficients(model, cache, show_progress=False)

    def test_another_objective(self, tmp_path):
        models = [
            adapted(tiny.roberta("SEQ_CLS", num_labels=2, problem_type=kind), target_modules=["classifier"])
            for kind in ("multi_label_classification", "regression")
        ]
        samples = [{"input_ids": each["input_ids"], "labels": torch.tensor([0.0, 1.0])} for each in data()]
        cache = build(tmp_path / "c", samples, models[0])
        with pytest.raises(ValueError, match="does not belong to this model: objective differ"):
            fit_coefficients(models[1], cache, show_progress=False)

    def test_the_model_is_prepared_only_for_a_cache_that_opens(self, tmp_path):
        model = adapted()
        own = model.get_base_model().forward
        build(tmp_path / "c", model=adapted())
        (tmp_path / "c" / SHARD).unlink()
        with pytest.raises(ValueError, match="damaged"):
            build(tmp_path / "c", model=model)
        assert model.get_base_model().forward == own
