"""The numerical core: pure functions on torch tensors, without PEFT or Transformers."""

from .adapt.move import AdaptedMesh, adapt_mesh
from .adapt.transfer import interpolate
from .basis import curvature_penalty, evaluate, hat_basis
from .coordinates import LOGISTIC_NORMAL_SCALE, initial_projection
from .mesh import check_nodes, locate, quantile_nodes, uniform_nodes
from .solve.cross_entropy import solve_cross_entropy
from .solve.least_squares import solve_least_squares
from .solve.problem import Certificate, Chunk, Chunks, Processes, Solution

__all__ = [
    "LOGISTIC_NORMAL_SCALE",
    "AdaptedMesh",
    "Certificate",
    "Chunk",
    "Chunks",
    "Processes",
    "Solution",
    "adapt_mesh",
    "check_nodes",
    "curvature_penalty",
    "evaluate",
    "hat_basis",
    "initial_projection",
    "interpolate",
    "locate",
    "quantile_nodes",
    "solve_cross_entropy",
    "solve_least_squares",
    "uniform_nodes",
]
