"""Stacks of adapters: what is added, what stays frozen, what is saved, and what a grade can reach."""

import copy
import itertools
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import (
    HIDDEN,
    adapt,
    build,
    gpt2,
    inputs,
    layers,
    loss_of,
    outputs,
    roberta,
    same_state,
    shake,
    state,
    trainable,
)
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from benchmarks.measurements import multigrade_anchor
from lreg_peft import (
    LRegConfig,
    add_grade,
    initialize_lreg_weights,
    inspect_targets,
    load_grades,
    track_statistics,
)
from lreg_peft.core import evaluate
from lreg_peft.fitting.feature_cache import fingerprint_below
from lreg_peft.fitting.output_layer import find_output_layer
from lreg_peft.training.statistics import statistics_of
from lreg_peft.tuner.sites import all_sites

FORMS = ("additive", "composed")
OPTIONS = {"task_type": "CAUSAL_LM", "n_components": 3, "n_nodes": 4, "target_modules": ["lm_head", "mlp"]}


def first_grade(base=None, **options) -> PeftModel:
    model = adapt(base or gpt2(), **{**OPTIONS, **options})
    shake(model)
    return model.eval()


def stack_of_three(form: str, base=None) -> PeftModel:
    model = first_grade(base)
    for seed, name in enumerate(("grade_2", "grade_3")):
        assert add_grade(model, form=form) == name
        shake(model, name, seed)
    return model


