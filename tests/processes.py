"""Running a test file as a script on two processes."""

import os
import subprocess
import sys
from pathlib import Path


def run_on_two(script: str, folder: Path) -> None:
    """Start `script FOLDER` twice, connected by gloo, and wait for both; what they print shows if they fail.

    `accelerate launch --cpu --num_processes 2` would start one process where there is no MPI.
    """
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *(script, str(folder)),
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
