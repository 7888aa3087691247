"""The fused loss inside models: the same training, without logits."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
import torch.utils.checkpoint
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import convert_to_fp32
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers import Trainer, TrainingArguments

from lreg_peft import LRegConfig, track_statistics
from lreg_peft.core import fused_loss as core_fused_loss
from lreg_peft.core.deferred import DeferredLogits
from lreg_peft.tuner.layer import LRegLayer

IDS = torch.randint(3, tiny.VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(0))
LABELS = IDS.clone()
LABELS[0, 4:] = -100
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": LABELS}
MODELS = {
    "gpt2": tiny.gpt2,
    "llama": tiny.llama,
    "roberta": tiny.roberta,
    "bert": lambda: tiny.build("bert", "MASKED_LM"),
    "roberta decoder": lambda: tiny.build("roberta", "CAUSAL_LM", is_decoder=True),
}


def adapted(base: nn.Module, *, fused_loss: bool, **options) -> nn.Module:
    torch.manual_seed(1)
    config = LRegConfig(init_weights=False, fused_loss=fused_loss, **options)
    return get_peft_model(base, config).train()


def twins(build, **options) -> tuple[nn.Module, nn.Module]:
    return adapted(build(), fused_loss=True, **options), adapted(build(), fused_loss=False, **options)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def is_deferred(output) -> bool:
    """Whether the logits of an output have not been computed."""
    logits = output["logits"]
    return type(logits) is DeferredLogits and logits._real is None and logits._state._values is None


def cross_entropy(logits: Tensor) -> Tensor:
    """As one would take it from the logits of an output."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())


