"""The numerical core: pure functions on torch tensors, without PEFT or Transformers."""

from .adapt.move import AdaptedMesh, adapt_mesh
from .adapt.transfer import interpolate
from .basis import curvature_penalty, evaluate, evaluate_profile, hat_basis
from .checks import check_doors as _check_doors
from .coordinates import LOGISTIC_NORMAL_SCALE, initial_projection, project
from .mesh import active_nodes, check_nodes, locate, quantile_nodes, separate_nodes, uniform_nodes
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
    "active_nodes",
    "adapt_mesh",
    "check_nodes",
    "curvature_penalty",
    "evaluate",
    "evaluate_profile",
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
]

# Inside this package, and in every training step, these are called with what has been checked already.
_MESH = {"coords": "... components", "nodes": "components dof"}
_check_doors(
    globals(),
    {
        "active_nodes": {"element": "int64 ... components", "local": "... components"},
        "check_nodes": {},
        "curvature_penalty": {"nodes": "components dof"},
        "evaluate": {},
        "evaluate_profile": {**_MESH, "profile": "components dof"},
        "hat_basis": {},
        "interpolate": {
            "nodes_old": "components dof_old",
            "nodes_new": "components_new dof_new",
            "values": "...",
        },
        "locate": {},
        "project": {
            "features": "... in_features",
            "projection": "components in_features",
            "bias": "components",
        },
        "separate_nodes": {"nodes": "components dof"},
    },
)
