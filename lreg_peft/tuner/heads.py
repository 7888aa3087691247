"""Heads: how a shortcut weights its basis functions, one class each.

A head has no state. The weights live in the layer, by adapter name, as PEFT wants them; a head is handed those of one
adapter and says what they mean. To add one: a class here, an entry in `HEADS`, its text in the configuration.

All of them are linear in some of their weights, the *table*: value = design @ table. Training, the fused loss and
convex fits need no more than that.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.basis import dense_is_faster, design_matrix, evaluate, evaluate_profile
from ..core.coordinates import LOGISTIC_NORMAL_SCALE, standard_profile
from ..core.product import add_basis, add_product

# A profile that is smaller on average carries no constant.
_SMALLEST_MEAN = 0.1

#: The weights of one adapter by their names in the layer, without `lreg_`.
Weights = Mapping[str, Tensor]


class Encoded(NamedTuple):
    """What the encoder makes of features, fp32 or fp64.

    Attributes:
        latent: z = P x + b, `[..., components]`.
        coords: u = sigmoid(z).
    """

    latent: Tensor
    coords: Tensor

    @classmethod
    def of(cls, latent: Tensor) -> "Encoded":
        """From z alone; u alone would not do: where it has rounded to one, z is lost."""
        return cls(latent, torch.sigmoid(latent))


class Head(ABC):
    """How basis functions are weighted. Shapes below: d = components, n = dof, C = out_features."""

    #: Names of the weights that the value is linear in, zero at the start; stacked in this order they are the table.
    linear_weights: tuple[str, ...]
    #: Name of the weight with one entry per node.
    nodal_weight: str
    #: Factor of z in the weight of a direction, zero without a linear term; None for heads that are not factored.
    slope: float | None = None

    def __init_subclass__(cls) -> None:
        """A head with a value of its own is not computed the short way, by its slope, unless it says the slope anew."""
        own = vars(cls)
        if "slope" not in own and {"design", "table", "value", "add"} & own.keys():
            cls.slope = None

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Names of all weights."""
        return tuple(dict.fromkeys((self.nodal_weight, *self.linear_weights)))

    @abstractmethod
    def shapes(self, n_components: int, dof: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights by name."""

    def n_parameters(self, n_components: int, dof: int, out_features: int) -> int:
        """Number of parameters; the projection adds `(in_features + 1) * n_components`."""
        return sum(torch.Size(shape).numel() for shape in self.shapes(n_components, dof, out_features).values())

    def nonlinear_start(self, nodes: Tensor, profile_mean: float) -> dict[str, Tensor]:
        """What the weights outside the table start from on a mesh `[d, n]`."""
        return {}

    @abstractmethod
    def design(self, weights: Weights, nodes: Tensor, code: Encoded) -> Tensor:
        """What the rows of the table are weighted by: `[..., K]`, fp32 or fp64, differentiable in `code`."""

    def table(self, weights: Weights) -> Tensor:
        """The weights that the value is linear in, as one matrix `[K, C]`."""
        return weights[self.linear_weights[0]].flatten(0, -2)

    def design_is_faster(self, nodes: Tensor) -> bool:
        """Whether one GEMM with the design is the faster way to the value."""
        return dense_is_faster(nodes.shape[1], nodes.device)

    def value(self, weights: Weights, nodes: Tensor, code: Encoded, dtype: torch.dtype) -> Tensor:
        """The shortcut's value `[..., C]` in `dtype`."""
        if self.design_is_faster(nodes):
            return self.design(weights, nodes, code).to(dtype) @ self.table(weights).to(dtype)
        return evaluate(code.coords, nodes, self.nodal_coefficients(weights).to(dtype), validate=False)

    @abstractmethod
    def add(self, weights: Weights, nodes: Tensor, code: Encoded, hidden: Tensor, *, in_place: bool) -> Tensor:
        """`hidden` `[..., C]` plus the value, by one GEMM, in its memory if allowed; for `design_is_faster` heads."""

    @abstractmethod
    def nodal_coefficients(self, weights: Weights) -> Tensor:
        """c of the paper: the values of the piecewise-linear part at the nodes, `[d, n, C]`."""

    @abstractmethod
    def constant(self, weights: Weights) -> Tensor:
        """k `[K]`: the table k v^T has the value v `[C]` everywhere, or on average where there is a linear term."""

    def to_nodes(self, values: Tensor) -> Tensor:
        """The nodal weight, its gradient or moments with one entry per node: `[d, n, ...]`."""
        return values

    def from_nodes(self, values: Tensor) -> Tensor:
        """The opposite of `to_nodes`."""
        return values


class FullHead(Head):
    """A vector c_ij per node, the paper's."""

    linear_weights: tuple[str, ...] = ("coefficients",)
    nodal_weight = "coefficients"
    _reduced = False

    def shapes(self, n_components: int, dof: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """As there."""
        return {"coefficients": (n_components, dof, out_features)}

    def design(self, weights: Weights, nodes: Tensor, code: Encoded) -> Tensor:
        """The hat basis, K = d n."""
        return design_matrix(code.coords, nodes, reduced=self._reduced)

    def add(self, weights: Weights, nodes: Tensor, code: Encoded, hidden: Tensor, *, in_place: bool) -> Tensor:
        """As there."""
        table = self.table(weights).to(hidden.dtype)
        return add_basis(hidden, code.coords, nodes, table, reduced=self._reduced, in_place=in_place)

    def nodal_coefficients(self, weights: Weights) -> Tensor:
        """As there."""
        return weights["coefficients"]

    def constant(self, weights: Weights) -> Tensor:
        """The basis of the first component, which sums to one."""
        components, dof = weights["coefficients"].shape[:2]
        first = weights["coefficients"].new_zeros(components, dof)
        first[0] = 1
        return first.flatten()


class ReducedHead(FullHead):
    """The functions of the full head without its d - 1 redundant constants.

    Every component is zero at its first node, which has no weight, and one constant `[C]` stands for all.
    """

    linear_weights = ("coefficients", "constant")
    _reduced = True

    def shapes(self, n_components: int, dof: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """As there."""
        return {"coefficients": (n_components, dof - 1, out_features), "constant": (out_features,)}

    def table(self, weights: Weights) -> Tensor:
        """K = d (n - 1) + 1, the constant last."""
        return torch.cat((super().table(weights), weights["constant"].unsqueeze(0)))

    def nodal_coefficients(self, weights: Weights) -> Tensor:
        """As there; the first component carries the constant."""
        coefficients = weights["coefficients"]
        shift = F.pad(weights["constant"].view(1, 1, -1), (0, 0, 0, 0, 0, coefficients.shape[0] - 1))
        return self.to_nodes(coefficients) + shift

    def constant(self, weights: Weights) -> Tensor:
        """The constant."""
        first = weights["coefficients"].new_zeros(len(self.table(weights)))
        first[-1] = 1
        return first

    def to_nodes(self, values: Tensor) -> Tensor:
        """Zero at the first node."""
        return F.pad(values, [0, 0] * (values.ndim - 2) + [1, 0])

    def from_nodes(self, values: Tensor) -> Tensor:
        """As there."""
        return values[:, 1:]


class FactoredHead(Head):
    """c_ij = s_ij v_i: a scalar function per component (the profile s `[d, n]`) times an output vector v_i."""

    linear_weights = ("direction",)
    nodal_weight = "profile"
    slope = 0.0

    def shapes(self, n_components: int, dof: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """As there."""
        return {"profile": (n_components, dof), "direction": (n_components, out_features)}

    def nonlinear_start(self, nodes: Tensor, profile_mean: float) -> dict[str, Tensor]:
        """Affine in u, of the given mean and variance 1 for uniform u."""
        return {"profile": standard_profile(nodes, profile_mean)}

    def design(self, weights: Weights, nodes: Tensor, code: Encoded) -> Tensor:
        """Values of the profiles, K = d."""
        return evaluate_profile(code.coords, nodes, weights["profile"])

    def design_is_faster(self, nodes: Tensor) -> bool:
        """Always: the design is as narrow as the coordinates."""
        return True

    def add(self, weights: Weights, nodes: Tensor, code: Encoded, hidden: Tensor, *, in_place: bool) -> Tensor:
        """As there."""
        design = self.design(weights, nodes, code).to(hidden.dtype)
        return add_product(hidden, design, self.table(weights).to(hidden.dtype), in_place=in_place)

    def nodal_coefficients(self, weights: Weights) -> Tensor:
        """As there."""
        return weights["profile"].unsqueeze(-1) * weights["direction"].unsqueeze(1)

    def constant(self, weights: Weights) -> Tensor:
        """The first component, over the mean of its profile; zero if that is none to speak of."""
        mean = weights["profile"][0].detach().mean()
        first = torch.zeros_like(weights["profile"][:, 0])
        first[0] = torch.where(mean.abs() > _SMALLEST_MEAN, 1 / mean, 0.0)
        return first


class LinearFactoredHead(FactoredHead):
    """The factored head with a linear term: sum_i (z_i / 1.702 + s_i(u_i)) v_i.

    Far from the middle of the sigmoid a profile says nothing any more; the linear term goes on. With a constant profile
    this is LoRA with a bias, so that nothing LoRA can represent is lost; the piecewise-linear profile comes on top.
    """

    slope = 1 / LOGISTIC_NORMAL_SCALE

    def nonlinear_start(self, nodes: Tensor, profile_mean: float) -> dict[str, Tensor]:
        """The mean everywhere: what varies with z is the linear term's at first."""
        return {"profile": torch.full_like(nodes, profile_mean)}

    def design(self, weights: Weights, nodes: Tensor, code: Encoded) -> Tensor:
        """Values of linear term and profiles together, K = d."""
        return super().design(weights, nodes, code) + code.latent / LOGISTIC_NORMAL_SCALE


HEADS: dict[str, Head] = {
    "full": FullHead(),
    "reduced": ReducedHead(),
    "factored": FactoredHead(),
    "factored+linear": LinearFactoredHead(),
}
