import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lreg_peft import LRegConfig, LRegLayer, initialize_lreg_weights
from lreg_peft.core import locate
from lreg_peft.core.coordinates import principal_axes, standardised_start

VOCABULARY = 101


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=VOCABULARY, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def batches(n: int = 8, masked: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(4, 24, dtype=torch.long)
    mask[:, 24 - masked :] = 0
    return [
        {"input_ids": torch.randint(0, VOCABULARY, (4, 24), generator=generator), "attention_mask": mask}
        for _ in range(n)
    ]


def adapted(**options) -> PeftModel:
    options = {"target_modules": ["mlp", "c_attn", "lm_head"], "n_components": 3, "n_nodes": 5, **options}
    return get_peft_model(
        tiny_gpt2(), LRegConfig(preset="paper", task_type="CAUSAL_LM", init_weights="pca", **options)
    ).eval()


def layers(model: nn.Module) -> list[LRegLayer]:
    return [module for module in model.modules() if isinstance(module, LRegLayer)]


def test_gradient_start_of_a_double_precision_model():
    data = [{**batch, "labels": batch["input_ids"]} for batch in batches()]
    single = adapted(target_modules=["mlp"], n_components=2)
    config = LRegConfig(task_type="CAUSAL_LM", target_modules=["mlp"], n_components=2, n_nodes=5)
    double = get_peft_model(tiny_gpt2().double(), config)
    for model in (single, double):
        initialize_lreg_weights(model, data, method="gradient", show_progress=False)
    for one, two in zip(layers(single), layers(double), strict=True):
        assert two.lreg_projection["default"].weight.dtype == torch.float64
        # A randomised SVD in two precisions.
        expected = one.lreg_projection["default"].weight.double()
        torch.testing.assert_close(two.lreg_projection["default"].weight, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("weighting", ["full", "reduced", "factored"])
def test_function_is_unchanged_and_every_element_is_used(weighting):
    model = adapted(weighting=weighting)
    data = batches()
    before = model(**data[0]).logits
    seen = {layer: [] for layer in layers(model)}
    for layer in seen:
        layer.register_input_hook(seen[layer].append)
    initialize_lreg_weights(model, data, show_progress=False)
    assert torch.equal(model(**data[0]).logits, before)
    for layer, inputs in seen.items():
        rows = torch.cat([features.reshape(-1, features.shape[-1]) for features in inputs])
        element, _ = locate(layer.coords("default", rows).detach(), layer.lreg_encoder["default"].nodes)
        for i in range(3):
            share = torch.bincount(element[:, i], minlength=4) / len(rows)
            assert share.min() > 0.22 and share.max() < 0.28  # all 768 rows are used: 0.25 up to what batch 0 adds


def test_projection_standardises_the_principal_components():
    torch.manual_seed(0)
    scale = torch.tensor([9.0, 4.0, 1.0, 0.1, 0.1, 0.1])
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    samples = (torch.randn(5000, 6, dtype=torch.float64) * scale) @ rotation.T + 3
    projection, bias, nodes = standardised_start(samples, principal_axes(samples, 3), 3, 7)
    standard = (samples @ projection.T + bias) / 1.702
    torch.testing.assert_close(standard.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(standard.T.cov(), torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)
    cosine = (projection / projection.norm(dim=1, keepdim=True)) @ rotation[:, :3]
    assert (cosine.diagonal().abs() > 0.999).all()
    # Normal data through the logistic scaling is nearly uniform, so its quantiles are nearly a uniform mesh.
    assert (nodes - torch.linspace(0, 1, 7, dtype=torch.float64)).abs().max() < 0.03


class TestGradientMethod:
    @staticmethod
    def regression(weighting: str = "factored") -> nn.Module:
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(12, 5)

            def forward(self, x, labels=None):
                prediction = self.layer(x)
                loss = None if labels is None else (prediction - labels).square().mean()
                return SimpleNamespace(loss=loss, logits=prediction)

        torch.manual_seed(0)
        config = LRegConfig(
            target_modules=["layer"], weighting=weighting, n_components=2, n_nodes=4, init_weights="gradient"
        )
        return get_peft_model(Model(), config).eval()

    @pytest.mark.parametrize("weighting", ["full", "factored"])
    def test_finds_the_directions_that_lower_the_loss(self, weighting):
        """The target differs from the model along two directions of small variance, which "pca" would not find."""
        model = self.regression(weighting)
        base = model.get_base_model().layer.base_layer
        change = torch.randn(5, 2) @ torch.linalg.qr(torch.randn(12, 2))[0].T
        scale = torch.linspace(3, 0.5, 12)
        data = []
        for _ in range(8):
            x = torch.randn(256, 12) * scale + 1
            data.append({"x": x, "labels": (base(x) + x @ change.T).detach()})
        initialize_lreg_weights(model, data, show_progress=False)
        # g = 2 (change x) / size, so that sum g (x - mean)^T is change times the covariance of x.
        wanted = torch.linalg.qr((change * scale.square()).T)[0]
        found = torch.linalg.qr(layers(model)[0].lreg_projection["default"].weight.T)[0]
        assert torch.linalg.svdvals(wanted.T @ found).min() > 0.98
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_models_that_return_dictionaries(self):
        model = self.regression()
        inner, own = model.get_base_model(), model.get_base_model().forward
        data = [{"x": torch.randn(64, 12), "labels": torch.randn(64, 5)} for _ in range(2)]
        starts = []
        for forward in (own, lambda x, labels=None: vars(own(x, labels))):
            inner.forward = forward
            initialize_lreg_weights(model, data, show_progress=False)
            starts.append(layers(model)[0].lreg_projection["default"].weight.detach().clone())
        assert torch.equal(*starts)

    def test_needs_a_loss(self):
        with pytest.raises(ValueError, match="batches with labels, or use 'pca'"):
            initialize_lreg_weights(self.regression(), [{"x": torch.randn(4, 12)}], show_progress=False)

    def test_language_model(self):
        model = adapted(weighting="factored")
        data = [{**batch, "labels": batch["input_ids"]} for batch in batches()]
        before = model(**data[0]).logits
        projection = layers(model)[0].lreg_projection["default"].weight.detach().clone()
        initialize_lreg_weights(model, data, method="gradient", show_progress=False)
        assert torch.equal(model(**data[0]).logits, before)
        assert not torch.equal(layers(model)[0].lreg_projection["default"].weight, projection)

    def test_unknown_method(self):
        with pytest.raises(ValueError, match="one of 'pca', 'gradient', got 'svd'"):
            initialize_lreg_weights(adapted(), batches(), method="svd", show_progress=False)


@pytest.mark.parametrize("other", [False, True])
def test_the_rest_of_the_model_runs_as_it_is(other):
    """What a new adapter is started from: the base, and another active adapter, but nothing of its own."""
    model = adapted(target_modules=["c_attn"])
    model.add_adapter("trained", LRegConfig(target_modules=["mlp"], n_nodes=4, init_weights=False))
    active = ["default", "trained"] if other else ["default"]
    model.base_model.set_adapter(active)
    data = [{**batch, "labels": batch["input_ids"]} for batch in batches(3)]
    seen = []
    layers(model)[-2].register_input_hook(seen.append)
    with torch.no_grad():
        model(**data[0])
    before = model(**data[0]).logits
    initialize_lreg_weights(model, data, method="gradient", show_progress=False)
    torch.testing.assert_close(seen[1], seen[0])
    assert torch.equal(model(**data[0]).logits, before)
    assert model.base_model.active_adapters == active


def test_more_components_than_the_data_has_directions():
    torch.manual_seed(0)
    samples = torch.randn(50, 2) @ torch.randn(2, 8)
    for tensor in standardised_start(samples, principal_axes(samples, 4), 4, 3):
        assert torch.isfinite(tensor).all()


def test_padding_is_left_out():
    """Changing what stands behind the mask changes nothing, whatever the model makes of it."""
    results = []
    for filler in (0, 50):
        model = adapted(target_modules=["c_attn"])
        data = batches(masked=10)
        for batch in data:
            batch["input_ids"][:, 14:] = filler
        initialize_lreg_weights(model, data, show_progress=False)
        results.append(layers(model)[0])
    for first, second in zip(*(layer.parts("default") for layer in results), strict=True):
        assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_same_seed_gives_the_same_start_and_rows_are_limited():
    starts = []
    for _ in range(2):
        model = adapted()
        rows = []
        model_layers = layers(model)
        initialize_lreg_weights(model, batches(), max_samples=16, seed=5, show_progress=False)
        starts.append(copy.deepcopy(model_layers[0].lreg_projection["default"].weight))
        del rows
    assert torch.equal(*starts)


def test_modules_keep_their_mode_and_no_hook_stays():
    model = adapted()
    model.train()
    modes = [module.training for module in model.modules()]
    initialize_lreg_weights(model, batches(2), show_progress=False)
    assert [module.training for module in model.modules()] == modes
    assert not any(layer._forward_hooks for layer in layers(model))


def test_works_after_native_add_adapter():
    model = tiny_gpt2()
    model.add_adapter(LRegConfig(target_modules=["mlp"], n_nodes=4, init_weights="pca"), adapter_name="default")
    initialize_lreg_weights(model, batches(2), show_progress=False)
    assert not torch.equal(layers(model)[0].lreg_encoder["default"].nodes[0], torch.linspace(0, 1, 4))


def test_channels_first_modules():
    model = get_peft_model(
        nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()), LRegConfig(target_modules=["0"], init_weights="pca")
    )

    class Batch(dict):
        pass

    torch.manual_seed(0)
    data = [Batch(input=torch.randn(2, 3, 8, 8)) for _ in range(2)]
    initialize_lreg_weights(model, data, show_progress=False)
    assert layers(model)[0].lreg_projection["default"].weight.shape == (2, 3)


class TestOwedStart:
    def test_forgetting_it_warns_once_at_the_first_training_step(self):
        model = adapted()
        data = batches(1)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.eval()
            model(**data)
            model.train()
            with torch.no_grad():
                model(**data)
        with pytest.warns(UserWarning, match="initialize_lreg_weights") as caught:
            model(**data)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**data)

    def test_no_warning_once_it_is_made_or_loaded(self, tmp_path):
        model = adapted()
        initialize_lreg_weights(model, batches(2), show_progress=False)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_gpt2(), tmp_path, is_trainable=True)
        for any_model in (model, loaded):
            any_model.train()
            any_model(**batches(1)[0])  # warnings are errors
        for ours, theirs in zip(layers(model), layers(loaded), strict=True):
            assert torch.equal(ours.lreg_encoder["default"].nodes, theirs.lreg_encoder["default"].nodes)


