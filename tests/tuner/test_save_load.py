"""Saving and loading: what is in the files, every way in, damaged files, Trainer checkpoints."""

import json
import shutil

import pytest
import torch
import transformers
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from tiny import adapt, gpt2, inputs, layers, outputs, roberta, same_state, shake, state
from transformers.trainer_utils import get_last_checkpoint

from lreg_peft import LRegConfig

OPTIONS = {"task_type": "CAUSAL_LM", "n_components": 3, "n_nodes": 5, "target_modules": ["lm_head", "mlp"]}


def trained(base=None, **options) -> PeftModel:
    model = adapt(base or gpt2(), **{**OPTIONS, **options})
    shake(model)
    return model.eval()


@pytest.fixture
def base_folder(tmp_path):
    gpt2().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def saved(base_folder, tmp_path):
    """An adapter folder that names its base model, and the logits it must give."""
    model = trained(transformers.GPT2LMHeadModel.from_pretrained(base_folder))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", outputs(model)


class TestFiles:
    def test_keys_and_dtypes(self, saved):
        folder, _ = saved
        tensors = load_file(folder / "adapter_model.safetensors")
        kinds = ("projection.weight", "projection.bias", "coefficients.weight", "encoder.nodes")
        modules = ("lm_head", "transformer.h.0.mlp", "transformer.h.1.mlp")
        assert set(tensors) == {f"base_model.model.{module}.lreg_{kind}" for module in modules for kind in kinds}
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}

    def test_config(self, saved, base_folder):
        folder, _ = saved
        content = json.loads((folder / "adapter_config.json").read_text())
        assert content["peft_type"] == "LREG"
        assert content["base_model_name_or_path"] == str(base_folder)
        assert content["inference_mode"] is True
        config = PeftConfig.from_pretrained(folder)
        assert type(config) is LRegConfig
        assert (config.n_components, config.n_nodes, config.target_modules) == (3, 5, ["lm_head", "mlp"])

    def test_default_targets_are_written_out(self, tmp_path):
        adapt(gpt2(), task_type="CAUSAL_LM").save_pretrained(tmp_path)
        assert PeftConfig.from_pretrained(tmp_path).target_modules == ["lm_head"]

    def test_card_says_the_import(self, saved):
        folder, _ = saved
        card = (folder / "README.md").read_text()
        assert "import lreg_peft" in card
        assert "- lreg" in card

    def test_adapters_do_not_leak_into_each_other(self, tmp_path):
        model = trained()
        model.add_adapter("default_2", LRegConfig(preset="paper", task_type="CAUSAL_LM", n_components=2, n_nodes=7))
        model.add_adapter("fault", LRegConfig(preset="paper", task_type="CAUSAL_LM", n_components=1, n_nodes=3))
        model.save_pretrained(tmp_path)
        for folder, shape in ((tmp_path, (3, 5)), (tmp_path / "default_2", (2, 7)), (tmp_path / "fault", (1, 3))):
            tensors = load_file(folder / "adapter_model.safetensors")
            assert {tuple(t.shape) for name, t in tensors.items() if name.endswith(".nodes")} == {shape}
            assert not [name for name in tensors if "default" in name or "fault" in name]
            assert len(tensors) == (12 if folder == tmp_path else 4)

    def test_pickle_format(self, tmp_path):
        model = trained()
        model.save_pretrained(tmp_path, safe_serialization=False)
        assert torch.equal(outputs(PeftModel.from_pretrained(gpt2(), tmp_path)), outputs(model))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_nodes_of_a_half_precision_model_are_exact(self, dtype, tmp_path):
        model = trained(gpt2().to(dtype))
        nodes = torch.tensor([0.0, 0.9, 0.9005, 0.901, 1.0])
        for layer in layers(model):
            layer.lreg_encoder["default"].nodes.copy_(nodes.expand(3, 5))
        model.to(dtype)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(gpt2().to(dtype), tmp_path, autocast_adapter_dtype=False)
        loaded.to(dtype)
        for layer in layers(loaded):
            assert layer.lreg_encoder["default"].nodes.dtype == torch.float32
            assert torch.equal(layer.lreg_encoder["default"].nodes, nodes.expand(3, 5))
        assert torch.equal(outputs(loaded), outputs(model))


