"""The figures of Li, Cheng & Gu (2025), Tables 2, 3 and A2, on models of full size that hold no data."""

import pytest
import torch
import transformers
from peft import get_peft_model
from safetensors import safe_open
from tiny import layers, trainable
from torch import nn

from lreg_peft import LRegConfig, inspect_targets


def on_meta(model_class, config) -> nn.Module:
    with torch.device("meta"):
        return model_class(config)


def check(model: nn.Module, expected: int, **options) -> nn.Module:
    report = inspect_targets(model, LRegConfig(preset="paper", **options))
    adapted = get_peft_model(model, LRegConfig(preset="paper", **options))
    adapters = [p for name, p in adapted.named_parameters() if "lreg_" in name and p.requires_grad]
    assert report.trainable_parameters == sum(p.numel() for p in adapters)
    assert trainable(adapted) == expected
    return adapted


@pytest.mark.parametrize(
    ("width", "depth", "heads", "n_components", "n_nodes", "expected"),
    [
        pytest.param(768, 12, 12, 2, 2, 202_566, id="gpt2"),
        pytest.param(1024, 24, 16, 2, 4, 404_106, id="gpt2-medium"),
        pytest.param(1280, 36, 20, 3, 4, 606_927, id="gpt2-large"),
    ],
)
def test_gpt2_at_the_language_model_head(width, depth, heads, n_components, n_nodes, expected):
    config = transformers.GPT2Config(n_embd=width, n_layer=depth, n_head=heads)
    model = on_meta(transformers.GPT2LMHeadModel, config)
    adapted = check(model, expected, task_type="CAUSAL_LM", n_components=n_components, n_nodes=n_nodes)
    (head,) = layers(adapted)
    assert (head.in_features, head.out_features) == (width, 50257)


ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}


def test_roberta_parallel_to_the_whole_masked_language_model_head():
    model = on_meta(transformers.RobertaForMaskedLM, transformers.RobertaConfig(**ROBERTA))
    adapted = check(model, 303_128, n_components=2, n_nodes=3)
    (head,) = layers(adapted)
    assert type(head.base_layer).__name__ == "RobertaLMHead"
    assert (head.in_features, head.out_features) == (768, 50265)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (transformers.RobertaForSequenceClassification, transformers.RobertaConfig(**ROBERTA)),
        (transformers.BertForSequenceClassification, transformers.BertConfig()),
    ],
    ids=["roberta", "bert"],
)
def test_query_and_key_of_a_12_layer_encoder(model_class, config):
    adapted = check(on_meta(model_class, config), 258_096, n_components=2, n_nodes=6)
    assert len(layers(adapted)) == 24


def test_query_and_key_with_a_plain_two_way_head():
    model = on_meta(transformers.BertForSequenceClassification, transformers.BertConfig(num_labels=2))
    adapted = check(model, 259_634, task_type="SEQ_CLS", n_components=2, n_nodes=6)
    assert len(layers(adapted)) == 24


def test_resnet_50_last_stage():
    model = on_meta(transformers.ResNetForImageClassification, transformers.ResNetConfig())
    adapted = check(model, 540_688, n_components=16, n_nodes=16, target_modules=["encoder.stages.3"])
    (stage,) = layers(adapted)
    assert (stage.in_features, stage.out_features) == (1024, 2048)


def test_regnet_last_stage_of_the_sizes_of_a_resnext():
    config = transformers.RegNetConfig(hidden_sizes=[256, 512, 1024, 2048], groups_width=64)
    model = on_meta(transformers.RegNetForImageClassification, config)
    adapted = check(model, 135_172, n_components=4, n_nodes=16)
    (stage,) = layers(adapted)
    assert (stage.in_features, stage.out_features) == (1024, 2048)


def test_mobilenet_v2_from_block_10_to_the_features():
    """64 -> 1280; around the last convolution alone, 320 -> 1280, it would be 4,096 more."""
    model = on_meta(transformers.MobileNetV2ForImageClassification, transformers.MobileNetV2Config())
    adapted = check(model, 328_720, n_components=16, n_nodes=16)
    (span,) = layers(adapted)
    assert (span.in_features, span.out_features) == (64, 1280)
    assert span.source.name == "mobilenet_v2.layer.8"
    model = on_meta(transformers.MobileNetV2ForImageClassification, transformers.MobileNetV2Config())
    check(model, 332_816, n_components=16, n_nodes=16, target_modules=["conv_1x1"])


@pytest.mark.parametrize(("width", "expected"), [(1280, 296_992), (2048, 321_568)])
def test_parallel_to_the_classifier(width, expected):
    """Table A1, d = 32 and n = 8, by the formula; the paper's .298 and .324 M are these and C_in more."""
    config = transformers.ResNetConfig(hidden_sizes=[256, 512, 1024, width], num_labels=1000)
    model = on_meta(transformers.ResNetForImageClassification, config)
    adapted = check(model, expected, n_components=32, n_nodes=8, target_modules=["classifier"])
    (head,) = layers(adapted)
    assert (head.in_features, head.out_features) == (width, 1000)


def test_vit_parallel_to_the_classification_head():
    model = on_meta(transformers.ViTForImageClassification, transformers.ViTConfig(num_labels=1000))
    check(model, 67_076, n_components=4, n_nodes=16, target_modules=["classifier"])


@pytest.mark.parametrize(
    ("sizes", "n_components", "n_nodes", "expected"),
    [
        ((1024, 2048), 4, 4, 36_868),
        ((1024, 2048), 4, 8, 69_636),
        ((1024, 2048), 8, 8, 139_272),
        ((1024, 2048), 16, 16, 540_688),
        ((1024, 2048), 32, 32, 2_129_952),
        ((1024, 2048), 4, 16, 135_172),  # ResNeXt-50 32x4d
        ((64, 1280), 16, 16, 328_720),  # MobileNetV2, output of block 10 -> features
    ],
)
def test_given_feature_sizes(sizes, n_components, n_nodes, expected):
    model = nn.Sequential(nn.Identity())
    check(model, expected, n_components=n_components, n_nodes=n_nodes, target_modules=["0"], feature_sizes={"0": sizes})


def test_formula_with_other_sizes_on_every_kind_of_layer():
    model = nn.ModuleDict({"linear": nn.Linear(5, 7), "conv": nn.Conv2d(3, 11, 3)})
    d, n = 3, 6
    expected = (5 + 1) * d + d * n * 7 + (3 + 1) * d + d * n * 11
    check(model, expected, n_components=d, n_nodes=n, target_modules=["linear", "conv"])


def test_fixed_projection_counts_coefficients_only():
    check(nn.Sequential(nn.Linear(5, 7)), 2 * 3 * 7, n_nodes=3, train_projection=False, target_modules=["0"])


def test_saved_adapter_of_gpt2_is_under_one_megabyte(tmp_path):
    """A depth of one leaves the head as it is in GPT-2; the 155 MB output embedding stays out of the file."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1))
    model.name_or_path = ""
    get_peft_model(model, LRegConfig(preset="paper", task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, "pt") as saved:
        assert set(saved.keys()) == {
            f"base_model.model.lm_head.lreg_{name}"
            for name in ("projection.weight", "projection.bias", "coefficients.weight", "encoder.nodes")
        }
    # Four bytes per parameter and node, and a header.
    assert 4 * (202_566 + 4) < file.stat().st_size < 4 * (202_566 + 4) + 1000 < 1_000_000
