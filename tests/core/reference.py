"""Li, Cheng & Gu (2025), sections 2.6-2.7, written out literally in float64 NumPy loops."""

import numpy as np


def relu(x: float) -> float:
    return max(x, 0.0)


def hat(x: float, nodes: np.ndarray, i: int) -> float:
    """psi_i(x) on one mesh; x is clamped to it, and at the two ends only the inner slope exists."""
    x = min(max(x, nodes[0]), nodes[-1])
    rising = relu(x - nodes[i - 1]) / (nodes[i] - nodes[i - 1]) if i > 0 else np.inf
    falling = relu(nodes[i + 1] - x) / (nodes[i + 1] - nodes[i]) if i + 1 < len(nodes) else np.inf
    return min(rising, falling)


def basis(coords: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """[samples, components] and [components, dof] -> [samples, components, dof]."""
    samples, components = coords.shape
    dof = nodes.shape[1]
    result = np.zeros((samples, components, dof))
    for s in range(samples):
        for i in range(components):
            for j in range(dof):
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