class TestWaysIn:
    def test_peft_model(self, saved):
        folder, expected = saved
        loaded = PeftModel.from_pretrained(gpt2(), folder)
        assert torch.equal(outputs(loaded), expected)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())

    def test_trainable(self, saved):
        folder, expected = saved
        loaded = PeftModel.from_pretrained(gpt2(), folder, is_trainable=True)
        assert {n.partition("lreg_")[2] for n, p in loaded.named_parameters() if p.requires_grad} == {
            "projection.default.weight",
            "projection.default.bias",
            "coefficients.default.weight",
        }
        assert torch.equal(outputs(loaded), expected)

    def test_auto_peft_model_for_the_task(self, saved):
        folder, expected = saved
        assert torch.equal(outputs(AutoPeftModelForCausalLM.from_pretrained(folder)), expected)

    def test_auto_peft_model_without_a_task(self, base_folder, tmp_path):
        base = transformers.AutoModel.from_pretrained(base_folder)
        model = trained(base, task_type=None, target_modules=["mlp"])
        model.save_pretrained(tmp_path / "adapter")
        loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter")
        assert torch.equal(outputs(loaded), outputs(model))

    def test_auto_peft_model_with_a_classification_head(self, tmp_path):
        roberta("SEQ_CLS", num_labels=3).save_pretrained(tmp_path / "base")
        base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        model = adapt(base, task_type="SEQ_CLS")
        shake(model)
        for parameter in model.get_base_model().classifier.modules_to_save["default"].parameters():
            parameter.data.add_(1.0)
        model.save_pretrained(tmp_path / "adapter")
        loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
        assert torch.equal(outputs(loaded), outputs(model))

    def test_transformers_auto_model(self, saved):
        folder, expected = saved
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(outputs(loaded), expected)

    def test_transformers_load_adapter(self, saved):
        folder, expected = saved
        model = gpt2()
        base = outputs(model)
        model.load_adapter(folder)
        assert torch.equal(outputs(model), expected)
        model.disable_adapters()
        assert torch.equal(outputs(model), base)

    def test_transformers_add_save_load(self, tmp_path):
        model = gpt2()
        model.add_adapter(LRegConfig(preset="paper", **OPTIONS))
        shake(model)
        model.save_pretrained(tmp_path)
        loaded = gpt2()
        loaded.load_adapter(tmp_path)
        assert torch.equal(outputs(loaded), outputs(model))

    def test_low_cpu_memory(self, saved):
        folder, expected = saved
        loaded = PeftModel.from_pretrained(gpt2(), folder, low_cpu_mem_usage=True)
        loaded.load_adapter(folder, "second", low_cpu_mem_usage=True)
        assert not [name for name, value in loaded.state_dict().items() if value.is_meta]
        assert torch.equal(outputs(loaded), expected)
        loaded.set_adapter("second")
        assert torch.equal(outputs(loaded), expected)

    def test_second_adapter_of_another_size(self, saved, tmp_path):
        folder, expected = saved
        other = trained(n_components=1, n_nodes=9, target_modules=["attn"])
        other.save_pretrained(tmp_path / "other")
        loaded = PeftModel.from_pretrained(gpt2(), folder, adapter_name="one")
        loaded.load_adapter(tmp_path / "other", "two")
        assert torch.equal(outputs(loaded), expected)
        loaded.set_adapter("two")
        assert torch.equal(outputs(loaded), outputs(other))

    def test_state_dict_functions(self):
        model, fresh = trained(), adapt(gpt2(), **OPTIONS)
        result = set_peft_model_state_dict(fresh, get_peft_model_state_dict(model))
        assert not result.unexpected_keys
        assert torch.equal(outputs(fresh), outputs(model))

    def test_subfolder_of_a_named_adapter(self, tmp_path):
        model = adapt(gpt2(), "mine", **OPTIONS)
        shake(model, "mine")
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(gpt2(), tmp_path / "mine")
        assert torch.equal(outputs(loaded), outputs(model))


def truncate(file):
    file.write_bytes(file.read_bytes()[:-200])


