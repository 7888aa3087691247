"""The frozen model stays in eval mode while the adapter trains, with gradient checkpointing or without."""

import copy
import functools

import pytest
import torch
import transformers
from peft import PrefixTuningConfig, get_peft_model
from tiny import HIDDEN, VOCABULARY, adapt, build, gpt2, gradients, inputs, layers, llama, outputs, roberta, shake
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

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

    def test_an_interruption_in_the_backbone_gives_gradients_back(self):
        def interrupt(module, args):
            raise KeyboardInterrupt

        model = self.adapted()
        model.enable_input_require_grads()
        handle = model.get_base_model().transformer.h[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=self.IDS, labels=self.IDS)
        handle.remove()
        assert torch.is_grad_enabled()
        assert self.step(model)[1]

    def test_where_somebody_has_switched_gradients_off_they_stay_off(self):
        with torch.no_grad():
            self.adapted()(input_ids=self.IDS)
            assert not torch.is_grad_enabled()


def asked_for(model: nn.Module, reentrant: bool | None) -> None:
    """As Trainer does for checkpointing, or the preparation of a quantised model without it."""
    model.enable_input_require_grads()
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train()


class TestGradientsThatSomebodyWants:
    """With the request for gradients on the embeddings or without it: what trains gets its gradient."""

    IDS = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
    ways = pytest.mark.parametrize("reentrant", [None, False, True])

    def adapted(self, base=None):
        torch.manual_seed(1)
        return get_peft_model(
            base or gpt2(use_cache=False), LRegConfig(init_weights=False, task_type="CAUSAL_LM")
        ).train()

    def test_keys_of_a_prefix(self):
        found = []
        for request in (False, True):
            model = self.adapted()
            if request:
                model.enable_input_require_grads()
            keys = [torch.ones(2, 2, 3, HIDDEN // 2).requires_grad_() for _ in range(4)]
            cache = transformers.DynamicCache()
            for i in range(2):
                cache.update(keys[2 * i], keys[2 * i + 1], i)
            mask = torch.ones(2, 11, dtype=torch.long)
            model(input_ids=self.IDS, labels=self.IDS, attention_mask=mask, past_key_values=cache).loss.backward()
            found.append([key.grad for key in keys])
        assert all(grad.any() for grad in found[0][:2])
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs)

    def test_prefix_tuning_on_top(self):
        base = gpt2()
        base.add_adapter(LRegConfig(init_weights=False))
        with pytest.warns(UserWarning, match="for a second time|Already found a `peft_config`"):
            model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).train()
        model(input_ids=self.IDS, labels=self.IDS).loss.backward()
        prompts = [p for name, p in model.named_parameters() if "prompt_encoder" in name]
        assert prompts
        assert all(p.grad is not None and p.grad.any() for p in prompts)

    @ways
    def test_a_vector_that_a_hook_adds(self, reentrant):
        found = []
        for request in (False, True):
            model = self.adapted()
            if request:
                asked_for(model, reentrant)
            vectors = [torch.zeros(HIDDEN, requires_grad=True) for _ in range(3)]
            body = model.get_base_model().transformer
            for module, vector in zip((body.wte, body.h[0].mlp, body.h[1]), vectors, strict=True):
                module.register_forward_hook(lambda m, args, output, vector=vector: output + vector)
            model(input_ids=self.IDS, labels=self.IDS).loss.backward()
            found.append([vector.grad for vector in vectors])
        for mine, theirs in zip(*found, strict=True):
            assert theirs.any()
            torch.testing.assert_close(mine, theirs)

    @ways
    def test_a_vector_that_a_module_holds(self, reentrant):
        class Steered(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner
                self.vector = torch.zeros(HIDDEN, requires_grad=True)  # no parameter

            def forward(self, x):
                return self.inner(x) + self.vector

        found = []
        for request in (False, True):
            base = gpt2(use_cache=False)
            base.transformer.h[0].mlp = Steered(base.transformer.h[0].mlp)
            model = self.adapted(base)
            if request:
                asked_for(model, reentrant)
            model(input_ids=self.IDS, labels=self.IDS).loss.backward()
            found.append(base.transformer.h[0].mlp.vector.grad)
        assert found[0].any()
        torch.testing.assert_close(*found)

    @ways
    def test_the_backbone_in_train_mode_gets_no_graph_either(self, reentrant):
        model = get_peft_model(
            gpt2(use_cache=False, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0), LRegConfig(backbone_eval=False)
        )
        asked_for(model, reentrant)
        carries = []
        model.get_base_model().lm_head.register_forward_pre_hook(lambda m, args: carries.append(args[0].requires_grad))
        model(input_ids=self.IDS, labels=self.IDS).loss.backward()
        assert carries == [False]
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    def test_unloading_takes_the_cut_away(self):
        model = self.adapted()
        asked_for(model, False)
        model(input_ids=self.IDS, labels=self.IDS)
        base = model.unload()
        assert base(input_ids=self.IDS).logits.requires_grad


class TestWhatIsNotDropout:
    IDS = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))

    def noisy(self, model):
        """Whether two passes differ."""
        with torch.no_grad():
            first, second = (model(input_ids=self.IDS).logits for _ in range(2))
        return not torch.equal(first, second)

    @pytest.mark.parametrize("builder", [dropping_gpt2, lambda: llama(attention_dropout=0.5)])
    def test_noise_on_the_embeddings_acts(self, builder):
        for wrap in (self.peft, self.native):
            model = wrap(builder())
            model.train()
            assert not self.noisy(model)
            handle = activate_neftune(model, 5.0)
            assert self.noisy(model)
            model.train()
            assert self.noisy(model)
            model.eval()
            assert not self.noisy(model)
            model.train()
            deactivate_neftune(model, handle)
            assert not self.noisy(model)
            assert not any(m.training for m in model.modules() if isinstance(m, (nn.Dropout, nn.Embedding)))

    @staticmethod
    def peft(base):
        return adapt(base, task_type="CAUSAL_LM")

    @staticmethod
    def native(base):
        base.add_adapter(LRegConfig())
        return base

    @pytest.mark.parametrize("alpha", [None, 5.0])
    def test_in_trainer(self, alpha, tmp_path):
        data = [{"input_ids": row, "labels": row} for row in self.IDS]
        losses = []
        for seed in (1, 2):
            arguments = TrainingArguments(
                tmp_path, max_steps=1, per_device_train_batch_size=2, logging_steps=1, report_to="none", seed=seed,
                save_strategy="no", use_cpu=True, disable_tqdm=True, neftune_noise_alpha=alpha,
            )  # fmt: skip
            trainer = Trainer(adapt(dropping_gpt2(), task_type="CAUSAL_LM"), arguments, train_dataset=data)
            losses.append(trainer.train().training_loss)
        assert (losses[0] == pytest.approx(losses[1], rel=1e-5)) == (alpha is None)

    def test_noise_of_other_hooks(self):
        def jitter(module, args):
            return (args[0] + torch.randn_like(args[0]) if module.training else args[0],)

        class Jitter:
            def __call__(self, module, args):
                return jitter(module, args) if module.training else None

        for hook in (jitter, Jitter(), functools.partial(jitter)):
            model = adapt(dropping_gpt2())
            model.get_base_model().transformer.ln_f.register_forward_pre_hook(hook)
            model.train()
            assert self.noisy(model)

    def test_a_module_with_dropout_of_its_own_stays_in_eval_mode_and_that_is_said(self, caplog):
        def jitter(module, args, output):
            return (output[0] + torch.randn_like(output[0]), *output[1:]) if module.training else output

        model = adapt(build("opt", "CAUSAL_LM", dropout=0.5), task_type="CAUSAL_LM")
        model.get_base_model().model.decoder.layers[0].register_forward_hook(jitter)
        model.train()
        with caplog.at_level("WARNING", logger="lreg_peft.tuner.hooks.backbone"):
            assert not self.noisy(model)
        assert "hooks on 'model.decoder.layers.0' ask whether the module trains" in caplog.text

    def test_what_is_off_is_said_once(self, caplog):
        model = adapt(dropping_gpt2()).train()
        with caplog.at_level("WARNING", logger="lreg_peft.tuner.hooks.backbone"):
            for _ in range(2):
                outputs(model)
                model(**inputs("gpt2"))
        said = [record.message for record in caplog.records if "backbone_eval" in record.message]
        assert len(said) == 1
        assert "attn_dropout (p=0.5)" in said[0]
        caplog.clear()
        with caplog.at_level("WARNING", logger="lreg_peft.tuner.hooks.backbone"):
            for quiet in (adapt(gpt2(**dict.fromkeys(DROPOUT, 0.0))), adapt(dropping_gpt2(), backbone_eval=False)):
                quiet.train()(**inputs("gpt2"))
        assert "backbone_eval" not in caplog.text
