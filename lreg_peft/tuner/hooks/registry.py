"""What was put into a model, and how it is taken out again.

Whoever puts hooks or attributes into a foreign model leaves the function that removes them here. Functions are kept by
reference and get the model when they are called, so that copies and pickles of a model hold nothing of the original.
"""

from collections.abc import Callable

from torch import nn

Release = Callable[[nn.Module], None]

_NAME = "_lreg_installed"


def remember(model: nn.Module, release: Release) -> None:
    """Have `release(model)` called by `release_all`; once, however often it is remembered.

    Args:
        model: the model that something is installed in.
        release: a function of a module, not a method or a closure: it must survive a copy and a pickle of the model.
    """
    installed = model.__dict__.setdefault(_NAME, [])
    if release not in installed:
        installed.append(release)


def forget(model: nn.Module, release: Release) -> None:
    """Undo `remember`: nothing is left to be taken out."""
    installed = model.__dict__.get(_NAME, [])
    if release in installed:
        installed.remove(release)


def release_all(model: nn.Module) -> None:
    """Take everything out, the last first."""
    for release in reversed(model.__dict__.pop(_NAME, [])):
        release(model)