class TestAdding:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("weighting", ["full", "reduced", "factored"])
    def test_the_output_does_not_change(self, form, weighting):
        model = first_grade(weighting=weighting)
        before = outputs(model)
        add_grade(model, form=form)
        assert torch.equal(outputs(model), before)

    @pytest.mark.parametrize("form", FORMS)
    def test_output_is_the_sum(self, form):
        model = stack_of_three(form, gpt2())
        layer = model.get_submodule("base_model.model.lm_head")
        x = torch.randn(5, HIDDEN)
        with torch.no_grad():
            base = layer.base_layer(x)
            parts = [layer.shortcut(name, x, base) for name in ("default", "grade_2", "grade_3")]
            assert all(part.any() for part in parts)
            torch.testing.assert_close(layer(x), base + sum(parts))

    def test_a_composed_grade_sees_the_basis_of_the_one_before(self):
        model = stack_of_three("composed")
        layer = layers(model)[0]
        x = torch.randn(5, HIDDEN)
        seen = layer.encoder_input("grade_3", x)
        assert torch.equal(seen[:, :HIDDEN], x)
        basis = seen[:, HIDDEN:].view(5, 3, 4)
        torch.testing.assert_close(basis.sum(-1), torch.ones(5, 3))  # a partition of unity per component
        moved = copy.deepcopy(layer)
        moved.lreg_projection["grade_2"].bias.data += 1
        assert not torch.equal(moved.coords("grade_3", x), layer.coords("grade_3", x))
        moved = copy.deepcopy(layer)
        moved.lreg_coefficients["grade_2"].weight.data += 1
        assert torch.equal(moved.coords("grade_3", x), layer.coords("grade_3", x))

    @pytest.mark.parametrize("form", FORMS)
    def test_only_the_last_grade_trains(self, form):
        model = stack_of_three(form)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert names
        assert all(".grade_3." in name for name in names)
        before = state(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss_of(model).backward()
        optimizer.step()
        changed = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
        assert changed == set(names)

    @pytest.mark.parametrize(("form", "width"), [("additive", HIDDEN), ("composed", HIDDEN + 12)])
    def test_parameter_counts(self, form, width, capsys):
        model = first_grade()
        config = LRegConfig(preset="paper", **{**OPTIONS, "n_nodes": 6, "n_components": 2, "weighting": "factored"})
        name = add_grade(model, config, form=form)
        report = inspect_targets(model, model.peft_config[name])
        assert [target.in_features for target in report] == [HIDDEN] * 3
        outs = [target.out_features for target in report]
        assert report.trainable_parameters == sum((width + 1) * 2 + 2 * 6 + 2 * out for out in outs) == trainable(model)
        model.print_trainable_parameters()
        assert f"trainable params: {trainable(model):,} " in capsys.readouterr().out

    def test_defaults_repeat_the_configuration_of_the_active_adapter(self):
        model = first_grade()
        given = copy.deepcopy(model.peft_config["default"])
        add_grade(model)
        config = model.peft_config["grade_2"]
        assert (config.n_components, config.n_nodes, config.target_modules) == (3, 4, ["lm_head", "mlp"])
        assert (config.previous_grades, config.grade_form) == (["default"], "additive")
        assert model.peft_config["default"] == given

    def test_other_targets(self):
        model = first_grade(target_modules=["lm_head"])
        before = outputs(model)
        add_grade(model, LRegConfig(target_modules=["c_attn"], n_components=1), name="attention")
        assert torch.equal(outputs(model), before)
        shake(model, "attention")
        with_both = outputs(model)
        assert not torch.equal(with_both, before)
        model.set_adapter("default")
        assert torch.equal(outputs(model), before)
        model.set_adapter("attention")
        assert torch.equal(outputs(model), with_both)

    @pytest.mark.parametrize("form", FORMS)
    def test_start_from_data(self, form):
        model = first_grade()
        before = outputs(model)
        add_grade(model, LRegConfig(preset="paper", **OPTIONS, init_weights="gradient"), form=form)
        batch = inputs(model.get_base_model())
        batch = {**batch, "labels": batch["input_ids"]}
        initialize_lreg_weights(model, [batch] * 2, adapter_name="grade_2", show_progress=False)
        torch.testing.assert_close(outputs(model), before, rtol=0, atol=0)
        sites, seen = all_sites(model, "grade_2"), []
        for site in sites:
            site.layer.register_input_hook(
                lambda features, layer=site.layer: seen.append(
                    layer.coords("grade_2", features).detach().flatten(0, -2)
                )
            )
        model(**batch)
        for site, own in zip(sites, seen, strict=True):  # every element holds a third of the samples
            for coords, nodes in zip(own.T, site.nodes, strict=True):
                counts = torch.histogram(coords, nodes).hist
                assert (counts / counts.sum() - 1 / 3).abs().max() < 0.06

    def test_statistics_are_of_the_grade_that_trains(self):
        model = stack_of_three("additive")
        track_statistics(model)
        tracked = [site.adapter for name in model.peft_config for site in all_sites(model, name) if statistics_of(site)]
        assert tracked == ["grade_3"] * 3

    def test_bfloat16(self):
        model = first_grade(gpt2().bfloat16())
        before = outputs(model)
        add_grade(model, form="composed")
        assert torch.equal(outputs(model), before)
        shake(model, "grade_2")
        assert outputs(model).isfinite().all()
        assert not torch.equal(outputs(model), before)

    def test_convolution(self):
        base = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.Flatten())
        model = adapt(base, target_modules=["0"], n_nodes=3)
        shake(model)
        images = torch.randn(2, 2, 8, 8)
        before = model(images)
        add_grade(model, form="composed")
        # The same sums of some twenty fp32 products, which processors may take in another order from call to call.
        torch.testing.assert_close(model(images), before, rtol=1e-5, atol=1e-5)
        shake(model, "grade_2")
        model(images).sum().backward()
        assert model.base_model.model[0].lreg_projection["grade_2"].weight.grad[:, 2:].any()


