"""The curvature penalty: once per optimiser step, whatever the loop around it does."""

import copy
import gc
import pickle

import pytest
import torch
from tiny import adapt, gpt2, inputs, layers, shake
from torch import nn

from lreg_peft import LRegConfig
from lreg_peft.core import curvature_penalty
from lreg_peft.tuner import penalty

WEIGHT = 0.7


def model(weight: float = WEIGHT, **options) -> nn.Module:
    adapted = adapt(gpt2(), **{"n_components": 2, "dof": 5, "curvature_weight": weight, **options})
    shake(adapted)
    return adapted


def data_loss(adapted: nn.Module, rows: slice = slice(None)) -> torch.Tensor:
    ids = inputs("gpt2", batch=4)["input_ids"][rows]
    return adapted(input_ids=ids).logits.square().mean()


def explicit_penalty(adapted: nn.Module, name: str = "default") -> torch.Tensor:
    return sum(
        curvature_penalty(layer.lreg_nodes[name], layer.nodal_coefficients(name))
        for layer in layers(adapted)
        if name in layer.lreg_nodes
    )


def learning(adapted: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in adapted.parameters() if parameter.requires_grad]


def stepped(adapted: nn.Module, *losses, optimizer_class=torch.optim.SGD, **options) -> dict[str, torch.Tensor]:
    """Parameters after one optimiser step on the sum of the losses, each with its own backward pass."""
    optimizer = optimizer_class(learning(adapted), **{"lr": 0.1, **options})
    for loss in losses or [data_loss]:
        loss(adapted).backward()
    optimizer.step()
    return {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        # One gradient is a sum of two that autograd adds in another order.
        limit = 4 * torch.finfo(torch.float32).eps * value.abs().max().clamp_min(1)
        assert (found[name] - value).abs().max() <= limit, name


def with_explicit_penalty(adapted: nn.Module) -> torch.Tensor:
    return data_loss(adapted) + WEIGHT * explicit_penalty(adapted)


@pytest.mark.parametrize("options", [{}, {"target_modules": ["mlp", "lm_head"]}], ids=["lm_head", "three modules"])
class TestOneStep:
    def test_is_the_step_on_the_sum(self, options):
        expected = stepped(model(0.0, **options), with_explicit_penalty)
        check_equal(stepped(model(**options)), expected)
        assert not torch.allclose(
            stepped(model(0.0, **options))["base_model.model.lm_head.lreg_coefficients.default.weight"],
            expected["base_model.model.lm_head.lreg_coefficients.default.weight"],
        )

    def test_does_not_depend_on_gradient_accumulation(self, options):
        whole = stepped(model(**options))
        halves = [lambda m, r=rows: data_loss(m, r) / 2 for rows in (slice(0, 2), slice(2, 4))]
        check_equal(stepped(model(**options), *halves), whole)

    def test_does_not_depend_on_gradient_checkpointing(self, options):
        checkpointed = model(**options)
        checkpointed.activation_checkpointing_enable({"use_reentrant": False})
        checkpointed.train()
        check_equal(stepped(checkpointed), stepped(model(**options)))


class TestClosures:
    """What makes the gradients inside the step."""

    @pytest.mark.parametrize("by_name", [False, True])
    def test_the_step_is_that_of_a_loop_without(self, by_name):
        adapted = model()
        optimizer = torch.optim.SGD(learning(adapted), lr=0.1)

        def closure():
            optimizer.zero_grad()
            loss = data_loss(adapted)
            loss.backward()
            return loss

        own = with_explicit_penalty(adapted).item()
        loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        assert loss.item() == pytest.approx(own, rel=1e-6)
        check_equal({n: p for n, p in adapted.named_parameters() if p.requires_grad}, stepped(model()))

    def test_a_closure_that_returns_nothing(self):
        adapted = model()
        assert torch.optim.SGD(learning(adapted), lr=0.1).step(lambda: data_loss(adapted).backward()) is None
        check_equal({n: p for n, p in adapted.named_parameters() if p.requires_grad}, stepped(model()))

    def test_a_line_search_sees_it_at_every_evaluation(self):
        found = []
        for weight, objective in ((WEIGHT, data_loss), (0.0, with_explicit_penalty)):
            adapted, losses = model(weight), []
            optimizer = torch.optim.LBFGS(learning(adapted), max_iter=4, line_search_fn="strong_wolfe")

            def closure(adapted=adapted, optimizer=optimizer, objective=objective, losses=losses):
                optimizer.zero_grad()
                loss = objective(adapted)
                loss.backward()
                losses.append(loss.item())
                return loss

            optimizer.step(closure)
            found.append((len(losses), with_explicit_penalty(adapted).item()))
        assert found[0][0] == found[1][0] > 2
        assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


class TestBookkeeping:
    def test_every_optimiser_sees_the_gradient(self):
        for optimizer_class in (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop):
            expected = stepped(model(0.0), with_explicit_penalty, optimizer_class=optimizer_class, lr=1e-3)
            check_equal(stepped(model(), optimizer_class=optimizer_class, lr=1e-3), expected)

    def test_second_optimiser_over_other_parameters_adds_nothing(self):
        adapted, other = model(), nn.Parameter(torch.ones(1))
        stranger = torch.optim.SGD([other], lr=0.1)
        data_loss(adapted).backward()
        before = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}
        other.grad = torch.ones(1)
        stranger.step()
        assert all(torch.equal(p.grad, before[n]) for n, p in adapted.named_parameters() if p.grad is not None)

    def test_step_without_a_gradient_adds_nothing(self):
        adapted = model()
        optimizer = torch.optim.SGD(learning(adapted), lr=0.1)
        before = [p.detach().clone() for p in learning(adapted)]
        optimizer.step()
        assert all(torch.equal(p, b) for p, b in zip(learning(adapted), before, strict=True))

    def test_zero_weight_adds_nothing(self):
        adapted = model(0.0)
        data_loss(adapted).backward()
        before = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}
        torch.optim.SGD(learning(adapted), lr=0.0).step()
        assert before
        assert all(torch.equal(p.grad, before[n]) for n, p in adapted.named_parameters() if p.grad is not None)

    def test_only_the_active_adapter_is_penalised(self):
        adapted = model()
        adapted.add_adapter("second", LRegConfig(dof=5, curvature_weight=0.3))
        shake(adapted, "second")
        adapted.set_adapter("second")
        (head,) = layers(adapted)
        assert [weight for weight, *_ in head.curvature_terms()] == [0.3]
        data_loss(adapted).backward()
        first = head.lreg_coefficients["default"].detach().clone()
        torch.optim.SGD(list(adapted.parameters()), lr=0.1).step()
        assert torch.equal(head.lreg_coefficients["default"], first)

    def test_modules_with_a_straight_mesh_take_part_with_nothing(self):
        mixed = {"target_modules": ["mlp", "lm_head"], "dof_pattern": {"mlp": 2}}
        check_equal(stepped(model(**mixed)), stepped(model(0.0, **mixed), with_explicit_penalty))

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_survives_copies(self, clone):
        expected = stepped(model())
        check_equal(stepped(clone(model())), expected)

    def test_forgets_models_that_are_gone(self):
        gc.collect()
        before = len(penalty.penalised.layers)
        adapted = model(target_modules=["mlp", "lm_head"])
        assert len(penalty.penalised.layers) == before + 3
        del adapted
        gc.collect()
        assert len(penalty.penalised.layers) <= before

    def test_unloaded_model_is_not_penalised(self):
        adapted = model()
        parameters = learning(adapted)
        adapted.unload()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        del adapted
        gc.collect()
        torch.optim.SGD(parameters, lr=0.1).step()
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in parameters)

    def test_bends_are_ironed_out(self):
        adapted = model(weight=1.0)
        start = explicit_penalty(adapted).item()
        optimizer = torch.optim.Adam(learning(adapted), lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            (0 * data_loss(adapted)).backward()
            optimizer.step()
        assert explicit_penalty(adapted).item() < 0.1 * start