class TestBadInput:
    def test_no_adapter(self):
        lora = get_peft_model(tiny_gpt2(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
        with pytest.raises(ValueError, match=r"no LReg adapter called 'default'\. Its adapters are of LORA\."):
            initialize_lreg_weights(lora, batches())
        with pytest.raises(ValueError, match="no LReg adapter called 'default'"):
            initialize_lreg_weights(tiny_gpt2(), batches())

    def test_trained_adapter_is_left_alone(self):
        model = adapted()
        layer = layers(model)[0]
        with torch.no_grad():
            layer.lreg_coefficients["default"].weight.add_(1)
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(ValueError, match="non-zero coefficients"):
            initialize_lreg_weights(model, batches(), show_progress=False)
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())

    def test_empty_dataloader(self):
        with pytest.raises(ValueError, match=r"gave 0 rows for .*c_attn"):
            initialize_lreg_weights(adapted(), [], show_progress=False)

    def test_batches_that_are_no_dictionaries(self):
        with pytest.raises(TypeError, match="must be a dictionary of model inputs by name, got list"):
            initialize_lreg_weights(adapted(), [[1, 2]], show_progress=False)

    @pytest.mark.parametrize("name", ["n_batches", "max_samples"])
    def test_counts(self, name):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            initialize_lreg_weights(adapted(), batches(), show_progress=False, **{name: 0})