def edit(change):
    def damage(file):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return damage


HEAD = "base_model.model.lm_head.lreg_"


def replaced(name, change):
    """One tensor of the output layer, changed; new in memory."""
    return edit(lambda tensors: tensors.update({HEAD + name: change(tensors[HEAD + name].clone())}))


def added(name, shape=(16,)):
    return edit(lambda tensors: tensors.update({"base_model.model." + name: torch.zeros(shape)}))


def collide(nodes):
    nodes[1, 2] = nodes[1, 1]
    return nodes


#: What happens to a file, and the sentence.
DAMAGE = {
    "missing weights": (
        edit(lambda tensors: tensors.pop(HEAD + "coefficients.weight")),
        r"lacks .*lm_head.lreg_coefficients.*without which the rest of this adapter would be another function",
    ),
    "missing nodes": (
        edit(lambda tensors: tensors.pop(HEAD + "encoder.nodes")),
        r"lacks .*lm_head.lreg_encoder.*nodes.* The nodes are buffers: .*save_pretrained\(\)",
    ),
    "not finite": (
        replaced("coefficients.weight", lambda weight: weight * torch.nan),
        "damaged: .*lm_head.lreg_coefficients.* holds values that are not finite",
    ),
    "integers": (
        replaced("projection.bias", lambda bias: torch.ones(3, dtype=torch.long)),
        "damaged: .*lm_head.lreg_projection.*bias holds values that are not finite numbers",
    ),
    "colliding nodes": (
        replaced("encoder.nodes", collide),
        "damaged: .*lm_head.lreg_encoder.*nodes: nodes must be strictly increasing: component 1",
    ),
    "unsorted nodes": (replaced("encoder.nodes", lambda nodes: nodes.flip(1)), "nodes must be strictly increasing"),
    "nodes rounded to bf16": (
        replaced("encoder.nodes", lambda nodes: torch.tensor([0, 0.9, 0.9005, 0.901, 1]).repeat(3, 1).bfloat16()),
        "strictly increasing.* saved in torch.bfloat16, which rounds: save them in float32",
    ),
    "nodes of another range": (replaced("encoder.nodes", lambda nodes: nodes * 2), r"every mesh must span \[0, 1\]"),
    "another size": (
        replaced("coefficients.weight", lambda weight: torch.zeros(61, 12)),
        r"size mismatch for .*lm_head.lreg_coefficients.*: .* ask for \(61, 15\), the file holds \(61, 12\)",
    ),
    "another module's shortcut": (
        added("transformer.h.0.attn.lreg_projection.weight", (3, 16)),
        r"holds 1 tensors of shortcuts that the model does not have, .*transformer.h.0.attn.lreg_projection",
    ),
    "another head's tensor": (added("lm_head.lreg_encoder.weight", (3, 5)), r"holds .*lreg_encoder.* do not have"),
    "something of nobody": (added("lm_head.lreg_other.weight"), r"holds .*lreg_other.* do not have"),
}


