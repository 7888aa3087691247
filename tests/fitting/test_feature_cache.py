"""The feature cache: what it holds, when it is refused, and training from it."""

import copy
import errno
import os
import threading

import datasets
import pytest
import tiny
import torch
from filelock import FileLock
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, default_data_collator

import lreg_peft.fitting.feature_cache as cache_module
from lreg_peft import FeatureCache, LRegConfig, cache_features
from lreg_peft.fitting.output_layer import find_output_layer

GENERATOR = torch.Generator().manual_seed(0)


def samples(n: int = 7, length: int = 9) -> list[dict[str, torch.Tensor]]:
    result = []
    for i in range(n):
        ids = torch.randint(3, tiny.VOCABULARY, (length,), generator=torch.Generator().manual_seed(i))
        labels = ids.clone()
        labels[i:] = -100  # the first sample has no label that counts, nor has the second: they are shifted
        result.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return result


DATA = samples()
ROWS = sum(range(6))


def adapted(base: nn.Module | None = None, **options) -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(base or tiny.gpt2(), LRegConfig(preset="paper", init_weights=False, **options)).train()


def build(path, model: nn.Module | None = None, data=DATA, **options) -> FeatureCache:
    if isinstance(data, list):
        data = DataLoader(data, batch_size=3)
    return cache_features(model or adapted(), data, path, **options)


