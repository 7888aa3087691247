"""The numerical core: pure functions on torch tensors, without PEFT or Transformers."""

from .basis import curvature_penalty, evaluate, evaluate_factored, expand_basis, hat_basis
from .mesh import check_nodes, locate, quantile_nodes, separate_nodes, uniform_nodes
from .projection import LOGISTIC_NORMAL_SCALE, initial_projection, project

__all__ = [
    "LOGISTIC_NORMAL_SCALE",
    "check_nodes",
    "curvature_penalty",
    "evaluate",
    "evaluate_factored",
    "expand_basis",
    "hat_basis",
    "initial_projection",
    "locate",
    "project",
    "quantile_nodes",
    "separate_nodes",
    "uniform_nodes",
]