class TestBadFiles:
    """Refused before anything is copied, with a sentence."""

    @pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
    def test_into_a_model_with_adapters(self, damage, message, saved):
        folder, expected = saved
        model = PeftModel.from_pretrained(gpt2(), folder)
        damage(folder / "adapter_model.safetensors")
        before = state(model)
        for name in ("damaged", "default"):
            with pytest.raises(ValueError, match=message):
                model.load_adapter(folder, name)
            after = state(model)
            assert same_state(before, {key: after[key] for key in before})
            model.set_adapter("default")
            assert torch.equal(outputs(model), expected)

    @pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
    def test_anew(self, damage, message, saved):
        folder, _ = saved
        damage(folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(gpt2(), folder)

    @pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
    def test_as_a_state_dict(self, damage, message, saved):
        """`load_state_dict` of the whole model, strictly or not, of the layer alone, and PEFT's function."""
        folder, expected = saved
        model = PeftModel.from_pretrained(gpt2(), folder)
        damage(folder / "adapter_model.safetensors")
        tensors = load_file(folder / "adapter_model.safetensors")
        inside = {}
        for key, value in tensors.items():
            path, _, name = key.rpartition(".")
            inside[f"{path}.default.{name}"] = value
        before = state(model)
        whole = {**{key: value for key, value in before.items() if "lreg_" not in key}, **inside}
        for load in (
            lambda: model.load_state_dict(dict(whole)),
            lambda: model.load_state_dict(dict(inside), strict=False),
            lambda: set_peft_model_state_dict(model, dict(tensors)),
        ):
            with pytest.raises(ValueError, match=message):
                load()
            assert same_state(before, state(model))
        assert torch.equal(outputs(model), expected)

    def test_a_file_that_ends_early(self, saved):
        folder, expected = saved
        model = PeftModel.from_pretrained(gpt2(), folder)
        truncate(folder / "adapter_model.safetensors")
        with pytest.raises(Exception, match=r"[Ii]ncomplete|deserializ"):
            PeftModel.from_pretrained(gpt2(), folder)
        with pytest.raises(Exception, match=r"[Ii]ncomplete|deserializ"):
            model.load_adapter(folder, "damaged")
        model.set_adapter("default")
        assert torch.equal(outputs(model), expected)

    def test_adapter_for_another_model_size(self, saved):
        folder, _ = saved
        model = gpt2(n_embd=32)
        with pytest.raises(ValueError, match="size mismatch"):
            PeftModel.from_pretrained(model, folder)

    def test_adapter_for_other_modules(self, saved):
        folder, _ = saved
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["attn"]}))
        with pytest.raises(ValueError, match=r"holds .* tensors of shortcuts that the model does not have"):
            PeftModel.from_pretrained(gpt2(), folder)

    @pytest.mark.parametrize("field", ["n_components", "n_nodes"])
    def test_config_that_disagrees_with_the_tensors(self, field, saved):
        folder, _ = saved
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, field: 4}))
        with pytest.raises(ValueError, match="size mismatch"):
            PeftModel.from_pretrained(gpt2(), folder)

    def test_loading_another_size_over_an_adapter_changes_nothing(self, saved):
        folder, _ = saved
        model = trained(n_nodes=9)
        before = state(model)
        with pytest.raises(ValueError, match="size mismatch"):
            model.load_adapter(folder, "default")
        assert same_state(state(model), before)

    def test_missing_file(self, saved):
        folder, _ = saved
        (folder / "adapter_model.safetensors").unlink()
        model = trained()
        expected = outputs(model)
        with pytest.raises((ValueError, OSError)):
            model.load_adapter(folder, "gone")
        model.set_adapter("default")
        assert torch.equal(outputs(model), expected)


class TestWhatTrainsAlone:
    """Nodes are buffers: a state dict of what requires gradients lacks them."""

    def only_what_trains(self, model) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @pytest.mark.parametrize("weighting", ["full", "factored"])
    def test_it_is_saved_with_the_nodes(self, weighting, tmp_path):
        """As trainers under ZeRO-3 do, which gather what trains."""
        model = trained(weighting=weighting)
        model.save_pretrained(tmp_path, state_dict=self.only_what_trains(model))
        keys = load_file(tmp_path / "adapter_model.safetensors")
        assert sum(key.endswith("lreg_encoder.nodes") for key in keys) == 3
        assert torch.equal(outputs(PeftModel.from_pretrained(gpt2(), tmp_path)), outputs(model))

    def test_of_native_adapters_too(self, tmp_path):
        model = gpt2()
        model.add_adapter(LRegConfig(preset="paper", **OPTIONS))
        shake(model)
        expected = outputs(model)
        state_dict = get_peft_model_state_dict(model, self.only_what_trains(model), adapter_name="default")
        loaded = gpt2()
        loaded.add_adapter(LRegConfig(preset="paper", **OPTIONS))
        set_peft_model_state_dict(loaded, state_dict)
        assert torch.equal(outputs(loaded), expected)

    def test_as_a_checkpoint_it_is_refused(self):
        model, other = trained(), adapt(gpt2(), **OPTIONS)
        checkpoint = self.only_what_trains(model)
        before = state(other)
        with pytest.raises(ValueError, match=r"lacks .*\.nodes'.*another function.*requires gradients lacks them"):
            other.load_state_dict(checkpoint, strict=False)
        assert same_state(before, state(other))
        whole = {key: value for key, value in model.state_dict().items() if "lreg_" in key}
        other.load_state_dict(whole, strict=False)
        assert torch.equal(outputs(other), outputs(model))

    def test_a_checkpoint_without_shortcuts_is_none_of_its_business(self):
        model = trained()
        expected = outputs(model)
        rest = {key: value for key, value in model.state_dict().items() if "lreg_" not in key}
        model.load_state_dict(rest, strict=False)
        assert torch.equal(outputs(model), expected)

    def test_one_adapter_of_two(self):
        model = trained()
        model.add_adapter("other", LRegConfig(preset="paper", **OPTIONS))
        alone = {key: value.clone() for key, value in model.state_dict().items() if ".default." in key}
        expected = outputs(model)
        shake(model, seed=4)
        model.load_state_dict(alone, strict=False)
        assert torch.equal(outputs(model), expected)


