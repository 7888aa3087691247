"""The loss in chunks: the same training without logits, refused where the model has another loss."""

import threading

import pytest
import tiny
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from lreg_peft import LRegConfig

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
    "t5": lambda: tiny.build("t5", "SEQ_2_SEQ_LM", scale_decoder_outputs=False),
}
REFUSED = r"fused_loss=True computes the mean cross-entropy .*another one: .*Leave fused_loss out"


def adapted(base: nn.Module, *, fused_loss: bool, **options) -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(
        base, LRegConfig(preset="paper", init_weights=False, fused_loss=fused_loss, **options)
    ).train()


def twins(build=tiny.gpt2, **options) -> tuple[nn.Module, nn.Module]:
    return adapted(build(), fused_loss=True, **options), adapted(build(), fused_loss=False, **options)


def step(model: nn.Module, batch: dict, **kwargs) -> tuple[Tensor, dict[str, Tensor], object]:
    model.zero_grad()
    output = model(**batch, **kwargs)
    output.loss.backward()
    return output.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, output


def assert_same_training(fused: nn.Module, usual: nn.Module, batch: dict = BATCH, **kwargs) -> None:
    """In the first step, in which the losses are compared, and in those after it, which have no logits."""
    expected, theirs, output = step(usual, batch, **kwargs)
    assert output.logits.shape[-1] == tiny.VOCABULARY
    for is_first in (True, False):
        loss, mine, output = step(fused, batch, **kwargs)
        assert (output.logits is None) != is_first
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        assert mine.keys() == theirs.keys()
        assert mine
        for name, gradient in mine.items():
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", MODELS)
def test_same_loss_and_gradients(name):
    assert_same_training(*twins(MODELS[name], n_components=3, n_nodes=5))


@pytest.mark.parametrize("weighting", tiny.WEIGHTINGS.values(), ids=tiny.WEIGHTINGS)
def test_every_head(weighting):
    assert_same_training(*twins(n_components=3, n_nodes=12, **weighting))


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["mlp", "lm_head"], "n_nodes": 3}, {"train_projection": False}],
    ids=["inside", "fixed"],
)
def test_other_placements(options):
    assert_same_training(*twins(**options))


def test_with_the_number_of_items_that_trainer_passes():
    assert_same_training(*twins(), num_items_in_batch=torch.tensor(40))


def test_two_active_adapters_and_a_scale():
    models = twins()
    for model, fused_loss in zip(models, (True, False), strict=True):
        torch.manual_seed(2)
        model.add_adapter(
            "b", LRegConfig(preset="paper", init_weights=False, n_nodes=4, weighting="factored", fused_loss=fused_loss)
        )
        model.base_model.set_adapter(["default", "b"])
        tiny.layers(model)[0].set_scale("b", 0.5)
    assert_same_training(*models)


def test_autocast_reaches_the_base_head():
    fused, usual = twins()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = usual(**BATCH).loss
        for _ in range(2):
            loss = fused(**BATCH).loss
            torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
            assert loss.dtype == torch.float32


def test_a_model_in_double_precision():
    # The loss of Transformers' models is fp32 all the same, so that the two agree to that.
    fused, usual = (model.double() for model in twins())
    _, theirs, _ = step(usual, BATCH)
    step(fused, BATCH)
    _, mine, output = step(fused, BATCH)
    assert output.logits is None
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_no_tensor_of_the_size_of_the_logits():
    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape[-1:] == (vocabulary,) and out.ndim == 2:
                self.rows = max(self.rows, out.shape[0])
            return out

    # So many that the rows of a chunk are fewer than those of the batch, and that no weight has as many.
    vocabulary, ids = 3001, IDS.repeat(100, 4)[:, :40]
    seen = []
    for fused_loss in (True, False):
        model = adapted(tiny.gpt2(vocab_size=vocabulary), fused_loss=fused_loss, n_components=1)
        model(input_ids=ids[:2], labels=ids[:2])
        with Largest() as largest:
            model(input_ids=ids, labels=ids).loss.backward()
        seen.append(largest.rows)
    assert seen[0] <= seen[1] / 4


