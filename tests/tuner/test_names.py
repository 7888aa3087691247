"""Names behind torch.compile: files and configurations speak of the plain model."""

import json

import pytest
import tiny
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file

from lreg_peft import LRegConfig, LRegLayer, add_grade, inspect_targets

OPTIONS = {
    "names": {"target_modules": ["c_attn", "mlp"]},
    "default head": {"task_type": "CAUSAL_LM"},
    "expression": {"target_modules": r"transformer\.h\.\d+\.mlp"},
    "all-linear": {"target_modules": "all-linear"},
    "modules_to_save": {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]},
    "patterns": {
        "target_modules": ["c_fc"],
        "dof_pattern": {"transformer.h.1.mlp.c_fc": 5},
        "layers_to_transform": [1],
    },
}


def compiled(part: str, model=None):
    """GPT-2 with one part compiled, which does not run here: the backend changes no number."""
    model = model or tiny.gpt2()
    if not part:
        return torch.compile(model, backend="eager")
    parent, _, child = part.rpartition(".")
    parent = model.get_submodule(parent)
    setattr(parent, child, torch.compile(getattr(parent, child), backend="eager"))
    return model


def adapted(base, options):
    model = get_peft_model(base, LRegConfig(**options)).eval()
    tiny.shake(model)
    return model


def logits(model):
    torch.compiler.reset()
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 12).view(1, 9)).logits


@pytest.mark.parametrize(
    ("part", "name"),
    [(part, name) for part in ("", "transformer.h.1") for name in OPTIONS] + [("lm_head", "all-linear")],
)
def test_a_compiled_base_is_saved_as_the_plain_one_and_files_fit_both(part, name, tmp_path):
    options = OPTIONS[name]
    model, plain = adapted(compiled(part), options), adapted(tiny.gpt2(), options)
    expected = get_peft_model_state_dict(plain)
    assert get_peft_model_state_dict(model).keys() == expected.keys()
    mine, other = model.peft_config["default"].to_dict(), plain.peft_config["default"].to_dict()
    assert {**mine, "auto_mapping": None} == {**other, "auto_mapping": None}
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "compiled")
    for base, path in ((compiled(part), "plain"), (tiny.gpt2(), "compiled")):
        loaded = PeftModel.from_pretrained(base, tmp_path / path)
        assert tiny.same_state(expected, get_peft_model_state_dict(loaded))


def test_a_compiled_base_has_the_output_of_the_plain_one():
    options = {"target_modules": ["c_attn", "lm_head"]}
    expected = logits(adapted(tiny.gpt2(), options))
    # Compiling fuses nothing with this backend; what is left is the order of a few sums.
    torch.testing.assert_close(logits(adapted(compiled(""), options)), expected, rtol=1e-5, atol=1e-5)


def test_files_that_keep_the_names_of_a_compiled_model_still_load(tmp_path):
    model = adapted(tiny.gpt2(), OPTIONS["modules_to_save"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    prefix = "base_model.model."
    state = load_file(file)
    save_file({key.replace(prefix, f"{prefix}_orig_mod."): value for key, value in state.items()}, file)
    loaded = PeftModel.from_pretrained(tiny.gpt2(), tmp_path)
    assert tiny.same_state(get_peft_model_state_dict(model), get_peft_model_state_dict(loaded))


def test_weights_set_by_hand_fit_a_compiled_model():
    plain = adapted(tiny.gpt2(), OPTIONS["modules_to_save"])
    other = get_peft_model(compiled("transformer"), LRegConfig(**OPTIONS["modules_to_save"]))
    set_peft_model_state_dict(other, get_peft_model_state_dict(plain))
    assert tiny.same_state(get_peft_model_state_dict(plain), get_peft_model_state_dict(other))


def test_a_saved_embedding_of_a_compiled_model_is_recognised(tmp_path):
    """Equal to that of the base it says nothing; another one would change the base, compiled or not."""
    model = adapted(tiny.gpt2(), OPTIONS["names"])
    model.save_pretrained(tmp_path / "same", save_embedding_layers=True)
    loaded = PeftModel.from_pretrained(compiled("transformer"), tmp_path / "same")
    embedding = loaded.get_base_model().transformer._orig_mod.wte.weight
    assert torch.equal(embedding, model.base_model.model.transformer.wte.weight)
    model.base_model.model.transformer.wte.weight.data.add_(1)
    model.save_pretrained(tmp_path / "other", save_embedding_layers=True)
    for base in (tiny.gpt2(), compiled("transformer")):
        with pytest.raises(ValueError, match="a weight of the base model, with other values than the model has"):
            PeftModel.from_pretrained(base, tmp_path / "other")


def test_a_compiled_base_has_hooks_and_gives_them_back():
    model = compiled("")
    inner = model._orig_mod
    before = tiny.state(inner)
    adapted_model = get_peft_model(model, LRegConfig(target_modules=["lm_head", "c_attn"])).train()
    assert not inner.transformer.training  # the backbone stays in eval mode
    assert inner._forward_pre_hooks
    assert adapted_model.unload() is model
    assert not inner._forward_pre_hooks
    assert tiny.same_state(before, tiny.state(inner))


def test_a_compiled_module_is_adapted_once_outside():
    model = get_peft_model(compiled("lm_head"), LRegConfig(target_modules=["lm_head"])).base_model.model
    assert [name for name, m in model.named_modules() if isinstance(m, LRegLayer)] == ["lm_head"]


def test_reports_use_plain_names():
    report = inspect_targets(compiled("transformer.h.1"), LRegConfig(target_modules="all-linear"))
    assert {target.name for target in report} == {
        f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


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
    model = get_peft_model(tiny.build("vit", "IMAGE_CLS"), LRegConfig(**SAVE_HEAD))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "target_modules": [*content["target_modules"], "classifier"]}))
    loaded = PeftModel.from_pretrained(tiny.build("vit", "IMAGE_CLS"), tmp_path)
    assert tiny.same_state(get_peft_model_state_dict(model), get_peft_model_state_dict(loaded))


