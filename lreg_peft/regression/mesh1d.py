"""Meshes on single features, in NumPy: where nodes stand, what is alive at a sample, what goes on outside.

The functions of `lreg_peft.core` clamp to the mesh, as an adapter must; a regressor continues its end elements.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Scale = Literal["quantile", "minmax"]

#: Coordinate in which jumps of the slope are alike: this much of it is the share of samples below, the rest the range.
QUANTILE_SHARE = 0.1

_ROUNDING = 16 * np.finfo(np.float64).eps


def place_nodes(x: Array, weight: Array, n_nodes: int, scale: Scale) -> Array:
    """Nodes for a feature: values that samples take, at equal steps of weight, or equal steps of the range.

    Depends on samples only through their weighted distribution: a sample of weight two acts like two.

    Args:
        x: `[n]`, ascending.
        weight: `[n]`, positive.
        n_nodes: at most so many; with fewer distinct values one node for each.
        scale: "quantile" or "minmax".

    Returns:
        `[<= n_nodes]`, strictly increasing, from the smallest to the largest value; one node if they are equal.
    """
    values = x[np.concatenate(([True], np.diff(x) > 0))]
    if len(values) <= max(n_nodes, 1):
        return values
    if scale == "minmax":
        nodes = np.linspace(values[0], values[-1], n_nodes)
        nodes[-1] = values[-1]
        return distinct(nodes)
    reached = np.cumsum(weight)
    # Slack, so that rounding does not decide which of two samples a quantile is.
    level = np.linspace(0, 1, n_nodes) * reached[-1] - 1e-9 * reached[-1]
    inner = x[np.minimum(np.searchsorted(reached, level), len(x) - 1)]
    nodes = distinct(np.concatenate((values[:1], inner[1:-1], values[-1:])))
    if len(nodes) < n_nodes // 2:  # many ties: the rest of the nodes go to the distinct values
        rare = values[np.linspace(0, len(values) - 1, n_nodes - len(nodes)).round().astype(int)]
        nodes = distinct(np.sort(np.concatenate((nodes, rare))))
    return nodes


def distinct(nodes: Array) -> Array:
    """Ascending nodes without those too close to the one before for a slope between them to mean anything.

    Close is meant relative to the rounding of the nodes, not to their range, in which one far value may set the scale.
    """
    gap = np.diff(nodes) > _ROUNDING * np.maximum(np.abs(nodes[:-1]), np.abs(nodes[1:]))
    result = nodes[np.concatenate(([True], gap))]
    if len(result) > 1:
        result[-1] = nodes[-1]
    return result


def find(x: Array, nodes: Array) -> tuple[NDArray[np.int64], Array]:
    """Element and local coordinate of each sample; outside the mesh the coordinate leaves [0, 1].

    Args:
        x: `[n]`.
        nodes: `[k >= 2]`, strictly increasing.

    Returns:
        element: `[n]` in `[0, k - 2]`.
        local: `[n]`: the two hat functions alive are `1 - local` and `local`.
    """
    element = np.searchsorted(nodes[1:-1], x, side="right")
    left = nodes[element]
    local = (x - left) / (nodes[element + 1] - left)
    return element, local


def evaluate(x: Array, nodes: Array, values: Array) -> Array:
    """The piecewise-linear function with `values` at `nodes`, its end elements continued.

    Args:
        x: `[n]`.
        nodes: `[k]`; with k = 1 the function is constant.
        values: `[k, outputs]`.

    Returns:
        `[n, outputs]`.
    """
    if len(nodes) == 1:
        return np.repeat(values, len(x), axis=0)
    element, local = find(x, nodes)
    local = local[:, None]
    # In this form a node gives its value exactly.
    return (1 - local) * values[element] + local * values[element + 1]
