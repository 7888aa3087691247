"""The layer by itself: arithmetic, layouts, kinds of modules, precision."""

import copy
import pickle
from collections import namedtuple

import pytest
import torch
from tiny import shake
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.pytorch_utils import Conv1D

from lreg_peft import LRegConfig
from lreg_peft.core import hat_basis
from lreg_peft.core.coordinates import project
from lreg_peft.tuner.layer import LRegLayer, LRegLinear

EPS = torch.finfo(torch.float32).eps


def layer_around(module: nn.Module, in_features: int, out_features: int, *names: str, **options) -> LRegLayer:
    """A layer with one active adapter per name ("default" without names), zero coefficients."""
    layer = (LRegLinear if isinstance(module, nn.Linear) else LRegLayer)(module, in_features, out_features)
    config = LRegConfig(preset="paper", **{"n_components": 3, "n_nodes": 4, **options})
    for name in names or ("default",):
        layer.update_layer(name, config.n_components, config.n_nodes, config)
    layer.set_adapter(list(names or ("default",)))
    return layer.eval()


def reference(layer: LRegLayer, features: torch.Tensor, name: str = "default") -> torch.Tensor:
    """sum_ij psi_ij(sigmoid(P x + b)) c_ij, features last."""
    coords = project(features, layer.lreg_projection[name].weight, layer.lreg_projection[name].bias)
    coefficients = layer.nodal_coefficients(name).to(coords.dtype)
    return torch.einsum("...ij,ijc->...c", hat_basis(coords, layer.lreg_encoder[name].nodes), coefficients)


def check_shortcut(layer: LRegLayer, features: torch.Tensor, hidden: torch.Tensor, base: torch.Tensor) -> None:
    # The two sides add at most 2 x components numbers of the size of the result in different orders.
    expected = base + reference(layer, features)
    assert (hidden - expected).abs().max() <= 16 * EPS * expected.abs().max()
    assert not torch.allclose(hidden, base)


class TestArithmetic:
    def test_starts_as_the_base_module(self):
        base = nn.Linear(5, 7)
        layer, features = layer_around(copy.deepcopy(base), 5, 7), torch.randn(2, 3, 5)
        assert torch.equal(layer(features), base(features))

    def test_random_start_differs(self):
        layer, features = layer_around(nn.Linear(5, 7), 5, 7, init_weights=False), torch.randn(2, 3, 5)
        assert not torch.equal(layer(features), layer.base_layer(features))

    @pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (2, 3, 4, 5)])
    def test_equals_the_formula(self, shape):
        layer, features = layer_around(nn.Linear(5, 7), 5, 7), torch.randn(shape)
        shake(layer)
        check_shortcut(layer, features, layer(features), layer.base_layer(features))

    @pytest.mark.parametrize("n_nodes", [2, 3, 8, 9, 40])
    def test_every_dof(self, n_nodes):
        layer, features = layer_around(nn.Linear(5, 7), 5, 7, n_nodes=n_nodes), torch.randn(50, 5)
        shake(layer)
        check_shortcut(layer, features, layer(features), layer.base_layer(features))

    def test_active_adapters_add_up(self):
        layer, features = layer_around(nn.Linear(5, 7), 5, 7, "a", "b"), torch.randn(4, 5)
        shake(layer, "a", seed=1)
        shake(layer, "b", seed=2)
        base = layer.base_layer(features)
        expected = base + layer.shortcut("a", features, base) + layer.shortcut("b", features, base)
        torch.testing.assert_close(layer(features), expected, rtol=1e-6, atol=1e-6)  # summed in another order
        assert not torch.allclose(layer.shortcut("a", features, base), layer.shortcut("b", features, base))

    def test_gradients_reach_everything_but_the_base(self):
        layer, features = layer_around(nn.Linear(5, 7), 5, 7), torch.randn(4, 5, requires_grad=True)
        shake(layer)
        layer.base_layer.requires_grad_(False)
        layer(features).square().sum().backward()
        assert {name for name, p in layer.named_parameters() if p.grad is not None} == {
            "lreg_projection.default.weight",
            "lreg_projection.default.bias",
            "lreg_coefficients.default.weight",
        }
        assert all(p.grad.abs().sum() > 0 for p in layer.parameters() if p.grad is not None)
        through_base = torch.autograd.grad(layer.base_layer(features).square().sum(), features)[0]
        assert not torch.allclose(features.grad, through_base)

    def test_disabled_layer_is_the_base_module(self):
        layer, features = layer_around(nn.Linear(5, 7), 5, 7), torch.randn(4, 5)
        shake(layer)
        layer.enable_adapters(False)
        assert torch.equal(layer(features), layer.base_layer(features))
        layer.enable_adapters(True)
        assert not torch.equal(layer(features), layer.base_layer(features))