class TestSwitching:
    @pytest.mark.parametrize("form", FORMS)
    def test_every_grade_gives_the_model_of_its_time(self, form):
        model = first_grade()
        seen = {"default": outputs(model)}
        for name in ("grade_2", "grade_3"):
            add_grade(model, form=form)
            shake(model, name, seed=len(seen))
            seen[name] = outputs(model)
        for name in ("grade_2", "default", "grade_3"):
            model.set_adapter(name)
            assert torch.equal(outputs(model), seen[name])
            assert model.active_adapters == [name]
            assert {p.split(".")[-2] for p, value in model.named_parameters() if value.requires_grad} == {name}
        with model.disable_adapter():
            assert torch.equal(outputs(model), outputs(gpt2()))

    @pytest.mark.parametrize("form", FORMS)
    def test_deleting_the_last_grade_restores_the_model_before(self, form):
        model = first_grade()
        before, there = outputs(model), state(model)
        add_grade(model, form=form)
        shake(model, "grade_2")
        model.delete_adapter("grade_2")
        assert torch.equal(outputs(model), before)
        assert same_state(there, state(model))
        assert list(model.peft_config) == model.active_adapters == ["default"]
        assert trainable(model) == trainable(first_grade())
        assert add_grade(model, form=form) == "grade_2"  # and the name is free again

    def test_a_grade_that_carries_others_is_not_deleted(self):
        model = stack_of_three("additive")
        before, there = outputs(model), state(model)
        for name in ("default", "grade_2"):
            with pytest.raises(ValueError, match=f"stands on '{name}': delete 'grade_"):
                model.delete_adapter(name)
        assert torch.equal(outputs(model), before)
        assert same_state(there, state(model))
        model.delete_adapter("grade_3")
        model.delete_adapter("grade_2")

    def test_adapters_of_their_own_switch_as_in_peft(self):
        model = first_grade()
        before = outputs(model)
        model.add_adapter("other", LRegConfig(preset="paper", **OPTIONS))
        shake(model, "other", 5)
        add_grade(model)
        shake(model, "grade_2")
        model.set_adapter("other")
        assert not torch.equal(outputs(model), before)
        assert model.get_submodule("base_model.model.lm_head").stacked_adapters == ["other"]
        model.base_model.set_adapter(["default", "other"])
        assert model.get_submodule("base_model.model.lm_head").stacked_adapters == ["default", "other"]

    def test_two_active_adapters_carry_a_grade(self):
        model = first_grade()
        model.add_adapter("other", LRegConfig(preset="paper", **OPTIONS))
        shake(model, "other", 5)
        model.base_model.set_adapter(["default", "other"])
        before = outputs(model)
        name = add_grade(model)
        assert torch.equal(outputs(model), before)
        assert model.peft_config[name].previous_grades == ["default", "other"]

    def test_one_adapter_per_sample(self):
        model = stack_of_three("composed")
        names = ["__base__", "grade_3", "default"]
        mixed = outputs(model, adapter_names=names)
        for row, name in enumerate(names[1:], start=1):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[row], outputs(model)[row])
        assert torch.equal(mixed[0], outputs(gpt2())[0])

    @pytest.mark.parametrize("form", FORMS)
    def test_a_grade_on_the_output_layer_stands_on_the_output_of_the_ones_below(self, form):
        model = first_grade(target_modules=["lm_head"])
        add_grade(model, form=form)
        batch = inputs("gpt2")
        batch["labels"] = batch["input_ids"]
        output_layer = find_output_layer(model)
        assert output_layer.adapter_name == "grade_2"
        rows = output_layer.rows(batch)
        below = output_layer.base_output(rows.features)
        torch.testing.assert_close(below, outputs(model)[:, :-1].flatten(0, 1))
        shake(model, "grade_2")
        assert torch.equal(output_layer.base_output(rows.features), below)
        total = output_layer.output(rows.features)
        torch.testing.assert_close(total, outputs(model)[:, :-1].flatten(0, 1))

    @pytest.mark.parametrize("form", FORMS)
    def test_the_fused_loss_is_that_of_the_stack(self, form):
        base = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = first_grade(base, target_modules=["lm_head"], fused_loss=True)
        add_grade(model, form=form)
        shake(model, "grade_2")
        loss_of(model)  # the first batch is compared
        fused, usual = loss_of(model), loss_of(model, train=False)
        torch.testing.assert_close(fused, usual)
        model.train()
        batch = inputs("gpt2")
        assert model(**batch, labels=batch["input_ids"]).logits is None
        model.get_base_model().lm_head.lreg_coefficients["default"].weight.data.normal_()
        assert not torch.isclose(loss_of(model), fused)

    def test_features_below_a_grade_on_the_output_layer_are_those_of_the_stack(self):
        model = first_grade(target_modules=["mlp"])
        add_grade(
            model, LRegConfig(preset="paper", task_type="CAUSAL_LM", n_nodes=3)
        )  # at the output, on shortcuts inside the network
        model.add_adapter("alone", LRegConfig(preset="paper", task_type="CAUSAL_LM", n_nodes=3))
        batch = {**inputs("gpt2"), "labels": inputs("gpt2")["input_ids"]}
        output_layer = find_output_layer(model, "grade_2")
        stamp, rows = fingerprint_below(output_layer), output_layer.rows(batch)
        model.set_adapter("alone")
        assert not torch.equal(output_layer.rows(batch).features, rows.features)
        assert fingerprint_below(output_layer) != stamp
        model.set_adapter("grade_2")
        assert torch.equal(output_layer.rows(batch).features, rows.features)
        assert fingerprint_below(output_layer) == stamp

    def test_status_as_peft_reports_it(self):
        status = stack_of_three("composed").get_model_status()
        assert (status.enabled, status.active_adapters) == (True, ["grade_3"])
        assert status.requires_grad == {"default": False, "grade_2": False, "grade_3": True}
        assert status.available_adapters == ["default", "grade_2", "grade_3"]

    def test_deepcopy_keeps_the_stack(self):
        model = stack_of_three("composed")
        assert torch.equal(outputs(copy.deepcopy(model)), outputs(model))

    def test_unload(self):
        model = stack_of_three("composed")
        assert torch.equal(outputs(model.unload()), outputs(gpt2()))


