"""The two linear maps of a shortcut: A, from features to latent coordinates, and B, from the design to the output."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .coordinates import initial_projection
from .mesh import coordinate_dtype


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Where shortcuts are computed; nothing where there is no autocast, since entering a context takes its time."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class Projection(nn.Linear):
    """A: z = P x + b, computed in fp32 (fp64 if features or weights are) whatever the dtype of the model.

    Rows of P are orthogonal as far as there is room, see `initial_projection`; b is zero.
    """

    bias: nn.Parameter

    def __init__(self, in_features: int, n_components: int) -> None:
        super().__init__(in_features, n_components)

    def reset_parameters(self) -> None:
        """The random start."""
        with torch.no_grad():
            self.weight.copy_(initial_projection(*self.weight.shape))
            self.bias.zero_()

    def forward(self, features: Tensor) -> Tensor:
        """`[..., in_features]` -> `[..., n_components]`, fp32 or fp64."""
        dtype = coordinate_dtype(features, self.weight)
        with without_autocast(features.device.type):
            return F.linear(features.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class Coefficients(nn.Linear):
    """B: the design times the table, without bias; zero at the start. `weight` `[C, K]` is the table transposed."""

    def __init__(self, n_functions: int, out_features: int) -> None:
        super().__init__(n_functions, out_features, bias=False)

    def reset_parameters(self) -> None:
        """The start: a shortcut that adds nothing."""
        nn.init.zeros_(self.weight)

    def forward(self, design: Tensor, hidden: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """`scale` times the value of the shortcut, or `hidden` plus that by one matrix product.

        Args:
            design: `[..., K]`.
            hidden: `[..., C]` with the leading shape of the design; gives the dtype.
            scale: a factor.

        Returns:
            `[..., C]` in the dtype of `hidden`, or of the weight without one.
        """
        if hidden is None:
            value = F.linear(design.to(self.weight.dtype), self.weight)
            return value if scale == 1.0 else value * scale
        table = self.weight.to(hidden.dtype).T
        design = design.to(hidden.dtype)
        rows, flat = hidden.reshape(-1, table.shape[1]), design.reshape(-1, table.shape[0])
        return torch.addmm(rows, flat, table, alpha=scale).view(hidden.shape)
