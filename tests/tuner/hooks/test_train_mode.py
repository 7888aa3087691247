"""Train mode of the frozen model: dropout as with LoRA, statistics that stand still, the paper's rule on request."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import (
    IMAGE_MODELS,
    adapt,
    build,
    gpt2,
    gradients,
    image_model,
    inputs,
    layers,
    llama,
    outputs,
    roberta,
    shake,
    state,
)
from torch import nn

from lreg_peft import LRegConfig, LRegLayer

DROPOUT = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}


def dropping_gpt2() -> nn.Module:
    return gpt2(**DROPOUT)


@torch.no_grad()
def train_output(model: nn.Module) -> torch.Tensor:
    model.train()
    return model(**inputs("gpt2")).logits


class TestByDefault:
    @pytest.mark.parametrize("options", [{}, {"target_modules": ["mlp", "attn"]}], ids=["lm_head", "blocks"])
    def test_dropout_acts_as_with_lora(self, options):
        found = []
        for config in (
            LRegConfig(preset="paper", **options),
            LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True),
        ):
            model = get_peft_model(dropping_gpt2(), config)  # both are the identity
            torch.manual_seed(5)
            found.append(train_output(model))
            assert not torch.allclose(found[-1], outputs(model))
            assert all(module.training for module in model.train().modules())
        assert torch.equal(*found)

    def test_native_adapters_too(self):
        model = dropping_gpt2()
        model.add_adapter(LRegConfig(target_modules=["mlp"]))
        shake(model)
        assert not torch.allclose(train_output(model), outputs(model))

    @pytest.mark.parametrize("model_type", [kind for kind in IMAGE_MODELS if kind in ("resnet", "mobilenet_v2")])
    @pytest.mark.parametrize("backbone_eval", [False, True])
    def test_batch_norms_of_the_frozen_base_do_not_move(self, model_type, backbone_eval):
        base, batch = image_model(model_type)
        before = state(base)
        model = adapt(base, backbone_eval=backbone_eval)
        shake(model)
        expected = outputs_of(model, batch)
        for _ in range(3):
            model.train()
            loss = model(pixel_values=batch["pixel_values"] + 1, labels=batch["labels"]).loss
            loss.backward()
        for name, buffer in model.get_base_model().named_buffers():
            if "lreg_" not in name:
                assert torch.equal(buffer, before[name.replace(".base_layer", "")]), name
        # And they normalise by what they have seen, not by the batch: train mode has the values of eval mode.
        torch.testing.assert_close(model.train()(**batch).logits, expected)

    def test_a_batch_norm_that_is_trained_in_full_moves(self):
        base = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        model = adapt(base, target_modules=["0"], modules_to_save=["2"]).train()
        for _ in range(3):
            model(torch.randn(8, 4) + 5)
        first, second = base[1], base[2].modules_to_save["default"]
        assert first.num_batches_tracked == 0 and not first.running_mean.any()
        assert second.num_batches_tracked == 3 and second.running_mean.any()

    def test_the_base_model_alone_trains_as_before(self):
        base = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        unloaded = adapt(base, target_modules=["0"]).unload().requires_grad_(True).train()
        unloaded(torch.randn(8, 4) + 5)
        assert unloaded[1].running_mean.any()


def outputs_of(model: nn.Module, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=batch["pixel_values"]).logits


class TestThePapersRule:
    """backbone_eval=True: the base in eval mode, adapters and modules_to_save in train mode."""

    @pytest.mark.parametrize("options", [{}, {"target_modules": ["mlp", "attn"]}], ids=["lm_head", "blocks"])
    def test_no_dropout_of_the_base(self, options):
        model = adapt(dropping_gpt2(), backbone_eval=True, **options)
        shake(model)
        assert torch.equal(train_output(model), outputs(model))

    def test_dropout_of_the_adapter_acts(self):
        model = adapt(dropping_gpt2(), backbone_eval=True, dropout=0.5)
        shake(model)
        assert not torch.allclose(train_output(model), outputs(model))

    def test_every_call_of_train_and_eval(self):
        model = adapt(dropping_gpt2(), backbone_eval=True)
        base = model.get_base_model()
        for _ in range(2):
            model.train()
            assert model.training
            own = {id(part) for layer in layers(model) for part in layer.modules() if part is not layer.base_layer}
            assert all(layer.training for layer in layers(model))
            frozen = [m for m in base.modules() if id(m) not in own and not isinstance(m, LRegLayer)]
            assert frozen and not any(module.training for module in frozen)
            model.eval()
            assert not any(module.training for module in model.modules())

    def test_one_of_several_active_adapters_is_enough(self):
        model = adapt(dropping_gpt2(), "one")
        model.add_adapter("two", LRegConfig(preset="paper", backbone_eval=True))
        assert not torch.allclose(train_output(model), outputs(model))
        model.base_model.set_adapter(["one", "two"])
        assert torch.equal(train_output(model), outputs(model))
        model.set_adapter("two")
        assert torch.equal(train_output(model), outputs(model))

    def test_modules_to_save_stay_in_train_mode(self):
        dropout = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
        model = adapt(roberta("SEQ_CLS", **dropout), task_type="SEQ_CLS", backbone_eval=True).train()
        base = model.get_base_model()
        assert base.classifier.modules_to_save["default"].dropout.training
        assert not base.roberta.encoder.layer[0].attention.self.dropout.training
        first, second = (model(**inputs("roberta")).logits for _ in range(2))
        assert not torch.allclose(first, second)

    def test_it_says_that_nothing_is_checkpointed(self, caplog):
        model = adapt(gpt2(), target_modules=["mlp"], backbone_eval=True)
        model.activation_checkpointing_enable({"use_reentrant": False})
        from transformers.utils import logging

        logging.get_logger().propagate = True
        try:
            model.train()
        finally:
            logging.get_logger().propagate = False
        assert "gradient checkpointing has no effect" in caplog.text


def checkpointed_calls(model: nn.Module) -> int:
    """How often a layer's attention runs in one training step: twice if it is recomputed."""
    calls = []
    attention = [m for m in model.modules() if type(m).__name__ in ("GPT2Attention", "LlamaAttention")]
    handles = [m.register_forward_pre_hook(lambda *_: calls.append(1)) for m in attention]
    gradients(model)
    for handle in handles:
        handle.remove()
    return len(calls) // len(attention)


