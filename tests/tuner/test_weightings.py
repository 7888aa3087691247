"""Heads in a layer and a model: what they weight by, and the names of their weights in model and file."""

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import lreg_peft
from lreg_peft import LRegConfig
from lreg_peft.core import hat_basis, uniform_nodes
from lreg_peft.core.mesh import MIN_RELATIVE_ELEMENT
from lreg_peft.tuner.layer import LRegLinear

D, N, C = 3, 5, 7
X = torch.randn(40, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
# A few dozen products in fp64, each of order one.
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def layer_with(weighting: dict, **options) -> LRegLinear:
    """In fp64, with weights as training leaves them."""
    layer = LRegLinear(nn.Linear(6, C).double(), 6, C)
    layer.update_layer("default", D, N, LRegConfig(preset="paper", **weighting), **options)
    layer.set_adapter("default")
    tiny.shake(layer)
    return layer.double().eval()


@pytest.mark.parametrize("weighting", tiny.WEIGHTINGS.values(), ids=tiny.WEIGHTINGS)
class TestEveryHead:
    def test_value_is_design_times_table(self, weighting):
        layer = layer_with(weighting)
        product = layer.design("default", X) @ layer.table("default")
        torch.testing.assert_close(layer(X), layer.base_layer(X) + product, **TOLERANCE)

    def test_value_is_the_nodal_coefficients_on_the_hat_basis_and_the_linear_term(self, weighting):
        layer = layer_with(weighting)
        basis = hat_basis(layer.coords("default", X), layer.lreg_encoder["default"].nodes.double())
        expected = torch.einsum("bij,ijc->bc", basis, layer.nodal_coefficients("default"))
        if weighting.get("linear_term"):
            expected += layer.latent("default", X) / 1.702 @ layer.table("default")
        torch.testing.assert_close(layer(X) - layer.base_layer(X), expected, rtol=1e-11, atol=1e-11)

    def test_table_is_the_weight_of_the_last_map_and_nothing_else(self, weighting):
        layer = layer_with(weighting)
        *_, coefficients = layer.parts("default")
        assert torch.equal(layer.table("default"), coefficients.weight.T)
        table = torch.randn_like(layer.table("default"))
        layer.set_table("default", table)
        assert torch.equal(layer.table("default"), table)
        rows = {"full": D * N, "reduced": D * (N - 1) + 1, "factored": D}[weighting["weighting"]]
        assert table.shape == (rows, C)

    def test_what_lives_on_the_mesh(self, weighting):
        layer = layer_with(weighting)
        _, encoder, coefficients = layer.parts("default")
        expected = encoder.weight if weighting["weighting"] == "factored" else coefficients.weight
        assert layer.nodal_parameter("default") is expected
        assert layer.nodal_coefficients("default").shape == (D, N, C)

    def test_in_a_model_it_starts_as_the_identity(self, weighting):
        model = get_peft_model(
            tiny.gpt2(), LRegConfig(target_modules=["mlp", "lm_head"], n_nodes=4, **weighting)
        ).eval()
        ids = torch.arange(9).view(1, 9) + 3
        assert torch.equal(model(ids).logits, tiny.gpt2().eval()(ids).logits)
        assert all(layer.is_identity("default") for layer in tiny.layers(model))
        tiny.shake(model)
        assert not any(layer.is_identity("default") for layer in tiny.layers(model))


class TestLinearTerm:
    def test_with_constant_profiles_it_is_lora_with_a_bias(self):
        layer = layer_with(tiny.WEIGHTINGS["factored+linear"])
        projection, encoder, _ = layer.parts("default")
        with torch.no_grad():
            encoder.weight.fill_(0.5)
            a, bias, b = projection.weight, projection.bias, layer.table("default")
            lora = (X @ a.T / 1.702) @ b + (bias / 1.702 + 0.5) @ b
            torch.testing.assert_close(layer(X), layer.base_layer(X) + lora, **TOLERANCE)

    def test_meshes_move_and_the_file_remembers(self, tmp_path):
        config = LRegConfig(
            task_type="CAUSAL_LM", weighting="factored", linear_term=True, n_nodes=6, target_modules=["mlp"]
        )
        model = get_peft_model(tiny.gpt2(), config).train()
        with torch.no_grad():
            for layer in tiny.layers(model):
                layer.lreg_coefficients["default"].weight.normal_(std=0.1)
                layer.lreg_encoder["default"].weight.normal_()
        ids = torch.randint(3, tiny.VOCABULARY, (4, 12))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        lreg_peft.track_statistics(model)
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert lreg_peft.update_meshes(model, optimizer).n_moved
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny.gpt2(), tmp_path)
        assert loaded.peft_config["default"].linear_term
        assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)
        native = tiny.gpt2()
        native.load_adapter(str(tmp_path))
        assert torch.equal(native.eval()(ids).logits, model.eval()(ids).logits)

    def test_certified_fit_and_cache_and_grade(self, tmp_path):
        options = {"weighting": "factored", "linear_term": True, "n_nodes": 4}
        model = get_peft_model(tiny.gpt2(), LRegConfig(preset="paper", task_type="CAUSAL_LM", **options))
        ids = torch.randint(3, tiny.VOCABULARY, (6, 9))
        batch = {"input_ids": ids, "labels": ids}
        cache = lreg_peft.cache_features(model, [batch], tmp_path / "c", dtype=torch.float32, show_progress=False)
        fit = lreg_peft.fit_coefficients(model, cache, ridge=1e-2, show_progress=False)
        (layer,) = tiny.layers(model)
        penalty = 0.5e-2 * layer.table("default").square().sum()
        loss = model.eval()(**batch).loss
        assert fit.status == "converged"
        assert (loss + penalty).item() == pytest.approx(fit.objective, abs=1e-5)
        before = model(**batch).logits
        grade = lreg_peft.add_grade(model, LRegConfig(target_modules=["lm_head"], **options))
        assert torch.equal(model.eval()(**batch).logits, before)
        second = lreg_peft.fit_coefficients(model, [batch], ridge=1e-2, adapter_name=grade, show_progress=False)
        assert second.objective < loss.item()

    def test_neighbouring_latents_stay_apart_in_half_precision(self):
        """z is not rounded to bf16 before it is weighted: at 300 a bf16 step is 2."""
        layer = LRegLinear(nn.Linear(1, 1), 1, 1)
        layer.update_layer("default", 1, 2, LRegConfig(preset="paper", weighting="factored", linear_term=True))
        with torch.no_grad():
            layer.lreg_projection["default"].weight.fill_(300.0)
            z = layer.latent("default", torch.tensor([[1.0], [1.0 + 2**-7]], dtype=torch.bfloat16))
        assert (z[1] - z[0]).item() == pytest.approx(300 / 128, rel=1e-5)