class TestContents:
    def test_rows_of_samples_and_of_the_whole(self, tmp_path):
        model = adapted()
        cache = build(tmp_path / "c", model, dtype=torch.float32, show_progress=False)
        assert (len(cache), cache.n_rows, cache.objective) == (7, ROWS, "cross_entropy")
        output = find_output_layer(model)
        for i, sample in enumerate(DATA):
            rows = output.rows({name: value[None] for name, value in sample.items()})
            torch.testing.assert_close(cache[i]["features"], rows.features)
            assert torch.equal(cache[i]["labels"], rows.targets)
        chunks = list(cache.chunks(4))
        assert [len(chunk.targets) for chunk in chunks] == [4, 4, 4, 3]
        whole = cache.collate([cache[i] for i in range(7)])
        assert torch.equal(torch.cat([chunk.features for chunk in chunks]), whole["features"])
        assert torch.equal(cache[-1]["labels"], cache[6]["labels"])
        with pytest.raises(IndexError):
            cache[7]

    def test_files(self, tmp_path):
        build(tmp_path / "c")
        assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
            "build.lock", "rows-0-00000.safetensors", "stamp.json",
        ]  # fmt: skip
        stored = load_file(tmp_path / "c" / "rows-0-00000.safetensors")
        assert {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()} == {
            "features": (torch.bfloat16, (ROWS, tiny.HIDDEN)),
            "targets": (torch.int64, (ROWS,)),
            "offsets": (torch.int64, (8,)),
        }
        assert [p.name for p in tmp_path.iterdir()] == ["c"]

    def test_shards_read_as_one(self, tmp_path, monkeypatch):
        whole = build(tmp_path / "whole")
        monkeypatch.setattr(cache_module, "SHARD_BYTES", 1)
        parts = build(tmp_path / "parts")
        assert len(list(parts.path.glob("rows-0-*.safetensors"))) == 3
        assert (len(parts), parts.n_rows) == (7, ROWS)
        for i in range(7):
            assert torch.equal(parts[i]["features"], whole[i]["features"])
            assert torch.equal(parts[i]["labels"], whole[i]["labels"])
        assert sum(len(chunk.targets) for chunk in parts.chunks(4)) == ROWS

    def test_a_loader_of_batches_gives_the_same(self, tmp_path):
        loader = DataLoader(DATA, batch_size=3)
        data_set = datasets.Dataset.from_list([{k: v.tolist() for k, v in sample.items()} for sample in DATA])
        caches = [
            build(tmp_path / "a"),
            build(tmp_path / "b", data=loader),
            cache_features(adapted(), list(loader), tmp_path / "c"),
            build(tmp_path / "d", data=data_set),
        ]
        for cache in caches[1:]:
            assert len(cache) == 7
            assert torch.equal(cache[5]["features"], caches[0][5]["features"])

    @pytest.mark.parametrize("kind", ["classes", "value", "labels"])
    def test_classification(self, tmp_path, kind):
        options = {
            "classes": {"num_labels": 3},
            "value": {"num_labels": 1},
            "labels": {"num_labels": 3, "problem_type": "multi_label_classification"},
        }[kind]
        targets = {"classes": torch.tensor([0, 2, 1]), "value": torch.randn(3), "labels": torch.eye(3)}[kind]
        data = [{**DATA[i], "labels": targets[i]} for i in range(3)]
        model = adapted(tiny.roberta("SEQ_CLS", **options), target_modules=["classifier"])
        cache = build(tmp_path / "c", model, data, dtype=torch.float32)
        assert (len(cache), cache.n_rows) == (3, 3)
        batch = cache.collate([cache[i] for i in range(3)])
        expected = model(**{n: torch.stack([d[n] for d in data]) for n in data[0]}).loss
        torch.testing.assert_close(model(**batch).loss, expected, rtol=1e-5, atol=1e-6)

    def test_modes_and_weights_of_the_model_are_as_before(self, tmp_path):
        model = adapted()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        modes = [m.training for m in model.modules()]
        build(tmp_path / "c", model)
        assert [m.training for m in model.modules()] == modes
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class TestTraining:
    def test_same_loss_and_gradients_as_without(self, tmp_path):
        model = adapted(n_components=3, n_nodes=4)
        cache = build(tmp_path / "c", model, dtype=torch.float32)
        picked = [6, 2, 4]
        batch = {name: torch.stack([DATA[i][name] for i in picked]) for name in DATA[0]}
        grads = []
        for inputs in (batch, cache.collate([cache[i] for i in picked])):
            model.zero_grad()
            output = model(**inputs)
            output.loss.backward()
            grads.append([output.loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize("n_items", [None, 5])
    @pytest.mark.parametrize("how", ["in chunks", "with dropout", "while watched", "in eval mode"])
    def test_logits_are_left_out_only_where_the_loss_needs_none(self, tmp_path, how, n_items):
        model = adapted(n_components=3, n_nodes=4, dropout=0.5 if how == "with dropout" else 0.0)
        cache = build(tmp_path / "c", model, dtype=torch.float32)
        batch = cache.collate([cache[i] for i in range(7)])
        (layer,) = tiny.layers(model)
        if how == "while watched":
            layer.lreg_encoder["default"].register_forward_hook(lambda *inputs: None)
        torch.manual_seed(0)
        output = model.train(how != "in eval mode")(**batch, num_items_in_batch=n_items)
        assert (output.logits is None) == (how == "in chunks")
        torch.manual_seed(0)
        logits = layer(batch["features"])
        expected = nn.functional.cross_entropy(logits, batch["labels"], reduction="sum") / (n_items or ROWS)
        torch.testing.assert_close(output.loss, expected)

    def test_trainer_takes_it_and_loses_within_the_precision_of_storage(self, tmp_path):
        # Trainer counts the first labels, which are never predicted: leave them out to compare.
        data = [{**s, "labels": torch.cat((torch.tensor([-100]), s["input_ids"][1:]))} for s in DATA]
        losses = {}
        for name, dtype in (("model", None), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
            model = adapted()
            cache = None if dtype is None else build(tmp_path / name, model, data, dtype=dtype)
            arguments = TrainingArguments(
                tmp_path / "out", num_train_epochs=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
                learning_rate=1e-2, seed=3,
            )  # fmt: skip
            trainer = Trainer(
                model, arguments, train_dataset=data if cache is None else cache,
                data_collator=None if cache is None else cache.collate,
            )  # fmt: skip
            trainer.train()
            losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses["model"]) == 4
        assert losses["fp32"] == pytest.approx(losses["model"], rel=2e-4)  # four digits are logged
        assert losses["bf16"] == pytest.approx(losses["model"], rel=1e-2)

    def test_the_model_still_takes_its_own_inputs_and_unload_gives_it_back(self, tmp_path):
        base = tiny.gpt2()
        own = base.forward
        model = adapted(base)
        ids = DATA[0]["input_ids"][None]
        before = model.eval()(input_ids=ids).logits
        build(tmp_path / "c", model)
        build(tmp_path / "c", model)
        assert torch.equal(model(input_ids=ids).logits, before)
        assert model.unload().forward == own

    def test_wrong_features_are_refused(self, tmp_path):
        model = adapted()
        cache = build(tmp_path / "c", model)
        with pytest.raises(ValueError, match="without labels"):
            model(features=cache[3]["features"])
        with pytest.raises(ValueError, match=r"data_collator=cache\.collate"):
            model(features=cache[3]["features"][None], labels=cache[3]["labels"][None])


class TestReopening:
    def test_a_complete_cache_is_opened_and_not_built_again(self, tmp_path):
        model = adapted()
        build(tmp_path / "c", model)
        written = {file: file.stat().st_mtime_ns for file in (tmp_path / "c").iterdir()}
        assert build(tmp_path / "c", model).n_rows == ROWS
        assert build(tmp_path / "c", adapted(n_components=5)).n_rows == ROWS  # the adapter itself does not matter
        assert FeatureCache(tmp_path / "c").n_rows == ROWS
        assert {file: file.stat().st_mtime_ns for file in (tmp_path / "c").iterdir()} == written

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (
                lambda m: m.get_base_model().transformer.h[1].ln_1.bias.data.add_(1e-3),
                "weights below the shortcut differ",
            ),
            (
                lambda m: m.get_base_model().transformer.bfloat16(),
                "dtype of the model differ",
            ),
            (
                lambda m: setattr(m.get_base_model().config, "_attn_implementation_internal", "eager"),
                "attention implementation differ",
            ),
        ],
    )
    def test_another_model_is_refused_with_the_reason(self, tmp_path, change, reason):
        build(tmp_path / "c")
        model = adapted()
        change(model)
        with pytest.raises(ValueError, match=reason):
            build(tmp_path / "c", model)

    def test_other_data_are_refused_and_can_replace_it(self, tmp_path):
        build(tmp_path / "c")
        other = samples(6)
        with pytest.raises(ValueError, match="does not fit: data differ"):
            build(tmp_path / "c", data=other)
        with pytest.raises(ValueError, match="does not fit: data differ"):
            build(tmp_path / "c", data=DATA[::-1])
        with pytest.raises(ValueError, match="does not fit: dtype differ"):
            build(tmp_path / "c", dtype=torch.float32)
        assert len(build(tmp_path / "c", data=other, overwrite=True)) == 6