def assert_same_training(fused: nn.Module, usual: nn.Module, batch: dict, **kwargs) -> None:
    losses = []
    for model in (fused, usual):
        model.zero_grad()
        output = model(**batch, **kwargs)
        losses.append(output.loss.detach())
        output.loss.backward()
        assert is_deferred(output) == (model is fused)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    mine, theirs = gradients(fused), gradients(usual)
    assert mine.keys() == theirs.keys()
    assert mine
    for name, gradient in mine.items():
        torch.testing.assert_close(
            gradient, theirs[name], rtol=1e-4, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("name", MODELS)
def test_same_loss_and_gradients(name):
    assert_same_training(*twins(MODELS[name], n_components=3, dof=5), BATCH)


@pytest.mark.parametrize("head", ["full", "reduced", "factored"])
def test_every_head(head):
    assert_same_training(*twins(tiny.gpt2, n_components=3, dof=12, head=head), BATCH)


def test_with_shortcuts_inside_the_network_too():
    assert_same_training(*twins(tiny.gpt2, target_modules=["mlp", "lm_head"], dof=3), BATCH)


def test_with_a_fixed_projection():
    assert_same_training(*twins(tiny.gpt2, train_projection=False), BATCH)


def test_with_the_number_of_items_that_trainer_passes():
    assert_same_training(*twins(tiny.gpt2), BATCH, num_items_in_batch=torch.tensor(40))


def test_two_active_adapters():
    models = twins(tiny.gpt2)
    for model, fused_loss in zip(models, (True, False), strict=True):
        torch.manual_seed(2)
        model.add_adapter("b", LRegConfig(init_weights=False, dof=4, head="factored", fused_loss=fused_loss))
        model.base_model.set_adapter(["default", "b"])
    assert_same_training(*models, BATCH)


def test_autocast_reaches_the_base_head():
    fused, usual = twins(tiny.gpt2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [model(**BATCH).loss for model in (fused, usual)]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
    assert losses[0].dtype == torch.float32


def test_autocast_leaves_double_precision_alone():
    outputs = []
    for model in twins(tiny.gpt2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(model.double()(**BATCH))
    fused, usual = outputs
    assert fused.loss.dtype == usual.loss.dtype
    assert fused.logits.dtype == usual.logits.dtype == torch.float64
    torch.testing.assert_close((fused.loss, fused.logits), (usual.loss, usual.logits))


def test_no_tensor_of_the_size_of_the_logits(monkeypatch):
    monkeypatch.setattr(core_fused_loss, "_CPU_ROWS", 4)

    class Largest(TorchDispatchMode):
        vocabulary_rows = 0

        @staticmethod
        def is_weight(tensor: Tensor) -> bool:
            return tensor.untyped_storage().data_ptr() in {p.untyped_storage().data_ptr() for p in fused.parameters()}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape[-1:] == (tiny.VOCABULARY,) and not self.is_weight(out):
                self.vocabulary_rows = max(self.vocabulary_rows, out.numel() // tiny.VOCABULARY)
            return out

    fused, usual = twins(tiny.gpt2, n_components=1)
    fused(**BATCH)  # asks the model how it computes its loss
    seen = []
    for model in (fused, usual):
        with Largest() as largest:
            model(**BATCH).loss.backward()
        seen.append(largest.vocabulary_rows)
    assert seen == [4, 30]


class TestWhereItDoesNotApply:
    def deferred(self, model: nn.Module, batch: dict = BATCH, **kwargs) -> bool:
        output = model(**batch, **kwargs)
        assert output.logits.shape[0] == 3
        return is_deferred(output)

    def test_evaluation_generation_and_calls_without_labels(self):
        model = adapted(tiny.gpt2(), fused_loss=True)
        assert self.deferred(model)
        without = model(input_ids=IDS).logits
        assert type(without) is Tensor
        assert without.shape == (3, 10, tiny.VOCABULARY)
        with torch.no_grad():
            assert not self.deferred(model)
        model.eval()
        assert not self.deferred(model)
        assert model.generate(input_ids=IDS[:1, :3], max_new_tokens=2, do_sample=False).shape == (1, 5)

    def test_disabled_adapters(self):
        model = adapted(tiny.gpt2(), fused_loss=True)
        with model.disable_adapter():
            assert not self.deferred(model)
        assert self.deferred(model)

    def test_an_adapter_elsewhere_or_another_output_head(self):
        assert not self.deferred(adapted(tiny.gpt2(), fused_loss=True, target_modules=["mlp"]))
        classifier = adapted(tiny.roberta("SEQ_CLS", num_labels=3), fused_loss=True, target_modules=["classifier"])
        assert not self.deferred(classifier, {"input_ids": IDS, "labels": torch.tensor([0, 1, 2])})

    def test_a_head_that_is_trained_itself(self):
        model = adapted(tiny.gpt2(), fused_loss=True)
        model.get_base_model().lm_head.base_layer.weight.requires_grad_(True)
        assert not self.deferred(model)

    def test_a_model_that_caps_its_logits(self):
        def build():
            return tiny.build("gemma2", "CAUSAL_LM", final_logit_softcapping=30.0)

        losses = [model(**BATCH).loss for model in twins(build)]
        assert losses[0].item() == losses[1].item()
        assert not self.deferred(adapted(build(), fused_loss=True))

    def test_a_head_that_reads_another_module(self):
        models = twins(tiny.gpt2, target_modules=["lm_head"], feature_source={"lm_head": "transformer.h.0"})
        torch.testing.assert_close(*(model(**BATCH).loss for model in models))
        assert not self.deferred(models[0])

    def test_dropout_of_the_adapter(self):
        """Two readings of the logits would have two masks."""
        for dropout in ({}, {"dropout": 0.5}):
            model = adapted(tiny.gpt2(), fused_loss=True, target_modules=["lm_head"])
            model.add_adapter("b", LRegConfig(target_modules=["lm_head"], init_weights=False, **dropout))
            model.base_model.set_adapter(["default", "b"])
            assert self.deferred(model) == (not dropout)
            output = model(**BATCH)
            torch.testing.assert_close(cross_entropy(output.logits * 1), output.loss)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_checkpoint_around_head_and_loss(self, reentrant):
        class Checkpointed(transformers.GPT2LMHeadModel):
            def forward(self, input_ids=None, labels=None, attention_mask=None, **kwargs):
                def loss(hidden):
                    return nn.functional.cross_entropy(self.lm_head(hidden).flatten(0, 1), labels.flatten())

                hidden = self.transformer(input_ids).last_hidden_state.requires_grad_()
                return {"loss": torch.utils.checkpoint.checkpoint(loss, hidden, use_reentrant=reentrant)}

        found = []
        for model in twins(lambda: Checkpointed(tiny.gpt2().config), task_type="CAUSAL_LM"):
            model.get_base_model().load_state_dict(tiny.gpt2().state_dict(), strict=False)
            model(**BATCH)["loss"].backward()
            found.append(gradients(model))
        assert found[1]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)

    def test_a_hook_on_a_weight_acts_once(self):
        found = []
        for model in twins(tiny.gpt2):
            weight = model.base_model.model.lm_head.lreg_coefficients["default"]
            weight.register_hook(lambda gradient: 2 * gradient)
            output = model(**BATCH)
            (output.loss + output.logits.square().mean()).backward()
            found.append(gradients(model))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)

    def test_unloading_leaves_no_hook(self):
        base = tiny.gpt2()
        before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in (base, base.transformer)]
        adapted(base, fused_loss=True).unload()
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in (base, base.transformer)] == before

    @pytest.mark.parametrize("error", [IndexError, KeyboardInterrupt])
    def test_an_error_in_the_forward_pass_leaves_the_model_usable(self, error):
        model, usual = twins(tiny.gpt2)

        def fail(module, args, output):
            raise error

        handle = model.get_base_model().transformer.h[1].register_forward_hook(fail)
        with pytest.raises(error):
            model(**BATCH)
        handle.remove()
        assert torch.is_grad_enabled()
        assert type(model(input_ids=IDS).logits) is Tensor
        logits = model(input_ids=IDS).logits  # and a loss of one's own
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())
        torch.testing.assert_close(loss, usual(**BATCH).loss)
        assert_same_training(model, usual, BATCH)


