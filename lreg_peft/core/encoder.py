"""The learned curve between the two linear maps of a shortcut: z -> u = sigmoid(z) -> design.

A shortcut is `y = f(x) + B(curve(A(x)))`. This module is the curve. It turns latent coordinates z into the *design*:
the numbers that the rows of the *table* (the weight of B, transposed) are multiplied by. Three weightings differ in it:

    full      the hat functions psi_ij(u_i) of every component (Li, Cheng & Gu 2025, sections 2.6-2.7), K = d n
    reduced   the same functions without the d - 1 redundant constants, K = d (n - 1) + 1
    factored  one scalar function s_i(u_i) per component, the profile, and z_i / 1.702 with a linear term; K = d
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .basis import evaluate_profile, under_transform
from .coordinates import LOGISTIC_NORMAL_SCALE, standard_profile
from .mesh import check_nodes, coordinate_dtype, uniform_nodes

Weighting = Literal["full", "reduced", "factored"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)

# A profile that is smaller on average carries no constant.
_SMALLEST_MEAN = 0.1
# Largest n_nodes at which all elements of a mesh are evaluated for every coordinate. That is a handful of elementwise
# operations; beyond it looking up the element costs less (measured on one CPU core and by the number of launches).
_MAX_DENSE_NODES = 32
# Up to so many components everything is kept for the backward pass that it would make again: 2 n numbers for each,
# which is little beside the features of a layer. With more components that memory counts.
_MOST_KEPT = 8
# Derivatives of functions that torch has and autograd uses: each takes one operation where single ones take three.
_hardtanh_backward = torch.ops.aten.hardtanh_backward.default
_sigmoid_backward = torch.ops.aten.sigmoid_backward.default
# Stands for infinity beyond both ends of a mesh, in fp32 too: a coordinate has all of the element before the mesh
# behind it, and all of the element after it ahead.
_FAR = 1e30
# The next number after one, in fp32: `x < _BEYOND_ONE` means x <= 1.
_BEYOND_ONE = 1.0 + 2.0**-23


class LagrangeEncoder(nn.Module):
    """Hat functions of projected coordinates, or scalar functions made of them.

    Args:
        n_components: d, the number of coordinates, each with a mesh of its own.
        n_nodes: n, nodes of a mesh.
        weighting: "full", "reduced" or "factored", see the head of this file.
        linear_term: add z / 1.702 to the profiles of a factored weighting.
        profile_mean: mean of the profiles at the start; without a linear term they have variance 1 for uniform u.
        nodes: `[n_components, n_nodes]`; None takes uniform meshes on [0, 1].

    Attributes:
        nodes: `[n_components, n_nodes]`, a buffer that stays in fp32 (or fp64) whatever the module is cast to: in half
            precision neighbouring nodes collide. To be changed by `set_nodes`, in place or by assignment, but not
            through `nodes.data`, which hides changes from autograd and from this module alike.
        weight: the profiles at the nodes, `[n_components, n_nodes]`; None unless the weighting is factored.
    """

    nodes: Tensor
    weight: nn.Parameter | None

    def __init__(
        self,
        n_components: int,
        n_nodes: int,
        weighting: Weighting = "full",
        *,
        linear_term: bool = False,
        profile_mean: float = 1.0,
        nodes: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.n_components, self.n_nodes, self.weighting = n_components, n_nodes, weighting
        self.linear_term, self.profile_mean = linear_term, profile_mean
        #: Factor of z in the design.
        self.slope = 1 / LOGISTIC_NORMAL_SCALE if linear_term else 0.0
        self.register_buffer("nodes", uniform_nodes(n_components, n_nodes) if nodes is None else nodes.detach().clone())
        self.register_parameter("weight", nn.Parameter(self._start()) if weighting == "factored" else None)
        # What was made of the nodes: these, their state then, and the result.
        self._kept: tuple[Tensor, tuple[Any, ...], Mesh] | None = None

    @property
    def n_functions(self) -> int:
        """K, the width of the design."""
        return n_functions(self.weighting, self.n_components, self.n_nodes)

    def _start(self) -> Tensor:
        if self.linear_term:  # what varies with z is the linear term's at first
            return torch.full_like(self.nodes, self.profile_mean)
        return standard_profile(self.nodes, self.profile_mean)

    @torch.no_grad()
    def set_nodes(self, nodes: Tensor) -> None:
        """Put another mesh `[n_components, n_nodes]` in place, with profiles as at the start on it.

        Raises:
            ValueError: if it is not a valid mesh.
        """
        check_nodes(nodes)
        self.nodes.copy_(nodes)
        if self.weight is not None:
            self.weight.copy_(self._start())

    def forward(self, latent: Tensor) -> Tensor:
        """z `[..., n_components]` -> design `[..., K]`, fp32 (fp64 for fp64 z); differentiable, twice."""
        if torch.is_autocast_enabled(latent.device.type):
            with torch.autocast(latent.device.type, enabled=False):
                return self.forward(latent)
        profile = self.weight
        if not (latent.dtype is torch.float32 and (profile is None or profile.dtype is torch.float32)):
            dtype = coordinate_dtype(latent, *self.parameters())
            latent, profile = latent.to(dtype), None if profile is None else profile.to(dtype)  # type: ignore[assignment]
        mesh = self.mesh(latent.dtype)
        if profile is not None:
            return profile_values(latent, mesh, profile, self.slope)
        basis = latent_basis(latent, mesh)  # [..., d, n]
        if self.weighting == "full":
            return basis.flatten(-2)
        return torch.cat((basis[..., 1:].flatten(-2), basis.new_ones(*basis.shape[:-2], 1)), dim=-1)

    def basis(self, latent: Tensor) -> Tensor:
        """All hat functions, whatever the weighting: z `[..., d]` -> `[..., d n]`."""
        return latent_basis(latent, self.mesh(latent.dtype)).flatten(-2)

    def mesh(self, dtype: torch.dtype) -> "Mesh":
        """The mesh in fp32 or fp64.

        What is made of the nodes is kept until they change: they do so rarely, and every forward pass asks for it.
        """
        nodes = self.nodes
        if _wants_single_operations() or nodes.is_inference():
            return Mesh.of(nodes.to(dtype))
        # `_version` counts the changes of a tensor in place; autograd relies on it, and it has no other name.
        state = nodes._version, nodes.data_ptr(), dtype
        kept = self._kept
        if kept is None or kept[0] is not nodes or kept[1] != state:
            self._kept = kept = nodes, state, Mesh.of(nodes.detach().to(dtype))
        return kept[2]

    # What lives on the mesh

    def to_nodes(self, values: Tensor) -> Tensor:
        """The weight on the mesh, its gradient or moments, with one entry per node: `[d, n, C]`.

        Args:
            values: of the shape of `weight` for a factored weighting (C is 1 then), else of the weight of B, `[C, K]`.
        """
        if self.weight is not None:
            return values.unsqueeze(-1)
        if self.weighting == "full":
            return values.T.unflatten(0, (self.n_components, self.n_nodes))
        nodal = values.T[:-1].unflatten(0, (self.n_components, self.n_nodes - 1))
        return F.pad(nodal, (0, 0, 1, 0))  # zero at the first node

    def from_nodes(self, nodal: Tensor, like: Tensor) -> Tensor:
        """The opposite of `to_nodes`; the constant of a reduced weighting is that of `like`."""
        if self.weight is not None:
            return nodal.squeeze(-1)
        if self.weighting == "full":
            return nodal.flatten(0, 1).T
        return torch.cat((nodal[:, 1:].flatten(0, 1).T, like[:, -1:]), dim=1)

    def nodal_coefficients(self, weight: Tensor) -> Tensor:
        """c of the paper, the values of the piecewise-linear part at the nodes, `[d, n, C]`.

        Args:
            weight: of B, `[C, K]`.
        """
        if self.weight is not None:
            return self.weight.unsqueeze(-1) * weight.T.unsqueeze(1)
        nodal = self.to_nodes(weight)
        if self.weighting == "full":
            return nodal
        constant = F.pad(weight[:, -1].view(1, 1, -1), (0, 0, 0, 0, 0, self.n_components - 1))
        return nodal + constant  # the first component carries it

    def constant(self) -> Tensor:
        """k `[K]` for which `design @ k` is one, or close to one on average where there is a linear term."""
        if self.weight is not None:
            mean = self.weight[0].detach().mean()
            first = torch.zeros_like(self.weight[:, 0])
            first[0] = torch.where(mean.abs() > _SMALLEST_MEAN, 1 / mean, 0.0)  # zero if there is none to speak of
            return first
        constant = self.nodes.new_zeros(self.n_functions)
        if self.weighting == "full":
            constant[: self.n_nodes] = 1  # the basis of the first component sums to one
        else:
            constant[-1] = 1
        return constant

    def coordinate_gradient(self, latent: Tensor, design_gradient: Tensor) -> Tensor:
        """Gradient in the coordinates u through the piecewise-linear part, from that in the design.

        Args:
            latent: z, `[N, d]`.
            design_gradient: `[N, K]`.

        Returns:
            `[N, d]`.
        """
        mesh = self.mesh(latent.dtype)
        ahead = _ahead(latent.sigmoid(), mesh)
        if self.weight is not None:
            return design_gradient * _slopes_here(self.weight.diff() / mesh.inner, ahead)
        if self.weighting == "reduced":
            by_node = F.pad(design_gradient[:, :-1].unflatten(-1, (-1, self.n_nodes - 1)), (1, 0))
        else:
            by_node = design_gradient.unflatten(-1, (-1, self.n_nodes))
        return _slopes_here(by_node.diff() / mesh.inner, ahead)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LagrangeEncoder":
        exact = self.nodes
        super()._apply(fn, recurse)
        if self.nodes.dtype != exact.dtype:
            self.nodes = exact.to(self.nodes.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        """Sizes, as `print(model)` shows them."""
        linear = ", linear_term=True" if self.linear_term else ""
        return f"n_components={self.n_components}, n_nodes={self.n_nodes}, weighting={self.weighting!r}{linear}"


def n_functions(weighting: str, n_components: int, n_nodes: int) -> int:
    """K, the number of functions in the design of a weighting."""
    return {"full": n_components * n_nodes, "reduced": n_components * (n_nodes - 1) + 1, "factored": n_components}[
        weighting
    ]


def shortcut_parameters(weighting: str, n_components: int, n_nodes: int, in_features: int, out_features: int) -> int:
    """Parameters of a shortcut: A `[d, in_features]` with its bias, the profiles of a factored weighting, and B."""
    profile = n_components * n_nodes if weighting == "factored" else 0
    return (in_features + 1) * n_components + profile + n_functions(weighting, n_components, n_nodes) * out_features


class Mesh(NamedTuple):
    """A mesh with what the curve needs of it, elements from and to infinity beside it included.

    Attributes:
        nodes: `[d, n]`.
        right: right ends of the elements, `[d, n + 1]`.
        lengths: of the elements, `[d, n + 1]`.
        inner: lengths of the elements of the mesh, `[d, n - 1]`, a view.
    """

    nodes: Tensor
    right: Tensor
    lengths: Tensor
    inner: Tensor

    @classmethod
    def of(cls, nodes: Tensor) -> "Mesh":
        """Of nodes `[d, n]`, fp32 or fp64."""
        ends = F.pad(F.pad(nodes, (1, 0), value=-_FAR), (0, 1), value=_FAR)
        lengths = ends.diff()
        return cls(nodes, ends[:, 1:], lengths, lengths[:, 1:-1])


def _ahead(coords: Tensor, mesh: Mesh) -> Tensor:
    """How much of each element lies ahead of a coordinate, in units of the element: `[..., d]` -> `[..., d, n + 1]`.

    Between 0 and 1 in the element that holds it (1 at its left end), below 0 in those behind, above 1 in those ahead.
    """
    return mesh.right.sub(coords.unsqueeze(-1)).div_(mesh.lengths)


def _hats(ahead: Tensor) -> Tensor:
    """Hat functions `[..., d, n]`: psi_j rises through the element before node j and falls through the one after it."""
    return ahead.clamp(0, 1).diff()


def _slopes_here(slopes: Tensor, ahead: Tensor) -> Tensor:
    """The slope in the element that holds each coordinate, its left end included, `[..., d]`.

    Args:
        slopes: of every element, `[d, n - 1]` or `[..., d, n - 1]`.
        ahead: `[..., d, n + 1]`.
    """
    # As the derivative of a clamp: zero outside, the slope inside.
    return _hardtanh_backward(slopes, ahead[..., 1:-1], 0.0, _BEYOND_ONE).sum(dim=-1)  # type: ignore[no-any-return]


def latent_basis(latent: Tensor, mesh: Mesh) -> Tensor:
    """The hat basis of u = sigmoid(z): z `[..., d]` -> `[..., d, n]`, fp32 or fp64.

    The derivative at a node is that of the element to its right.
    """
    if _wants_single_operations():
        return _plain_basis(latent, mesh.nodes)
    return _Basis.apply(latent, mesh)  # type: ignore[no-any-return,no-untyped-call]


def profile_values(latent: Tensor, mesh: Mesh, profile: Tensor, slope: float = 0.0) -> Tensor:
    """`s_i(sigmoid(z_i)) + slope z_i`, s_i piecewise linear with the values `profile` at the nodes.

    Args:
        latent: z, `[..., d]`, fp32 or fp64 as the mesh.
        mesh: of `[d, n]` nodes.
        profile: `[d, n]`, in the same dtype.
        slope: of the linear term.

    Returns:
        `[..., d]`, differentiable in `latent` and `profile`, twice. The derivative at a node is that of the element to
        its right.
    """
    if mesh.nodes.size(-1) > _MAX_DENSE_NODES and not under_transform():
        value = evaluate_profile(latent.sigmoid(), mesh.nodes, profile)
        return torch.add(value, latent, alpha=slope) if slope else value
    if _wants_single_operations():
        return _plain_profile(latent, mesh.nodes, profile, slope)
    if not torch.is_grad_enabled():  # for one token at a time the detour by autograd costs more than the curve
        return _weighted_hats(latent, profile, mesh, slope)[0]
    return _Profile.apply(latent, profile, mesh, slope)  # type: ignore[no-any-return,no-untyped-call]


def _wants_single_operations() -> bool:
    """Compilers fuse them, traces keep them, `torch.func` and forward mode differentiate them one by one."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or under_transform()  # type: ignore[no-untyped-call]