class Stopping(list):
    """A data set that stops the process at a sample, in the second pass over it."""

    def __init__(self, at: int, error: BaseException, data=DATA) -> None:
        super().__init__(data)
        self.at, self.error, self.reads = at, error, 0

    def __getitem__(self, i):
        self.reads += i == self.at
        if self.reads == 2:
            raise self.error
        return super().__getitem__(i)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 1)  # one for every batch


def passes_of(model: nn.Module) -> list[int]:
    """Grows by one entry in every pass."""
    calls = []
    model.get_base_model().transformer.register_forward_hook(lambda *inputs: calls.append(1))
    return calls


@pytest.mark.usefixtures("small_shards")
class TestInterruption:
    def test_goes_on_after_the_last_whole_shard(self, tmp_path):
        expected = build(tmp_path / "whole")
        model = adapted()
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "c", model, Stopping(6, KeyboardInterrupt()))
        with pytest.raises(FileNotFoundError, match="no complete feature cache"):
            FeatureCache(tmp_path / "c")
        calls = passes_of(model)
        cache = build(tmp_path / "c", model)
        assert len(calls) == 1
        for i in range(7):
            assert torch.equal(cache[i]["features"], expected[i]["features"])
        assert [p.name for p in cache.path.iterdir() if p.suffix == ".new"] == []

    def test_what_another_model_began_is_thrown_away(self, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "c", data=Stopping(6, KeyboardInterrupt()))
        other = adapted()
        other.get_base_model().transformer.wpe.weight.data.mul_(2)
        calls = passes_of(other)
        mine = build(tmp_path / "c", other)
        assert len(calls) == 3
        assert torch.equal(mine[5]["features"], build(tmp_path / "d", other)[5]["features"])

    @pytest.mark.parametrize("room", [0, 1000, 2000])
    def test_a_full_disk_is_said_and_the_same_command_goes_on(self, tmp_path, monkeypatch, room):
        expected = build(tmp_path / "whole")
        with monkeypatch.context() as patch:
            own, written = cache_module.os.fsync, [0]

            def fsync(descriptor):
                written[0] += os.fstat(descriptor).st_size
                if written[0] > room:
                    raise OSError(errno.ENOSPC, "No space left on device")
                own(descriptor)

            patch.setattr(cache_module.os, "fsync", fsync)
            with pytest.raises(OSError, match="No space left on device") as caught:
                build(tmp_path / "c")
        assert caught.value.errno == errno.ENOSPC
        assert not list((tmp_path / "c").glob("*.new"))
        assert torch.equal(build(tmp_path / "c")[5]["features"], expected[5]["features"])

    def test_a_second_job_waits_for_the_first(self, tmp_path):
        expected = build(tmp_path / "whole")
        (tmp_path / "c").mkdir()
        second = {}
        with FileLock(tmp_path / "c" / "build.lock"):
            thread = threading.Thread(target=lambda: second.update(cache=build(tmp_path / "c")))
            thread.start()
            thread.join(1.0)
            assert thread.is_alive() and not (tmp_path / "c" / "stamp.json").exists()
        thread.join(60)
        assert torch.equal(second["cache"][5]["features"], expected[5]["features"])

    def test_an_error_of_the_data_set_is_its_own(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no such picture$"):
            build(tmp_path / "c", data=Stopping(3, FileNotFoundError(errno.ENOENT, "no such picture")))


class TestRefusals:
    def test_of_models(self, tmp_path):
        with pytest.raises(ValueError, match="inside the network"):
            build(tmp_path / "c", adapted(target_modules=["mlp"]))
        model = adapted()
        model.get_base_model().transformer.ln_f.bias.requires_grad_(True)
        with pytest.raises(ValueError, match=r"transformer\.ln_f\.bias.*out of date"):
            build(tmp_path / "c", model)
        with pytest.raises(ValueError, match="changes what 'lm_head' gives"):
            build(tmp_path / "c", adapted(tiny.build("gemma2", "CAUSAL_LM", final_logit_softcapping=0.5)))
        with pytest.raises(FileNotFoundError):
            FeatureCache(tmp_path / "c")

    def test_of_data(self, tmp_path):
        with pytest.raises(ValueError, match="shuffles"):
            build(tmp_path / "c", data=DataLoader(DATA, batch_size=2, shuffle=True))
        with pytest.raises(ValueError, match="an iterator is used up by one"):
            build(tmp_path / "c", data=iter(DataLoader(DATA, 3)))
        with pytest.raises(ValueError, match=r"labels of one kind, and they give none: there are no batches"):
            build(tmp_path / "c", data=DATA[:1])
        with pytest.raises(ValueError, match="needs 'labels'"):
            build(tmp_path / "c", data=[{"input_ids": d["input_ids"]} for d in DATA])

        class Shuffled:
            def __iter__(self):
                order = torch.randperm(len(DATA), generator=GENERATOR).tolist()
                return iter([{k: v[None] for k, v in DATA[i].items()} for i in order])

        with pytest.raises(ValueError, match="in another order"):
            build(tmp_path / "c", data=Shuffled())


def trained_logits(model: nn.Module, cache: FeatureCache) -> torch.Tensor:
    """Of a model that has taken one step of its own."""
    batch = cache.collate([cache[i] for i in (3, 5, 6)])
    model.train()(**batch).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    return model.eval()(**batch).logits.detach().clone()


class TestCopies:
    """A copy of a prepared model is prepared itself, and has nothing of the original."""

    @pytest.mark.parametrize("way", ["deepcopy", "save"])
    def test_a_copy_runs_its_own_weights(self, tmp_path, way):
        model = adapted()
        cache = build(tmp_path / "c", model)
        if way == "deepcopy":
            twin = copy.deepcopy(model)
        else:
            torch.save(model, tmp_path / "model.pt")
            twin = torch.load(tmp_path / "model.pt", weights_only=False)
        batch = cache.collate([cache[i] for i in (3, 5, 6)])
        before = model.eval()(**batch).logits.detach().clone()
        moved = trained_logits(twin, cache)
        assert all(p.grad is None for p in model.parameters())
        assert not torch.allclose(moved, before)
        torch.testing.assert_close(model(**batch).logits.detach(), before)
        ids = DATA[0]["input_ids"][None]
        assert not torch.allclose(twin(input_ids=ids).logits, model(input_ids=ids).logits)
        base = twin.unload()
        assert "forward" not in base.__dict__
        assert model(**batch).loss is not None


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(DATA)


class TestTrainer:
    def train(self, tmp_path, model, cache, *, train=True, options=(), **more):
        arguments = TrainingArguments(
            tmp_path / "out", max_steps=2, per_device_train_batch_size=2, per_device_eval_batch_size=3,
            report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, learning_rate=1e-2, seed=3,
            **dict(options),
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=cache, data_collator=cache.collate, **more)
        if train:
            trainer.train()
        return trainer

    def test_a_raw_evaluation_set(self, tmp_path):
        model = adapted()
        cache = build(tmp_path / "c", model)
        metrics = self.train(tmp_path, model, cache, eval_dataset=DATA).evaluate()
        arguments = TrainingArguments(
            tmp_path / "out", per_device_eval_batch_size=3, report_to="none", use_cpu=True, disable_tqdm=True
        )
        expected = Trainer(model, arguments, eval_dataset=DATA).evaluate()
        assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)

    @pytest.mark.parametrize("raw", [False, True])
    def test_metrics_get_logits(self, tmp_path, raw):
        seen = {}

        def metrics(prediction):
            seen["shapes"] = prediction.predictions.shape, prediction.label_ids.shape
            return {"rows": len(prediction.predictions)}

        data = [{**DATA[i], "labels": torch.tensor(i % 3)} for i in range(7)]
        model = adapted(tiny.roberta("SEQ_CLS", num_labels=3), target_modules=["classifier"])
        cache = build(tmp_path / "c", model, data)
        trainer = self.train(tmp_path, model, cache, eval_dataset=data if raw else cache, compute_metrics=metrics)
        assert trainer.evaluate()["eval_rows"] == 7
        assert seen["shapes"] == ((7, 3), (7,))
        model = adapted()
        cache = build(tmp_path / "lm", model)
        self.train(tmp_path, model, cache, eval_dataset=cache, compute_metrics=metrics).evaluate()
        assert seen["shapes"] == ((ROWS, tiny.VOCABULARY), (ROWS,))

    @pytest.mark.parametrize("kind", ["smoothing", "function"])
    def test_a_loss_that_trainer_computes(self, tmp_path, kind):
        options = {"label_smoothing_factor": 0.1} if kind == "smoothing" else {}
        more = {}
        if kind == "function":
            more["compute_loss_func"] = lambda outputs, labels, **_: nn.functional.cross_entropy(outputs.logits, labels)
        data = [{**DATA[i], "labels": torch.tensor(i % 3)} for i in range(7)]
        losses = []
        for cached in (True, False):
            model = adapted(
                tiny.roberta("SEQ_CLS", num_labels=3, hidden_dropout_prob=0.0), target_modules=["classifier"]
            )
            cache = build(tmp_path / f"c{cached}", model, data, dtype=torch.float32)
            trainer = self.train(tmp_path, model, cache, options=options, train=False, **more)
            if not cached:
                trainer.train_dataset, trainer.data_collator = data, default_data_collator
            losses.append(trainer.train().training_loss)
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    @pytest.mark.parametrize("kind", ["smoothing", "function"])
    def test_one_sentence_where_it_would_pair_rows_with_other_labels(self, tmp_path, kind):
        options = {"label_smoothing_factor": 0.1} if kind == "smoothing" else {}
        more = {"compute_loss_func": lambda *_, **__: None} if kind == "function" else {}
        model = adapted()
        cache = build(tmp_path / "c", model)
        with pytest.raises(ValueError, match=r"label smoothing or compute_loss_func.*without the cache"):
            self.train(tmp_path, model, cache, options=options, **more)

    @pytest.mark.parametrize("kind", ["torch", "datasets"])
    def test_samples_that_come_as_a_stream(self, tmp_path, kind):
        stream = Stream() if kind == "torch" else datasets.IterableDataset.from_generator(lambda: iter(DATA))
        cache = build(tmp_path / "c", data=stream)
        expected = build(tmp_path / "d")
        assert len(cache) == 7
        assert all(torch.equal(cache[i]["features"], expected[i]["features"]) for i in range(7))

    def test_batches_without_labels_that_count(self, tmp_path):
        model = adapted()
        cache = build(tmp_path / "c", model)
        for batch in (cache.collate([cache[0], cache[1]]), {**cache[6], "labels": torch.full((5,), -100)}):
            model.zero_grad()
            model(**batch, num_items_in_batch=torch.tensor(4)).loss.backward()
            assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)

    def test_hooks_on_the_head_act(self, tmp_path):
        model = adapted()
        cache = build(tmp_path / "c", model)
        batch = cache.collate([cache[i] for i in (3, 5)])
        before = model(**batch).loss
        model.get_base_model().lm_head.register_forward_hook(lambda m, args, output: output.tanh())
        assert model(**batch).loss.item() != pytest.approx(before.item(), rel=1e-3)
