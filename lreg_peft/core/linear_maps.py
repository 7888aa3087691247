"""The two linear maps of a shortcut: A, from features to latent coordinates, and B, from the design to the output."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .coordinates import initial_projection
from .mesh import coordinate_dtype


class Projection(nn.Linear):
    """A: z = P x + b, computed in fp32 (fp64 if features or weights are) whatever the dtype of the model.

    Rows of P are orthogonal as far as there is room, see `initial_projection`; b is zero.

    A step of Adam changes every entry of a weight W by up to the learning rate, so that W x may change by the rate
    times the sum of |x_k|, the more the wider the layer. With a base width W = P / scale and z = scale W x + b,
    scale = base_width / in_features: a step then changes z as much as at that width. (The rule for hidden weights in
    the maximal update parametrisation; Yang et al. 2022, table 3.)

    Args:
        in_features: width of the features.
        n_components: d.
        base_width: None, or the width from which on P is stored in larger units.

    Attributes:
        scale: P / weight.
    """

    bias: nn.Parameter

    def __init__(self, in_features: int, n_components: int, base_width: int | None = None) -> None:
        self.scale = 1.0 if base_width is None else min(1.0, base_width / in_features)
        super().__init__(in_features, n_components)

    @property
    def matrix(self) -> Tensor:
        """P, `[n_components, in_features]`."""
        return self.weight * self.scale

    def reset_parameters(self) -> None:
        """The random start."""
        with torch.no_grad():
            self.weight.copy_(initial_projection(*self.weight.shape) / self.scale)
            self.bias.zero_()

    def forward(self, features: Tensor) -> Tensor:
        """`[..., in_features]` -> `[..., n_components]`, fp32 or fp64."""
        weight: Tensor = self.weight  # attributes: FSDP takes them out of the parameters
        bias: Tensor = self.bias
        if torch.is_autocast_enabled(features.device.type):
            with torch.autocast(features.device.type, enabled=False):
                return self.forward(features)
        if not features.dtype is weight.dtype is bias.dtype is torch.float32:
            dtype = coordinate_dtype(features, weight)
            features, weight, bias = features.to(dtype), weight.to(dtype), bias.to(dtype)
        # Not as a factor of the product: its derivative would multiply a gradient of the size of the features.
        return F.linear(features, weight if self.scale == 1.0 else weight * self.scale, bias)


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
        if torch.is_autocast_enabled(design.device.type):
            with torch.autocast(design.device.type, enabled=False):
                return self.forward(design, hidden, scale)
        weight: Tensor = self.weight
        dtype = weight.dtype if hidden is None else hidden.dtype
        if not dtype is design.dtype is weight.dtype:
            design, weight = design.to(dtype), weight.to(dtype)
        table = weight.T
        if table.is_cpu and torch.is_grad_enabled() and not torch.jit.is_tracing():  # type: ignore[no-untyped-call]
            table = table.contiguous()  # without it a CPU takes several times as long for both products backwards
        if hidden is None:
            value = design @ table
            return value if scale == 1.0 else value * scale
        if hidden.ndim == 2:
            return torch.addmm(hidden, design, table, alpha=scale)
        rows, design = hidden.reshape(-1, hidden.shape[-1]), design.reshape(-1, design.shape[-1])
        return torch.addmm(rows, design, table, alpha=scale).view(hidden.shape)
