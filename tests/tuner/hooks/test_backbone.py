"""The frozen model stays in eval mode while the adapter trains, with gradient checkpointing or without."""

import copy

import pytest
import torch
from peft import get_peft_model
from tiny import HIDDEN, VOCABULARY, adapt, build, gpt2, gradients, inputs, layers, llama, outputs, roberta, shake
from torch import nn

from lreg_peft import LRegConfig, LRegLayer

DROPOUT = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}


def dropping_gpt2() -> nn.Module:
    return gpt2(**DROPOUT)


def train_output(model: nn.Module, base: nn.Module) -> torch.Tensor:
    model.train()
    with torch.no_grad():
        result = model(**inputs(base))
    return result.logits


class TestDropout:
    def test_off_through_peft(self):
        model = adapt(dropping_gpt2())
        shake(model)
        assert torch.equal(train_output(model, dropping_gpt2()), outputs(model))

    def test_off_through_native_add_adapter(self):
        model = dropping_gpt2()
        model.add_adapter(LRegConfig())
        shake(model)
        assert torch.equal(train_output(model, model), outputs(model))

    def test_on_if_asked_for(self):
        for make in (lambda: adapt(dropping_gpt2(), backbone_eval=False), self.native_in_train_mode):
            model = make()
            shake(model)
            assert not torch.allclose(train_output(model, dropping_gpt2()), outputs(model))
            assert all(module.training for module in model.modules())

    @staticmethod
    def native_in_train_mode():
        model = dropping_gpt2()
        model.add_adapter(LRegConfig(backbone_eval=False))
        return model

    def test_on_for_the_base_model_alone(self):
        model = adapt(dropping_gpt2())
        model.train()
        unloaded = model.unload()
        unloaded.train()
        assert not torch.allclose(train_output(unloaded, unloaded), outputs(unloaded))

    def test_on_while_a_native_adapter_is_disabled(self):
        model = dropping_gpt2()
        model.add_adapter(LRegConfig())
        model.disable_adapters()
        assert not torch.allclose(train_output(model, model), outputs(model))

    def test_off_inside_a_wrapped_block(self):
        model = adapt(dropping_gpt2(), target_modules=["mlp", "attn"])
        shake(model)
        assert torch.equal(train_output(model, dropping_gpt2()), outputs(model))

    def test_one_of_several_active_adapters_is_enough(self):
        model = adapt(dropping_gpt2(), "one", backbone_eval=False)
        model.add_adapter("two", LRegConfig(backbone_eval=True))
        assert not torch.allclose(train_output(model, dropping_gpt2()), outputs(model))
        model.base_model.set_adapter(["one", "two"])
        assert torch.equal(train_output(model, dropping_gpt2()), outputs(model))
        model.set_adapter("two")
        assert torch.equal(train_output(model, dropping_gpt2()), outputs(model))

    def test_every_call_of_train_and_eval(self):
        model = adapt(dropping_gpt2())
        base = model.get_base_model()
        for _ in range(2):
            model.train()
            assert model.training
            assert all(layer.training for layer in layers(model))
            frozen = [m for m in base.modules() if not isinstance(m, LRegLayer) and "Dict" not in type(m).__name__]
            assert not any(module.training for module in frozen)
            model.eval()
            assert not any(module.training for module in model.modules())

    def test_batch_norm_statistics_stay(self):
        base = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        model = adapt(base, target_modules=["0"])
        model.train()
        for _ in range(3):
            model(torch.randn(8, 4) + 5)
        assert torch.equal(base[1].running_mean, torch.zeros(6))
        assert base[1].num_batches_tracked == 0

    def test_modules_to_save_stay_in_train_mode(self):
        model = adapt(
            roberta("SEQ_CLS", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5), task_type="SEQ_CLS"
        )
        shake(model)
        model.train()
        head = model.get_base_model().classifier
        assert head.modules_to_save["default"].dropout.training
        assert not model.get_base_model().roberta.encoder.layer[0].attention.self.dropout.training
        seen = []
        model.get_base_model().roberta.register_forward_hook(lambda m, a, result: seen.append(result[0]))
        first, second = (model(**inputs(roberta("SEQ_CLS"))).logits for _ in range(2))
        assert torch.equal(*seen)
        assert not torch.allclose(first, second)


def checkpointed_calls(model: nn.Module) -> int:
    """How often a layer's attention runs in one training step: twice per layer if it is recomputed."""
    calls = []
    attention = [m for m in model.modules() if type(m).__name__ in ("GPT2Attention", "LlamaAttention", "BertAttention")]
    handles = [m.register_forward_pre_hook(lambda *_: calls.append(1)) for m in attention]
    gradients(model)
    for handle in handles:
        handle.remove()
    assert len(attention) == 2
    return len(calls) // len(attention)


def enable(model: nn.Module, use_reentrant: bool) -> None:
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})


def before_wrapping(base, wrap, use_reentrant):
    enable(base, use_reentrant)
    return wrap(base)


def after_wrapping(base, wrap, use_reentrant):
    model = wrap(base)
    enable(model, use_reentrant)
    return model


def after_train(base, wrap, use_reentrant):
    model = wrap(base)
    model.train()
    enable(model, use_reentrant)
    return model


