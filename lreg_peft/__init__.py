"""LReg for PEFT: piecewise-linear shortcut adapters on adaptive meshes.

Importing this package registers the method LREG with PEFT:

    import lreg_peft
    from peft import get_peft_model

    model = get_peft_model(base, lreg_peft.LRegConfig(task_type="CAUSAL_LM"))

Source: Z. Li, J. Cheng, H. Gu (2025), "A Globally Optimal Alternative to MLP", Information 16(10), 921,
doi:10.3390/info16100921.
"""

from typing import Any

from ._version import __version__
from .core.fused_loss import fused_cross_entropy
from .fitting.coefficients import CoefficientFit, fit_coefficients
from .fitting.feature_cache import FeatureCache, cache_features
from .fitting.linearize import Refinement, refine_linearized
from .fitting.meshes import MeshFit, fit_meshes
from .plotting import MeshSnapshot, plot_meshes, snapshot_meshes
from .training.calibration import calibrate_output
from .training.callback import LRegCallback
from .training.initialization import initialize_lreg_weights
from .training.label_shift import LabelShift
from .training.mesh_update import MeshUpdate, ModuleUpdate, update_meshes
from .training.parameter_groups import parameter_groups
from .training.tracking import count_hard_samples, track_statistics
from .tuner import registration as _registration
from .tuner.config import LRegConfig
from .tuner.grades import add_grade, load_grades
from .tuner.layer import LRegLayer
from .tuner.model import LRegModel
from .tuner.model_card import push_model_card
from .tuner.recommend import recommended_config
from .tuner.targets import Target, TargetReport, inspect_targets

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
    "LabelShift",
    "Refinement",
    "Target",
    "TargetReport",
    "cache_features",
    "calibrate_output",
    "add_grade",
    "count_hard_samples",
    "fused_cross_entropy",
    "fit_coefficients",
    "fit_meshes",
    "initialize_lreg_weights",
    "inspect_targets",
    "parameter_groups",
    "load_grades",
    "plot_meshes",
    "push_model_card",
    "recommended_config",
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
