"""Dropout on the basis, and other options that users of LoRA look for."""

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from lreg_peft import LRegConfig, LRegLayer, add_grade

X = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[3, 4, 5, 6, 3, 9]])


def linear_model(dropout: float, n_nodes: int = 5, **options):
    config = LRegConfig(target_modules=["0"], dropout=dropout, n_nodes=n_nodes, n_components=4, **options)
    torch.manual_seed(5)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 3)), config)
    tiny.shake(model)
    return model


@pytest.mark.parametrize("n_nodes", [5, 40])  # a GEMM with the basis, and a look-up
@pytest.mark.parametrize("weighting", tiny.WEIGHTINGS.values(), ids=tiny.WEIGHTINGS)
def test_each_basis_function_of_each_row_is_dropped_by_itself(weighting, n_nodes):
    model = linear_model(0.4, n_nodes, **weighting)
    (layer,) = tiny.layers(model)
    torch.manual_seed(0)
    value = model.train()(X) - layer.base_layer(X)
    torch.manual_seed(0)
    design = nn.functional.dropout(layer.design("default", X), 0.4)
    # The value is what is left of numbers of order one after a difference.
    torch.testing.assert_close(value, design @ layer.table("default"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighting", tiny.WEIGHTINGS.values(), ids=tiny.WEIGHTINGS)
def test_inference_and_a_rate_of_zero_change_nothing(weighting):
    expected = linear_model(0.0, **weighting).eval()(X)
    assert torch.equal(linear_model(0.4, **weighting).eval()(X), expected)
    assert torch.equal(linear_model(0.0, **weighting).train()(X), expected)


@pytest.mark.parametrize("n_nodes", [4, 40])
def test_a_stage_with_a_stride_drops_in_the_positions_of_its_output(n_nodes):
    base, _ = tiny.image_model("resnet")
    stage = "resnet.encoder.stages.3"
    model = tiny.adapt(base, target_modules=[stage], n_components=3, n_nodes=n_nodes, dropout=0.4)
    tiny.shake(model)
    (layer,) = tiny.layers(model.train())
    image, like = torch.randn(2, 16, 6, 6), torch.randn(2, 24, 3, 3)
    torch.manual_seed(0)
    value = layer.shortcut("default", image, like)
    torch.manual_seed(0)
    design = layer.design("default", image.movedim(1, -1))
    pooled = nn.functional.avg_pool2d(design.movedim(-1, 1), 2).movedim(1, -1)
    expected = nn.functional.dropout(pooled, 0.4) @ layer.table("default")
    torch.testing.assert_close(value, expected.movedim(-1, 1), rtol=1e-4, atol=1e-5)


def test_a_grade_below_has_none():
    model = linear_model(0.4)
    expected = model.eval()(X)
    add_grade(model, LRegConfig(target_modules=["0"], dropout=0.9))
    assert torch.equal(model.train()(X), expected)  # the new grade is zero


def test_a_model_trains_with_it_and_reloads(tmp_path):
    model = get_peft_model(tiny.gpt2(), LRegConfig(target_modules=["mlp", "lm_head"], dropout=0.5)).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.gpt2(), tmp_path, is_trainable=True)
    assert {layer.lreg_dropout["default"] for layer in tiny.layers(loaded)} == {0.5}


@pytest.mark.parametrize("name", ["scaling", "source", "dropout", "parts"])
def test_a_block_may_have_children_called_like_attributes_of_a_shortcut(name):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(name, nn.Linear(6, 6))

        def forward(self, x):
            return getattr(self, name)(x)

    model = get_peft_model(nn.Sequential(Block()), LRegConfig(target_modules=["0"]))
    assert isinstance(model.get_base_model()[0], LRegLayer)
    assert model(X).shape == X.shape


@pytest.mark.parametrize("build", [tiny.gpt2, tiny.llama], ids=["tied", "not tied"])
@pytest.mark.parametrize("targets", [["lm_head"], ["mlp"]])
class TestTrainableTokens:
    def test_they_act_as_rows_of_the_embedding_and_of_a_tied_head(self, build, targets, tmp_path):
        config = {"target_modules": targets, "trainable_token_indices": [3, 4]}
        model = get_peft_model(build(), LRegConfig(preset="paper", **config)).eval()
        tiny.shake(model)
        (rows,) = (p for name, p in model.named_parameters() if "trainable_tokens_delta" in name)
        rows.data.add_(0.25)
        other = build()
        other.get_input_embeddings().weight.data[[3, 4]] = rows.data
        plain = get_peft_model(other, LRegConfig(target_modules=targets)).eval()
        tiny.shake(plain)
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(build(), tmp_path)
        assert torch.equal(model(input_ids=IDS).logits, loaded(input_ids=IDS).logits)

    def test_their_gradient_is_that_of_the_models_own_loss(self, build, targets):
        gradients = []
        for fused in (True, False):
            config = LRegConfig(target_modules=targets, trainable_token_indices=[3, 4], fused_loss=fused)
            model = get_peft_model(build(), config).train()
            tiny.shake(model)
            model(input_ids=IDS, labels=IDS).loss.backward()
            gradients += [p.grad for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
        torch.testing.assert_close(*gradients)
