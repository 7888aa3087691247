"""The best nodes from a grid for the components of a fitted shortcut, one component at a time.

For each component the other ones stay as they are, and the outputs are looked at along the direction in which the
component varies most. What is left is a function of one variable, for which `core.optimal_knots` finds the best nodes
of a grid. That is exact for one component and one output of the squared error, and else a proposal.
"""

import torch
from torch import Tensor

from ..core.adapt.indicators import element_sums
from ..core.adapt.move import AdaptedMesh
from ..core.mesh import locate, separate_nodes
from ..core.optimal_knots import optimal_knots
from ..rows import LossKind

# Samples are summed up in so many bins per component at least, evenly spaced inside of each element.
_BINS = 1024
# The program takes time quadratic in the candidates, and more pieces the more nodes.
_CANDIDATES = 160
_MOST_NODES = 48


class KnotProgram:
    """Gathers, in one pass over the rows, what the program needs.

    Args:
        nodes: `[components, dof]`, the mesh of the fit.
        coefficients: `[components, dof, out_features]`, fitted.
        loss_kind: of the fit.
    """

    def __init__(self, nodes: Tensor, coefficients: Tensor, loss_kind: LossKind | None) -> None:
        self._nodes, self._loss_kind = nodes, loss_kind
        components, dof = nodes.shape
        self._n_sub = max(2, -(-_BINS // (dof - 1)))
        varying = (coefficients - coefficients.mean(dim=1, keepdim=True)).double()
        # The leading right singular vectors, through the smaller side.
        _, vectors = torch.linalg.eigh(varying @ varying.transpose(1, 2))
        direction = torch.einsum("cj,cjo->co", vectors[:, :, -1], varying)
        length = direction.norm(dim=1, keepdim=True)
        self._varies = length.squeeze(1) > 0
        self._direction = torch.where(length > 0, direction / length, direction)  # [components, out]
        self._values = torch.einsum("cjo,co->cj", coefficients.double(), self._direction)  # [components, dof]
        n_bins = (dof - 1) * self._n_sub
        self._sums = [nodes.new_zeros(components, n_bins, dtype=torch.float64) for _ in range(3)]
        self._curvature = nodes.new_zeros(components, dtype=torch.float64)

    @staticmethod
    def is_for(nodes: Tensor) -> bool:
        """Whether a mesh has nodes to move, and not so many that the program would take long."""
        return 2 < nodes.shape[1] <= _MOST_NODES

    def add(self, coords: Tensor, residual: Tensor, outputs: Tensor) -> None:
        """Rows: coordinates `[n, components]`, and gradient of the loss in the outputs and outputs `[n, out]`."""
        element, local = locate(coords, self._nodes, validate=False)
        place = element * self._n_sub + (local * self._n_sub).long().clamp_max(self._n_sub - 1)
        n_bins = self._sums[0].shape[1]
        along = (residual @ self._direction.T.to(residual.dtype)).double()  # [n, components]
        for total, values in zip(self._sums, (torch.ones_like(along), coords.double(), along), strict=True):
            total += element_sums(place, values, n_bins)
        squares = self._direction.T.square().to(outputs.dtype)  # [out, components]
        if self._loss_kind == "squared_error":
            self._curvature += len(coords)
        elif self._loss_kind == "binary_cross_entropy":
            p = outputs.sigmoid()
            self._curvature += ((p * (1 - p)) @ squares).sum(dim=0).double()
        else:
            p = outputs.softmax(dim=1)
            mean = p @ self._direction.T.to(p.dtype)
            self._curvature += (p @ squares - mean.square()).sum(dim=0).double()

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """Sums over rows, to be replaced in place by those over all processes."""
        return (*self._sums, self._curvature)

    def mesh(self) -> AdaptedMesh:
        """The proposal; components of which there is nothing to tell keep their nodes."""
        nodes = self._nodes.clone()
        count, coords, along = self._sums
        bends = self._curvature / count.sum(dim=1).clamp_min(1)
        for i, own in enumerate(self._nodes):
            used = count[i] > 0
            if not self._varies[i] or not bends[i] > 0 or int(used.sum()) < 2 * len(own):
                continue
            weight = count[i][used]
            x = coords[i][used] / weight
            element, local = (t.squeeze(1) for t in locate(x.unsqueeze(1), own.double()[None], validate=False))
            fitted = torch.lerp(self._values[i][element], self._values[i][element + 1], local)
            found = optimal_knots(
                x, fitted - along[i][used] / weight / bends[i], [len(own)], weight=weight, n_candidates=_CANDIDATES
            )[0].nodes
            if len(found) == len(own):
                nodes[i, 1:-1] = found[1:-1].to(nodes)
        return AdaptedMesh(separate_nodes(nodes), self._nodes)
