"""Running the example scripts in tests: as a user types them, or as modules in this process."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
Modules = Callable[[str], ModuleType]


def launch(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A command as a user types it, with the checkout importable."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def launch_two(kind: str, script: Path, options: list[str]) -> subprocess.CompletedProcess[str]:
    """A script on two CPU processes: "replicated" parameters, or "sharded" by the FSDP config file of the examples."""
    sharding = [str(ROOT / "tests" / "sharded_run.py"), str(EXAMPLES / "wikitext" / "configs" / "accelerate_fsdp.yaml")]
    # Not on the GPUs of a machine that has them: they may be fewer than two.
    environment = {"replicated": {"ACCELERATE_USE_CPU": "true"}, "sharded": {"CUDA_VISIBLE_DEVICES": ""}}[kind]
    return launch(
        [
            *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *(sharding if kind == "sharded" else []),
            *(str(script), *options),
        ],
        **environment,
    )


@contextmanager
def example_modules(name: str) -> Iterator[Modules]:
    """Import modules of one example by their plain names; forget all of them and their side effects afterwards."""
    # Two folders have modules of one name: what another test has imported of them must not stand in the way.
    for module in [m for m in sys.modules if m.partition(".")[0] != "comparison"]:
        if str(getattr(sys.modules[module], "__file__", None)).startswith(str(EXAMPLES)):
            del sys.modules[module]
    before, path, n_threads = set(sys.modules), list(sys.path), torch.get_num_threads()
    verbosity = logging.get_verbosity()
    sys.path[:0] = [str(EXAMPLES / name), str(EXAMPLES)]
    yield importlib.import_module
    sys.path[:] = path
    for module in set(sys.modules) - before:
        if str(getattr(sys.modules[module], "__file__", None)).startswith(str(EXAMPLES)):
            del sys.modules[module]
    torch.set_num_threads(n_threads)
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