class TestModuleKinds:
    def test_conv1d_of_transformers(self):
        layer, features = layer_around(Conv1D(7, 5), 5, 7), torch.randn(2, 3, 5)
        shake(layer)
        check_shortcut(layer, features, layer(features), layer.base_layer(features))

    @pytest.mark.parametrize("square", [False, True], ids=["", "spatial size equal to channels"])
    @pytest.mark.parametrize(
        ("convolution", "ndim"), [(nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)], ids=["1d", "2d", "3d"]
    )
    def test_convolution_of_the_same_size(self, convolution, ndim, square):
        channels, size = (4, 4) if square else (4, 6)
        out = channels if square else 7
        layer = layer_around(convolution(channels, out, 3, padding=1), channels, out)
        shake(layer)
        features = torch.randn(2, channels, *[size] * ndim)
        last = layer(features).movedim(1, -1), layer.base_layer(features).movedim(1, -1)
        check_shortcut(layer, features.movedim(1, -1), *last)

    def test_linear_layer_on_a_square_input_reads_the_last_dimension(self):
        layer, features = layer_around(nn.Linear(4, 4), 4, 4), torch.randn(2, 4, 4)
        shake(layer)
        check_shortcut(layer, features, layer(features), layer.base_layer(features))

    def test_strided_convolution_is_average_pooled(self):
        layer, features = layer_around(nn.Conv2d(4, 7, 3, stride=2, padding=1), 4, 7), torch.randn(2, 4, 8, 6)
        shake(layer)
        base = layer.base_layer(features)
        assert base.shape == (2, 7, 4, 3)
        value = reference(layer, features.movedim(1, -1)).movedim(-1, 1)
        expected = base + nn.functional.avg_pool2d(value, 2)
        assert (layer(features) - expected).abs().max() <= 16 * EPS * expected.abs().max()

    def test_strided_stage_of_several_layers(self):
        stage = nn.Sequential(nn.Conv2d(4, 5, 3, 2, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 7, 1))
        layer, features = layer_around(stage, 4, 7), torch.randn(2, 4, 8, 8)
        shake(layer)
        base = stage(features)
        value = reference(layer, features.movedim(1, -1)).movedim(-1, 1)
        expected = base + nn.functional.avg_pool2d(value, 2)
        assert (layer(features) - expected).abs().max() <= 16 * EPS * expected.abs().max()

    def test_stage_that_flattens_is_refused(self):
        layer = layer_around(nn.Sequential(nn.Conv2d(4, 7, 3), nn.Flatten()), 4, 7)
        with pytest.raises(ValueError, match=r"from 4 to 7 features .* takes \(2, 4, 8, 8\) to \(2, 252\)"):
            layer(torch.randn(2, 4, 8, 8))

    def test_head_that_takes_the_first_token(self):
        class Head(nn.Linear):
            def forward(self, features):
                return super().forward(features[:, 0])

        layer, features = layer_around(Head(5, 7), 5, 7), torch.randn(2, 3, 5)
        shake(layer)
        check_shortcut(layer, features[:, 0], layer(features), layer.base_layer(features))

    def test_keyword_arguments_only(self):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(5, 7)

            def forward(self, hidden_states, scale=1.0):
                return self.linear(hidden_states) * scale

        layer, features = layer_around(Block(), 5, 7), torch.randn(4, 5)
        shake(layer)
        check_shortcut(layer, features, layer(scale=2.0, hidden_states=features), layer.base_layer(features, scale=2.0))

    @pytest.mark.parametrize(
        "make",
        [
            lambda h: (h, "rest"),
            lambda h: [h, "rest"],
            lambda h: namedtuple("Pair", "hidden rest")(h, "rest"),
            lambda h: BaseModelOutput(last_hidden_state=h, attentions=("rest",)),
            lambda h: {"hidden": h, "rest": "rest"},
        ],
        ids=["tuple", "list", "named tuple", "ModelOutput", "dict"],
    )
    def test_outputs_that_begin_with_a_tensor(self, make):
        class Block(nn.Linear):
            def forward(self, x):
                return make(super().forward(x))

        layer, features = layer_around(Block(5, 7), 5, 7), torch.randn(4, 5)
        shake(layer)
        output, base = layer(features), layer.base_layer(features)
        assert type(output).__name__ == type(base).__name__
        first, rest = output.values() if isinstance(output, dict) else output
        assert rest in ("rest", ("rest",))
        check_shortcut(layer, features, first, nn.Linear.forward(layer.base_layer, features))

    def test_output_without_a_tensor_is_refused(self):
        class Block(nn.Linear):
            def forward(self, x):
                return "text"

        with pytest.raises(TypeError, match="output is a tensor or starts with one, got str"):
            layer_around(Block(5, 7), 5, 7)(torch.randn(4, 5))

    def test_output_of_another_size_is_refused(self):
        with pytest.raises(ValueError, match=r"from 5 to 7 features .* takes \(2, 5\) to \(2, 5\)"):
            layer_around(nn.Identity(), 5, 7)(torch.randn(2, 5))

    @pytest.mark.parametrize(
        ("features", "got"), [(torch.ones(2, 5, dtype=torch.long), "torch.int64"), ("text", "str"), (None, "NoneType")]
    )
    def test_input_that_is_no_hidden_state_is_refused(self, features, got):
        class Block(nn.Linear):
            def forward(self, x):
                return torch.zeros(2, 7)

        with pytest.raises(TypeError, match=f"floating-point tensor as the first input of the module, got .*{got}"):
            layer_around(Block(5, 7), 5, 7)(features)

    def test_other_feature_count_is_refused(self):
        layer = layer_around(nn.Identity(), 5, 7)
        with pytest.raises(ValueError, match=r"from 5 to 7 features .*Identity, which takes \(2, 6\).*feature_sizes"):
            layer(torch.randn(2, 6))


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_result_has_the_dtype_of_the_base(self, dtype):
        layer, features = layer_around(nn.Linear(5, 7).to(dtype), 5, 7), torch.randn(4, 5).to(dtype)
        shake(layer)
        result = layer(features)
        assert result.dtype == dtype
        expected = layer.base_layer(features).double() + reference(layer, features.float())
        # One rounding of the coefficients, one of each of the basis values, products and sums: 3 x components terms.
        assert (result.double() - expected).abs().max() <= 12 * torch.finfo(dtype).eps * 4

    def fine_mesh(self, dtype: torch.dtype) -> LRegLayer:
        """A mesh with two nodes that are closer than the dtype's resolution near 1, and a hat between them."""
        layer = layer_around(nn.Linear(1, 1).to(dtype), 1, 1, n_components=1, n_nodes=3)
        with torch.no_grad():
            layer.lreg_projection["default"].weight.fill_(1.0)
            layer.lreg_encoder["default"].nodes.copy_(torch.tensor([[0.0, 0.9990, 1.0]]))
            layer.set_table("default", torch.tensor([[0.0], [1.0], [0.0]]))
        return layer

    # sigmoid: .99909, .99966; both 1.0 in bf16
    FINE, VALUES = torch.tensor([[7.0], [8.0]]), torch.tensor([[0.9111], [0.3354]])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_coordinates_are_not_rounded(self, dtype):
        features = self.FINE.to(dtype)
        value = self.fine_mesh(dtype).shortcut("default", features, features)
        assert (value.float() - self.VALUES).abs().max() < 4 * torch.finfo(dtype).eps

    def test_autocast_does_not_round_coordinates(self):
        with torch.autocast("cpu", torch.bfloat16):
            value = self.fine_mesh(torch.float32).shortcut("default", self.FINE, self.FINE)
        assert (value - self.VALUES).abs().max() < 1e-3  # the digits given above

    @pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.bfloat16)])
    def test_casting_the_model_keeps_nodes(self, cast):
        layer = layer_around(nn.Linear(5, 7), 5, 7)
        shake(layer)
        before = layer.lreg_encoder["default"].nodes.clone()
        cast(layer)
        assert layer.lreg_projection["default"].weight.dtype != torch.float32
        assert layer.lreg_encoder["default"].nodes.dtype == torch.float32
        assert torch.equal(layer.lreg_encoder["default"].nodes, before)

    def test_autocast_runs_the_shortcut_in_the_dtype_of_the_output(self):
        layer, features = layer_around(nn.Linear(5, 7), 5, 7), torch.randn(4, 5)
        shake(layer)
        with torch.autocast("cpu", torch.bfloat16):
            result, base = layer(features), layer.base_layer(features)
        assert result.dtype == base.dtype == torch.bfloat16
        expected = base.double() + reference(layer, features)
        assert (result.double() - expected).abs().max() <= 12 * torch.finfo(torch.bfloat16).eps * 4

    def test_integer_first_parameter_leaves_the_adapter_floating(self):
        base = nn.Module()
        base.packed = nn.Parameter(torch.zeros(3, 3, dtype=torch.uint8), requires_grad=False)
        base.forward = lambda x: x
        layer = layer_around(base, 5, 5)
        assert all(p.dtype == torch.float32 for n, p in layer.named_parameters() if "lreg_" in n)


