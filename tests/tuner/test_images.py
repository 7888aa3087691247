"""Image models: default placements, classifiers of convolutional networks, what is found before training."""

import copy
from collections import OrderedDict

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import IMAGE_MODELS, adapt, image_model, layers, same_state, shake, state
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import ConvNextConfig, ConvNextForImageClassification

from lreg_peft import (
    LRegConfig,
    cache_features,
    fit_coefficients,
    initialize_lreg_weights,
    inspect_targets,
    track_statistics,
    update_meshes,
)
from lreg_peft.training.statistics import statistics_of
from lreg_peft.tuner.sites import Site

PLACEMENTS = {
    "resnet": ("resnet.encoder.stages.3", 16, 24),
    "regnet": ("regnet.encoder.stages.3", 16, 24),
    "convnext": ("convnext.encoder.stages.3", 16, 24),
    "convnextv2": ("convnextv2.encoder.stages.3", 16, 24),
    "mobilenet_v2": ("mobilenet_v2.conv_1x1", 8, 1280),
    "efficientnet": ("efficientnet.encoder.top_conv", 32, 128),
    "swin": ("swin.encoder.layers.1", 16, 16),
    "segformer": ("segformer.stages.3", 16, 16),
    "vit": ("classifier", 16, 5),
    "deit": ("classifier", 16, 5),
    "dinov2": ("classifier", 32, 5),
    "beit": ("classifier", 16, 5),
}


def logits(model: nn.Module, batch: dict) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(pixel_values=batch["pixel_values"]).logits


class TestDefaults:
    @pytest.mark.parametrize("model_type", PLACEMENTS)
    def test_starts_as_the_base_learns_and_comes_back(self, model_type, tmp_path):
        base, batch = image_model(model_type)
        before, base_state = logits(base, batch), state(base)
        report = inspect_targets(base, LRegConfig(preset="paper"), example_inputs=batch)
        assert [(t.name, t.in_features, t.out_features) for t in report] == [PLACEMENTS[model_type]]
        model = adapt(copy.deepcopy(base), n_nodes=4)
        assert torch.equal(logits(model, batch), before)
        shake(model)
        after = logits(model, batch)
        assert not torch.allclose(after, before)
        model.train()
        model(**batch).loss.backward()
        own = {name: p for name, p in model.named_parameters() if "lreg_" in name}
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own.values())
        assert all(p.grad is None for name, p in model.named_parameters() if "lreg_" not in name)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base, tmp_path)
        # The same weights; how a file's tensors lie in memory decides in which order products are summed.
        torch.testing.assert_close(logits(loaded, batch), after, rtol=1e-6, atol=1e-6)
        assert same_state(state(loaded.unload()), base_state)  # running averages of batch norms too

    def test_every_image_model_of_the_tests_has_one(self):
        assert PLACEMENTS.keys() == IMAGE_MODELS.keys()

    @pytest.mark.parametrize("options", [{"modules_to_save": ["classifier"]}, {"task_type": "SEQ_CLS"}], ids=str)
    def test_a_classifier_that_is_trained_in_full_gets_no_shortcut(self, options):
        names = {
            t.name.rpartition(".")[2]
            for t in inspect_targets(image_model("vit")[0], LRegConfig(preset="paper", **options))
        }
        assert names == {"q_proj", "k_proj"}

    def test_new_head_beside_a_stage(self):
        base, batch = image_model("resnet")
        model = adapt(base, modules_to_save=["classifier"])
        model(**batch).loss.backward()
        trained = {name.partition(".lreg_")[0] for name, p in model.named_parameters() if p.grad is not None}
        assert trained == {
            "base_model.model.resnet.encoder.stages.3",
            "base_model.model.classifier.modules_to_save.default.1.weight",
            "base_model.model.classifier.modules_to_save.default.1.bias",
        }


