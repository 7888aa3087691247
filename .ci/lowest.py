"""Test the lowest versions that pyproject.toml allows, and record the outcome in `lowest.json` beside this file.

    python .ci/lowest.py

makes an environment with exactly the lower bounds of `dependencies` and of the extra `regression`, read from
pyproject.toml, and runs tests/test_essentials.py in it. The lowest torch on the package index is a build with CUDA for
most machines (some 7 GB installed): that is why no run of `.ci/run` does this. `--environment FOLDER` keeps the
environment, or uses it again.
"""

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from versions import ROOT, lowest, pins

ESSENTIALS = ["tests/test_essentials.py"]


def install(python: Path, folder: Path) -> None:
    """The lower bounds and this package, editable, with its extra `regression`."""
    constraints = folder / "lowest.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in lowest().items()), encoding="utf-8")
    print(constraints.read_text(encoding="utf-8"), flush=True)
    # The tools that run the tests are not what is tested: those of today.
    packages = ["--editable", f"{ROOT}[regression]", f"pytest=={pins()['pytest']}"]
    command = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(constraints), *packages]
    subprocess.run(command, check=True)


def main() -> None:
    """Install, test, record; see above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environment", type=Path, help="folder of the environment, made if it is not there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.environment or Path(temporary) / "venv").resolve()
        python = folder / "bin" / "python"
        if not python.exists():
            venv.create(folder, with_pip=True)
        install(python, folder)
        record = [str(python), str(Path(__file__).with_name("record.py")), "lowest", "--tests", *ESSENTIALS]
        sys.exit(subprocess.run(record, check=False).returncode)


if __name__ == "__main__":
    main()
