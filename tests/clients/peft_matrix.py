"""PEFT's own tests of custom models, with LReg cases in place of its methods.

    pip download --no-deps --no-binary :all: peft==<version>     # the source archive carries the tests
    pip install diffusers pytest                             # which they import
    tar xzf peft-*.tar.gz
    python tests/clients/peft_matrix.py peft-<version>/tests [pytest options]

Tests of merging are left out, and others are skipped at the point where they merge, which a nonlinear shortcut cannot.
"""

import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from lreg_peft import LRegConfig
from lreg_peft.tuner.layer import MERGE_REFUSED

MODELS = {
    "MLP": (["lin0"], ["lin1"], ["lin0", "lin1"]),
    "Conv1d": (["conv1d"],),
    "Conv1dBigger": (["conv1d"],),
    "Conv1dGroups": (["conv1d"],),
    "Conv2d": (["conv2d"], ["conv2d", "lin0"]),
    "Conv2d1x1": (["conv2d"],),
    "Conv2dGroups": (["conv2d"],),
    "Conv3d": (["conv3d"], ["conv3d", "lin0"]),
    "EmbConv1D": (["conv1d"],),
}
VARIANTS = {
    "full": {},
    "reduced": {"weighting": "reduced", "n_nodes": 5},
    "linear": {"weighting": "factored", "linear_term": True, "n_nodes": 5},
}
CASES = [
    (f"{model} {'+'.join(targets)} LReg {name}", model, LRegConfig, {"target_modules": targets, **options})
    for name, options in VARIANTS.items()
    for model, placements in MODELS.items()
    for targets in placements
] + [("MLP saved LReg", "MLP", LRegConfig, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]})]


class Cases:
    """A pytest plugin: the marks of the tests hold the list of cases, which is changed in place."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        cases = getattr(metafunc.module, "TEST_CASES", None)
        if cases is not None and cases != CASES:
            cases[:] = CASES

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        try:
            return (yield)
        except NotImplementedError as error:
            if str(error) == MERGE_REFUSED:
                pytest.skip("all before merging passed")
            raise


if __name__ == "__main__":
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / "test_custom_models.py").exists():
        sys.exit(f"usage: {Path(__file__).name} FOLDER_WITH_PEFTS_TESTS [pytest options]")
    tests = Path(sys.argv[1]).resolve()
    (tests / "__init__.py").touch()  # the archive lacks it, and the tests import each other relatively
    options = ["-q", "-k", "LReg and not merg", "-o", "addopts=", "-p", "no:cacheprovider"]
    place = [f"{tests}/test_custom_models.py", "--rootdir", str(tests.parent)]
    sys.exit(pytest.main([*place, *options, *sys.argv[2:]], plugins=[Cases()]))
