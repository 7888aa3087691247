"""Names: of adapters, of what PEFT adds to a configuration by itself, and of compiled models."""

import json
import warnings

import pytest
import tiny
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from lreg_peft import LRegConfig, LRegLayer, add_grade

SAVE_HEAD = {"target_modules": "all-linear", "modules_to_save": ["classifier"]}

# What PEFT adds to a configuration by itself, which must not contradict what was asked for: the names behind
# "all-linear" and the heads of the task.
SAVED = [
    ("bert", "TOKEN_CLS", "TOKEN_CLS", "all-linear", None),
    ("bert", "SEQ_CLS", None, "all-linear", ["classifier"]),
    ("bert", "QUESTION_ANS", "QUESTION_ANS", "all-linear", ["qa_outputs"]),
    ("vit", "IMAGE_CLS", None, "all-linear", ["classifier"]),
    ("llama", "SEQ_CLS", "SEQ_CLS", "all-linear", None),
    ("llama", "CAUSAL_LM", "CAUSAL_LM", "all-linear", ["down_proj", "norm"]),
    ("roberta", "SEQ_CLS", "SEQ_CLS", ["classifier", "query"], None),
    ("gpt2", "CAUSAL_LM", None, "all-linear", ["lm_head"]),
]


@pytest.mark.parametrize(("kind", "task", "task_type", "targets", "to_save"), SAVED)
def test_every_configuration_that_can_be_saved_can_be_loaded(kind, task, task_type, targets, to_save, tmp_path):
    config = LRegConfig(task_type=task_type, target_modules=targets, modules_to_save=to_save)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'classifier' is in target_modules")
        model = get_peft_model(tiny.build(kind, task), config)
    tiny.shake(model)
    model.save_pretrained(tmp_path)
    saved = get_peft_model_state_dict(model)
    for load in (
        lambda: PeftModel.from_pretrained(tiny.build(kind, task), tmp_path),  # a warning would be an error here
        lambda: get_peft_model(tiny.build(kind, task), PeftConfig.from_pretrained(tmp_path)),
    ):
        assert get_peft_model_state_dict(load()).keys() == saved.keys()
    assert not set(to_save or ()) & {t.rpartition(".")[2] for t in model.peft_config["default"].target_modules}


def test_a_file_with_both_loads_as_peft_meant_it(tmp_path):
    """Files from the time when the names behind "all-linear" were written down whole."""
    model = get_peft_model(tiny.build("vit", "IMAGE_CLS"), LRegConfig(preset="paper", **SAVE_HEAD))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "target_modules": [*content["target_modules"], "classifier"]}))
    loaded = PeftModel.from_pretrained(tiny.build("vit", "IMAGE_CLS"), tmp_path)
    assert tiny.same_state(get_peft_model_state_dict(model), get_peft_model_state_dict(loaded))


def test_names_that_modules_cannot_have_are_refused_by_torch():
    """As for LoRA: an adapter's name is that of a module."""
    with pytest.raises(KeyError, match=r"v1\.0"):
        get_peft_model(tiny.gpt2(), LRegConfig(target_modules=["mlp"]), adapter_name="v1.0")
    with pytest.raises(KeyError, match=r"v1\.0"):
        add_grade(get_peft_model(tiny.gpt2(), LRegConfig(target_modules=["mlp"])), name="v1.0")


class TestCompiledModels:
    """Names are those of the compiled model, as for LoRA: what is compiled first is saved and loaded compiled."""

    @staticmethod
    def compiled():
        model = tiny.gpt2()
        model.transformer.h[1] = torch.compile(model.transformer.h[1], backend="eager")
        return model

    def test_inside_a_compiled_part(self, tmp_path):
        torch._dynamo.reset()
        model = get_peft_model(self.compiled(), LRegConfig(target_modules=["mlp"])).eval()
        assert len([m for m in model.modules() if isinstance(m, LRegLayer)]) == 2
        tiny.shake(model)
        expected = tiny.outputs(model)
        plain = get_peft_model(tiny.gpt2(), LRegConfig(target_modules=["mlp"])).eval()
        tiny.shake(plain)
        torch.testing.assert_close(expected, tiny.outputs(plain), rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(self.compiled(), tmp_path)
        torch.testing.assert_close(tiny.outputs(loaded), expected, rtol=1e-4, atol=1e-4)

    def test_a_compiled_module_is_adapted_once_outside(self):
        model = tiny.gpt2()
        model.lm_head = torch.compile(model.lm_head, backend="eager")
        model = get_peft_model(model, LRegConfig(target_modules=["lm_head"])).base_model.model
        assert [name for name, m in model.named_modules() if isinstance(m, LRegLayer)] == ["lm_head"]

    def test_compiling_the_adapted_model_leaves_its_files_alone(self, tmp_path):
        model = get_peft_model(tiny.gpt2(), LRegConfig(target_modules=["mlp"])).eval()
        tiny.shake(model)
        torch.compile(model, backend="eager").save_pretrained(tmp_path)
        assert torch.equal(tiny.outputs(PeftModel.from_pretrained(tiny.gpt2(), tmp_path)), tiny.outputs(model))