class TestModulesTrainedInFull:
    def classifier(self) -> PeftModel:
        model = adapt(roberta("SEQ_CLS"), task_type="SEQ_CLS", n_nodes=3)  # PEFT adds the classifier to modules_to_save
        shake(model)
        model.get_submodule("base_model.model.classifier").modules_to_save["default"].out_proj.weight.data += 1
        return model

    def test_the_head_of_the_first_grade_stays(self):
        model = self.classifier()
        before, n_trained = outputs(model), trainable(model)
        add_grade(model)
        assert torch.equal(outputs(model), before)
        assert all(".grade_2." in name for name, value in model.named_parameters() if value.requires_grad)
        model.delete_adapter("grade_2")
        assert torch.equal(outputs(model), before)
        assert trainable(model) == n_trained

    def test_one_adapter_per_sample(self):
        model = adapt(build("bert", "SEQ_CLS"), task_type="SEQ_CLS", n_nodes=3)
        model.get_submodule("base_model.model.classifier").modules_to_save["default"].weight.data += 1
        before = outputs(model)
        add_grade(model)
        mixed = outputs(model, adapter_names=["grade_2", "default", "grade_2"])
        torch.testing.assert_close(mixed, before)

    def test_round_trip(self, tmp_path):
        model = self.classifier()
        add_grade(model)
        shake(model, "grade_2")
        model.save_pretrained(tmp_path)
        assert not any("classifier" in key for key in load_file(tmp_path / "grade_2" / "adapter_model.safetensors"))
        assert torch.equal(outputs(load_grades(roberta("SEQ_CLS"), tmp_path)), outputs(model))