def on_the_base_after_train(base, wrap, use_reentrant):
    model = wrap(base)
    model.train()
    enable(base, use_reentrant)
    return model


def native(base, wrap, use_reentrant):
    base.add_adapter(LRegConfig(target_modules=["mlp"]))
    shake(base)
    enable(base, use_reentrant)
    return base


class TestCheckpointing:
    @pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
    @pytest.mark.parametrize("order", [before_wrapping, after_wrapping, after_train, on_the_base_after_train, native])
    @pytest.mark.parametrize("builder", [dropping_gpt2, lambda: llama(attention_dropout=0.5)], ids=["gpt2", "llama"])
    def test_gradients_are_the_same_and_layers_are_recomputed(self, builder, order, use_reentrant):
        def wrap(base):
            model = adapt(base, target_modules=["mlp"], dof=4)
            shake(model)
            return model

        if order is native:
            plain = builder()
            plain.add_adapter(LRegConfig(target_modules=["mlp"]))
            shake(plain)
        else:
            plain = wrap(builder())
        expected = gradients(plain)
        assert checkpointed_calls(plain) == 1
        model = order(builder(), wrap, use_reentrant)
        if use_reentrant:
            model.enable_input_require_grads()  # as Trainer does: reentrant checkpoints need an input with a gradient
        found = gradients(model)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), name
        assert checkpointed_calls(model) == 2

    def test_dropout_inside_the_layer_itself_is_off(self):
        """OPT applies dropout in the forward of its layer, whose train flag asks for checkpointing."""
        model = adapt(build("opt", "CAUSAL_LM", dropout=0.5), target_modules=["fc1"])
        shake(model)
        expected = gradients(model)
        enable(model, False)
        found = gradients(model)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert any(module.training for module in model.get_base_model().model.decoder.layers)

    def test_switching_it_off_again(self):
        model = adapt(dropping_gpt2(), target_modules=["mlp"])
        shake(model)
        expected = gradients(model)
        enable(model, False)
        assert checkpointed_calls(model) == 2
        model.get_base_model().activation_checkpointing_disable()
        assert checkpointed_calls(model) == 1
        found = gradients(model)
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_backbone_in_train_mode_checkpoints_as_usual(self):
        model = adapt(gpt2(), target_modules=["mlp"], backbone_eval=False)
        enable(model, False)
        assert checkpointed_calls(model) == 2

    def test_copies(self):
        model = adapt(dropping_gpt2(), target_modules=["mlp"])
        shake(model)
        enable(model, False)
        expected = gradients(model)
        twin = copy.deepcopy(model)
        found = gradients(twin)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert checkpointed_calls(twin) == 2

    def test_unloading_leaves_checkpointing_as_it_was(self):
        base = dropping_gpt2()
        enable(base, False)
        functions = [block._gradient_checkpointing_func for block in base.transformer.h]
        model = adapt(base, target_modules=["mlp"])
        gradients(model)
        assert [block._gradient_checkpointing_func for block in base.transformer.h] != functions
        unloaded = model.unload()
        assert [block._gradient_checkpointing_func for block in unloaded.transformer.h] == functions

    def test_evaluation_does_not_recompute(self):
        model = adapt(dropping_gpt2(), target_modules=["mlp"])
        enable(model, False)
        gradients(model)
        model.eval()
        outputs(model)
        assert not any(module.training for module in model.modules())


class TestNoGraphThroughAFrozenBackbone:
    """Inputs that require gradients would send them through every layer; here nothing asks for them."""

    IDS = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))

    def adapted(self, **options):
        model = gpt2(use_cache=False)
        return get_peft_model(model, LRegConfig(init_weights=False, fused_loss=False, **options)).train()

    def step(self, model):
        """Whether the hidden states that reach the head carry a graph, and the gradients of a step."""
        carries = []
        head = model.get_base_model().lm_head
        hook = head.register_forward_pre_hook(lambda module, args: carries.append(args[0].requires_grad))
        model.zero_grad()
        model(input_ids=self.IDS, labels=self.IDS).loss.backward()
        hook.remove()
        return carries, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_with_checkpointing_switched_on(self, reentrant):
        model = self.adapted()
        carries, expected = self.step(model)
        assert carries == [False]
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        carries, gradients = self.step(model)
        assert carries == [False]
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name])
        assert torch.is_grad_enabled()

    def test_a_shortcut_inside_keeps_the_graph(self):
        carries, gradients = self.step(self.adapted(target_modules=["mlp", "lm_head"]))
        assert carries == [True]
        assert any(".mlp." in name for name in gradients)

    def test_embeddings_given_by_the_caller_get_their_gradient(self):
        model = self.adapted()
        embeddings = torch.randn(2, 8, HIDDEN, requires_grad=True)
        model(inputs_embeds=embeddings, labels=self.IDS).loss.backward()
        assert embeddings.grad.abs().sum() > 0

    def test_an_error_in_the_backbone_gives_gradients_back(self):
        with pytest.raises(IndexError):
            self.adapted()(input_ids=self.IDS + VOCABULARY)
        assert torch.is_grad_enabled()

    def test_where_somebody_has_switched_gradients_off_they_stay_off(self):
        with torch.no_grad():
            self.adapted()(input_ids=self.IDS)
            assert not torch.is_grad_enabled()
