"""Feature caches that are damaged, shared, foreign, or of another model; and rows that cannot be stored."""

import errno
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from peft import get_peft_model

import lreg_peft.fitting.cache_files as files_module
import lreg_peft.fitting.feature_cache as cache_module
from lreg_peft import FeatureCache, LRegConfig, cache_features, fit_coefficients, fit_meshes


def data(n: int = 6, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, tiny.VOCABULARY, (n, 7), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def adapted(base=None, **options):
    torch.manual_seed(1)
    return get_peft_model(base or tiny.gpt2(), LRegConfig(**options))


MODEL = adapted()


def build(path, samples=None, model=None, **options) -> FeatureCache:
    options = {"batch_size": 2, "show_progress": False, **options}
    return cache_features(model or MODEL, data() if samples is None else samples, path, **options)


def rows(cache: FeatureCache) -> torch.Tensor:
    return torch.cat([cache[i]["features"] for i in range(len(cache))])


class TestTwoJobsOnOnePath:
    def test_neither_spoils_the_other(self, tmp_path):
        """The second begins and ends while the first is in the middle of its data."""
        inner = []

        class Slow(list):
            def __getitem__(self, i):
                if i == 4 and len(inner) == 1:  # the second pass over the data, after the fingerprint
                    inner.append(None)
                    inner.append(build(tmp_path / "c", data(seed=0)))
                elif i == 4 and not inner:
                    inner.append(None)
                return super().__getitem__(i)

        outer = build(tmp_path / "c", Slow(data()))
        assert len(inner) == 3
        expected = rows(build(tmp_path / "alone"))
        assert torch.equal(rows(outer), expected) and torch.equal(rows(inner[2]), expected)
        assert torch.equal(rows(FeatureCache(tmp_path / "c")), expected)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "c"]

    def test_the_later_of_two_that_differ_is_refused(self, tmp_path):
        class Slow(list):
            calls = 0

            def __getitem__(self, i):
                Slow.calls += 1
                if Slow.calls == 10:
                    build(tmp_path / "c", data(seed=1))
                return super().__getitem__(i)

        with pytest.raises(ValueError, match="data are not those"):
            build(tmp_path / "c", Slow(data()))
        assert torch.equal(rows(FeatureCache(tmp_path / "c")), rows(build(tmp_path / "d", data(seed=1))))


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 16
    file.write_bytes(content)


def edit(**changes):
    def change(folder: Path) -> None:
        stamp = json.loads((folder / "stamp.json").read_text())
        (folder / "stamp.json").write_text(json.dumps({**stamp, **changes}))

    return change


def offsets(change):
    def apply(folder: Path) -> None:
        file = folder / "offsets-0.npy"
        stream = io.BytesIO(file.read_bytes())
        values, rest = change(np.load(stream)), stream.read()
        stream = io.BytesIO()
        np.save(stream, values)
        file.write_bytes(stream.getvalue() + rest)

    return apply


def swap(values):
    values[[1, 2]] = values[[2, 1]]
    return values