class TestFiles:
    @pytest.mark.parametrize("form", FORMS)
    def test_round_trip(self, form, tmp_path):
        model = stack_of_three(form)
        model.save_pretrained(tmp_path)
        for name, previous in (("grade_2", ["default"]), ("grade_3", ["default", "grade_2"])):
            content = json.loads((tmp_path / name / "adapter_config.json").read_text())
            assert (content["previous_grades"], content["grade_form"]) == (previous, form)
        loaded = load_grades(gpt2(), tmp_path)
        assert type(loaded) is type(model)
        assert torch.equal(outputs(loaded), outputs(model))
        assert loaded.active_adapters == ["grade_3"]
        assert trainable(loaded) == 0
        loaded.set_adapter("grade_2")
        model.set_adapter("grade_2")
        assert torch.equal(outputs(loaded), outputs(model))

    def test_part_of_a_stack(self, tmp_path):
        model = stack_of_three("composed")
        model.save_pretrained(tmp_path)
        loaded = load_grades(gpt2(), tmp_path, "grade_2", is_trainable=True)
        model.set_adapter("grade_2")
        assert torch.equal(outputs(loaded), outputs(model))
        assert list(loaded.peft_config) == ["default", "grade_2"]
        assert trainable(loaded) == trainable(model)

    def test_by_hand_in_order(self, tmp_path):
        model = stack_of_three("composed")
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(gpt2(), tmp_path)
        loaded.load_adapter(tmp_path / "grade_2", "grade_2")
        loaded.load_adapter(tmp_path / "grade_3", "grade_3", low_cpu_mem_usage=True)
        loaded.set_adapter("grade_3")
        assert torch.equal(outputs(loaded), outputs(model))

    def test_a_composed_grade_needs_the_one_before(self, tmp_path):
        stack_of_three("composed").save_pretrained(tmp_path)
        base = gpt2()
        there = state(base)
        with pytest.raises(ValueError, match="load_grades"):
            PeftModel.from_pretrained(base, tmp_path / "grade_2", adapter_name="grade_2")
        assert same_state(there, state(base))
        shutil.rmtree(tmp_path / "grade_2")
        with pytest.raises(ValueError, match=r"'grade_3' stands on \['grade_2'\]"):
            load_grades(gpt2(), tmp_path)

    def test_an_additive_grade_alone_says_what_is_missing(self, tmp_path):
        stack_of_three("additive").save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match=r"was trained on top of \['default'\], which the model does not have"):
            PeftModel.from_pretrained(gpt2(), tmp_path / "grade_2", adapter_name="grade_2")
        with pytest.raises(ValueError, match="cannot be called 'default' itself"):
            PeftModel.from_pretrained(gpt2(), tmp_path / "grade_2")

    def test_other_adapters_in_the_folder(self, tmp_path):
        model = stack_of_three("additive")
        model.add_adapter("other", LRegConfig(preset="paper", **OPTIONS))
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"beside the stack .*: \['other'\]"):
            load_grades(gpt2(), tmp_path)
        assert torch.equal(outputs(load_grades(gpt2(), tmp_path, "grade_3")), outputs(model))
        with pytest.raises(ValueError, match="has no adapter 'grade_9'"):
            load_grades(gpt2(), tmp_path, "grade_9")

    def test_names_taken_and_empty_folders(self, tmp_path):
        with pytest.raises(ValueError, match="holds no adapter"):
            load_grades(gpt2(), tmp_path)
        with pytest.raises(ValueError, match="nowhere' is no folder"):
            load_grades(gpt2(), tmp_path / "nowhere")
        model = stack_of_three("additive")
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"called .*'default'.* already"):
            load_grades(model, tmp_path)

    def test_into_a_model_with_another_adapter(self, tmp_path):
        model = stack_of_three("composed")
        model.save_pretrained(tmp_path)
        loaded = load_grades(adapt(gpt2(), "other", **OPTIONS), tmp_path)
        assert torch.equal(outputs(loaded), outputs(model))


class TestTrainer:
    def train(self, folder, model, steps, resume=None, **options):
        batch = inputs("gpt2", batch=8)
        data = [{key: value[i] for key, value in {**batch, "labels": batch["input_ids"]}.items()} for i in range(8)]
        arguments = TrainingArguments(
            str(folder),
            max_steps=steps,
            learning_rate=0.05,
            per_device_train_batch_size=4,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            report_to=[],
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            **options,
        )
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    def test_best_checkpoint_is_that_of_the_grade(self, tmp_path):
        def start() -> PeftModel:
            torch.manual_seed(0)
            model = first_grade()
            add_grade(model)
            return model

        # The largest loss is taken for the best one, so that it is not the last.
        options = {"metric_for_best_model": "loss", "greater_is_better": True, "lr_scheduler_type": "constant"}
        trainer = self.train(tmp_path / "long", start(), 6, **options)
        best = trainer.state.best_model_checkpoint
        assert best == str(tmp_path / "long" / "checkpoint-2")
        short = start()
        self.train(tmp_path / "short", short, 2, **options)
        assert torch.equal(outputs(short), outputs(load_grades(gpt2(), best)))

    def test_resume(self, tmp_path):
        def start() -> PeftModel:
            torch.manual_seed(0)
            model = first_grade()
            add_grade(model, form="composed")
            return model

        straight = start()
        self.train(tmp_path / "a", straight, 6)
        resumed = start()
        self.train(tmp_path / "b", resumed, 6, resume=str(tmp_path / "a" / "checkpoint-4"))
        assert torch.equal(outputs(resumed), outputs(straight))
        assert resumed.active_adapters == ["grade_2"]


