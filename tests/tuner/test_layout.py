"""Layouts by themselves: what is inferred, what must be said, pooling and its transpose."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import ConvNextConfig
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm, ConvNextStage

from lreg_peft.tuner.layout import ROW_BY_ROW, Layout, LayoutHints, Reading

PLAIN = nn.Identity()
CONVOLUTION = {"module": nn.Conv1d(4, 7, 1)}
IMAGE = {"channels_first": True, "output_channels_first": True}


def of(features, output, sizes=(4, 7), module=PLAIN, **said):
    return Layout.of(LayoutHints(module, *sizes), features, output, Reading(**said))


@pytest.mark.parametrize(
    ("features", "output", "said", "expected"),
    [
        ((5, 4), (5, 7), {}, ROW_BY_ROW),
        ((4,), (7,), {}, ROW_BY_ROW),
        ((2, 5, 4), (2, 5, 7), {}, ROW_BY_ROW),
        ((2, 5, 5, 4), (2, 5, 5, 7), {}, ROW_BY_ROW),
        ((2, 4, 6), (2, 7, 6), CONVOLUTION, Layout(**IMAGE)),
        ((2, 4, 6), (2, 7, 6), {"layout": "channels_first"}, Layout(**IMAGE)),
        ((2, 4, 6, 6), (2, 7, 6, 6), {}, Layout(**IMAGE)),
        ((2, 4, 6, 6), (2, 7, 3, 3), {}, Layout(**IMAGE, space=(6, 6), output_space=(3, 3))),
        ((2, 4, 8, 6, 6), (2, 7, 4, 3, 3), {}, Layout(**IMAGE, space=(8, 6, 6), output_space=(4, 3, 3))),
        # one vector from several positions
        ((2, 5, 4), (2, 7), {}, Layout(readout="first")),
        ((2, 5, 4), (2, 7), {"readout": "mean"}, Layout(readout="mean")),
        ((2, 4, 1, 1), (2, 7), {}, Layout(channels_first=True, readout="flatten")),
        ((2, 4, 6, 6), (2, 7), {"readout": "mean"}, Layout(channels_first=True, readout="mean")),
        ((2, 4, 6), (2, 7), {"readout": "mean", **CONVOLUTION}, Layout(channels_first=True, readout="mean")),
        ((2, 6, 6, 4), (2, 7), {"layout": "tokens", "readout": "mean"}, Layout(readout="mean")),
        ((2, 4), (2, 7), {"layout": "vector", "readout": "mean"}, ROW_BY_ROW),
        # images as tokens
        ((2, 16, 4), (2, 4, 7), {"layout": "grid"}, Layout(space=(4, 4), output_space=(2, 2))),
        ((2, 4, 8, 8), (2, 16, 7), {"layout": "grid"}, Layout(True, False, None, (8, 8), (4, 4))),
        ((2, 16, 4), (2, 7, 2, 2), {"layout": "grid"}, Layout(False, True, None, (4, 4), (2, 2))),
    ],
)
def test_what_shapes_and_words_mean(features, output, said, expected):
    assert of(features, output, **said) == expected


def test_a_square_is_settled_by_the_module_or_by_a_word():
    square = (2, 4, 4), (2, 4, 4), (4, 4)
    assert of(*square) == ROW_BY_ROW
    assert of(*square, module=nn.Conv1d(4, 4, 1)) == Layout(**IMAGE)
    assert of(*square, layout="channels_first") == Layout(**IMAGE)
    assert of(*square, module=nn.Conv1d(4, 4, 1), layout="tokens") == ROW_BY_ROW


@pytest.mark.parametrize("length", [3, 4, 7])  # also that of the features, before and behind
def test_the_length_of_a_sequence_is_never_compared_with_the_width(length):
    assert of((2, length, 4), (2, length, 7)) == ROW_BY_ROW
    assert of((length, 2, 4), (length, 2, 7)) == ROW_BY_ROW
    assert of((2, length, 4), (2, length, 7), module=nn.Sequential(nn.Linear(4, 7), nn.GELU())) == ROW_BY_ROW


class TestSquareImages:
    """As many channels as the image is wide: the first layer that has their number tells where they lie."""

    SHAPES = (2, 8, 8, 8), (2, 8, 8, 8), (8, 8)

    @pytest.mark.parametrize(
        "module",
        [
            nn.BatchNorm2d(8),
            nn.GroupNorm(2, 8),
            nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.LayerNorm(8), nn.Linear(8, 32))),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8)),
            ConvNextLayerNorm(8, data_format="channels_first"),
            ConvNextStage(ConvNextConfig(), 8, 8, stride=1, depth=1),
            nn.Sequential(nn.Linear(2, 3), nn.Conv2d(8, 8, 1)),
        ],
        ids=lambda module: type(module).__name__,
    )
    def test_channels_first(self, module):
        assert of(*self.SHAPES, module=module) == Layout(**IMAGE)

    @pytest.mark.parametrize(
        "module",
        [
            nn.LayerNorm(8),
            nn.Linear(8, 8),
            nn.RMSNorm(8),
            ConvNextLayerNorm(8),
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.Conv2d(16, 16, 3), nn.Linear(16, 8)),
        ],
        ids=lambda module: type(module).__name__,
    )
    def test_features_last(self, module):
        assert of(*self.SHAPES, module=module) == ROW_BY_ROW

    @pytest.mark.parametrize("module", [nn.ReLU(), nn.Sequential(nn.Linear(3, 4))], ids=["no size", "another size"])
    def test_a_module_that_does_not_tell_asks_for_a_word(self, module):
        with pytest.raises(ValueError, match="no layer inside tells: say layout='channels_first' or 'tokens'"):
            of(*self.SHAPES, module=module)
        assert of(*self.SHAPES, module=module, layout="channels_first") == Layout(**IMAGE)
        assert of(*self.SHAPES, module=module, layout="tokens") == ROW_BY_ROW

    def test_a_layer_for_images_says_nothing_of_tokens(self):
        square = (2, 8, 8), (2, 8, 8), (8, 8)
        assert of(*square, module=nn.Sequential(nn.Conv2d(8, 8, 1), nn.Linear(8, 8))) == ROW_BY_ROW
        assert of(*square, module=nn.BatchNorm1d(8)) == Layout(**IMAGE)


@pytest.mark.parametrize(
    ("features", "output", "said", "message"),
    [
        ((2, 4, 6, 6), (2, 7), {}, "36 positions: say how they become one, readout='mean' or 'first'"),
        ((2, 4, 6, 6), (2, 8), {"readout": "mean"}, r"output must be \[batch, 7\]"),
        ((2, 5, 5, 5), (2, 7), {"readout": "mean"}, "no dimension of 4 features"),
        ((2, 5, 4), (2, 5, 7), {"readout": "mean"}, "output is not one vector per sample: leave readout out"),
        ((2, 5, 4), (2, 5, 7), {"layout": "vector"}, r"layout='vector' is for outputs \[batch, features\]"),
        ((2, 5, 4), (2, 5, 7), {"layout": "channels_first"}, r"must be \[batch, 4, \*space\]"),
        ((2, 4), (2, 7), {"layout": "channels_first"}, r"must be \[batch, 4, \*space\]"),
        ((2, 5, 6, 4), (2, 5, 6, 8), {}, "feature_sizes"),
        ((2, 16, 4), (2, 4, 7), {}, "number of tokens changes.*layout='grid'"),
        ((2, 4, 6), (2, 7, 6), {}, "features lie in dimension 1.*layout='channels_first'"),
        ((2, 4, 8, 8), (2, 17, 7), {}, "number of tokens changes"),
        ((2, 17, 4), (2, 4, 7), {"layout": "grid"}, "input must be .* with the tokens of a square image and no others"),
        ((2, 4, 8, 8), (2, 17, 7), {"layout": "grid"}, "output must be .*and no others"),
        ((2, 6), (2, 7), {}, "feature_sizes"),
        ((), (2, 7), {}, "feature_sizes"),
    ],
)
def test_what_does_not_fit(features, output, said, message):
    with pytest.raises(ValueError, match=message):
        of(features, output, **said)


def test_rows_of_every_readout():
    image = torch.randn(2, 4, 3, 5)
    assert torch.equal(of(image.shape, (2, 7), readout="first").rows(image), image[:, :, 0, 0])
    torch.testing.assert_close(of(image.shape, (2, 7), readout="mean").rows(image), image.mean(dim=(2, 3)))
    tokens = torch.randn(2, 6, 4)
    assert torch.equal(of(tokens.shape, (2, 7)).rows(tokens), tokens[:, 0])
    torch.testing.assert_close(of(tokens.shape, (2, 7), readout="mean").rows(tokens), tokens.mean(dim=1))
    single = torch.randn(2, 4, 1, 1)
    assert torch.equal(of(single.shape, (2, 7)).rows(single), single.flatten(1))


@pytest.mark.parametrize(("space", "small"), [((6, 4), (3, 2)), ((7, 5), (3, 2)), ((5,), (2,)), ((4, 6, 3), (2, 3, 1))])
def test_pooling_is_adaptive_and_spreading_is_its_transpose(space, small):
    layout = of((2, 4, *space), (2, 7, *small), layout="channels_first")
    rows = torch.randn(2, *space, 3, dtype=torch.float64, requires_grad=True)
    pooled = layout.pool(rows)
    pool = {1: functional.adaptive_avg_pool1d, 2: functional.adaptive_avg_pool2d, 3: functional.adaptive_avg_pool3d}
    torch.testing.assert_close(pooled, pool[len(space)](rows.movedim(-1, 1), small).movedim(1, -1))
    gradient = torch.randn_like(pooled)
    (expected,) = torch.autograd.grad(pooled, rows, gradient)
    torch.testing.assert_close(layout.spread(gradient), expected)


def test_tokens_of_a_square_image_are_pooled_over_the_image():
    layout = of((2, 16, 4), (2, 4, 7), layout="grid")
    rows = torch.randn(2, 16, 3, dtype=torch.float64, requires_grad=True)
    pooled = layout.pool(rows)
    expected = functional.avg_pool2d(rows.unflatten(1, (4, 4)).movedim(-1, 1), 2).movedim(1, -1).flatten(1, 2)
    torch.testing.assert_close(pooled, expected)
    gradient = torch.randn_like(pooled)
    torch.testing.assert_close(layout.spread(gradient), torch.autograd.grad(pooled, rows, gradient)[0])