DAMAGES = {
    "a bit of the features": lambda f: flip(f / "features-0.bin", 100),
    "a bit of the labels": lambda f: flip(f / "targets-0.bin", 8),
    "a bit of the offsets": lambda f: flip(f / "offsets-0.npy", 140),
    "a bit of the checksums": lambda f: flip(f / "offsets-0.npy", -30),
    "features cut off": lambda f: os.truncate(f / "features-0.bin", 64),
    "features with more": lambda f: os.truncate(f / "features-0.bin", 5000),
    "no features": lambda f: (f / "features-0.bin").unlink(),
    "no labels": lambda f: (f / "targets-0.bin").unlink(),
    "no offsets": lambda f: (f / "offsets-0.npy").unlink(),
    "offsets cut off": lambda f: os.truncate(f / "offsets-0.npy", 100),
    "empty offsets": lambda f: os.truncate(f / "offsets-0.npy", 0),
    "offsets that fall": offsets(swap),
    "offsets from 1": offsets(lambda values: values + 1),
    "offsets of floats": offsets(lambda values: values.astype(float)),
    "no checksums": lambda f: os.truncate(f / "offsets-0.npy", 128 + 8 * 7),
    "stamp cut off": lambda f: os.truncate(f / "stamp.json", 40),
    "stamp that is a list": lambda f: (f / "stamp.json").write_text("[]"),
    "no shards": edit(shards=0),
    "shards below zero": edit(shards=-1),
    "too many shards": edit(shards=2),
    "shards in words": edit(shards="one"),
    "features of width 0": edit(in_features=0),
    "features of another width": edit(in_features=8),
    "another dtype": edit(dtype="float16"),
    "an unknown dtype": edit(dtype="int8"),
    "an unknown objective": edit(objective="hinge"),
    "an objective of other labels": edit(objective="squared_error"),
    "negative width of labels": edit(target_width=-1),
    "a format of the future": edit(format=3),
    "format True": edit(format=True),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return build(tmp_path_factory.mktemp("whole") / "c").path


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_on_opening(tmp_path, whole, damage):
    import shutil

    folder = tmp_path / "c"
    shutil.copytree(whole, folder)
    damage(folder)
    with pytest.raises(ValueError, match=r"feature cache .* is damaged|has the format"):
        FeatureCache(folder)
    assert torch.equal(rows(build(folder, overwrite=True)), rows(FeatureCache(whole)))


PARTIAL_DAMAGES = {
    "shorter": lambda f: os.truncate(f / "features-0.bin", 40),
    "missing": lambda f: (f / "features-0.bin").unlink(),
    "labels missing": lambda f: (f / "targets-0.bin").unlink(),
    "another bit": lambda f: flip(f / "features-0.bin", 10),
    "offsets missing": lambda f: (f / "offsets-0.npy").unlink(),
    "offsets cut": lambda f: os.truncate(f / "offsets-0.npy", 70),
    "progress cut": lambda f: os.truncate(f / "progress-0.json", 20),
    "progress of other things": lambda f: (f / "progress-0.json").write_text('{"batches": "x"}'),
    "progress that counts too much": lambda f: (f / "progress-0.json").write_text(
        (f / "progress-0.json").read_text().replace('"samples": 2', '"samples": 9')
    ),
    "stamp missing": lambda f: (f / "stamp.json").unlink(),
    "stamp empty": lambda f: (f / "stamp.json").write_text(""),
}


@pytest.mark.parametrize("damage", PARTIAL_DAMAGES.values(), ids=PARTIAL_DAMAGES)
def test_a_damaged_beginning_is_begun_again(tmp_path, monkeypatch, whole, damage):
    monkeypatch.setattr(cache_module, "_SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    append = cache_module._Shard.append

    def fail(shard, *arguments):
        if shard.batches == 1:
            raise KeyboardInterrupt
        append(shard, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cache_module._Shard, "append", fail)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "c")
    damage(tmp_path / "c.partial")
    assert torch.equal(rows(build(tmp_path / "c")), rows(FeatureCache(whole)))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


class TestFullDisk:
    @pytest.mark.parametrize("room", [0, 100, 300, 700, 1500])
    def test_nothing_is_left_whichever_write_fails(self, tmp_path, monkeypatch, room):
        """Every write counts, also those of checkpoints and stamps."""
        written = [0]
        own = files_module.write_all

        def write_all(file, content):
            written[0] += len(content)
            if written[0] > room:
                raise OSError(errno.ENOSPC, "No space left on device")
            own(file, content)

        monkeypatch.setattr(files_module, "write_all", write_all)
        with pytest.raises(OSError, match=r"No space left.*Nothing was left behind.*free space") as caught:
            build(tmp_path / "c")
        assert caught.value.errno == errno.ENOSPC
        assert list(tmp_path.iterdir()) == []

    def test_an_error_of_the_data_set_is_its_own(self, tmp_path):
        class Missing(list):
            def __getitem__(self, i):
                raise FileNotFoundError(errno.ENOENT, "no such picture")

        with pytest.raises(FileNotFoundError, match=r"no such picture$"):
            build(tmp_path / "c", Missing(data()))


class TestRows:
    def test_what_fp16_cannot_hold_is_refused(self, tmp_path):
        base = tiny.gpt2()
        base.transformer.ln_f.weight.data.mul_(1e6)
        with pytest.raises(ValueError, match=r"reach .*float16 ends at 6\.55e\+04: store them with"):
            build(tmp_path / "c", model=adapted(base), dtype=torch.float16)
        assert not (tmp_path / "c").exists()

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
        assert not (tmp_path / "c").exists()

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

        digests = set()
        for middle in (0, 1):
            digest = cache_module.hashlib.blake2b()
            cache_module._digest_batch(digest, batches(middle)[0])
            digests.add(digest.hexdigest())
        assert len(digests) == 2


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

    def test_a_link_to_an_empty_folder(self, tmp_path):
        (tmp_path / "disk").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "disk")
        assert len(build(tmp_path / "link")) == 6
        assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "stamp.json").is_file()

    def test_overwrite_deletes_nothing_foreign(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("precious")
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=r"'thesis.txt', which no cache writes"):
                build(tmp_path, overwrite=overwrite)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    def test_nor_what_stands_in_a_cache(self, tmp_path):
        build(tmp_path / "c")
        (tmp_path / "c" / "notes.txt").write_text("precious")
        assert len(build(tmp_path / "c")) == 6  # opening it is no matter
        with pytest.raises(ValueError, match=r"cannot be overwritten.*'notes.txt'"):
            build(tmp_path / "c", data(3), overwrite=True)
        assert len(FeatureCache(tmp_path / "c")) == 6
        assert (tmp_path / "c" / "notes.txt").read_text() == "precious"

    def test_a_file(self, tmp_path):
        (tmp_path / "c").write_text("x")
        with pytest.raises(ValueError, match="is not a feature cache but a file"):
            build(tmp_path / "c", overwrite=True)

    def test_parts_of_a_cache_can_be_replaced(self, tmp_path):
        build(tmp_path / "c")
        (tmp_path / "c" / "stamp.json").unlink()
        with pytest.raises(ValueError, match="exists and is not a feature cache"):
            build(tmp_path / "c")
        assert len(build(tmp_path / "c", overwrite=True)) == 6


class TestBelonging:
    def other(self):
        model = adapted()
        model.get_base_model().transformer.h[0].mlp.c_fc.weight.data.mul_(1.5)
        return model

    @pytest.mark.parametrize("fit", [fit_coefficients, fit_meshes])
    def test_a_fit_takes_no_cache_of_another_model(self, tmp_path, fit):
        cache = build(tmp_path / "c")
        model = self.other()
        before = tiny.state(model)
        with pytest.raises(ValueError, match=r"does not belong to this model: the weights below the shortcut"):
            fit(model, cache, show_progress=False)
        assert tiny.same_state(before, tiny.state(model))
        fit(adapted(dof=3), cache, show_progress=False)

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
        with pytest.raises(ValueError, match="made for binary_cross_entropy"):
            fit_coefficients(models[1], cache, show_progress=False)

    def test_the_model_is_prepared_only_for_a_cache_that_opens(self, tmp_path, monkeypatch):
        model = adapted()
        own = model.get_base_model().forward
        build(tmp_path / "c", model=adapted())
        flip(tmp_path / "c" / "features-0.bin", 3)
        with pytest.raises(ValueError, match="damaged"):
            build(tmp_path / "c", model=model)
        assert model.get_base_model().forward == own
