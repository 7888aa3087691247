"""Values of a parametrisation that the default suite leaves out."""

from typing import Any

import pytest


def slow(*values: Any) -> list[Any]:
    """The values, or tuples of values, for the tier `slow`."""
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in values]