class TestNative:
    @pytest.mark.parametrize("form", FORMS)
    def test_transformers_own_adapters(self, form):
        model = gpt2()
        model.add_adapter(LRegConfig(preset="paper", **OPTIONS))
        shake(model)
        before = outputs(model)
        name = add_grade(model, form=form)
        assert torch.equal(outputs(model), before)
        shake(model, name)
        after = outputs(model)
        assert not torch.equal(after, before)
        assert {p.split(".")[-2] for p, value in model.named_parameters() if value.requires_grad} == {name}
        model.set_adapter("default")
        assert torch.equal(outputs(model), before)
        model.set_adapter(name)
        assert torch.equal(outputs(model), after)
        with pytest.raises(ValueError, match=f"'{name}' stands on 'default'"):
            model.delete_adapter("default")
        assert torch.equal(outputs(model), after)
        model.delete_adapter(name)
        assert torch.equal(outputs(model), before)

    def test_files(self, tmp_path):
        model = gpt2()
        model.add_adapter(LRegConfig(preset="paper", **OPTIONS))
        shake(model)
        model.save_pretrained(tmp_path / "default")
        name = add_grade(model, form="composed")
        shake(model, name)
        model.save_pretrained(tmp_path / name)
        loaded = gpt2()
        loaded.load_adapter(str(tmp_path / "default"))
        with pytest.warns(UserWarning, match="Already found"):  # PEFT warns of every second adapter
            loaded.load_adapter(str(tmp_path / name), adapter_name=name)
        loaded.set_adapter(name)
        assert torch.equal(outputs(loaded), outputs(model))


def refused(model, error, message, *args, **options):
    there, before = state(model), outputs(model)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(error, match=message):
        add_grade(model, *args, **options)
    assert same_state(there, state(model))
    assert torch.equal(outputs(model), before)
    assert trained == [parameter.requires_grad for parameter in model.parameters()]


class TestBadInput:
    def test_nothing_to_stand_on(self):
        refused(gpt2(), ValueError, "has no LReg adapter for a grade to stand on")
        refused(
            get_peft_model(gpt2(), LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True)),
            ValueError,
            "has no LReg adapter",
        )

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"target_modules": ["nowhere"]}, ValueError, "not found"),
            ({"init_weights": False}, ValueError, "a grade must start at zero"),
            ({"modules_to_save": ["wte"]}, ValueError, "trains no other module"),
        ],
    )
    def test_configurations(self, options, error, message):
        refused(first_grade(), error, message, LRegConfig(preset="paper", **{**OPTIONS, **options}))

    def test_arguments(self):
        refused(first_grade(), TypeError, "needs an LRegConfig, got LoraConfig", LoraConfig())
        refused(first_grade(), ValueError, "there is an adapter 'default' already", name="default")
        refused(first_grade(), ValueError, "grade_form must be one of additive, composed", form="nested")

    def test_composed_without_a_shortcut_below(self):
        config = LRegConfig(task_type="CAUSAL_LM", target_modules=["lm_head", "c_attn"])
        refused(
            first_grade(), ValueError, "has a shortcut around 'transformer.h.0.attn.c_attn'", config, form="composed"
        )
        with pytest.raises(ValueError, match="has a shortcut around"):
            get_peft_model(
                gpt2(), LRegConfig(preset="paper", previous_grades=["default"], grade_form="composed"), "second"
            )

    def test_disabled(self):
        model = first_grade()
        with model.disable_adapter():
            refused(model, ValueError, "the adapters are disabled")

    def test_native_with_modules_to_save(self):
        model = gpt2()
        model.add_adapter(LRegConfig(preset="paper", **{**OPTIONS, "modules_to_save": ["ln_f"]}))
        refused(model, ValueError, "wrap the model by get_peft_model")


