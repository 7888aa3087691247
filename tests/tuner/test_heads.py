"""Heads: what they weight by, their counts, and the names of their weights in model and file."""

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
from lreg_peft.tuner.heads import HEADS, Encoded
from lreg_peft.tuner.layer import wrap

D, N, C = 3, 5, 7


def weights_of(head, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in head.shapes(D, N, C).items()
    }


def code(n=40):
    latent = 3 * torch.randn(n, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Encoded.of(latent)


NODES = uniform_nodes(D, N, dtype=torch.float64) ** 1.5
HIDDEN = torch.randn(40, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
# A few dozen products in fp64, each of order one.
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("name", HEADS)
class TestEveryHead:
    def test_value_is_design_times_table(self, name):
        head = HEADS[name]
        weights = weights_of(head)
        product = head.design(weights, NODES, code()) @ head.table(weights)
        torch.testing.assert_close(head.value(weights, NODES, code(), torch.float64), product, **TOLERANCE)
        added = head.add(weights, NODES, code(), HIDDEN, in_place=False)
        torch.testing.assert_close(added, HIDDEN + product, **TOLERANCE)

    def test_value_is_the_nodal_coefficients_on_the_hat_basis_and_the_linear_term(self, name):
        head = HEADS[name]
        weights = weights_of(head)
        basis = hat_basis(code().coords, NODES)
        expected = torch.einsum("bij,ijc->bc", basis, head.nodal_coefficients(weights))
        if name == "factored+linear":
            expected += code().latent / 1.702 @ weights["direction"]
        torch.testing.assert_close(head.value(weights, NODES, code(), torch.float64), expected, **TOLERANCE)

    def test_table_stacks_the_linear_weights_and_nothing_else(self, name):
        head = HEADS[name]
        weights = weights_of(head)
        stacked = torch.cat([weights[part].reshape(-1, C) for part in head.linear_weights])
        assert torch.equal(head.table(weights), stacked)
        assert head.n_parameters(D, N, C) == sum(weight.numel() for weight in weights.values())

    def test_to_nodes_and_back(self, name):
        head = HEADS[name]
        values = weights_of(head)[head.nodal_weight]
        assert head.to_nodes(values).shape[:2] == (D, N)
        assert torch.equal(head.from_nodes(head.to_nodes(values)), values)

    def test_in_a_model_it_starts_as_the_identity(self, name):
        kind, _, linear = name.partition("+")
        config = LRegConfig(head=kind, linear_term=bool(linear), target_modules=["mlp", "lm_head"], dof=4)
        model = get_peft_model(tiny.gpt2(), config).eval()
        ids = torch.arange(9).view(1, 9) + 3
        assert torch.equal(model(ids).logits, tiny.gpt2().eval()(ids).logits)


class TestLinearTerm:
    def test_with_constant_profiles_it_is_lora_with_a_bias(self):
        layer = wrap(nn.Linear(6, C), 6, C, linear=True).double()
        layer.update_layer("default", D, N, LRegConfig(head="factored", linear_term=True), profile_mean=0.5)
        layer.double()
        a, bias = layer.lreg_projection["default"], layer.lreg_projection_bias["default"]
        b = layer.lreg_direction["default"]
        with torch.no_grad():
            b.normal_()
            bias.normal_()
            x = torch.randn(11, 6, dtype=torch.float64)
            lora = (x @ a.T / 1.702) @ b + (bias / 1.702 + 0.5) @ b
            torch.testing.assert_close(layer(x), layer.base_layer(x) + lora, **TOLERANCE)

    def test_it_goes_on_where_the_sigmoid_says_nothing(self):
        head = HEADS["factored+linear"]
        weights = weights_of(head)
        far = Encoded.of(torch.full((1, D), 60.0, dtype=torch.float64))
        further = Encoded.of(torch.full((1, D), 61.0, dtype=torch.float64))
        step = head.value(weights, NODES, further, torch.float64) - head.value(weights, NODES, far, torch.float64)
        torch.testing.assert_close(step, weights["direction"].sum(dim=0, keepdim=True) / 1.702, rtol=1e-9, atol=1e-9)

    def test_the_mesh_follows_the_nonlinear_part_alone(self):
        """Sliding a node changes the profile, so the gradient in a node's position must not see the linear term."""
        gradients = {}
        for linear in (False, True):
            torch.manual_seed(0)
            layer = wrap(nn.Linear(6, C), 6, C, linear=True)
            layer.update_layer("default", D, N, LRegConfig(head="factored", linear_term=linear))
            with torch.no_grad():
                layer.lreg_direction["default"].fill_(0.3)
                layer.lreg_profile["default"].copy_(torch.arange(D * N).view(D, N).sin())
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
            lreg_peft.track_statistics(layer, n_rows=1000)
            layer.train()(torch.linspace(-2, 2, 60).view(10, 6)).sum().backward()  # the same gradient for both
            optimizer.step()
            sums = layer.lreg_statistics["default"].read(layer.lreg_nodes["default"])
            gradients[linear] = sums.node_gradient
            assert sums.node_gradient.any()
        torch.testing.assert_close(gradients[True], gradients[False])

    def test_meshes_move_and_the_file_remembers(self, tmp_path):
        config = LRegConfig(task_type="CAUSAL_LM", head="factored", linear_term=True, dof=6, target_modules=["mlp"])
        model = get_peft_model(tiny.gpt2(), config).train()
        with torch.no_grad():
            for layer in tiny.layers(model):
                layer.lreg_direction["default"].normal_(std=0.1)
                layer.lreg_profile["default"].normal_()
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
        options = {"head": "factored", "linear_term": True, "dof": 4}
        model = get_peft_model(tiny.gpt2(), LRegConfig(task_type="CAUSAL_LM", **options))
        data = [{"input_ids": row, "labels": row} for row in torch.randint(3, tiny.VOCABULARY, (6, 9))]
        cache = lreg_peft.cache_features(model, data, tmp_path / "c", dtype=torch.float32, show_progress=False)
        fit = lreg_peft.fit_coefficients(model, cache, ridge=1e-2, show_progress=False)
        batch = {name: torch.stack([sample[name] for sample in data]) for name in data[0]}
        (layer,) = tiny.layers(model)
        penalty = 0.5e-2 * layer.lreg_direction["default"].square().sum()
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
        layer = wrap(nn.Linear(1, 1), 1, 1, linear=True)
        layer.update_layer("default", 1, 2, LRegConfig(head="factored", linear_term=True))
        with torch.no_grad():
            layer.lreg_projection["default"].fill_(300.0)
            z = layer.encode("default", torch.tensor([[1.0], [1.0 + 2**-7]], dtype=torch.bfloat16)).latent
        assert (z[1] - z[0]).item() == pytest.approx(300 / 128, rel=1e-5)


class TestNames:
    def test_parameters_are_called_as_those_of_lora(self):
        model = get_peft_model(tiny.gpt2(), LRegConfig(head="factored", target_modules=["mlp"], dof=4))
        names = {name.partition("lreg_")[2] for name, p in model.named_parameters() if p.requires_grad}
        assert names == {f"{part}.default.weight" for part in ("projection", "projection_bias", "profile", "direction")}

    def test_a_copy_by_name_is_the_same_function(self):
        """What trainers with a reference policy do: a second adapter, and every parameter with `.default.` copied."""
        config = LRegConfig(task_type="CAUSAL_LM", head="factored", target_modules=["mlp"], dof=5)
        model = get_peft_model(tiny.gpt2(), config)
        with torch.no_grad():
            for layer in tiny.layers(model):
                layer.lreg_direction["default"].normal_()
                moved = torch.tensor([0.0, 0.1, 0.2, 0.3, 1.0]).expand(2, 5)
                layer.lreg_nodes["default"].copy_(moved)
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
        model = get_peft_model(tiny.gpt2(), LRegConfig(target_modules=["mlp"], dof=5))
        with torch.no_grad():
            for layer in tiny.layers(model):
                layer.lreg_nodes["default"].copy_(layer.lreg_nodes["default"] ** 2)
        model.add_adapter("other", LRegConfig(target_modules=["mlp"], dof=5, backbone_eval=False))
        for layer in tiny.layers(model):
            assert torch.equal(layer.lreg_nodes["other"], uniform_nodes(2, 5))

    def test_files_keep_their_keys(self, tmp_path):
        model = get_peft_model(tiny.gpt2(), LRegConfig(task_type="CAUSAL_LM", head="reduced", dof=3))
        model.save_pretrained(tmp_path)
        head = "base_model.model.lm_head.lreg_"
        parts = ("projection", "projection_bias", "coefficients", "constant", "nodes")
        assert set(load_file(tmp_path / "adapter_model.safetensors")) == {head + part for part in parts}
