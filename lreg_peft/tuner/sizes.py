"""The feature sizes of a module, read off the module."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import LRegConfig
from .patterns import by_pattern

# Attributes in which modules keep their sizes. Quantised layers keep them too.
_PAIRS = (("in_features", "out_features"), ("in_channels", "out_channels"))
# Those of modules that leave the number of features as it is.
_WIDTHS = ("num_features", "num_channels", "normalized_shape")


def feature_sizes(name: str, module: nn.Module, config: LRegConfig) -> tuple[int, int]:
    """`(in_features, out_features)` of a module, from the configuration or read off the module.

    A block of several linear layers takes its input size from the first and its output size from the last of them in
    the order of registration, which holds for the attention, feed-forward and head modules of Transformers and for
    stages of convolutions. A block without any takes both from its normalisation. A mixture of experts returns what it
    takes, whatever its routers and shared experts look like.

    Raises:
        ValueError: if they are neither given nor readable.
    """
    given: tuple[int, int] | None = by_pattern("feature_sizes", name, config, None)
    if given is not None:
        return given
    found = readable_sizes(module)
    if found is None:
        raise ValueError(
            f"cannot read the feature sizes of {name!r} ({type(module).__name__}): it holds no linear, convolution or "
            f"normalisation layer. Give them: LRegConfig(feature_sizes={{{name!r}: (in_features, out_features)}})."
        )
    return found


def source_width(name: str, module: nn.Module, config: LRegConfig) -> int:
    """Features of the output of a module that another one's shortcut reads; an embedding may be such a module.

    Raises:
        ValueError: if they are neither given nor readable.
    """
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and by_pattern("feature_sizes", name, config, None) is None:
        return module.embedding_dim
    return feature_sizes(name, module, config)[1]


def readable_sizes(module: nn.Module) -> tuple[int, int] | None:
    """The sizes of a layer or block; None if nothing in it tells."""
    if sizes := _of_experts(module) or _of_patch_merging(module):
        return sizes
    for read in (linear_sizes, _width):
        found = [sizes for sizes in map(read, module.modules()) if sizes is not None]
        if found:
            return found[0][0], found[-1][1]
    return None


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Sizes of a linear layer or a convolution."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    for names in _PAIRS:
        sizes = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(size, int) for size in sizes):
            return sizes  # type: ignore[return-value]
    return None


def _width(module: nn.Module) -> tuple[int, int] | None:
    """Sizes of a normalisation."""
    for name in _WIDTHS:
        value = getattr(module, name, None)
        value = value[-1] if isinstance(value, (tuple, list)) and len(value) else value
        if isinstance(value, int):
            return value, value
    weight = getattr(module, "weight", None)  # of the root-mean-square norms of language models
    if type(module).__name__.endswith("Norm") and isinstance(weight, nn.Parameter) and weight.ndim == 1:
        return len(weight), len(weight)
    return None


def _of_patch_merging(module: nn.Module) -> tuple[int, int] | None:
    """Swin's: two by two neighbours, side by side, go into the linear layer."""
    linear = getattr(module, "reduction", None)
    sizes = linear_sizes(linear) if isinstance(linear, nn.Module) else None
    if sizes is None or not type(module).__name__.endswith("PatchMerging") or sizes[0] % 4:
        return None
    return sizes[0] // 4, sizes[1]


def _of_experts(block: nn.Module) -> tuple[int, int] | None:
    """Features of a mixture of experts whose weights are fused: the size that its two stacks of matrices share."""
    for module in block.modules():
        stacks = [getattr(module, name, None) for name in ("gate_up_proj", "up_proj", "down_proj")]
        shapes = [set(stack.shape[1:]) for stack in stacks if isinstance(stack, nn.Parameter) and stack.ndim == 3]
        if len(shapes) > 1 and len(shared := set.intersection(*shapes)) == 1:
            width = int(shared.pop())
            return width, width
    return None