class TestCheckpointing:
    @pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
    @pytest.mark.parametrize("targets", [["mlp"], ["mlp", "lm_head"]], ids=str)
    @pytest.mark.parametrize("builder", [gpt2, llama], ids=["gpt2", "llama"])
    def test_gradients_are_the_same_and_layers_are_recomputed(self, builder, targets, use_reentrant):
        model = adapt(builder(), target_modules=targets, n_nodes=4)
        shake(model)
        expected = gradients(model)
        assert checkpointed_calls(model) == 1
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        if use_reentrant:
            model.enable_input_require_grads()  # as Trainer does: reentrant checkpoints need an input with a gradient
        found = gradients(model)
        assert checkpointed_calls(model) == 2
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient)

    def test_dropout_repeats_its_mask(self):
        model = adapt(build("opt", "CAUSAL_LM", dropout=0.5), target_modules=["fc1"])
        shake(model)
        torch.manual_seed(3)
        expected = gradients(model)
        model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        found = gradients(model)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient)


def test_the_paper_s_rule_and_no_dropout_are_the_same_training():
    expected = adapt(gpt2(), target_modules=["mlp"])
    model = adapt(dropping_gpt2(), target_modules=["mlp"], backbone_eval=True)
    for one in (expected, model):
        shake(one)
    for (name, mine), theirs in zip(gradients(model).items(), gradients(expected).values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_inputs_that_require_gradients_leave_the_gradients_as_they_are():
    """As Trainer asks for with checkpointing, and the preparation of a quantised model."""
    model = adapt(gpt2(), target_modules=["lm_head"])
    shake(model)
    expected = gradients(model)
    model.enable_input_require_grads()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])
