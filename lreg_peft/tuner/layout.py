"""How the input and output of a module are laid out, and the way from one to the other.

A shortcut works on rows `[..., features]`. A module may keep its channels in dimension 1 (convolutions, stages), hold
one row per token, change the number of positions, or turn all positions into one vector.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LayoutName = Literal["channels_first", "tokens", "grid", "vector"]
LAYOUTS: tuple[str, ...] = get_args(LayoutName)
Readout = Literal["mean", "first"]
READOUTS: tuple[str, ...] = get_args(Readout)

# Layers with the channels in dimension 1, by the number of dimensions of what they take.
_ANY_SPACE = (nn.GroupNorm, nn.SyncBatchNorm)
_CHANNELS_FIRST = {
    3: (nn.Conv1d, nn.BatchNorm1d, nn.InstanceNorm1d, *_ANY_SPACE),
    4: (nn.Conv2d, nn.BatchNorm2d, nn.InstanceNorm2d, *_ANY_SPACE),
    5: (nn.Conv3d, nn.BatchNorm3d, nn.InstanceNorm3d, *_ANY_SPACE),
}
# The ending of layers that are for images, signals or volumes.
_SPACE = re.compile(r"([123])d$")
# Attributes in which layers keep how many features they take, give or normalise.
_WIDTHS = (
    *("in_channels", "out_channels", "num_channels", "num_features"),
    *("in_features", "out_features", "nx", "nf", "normalized_shape"),
)


@dataclass(frozen=True)
class Reading:
    """What a configuration says of how a module is read; None leaves it to the shapes."""

    layout: str | None = None
    readout: str | None = None


#: Nothing is said.
UNSAID = Reading()


class LayoutHints:
    """What a module tells of its layout, looked at once: the sizes of the shortcut around it, and its layers.

    Args:
        module: the base module.
        in_features: channels of the input.
        out_features: channels of the output.
    """

    def __init__(self, module: nn.Module, in_features: int, out_features: int) -> None:
        self.in_features, self.out_features = in_features, out_features
        widths = {in_features, out_features}
        #: By number of dimensions: whether the layers inside keep channels in dimension 1; None if none tells.
        self.channels_first = {n: _told_by_layers(module, widths, n) for n in (3, 4, 5)}


@dataclass(frozen=True)
class Layout:
    """The layouts of one forward pass.

    Attributes:
        channels_first: whether the input `[batch, channels, *space]` has its channels in dimension 1.
        output_channels_first: the same of the output.
        readout: how all positions of the input become the one vector that the output is: "first" or "mean"; "flatten"
            where there is one position only.
        space: positions of the input in space, where they are not those of the output: `[batch, *space]` rows.
        output_space: positions of the output then.
    """

    channels_first: bool = False
    output_channels_first: bool = False
    readout: str | None = None
    space: tuple[int, ...] | None = None
    output_space: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls, hints: LayoutHints, features: Sequence[int], output: Sequence[int], reading: Reading = UNSAID
    ) -> "Layout":
        """Read the layout off the shapes of the tensors that reach and leave a module.

        Sizes are compared where features are expected, not with positions: a graph with a dynamic length holds for
        every length. Only images, volumes and modules with convolutions inside are looked at for their channels.

        Args:
            hints: of the module.
            features: shape of the input.
            output: shape of the output.
            reading: what the configuration says.

        Raises:
            ValueError: if no shortcut of these sizes fits between these shapes; says what would.
        """
        in_features, out_features = hints.in_features, hints.out_features
        if len(output) == 2 and len(features) > 2:
            return cls._to_vector(hints, features, output, reading)
        if reading.readout is not None and len(features) > 2:
            raise ValueError(
                f"readout={reading.readout!r} makes one vector of all positions, and the output is not one vector per "
                "sample: leave readout out"
            )
        if reading.layout == "vector" and not len(features) == len(output) == 2:
            raise ValueError("layout='vector' is for outputs [batch, features]")
        if reading.layout == "grid":
            return cls._on_grids(in_features, out_features, features, output)
        first = reading.layout == "channels_first" or (
            reading.layout is None and _is_channels_first(hints, features, output)
        )
        if first:
            return cls._channels_first(in_features, out_features, features, output)
        if tuple(output) != (*features[:-1], out_features) or not features or features[-1] != in_features:
            raise ValueError(_advice(in_features, out_features, features, output))
        return ROW_BY_ROW

    @classmethod
    def _to_vector(
        cls, hints: LayoutHints, features: Sequence[int], output: Sequence[int], reading: Reading
    ) -> "Layout":
        in_features, out_features = hints.in_features, hints.out_features
        if output[1] != out_features or output[0] != features[0]:
            raise ValueError(f"the output must be [batch, {out_features}]")
        first = reading.layout == "channels_first"
        if reading.layout is None and (len(features) > 3 or hints.channels_first[3]):
            first = features[1] == in_features and (len(features) > 3 or features[-1] != in_features)
        if (features[1] if first else features[-1]) != in_features:
            raise ValueError(f"the input has no dimension of {in_features} features where they are expected")
        if reading.readout is not None:
            return cls(channels_first=first, readout=reading.readout)
        if len(features) == 3 and not first:
            return cls(readout="first")  # the token that the classification heads of encoders take
        positions = math.prod(features[2:] if first else features[1:-1])
        if positions == 1:
            return cls(channels_first=first, readout="flatten")
        raise ValueError(
            f"its output is one vector and its input has {positions} positions: say how they become one, "
            "readout='mean' or 'first'"
        )

    @classmethod
    def _channels_first(
        cls, in_features: int, out_features: int, features: Sequence[int], output: Sequence[int]
    ) -> "Layout":
        if len(features) < 3 or features[1] != in_features or len(output) != len(features) or output[1] != out_features:
            raise ValueError(
                f"channels first, the input must be [batch, {in_features}, *space] and the output "
                f"[batch, {out_features}, *space]"
            )
        space, output_space = tuple(features[2:]), tuple(output[2:])
        if space == output_space:
            return cls(channels_first=True, output_channels_first=True)
        return cls(channels_first=True, output_channels_first=True, space=space, output_space=output_space)

    @classmethod
    def _on_grids(cls, in_features: int, out_features: int, features: Sequence[int], output: Sequence[int]) -> "Layout":
        spaces = []
        for what, shape, width in (("input", features, in_features), ("output", output, out_features)):
            if len(shape) == 4 and shape[1] == width:
                spaces.append(tuple(shape[2:]))
            elif len(shape) == 3 and shape[-1] == width and math.isqrt(shape[1]) ** 2 == shape[1]:
                spaces.append((math.isqrt(shape[1]),) * 2)
            else:
                raise ValueError(
                    f"for layout='grid' the {what} must be [batch, {width}, height, width] or [batch, tokens, {width}] "
                    "with the tokens of a square image and no others"
                )
        return cls(len(features) == 4, len(output) == 4, space=spaces[0], output_space=spaces[1])

    def rows(self, features: Tensor) -> Tensor:
        """The input as `[..., in_features]`: `[batch, *space, in_features]`, or one row per sample with a readout."""
        rows = features.movedim(1, -1) if self.channels_first else features
        if self.readout == "mean":
            return rows.flatten(1, -2).mean(dim=1)
        if self.readout is not None:
            return rows.flatten(1, -2)[:, 0]
        return rows

    @property
    def pools(self) -> bool:
        """Whether the output has other positions than the input."""
        return self.space is not None

    def pool(self, rows: Tensor) -> Tensor:
        """Values at the positions of the input `[batch, *space, width]`, averaged to those of the output."""
        if self.space is None or self.output_space is None:
            return rows
        value = rows.reshape(len(rows), *self.space, rows.shape[-1]).movedim(-1, 1)
        value = _average_pool(value, self.output_space).movedim(1, -1)
        return value if self.output_channels_first else value.flatten(1, -2)

    def spread(self, gradient: Tensor) -> Tensor:
        """The transpose of `pool`: the gradient in the input's positions `[..., width]` from that in the output's."""
        if self.space is None or self.output_space is None:
            return gradient
        value = gradient.reshape(len(gradient), *self.output_space, gradient.shape[-1])
        for axis, (size, fine) in enumerate(zip(self.output_space, self.space, strict=True), start=1):
            value = torch.tensordot(value, _pool_matrix(fine, size, value), dims=([axis], [0])).movedim(-1, axis)
        return value if self.channels_first else value.flatten(1, -2)

    def output_rows(self, output: Tensor) -> Tensor:
        """What has the shape of the output as `[..., out_features]`."""
        return output.movedim(1, -1) if self.output_channels_first else output

    def restore(self, value: Tensor) -> Tensor:
        """Rows `[..., out_features]`, one per position of the output, in its layout."""
        return value.movedim(-1, 1) if self.output_channels_first else value


#: One row of the input for each of the output, features last.
ROW_BY_ROW = Layout()


def _is_channels_first(hints: LayoutHints, features: Sequence[int], output: Sequence[int]) -> bool:
    if len(features) < 3 or len(output) < 3:
        return False
    told = hints.channels_first.get(len(features))
    if len(features) == 3 and not told:
        return False
    if features[1] != hints.in_features or output[1] != hints.out_features:
        return False
    if not (features[-1] == hints.in_features and output[-1] == hints.out_features):
        return True
    if told is None and len(features) > 3:
        raise ValueError(
            "the features may lie in dimension 1 or in the last, both of this size, and no layer inside tells: say "
            "layout='channels_first' or 'tokens'"
        )
    return bool(told)


def _told_by_layers(module: nn.Module, widths: set[int], n_dimensions: int) -> bool | None:
    """Whether the channels lie in dimension 1 for the first layer of a module that has one of these widths, or for a
    pooling before it; None if no layer tells.

    The first: what follows in a block may work on another layout, as the linear layers of a ConvNeXt do.
    """
    for layer in module.modules():
        own = set(_widths_of(layer))
        if own and own.isdisjoint(widths):
            continue
        by_name = _SPACE.search(type(layer).__name__)  # LayerNorm2d, AvgPool2d
        by_format = getattr(layer, "data_format", None) == "channels_first"  # norms of image models, which know both
        if by_format or (by_name and int(by_name[1]) == n_dimensions - 2):
            return True
        if isinstance(layer, _CHANNELS_FIRST.get(n_dimensions, ())):
            return True
        # One for another number of dimensions runs behind a change of shape.
        if own and not by_name and next(layer.children(), None) is None:
            return False
    return None


def _widths_of(layer: nn.Module) -> Iterator[int]:
    for name in _WIDTHS:
        value = getattr(layer, name, None)
        if isinstance(value, (tuple, list)) and value:
            value = value[-1]
        if isinstance(value, int):
            yield value
    weight = getattr(layer, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.ndim == 1:  # norms that keep no size
        yield len(weight)


def _advice(in_features: int, out_features: int, features: Sequence[int], output: Sequence[int]) -> str:
    """What would make it fit, where the shapes tell."""
    is_turned = len(features) == len(output) == 3 and (features[1], output[1]) == (in_features, out_features)
    if is_turned and features[2] == output[2]:
        return "if the features lie in dimension 1, say layout='channels_first'"
    by_width = len(features) > 2 and len(output) > 2 and in_features in (features[1], features[-1])
    if by_width and out_features in (output[1], output[-1]) and features[0] == output[0]:
        if {len(features), len(output)} <= {3, 4}:
            return (
                "the number of tokens changes: if they are those of a square image, say layout='grid', which averages "
                "over the image"
            )
        return "its positions change in a way that a shortcut cannot follow"
    return "Set the sizes in LRegConfig(feature_sizes=...), or target a module that keeps the layout of its input"


def _average_pool(value: Tensor, size: Sequence[int]) -> Tensor:
    """Average-pool `[batch, channels, *spatial]` to the spatial `size`."""
    if tuple(value.shape[2:]) == tuple(size):
        return value
    dimensions = len(size)
    if all(fine % coarse == 0 for fine, coarse in zip(value.shape[2:], size, strict=True)):
        # Windows of equal size: the same, some fifty times faster where the features lie last in memory, as here.
        windows = [fine // coarse for fine, coarse in zip(value.shape[2:], size, strict=True)]
        plain: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
        return plain[dimensions](value, windows)
    pools: dict[int, Callable[..., Tensor]] = {
        1: F.adaptive_avg_pool1d,
        2: F.adaptive_avg_pool2d,
        3: F.adaptive_avg_pool3d,
    }
    return pools[dimensions](value, list(size))


def _pool_matrix(fine: int, size: int, like: Tensor) -> Tensor:
    """Adaptive average pooling of one axis as a matrix `[size, fine]`."""
    identity = torch.eye(fine, dtype=like.dtype, device=like.device)
    return F.adaptive_avg_pool1d(identity, size).T


def first_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None, module: Callable[[], nn.Module]
) -> Tensor:
    """The first input of a module, which a shortcut reads.

    Args:
        args: of the call.
        kwargs: of the call.
        name: of the first parameter of the module's forward.
        module: gives the module, for the error.

    Raises:
        TypeError: if it is not a floating-point tensor.
    """
    features = args[0] if args else kwargs.get(name or "")
    if not isinstance(features, Tensor) or not features.is_floating_point():
        got = f"a tensor of {features.dtype}" if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(
            f"a shortcut around {type(module()).__name__} needs a floating-point tensor as the first input of the "
            f"module, got {got}. Target a module whose first input is the hidden state."
        )
    return features


def first_tensor(output: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The tensor that a shortcut is added to, and a function that puts its replacement back in place."""
    if isinstance(output, Tensor):
        return output, lambda hidden: hidden
    if isinstance(output, dict) and output:  # transformers' ModelOutput is an OrderedDict

        def rebuild_mapping(hidden: Tensor) -> Any:
            first = next(iter(output))
            return type(output)(**{**output, first: hidden})

        return next(iter(output.values())), rebuild_mapping
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):

        def rebuild_sequence(hidden: Tensor) -> Any:
            make = getattr(type(output), "_make", type(output))  # named tuples take an iterable under this name
            return make((hidden, *output[1:]))

        return output[0], rebuild_sequence
    raise TypeError(
        f"a shortcut needs a module whose output is a tensor or starts with one, got {type(output).__name__}."
    )