class TestAdapters:
    def test_update_replaces_the_adapter(self):
        layer = layer_around(nn.Linear(5, 7), 5, 7)
        layer.update_layer("default", 2, 9, LRegConfig(preset="paper", n_nodes=9))
        assert layer.table("default").shape == (18, 7)
        assert layer.lreg_encoder["default"].nodes.shape == (2, 9)

    def test_deleting_removes_every_tensor(self):
        layer = layer_around(nn.Linear(5, 7), 5, 7, "a", "b")
        layer.delete_adapter("a")
        assert not [key for key in layer.state_dict() if "a" in key.split(".")]
        assert len([key for key in layer.state_dict() if "b" in key.split(".")]) == 4
        assert "a" not in layer.curvature_weight

    def test_fixed_projection_stays_fixed_after_switching(self):
        layer = layer_around(nn.Linear(5, 7), 5, 7, train_projection=False)
        layer.update_layer("other", 2, 2, LRegConfig(preset="paper"))
        for active in ("other", "default"):
            layer.set_adapter(active)
        assert not layer.lreg_projection["default"].weight.requires_grad
        assert not layer.lreg_projection["default"].bias.requires_grad
        assert layer.lreg_coefficients["default"].weight.requires_grad
        layer.set_adapter("other")
        assert layer.lreg_projection["other"].weight.requires_grad

    def test_merging_is_refused(self):
        layer = layer_around(nn.Linear(5, 7), 5, 7)
        for call in (layer.merge, layer.unmerge):
            with pytest.raises(NotImplementedError, match=r"cannot be merged.*nonlinear.*unload"):
                call()
        assert not layer.merged

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_compute_the_same_and_share_nothing(self, clone):
        layer, features = layer_around(nn.Linear(5, 7), 5, 7, curvature_weight=0.1), torch.randn(4, 5)
        shake(layer)
        expected, twin = layer(features), clone(layer)
        assert torch.equal(twin(features), expected)
        shake(twin)
        assert torch.equal(layer(features), expected)
        assert not torch.equal(twin(features), expected)

    def test_layers_share_no_bookkeeping(self):
        one, other = layer_around(nn.Linear(5, 7), 5, 7, train_projection=False), layer_around(nn.Linear(5, 7), 5, 7)
        assert one.frozen_peft_weight_names == {"default": ("lreg_projection",)}
        assert other.frozen_peft_weight_names == {}
        assert one.merged_adapters is not other.merged_adapters