class Regressor(nn.Module):
    """A frozen random layer and an output that knows nothing yet."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(1, 8)
        self.out = nn.Linear(8, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(3 * self.hidden(x)))


@torch.no_grad()
def fit(model: nn.Module, name: str, x: torch.Tensor, y: torch.Tensor) -> float:
    """Least squares for the coefficients of one grade, the encoder as it is; the mean squared error it leaves."""
    (layer,) = layers(model)
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    rest = y - model(x)
    handle.remove()
    nodes = layer.lreg_encoder[name].nodes
    n_components, n_nodes = nodes.shape
    basis = torch.eye(n_components * n_nodes, dtype=x.dtype).view(n_components, n_nodes, -1)
    columns = evaluate(layer.coords(name, seen[0]), nodes, basis)  # [samples, components * n_nodes]
    solution = torch.linalg.lstsq(columns, rest, driver="gelsd").solution
    layer.set_table(name, solution)
    return (y - model(x)).square().mean().item()


class TestRegression:
    """A model of one's own, and grades that are least-squares fits."""

    def data(self):
        x = torch.linspace(-1, 1, 400, dtype=torch.float64).unsqueeze(1)
        return x, torch.sin(9 * x) + (3 * x).tanh()

    def model(self, **options) -> PeftModel:
        return get_peft_model(Regressor().double(), LRegConfig(target_modules=["out"], **options))

    def test_the_loss_falls_from_grade_to_grade(self):
        x, y = self.data()
        losses = {}
        for form in FORMS:
            torch.manual_seed(1)
            model = self.model(n_components=2, n_nodes=4)
            losses[form] = [fit(model, "default", x, y)]
            for n_nodes in (6, 8, 12):
                name = add_grade(model, LRegConfig(target_modules=["out"], n_components=2, n_nodes=n_nodes), form=form)
                losses[form].append(fit(model, name, x, y))
            assert all(later < 0.9 * earlier for earlier, later in itertools.pairwise(losses[form]))
            assert losses[form][-1] < 0.5 * losses[form][0]

    def test_the_same_encoder_again_finds_nothing(self):
        x, y = self.data()
        model = self.model(n_components=2, n_nodes=5)
        before = fit(model, "default", x, y)
        name = add_grade(model)
        (layer,) = layers(model)
        projection, encoder, _ = layer.parts("default")
        layer.set_encoder(name, projection.weight, projection.bias, encoder.nodes)
        after = fit(model, name, x, y)
        assert after <= before
        assert after == pytest.approx(before, rel=1e-9)

    @pytest.mark.slow  # a quarter of a minute
    def test_twenty_sines(self):
        """The script that shows what grades of least-squares fits reach, without its repetitions."""
        rows = multigrade_anchor.measure(repeats=1)
        assert {row["way"] for row in rows} == {"core", "adapter"}
        for row in rows:
            errors = [grade["train"] for grade in row["grades"]]
            assert all(later < earlier for earlier, later in itertools.pairwise(errors))
            assert errors[-1] <= multigrade_anchor.BAR
            assert row["grades"][-1]["test"] < 1e-5

    def test_gradient_training(self):
        x, y = self.data()
        model = self.model(n_components=2, n_nodes=4)
        fit(model, "default", x, y)
        add_grade(model, LRegConfig(target_modules=["out"], n_components=2, n_nodes=8), form="composed")
        start = (y - model(x)).square().mean()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (y - model(x)).square().mean()
            loss.backward()
            optimizer.step()
        assert loss < 0.7 * start
