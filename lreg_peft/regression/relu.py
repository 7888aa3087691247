"""Piecewise-linear functions of one variable and ReLU networks are the same functions: both directions, exactly.

Arora, Basu, Mianjy & Mukherjee (2018) and He, Li, Xu & Zheng (2020) show it; Li, Cheng & Gu (2025, sec. 2.5) build on
it.
Both are computed in fp64 without differences of large numbers, so that only rounding separates the two.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core import check_nodes


def mesh_to_network(nodes: Tensor, values: Tensor) -> nn.Sequential:
    """The ReLU network of a continuous piecewise-linear function.

    Every element gives its local coordinate, cut to [0, 1] by two ReLU: 1 - relu(1 - relu((x - p_j) / h_j)). In a sum
    of ReLU with one hidden layer, slopes much steeper than the function cancel each other; here nothing does.

    Args:
        nodes: `[k]` or `[1, k]`, k >= 2, strictly increasing.
        values: `[k]` or `[k, outputs]`, at the nodes. The function continues its end elements to both sides.

    Returns:
        `Sequential(Linear(1, k + 1), ReLU, Linear(k + 1, k + 1), ReLU, Linear(k + 1, outputs))`, fp64.

    Raises:
        ValueError: for invalid nodes, or values that do not fit.
    """
    nodes = nodes.detach().double().reshape(-1)
    check_nodes(nodes.unsqueeze(0))
    values = values.detach().double()
    if values.ndim == 1:
        values = values.unsqueeze(1)
    if values.ndim != 2 or len(values) != len(nodes):
        raise ValueError(
            f"values must have shape [k] or [k, outputs] with k = {len(nodes)} nodes, got {tuple(values.shape)}."
        )
    return sum_network([nodes], [values], values.new_zeros(values.shape[1]))


def sum_network(meshes: Sequence[Tensor], values: Sequence[Tensor], intercept: Tensor) -> nn.Sequential:
    """The ReLU network of a sum of piecewise-linear functions, one per input.

    Args:
        meshes: per input `[k]` fp64, or an empty tensor for an input without influence.
        values: per input `[k, outputs]` fp64.
        intercept: `[outputs]` fp64.

    Returns:
        A network from `[n, inputs]` to `[n, outputs]`, with two hidden layers of sum (k + 1) units; fp64.
    """
    first_rows, second_rows, last_columns = [], [], []
    bias = intercept.clone()
    for i, (nodes, table) in enumerate(zip(meshes, values, strict=True)):
        if len(nodes) < 2:
            bias = bias + (table[0] if len(table) else 0)
            continue
        lengths, steps = nodes.diff(), table.diff(dim=0)
        # Hidden 1: relu((x - p_j) / h_j) for all elements, then what lies left of the mesh, then right of it.
        scale = torch.cat((1 / lengths, -1 / lengths[:1], 1 / lengths[-1:]))
        origin = torch.cat((nodes[:-1], nodes[:1], nodes[-1:]))
        first_rows.append((i, scale, -origin * scale))
        # Hidden 2: relu(1 - h) for elements; what lies outside passes.
        sign = torch.cat((-torch.ones_like(lengths), lengths.new_ones(2)))
        second_rows.append((sign, (1 - sign) / 2))
        last_columns.append(torch.cat((-steps, -steps[:1], steps[-1:])))
        bias = bias + table[0] + steps.sum(dim=0)
    if not first_rows:
        first_rows = [(0, bias.new_zeros(1), bias.new_zeros(1))]
        second_rows = [(bias.new_zeros(1), bias.new_zeros(1))]
        last_columns = [bias.new_zeros(1, len(bias))]
    width = sum(len(scale) for _, scale, _ in first_rows)
    first, second = nn.Linear(len(meshes), width).double(), nn.Linear(width, width).double()
    last = nn.Linear(width, len(bias)).double()
    with torch.no_grad():
        for linear in (first, second, last):
            linear.weight.zero_()
            linear.bias.zero_()
        start = 0
        for (i, scale, shift), (sign, offset), columns in zip(first_rows, second_rows, last_columns, strict=True):
            here = slice(start, start + len(scale))
            first.weight[here, i], first.bias[here] = scale, shift
            second.weight[range(here.start, here.stop), range(here.start, here.stop)] = sign
            second.bias[here] = offset
            last.weight[:, here] = columns.T
            start = here.stop
        last.bias.copy_(bias)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)


@torch.no_grad()
def network_to_mesh(net: nn.Module) -> tuple[Tensor, Tensor]:
    """The mesh of the piecewise-linear function that a ReLU network of one input is, on the whole real line.

    Layer by layer, a node is set wherever a unit changes sign. The values there are the network's own.

    Args:
        net: an `nn.Linear`, or an `nn.Sequential` of Linear and ReLU (Identity, Dropout and Flatten do nothing), from
            one input to any number of outputs.

    Returns:
        nodes: `[k]` fp64. The function is linear left of the second node and right of the last but one.
        values: `[k, outputs]` fp64.

    Raises:
        ValueError: for other layers, several inputs, or parameters that are not finite.
    """
    layers = _layers(net)
    nodes = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    for depth, layer in enumerate(layers):
        if isinstance(layer, nn.ReLU):
            nodes = _with_crossings(nodes, layers[:depth])
    return nodes, _run(layers, nodes)


def _layers(net: nn.Module) -> list[nn.Module]:
    if isinstance(net, nn.Sequential):
        return [layer for child in net for layer in _layers(child)]
    if isinstance(net, (nn.Identity, nn.Dropout, nn.Flatten)):
        return []
    if isinstance(net, nn.Linear):
        if not all(torch.isfinite(p).all() for p in net.parameters()):
            raise ValueError("the network's parameters must be finite, got NaN or infinite values.")
        return [net]
    if isinstance(net, nn.ReLU):
        return [net]
    raise ValueError(
        f"only Linear and ReLU layers are piecewise linear with known kinks, got {type(net).__name__}; pass an "
        "nn.Sequential of those."
    )


def _run(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Values `[k, width]` after some layers, fp64."""
    value = x.unsqueeze(1)
    for layer in layers:
        if isinstance(layer, nn.Linear):
            if layer.in_features != value.shape[1]:
                raise ValueError(
                    f"the network must have one input and layers that fit each other, got a Linear of "
                    f"{layer.in_features} inputs where {value.shape[1]} arrive."
                )
            weight = layer.weight.double().cpu()
            value = value @ weight.T
            if layer.bias is not None:
                value = value + layer.bias.double().cpu()
        else:
            value = value.clamp_min(0)
    return value