class TestClassifierOfConvolutionalNetworks:
    """Table A1's placement: flattening and a linear layer."""

    @pytest.mark.parametrize("model_type", ["resnet", "regnet"])
    def test_adds_what_the_formula_says(self, model_type):
        base, batch = image_model(model_type)
        before = logits(base, batch)
        model = adapt(base, target_modules=["classifier"], n_components=3, n_nodes=5)
        assert torch.equal(logits(model, batch), before)
        shake(model)
        (layer,) = layers(model)
        seen = []
        layer.register_input_hook(seen.append)
        after = logits(model, batch)
        assert seen[0].shape == (6, 24)
        value = layer.shortcut("default", seen[0], before)
        assert value.abs().max() > 0.1
        torch.testing.assert_close(after, before + value)

    @pytest.mark.parametrize("model_type", ["resnet", "mobilenet_v2", "vit", "dinov2", "swin"])
    def test_fits_to_the_optimum_and_caches(self, model_type, tmp_path):
        base, batch = image_model(model_type)
        model = adapt(base, target_modules=["classifier"], n_nodes=4)
        model.eval()
        own = model(**batch).loss.item()
        data = [{name: value[i] for name, value in batch.items()} for i in range(6)]
        cache = cache_features(model, DataLoader(data, 4), tmp_path / "cache", dtype=torch.float32, show_progress=False)
        assert (len(cache), cache.n_rows) == (6, 6)
        assert model(**cache.collate([cache[i] for i in range(6)])).loss.item() == pytest.approx(own, rel=1e-5)
        fit = fit_coefficients(model, [batch], ridge=1e-2, show_progress=False)
        assert fit.gap < 1e-6
        loss = model(**batch).loss.item()
        (layer,) = layers(model)
        penalty = 1e-2 / 2 * layer.table("default").square().sum().item()
        assert loss + penalty == pytest.approx(fit.objective, abs=1e-5)
        assert loss < own

    def test_a_head_that_averages_is_read_by_its_mean(self):
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        base = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 4, 3, padding=1), head=head))
        images = torch.randn(6, 3, 8, 8)
        with pytest.raises(ValueError, match=r"\(6, 4, 8, 8\) to \(6, 5\): .*64 positions.*readout='mean' or 'first'"):
            inspect_targets(base, LRegConfig(target_modules=["head"]), example_inputs=images)
        model = get_peft_model(copy.deepcopy(base), LRegConfig(target_modules=["head"], readout="mean"))
        shake(model)
        (layer,) = layers(model)
        features = base.stem(images)
        value = layer.shortcut("default", features.mean(dim=(2, 3)), base(images))
        torch.testing.assert_close(model(images), base(images) + value)


def test_as_many_channels_as_the_image_is_wide():
    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=3, patch_size=4)
    model = adapt(
        ConvNextForImageClassification(config), target_modules=["encoder.stages.0"], n_components=3, n_nodes=4
    )
    shake(model)
    (layer,) = layers(model)
    images = torch.randn(2, 8, 8, 8)
    value = layer.design("default", images.movedim(1, -1)) @ layer.table("default")
    torch.testing.assert_close(layer(images), layer.base_layer(images) + value.movedim(-1, 1))


STRIDED = {"target_modules": ["encoder.stages.3"], "n_components": 3, "n_nodes": 6}


