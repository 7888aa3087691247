import os
from importlib.metadata import version
from pathlib import Path

# Before NumPy and torch: these problems are so small that a second thread only costs, and changes the last digits.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from packaging.version import Version  # noqa: E402
from transformers.integrations import peft as native  # noqa: E402
from transformers.utils import logging  # noqa: E402

# The models of these tests are so small that a second thread only costs.
torch.set_num_threads(1)
logging.disable_progress_bar()

if Version(version("peft")) < Version(native.MIN_PEFT_VERSION):
    # Adapters of transformers itself ask for a PEFT that is not there, whatever the method: their tests wait for it.
    def _wait(*args: object, **kwargs: object) -> None:
        pytest.skip(f"add_adapter and load_adapter of these transformers ask for PEFT {native.MIN_PEFT_VERSION}")

    native.PeftAdapterMixin.add_adapter = native.PeftAdapterMixin.load_adapter = _wait

_HERE = Path(__file__).parent
_EXAMPLES = (_HERE / "examples", _HERE / "benchmarks")
# They run most of the package beside what they test.
_UNWATCHED = (*_EXAMPLES, _HERE / "test_readme.py")


@pytest.hookimpl(tryfirst=True)  # before the option -m chooses among the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The folders `examples` and `benchmarks` are a tier. Coverage, which doubles the time of Python, says what tests
    reach by themselves; draws of hypothesis run the same lines again and again."""
    for item in items:
        if any(item.path.is_relative_to(path) for path in _EXAMPLES):
            item.add_marker("examples")
        if any(item.path.is_relative_to(path) for path in _UNWATCHED) or item.get_closest_marker("hypothesis"):
            item.add_marker("no_cover")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def settings_of_the_process():
    """Programs of the examples set them for all that comes after."""
    n_threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    yield
    torch.set_num_threads(n_threads)
    logging.set_verbosity(verbosity)