def _with_crossings(nodes: Tensor, layers: Sequence[nn.Module]) -> Tensor:
    """`nodes` and where the units after `layers`, linear between nodes and in both tails, change sign."""
    value = _run(layers, nodes)  # [k, width]
    left, right = value[:-1], value[1:]
    share = left / (left - right)  # of the element, where the line through its ends is zero
    found = nodes[:-1, None] + share * nodes.diff()[:, None]
    inside = (left * right < 0) & torch.isfinite(found)
    crossings = [found[inside]]
    for row, tail in ((0, share[0] < 0), (-1, share[-1] > 1)):
        crossings.append(found[row][tail & torch.isfinite(found[row])])
    new = torch.cat(crossings)
    if not len(new):
        return nodes
    every = torch.cat((nodes, new)).sort().values
    # Both ends stay beyond all kinks, so that the end elements have the slopes of the tails.
    reach = (every[-1] - every[0]).clamp_min(1.0) * 0.5
    low = every[:1] - reach if every[0] < nodes[0] else every[:0]
    high = every[-1:] + reach if every[-1] > nodes[-1] else every[:0]
    every = torch.cat((low, every, high))
    spacing = torch.cat((every.new_ones(1), every.diff()))
    return every[spacing > 4 * torch.finfo(every.dtype).eps * every.abs()]
