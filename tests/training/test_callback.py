"""The callback in a Trainer."""

import json
import math
import warnings

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from peft import get_peft_model
from tiers import slow
from tiny import VOCABULARY, gpt2, layers, same_state, shake, state
from torch import nn

from lreg_peft import LRegCallback, LRegConfig, LRegLayer, curvature_penalty, update_meshes
from lreg_peft.training import callback
from lreg_peft.training.statistics import statistics_of
from lreg_peft.tuner.sites import all_sites

LOGS = {"lreg_moves_accepted", "lreg_moves_refused"}


def adapted(base=None, **options):
    model = get_peft_model(
        base or gpt2(), LRegConfig(**{"target_modules": ["mlp"], "n_components": 2, "n_nodes": 6, **options})
    )
    shake(model)
    return model


class Small(nn.Module):
    """A model that compiles in a second."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.head = LRegLayer(nn.Linear(4, VOCABULARY), 4, VOCABULARY)
        self.head.update_layer("default", 2, 6, LRegConfig(preset="paper", n_components=2, n_nodes=6))
        self.head.set_adapter("default")

    def forward(self, input_ids, labels):
        logits = self.head(self.embedding(input_ids))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def data(n=16, labels=True):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (n, 8), generator=generator).tolist()
    return [{"input_ids": row, **({"labels": row} if labels else {})} for row in ids]


def trainer(model, folder, *callbacks, dataset=None, **options):
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "restore_callback_states_from_checkpoint": True,
        **options,
    }
    arguments = transformers.TrainingArguments(str(folder), **settings)
    made = transformers.Trainer(model, arguments, train_dataset=dataset or data(), callbacks=list(callbacks))
    made.remove_callback(transformers.PrinterCallback)
    return made


def n_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def is_tracked(model):
    return any(statistics_of(site) is not None for site in all_sites(model))


class Recorder(transformers.TrainerCallback):
    """Notes the nodes after every step, and whether statistics are gathered."""

    def __init__(self):
        self.nodes, self.tracked = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.nodes.append(torch.cat([layer.lreg_encoder["default"].nodes.flatten() for layer in layers(model)]))
        self.tracked.append(is_tracked(model))

    def moved_at(self):
        pairs = zip(self.nodes, self.nodes[1:], strict=False)
        return [i + 2 for i, (before, after) in enumerate(pairs) if not torch.equal(before, after)]


@pytest.fixture(autouse=True)
def own_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def always(monkeypatch):
    """Accepts or refuses every move, as told."""

    def install(answer):
        def decided(*args, accept=None, **kwargs):
            losses = iter((1.0, 1.0 if answer else 2.0))
            return update_meshes(*args, accept=lambda: next(losses), **kwargs)

        monkeypatch.setattr(callback, "update_meshes", decided)

    return install


class TestSchedule:
    def test_every_few_steps_until_the_last_part(self, tmp_path, always):
        always(True)
        record, own = Recorder(), LRegCallback(every=2)
        trainer(adapted(), tmp_path, own, record).train()
        assert record.moved_at() == [2, 4, 6, 8]
        assert own.n_accepted == 4
        assert record.tracked == [True] * 9 + [False] * 3

    def test_accumulation_counts_steps(self, tmp_path, always):
        always(True)
        record = Recorder()
        options = {"gradient_accumulation_steps": 2, "max_steps": 4}
        trainer(adapted(), tmp_path, LRegCallback(every=2, stop=1.0), record, **options).train()
        assert record.moved_at() == [2, 4]

    def test_hits(self, tmp_path):
        record, own = Recorder(), LRegCallback(every=2, strategy="paper", n_check_batches=0, n_hard_samples=4)
        trainer(adapted(), tmp_path, own, record).train()
        assert record.moved_at() == [2, 4, 6, 8] and own.n_accepted == 4


class TestCheck:
    def test_size_after_refusals(self, tmp_path, always):
        always(False)
        record, own = Recorder(), LRegCallback(every=1, stop=0.25, size=0.8)
        trainer(adapted(), tmp_path, own, record).train()
        assert record.moved_at() == []
        assert (own.n_accepted, own.n_refused, own.current_size) == (0, 3, 0.1)

    def test_size_comes_back(self, tmp_path, always):
        always(True)
        own = LRegCallback(every=1, stop=0.25, size=0.8)

        class Smaller(transformers.TrainerCallback):
            def on_train_begin(self, *args, **kwargs):
                own.current_size = 0.1

        trainer(adapted(), tmp_path, own, Smaller()).train()
        assert own.current_size == 0.8

    def test_loss_of_the_last_batches_in_eval_mode(self, tmp_path, monkeypatch):
        seen = []

        def spy(model, optimizer, *, accept, **kwargs):
            before = state(model)
            modes = [module.training for module in model.modules()]
            seen.append(accept())
            assert [module.training for module in model.modules()] == modes
            assert same_state(before, state(model))
            rows = data()
            order = [row for batch in inputs[-2:] for row in batch]
            model.eval()
            with torch.no_grad():
                # The Trainer divides by the labels of the step before they are shifted.
                losses = [
                    model(input_ids=ids, labels=ids, num_items_in_batch=ids.numel()).loss
                    for ids in torch.stack(order).split(2)
                ]
            assert seen[-1] == pytest.approx(float(sum(losses) / 2), rel=1e-5)
            assert {tuple(row.tolist()) for row in order} <= {tuple(row["input_ids"]) for row in rows}
            model.train()
            return update_meshes(model, optimizer, accept=accept, **kwargs)

        monkeypatch.setattr(callback, "update_meshes", spy)
        model, inputs = adapted(), []
        model.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.append(kwargs["input_ids"]) if module.training else None,
            with_kwargs=True,
        )
        trainer(model, tmp_path, LRegCallback(every=4, stop=0.5)).train()
        assert len(seen) == 1

    @pytest.mark.parametrize("kind", ["label smoothing", *slow("compute_loss_func")])
    def test_a_loss_of_ones_own(self, tmp_path, monkeypatch, kind):
        """Labels are taken out of the batch before the model sees it."""

        def own_loss(model, inputs):
            logits = model(**inputs).logits[:, :-1].log_softmax(-1)
            return -logits.gather(-1, inputs["input_ids"][:, 1:].unsqueeze(-1)).mean()

        seen, inputs = [], []

        def spy(model, optimizer, *, accept, **kwargs):
            before, batches = state(model), inputs[-2:]
            seen.append(accept())
            assert same_state(before, state(model)) and model.training
            model.eval()
            with torch.no_grad():
                by_hand = [float(own_loss(model, {"input_ids": batch})) for batch in batches]
            model.train()
            assert seen[-1] == pytest.approx(sum(by_hand) / 2, rel=1e-5)
            return update_meshes(model, optimizer, accept=accept, **kwargs)

        monkeypatch.setattr(callback, "update_meshes", spy)
        options = {"max_steps": 8}
        if kind == "label smoothing":
            options["label_smoothing_factor"] = 0.2
        for check_loss in (own_loss, None):
            model = adapted()
            model.register_forward_pre_hook(
                lambda module, args, kwargs: inputs.append(kwargs["input_ids"]) if module.training else None,
                with_kwargs=True,
            )
            own = LRegCallback(every=2, stop=0.5, check_loss=check_loss)
            made = trainer(model, tmp_path, own, **options)
            if kind == "compute_loss_func":
                made.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs.logits.square().mean()
            if check_loss is None:
                with pytest.raises(RuntimeError, match=r"label smoothing or a compute_loss_func .*check_loss=\.\.\."):
                    made.train()
            else:
                made.train()
                assert len(seen) == 2 and own.n_accepted + own.n_refused == 2

    def test_no_loss(self, tmp_path):
        class OwnLoss(transformers.Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
                return model(input_ids=inputs["input_ids"]).logits.square().mean()

        made = trainer(adapted(), tmp_path, LRegCallback(every=2))
        made.__class__ = OwnLoss
        with pytest.raises(RuntimeError, match=r"no loss for a training batch.*n_check_batches=0"):
            made.train()
        made = trainer(adapted(), tmp_path, LRegCallback(every=2, n_check_batches=0))
        made.__class__ = OwnLoss
        made.train()


class TestLogs:
    def test_meshes_and_moves(self, tmp_path):
        model, seen = adapted(), []

        class Reporter(transformers.TrainerCallback):
            def on_log(self, args, state, control, logs=None, **kwargs):
                seen.append(dict(logs))

        made = trainer(model, tmp_path, LRegCallback(every=2), Reporter())
        made.train()
        entries = [entry for entry in made.state.log_history if "loss" in entry]
        assert len(entries) == 12 and all(entry.keys() >= LOGS for entry in entries)
        assert all(entry.keys() >= LOGS for entry in seen if "loss" in entry)
        assert "lreg_curvature_penalty" not in entries[0]
        last = entries[-1]
        assert last["lreg_moves_accepted"] + last["lreg_moves_refused"] == 4
        json.dumps(entries)

    def test_curvature_penalty(self, tmp_path):
        model = adapted(curvature_weight=0.5)
        made = trainer(model, tmp_path, LRegCallback(every=2, n_check_batches=0))
        made.train()
        expected = 0.0
        for layer in layers(model):
            nodes, values = layer.lreg_encoder["default"].nodes, layer.nodal_coefficients("default").detach()
            share = (nodes[:, 1:-1] - nodes[:, :-2]) / (nodes[:, 2:] - nodes[:, :-2])
            line = values[:, :-2] + share[..., None] * (values[:, 2:] - values[:, :-2])
            expected += 0.5 * (values[:, 1:-1] - line).abs().mean()
        entry = [entry for entry in made.state.log_history if "loss" in entry][-1]
        assert entry["lreg_curvature_penalty"] == pytest.approx(float(expected), rel=1e-5)
        assert float(curvature_penalty(model).detach()) == pytest.approx(float(expected), rel=1e-5)


class TestLife:
    def test_every_training_begins_anew(self, tmp_path, always):
        always(False)
        own = LRegCallback(every=1, stop=0.25, size=0.8)
        trainer(adapted(), tmp_path, own).train()
        assert (own.n_accepted, own.n_refused, own.current_size) == (0, 3, 0.1)
        always(True)
        trainer(adapted(), tmp_path, own, max_steps=8).train()
        assert (own.n_accepted, own.n_refused, own.current_size) == (2, 0, 0.8)
        with pytest.warns(UserWarning, match="moved no mesh"):
            trainer(adapted(), tmp_path, own, max_steps=1).train()
        assert (own.n_accepted, own.n_refused, own.last_update) == (0, 0, None)

    def test_a_training_too_short_for_one_move_says_so(self, tmp_path):
        with pytest.warns(UserWarning, match="every 50 steps, until step 9, and the training had 12 steps") as caught:
            trainer(adapted(), tmp_path, LRegCallback()).train()
        assert len([warning for warning in caught if "LRegCallback" in str(warning.message)]) == 1

    def test_leaves_no_hook_behind(self, tmp_path):
        model = adapted()
        before = n_hooks(model)
        trainer(model, tmp_path, LRegCallback(every=2, stop=1.0)).train()
        assert n_hooks(model) == before
        assert not is_tracked(model)

    def test_trains_again_after_a_training_that_broke_off(self, tmp_path):
        class Stop(transformers.TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                raise KeyboardInterrupt

        model, own = adapted(), LRegCallback(every=2)
        before = n_hooks(model)
        with pytest.raises(KeyboardInterrupt):
            trainer(model, tmp_path, own, Stop()).train()
        assert n_hooks(model) > before
        trainer(model, tmp_path, own).train()
        assert n_hooks(model) == before and own.n_accepted + own.n_refused == 4

    def test_state_goes_through_json(self):
        own = LRegCallback(every=3, stop=0.5, size=0.5, n_refine=2)
        own.current_size, own.n_accepted, own.n_refused = 0.125, 4, 2
        twin = LRegCallback.from_state(json.loads(json.dumps(own.state())))
        assert twin.state() == own.state()
        assert (twin.current_size, twin.n_accepted, twin.n_refused) == (0.125, 4, 2)

    def test_resumes_exactly(self, tmp_path):
        options = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"}
        whole, first = adapted(), LRegCallback(every=2, size=0.5)
        trainer(whole, tmp_path / "whole", first, **options).train()
        saved = json.loads((tmp_path / "whole" / "checkpoint-4" / "trainer_state.json").read_text())
        assert saved["stateful_callbacks"]["LRegCallback"]["args"]["size"] == 0.5
        resumed = adapted()
        made = trainer(resumed, tmp_path / "resumed", LRegCallback(every=2), **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*train_batch_size.*")
            made.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
        (second,) = (c for c in made.callback_handler.callbacks if isinstance(c, LRegCallback))
        assert first.state() == second.state()
        assert first.n_accepted + first.n_refused == 4
        assert same_state(state(whole), state(resumed))

    @pytest.mark.slow
    def test_compiled(self, tmp_path, monkeypatch):
        torch._dynamo.reset()
        for name in ("BACKEND", "MODE"):
            monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no")  # undoes what the Trainer writes there
        record, own = Recorder(), LRegCallback(every=2, stop=1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch.compile itself
            options = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 4}
            trainer(Small(), tmp_path, own, record, **options).train()
        assert own.n_accepted + own.n_refused == 2
        assert len(record.moved_at()) == own.n_accepted


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"every": 0}, ValueError, "every must be at least 1, got 0"),
            ({"every": 2.5}, TypeError, "every must be a whole number, got 2.5"),
            ({"stop": 0}, ValueError, "stop must be positive, got 0"),
            ({"stop": 1.5}, ValueError, "stop must be at most 1, got 1.5"),
            ({"stop": math.nan}, ValueError, "stop must be positive, got nan"),
            ({"strategy": "best"}, ValueError, "strategy must be one of.*'best'"),
            ({"size": 0}, ValueError, "size must be positive, got 0"),
            ({"size": math.nan}, ValueError, "size must be"),
            ({"n_check_batches": -1}, ValueError, "n_check_batches must be at least 0"),
            ({"tolerance": -1}, ValueError, "tolerance must be at least 0, got -1"),
            ({"tolerance": "0.5"}, TypeError, "tolerance must be a number"),
            ({"n_refine": -1}, ValueError, "n_refine must be at least 0, got -1"),
            ({"n_hard_samples": 0}, ValueError, "n_hard_samples must be at least 1, got 0"),
        ],
    )
    def test_options_are_noticed_at_construction(self, options, error, message):
        with pytest.raises(error, match=message):
            LRegCallback(**options)

    def test_model_without_meshes_that_move(self, tmp_path):
        with pytest.raises(ValueError, match="every mesh has n_nodes=2"):
            trainer(adapted(n_nodes=2), tmp_path, LRegCallback()).train()
