"""The versions that pyproject.toml names: read in one place for everything that installs or checks them.

`python .ci/versions.py test` compares what is installed here with the tested set of the extra `test`.
"""

import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = ROOT / "pyproject.toml"
# `name`, `name==1.2`, `name>=1.2,<2`; this project's own extras, `lreg_peft[test]`, are left out.
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)(?P<bounds>[^\[\]]*)")


def _requirements(lines: Iterable[str]) -> dict[str, str]:
    """Name -> bounds."""
    return {match["name"]: match["bounds"].strip() for line in lines if (match := _REQUIREMENT.fullmatch(line))}


def ranges() -> dict[str, str]:
    """What a user may install: the library's dependencies and those of its extra `regression`, with their bounds."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    return _requirements([*project["dependencies"], *project["optional-dependencies"]["regression"]])


def pins(*extras: str) -> dict[str, str]:
    """The tested set: what these extras, and those they include, name with `==`; by default all extras."""
    table = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    found = {}
    for extra in extras or table:
        for line in table[extra]:
            if included := re.fullmatch(r"lreg_peft\[(.+)\]", line):
                found.update(pins(*included[1].split(",")))
        bounds = _requirements(table[extra])
        found.update({name: bound[2:] for name, bound in bounds.items() if bound.startswith("==")})
    return found


def lowest() -> dict[str, str]:
    """The lowest version of each dependency that the ranges allow."""
    found = {}
    for name, bounds in ranges().items():
        match = re.search(r">=\s*([\w.]+)", bounds)
        if match is None:
            raise SystemExit(f"{PYPROJECT.name} gives no lower bound for {name}, so that none can be tested. Add one.")
        found[name] = match[1]
    return found


def torch_of_the_readme() -> str:
    """The requirement, `torch==...`, that the README's commands install first."""
    match = re.search(r"pip install (torch==\S+) &&", (ROOT / "README.md").read_text(encoding="utf-8"))
    if match is None:
        raise SystemExit("README.md has no command `pip install torch==... && ...`.")
    return match[1]


def differences(*extras: str) -> list[str]:
    """What is installed here and is not what the README and these extras name, one line each."""
    wanted = {**pins(*extras), "torch": torch_of_the_readme().partition("==")[2]}
    found = []
    for name, pinned in sorted(wanted.items()):
        try:
            installed = version(name).partition("+")[0]  # 2.13.0+cpu is a build of 2.13.0
        except PackageNotFoundError:
            installed = "nothing"
        if installed != pinned:
            found.append(f"{name}: {pinned} is the tested version, installed is {installed}")
    return found


if __name__ == "__main__":
    lines = differences(*sys.argv[1:])
    print("\n".join(lines) or f"all {len(pins(*sys.argv[1:])) + 1} versions are the tested ones")
    sys.exit(bool(lines))
