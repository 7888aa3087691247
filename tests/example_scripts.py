"""Running the example scripts in tests as a user types them."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


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


def module(example: str, name: str) -> ModuleType:
    """A module of an example, or `comparison.` and one that both comparisons share."""
    return importlib.import_module(f"examples.{name}" if "." in name else f"examples.{example}.{name}")
