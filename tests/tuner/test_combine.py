"""Sums of adapters and scaled adapters."""

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from lreg_peft import LRegConfig

IDS = torch.tensor([[3, 4, 5, 6, 3, 9]])


def two(one=None, other=None, **common):
    """A model with the adapters "a" and "b", weights as after training."""
    common = {"target_modules": ["c_attn", "mlp"], "n_nodes": 4, **common}
    model = get_peft_model(tiny.gpt2(), LRegConfig(preset="paper", **{**common, **(one or {})}), adapter_name="a")
    model.add_adapter("b", LRegConfig(preset="paper", **{**common, **(other or {})}))
    for name, seed in (("a", 1), ("b", 2)):
        tiny.shake(model, name, seed)
    return model.eval()


def shortcut(layer, name, x):
    return layer.shortcut(name, x, torch.zeros(*x.shape[:-1], layer.out_features))


def check_sum(model, weights=(0.3, -2.0)):
    """The adapter "sum" is the weighted sum of "a" and "b" in every module."""
    for layer in tiny.layers(model):
        x = torch.randn(20, layer.in_features)
        terms = [w * shortcut(layer, n, x) for n, w in zip("ab", weights, strict=True) if n in layer.lreg_encoder]
        # Values of order ten, whose parts are added in another order.
        torch.testing.assert_close(shortcut(layer, "sum", x), sum(terms), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weighting", tiny.WEIGHTINGS.values(), ids=tiny.WEIGHTINGS)
def test_components_side_by_side_are_the_sum(weighting, tmp_path):
    sizes = {"n_components": 3, "component_pattern": {"mlp": 1}}
    model = two(other=sizes, **weighting)
    model.add_weighted_adapter(["a", "b"], [0.3, -2.0], "sum")
    check_sum(model)
    assert model.active_adapters == ["a"]
    model.set_adapter("sum")
    expected = tiny.outputs(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(tiny.gpt2(), tmp_path / "sum")
    assert torch.equal(tiny.outputs(loaded), expected)


def test_adapters_may_cover_different_modules():
    model = two(
        one={"target_modules": ["c_attn"]}, other={"target_modules": ["mlp", "lm_head"], "node_pattern": {"mlp": 3}}
    )
    model.add_weighted_adapter(["a", "b"], [0.3, -2.0], "sum")
    check_sum(model)
    assert len(model.peft_config["sum"].target_modules) == 5


def test_adapters_on_one_mesh_and_projection_need_no_more_components():
    model = two()
    for layer in tiny.layers(model):
        layer.lreg_projection["b"].load_state_dict(layer.lreg_projection["a"].state_dict())
        layer.lreg_encoder["b"].nodes.copy_(layer.lreg_encoder["a"].nodes)
    model.add_weighted_adapter(["a", "b"], [0.3, -2.0], "sum", combination_type="linear")
    check_sum(model)
    assert {layer.lreg_encoder["sum"].nodes.shape[0] for layer in tiny.layers(model)} == {2}


class Pool(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, 6)

    def forward(self, x):
        return self.out(x.mean(dim=1))


class Matrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return x @ self.values


class Net(nn.Module):
    """A module whose input is pooled, one without readable sizes, and one whose name is the ending of another's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block, self.fc, self.matrix, self.pool = nn.Sequential(), nn.Linear(6, 6), Matrix(), Pool()
        self.block.add_module("fc", nn.Linear(6, 6))

    def forward(self, x):
        return self.pool(self.matrix(self.block(torch.tanh(self.fc(x)))))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"target_modules": ["pool"], "readout": "mean"}, {"target_modules": "fc"}),
        ({"target_modules": ["matrix"], "feature_sizes": {"matrix": (6, 6)}, "layout": "tokens"}, {}),
        ({"target_modules": ["matrix"], "feature_sizes": {"matrix": (6, 6)}, "feature_source": {"matrix": "fc"}}, {}),
        ({"target_modules": "fc"}, {"target_modules": "fc", "n_components": 3}),
        ({"target_modules": "fc"}, {"target_modules": ["fc"], "n_components": 3}),
    ],
)
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_the_sum_reads_what_its_parts_read(one, other, order, tmp_path):
    common = {"target_modules": ["block.fc"], "n_nodes": 3}
    model = get_peft_model(Net(), LRegConfig(preset="paper", **{**common, **one}), adapter_name="a")
    model.add_adapter("b", LRegConfig(preset="paper", **{**common, **other}))
    tiny.shake(model, "a", 1), tiny.shake(model, "b", 2)
    x = torch.randn(2, 5, 6)
    model.base_model.set_adapter(["a", "b"])
    expected = model.eval()(x)
    model.add_weighted_adapter(list(order), [1.0, 1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(Net(), tmp_path / "sum").eval()
    assert torch.equal(loaded(x), model(x))


def test_adapters_that_read_a_module_in_another_way_have_no_sum():
    model = get_peft_model(Net(), LRegConfig(target_modules=["pool"], readout="mean"), adapter_name="a")
    model.add_adapter("b", LRegConfig(target_modules=["pool"], readout="first"))
    with pytest.raises(ValueError, match=r"same layout and readout in a module .*readout='first'.* in 'pool'"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")


@pytest.mark.parametrize(
    ("setting", "call", "message"),
    [
        ({}, {"combination_type": "linear"}, "same projection and mesh; .* differ in .*'cat' puts"),
        ({}, {"combination_type": "ties"}, "must be 'cat' or 'linear', got 'ties'"),
        ({}, {"svd_rank": 3}, r"\['svd_rank'\] work on the low-rank matrices of LoRA.*leave them out"),
        ({}, {"adapters": ["a", "c"]}, r"adapters \['c'\] do not exist. There are: \['a', 'b'\]"),
        ({}, {"weights": [1.0]}, r"one weight each, got .*weights=\[1.0\]"),
        ({}, {"weights": [1.0, float("nan")]}, "weights must be finite numbers"),
        ({}, {"adapter_name": "b"}, "there is an adapter 'b' already"),
        ({"other": {"weighting": "reduced"}}, {}, "same weighting to be combined, got {'a': 'full', 'b': 'reduced'}"),
        ({"other": {"base_width": 8}}, {}, "same base_width to be combined, got {'a': None, 'b': 8}"),
        ({"other": {"n_nodes": 5}}, {}, "same n_nodes in a module .*got {'a': 4, 'b': 5}"),
        ({"other": {"modules_to_save": ["ln_f"]}}, {}, "have copies of .*ln_f' in modules_to_save"),
    ],
)
def test_what_cannot_be_summed_says_why_and_changes_nothing(setting, call, message):
    model = two(**setting)
    before = tiny.state(model), list(model.peft_config)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**{"adapters": ["a", "b"], "weights": [1, 1], "adapter_name": "sum", **call})
    assert tiny.same_state(before[0], tiny.state(model))
    assert list(model.peft_config) == before[1]


class TestScaling:
    """Of the shortcut, which is linear in its coefficients, by the methods that LoRA's layers have."""

    def test_scales_multiply_and_go_back(self):
        model = two()
        layer = tiny.layers(model)[0]
        x = torch.randn(20, layer.in_features)
        saved, full = get_peft_model_state_dict(model, adapter_name="a"), shortcut(layer, "a", x)
        for call, factor in (
            (lambda: layer.scale_layer(0.5), 0.5),
            (lambda: layer.scale_layer(0.5), 0.25),
            (lambda: layer.unscale_layer(0.5), 0.5),
            (lambda: layer.set_scale("a", 4.0), 4.0),
            (lambda: layer.unscale_layer(), 1.0),
            (lambda: layer.set_scale("b", 7.0), 1.0),
            (lambda: layer.set_scale("unknown", 7.0), 1.0),  # as in LoRA's layers: nothing
        ):
            call()
            assert torch.equal(shortcut(layer, "a", x), full * factor)
        assert tiny.same_state(saved, get_peft_model_state_dict(model, adapter_name="a"))

    def test_zero_is_the_base_and_gradients_are_scaled_too(self):
        model = two()
        expected = tiny.gradients(model)
        for layer in tiny.layers(model):
            layer.set_scale("a", 0.0)
        assert torch.equal(tiny.outputs(model), tiny.outputs(tiny.gpt2()))
        found = tiny.gradients(model)
        assert found.keys() == expected.keys()
        assert not any(gradient.any() for gradient in found.values())

    def test_the_fused_loss_and_mixed_batches_are_scaled(self):
        model = two(target_modules=["lm_head"])
        (layer,) = tiny.layers(model)
        layer.set_scale("a", 0.5)
        x, y = torch.randn(9, 16), torch.arange(9)
        torch.testing.assert_close(layer.fused_loss(x, y), nn.functional.cross_entropy(layer(x), y))
        expected = tiny.outputs(model)
        torch.testing.assert_close(tiny.outputs(model, adapter_names=["a"] * 3), expected, rtol=1e-5, atol=1e-5)


def test_adapters_of_reduced_heads_sum_their_constants_too():
    """Of which the sum has one."""
    model = two(weighting="reduced")
    with torch.no_grad():
        for layer in tiny.layers(model):
            for name, constant in (("a", 3.0), ("b", 5.0)):
                table = layer.table(name).clone()
                table[:-1], table[-1] = 0, constant
                layer.set_table(name, table)
    model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "sum")
    for layer in tiny.layers(model):
        assert torch.equal(shortcut(layer, "sum", torch.randn(2, 16)), torch.full((2, layer.out_features), -8.5))
