"""LReg as a method of regression: scikit-learn estimators on the numerical core, without PEFT.

    from lreg_peft.regression import LagrangeRegressor

    model = LagrangeRegressor().fit(X, y)
    mean, std = model.predict(X, return_std=True)

Source: Li, Cheng & Gu (2025), "A Globally Optimal Alternative to MLP", sections 2.1-2.5. Needs the extra `regression`.
"""

try:
    import scipy  # noqa: F401
    import sklearn  # noqa: F401
except ImportError as error:
    raise ImportError(
        "lreg_peft.regression needs scikit-learn and SciPy. Install them: pip install lreg_peft[regression]."
    ) from error

from .classifier import LagrangeClassifier
from .encoder import LagrangeEncoder
from .estimator import LagrangeRegressor
from .multigrade import MultigradeRegressor
from .relu import mesh_to_network, network_to_mesh
from .report import Optimality
from .terms import FittedTerm

__all__ = [
    "FittedTerm",
    "LagrangeClassifier",
    "LagrangeEncoder",
    "LagrangeRegressor",
    "MultigradeRegressor",
    "Optimality",
    "mesh_to_network",
    "network_to_mesh",
]
