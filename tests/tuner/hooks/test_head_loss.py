"""The fused loss inside models: the same training, without logits."""

import copy

import pytest
import tiny
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from lreg_peft import LRegConfig, track_statistics
from lreg_peft.core import fused_loss as core_fused_loss
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


def assert_same_training(fused: nn.Module, usual: nn.Module, batch: dict, **kwargs) -> None:
    losses = []
    for model in (fused, usual):
        model.zero_grad()
        output = model(**batch, **kwargs)
        losses.append(output.loss.detach())
        output.loss.backward()
        assert ("logits" in output) == (model is usual)
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
    def logits_of(self, model: nn.Module, batch: dict = BATCH, **kwargs) -> Tensor | None:
        return model(**batch, **kwargs).get("logits")

    def test_evaluation_generation_and_calls_without_labels(self):
        model = adapted(tiny.gpt2(), fused_loss=True)
        assert self.logits_of(model) is None
        assert self.logits_of(model, {"input_ids": IDS}).shape == (3, 10, tiny.VOCABULARY)
        with torch.no_grad():
            assert self.logits_of(model) is not None
        model.eval()
        assert self.logits_of(model) is not None
        assert model.generate(input_ids=IDS[:1, :3], max_new_tokens=2, do_sample=False).shape == (1, 5)

    def test_tuples_keyword_and_disabled_adapters(self):
        model = adapted(tiny.gpt2(), fused_loss=True)
        assert len(model(**BATCH, return_dict=False)) >= 2
        assert self.logits_of(model, shift_labels=LABELS) is not None
        with model.disable_adapter():
            assert self.logits_of(model) is not None
        assert self.logits_of(model) is None

    def test_an_adapter_elsewhere_or_another_output_head(self):
        assert self.logits_of(adapted(tiny.gpt2(), fused_loss=True, target_modules=["mlp"])) is not None
        classifier = adapted(tiny.roberta("SEQ_CLS", num_labels=3), fused_loss=True, target_modules=["classifier"])
        assert self.logits_of(classifier, {"input_ids": IDS, "labels": torch.tensor([0, 1, 2])}) is not None

    def test_a_head_that_is_trained_itself(self):
        model = adapted(tiny.gpt2(), fused_loss=True)
        model.get_base_model().lm_head.base_layer.weight.requires_grad_(True)
        assert self.logits_of(model) is not None

    def test_a_model_that_caps_its_logits(self, caplog):
        model = adapted(tiny.build("gemma2", "CAUSAL_LM", final_logit_softcapping=30.0), fused_loss=True)
        assert self.logits_of(model) is not None

    def test_an_encoder_decoder(self):
        model = adapted(tiny.build("t5", "SEQ_2_SEQ_LM"), fused_loss=True, task_type="SEQ_2_SEQ_LM")
        assert self.logits_of(model, {"input_ids": IDS, "labels": IDS}) is not None

    def test_unloading_leaves_no_hook(self):
        base = tiny.gpt2()
        before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in (base, base.transformer)]
        adapted(base, fused_loss=True).unload()
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in (base, base.transformer)] == before

    def test_an_error_in_the_forward_pass_leaves_the_model_usable(self):
        model = adapted(tiny.gpt2(), fused_loss=True)
        with pytest.raises(IndexError):
            model(input_ids=IDS + tiny.VOCABULARY, labels=LABELS)
        assert self.logits_of(model, {"input_ids": IDS}) is not None
        assert torch.is_grad_enabled()


class TestLogitsOnDemand:
    def test_they_are_the_usual_ones_and_carry_gradients(self):
        fused, usual = twins(tiny.gpt2, n_components=3)
        outputs = [model(**BATCH) for model in (fused, usual)]
        assert "logits" not in outputs[0]
        torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
        assert outputs[0].logits is outputs[0].logits
        for output in outputs:
            output.logits.square().mean().backward()
        for name, gradient in gradients(usual).items():
            torch.testing.assert_close(gradients(fused)[name], gradient, rtol=1e-4, atol=1e-7)

    def test_the_output_is_of_the_model_s_own_kind(self):
        fused, usual = twins(tiny.gpt2)
        output = fused(**BATCH)
        assert isinstance(output, type(usual(**BATCH)))
        assert output[0] is output.loss is output["loss"]

    def test_an_output_rebuilt_from_its_entries_says_what_to_do(self):
        output = adapted(tiny.gpt2(), fused_loss=True)(**BATCH)
        rebuilt = type(output)(dict(output))
        assert rebuilt.loss is output.loss
        with pytest.raises(AttributeError, match="fused_loss=False"):
            rebuilt.logits  # noqa: B018
        assert not hasattr(rebuilt, "logits")


def test_compiled_models_compute_the_usual_loss():
    torch._dynamo.reset()
    model = adapted(tiny.llama(), fused_loss=True)
    output = torch.compile(model, backend="eager", fullgraph=True)(**BATCH)
    assert output.logits is not None
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


def test_under_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fused, usual = twins(tiny.gpt2)
        parallel = nn.parallel.DistributedDataParallel(fused)
        parallel(**BATCH).loss.backward()
        usual(**BATCH).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    for name, gradient in gradients(usual).items():
        torch.testing.assert_close(gradients(fused)[name], gradient, rtol=1e-4, atol=1e-7)


def test_a_copy_of_a_model_trains():
    model = adapted(tiny.gpt2(), fused_loss=True)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(**BATCH).loss, model(**BATCH).loss)
    assert twin.get_base_model().lm_head.loss_request is None