BAD_NAMES = ["v1.0", "train", "_modules", "__base__", "my_ln_f"]
CONFIG = {"target_modules": ["c_attn", "mlp"], "modules_to_save": ["ln_f"]}


def whole_state(model):
    """All that an attempt to add an adapter could change."""
    modules = [name for name, _ in model.named_modules()]
    trains = [p.requires_grad for p in model.parameters()]
    return modules, trains, list(getattr(model, "peft_config", {})), getattr(model, "_hf_peft_config_loaded", None)


@pytest.mark.parametrize("name", BAD_NAMES)
class TestRefusedAdapterNames:
    def test_before_the_first_adapter(self, name, tmp_path):
        get_peft_model(tiny.gpt2(), LRegConfig(**CONFIG)).save_pretrained(tmp_path)
        for wrap in (
            lambda base: get_peft_model(base, LRegConfig(**CONFIG), adapter_name=name),
            lambda base: PeftModel.from_pretrained(base, tmp_path, adapter_name=name),
            lambda base: inject_adapter_in_model(LRegConfig(**CONFIG), base, name),
            lambda base: base.add_adapter(LRegConfig(**CONFIG), adapter_name=name),
        ):
            base = tiny.gpt2()
            before = whole_state(base)
            with pytest.raises(ValueError, match=f"an adapter cannot be called '{name}': .*another name"):
                wrap(base)
            assert whole_state(base) == before
            base.add_adapter(LRegConfig(**CONFIG))  # the next attempt works

    def test_beside_another(self, name, tmp_path):
        model = get_peft_model(tiny.gpt2(), LRegConfig(**CONFIG))
        model.save_pretrained(tmp_path)
        before = whole_state(model)
        for add in (
            lambda: model.add_adapter(name, LRegConfig(**CONFIG)),
            lambda: model.load_adapter(tmp_path, name),
        ):
            with pytest.raises(ValueError, match="an adapter cannot be called"):
                add()
            assert whole_state(model) == before


def test_a_grade_with_a_refused_name_changes_nothing():
    model = get_peft_model(tiny.gpt2(), LRegConfig(target_modules=["mlp"]))
    before = whole_state(model)
    with pytest.raises(ValueError, match=r"an adapter cannot be called 'v1\.0'"):
        add_grade(model, name="v1.0")
    assert whole_state(model) == before


def test_other_things_than_strings_are_refused():
    with pytest.raises(TypeError, match="an adapter's name must be a string, got 3"):
        inject_adapter_in_model(LRegConfig(**CONFIG), tiny.gpt2(), 3)
    with pytest.raises(ValueError, match="an adapter cannot be called ''"):
        inject_adapter_in_model(LRegConfig(**CONFIG), tiny.gpt2(), "")


def test_an_adapter_may_be_called_like_a_module_of_the_model(tmp_path):
    model = get_peft_model(tiny.gpt2(), LRegConfig(target_modules=["mlp"]))
    tiny.shake(model)
    alone = get_peft_model_state_dict(model)
    model.add_adapter("mlp", LRegConfig(target_modules=["mlp"]))
    assert tiny.same_state(alone, get_peft_model_state_dict(model))


def test_several_adapters_may_be_called_like_modules_of_the_model():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    model = get_peft_model(model, LRegConfig(target_modules=["a"]), adapter_name="other")
    alone = get_peft_model_state_dict(model, adapter_name="other")
    for name in ("a", "b"):
        model.add_adapter(name, LRegConfig(target_modules=[name]))
    assert tiny.same_state(alone, get_peft_model_state_dict(model, adapter_name="other"))
