"""A model after something failed half-way is the model before it; and what an adapter file must not bring."""

import shutil

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import lreg_peft.tuner.layer as layer_module
import lreg_peft.tuner.model as model_module
from lreg_peft import LRegConfig, LRegLayer, add_grade, initialize_lreg_weights, load_grades
from lreg_peft.tuner.transaction import all_or_nothing

ERRORS = [RuntimeError("out of memory"), KeyboardInterrupt()]


def picture(model: nn.Module) -> tuple:
    """Values, module types and everything that could be left behind; a place that forward looks up does not count."""

    def attributes(module: nn.Module) -> tuple:
        names = sorted(set(module.__dict__) - {"_lreg_first_layer"})
        return module.training, names, len(module._forward_hooks), len(module._forward_pre_hooks)

    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: type(module) for name, module in model.named_modules()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: attributes(module) for name, module in model.named_modules()},
        list(getattr(model, "peft_config", {})),
    )


def same(before: tuple, after: tuple) -> bool:
    values = before[0].keys() == after[0].keys() and all(
        torch.equal(value.nan_to_num(), after[0][name].nan_to_num()) for name, value in before[0].items()
    )
    return values and before[1:] == after[1:]


def adapted(**options) -> PeftModel:
    return get_peft_model(tiny.gpt2(), LRegConfig(target_modules=["c_attn", "mlp"], dof=3, **options))


def failing(own, at: int, error: BaseException):
    calls = []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise error
        return own(*args, **kwargs)

    return call


@pytest.mark.parametrize("error", ERRORS, ids=["error", "interruption"])
class TestHalfWay:
    def test_a_new_adapter(self, monkeypatch, error):
        model = tiny.gpt2()
        before = picture(model)
        monkeypatch.setattr(model_module, "wrap", failing(model_module.wrap, 2, error))
        with pytest.raises(type(error)):
            get_peft_model(model, LRegConfig(target_modules=["c_attn", "mlp"]))
        assert same(before, picture(model))
        monkeypatch.undo()
        get_peft_model(model, LRegConfig(target_modules=["c_attn", "mlp"]))  # without a warning of what was there

    def test_a_start(self, monkeypatch, error):
        model = adapted(init_weights="pca")
        before = picture(model)
        monkeypatch.setattr(LRegLayer, "set_encoder", failing(LRegLayer.set_encoder, 3, error))
        ids = torch.randint(3, 60, (2, 9))
        with pytest.raises(type(error)):
            initialize_lreg_weights(model, [{"input_ids": ids}], show_progress=False)
        assert same(before, picture(model))
        assert all(layer.start_is_owed == {"default"} for layer in tiny.layers(model))

    @pytest.mark.parametrize("form", ["additive", "composed"])
    def test_a_grade(self, monkeypatch, error, form):
        model = adapted()
        before = picture(model)
        monkeypatch.setattr(layer_module, "uniform_nodes", failing(layer_module.uniform_nodes, 2, error))
        with pytest.raises(type(error)):
            add_grade(model, form=form)
        assert same(before, picture(model))
        assert model.active_adapters == ["default"]
        monkeypatch.undo()
        assert add_grade(model, form=form) == "grade_2"

    def test_loading_grades(self, monkeypatch, error, tmp_path):
        stack = adapted()
        add_grade(stack)
        stack.save_pretrained(tmp_path)
        base = tiny.gpt2()
        before = picture(base)
        with monkeypatch.context() as patch:
            patch.setattr(model_module, "_check_saved_adapter", failing(model_module._check_saved_adapter, 2, error))
            with pytest.raises(type(error)):
                load_grades(base, tmp_path)
        assert same(before, picture(base))
        assert load_grades(base, tmp_path).active_adapters == ["grade_2"]

    def test_loading_over_an_adapter(self, monkeypatch, error, tmp_path):
        other = adapted()
        tiny.shake(other)
        other.save_pretrained(tmp_path)
        model = adapted()
        before = picture(model)
        own = nn.Module.load_state_dict

        def load_and_fail(self, *args, **kwargs):
            own(self, *args, **kwargs)
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "load_state_dict", load_and_fail)
            with pytest.raises(type(error)):
                model.load_adapter(tmp_path, "default")
        assert same(before, picture(model))


def test_a_start_on_inputs_that_are_not_finite_names_the_module():
    model = adapted()
    model.get_base_model().transformer.h[1].ln_1.weight.data.fill_(torch.nan)
    before = picture(model)
    with pytest.raises(ValueError, match=r"inputs of '.*h\.1\.attn\.c_attn' must be finite"):
        initialize_lreg_weights(model, [{"input_ids": torch.randint(3, 60, (2, 9))}], show_progress=False)
    assert same(before, picture(model))


def test_a_gradient_start_without_labels_that_count():
    model = adapted()
    before = picture(model)
    ids = torch.randint(3, 60, (2, 9))
    ignored = [{"input_ids": ids, "labels": torch.full_like(ids, -100)}]
    with pytest.raises(ValueError, match=r"no gradient in the output of .*all labels of the batches are ignored"):
        initialize_lreg_weights(model, ignored, method="gradient", show_progress=False)
    assert same(before, picture(model))
    initialize_lreg_weights(
        model, [*ignored, {"input_ids": ids, "labels": ids}], method="gradient", show_progress=False
    )


