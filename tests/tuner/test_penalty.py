"""The curvature penalty: a term for the loss, and what the callback adds to the gradients in a Trainer."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from tiers import slow
from tiny import adapt, gpt2, inputs, layers, shake
from torch import nn
from transformers import TrainingArguments

from lreg_peft import LRegCallback, LRegConfig, curvature_penalty
from lreg_peft.core import curvature_penalty as penalty_of

WEIGHT = 0.7
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.fixture(autouse=True)
def own_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def model(weight: float = WEIGHT, **options) -> nn.Module:
    adapted = adapt(gpt2(**NO_DROPOUT), **{"n_components": 2, "n_nodes": 5, "curvature_weight": weight, **options})
    shake(adapted)
    return adapted


def explicit_penalty(adapted: nn.Module, name: str = "default") -> torch.Tensor:
    """Over all modules, from the values at the nodes."""
    found = [layer for layer in layers(adapted) if name in layer.lreg_encoder]
    return sum(penalty_of(layer.lreg_encoder[name].nodes, layer.nodal_coefficients(name)) for layer in found)


def learning(adapted: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}


class TestFunction:
    @pytest.mark.parametrize("weighting", ["full", "reduced"])
    def test_is_the_mean_curvature_of_the_coefficients(self, weighting):
        adapted = model(target_modules=["mlp", "lm_head"], weighting=weighting)
        penalty = curvature_penalty(adapted)
        # The constant of a reduced weighting is a straight line, which has no curvature but for its rounding.
        torch.testing.assert_close(penalty, WEIGHT * explicit_penalty(adapted), rtol=1e-5, atol=1e-6)
        gradients = torch.autograd.grad(penalty, [layer.nodal_parameter("default") for layer in layers(adapted)])
        assert all(gradient.any() for gradient in gradients)

    def test_is_that_of_the_profiles_of_a_factored_head(self):
        adapted = model(weighting="factored")
        (encoder,) = (layer.lreg_encoder["default"] for layer in layers(adapted))
        expected = WEIGHT * penalty_of(encoder.nodes, encoder.weight.unsqueeze(-1))
        torch.testing.assert_close(curvature_penalty(adapted), expected)

    def test_only_active_adapters_count(self):
        adapted = model()
        adapted.add_adapter("second", LRegConfig(preset="paper", n_nodes=5, curvature_weight=0.3))
        shake(adapted, "second", seed=5)
        adapted.set_adapter("second")
        torch.testing.assert_close(curvature_penalty(adapted), 0.3 * explicit_penalty(adapted, "second"))

    def test_nothing_is_zero(self):
        assert curvature_penalty(model(0.0)) == 0
        assert curvature_penalty(gpt2()) == 0

    def test_a_straight_mesh_takes_part_with_nothing(self):
        adapted = model(target_modules=["mlp", "lm_head"], node_pattern={"mlp": 2})
        head = adapted.base_model.model.lm_head
        expected = WEIGHT * penalty_of(head.lreg_encoder["default"].nodes, head.nodal_coefficients("default"))
        torch.testing.assert_close(curvature_penalty(adapted), expected)

    def test_bends_are_ironed_out(self):
        adapted = model(weight=1.0)
        start = explicit_penalty(adapted).item()
        optimizer = torch.optim.Adam(learning(adapted).values(), lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            curvature_penalty(adapted).backward()
            optimizer.step()
        assert explicit_penalty(adapted).item() < 0.1 * start


class WithPenalty(transformers.Trainer):
    """Adds the term to the loss, a share of it to that of each micro-batch."""

    def compute_loss(self, model, *args, **kwargs):
        share = self.args.gradient_accumulation_steps
        return super().compute_loss(model, *args, **kwargs) + WEIGHT * explicit_penalty(model) / share


def trained(adapted: nn.Module, folder, kind=transformers.Trainer, **options) -> dict[str, torch.Tensor]:
    """Parameters after two steps of plain SGD, without clipping."""
    rows = inputs("gpt2", batch=8)["input_ids"]
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    callbacks = [] if kind is WithPenalty else [LRegCallback(every=1, n_check_batches=0, n_refine=0, size=1e-30)]
    made = kind(
        adapted,
        TrainingArguments(str(folder), **settings),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=callbacks,
    )
    made.remove_callback(transformers.PrinterCallback)
    made.train()
    return {name: parameter.detach().clone() for name, parameter in learning(adapted).items()}


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Two steps; a gradient is a sum of several that autograd adds in another order.
        limit = 16 * torch.finfo(torch.float32).eps * value.abs().max().clamp_min(1)
        assert (found[name] - value).abs().max() <= limit, name


TRAININGS = {
    "plain": {},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointed": {"activation_checkpointing": True},
    "AdamW": {"optim": "adamw_torch", "learning_rate": 1e-3},
}


class TestCallback:
    @pytest.mark.parametrize(
        ("name", "weighting"),
        [
            ("plain", "full"),
            ("accumulated", "reduced"),
            ("checkpointed", "reduced"),
            ("AdamW", "full"),
            *slow(("plain", "reduced"), ("accumulated", "full"), ("checkpointed", "full"), ("AdamW", "reduced")),
        ],
    )
    def test_is_a_term_of_the_loss(self, name, weighting, tmp_path):
        how = TRAININGS[name]
        options = {"target_modules": ["mlp", "lm_head"], "weighting": weighting}
        expected = trained(model(0.0, **options), tmp_path, WithPenalty, **how)
        check_equal(trained(model(**options), tmp_path, **how), expected)
        without = trained(model(0.0, **options), tmp_path, **how)
        name = "base_model.model.lm_head.lreg_coefficients.default.weight"
        assert (without[name] - expected[name]).abs().max() > 1e-4

    def pre_step(self, adapted, optimizer, tmp_path, **options):
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, **options)
        LRegCallback().on_pre_optimizer_step(arguments, None, None, model=adapted, optimizer=optimizer)

    @pytest.mark.parametrize("clipped", [False, True])
    def test_scaled_gradients_are_unscaled_first(self, clipped, tmp_path):
        found = []
        for weight, scale in ((0.0, 1.0), (WEIGHT, 1024.0)):
            adapted = model(weight)
            optimizer = torch.optim.SGD(learning(adapted).values(), lr=0.1)
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            loss = adapted(**inputs("gpt2")).logits.square().mean()
            if weight == 0:
                loss = loss + WEIGHT * explicit_penalty(adapted)
            scaler.scale(loss).backward()
            if clipped:
                scaler.unscale_(optimizer)
            wrapped = SimpleNamespace(scaler=scaler, optimizer=optimizer)
            self.pre_step(adapted, wrapped, tmp_path, max_grad_norm=1e9 if clipped else 0.0)
            scaler.step(optimizer)
            found.append({name: parameter.detach().clone() for name, parameter in learning(adapted).items()})
        check_equal(*found)

    def test_a_module_without_a_gradient_gets_none(self, tmp_path):
        adapted = model(target_modules=["mlp", "lm_head"])
        adapted.base_model.model.transformer(**inputs("gpt2")).last_hidden_state.sum().backward()
        self.pre_step(adapted, None, tmp_path)
        parameters = [layer.nodal_parameter("default") for layer in layers(adapted)]
        assert sorted(parameter.grad is None for parameter in parameters) == [False, False, True]

    def test_gradients_that_are_elsewhere(self, tmp_path):
        with pytest.raises(RuntimeError, match=r"there are none: engines such as DeepSpeed.*curvature_weight=0"):
            self.pre_step(model(), None, tmp_path)
        self.pre_step(model(0.0), None, tmp_path)