class Batches(torch.utils.data.Dataset):
    def __init__(self, n=8):
        self.rows = inputs("gpt2", batch=n)["input_ids"]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


class TestTrainer:
    def trainer(self, folder, model, **arguments):
        return transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=str(folder),
                **{
                    "max_steps": 6,
                    "save_steps": 2,
                    "eval_steps": 2,
                    "eval_strategy": "steps",
                    "per_device_train_batch_size": 4,
                    "learning_rate": 0.05,
                    "report_to": [],
                    "disable_tqdm": True,
                    "use_cpu": True,
                    "dataloader_pin_memory": False,
                    **arguments,
                },
            ),
            train_dataset=Batches(),
            eval_dataset=Batches(4),
        )

    def test_trains_saves_resumes_and_loads_the_best(self, tmp_path):
        options = {"task_type": "CAUSAL_LM", "n_nodes": 4}
        model = adapt(gpt2(), **options)
        before, frozen = outputs(model), state(gpt2())
        start = state(model)
        self.trainer(tmp_path / "whole", model).train()
        whole = outputs(model)
        assert not torch.allclose(whole, before)
        assert same_state(state(model.unload()), frozen)

        # Stopped after the second checkpoint and resumed, a run ends where the uninterrupted one did.
        shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
        for step in (6, 2):
            shutil.rmtree(tmp_path / "resumed" / f"checkpoint-{step}")
        resumed = adapt(gpt2(), **options)
        resumed.load_state_dict(start)
        trainer = self.trainer(tmp_path / "resumed", resumed)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path / "resumed")))
        assert trainer.state.global_step == 6
        # The same operations on the same numbers, and the same order of batches.
        assert torch.equal(outputs(resumed), whole)

    def test_best_model_is_loaded_with_its_nodes(self, tmp_path):
        class MoveNodes(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **kwargs):
                for layer in layers(model):
                    layer.lreg_encoder["default"].nodes.pow_(1.1)

        model = adapt(gpt2(), task_type="CAUSAL_LM", n_nodes=4)
        trainer = self.trainer(
            tmp_path, model, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True
        )
        trainer.add_callback(MoveNodes())
        trainer.train()
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")  # the loss falls, the largest is the first
        (head,) = layers(model)
        saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
        assert torch.equal(head.lreg_encoder["default"].nodes, saved[HEAD + "encoder.nodes"])
        uniform = torch.linspace(0, 1, 4)
        assert torch.allclose(head.lreg_encoder["default"].nodes[0], uniform ** (1.1**2))
        for name in ("projection.weight", "projection.bias", "coefficients.weight"):
            assert torch.equal(head.get_parameter("lreg_" + name.replace(".", ".default.")), saved[HEAD + name])

    def test_gradient_checkpointing_through_trainer(self, tmp_path):
        results = []
        for checkpointing in (False, True):
            model = adapt(gpt2(resid_pdrop=0.5), task_type="CAUSAL_LM", target_modules=["mlp"])
            shake(model)
            self.trainer(
                tmp_path / str(checkpointing),
                model,
                max_steps=2,
                eval_strategy="no",
                save_strategy="no",
                activation_checkpointing=checkpointing,
            ).train()
            results.append(outputs(model))
        assert torch.equal(*results)
