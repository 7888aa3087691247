"""Li, Cheng & Gu (2025), sections 2.6-2.7, written out literally in float64 NumPy loops."""

import numpy as np
import torch


def relu(x: float) -> float:
    return max(x, 0.0)


def hat(x: float, nodes: np.ndarray, i: int) -> float:
    """psi_i(x) on one mesh; x is clamped to it, and at the two ends only the inner slope exists."""
    x = min(max(x, nodes[0]), nodes[-1])
    rising = relu(x - nodes[i - 1]) / (nodes[i] - nodes[i - 1]) if i > 0 else np.inf
    falling = relu(nodes[i + 1] - x) / (nodes[i + 1] - nodes[i]) if i + 1 < len(nodes) else np.inf
    return min(rising, falling)


def basis(coords: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """[samples, components] and [components, n_nodes] -> [samples, components, n_nodes]."""
    samples, components = coords.shape
    n_nodes = nodes.shape[1]
    result = np.zeros((samples, components, n_nodes))
    for s in range(samples):
        for i in range(components):
            for j in range(n_nodes):
                result[s, i, j] = hat(coords[s, i], nodes[i], j)
    return result


def shortcut(
    features: np.ndarray, projection: np.ndarray, bias: np.ndarray, nodes: np.ndarray, coefficients: np.ndarray
) -> np.ndarray:
    """sum_ij psi_ij(sigmoid(P x + b)_i) c_ij: [samples, in] -> [samples, out]."""
    coords = 1 / (1 + np.exp(-(features @ projection.T + bias)))
    psi = basis(coords, nodes)
    result = np.zeros((features.shape[0], coefficients.shape[2]))
    for s in range(features.shape[0]):
        for i in range(nodes.shape[0]):
            for j in range(nodes.shape[1]):
                result[s] += psi[s, i, j] * coefficients[i, j]
    return result


def sigmoid(latent: np.ndarray) -> np.ndarray:
    """Torch's: in which element a coordinate at a node lies is decided by its last bit."""
    return torch.from_numpy(latent).sigmoid().numpy()


def design(
    latent: np.ndarray, nodes: np.ndarray, weighting: str, profile: np.ndarray | None = None, linear_term: bool = False
) -> np.ndarray:
    """What the curve of a shortcut gives, the rows of its table are multiplied by: [samples, d] -> [samples, K]."""
    samples, components = latent.shape
    n_nodes = nodes.shape[1]
    psi = basis(sigmoid(latent), nodes)
    rows = []
    for s in range(samples):
        row = []
        for i in range(components):
            if weighting == "factored":
                value = sum(psi[s, i, j] * profile[i, j] for j in range(n_nodes))
                row.append(value + (latent[s, i] / 1.702 if linear_term else 0))
            else:
                row += [psi[s, i, j] for j in range(n_nodes) if weighting == "full" or j > 0]
        rows.append([*row, 1.0] if weighting == "reduced" else row)
    return np.array(rows)


def design_slope(
    latent: np.ndarray, nodes: np.ndarray, weighting: str, profile: np.ndarray | None = None, linear_term: bool = False
) -> np.ndarray:
    """d design_k / d z_i, [samples, K, d]; at a node the derivative of the element to the right."""
    samples, components = latent.shape
    n_nodes, coords = nodes.shape[1], sigmoid(latent)
    result = np.zeros((samples, design(latent, nodes, weighting, profile, linear_term).shape[1], components))
    for s in range(samples):
        for i in range(components):
            u = coords[s, i]
            e = max(
                j for j in range(n_nodes - 1) if nodes[i, j] <= u
            )  # the element that holds u, its left end included
            steepness = u * (1 - u) / (nodes[i, e + 1] - nodes[i, e])
            if weighting == "factored":
                result[s, i, i] = steepness * (profile[i, e + 1] - profile[i, e]) + (1 / 1.702 if linear_term else 0)
                continue
            width, first = (n_nodes, 0) if weighting == "full" else (n_nodes - 1, 1)
            for j, slope in ((e, -steepness), (e + 1, steepness)):
                if j >= first:
                    result[s, i * width + j - first, i] = slope
    return result
