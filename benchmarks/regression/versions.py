"""Versions of everything that can move a figure."""

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    *("lreg_peft", "torch", "numpy", "scipy", "scikit-learn", "lightgbm", "pygam", "interpret-core", "scikit-fem"),
    *("inkan", "mlxtend"),
)


def installed_versions() -> dict[str, str]:
    """By package; those that are missing are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