def test_contents_of_containers_come_back_in_the_same_containers():
    class Holder(nn.Linear):
        pass

    model = Holder(2, 2)
    model.notes = {"a": 1}
    notes, weight = model.notes, model.weight
    with pytest.raises(ZeroDivisionError), all_or_nothing(model, [weight]):  # noqa: PT012
        model.notes["b"] = 2
        model.extra = 3
        model.weight.data.zero_()
        model.weight.requires_grad_(False)
        model.bias = None
        model.child = nn.Linear(1, 1)
        raise ZeroDivisionError
    assert model.notes is notes and notes == {"a": 1} and not hasattr(model, "extra")
    assert model.weight is weight and weight.any() and weight.requires_grad
    assert model.bias is not None and not list(model.children())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = get_peft_model(tiny.gpt2(), LRegConfig(target_modules=["mlp", "lm_head"], dof=3))
    tiny.shake(model)
    model.save_pretrained(folder)
    return folder


PREFIX = "base_model.model."
SPOILT = {
    "a base weight": lambda f: f.update({f"{PREFIX}transformer.wte.weight": torch.zeros(61, 16)}),
    "the wrapped head": lambda f: f.update({f"{PREFIX}lm_head.base_layer.weight": torch.zeros(61, 16)}),
    "a base weight without prefix": lambda f: f.update({"transformer.h.0.ln_1.weight": torch.full((16,), 2.0)}),
    "another module's shortcut": lambda f: f.update(
        {f"{PREFIX}transformer.h.0.attn.lreg_projection": torch.zeros(2, 16)}
    ),
    "another head's tensor": lambda f: f.update({f"{PREFIX}lm_head.lreg_constant": torch.zeros(61)}),
    "something unknown": lambda f: f.update({f"{PREFIX}transformer.h.7.mlp.weight": torch.zeros(2)}),
    "fp64 beyond fp32": lambda f: f.update(
        {k: torch.full(v.shape, 1e60, dtype=torch.float64) for k, v in f.items() if "lm_head.lreg_proj" in k}
    ),
    "NaN": lambda f: f.update({k: v * torch.nan for k, v in f.items() if "lm_head.lreg_coeff" in k}),
    "whole numbers": lambda f: f.update({k: v.long() for k, v in f.items() if "lm_head.lreg_coeff" in k}),
    "nodes that fp32 does not tell apart": lambda f: f.update(
        {k: torch.tensor([[0, 1e-60, 1.0]] * 2, dtype=torch.float64) for k in f if "lm_head.lreg_nodes" in k}
    ),
    "a missing tensor": lambda f: f.pop(next(k for k in f if "lreg_nodes" in k)),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("into", ["base", "new", "same"])
def test_files_that_would_change_something_else_or_be_lost_are_refused(tmp_path, saved, spoil, into):
    folder = tmp_path / "a"
    shutil.copytree(saved, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    spoil(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    model = tiny.gpt2()
    if into != "base":
        model = get_peft_model(model, LRegConfig(target_modules=["mlp", "lm_head"], dof=3))
    before = picture(model)
    load = {
        "base": lambda: PeftModel.from_pretrained(model, folder),
        "new": lambda: model.load_adapter(folder, "other"),
        "same": lambda: model.load_adapter(folder, "default"),
    }[into]
    with pytest.raises(ValueError, match="adapter file"):
        load()
    assert same(before, picture(model))


def test_embeddings_beside_an_adapter(tmp_path, saved):
    """PEFT writes them when tokens were added: those that the model has are no matter, new rows are taken."""
    base = tiny.gpt2()
    folder = tmp_path / "a"
    shutil.copytree(saved, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    key = f"{PREFIX}transformer.wte.weight"
    for change, is_fine in ((0, True), (3, True), (61, False)):
        table = base.transformer.wte.weight.detach().clone()
        table[61 - change :] += 1
        save_file({**tensors, key: table}, folder / "adapter_model.safetensors")
        model = tiny.gpt2()
        if not is_fine:
            with pytest.raises(ValueError, match=r"'transformer\.wte\.weight', a weight of the base model"):
                PeftModel.from_pretrained(model, folder)
            continue
        loaded = PeftModel.from_pretrained(model, folder)
        assert torch.equal(loaded.get_base_model().transformer.wte.weight, table)


@pytest.mark.parametrize("name", ["a.b", "__base__", "keys", "type"])
def test_names_that_no_adapter_can_have(name):
    model = tiny.gpt2()
    before = picture(model)
    with pytest.raises(ValueError, match="an adapter cannot be called"):
        get_peft_model(model, LRegConfig(target_modules=["mlp"]), adapter_name=name)
    assert same(before, picture(model))
    stack = adapted()
    before = picture(stack)
    with pytest.raises(ValueError, match="an adapter cannot be called"):
        add_grade(stack, name=name)
    assert same(before, picture(stack))
