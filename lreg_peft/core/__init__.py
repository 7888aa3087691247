"""The numerical core: pure functions on torch tensors, without PEFT or Transformers."""

from .adapt import AdaptedMesh, adapt_mesh, interpolate
from .basis import curvature_penalty, evaluate, evaluate_factored, expand_basis, hat_basis
from .mesh import check_nodes, locate, quantile_nodes, separate_nodes, uniform_nodes
from .projection import LOGISTIC_NORMAL_SCALE, initial_projection, project
from .regression import PiecewiseLinearFit, fit_piecewise_linear

__all__ = [
    "LOGISTIC_NORMAL_SCALE",
    "AdaptedMesh",
    "PiecewiseLinearFit",
    "adapt_mesh",
    "check_nodes",
    "curvature_penalty",
    "evaluate",
    "evaluate_factored",
    "expand_basis",
    "fit_piecewise_linear",
    "hat_basis",
    "initial_projection",
    "interpolate",
    "locate",
    "project",
    "quantile_nodes",
    "separate_nodes",
    "uniform_nodes",
]