class TestItIsTheLossOfTheModel:
    """Whatever a model makes of its logits, training it is training it."""

    def check(self, change, build=tiny.gpt2, batch=BATCH, **kwargs) -> None:
        models = twins(build)
        results = []
        for model in models:
            change(model.get_base_model())
            model.zero_grad()
            output = model(**batch, **kwargs)
            output.loss.backward()
            results.append((output.loss.detach(), gradients(model)))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-6, atol=0)
        assert results[0][1].keys() == results[1][1].keys()
        for name, gradient in results[1][1].items():
            torch.testing.assert_close(results[0][1][name], gradient, rtol=1e-4, atol=1e-7)
        plain = adapted(build(), fused_loss=False)(**batch).loss.item()
        assert abs(results[0][0].item() - plain) > 1e-6  # the change is there to be seen

    @staticmethod
    def loss_function(function):
        def change(base):
            base.loss_function = function

        return change

    def test_weights_of_tokens(self):
        weight = torch.ones(tiny.VOCABULARY)
        weight[int(LABELS[2, 5])] = 20

        def weighted(logits, labels, vocab_size, **kwargs):
            return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), weight=weight)

        self.check(self.loss_function(weighted))

    @pytest.mark.parametrize("scale", [1e-2, 1e-5])
    def test_terms_beside_the_cross_entropy(self, scale):
        def with_entropy(logits, labels, vocab_size, **kwargs):
            logp = logits.log_softmax(-1)
            entropy = -(logp.exp() * logp).sum(-1).mean()
            own = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            return own - scale * entropy

        def with_z_loss(logits, labels, vocab_size, **kwargs):
            own = nn.functional.cross_entropy(logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1))
            return own + scale * logits.logsumexp(-1).square().mean()

        self.check(self.loss_function(with_entropy))
        self.check(self.loss_function(with_z_loss))

    def test_other_losses(self):
        functional = nn.functional
        for loss in (
            lambda x, y: functional.cross_entropy(x, y, label_smoothing=0.1),
            lambda x, y: functional.cross_entropy(x, y, reduction="sum"),
            lambda x, y: functional.cross_entropy(x, y, reduction="none").square().mean(),
            lambda x, y: functional.cross_entropy(x[:, :40], y % 40),
            lambda x, y: functional.cross_entropy(x.tanh(), y),
            lambda x, y: functional.cross_entropy(x / 2, y),
            lambda x, y: functional.nll_loss(x.log_softmax(1), y).exp(),
            lambda x, y: functional.cross_entropy(x[y != -100][3:], y[y != -100][3:]),
            lambda x, y: functional.cross_entropy(x.view(3, 9, -1).transpose(1, 2), y.view(3, 9), label_smoothing=0.2),
            lambda x, y: functional.cross_entropy(x, y, ignore_index=int(IDS[1, 3])) if (y >= 0).all() else x.sum(),
        ):

            def own(logits, labels, vocab_size, loss=loss, **kwargs):
                return loss(logits[..., :-1, :].contiguous().view(-1, vocab_size), labels[..., 1:].reshape(-1))

            self.check(self.loss_function(own))

    def test_a_loss_that_changes_after_the_first_step(self):
        models = twins(tiny.gpt2)
        losses = []
        for model in models:
            model(**BATCH)
            base = model.get_base_model()
            base.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.square().mean()
            losses.append(model(**BATCH).loss)
            base.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.mean()
            losses.append(model(**BATCH).loss)
        assert [loss.item() for loss in losses[:2]] == pytest.approx([loss.item() for loss in losses[2:]])

    def test_logits_written_to_before_the_loss(self):
        """As Chameleon forbids the tokens of images."""

        def forbidding(logits, labels, vocab_size, **kwargs):
            logits[:, :, 3:9] = -1e4
            labels = labels.clone()
            labels[(labels >= 3) & (labels < 9)] = -100
            return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

        def halving(logits, labels, vocab_size, **kwargs):
            logits *= 0.5
            logits.div_(1.5)
            return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

        self.check(self.loss_function(forbidding))
        self.check(self.loss_function(halving))

        def through_a_view(logits, labels, vocab_size, **kwargs):
            logits.view(-1, vocab_size).mul_(0.5)
            return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

        model = adapted(tiny.gpt2(), fused_loss=True)
        self.loss_function(through_a_view)(model.get_base_model())
        with pytest.raises(RuntimeError, match="fused_loss=False"):
            model(**BATCH)

    def test_router_losses(self):
        sizes = {**tiny._LLAMA_LIKE, "num_local_experts": 2, "num_experts_per_tok": 1}
        config = transformers.MixtralConfig(**sizes, output_router_logits=True, router_aux_loss_coef=0.05)

        def build():
            torch.manual_seed(3)
            return transformers.MixtralForCausalLM(config)

        losses = [model(**BATCH).loss.item() for model in twins(build)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        config.output_router_logits = False
        assert losses[0] != pytest.approx(adapted(build(), fused_loss=True)(**BATCH).loss.item(), rel=1e-4)

    def test_a_sequence_to_sequence_model_has_it_too(self):
        def build():
            return tiny.build("t5", "SEQ_2_SEQ_LM")

        assert_same_training(*twins(build, task_type="SEQ_2_SEQ_LM"), {"input_ids": IDS, "labels": LABELS})

    @pytest.mark.parametrize("name", ["opt", "gpt_neo", "qwen2"])
    def test_losses_written_in_other_ways(self, name):
        assert_same_training(*twins(lambda: tiny.build(name, "CAUSAL_LM")), BATCH)

    def test_a_subclass_with_another_name(self):
        class Mine(transformers.GPT2LMHeadModel):
            pass

        def build():
            model = Mine(tiny.gpt2().config)
            model.load_state_dict(tiny.gpt2().state_dict())
            return model.eval()

        assert_same_training(*twins(build, task_type="CAUSAL_LM"), BATCH)

    def test_tuples_and_shifted_labels(self):
        for options in ({"return_dict": False}, {"shift_labels": LABELS.roll(-1, 1)}):
            results = [model(**BATCH, **options) for model in twins(tiny.gpt2)]
            torch.testing.assert_close(results[0][0], results[1][0])
            torch.testing.assert_close(results[0][1], results[1][1])

    def test_batches_without_labels_that_count(self):
        batch = {**BATCH, "labels": torch.full_like(LABELS, -100)}
        for n_items in (None, torch.tensor(0), torch.tensor(7), 0):
            found = []
            for model in twins(tiny.gpt2, n_components=3):
                model.zero_grad()
                options = {} if n_items is None else {"num_items_in_batch": n_items}
                loss = model(**batch, **options).loss
                loss.backward()
                found.append((loss.detach(), gradients(model)))
            torch.testing.assert_close(found[0][0], found[1][0], equal_nan=True)
            for name, gradient in found[1][1].items():
                assert torch.equal(found[0][1][name], gradient)
                assert not gradient.any()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_other_precisions(self, dtype):
        for name, build in (("gpt2", tiny.gpt2), ("bert", MODELS["bert"])):
            fused, usual = (model.to(dtype) for model in twins(build))
            losses = [model(**BATCH).loss for model in (fused, usual)]
            assert losses[0].dtype == losses[1].dtype, name
            torch.testing.assert_close(*losses, rtol=1e-2 if dtype == torch.bfloat16 else 1e-7, atol=0)


class TestObjectsOfTheUser:
    def test_a_key_value_cache_grows_by_the_batch_and_no_more(self):
        for model in twins(tiny.gpt2):
            cache = transformers.DynamicCache()
            with torch.no_grad():
                model(input_ids=IDS[:, :4], past_key_values=cache)
            mask = torch.ones(3, 14, dtype=torch.long)
            model(input_ids=IDS, labels=LABELS, attention_mask=mask, past_key_values=cache)
            assert cache.get_seq_length() == 14

    def test_the_state_of_the_generator(self):
        states = []
        for model in twins(tiny.roberta):
            torch.manual_seed(5)
            model(**BATCH)
            states.append(torch.get_rng_state())
        assert torch.equal(*states)

    def test_running_statistics_in_the_head(self):
        def build():
            model = tiny.roberta(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
            model.lm_head.layer_norm = ChannelNorm(tiny.HIDDEN)
            return model

        seen = []
        for model in twins(build, backbone_eval=False):
            for _ in range(2):
                model(**BATCH).loss.backward()
            norm = model.get_base_model().lm_head.base_layer.layer_norm
            seen.append((norm.norm.running_mean, norm.norm.num_batches_tracked, gradients(model)))
        assert torch.equal(seen[0][0], seen[1][0])
        assert seen[0][1] == seen[1][1] == 2
        for name, gradient in seen[1][2].items():
            torch.testing.assert_close(seen[0][2][name], gradient, rtol=1e-4, atol=1e-7)


class ChannelNorm(nn.Module):
    """Mixes the rows of a batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, -2)).view_as(x)


def on_lora(*, fused_loss: bool) -> nn.Module:
    """With a LoRA adapter between the shortcut and the head."""
    torch.manual_seed(1)
    lora = get_peft_model(tiny.llama(), LoraConfig(target_modules=["lm_head"], init_lora_weights=False, r=2))
    with pytest.warns(UserWarning, match="for a second time|Already found a `peft_config`"):
        return adapted(lora.get_base_model(), fused_loss=fused_loss, task_type="CAUSAL_LM")


class TestTheHeadHasCompany:
    def losses(self, change) -> list[Tensor]:
        models = twins(tiny.gpt2)
        for model in models:
            change(model.get_base_model().lm_head)
        return [model(**BATCH).loss for model in models]

    def test_hooks_act(self):
        def cap(head):
            head.register_forward_hook(lambda module, args, output: output.tanh())

        def shrink(head):
            head.register_forward_pre_hook(lambda module, args: (args[0] / 3,))

        def inside(head):
            head.base_layer.register_forward_hook(lambda module, args, output: output / 3)

        plain = self.losses(lambda head: None)[1]
        for change in (cap, shrink, inside):
            losses = self.losses(change)
            assert losses[0].item() == losses[1].item() != plain.item()

    def test_hooks_see_logits(self):
        seen = []
        model = adapted(tiny.gpt2(), fused_loss=True)
        model.get_base_model().lm_head.register_forward_hook(lambda module, args, output: seen.append(output))
        model(**BATCH)
        assert seen[0].shape == (3, 10, tiny.VOCABULARY)
        assert type(seen[0]) is Tensor

    def test_hooks_on_all_modules(self):
        seen = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, output: seen.append(output) if isinstance(module, LRegLayer) else None
        )
        try:
            adapted(tiny.gpt2(), fused_loss=True)(**BATCH)
        finally:
            handle.remove()
        assert [type(output) for output in seen] == [Tensor]

    def test_backward_hooks(self):
        seen = []
        model = adapted(tiny.gpt2(), fused_loss=True, target_modules=["mlp", "lm_head"])
        head = model.get_base_model().lm_head
        head.register_full_backward_hook(lambda module, before, after: seen.append(after[0].shape))
        model(**BATCH).loss.backward()
        assert seen == [(3, 10, tiny.VOCABULARY)]

    def test_an_adapter_of_another_method_inside_gets_its_gradient(self):
        found = []
        for fused_loss in (True, False):
            model = on_lora(fused_loss=fused_loss)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("lreg_" in name or "lora_" in name)
            model(**BATCH).loss.backward()
            found.append(gradients(model))
        assert any("lora_" in name for name in found[1])
        assert found[0].keys() == found[1].keys()
        for name, gradient in found[1].items():
            torch.testing.assert_close(found[0][name], gradient, rtol=1e-4, atol=1e-7)

    def test_an_adapter_of_another_method_inside_has_its_part_in_the_loss(self):
        losses = [on_lora(fused_loss=fused_loss)(**BATCH).loss.item() for fused_loss in (True, False)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        assert losses[0] != pytest.approx(adapted(tiny.llama(), fused_loss=True)(**BATCH).loss.item(), rel=1e-4)

    def test_a_trainable_vector_that_is_no_parameter(self):
        class Shifted(nn.Linear):
            shift = None

            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x + self.shift)

        grads = []
        for model in twins(tiny.gpt2):
            linear = model.get_base_model().lm_head.base_layer
            linear.__class__ = Shifted
            linear.shift = torch.zeros(tiny.HIDDEN, requires_grad=True)
            model(**BATCH).loss.backward()
            grads.append(linear.shift.grad)
        torch.testing.assert_close(*grads)

    def test_linear_layers_that_are_replaced_as_a_class(self, monkeypatch):
        """As simulators of quantisation do."""
        plain = self.losses(lambda head: None)[1]
        forward = nn.Linear.forward
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (4 * forward(self, x)).round() / 4)
        losses = self.losses(lambda head: None)
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
        assert abs(losses[0].item() - plain.item()) > 1e-4

    def test_weights_that_are_no_plain_tensors(self):
        class Quantised(Tensor):
            """Knows nothing but a linear layer's product."""

            @staticmethod
            def __new__(cls, weight):
                return Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

            def __init__(self, weight):
                self.weight = weight

            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                if func is nn.functional.linear:
                    return func(args[0], args[1].weight, *args[2:])
                return super().__torch_function__(func, types, args, kwargs or {})

            @classmethod
            def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
                if func is torch.ops.aten.detach.default:
                    return cls(args[0].weight)
                raise NotImplementedError(func)

        losses = []
        for model in twins(lambda: tiny.llama(tie_word_embeddings=False)):
            linear = model.get_base_model().lm_head.base_layer
            linear.weight = nn.Parameter(Quantised(linear.weight.detach()), requires_grad=False)
            losses.append(model(**BATCH).loss)
        assert losses[0].item() == losses[1].item()


class TestLogitsOnDemand:
    def pair(self):
        return [model(**BATCH) for model in twins(tiny.gpt2, n_components=3)]

    def test_they_are_the_usual_ones_and_carry_gradients(self):
        fused, usual = twins(tiny.gpt2, n_components=3)
        outputs = [model(**BATCH) for model in (fused, usual)]
        assert is_deferred(outputs[0])
        torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
        assert outputs[0].logits is outputs[0].logits
        for output in outputs:
            output.logits.square().mean().backward()
        for name, gradient in gradients(usual).items():
            torch.testing.assert_close(gradients(fused)[name], gradient, rtol=1e-4, atol=1e-7)

    def test_second_derivatives(self):
        found = []
        for model in twins(tiny.gpt2, n_components=3):
            (first,) = torch.autograd.grad(
                model(**BATCH).logits.square().mean(),
                [p for n, p in model.named_parameters() if "projection.default" in n],
                create_graph=True,
            )
            model.zero_grad()
            first.square().sum().backward()
            found.append(gradients(model))
        for name, gradient in found[1].items():
            torch.testing.assert_close(found[0][name], gradient, rtol=1e-3, atol=1e-7)

    def test_the_output_is_the_model_s_own(self):
        fused, usual = self.pair()
        assert type(fused) is type(usual)
        assert list(fused) == list(usual)
        assert fused[0] is fused.loss is fused["loss"]
        for get in (
            lambda o: o.get("logits"),
            lambda o: o["logits"],
            lambda o: o[:2][1],
            lambda o: o[1],
            lambda o: o.to_tuple()[1],
            lambda o: dict(o.items())["logits"],
            lambda o: list(o.values())[1],
            lambda o: copy.copy(o).logits,
            lambda o: type(o)(dict(o)).logits,
            lambda o: pickle.loads(pickle.dumps(o)).logits,
            lambda o: tree_map(lambda leaf: leaf, dict(o))["logits"],
            lambda o: tree_map(lambda leaf: leaf * 2 if isinstance(leaf, Tensor) else leaf, o).logits / 2,
            lambda o: convert_to_fp32(o).logits,
        ):
            torch.testing.assert_close(get(fused), get(usual))

    def test_what_one_does_with_tensors(self, tmp_path):
        fused, usual = (output.logits for output in self.pair())
        assert fused.shape == usual.shape
        assert (fused.dtype, fused.device, fused.requires_grad, fused.is_leaf, fused.ndim, len(fused)) == (
            usual.dtype, usual.device, True, False, 3, 3,
        )  # fmt: skip
        for do in (
            lambda t: t.argmax(-1),
            lambda t: t.detach().numpy(),
            lambda t: t[0, -1, :5],
            lambda t: t[:, -1],
            lambda t: t[torch.arange(3), torch.tensor([1, 2, 3])],
            lambda t: t[LABELS != -100],
            lambda t: t.view(-1, tiny.VOCABULARY)[4],
            lambda t: t.reshape(30, -1).softmax(-1),
            lambda t: t.flatten(0, 1).double(),
            lambda t: t.to(torch.bfloat16),
            lambda t: t.float().cpu().tolist(),
            lambda t: torch.cat([t, t]),
            lambda t: torch.stack(list(t)),
            lambda t: t.gather(-1, IDS.unsqueeze(-1)),
            lambda t: 2 * t - 1,
            lambda t: t.data.clone(),
            lambda t: t.split(4, dim=1)[1],
            lambda t: t.transpose(1, 2).contiguous(),
            lambda t: t.unsqueeze(0).expand(2, -1, -1, -1),
            lambda t: repr(t.detach()),
            lambda t: torch.compile(torch.log_softmax, backend="eager")(t.detach(), -1),
        ):
            mine, theirs = do(fused), do(usual)
            if isinstance(theirs, Tensor):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
                assert mine.requires_grad == theirs.requires_grad
        torch.save(fused, tmp_path / "logits.pt")
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt").detach(), usual.detach())

    def test_autograd_functions_and_gradients_in_logits(self):
        class Double(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return 2 * x

            @staticmethod
            def backward(ctx, gradient):
                return 2 * gradient

        found = []
        for model in twins(tiny.gpt2):
            output = model(**BATCH)
            Double.apply(output.logits).square().mean().backward()
            found.append(gradients(model))
        for name, gradient in found[1].items():
            torch.testing.assert_close(found[0][name], gradient, rtol=1e-4, atol=1e-7)
        output = adapted(tiny.gpt2(), fused_loss=True)(**BATCH)
        for ask in (
            lambda: torch.autograd.grad(output.loss, output.logits),
            output.logits.retain_grad,
            lambda: output.logits.register_hook(print),
        ):
            with pytest.raises(RuntimeError, match="fused_loss=False"):
                ask()

    def test_asked_for_without_gradients_first(self):
        fused, usual = twins(tiny.gpt2)
        outputs = [model(**BATCH) for model in (fused, usual)]
        for output in outputs:
            with torch.no_grad():
                assert not output.logits.argmax(-1).requires_grad
                assert not (output.logits * 1).requires_grad
            output.logits.square().mean().backward()
        for name, gradient in gradients(usual).items():
            torch.testing.assert_close(gradients(fused)[name], gradient, rtol=1e-4, atol=1e-7)

    def test_those_of_the_forward_pass_after_a_step(self):
        fused, usual = twins(tiny.gpt2, n_components=3)
        outputs = [model(**BATCH) for model in (fused, usual)]
        for model, output in zip((fused, usual), outputs, strict=True):
            output.loss.backward()
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
        torch.testing.assert_close(outputs[0].logits.detach(), outputs[1].logits.detach())
        torch.testing.assert_close(outputs[0].logits.argmax(-1), outputs[1].logits.argmax(-1))
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation|fused_loss=False"):
            outputs[0].logits.sum().backward()
        assert not torch.allclose(fused(**BATCH).logits, outputs[1].logits)

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: m.get_base_model().lm_head.lreg_coefficients["default"].data.add_(1.0),
            lambda m: m.get_base_model().lm_head.lreg_nodes["default"].pow_(1.5),
            lambda m: m.base_model.disable_adapter_layers(),
            lambda m: m.add_adapter("b", LRegConfig(init_weights=False)) or m.set_adapter("b"),
            lambda m: m.eval(),
            lambda m: m.unload(),
        ],
    )
    def test_those_of_the_forward_pass_after_other_changes(self, change):
        fused, usual = twins(tiny.gpt2, n_components=3)
        outputs = [model(**BATCH) for model in (fused, usual)]
        change(fused)
        torch.testing.assert_close(outputs[0].logits.detach(), outputs[1].logits.detach())

    def test_a_loss_of_them_is_that_of_the_forward_pass(self):
        """Whatever has happened to the model between the two."""

        def step(model):
            cross_entropy(model(**BATCH).logits).backward()
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()

        def replace(model):
            weights = model.get_base_model().lm_head.lreg_coefficients
            weights["default"] = nn.Parameter(torch.zeros_like(weights["default"]))

        for change in (
            step,
            replace,
            lambda m: m.get_base_model().lm_head.lreg_coefficients["default"].data.mul_(3.0),
            lambda m: m.base_model.disable_adapter_layers(),
            lambda m: m.add_adapter("b", LRegConfig(init_weights=False)) or m.set_adapter("b"),
        ):
            losses = []
            for model in twins(tiny.gpt2):
                output = model(**BATCH)
                change(model)
                losses.append(cross_entropy(output.logits).detach())
            torch.testing.assert_close(*losses)

    def test_their_gradient_goes_to_the_weights_of_the_forward_pass(self):
        def disabled(model, logits):
            with model.disable_adapter():
                return cross_entropy(logits), logits.square().mean()

        def replaced(model, logits):
            weights = model.get_base_model().lm_head.lreg_coefficients
            weights["default"] = nn.Parameter(torch.zeros_like(weights["default"]))
            return cross_entropy(logits), logits.square().mean()

        for change in (disabled, replaced):
            found = []
            for model in twins(tiny.gpt2):
                then = [p for p in model.parameters() if p.requires_grad]
                losses = change(model, model(**BATCH).logits)
                sum(losses).backward()
                found.append([*losses, *(p.grad for p in then)])
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)

    def test_weights_that_are_there_for_one_call(self):
        found = []
        for model in twins(tiny.gpt2):
            given = {name: (3 * p).detach().requires_grad_("lreg_" in name) for name, p in model.named_parameters()}
            output = torch.func.functional_call(model, given, (), BATCH)
            losses = (output.loss, cross_entropy(output.logits), output.logits.square().mean())
            sum(losses).backward()
            assert not gradients(model)
            found.append([*losses, *(p.grad for p in given.values() if p.requires_grad)])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)

    def test_weights_that_are_not_finite(self):
        model = adapted(tiny.gpt2(), fused_loss=True)
        model.get_base_model().lm_head.lreg_coefficients["default"].data.fill_(torch.nan)
        output = model(**BATCH)
        output.loss.backward()
        assert is_deferred(output)
        assert output.loss.isnan()

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: m.delete_adapter("default"),
            lambda m: m.get_base_model().transformer.wte.weight.mul_(2.0),
        ],
    )
    def test_one_sentence_where_they_are_lost(self, change):
        model = adapted(tiny.gpt2(), fused_loss=True)
        output = model(**BATCH)
        change(model)
        sentence = r"since then\. Read them before, or set LRegConfig\(fused_loss=False\)"
        for read in (lambda logits: logits.argmax(-1), cross_entropy):
            with pytest.raises(RuntimeError, match=sentence):
                read(output.logits)

    @pytest.mark.parametrize("options", [{"find_unused_parameters": True}, {"static_graph": True}, {}])
    def test_under_ddp(self, tmp_path, options):
        fused, usual = twins(tiny.gpt2)
        expected = usual(**BATCH)
        expected.loss.backward()
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(fused, **options)
            for _ in range(2):
                fused.zero_grad()
                output = parallel(**BATCH)
                output.loss.backward()
                torch.testing.assert_close(output.logits, expected.logits)
        finally:
            torch.distributed.destroy_process_group()
        for name, gradient in gradients(usual).items():
            torch.testing.assert_close(gradients(fused)[name], gradient, rtol=1e-4, atol=1e-7)

    def test_with_mixed_precision(self):
        AcceleratorState._reset_state(reset_partial_state=True)  # of a Trainer in another test
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        outputs = [accelerator.prepare(model)(**BATCH) for model in twins(tiny.gpt2)]
        torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-2, atol=0)
        assert outputs[0].logits.dtype == outputs[1].logits.dtype == torch.float32
        torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=2e-2, atol=2e-2)
        AcceleratorState._reset_state(reset_partial_state=True)