def _plain_basis(latent: Tensor, nodes: Tensor) -> Tensor:
    """`latent_basis` in single operations."""
    coords = latent.sigmoid().unsqueeze(-1)
    share = (coords - nodes[:, :-1]) / nodes.diff(dim=-1)  # [..., d, n - 1]
    # Not clamp: at a node it has the derivatives of both sides.
    share = torch.where((share < 0) | (coords >= nodes[:, 1:]), share.detach().clamp(0, 1), share)
    return F.pad(share, (1, 0), value=1.0) - F.pad(share, (0, 1))


def _plain_profile(latent: Tensor, nodes: Tensor, profile: Tensor, slope: float) -> Tensor:
    """`profile_values` in single operations."""
    value = (_plain_basis(latent, nodes) * profile).sum(dim=-1)
    return torch.add(value, latent, alpha=slope) if slope else value


def _weighted_hats(latent: Tensor, profile: Tensor, mesh: Mesh, slope: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`profile_values` in eight operations, and what its derivative is made of: u, see `_ahead`, see `_hats`."""
    coords = latent.sigmoid()
    ahead = _ahead(coords, mesh)
    hats = _hats(ahead)  # [..., d, n]
    value = (hats * profile).sum(dim=-1)
    return value.add_(latent, alpha=slope) if slope else value, coords, ahead, hats


class _Profile(torch.autograd.Function):
    """`profile_values` in eight operations forward and ten backward."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, profile: Tensor, mesh: Mesh, slope: float) -> Tensor:
        value, coords, ahead, hats = _weighted_hats(latent, profile, mesh, slope)
        kept = (ahead, hats) if latent.shape[-1] <= _MOST_KEPT else ()
        ctx.save_for_backward(latent, profile, coords, *kept)
        ctx.mesh, ctx.slope = mesh, slope
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        latent, profile, coords, *kept = ctx.saved_tensors
        needs_latent, needs_profile = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # a second derivative will be taken: let autograd see every step
            value = _plain_profile(latent, ctx.mesh.nodes, profile, ctx.slope)
            return _again(value, {0: latent, 1: profile}, ctx.needs_input_grad, gradient)
        ahead = kept[0] if kept else _ahead(coords, ctx.mesh)
        d_latent = d_profile = None
        if needs_latent:
            steep = _slopes_here(profile.diff().div_(ctx.mesh.inner), ahead)
            d_latent = _sigmoid_backward(steep, coords)
            if ctx.slope:
                d_latent.add_(ctx.slope)
            d_latent.mul_(gradient)
        if needs_profile:
            hats = kept[1] if kept else _hats(ahead)
            d_profile = hats.mul(gradient.unsqueeze(-1)).reshape(-1, *profile.shape).sum(dim=0)
        return d_latent, d_profile, None, None


class _Basis(torch.autograd.Function):
    """`latent_basis`; what `_Profile` is for one function per component."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, mesh: Mesh) -> Tensor:
        coords = latent.sigmoid()
        ahead = _ahead(coords, mesh)
        ctx.save_for_backward(latent, coords, ahead)
        ctx.mesh = mesh
        return _hats(ahead)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        latent, coords, ahead = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _again(_plain_basis(latent, ctx.mesh.nodes), {0: latent}, ctx.needs_input_grad, gradient)
        steep = _slopes_here(gradient.diff().div_(ctx.mesh.inner), ahead)
        return _sigmoid_backward(steep, coords), None


def _again(value: Tensor, inputs: dict[int, Tensor], needed: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of a value that was made anew, by autograd, so that they can be differentiated."""
    wanted = {place: tensor for place, tensor in inputs.items() if needed[place]}
    found = torch.autograd.grad(value, list(wanted.values()), gradient, create_graph=True)
    by_place = dict(zip(wanted, found, strict=True))
    return tuple(by_place.get(place) for place in range(len(needed)))
