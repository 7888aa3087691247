"""How the input and output of a module are laid out, and the way from one to the other.

A shortcut works on rows `[..., features]`. A module may keep its channels in dimension 1 (convolutions, stages), change
the spatial size, or turn a sequence into one vector.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """The layouts of one forward pass.

    Attributes:
        channels_first: whether the channels are in dimension 1 of input and output.
        first_position: whether a sequence `[batch, length, features]` becomes a vector, which is read off its first
            position: the token that the classification heads of encoders take.
    """

    channels_first: bool = False
    first_position: bool = False

    @classmethod
    def of(cls, module: nn.Module, in_features: int, out_features: int, features: Tensor, output: Tensor) -> "Layout":
        """Read the layout off the shapes of the tensors that reach and leave a module.

        Args:
            module: the base module: a convolution settles what shapes leave open.
            in_features: channels of the input.
            out_features: channels of the output.
            features: input.
            output: output.
        """
        if features.ndim == 3 and output.ndim == 2:
            return cls(first_position=True)
        if features.ndim < 3 or features.shape[1] != in_features or output.shape[1] != out_features:
            return cls()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return cls(channels_first=True)
        return cls(channels_first=not (features.shape[-1] == in_features and output.shape[-1] == out_features))

    def rows(self, features: Tensor) -> Tensor:
        """The input as `[..., in_features]`."""
        if self.first_position:
            return features[:, 0]
        return features.movedim(1, -1) if self.channels_first else features

    def output_rows(self, output: Tensor) -> Tensor:
        """What has the shape of the output as `[..., out_features]`."""
        return output.movedim(1, -1) if self.channels_first else output

    def restore(self, value: Tensor, like: Tensor) -> Tensor:
        """Rows `[..., out_features]` in the layout and spatial size of the output `like`."""
        if not self.channels_first:
            return value
        value = value.movedim(-1, 1)
        return value if value.shape[2:] == like.shape[2:] else _average_pool(value, like.shape[2:])


def _average_pool(value: Tensor, size: Sequence[int]) -> Tensor:
    """Average-pool `[batch, channels, *spatial]` to the spatial `size`."""
    pools: dict[int, Callable[..., Tensor]] = {
        1: F.adaptive_avg_pool1d,
        2: F.adaptive_avg_pool2d,
        3: F.adaptive_avg_pool3d,
    }
    return pools[len(size)](value, list(size))


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None, kind: str) -> Tensor:
    """The first input of a module, which a shortcut reads.

    Args:
        args: of the call.
        kwargs: of the call.
        name: of the first parameter of the module's forward.
        kind: class name of the module, for the error.

    Raises:
        TypeError: if it is not a floating-point tensor.
    """
    features = args[0] if args else kwargs.get(name or "")
    if not isinstance(features, Tensor) or not features.is_floating_point():
        got = f"a tensor of {features.dtype}" if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(
            f"a shortcut around {kind} needs a floating-point tensor as the first input of the module, got {got}. "
            "Target a module whose first input is the hidden state."
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