def test_compiled_models_compute_the_usual_loss():
    torch._dynamo.reset()
    model = adapted(tiny.llama(), fused_loss=True)
    output = torch.compile(model, backend="eager", fullgraph=True)(**BATCH)
    assert type(output.logits) is Tensor
    torch.testing.assert_close(output.loss, model(**BATCH).loss, rtol=1e-5, atol=0)


def test_statistics_are_those_of_the_usual_loss():
    sums = []
    for fused_loss in (True, False):
        for train_projection in (True, False):
            model = adapted(tiny.roberta(), fused_loss=fused_loss, dof=4, train_projection=train_projection)
            track_statistics(model, n_rows=6)
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
            model(**{**BATCH, "labels": IDS}).loss.backward()  # every row has a label, so both pick the same ones
            optimizer.step()
            layer = next(m for m in model.modules() if isinstance(m, LRegLayer))
            sums.append(layer.lreg_statistics["default"].read(layer.lreg_nodes["default"]).tensors())
    assert sums[0][0].sum() > 0
    assert sums[0][2].any()
    for mine, theirs in zip(sums[:2], sums[2:], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}, {"label_smoothing_factor": 0.1}])
def test_trainer_takes_the_same_steps(options, tmp_path):
    data = [{name: value[i] for name, value in BATCH.items()} for i in (0, 1, 2, 1, 2, 0, 1, 2)]
    losses = []
    for model in twins(tiny.gpt2):
        arguments = TrainingArguments(
            tmp_path, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
            report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, learning_rate=1e-2, **options,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # rounded in the log


def test_two_threads_do_not_disturb_each_other():
    """Neither a pass without a loss nor one with another ends what a slow one has begun."""
    model = adapted(tiny.gpt2(), fused_loss=True)
    begun, go_on = threading.Event(), threading.Event()
    main = threading.get_ident()

    def wait(module, args):
        if threading.get_ident() != main:
            begun.set()
            assert go_on.wait(10)

    model.get_base_model().transformer.ln_f.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(lambda: model(**BATCH))
        assert begun.wait(10)
        with torch.no_grad():
            assert type(model(**BATCH).logits) is Tensor
        assert type(model(input_ids=IDS).logits) is Tensor
        assert is_deferred(model(**BATCH))
        go_on.set()
        assert is_deferred(slow.result())


def test_a_copy_of_a_model_trains():
    model = adapted(tiny.gpt2(), fused_loss=True)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(**BATCH).loss, model(**BATCH).loss)
    assert twin.get_base_model().lm_head.in_thread.loss_request is None
