"""Without gradients on the CPU: the short way to a shortcut's value, and what must not take it."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lreg_peft import LRegConfig
from lreg_peft.tuner import layer as layer_module
from lreg_peft.tuner.heads import HEADS, FactoredHead

LAYERS = {"linear": lambda: nn.Linear(6, 6), "conv": lambda: Conv1D(6, 6), "norm": lambda: nn.LayerNorm(6)}


class Net(nn.Module):
    def __init__(self, kind: str = "linear") -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), LAYERS[kind]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)))


def adapted(kind: str = "linear", **options):
    settings = {"head": "factored", "linear_term": True, "n_components": 2, "dof": 5, "target_modules": ["last"]}
    model = get_peft_model(Net(kind), LRegConfig(**{**settings, **options}))
    fill(model, "default")
    return model.eval()


def fill(model, adapter: str) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lreg_" in name and f".{adapter}." in name:
                weight.normal_()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every shortcut whether it went the short way."""
    taken, real = [], layer_module.add_factored

    def spy(*args):
        total = real(*args)
        taken.append(total is not None)
        return total

    monkeypatch.setattr(layer_module, "add_factored", spy)
    return taken


def agrees(model, x: torch.Tensor) -> None:
    expected = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("linear_term", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_values_of_training(kind, linear_term, short):
    agrees(adapted(kind, linear_term=linear_term), torch.randn(1, 1, 6))
    assert short == [True, True]


def test_two_adapters_at_once_and_grades(short):
    model = adapted()
    model.add_adapter("second", model.peft_config["default"])
    fill(model, "second")
    model.base_model.set_adapter(["default", "second"])
    agrees(model, torch.randn(1, 6))
    assert short == [True] * 4


def test_weights_that_changed_since(short):
    model, x = adapted(), torch.randn(1, 6)
    with torch.no_grad():
        model(x)
    for weight in model.parameters():
        weight.data = weight.data + 0.3  # no version counter tells
    agrees(model, x)
    agrees(copy.deepcopy(model), x)
    assert short == [True] * 5


@pytest.mark.parametrize(
    "options", [{"head": "full", "linear_term": False}, {"head": "reduced", "linear_term": False}, {"layout": "tokens"}]
)
def test_other_heads_and_what_a_configuration_says(options, short):
    agrees(adapted(**options), torch.randn(1, 1, 6))
    assert short == []


def test_an_output_that_a_hook_keeps_stays_as_it_was(short):
    model, x, kept = adapted(), torch.randn(1, 6), []
    base = model.base_model.model.last.base_layer
    base.register_forward_hook(lambda module, args, output: kept.append(output))
    agrees(model, x)
    with torch.no_grad():
        expected = base(torch.relu(model.base_model.model.first(x)))
    assert all(torch.equal(output, expected) for output in kept)
    assert short == []


def test_an_output_that_a_hook_of_every_module_keeps(short):
    model, x, kept = adapted(), torch.randn(1, 6), []
    base = model.base_model.model.last.base_layer
    hook = lambda module, args, output: kept.append((output, output.clone())) if module is base else None  # noqa: E731
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        agrees(model, x)
        with torch.no_grad():
            model(torch.randn(40, 6))
    finally:
        handle.remove()
    assert len(kept) == 4 and all(torch.equal(output, before) for output, before in kept)
    assert short == []


def test_an_output_that_a_patched_module_keeps(short):
    model, x = adapted(), torch.randn(1, 6)
    base = model.base_model.model.last.base_layer
    kept = torch.randn(1, 6)
    before = kept.clone()
    base.forward = lambda features: kept
    agrees(model, x)
    assert torch.equal(kept, before)
    assert short == []


def test_a_base_of_another_width_is_an_error_as_in_training(short):
    model = adapted()
    layer = model.base_model.model.last
    layer.base_layer, x = nn.Linear(6, 4), torch.randn(1, 6)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match="6 to 6 features does not fit"):
            model(x)
    assert short == [False]


class Gathering(dict):
    """Parameters of which each process holds a part, whole when they are asked for by `[]`."""

    def __init__(self, whole):
        super().__init__({name: nn.Parameter(torch.empty(0)) for name in whole})
        self.whole = whole

    def __getitem__(self, name):
        return self.whole[name]


def test_shards_that_are_gathered_when_they_are_asked_for(short):
    model, x = adapted(), torch.randn(1, 6)
    expected = model(x).detach()
    for module in model.base_model.model.last.modules():
        if type(module).__name__ == "_Weight":
            module._parameters = Gathering(module._parameters)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    assert short == [True]


def test_a_head_with_a_value_of_its_own(short, monkeypatch):
    class Doubled(FactoredHead):
        def design(self, *args):
            return 2 * super().design(*args)

    monkeypatch.setitem(HEADS, "factored", Doubled())
    agrees(adapted(linear_term=False), torch.randn(1, 6))
    assert short == []


def test_features_of_another_module(short):
    model = adapted(feature_source={"last": "first"})
    agrees(model, torch.randn(1, 6))
    assert short == [True, True]


def test_dropout_in_training(short):
    model = adapted(dropout=0.9999).train()
    x = torch.randn(1, 6)
    base = model.base_model.model.last.base_layer
    with torch.no_grad():
        assert torch.equal(model(x), base(torch.relu(model.base_model.model.first(x))))
    assert short == []