class TestStridedStages:
    """The target has fewer positions than its input: averages, in the value, the statistics and the start."""

    @pytest.mark.parametrize("weighting", ["full", "reduced", "factored"])
    @pytest.mark.parametrize("n_nodes", [4, 12])  # dense and gathered
    def test_pooling_the_basis_gives_the_pooled_values(self, weighting, n_nodes):
        base, _ = image_model("resnet")
        model = adapt(base, **{**STRIDED, "n_nodes": n_nodes}, weighting=weighting)
        shake(model)
        (layer,) = layers(model)
        features, like = torch.randn(2, 16, 6, 6), torch.randn(2, 24, 3, 3)
        rows = features.movedim(1, -1)
        unpooled = layer.design("default", rows) @ layer.table("default")
        expected = functional.avg_pool2d(unpooled.movedim(-1, 1), 2)
        torch.testing.assert_close(layer.shortcut("default", features, like), expected)

    def test_statistics_are_those_of_every_position(self):
        """As they would be gathered if every position had its own value before the average is taken."""
        base, batch = image_model("resnet")
        model = adapt(base, **STRIDED)
        shake(model)
        track_statistics(model, True, n_rows=10**6)
        (layer,) = layers(model)
        inputs, gradients = [], []
        layer.register_input_hook(inputs.append)
        layer.register_forward_hook(lambda m, a, out: out.register_hook(gradients.append) and None)
        model.train()
        model(**batch).loss.backward()
        nodes, rows = layer.lreg_encoder["default"].nodes, inputs[0].reshape(-1, 16)
        # every position of a window of 2 x 2 has a quarter of the gradient of its average
        spread = gradients[0].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3).movedim(1, -1).reshape(-1, 24) / 4
        element = (layer.coords("default", rows).unsqueeze(-1) >= nodes[:, 1:-1]).sum(dim=-1)
        expected = torch.zeros(3, 5).scatter_add_(1, element.T, spread.square().sum(dim=1).expand(3, -1))
        torch.testing.assert_close(statistics_of(Site("", layer, "default")).read().energy, expected)

    def test_gradient_start_takes_the_leading_directions_of_the_pooled_product(self):
        base, batch = image_model("resnet")
        model = adapt(base, **STRIDED)
        inputs, gradients = [], []
        stage = base.get_submodule("resnet.encoder.stages.3")
        stage.register_input_hook(lambda rows: inputs.append(rows))
        handle = stage.register_forward_hook(lambda m, a, out: out.register_hook(gradients.append) and None)
        model(**batch).loss.backward()
        handle.remove()
        initialize_lreg_weights(model, [batch], method="gradient", show_progress=False)
        x = inputs[0].detach()
        pooled = functional.avg_pool2d(x.movedim(-1, 1), 2).movedim(1, -1).reshape(-1, 16) - x.reshape(-1, 16).mean(
            dim=0
        )
        product = gradients[0].movedim(1, -1).reshape(-1, 24).T @ pooled
        compress = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))  # as the start draws it
        _, _, right = torch.linalg.svd(compress.T @ product)
        (layer,) = layers(model)
        found = functional.normalize(layer.lreg_projection["default"].weight.detach(), dim=1)
        # Directions are up to their sign; sums of some hundred fp32 numbers.
        torch.testing.assert_close((found * right[:3]).sum(dim=1).abs(), torch.ones(3), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("strategy", ["relocate", "paper"])
    def test_meshes_move(self, strategy):
        base, batch = image_model("resnet")
        model = adapt(base, **STRIDED)
        shake(model)
        track_statistics(model, n_hard_samples=8)
        before = layers(model)[0].lreg_encoder["default"].nodes.clone()
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model.train()
            model(**batch).loss.backward()
            optimizer.step()
        update_meshes(model, optimizer, strategy=strategy)
        after = layers(model)[0].lreg_encoder["default"].nodes
        assert (after.diff(dim=1) > 0).all()
        assert not torch.equal(after, before)


class TestExampleInputs:
    def check(self, model_type: str, name: str, message: str, **options) -> None:
        base, batch = image_model(model_type)
        before = state(base)
        with pytest.raises(ValueError, match=message):
            inspect_targets(base, LRegConfig(target_modules=[name], **options), example_inputs=batch)
        assert same_state(state(base), before)
        assert not any(module._forward_hooks for module in base.modules())

    def test_stage_with_downsampling_of_swin(self):
        self.check("swin", "layers.0", r"'swin.encoder.layers.0': .*\(6, 256, 8\) to \(6, 64, 16\).*layout='grid'")

    def test_patch_merging_has_the_size_of_one_patch(self):
        self.check("swin", "downsample", r"from 8 to 16 .*SwinPatchMerging.*\(6, 256, 8\) to \(6, 64, 16\).*'grid'")

    @pytest.mark.parametrize("name", ["layers.0", "downsample"])
    def test_both_work_as_a_grid(self, name):
        base, batch = image_model("swin")
        before = logits(base, batch)
        (target,) = inspect_targets(base, LRegConfig(target_modules=[name], layout="grid"), batch)
        assert (target.in_features, target.out_features) == (8, 16)
        assert (target.input_shape, target.output_shape) == ((6, 256, 8), (6, 64, 16))
        model = adapt(base, target_modules=[name], layout="grid")
        assert torch.equal(logits(model, batch), before)
        shake(model)
        assert not torch.allclose(logits(model, batch), before)

    @pytest.mark.parametrize("model_type", ["vit", "swin"])
    def test_embeddings(self, model_type):
        shapes = {"vit": r"\(6, 3, 8, 8\) to \(6, 5, 16\)", "swin": r"\(6, 3, 32, 32\) to \(6, 256, 8\)"}
        self.check(model_type, f"{model_type}.embeddings", rf"embeddings': .*{shapes[model_type]}")

    def test_sizes_that_cannot_be_read_are_asked_for_with_what_was_seen(self):
        self.check(
            "resnet", "resnet.pooler", r"'resnet.pooler': .*AdaptiveAvgPool2d.*\(6, 24, 2, 2\) to \(6, 24, 1, 1\)"
        )
        base, batch = image_model("resnet")
        config = LRegConfig(target_modules=["resnet.pooler"], feature_sizes={"resnet.pooler": (24, 24)})
        (target,) = inspect_targets(base, config, example_inputs=batch)
        assert target.output_shape == (6, 24, 1, 1)

    @pytest.mark.parametrize(
        ("model_type", "name", "size"),
        [
            ("vit", "vit.layernorm", 16),
            ("resnet", "embedder.embedder.normalization", 8),
            ("convnext", "embeddings.layernorm", 8),
        ],
    )
    def test_norms_have_the_size_of_what_they_normalise(self, model_type, name, size):
        base, batch = image_model(model_type)
        (target,) = inspect_targets(base, LRegConfig(target_modules=[name]), example_inputs=batch)
        assert (target.in_features, target.out_features) == (size, size)
        before = logits(base, batch)
        model = adapt(base, target_modules=[name])
        assert torch.equal(logits(model, batch), before)

    def test_every_misfit_is_named_at_once(self):
        base, batch = image_model("vit")
        names = ["vit.embeddings", "patch_embeddings", "vit.layernorm", "mlp"]
        with pytest.raises(ValueError, match="2 modules cannot be adapted") as error:
            inspect_targets(base, LRegConfig(target_modules=names), example_inputs=batch)
        assert "'vit.embeddings'" in str(error.value)
        assert "'vit.embeddings.patch_embeddings'" in str(error.value)

    def test_module_that_is_not_called(self):
        model = nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(3, 3)})
        model.forward = lambda x: model["used"](x)
        with pytest.raises(ValueError, match=r"'idle' .*does not call it on these inputs"):
            inspect_targets(model, LRegConfig(target_modules=["used", "idle"]), example_inputs=torch.randn(2, 3))

    @pytest.mark.parametrize("model_type", ["resnet", "convnext", "mobilenet_v2"])
    def test_output_that_nothing_reads(self, model_type):
        self.check(model_type, model_type, rf"'{model_type}' .*nothing that the model returns .* depends on the first")

    def test_output_that_is_read_in_place_in_part_or_as_a_number(self):
        class Net(nn.Sequential):
            def forward(self, x):
                result = torch.zeros(len(x), 6)
                result[:, :3].copy_(self[0](x))
                if self[1](x).sum().item() > 0:
                    result = result + 1
                return {"result": [result, self[2](x)[:1].relu_()]}

        model = Net(*(nn.Linear(3, 3) for _ in range(4)))
        assert len(inspect_targets(model, LRegConfig(target_modules=["0", "1", "2"]), torch.randn(2, 3))) == 3

    def test_input_that_is_no_hidden_state(self):
        class Block(nn.Linear):
            def forward(self, ids):
                return super().forward(functional.one_hot(ids, 3).float())

        model = nn.Sequential(Block(3, 3))
        with pytest.raises(ValueError, match=r"'0': .*floating-point tensor as the first input.*torch\.int64"):
            inspect_targets(model, LRegConfig(target_modules=["0"]), example_inputs=(torch.tensor([0, 1]),))

    def test_inputs_of_another_kind(self):
        with pytest.raises(TypeError, match=r"example_inputs must be what the model is called with.*got 'images'"):
            inspect_targets(nn.Sequential(nn.Linear(3, 3)), LRegConfig(target_modules=["0"]), example_inputs="images")

    def test_table_has_the_shapes(self):
        base, batch = image_model("resnet")
        text = str(inspect_targets(base, LRegConfig(preset="paper"), example_inputs=batch))
        assert text.splitlines()[0].split()[-2:] == ["takes", "gives"]
        assert "[6, 16, 4, 4]  [6, 24, 2, 2]" in text

    def test_model_that_already_carries_adapters(self):
        base, batch = image_model("resnet")
        model = adapt(base)
        (target,) = inspect_targets(model, LRegConfig(preset="paper"), example_inputs=batch)
        assert target.input_shape == (6, 16, 4, 4)
        assert target.module_type == "ResNetStage"