class TestLogitsAreThere:
    def model(self, **options):
        model = adapted(tiny.gpt2(), fused_loss=True, **options)
        model(**BATCH)
        assert model(**BATCH).logits is None
        return model

    def test_in_evaluation_generation_and_calls_without_labels(self):
        model = self.model()
        assert model(input_ids=IDS).logits.shape == (3, 10, tiny.VOCABULARY)
        with torch.no_grad():
            assert model(**BATCH).logits.shape == (3, 10, tiny.VOCABULARY)
        model.eval()
        assert model(**BATCH).logits.shape == (3, 10, tiny.VOCABULARY)
        assert model.generate(input_ids=IDS[:1, :3], max_new_tokens=2, do_sample=False).shape == (1, 5)

    def test_while_disabled(self):
        model = self.model()
        with model.disable_adapter():
            assert model(**BATCH).logits.shape == (3, 10, tiny.VOCABULARY)

    def test_with_an_adapter_that_did_not_ask_for_it(self):
        model = self.model()
        model.add_adapter("b", LRegConfig(preset="paper", init_weights=False))
        model.set_adapter("b")
        assert model(**BATCH).logits is not None
        model.set_adapter("default")
        assert model(**BATCH).logits is None

    def test_after_an_error(self):
        model = self.model()
        handle = model.get_base_model().transformer.h[1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**BATCH)
        handle.remove()
        assert model(input_ids=IDS).logits.shape == (3, 10, tiny.VOCABULARY)
        assert model(**BATCH).logits is None

    def test_without_an_output_layer(self):
        model = adapted(tiny.gpt2(), fused_loss=True, target_modules=["mlp"])
        for _ in range(2):
            assert model(**BATCH).logits is not None


class TestRefused:
    def test_softcaps(self):
        model = adapted(tiny.build("gemma2", "CAUSAL_LM", final_logit_softcapping=3.0), fused_loss=True)
        for _ in range(2):
            with pytest.raises(ValueError, match=REFUSED):
                model(**BATCH)

    @pytest.mark.parametrize(
        "loss",
        [
            lambda x, y: nn.functional.cross_entropy(x, y, label_smoothing=0.1),
            lambda x, y: nn.functional.cross_entropy(x, y, reduction="sum"),
            lambda x, y: nn.functional.cross_entropy(x, y, weight=torch.arange(1.0, 62)),
            lambda x, y: nn.functional.cross_entropy(x / 2, y),
            lambda x, y: nn.functional.cross_entropy(x, y) + 1e-3 * x.logsumexp(-1).square().mean(),
        ],
        ids=["smoothed", "sum", "weighted", "temperature", "z-loss"],
    )
    def test_losses_of_ones_own(self, loss):
        model = adapted(tiny.gpt2(), fused_loss=True)

        def own(logits, labels, vocab_size, **kwargs):
            return loss(logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1))

        model.get_base_model().loss_function = own
        before = tiny.state(model)
        with pytest.raises(ValueError, match=REFUSED):
            model(**BATCH)
        assert tiny.same_state(before, tiny.state(model))
        model.eval()(**BATCH)  # the refusal is of training

    def test_a_head_that_reads_another_module(self):
        options = {"target_modules": ["lm_head"], "feature_source": {"lm_head": "transformer.h.0"}}
        with pytest.raises(ValueError, match=REFUSED):
            adapted(tiny.gpt2(), fused_loss=True, **options)(**BATCH)


def test_unloading_leaves_no_hook():
    base = tiny.gpt2()
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in (base, base.transformer, base.lm_head)]
    adapted(base, fused_loss=True).unload()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in (base, base.transformer, base.lm_head)] == before


def test_compiled_models_compute_the_usual_loss():
    torch._dynamo.reset()
    model = adapted(tiny.llama(num_hidden_layers=1), fused_loss=True)
    output = torch.compile(model, backend="eager", fullgraph=True)(**BATCH)
    assert output.logits.shape == (3, 10, tiny.VOCABULARY)
    torch.testing.assert_close(output.loss, model(**BATCH).loss, rtol=1e-5, atol=0)
    torch._dynamo.reset()


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}])
def test_trainer_takes_the_same_steps(options, tmp_path):
    data = [{name: value[i] for name, value in BATCH.items()} for i in (0, 1, 2, 1, 2, 0, 1, 2)]
    losses = []
    for model in twins():
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
    model = adapted(tiny.gpt2(), fused_loss=True)
    model(**BATCH)
    expected = model(**BATCH).loss
    found = []

    def other_pass(module, args):
        if not found and threading.current_thread() is threading.main_thread():
            found.append(None)
            thread = threading.Thread(target=lambda: found.append(model(input_ids=IDS).logits))
            thread.start()
            thread.join()

    model.get_base_model().transformer.ln_f.register_forward_pre_hook(other_pass)
    output = model(**BATCH)
    assert output.logits is None
    assert torch.equal(output.loss, expected)
    assert found[1].shape == (3, 10, tiny.VOCABULARY)


def test_the_class_of_the_output_is_the_models_own():
    fused, usual = twins()
    fused(**BATCH)
    assert (
        type(fused(**BATCH)) is type(usual(**BATCH)) is transformers.modeling_outputs.CausalLMOutputWithCrossAttentions
    )
    loss, *_ = fused(**BATCH, return_dict=False)
    torch.testing.assert_close(loss, usual(**BATCH).loss)