class TestStandingInForTheBlock:
    def test_attributes_of_the_block_are_reachable(self):
        layer = layer_around(nn.Linear(5, 7), 5, 7)
        assert layer.weight is layer.base_layer.weight
        head = nn.Module()
        head.decoder, head.label = nn.Linear(5, 7), "plain"
        layer = layer_around(head, 5, 7)
        assert layer.decoder is head.decoder
        assert layer.label == "plain"
        with pytest.raises(AttributeError, match="no attribute 'encoder'"):
            _ = layer.encoder

    def test_assigning_reaches_the_block(self):
        layer = layer_around(nn.Linear(5, 7), 5, 7)
        tied = nn.Parameter(torch.randn(7, 5))
        layer.weight = tied
        assert layer.base_layer.weight is tied
        assert "weight" not in layer._parameters

    def test_own_attributes_stay_own(self):
        layer = layer_around(nn.Linear(5, 7), 5, 7)
        layer.note = 1
        assert not hasattr(layer.base_layer, "note")

    def test_representation(self):
        text = repr(layer_around(nn.Linear(5, 7), 5, 7))
        assert text.startswith("lreg_peft.LRegLinear(")
        assert "in_features=5, out_features=7" in text

    def test_class_tells_linear_layers_apart(self):
        assert isinstance(layer_around(nn.Linear(5, 7), 5, 7), LRegLinear)
        assert "Linear" not in type(layer_around(nn.Identity(), 5, 7)).__name__
