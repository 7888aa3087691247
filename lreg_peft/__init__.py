"""LReg for PEFT: piecewise-linear shortcut adapters on adaptive meshes.

Importing this package registers the method LREG with PEFT:

    import lreg_peft
    from peft import get_peft_model

    model = get_peft_model(base, lreg_peft.LRegConfig(task_type="CAUSAL_LM"))

Source: Z. Li, J. Cheng, H. Gu (2025), "A Globally Optimal Alternative to MLP", Information 16(10), 921,
doi:10.3390/info16100921.
"""

from typing import Any

from . import _registration
from ._version import __version__
from .adaptation import MeshUpdate, ModuleUpdate, update_meshes
from .cache import FeatureCache, cache_features
from .callback import LRegCallback
from .config import LRegConfig
from .core.fused_loss import fused_cross_entropy
from .fit import CoefficientFit, fit_coefficients
from .grades import add_grade, load_grades
from .initialization import initialize_lreg_weights
from .layer import LRegLayer
from .linearize import Refinement, refine_linearized
from .mesh_fit import MeshFit, fit_meshes
from .model import LRegModel
from .model_card import push_model_card
from .plotting import MeshSnapshot, plot_meshes, snapshot_meshes
from .targets import Target, TargetReport, inspect_targets
from .tracking import count_hard_samples, track_statistics

__all__ = [
    "__version__",
    "FeatureCache",
    "CoefficientFit",
    "LRegCallback",
    "LRegConfig",
    "LRegLayer",
    "LRegModel",
    "MeshFit",
    "MeshSnapshot",
    "MeshUpdate",
    "ModuleUpdate",
    "Refinement",
    "Target",
    "TargetReport",
    "cache_features",
    "add_grade",
    "count_hard_samples",
    "fused_cross_entropy",
    "fit_coefficients",
    "fit_meshes",
    "initialize_lreg_weights",
    "inspect_targets",
    "load_grades",
    "plot_meshes",
    "push_model_card",
    "refine_linearized",
    "snapshot_meshes",
    "track_statistics",
    "update_meshes",
]

_registration.register(LRegConfig, LRegModel)


def __getattr__(name: str) -> Any:
    """The regressor comes with scikit-learn, which adapters do not need: imported when asked for."""
    if name == "LagrangeRegressor":
        from .regression import LagrangeRegressor

        return LagrangeRegressor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