class TestNames:
    def test_parameters_are_called_as_those_of_lora(self):
        model = get_peft_model(tiny.gpt2(), LRegConfig(weighting="factored", target_modules=["mlp"], n_nodes=4))
        names = {name.partition("lreg_")[2] for name, p in model.named_parameters() if p.requires_grad}
        assert names == {
            "projection.default.weight",
            "projection.default.bias",
            "encoder.default.weight",
            "coefficients.default.weight",
        }

    def test_a_copy_by_name_is_the_same_function(self):
        """What trainers with a reference policy do: a second adapter, and every parameter with `.default.` copied."""
        config = LRegConfig(task_type="CAUSAL_LM", weighting="factored", target_modules=["mlp"], n_nodes=5)
        model = get_peft_model(tiny.gpt2(), config)
        with torch.no_grad():
            for layer in tiny.layers(model):
                layer.lreg_coefficients["default"].weight.normal_()
                moved = torch.tensor([0.0, 0.1, 0.2, 0.3, 1.0]).expand(2, 5)
                layer.lreg_encoder["default"].nodes.copy_(moved)
        ids = torch.randint(3, tiny.VOCABULARY, (2, 9))
        expected = model.eval()(ids).logits
        model.add_adapter("ref", model.peft_config["default"])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".default." in name:
                    model.get_parameter(name.replace(".default.", ".ref.")).copy_(parameter)
        model.set_adapter("ref")
        assert torch.equal(model(ids).logits, expected)
        assert moved.diff().min() > MIN_RELATIVE_ELEMENT

    def test_another_configuration_begins_on_meshes_of_its_own(self):
        model = get_peft_model(tiny.gpt2(), LRegConfig(target_modules=["mlp"], n_nodes=5))
        with torch.no_grad():
            for layer in tiny.layers(model):
                layer.lreg_encoder["default"].nodes.copy_(layer.lreg_encoder["default"].nodes ** 2)
        model.add_adapter("other", LRegConfig(target_modules=["mlp"], n_nodes=5, backbone_eval=True))
        for layer in tiny.layers(model):
            assert torch.equal(layer.lreg_encoder["other"].nodes, uniform_nodes(2, 5))

    @pytest.mark.parametrize("weighting", tiny.WEIGHTINGS.values(), ids=tiny.WEIGHTINGS)
    def test_keys_of_files(self, weighting, tmp_path):
        model = get_peft_model(tiny.gpt2(), LRegConfig(preset="paper", task_type="CAUSAL_LM", n_nodes=3, **weighting))
        model.save_pretrained(tmp_path)
        parts = ["projection.weight", "projection.bias", "encoder.nodes", "coefficients.weight"]
        if weighting["weighting"] == "factored":
            parts.append("encoder.weight")
        keys = {f"base_model.model.lm_head.lreg_{part}" for part in parts}
        assert set(load_file(tmp_path / "adapter_model.safetensors")) == keys
