"""LReg for PEFT: piecewise-linear shortcut adapters on adaptive meshes.

Importing this package registers the method LREG with PEFT:

    import lreg_peft
    from peft import get_peft_model

    model = get_peft_model(base, lreg_peft.LRegConfig(task_type="CAUSAL_LM"))

Source: Z. Li, J. Cheng, H. Gu (2025), "A Globally Optimal Alternative to MLP", Information 16(10), 921,
doi:10.3390/info16100921.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .tuner import registration as _registration
from .tuner.config import LRegConfig
from .tuner.layer import LRegLayer
from .tuner.model import LRegModel

if TYPE_CHECKING:
    from .export.lora import convert_to_lora, save_as_lora
    from .fitting.coefficients import fit_coefficients
    from .fitting.feature_cache import FeatureCache, cache_features
    from .fitting.linearize import refine_linearized
    from .plotting import plot_meshes
    from .regression import LagrangeRegressor as LagrangeRegressor
    from .training.callback import LRegCallback
    from .training.initialization import initialize_lreg_weights
    from .training.label_shift import match_token_frequencies
    from .training.mesh_update import update_meshes
    from .training.statistics import track_statistics
    from .tuner.grades import add_grade, load_grades
    from .tuner.penalty import curvature_penalty
    from .tuner.recommend import recommended_config
    from .tuner.targets import inspect_targets

# Where the other names are: imported when asked for, since most of them bring more than an adapter needs.
_LAZY = {
    "export.lora": ("convert_to_lora", "save_as_lora"),
    "fitting.coefficients": ("fit_coefficients",),
    "fitting.feature_cache": ("FeatureCache", "cache_features"),
    "fitting.linearize": ("refine_linearized",),
    "plotting": ("plot_meshes",),
    "regression": ("LagrangeRegressor",),
    "training.label_shift": ("match_token_frequencies",),
    "training.callback": ("LRegCallback",),
    "training.initialization": ("initialize_lreg_weights",),
    "training.mesh_update": ("update_meshes",),
    "training.statistics": ("track_statistics",),
    "tuner.grades": ("add_grade", "load_grades"),
    "tuner.penalty": ("curvature_penalty",),
    "tuner.recommend": ("recommended_config",),
    "tuner.targets": ("inspect_targets",),
}
_PLACES = {name: module for module, names in _LAZY.items() for name in names}

__all__ = [
    "__version__",
    "FeatureCache",
    "LRegCallback",
    "LRegConfig",
    "LRegLayer",
    "LRegModel",
    "add_grade",
    "cache_features",
    "match_token_frequencies",
    "convert_to_lora",
    "curvature_penalty",
    "fit_coefficients",
    "initialize_lreg_weights",
    "inspect_targets",
    "load_grades",
    "plot_meshes",
    "recommended_config",
    "refine_linearized",
    "save_as_lora",
    "track_statistics",
    "update_meshes",
]

_registration.register(LRegConfig, LRegModel)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
