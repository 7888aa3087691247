"""Symmetric pentadiagonal systems, many at once: factors, solutions, determinants and the band of the inverse.

A one-dimensional smoother has one such system per value of the smoothing parameter. All values go through one loop over
the nodes, so that forty of them cost little more than one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Pentadiagonal:
    """A = L D L^T for a batch of symmetric positive definite pentadiagonal matrices.

    Attributes:
        pivots: `[n, batch]`, the diagonal of D.
        first: `[n, batch]`, L[i, i - 1] at i; zero for i = 0.
        second: `[n, batch]`, L[i, i - 2] at i; zero for i < 2.
    """

    pivots: Array
    first: Array
    second: Array

    @classmethod
    def factor(cls, diagonal: Array, first: Array, second: Array) -> "Pentadiagonal":
        """Factor.

        Args:
            diagonal: `[n, batch]`.
            first: `[n, batch]`, A[i, i - 1] at i; entry 0 is not read.
            second: `[n, batch]`, A[i, i - 2] at i; entries 0 and 1 are not read.

        Returns:
            The factors. Where a matrix is not positive definite to rounding, pivots are raised to a tiny positive
            number.
        """
        n = len(diagonal)
        pivots, low, lower = np.empty_like(diagonal), np.zeros_like(diagonal), np.zeros_like(diagonal)
        floor = np.finfo(np.float64).eps * np.abs(diagonal).max(axis=0) * 1e-3 + np.finfo(np.float64).tiny
        pivots[0] = np.maximum(diagonal[0], floor)
        if n > 1:
            low[1] = first[1] / pivots[0]
            pivots[1] = np.maximum(diagonal[1] - first[1] * low[1], floor)
        for i in range(2, n):
            lower[i] = second[i] / pivots[i - 2]
            rest = first[i] - second[i] * low[i - 1]
            low[i] = rest / pivots[i - 1]
            pivots[i] = np.maximum(diagonal[i] - second[i] * lower[i] - rest * low[i], floor)
        return cls(pivots, low, lower)

    def log_determinant(self) -> Array:
        """`[batch]`."""
        result: Array = np.log(self.pivots).sum(axis=0)
        return result

    def solve(self, right: Array) -> Array:
        """A^-1 `right`; `[n, batch, columns]`, or broadcastable to it."""
        n, batch = self.pivots.shape
        low, lower = self.first[:, :, None], self.second[:, :, None]
        x = np.array(np.broadcast_to(right, (n, batch, right.shape[-1])), dtype=np.float64)
        if n > 1:
            x[1] -= low[1] * x[0]
        for i in range(2, n):
            x[i] -= low[i] * x[i - 1] + lower[i] * x[i - 2]
        x /= self.pivots[:, :, None]
        if n > 1:
            for i in range(n - 2, -1, -1):
                x[i] -= low[i + 1] * x[i + 1]
                if i + 2 < n:
                    x[i] -= lower[i + 2] * x[i + 2]
        return x

    def inverse_band(self) -> tuple[Array, Array, Array]:
        """Diagonal and the two lower diagonals of A^-1 (Hutchinson & de Hoog 1985), `[n, batch]` each.

        Laid out like the arguments of `factor`.
        """
        n = len(self.pivots)
        diagonal, first, second = 1 / self.pivots, np.zeros_like(self.pivots), np.zeros_like(self.pivots)
        for i in range(n - 2, -1, -1):
            low = self.first[i + 1]
            if i + 2 < n:
                lower = self.second[i + 2]
                second[i + 2] = -low * first[i + 2] - lower * diagonal[i + 2]
                first[i + 1] = -low * diagonal[i + 1] - lower * first[i + 2]
                diagonal[i] -= low * first[i + 1] + lower * second[i + 2]
            else:
                first[i + 1] = -low * diagonal[i + 1]
                diagonal[i] -= low * first[i + 1]
        return diagonal, first, second
