"""Test the lowest versions that pyproject.toml allows, and record the outcome in `lowest.json` beside this file.

    python .ci/lowest.py

makes an environment with exactly the lower bounds of `dependencies` and of the extra `regression`, read from
pyproject.toml, and runs tests/test_essentials.py in it. The lowest torch on the package index is a build with CUDA for
most machines (some 7 GB installed): that is why no run of `.ci/run` does this. `--environment FOLDER` keeps the
environment, or uses it again; `--tests` names other tests (nothing is recorded then).
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from versions import ROOT, lowest, pins

RECORD = Path(__file__).with_name("lowest.json")
ESSENTIALS = ["tests/test_essentials.py"]
# Prints the versions that are really there, `2.9.0+cu128` for `2.9.0`.
_VERSIONS = """
import importlib.metadata, json, sys
print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))
"""


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
    parser.add_argument("--tests", nargs="+", help="other tests than the recorded ones")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.environment or Path(temporary) / "venv").resolve()
        python = folder / "bin" / "python"
        if not python.exists():
            venv.create(folder, with_pip=True)
        install(python, folder)
        found = subprocess.run([str(python), "-c", _VERSIONS, *lowest()], check=True, capture_output=True, text=True)
        # Warnings of old versions about themselves are not ours: they are shown, and do not fail.
        tests = [str(python), "-m", "pytest", "-W", "default", *(options.tests or ESSENTIALS)]
        passed = subprocess.run(tests, cwd=ROOT, check=False).returncode == 0
    record = {
        "outcome": "passed" if passed else "failed",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": json.loads(found.stdout),
        "tests": ESSENTIALS,
    }
    if not options.tests:
        RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))
    sys.exit(not passed)


if __name__ == "__main__":
    main()
