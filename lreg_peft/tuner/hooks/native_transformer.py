"""Shortcuts inside torch's own transformer layers, which in eval mode read the weights of their parts past the parts.

`nn.TransformerEncoderLayer` has a fused path for inference: it takes the weights of `linear1`, `self_attn`, ... and
calls none of these modules. It keeps away from modules with hooks, so a hook that does nothing makes it call them.
`nn.MultiheadAttention` never calls its `out_proj`; nothing helps there.
"""

from typing import Any

from torch import nn

from ...modules import remove_hooks
from ..layer import LRegLayer

_NESTED = "_lreg_used_nested_tensor"


def install(model: nn.Module) -> None:
    """Have the transformer layers of torch in `model` that hold shortcuts call their parts; may be called again."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _holds_shortcut(module):
            remove_hooks(module, call_the_parts)
            module.register_forward_pre_hook(call_the_parts)
        if isinstance(module, nn.TransformerEncoder) and _holds_shortcut(module) and _NESTED not in module.__dict__:
            # Nested tensors are for the fused path alone.
            module.__dict__[_NESTED] = getattr(module, "use_nested_tensor", False)
            module.use_nested_tensor = False


def release(model: nn.Module) -> None:
    """Undo `install`, but for the hooks."""
    for module in model.modules():
        if _NESTED in module.__dict__:
            module.use_nested_tensor = module.__dict__.pop(_NESTED)


def call_the_parts(module: nn.Module, args: Any) -> None:
    """Forward pre-hook that does nothing but be there."""


def _holds_shortcut(module: nn.Module) -> bool:
    return any(isinstance(part, LRegLayer) for part in module.modules())
