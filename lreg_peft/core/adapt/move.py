"""One proposal for a mesh, by either strategy.

- `"paper"`: mesh refinement-coarsening as published (Li, Cheng & Gu 2025, Algorithms 1-3);
- `"relocate"` (default): nodes leave where removing them costs least and enter where the residual is largest, and
  the nodes that stay slide along the gradient of the loss in their positions.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..checks import number, whole
from ..mesh import check_nodes
from .indicators import check_coefficients, check_indicator, check_moments, first_bad
from .mrc import resample
from .relocate import relocate
from .transfer import interpolate

Strategy = Literal["relocate", "paper"]


@dataclass(frozen=True)
class AdaptedMesh:
    """The result of one mesh update.

    Attributes:
        nodes: `[components, n_nodes]`, the new mesh; shape, dtype and ends of the old one.
        old_nodes: `[components, n_nodes]`, the mesh it replaces.
    """

    nodes: Tensor
    old_nodes: Tensor

    def carry(self, values: Tensor) -> Tensor:
        """Bring a per-node tensor `[components, n_nodes, ...]` from the old mesh to the new one; see `interpolate`."""
        return interpolate(self.old_nodes, self.nodes, values)


def check_strategy(strategy: object) -> None:
    """Raise a `ValueError` unless `strategy` is the name of one."""
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy must be one of {get_args(Strategy)}, got {strategy!r}.")


def adapt_mesh(
    nodes: Tensor,
    coefficients: Tensor,
    indicator: Tensor,
    *,
    strategy: Strategy = "relocate",
    n_refine: int | None = None,
    pseudocount: float = 1.0,
    moments: Tensor | None = None,
    node_gradient: Tensor | None = None,
    size: float = 1.0,
) -> AdaptedMesh:
    """Propose a mesh that follows the residual. Whether to keep it is the caller's decision.

    Decide after the coefficients have been refitted or trained for some steps: a node that enters does not change the
    function yet, whereas the one that leaves does.

    `"paper"` (Li, Cheng & Gu 2025, Algorithms 2-3): `pseudocount` is added to each hit count, the most-hit elements are
    split, and the new nodes are the quantiles of the resulting density. (Halving an element and its count does not
    change a density, so `n_refine` does not influence the new nodes.)

    `"relocate"`: up to `n_refine` nodes per component move from where `removal_cost` is lowest to the midpoints of the
    elements with the largest indicator, provided these hold more than the median element. With `node_gradient`, the
    other nodes slide downhill, each by `size * MAX_SHIFT * r` of the element it slides into, where

        r_j = |dL/dp_j| / sqrt(E_j K_j) in [0, 1],
        K_j = sum over samples of |slope|^2 psi_j^2,  E_j = indicator of the two elements at the node,

    is the correlation, over the samples at the node, between the residual and what sliding would change. It needs
    no knowledge of the scale or the curvature of the loss, and vanishes where the position is optimal for coefficients
    that are.

    Args:
        nodes: `[components, n_nodes]`, strictly increasing, fp32 or fp64. With n_nodes 2 nothing moves.
        coefficients: `[components, n_nodes, out_features]`.
        indicator: `[components, n_nodes - 1]`, non-negative: for `"paper"` the hits of the hardest samples, for
            `"relocate"` the sum over the samples in the element of the squared gradient at the output.
        strategy: `"relocate"` or `"paper"`.
        n_refine: elements to split per component; None takes an eighth of the nodes, at least one. More than the
            mesh has room for is reduced to that.
        pseudocount: hits added to every element of the given mesh, before splitting (`"paper"` only).
        moments: `[components, n_nodes - 1, 3]`, from `element_moments` over the samples that made the indicator
            (`"relocate"` only); None assumes the same number of samples, evenly spread, in every element.
        node_gradient: `[components, n_nodes]`, from the function of that name, in the units of the gradients in the
            indicator (`"relocate"` only); needs `moments`.
        size: in (0, 1], scales the move (`"relocate"` only): halve it when a move is refused. Once it has come below
            `1 / n_refine`, nodes only slide, if a `node_gradient` is given.

    Returns:
        An `AdaptedMesh`. Its `carry` brings coefficients and optimiser moments to the new nodes.

    Raises:
        ValueError: for an unknown strategy, invalid nodes, shapes that do not fit, a negative or non-finite
            indicator, or options out of range; the message gives the offending values.
        TypeError: for arguments of a wrong type.
    """
    check_strategy(strategy)
    check_nodes(nodes)
    check_coefficients(coefficients, nodes)
    check_indicator(indicator, nodes, "indicator")
    whole("n_refine", n_refine, 0, optional=True)
    number("pseudocount", pseudocount, 0)
    number("size", size, above=0, highest=1)
    if moments is not None:
        check_moments(moments, nodes)
    if node_gradient is not None:
        if moments is None:
            raise ValueError("node_gradient needs the moments of the same samples; pass element_moments(...).")
        if node_gradient.shape != nodes.shape or not torch.isfinite(node_gradient).all():
            raise ValueError(
                f"node_gradient must be finite with the shape of nodes {tuple(nodes.shape)}, got shape "
                f"{tuple(node_gradient.shape)} and values {first_bad(node_gradient)}."
            )
    n_nodes = nodes.shape[1]
    if n_nodes == 2:
        return AdaptedMesh(nodes.clone(), nodes)
    n_refine = max(1, n_nodes // 8) if n_refine is None else n_refine
    with torch.no_grad():
        if strategy == "paper":
            new = resample(nodes, indicator, min(n_refine, n_nodes - 1), pseudocount)
        else:
            new = relocate(nodes, coefficients, indicator, min(n_refine, n_nodes - 2), moments, node_gradient, size)
    return AdaptedMesh(new, nodes)
