"""The numerical core: pure functions on torch tensors, without PEFT or Transformers."""

from .adapt.move import AdaptedMesh, adapt_mesh
from .adapt.transfer import interpolate
from .basis import (
    curvature_penalty,
    dense_is_faster,
    design_matrix,
    evaluate,
    evaluate_factored,
    evaluate_profile,
    expand_basis,
    hat_basis,
    weighted_rows,
)
from .coordinates import LOGISTIC_NORMAL_SCALE, initial_projection, project
from .free_knots import PiecewiseLinearFit, fit_piecewise_linear
from .mesh import active_nodes, check_nodes, locate, quantile_nodes, separate_nodes, uniform_nodes
from .product import add_basis, add_product
from .solve.cross_entropy import solve_cross_entropy
from .solve.least_squares import solve_least_squares
from .solve.problem import Certificate, Chunk, Chunks, Processes, Solution

__all__ = [
    "LOGISTIC_NORMAL_SCALE",
    "AdaptedMesh",
    "Certificate",
    "Chunk",
    "Chunks",
    "PiecewiseLinearFit",
    "Processes",
    "Solution",
    "active_nodes",
    "adapt_mesh",
    "add_basis",
    "add_product",
    "check_nodes",
    "curvature_penalty",
    "dense_is_faster",
    "design_matrix",
    "evaluate",
    "evaluate_factored",
    "evaluate_profile",
    "expand_basis",
    "fit_piecewise_linear",
    "hat_basis",
    "initial_projection",
    "interpolate",
    "locate",
    "project",
    "quantile_nodes",
    "separate_nodes",
    "solve_cross_entropy",
    "solve_least_squares",
    "uniform_nodes",
    "weighted_rows",
]
