"""How long the tests take: every tier, and every file in it, in `durations.json` beside this file.

    python .ci/durations.py

runs the default suite and the other two tiers on two processes, prints what changed since the record, and writes that
anew. The suite is to stay below five minutes on two quiet cores. Files are recorded by seconds of CPU, which depend
less on what else the machine does; what tests fork is not among them.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent
RECORD = FOLDER / "durations.json"
TIERS = {"default": [], "slow": ["-m", "slow and not examples"], "examples": ["-m", "examples"]}
_LINES = "LREG_TEST_DURATIONS"  # the file that tests append to, in the environment of pytest
_WORTH_A_LINE = 2.0  # seconds


def spent(who: int = resource.RUSAGE_CHILDREN) -> float:
    """Seconds of CPU that child processes, or this one, have used so far."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Append a line for a test, with its fixtures: this file is a plugin of pytest, too."""
    before = spent() + spent(resource.RUSAGE_SELF)
    outcome = yield
    line = json.dumps([item.nodeid.partition("::")[0], spent() + spent(resource.RUSAGE_SELF) - before])
    with open(os.environ[_LINES], "a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    return outcome


def measured(options: list[str], processes: int) -> dict[str, Any]:
    """Run a tier: its tests, seconds by the clock, and seconds of CPU of the tests of each file."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines"
        path = os.pathsep.join(filter(None, (str(FOLDER), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(processes), "-p", "durations", *options]
        load, began = os.getloadavg()[0], time.monotonic()
        environment = {**os.environ, "PYTHONPATH": path, _LINES: str(lines)}
        if subprocess.run(command, cwd=FOLDER.parent, env=environment, check=False).returncode != 0:
            raise SystemExit("Tests fail: the record stays as it is.")
        seconds = time.monotonic() - began
        tests = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    files = Counter()
    for name, used in tests:
        files[name] += used
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "tests": len(tests),
        "processes": processes,
        "seconds": round(seconds),
        "load_before": round(load, 1),
        "cpu_seconds": round(files.total()),
        "files": {name: round(used, 1) for name, used in files.most_common()},
    }


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What a tier took before and takes now, and its files that differ by more than a third."""
    found = [
        f"{tier['tests']} tests, {tier['seconds']} s on {tier['processes']} processes beside a load of "
        f"{tier['load_before']}, {tier['cpu_seconds']} s of CPU"
        for tier in (new, old)
        if tier
    ]
    found[1:] = [f"recorded: {line}" for line in found[1:]]
    for name in {**new["files"], **old["files"]} if old else ():
        before, after = (tier["files"].get(name, 0.0) for tier in (old, new))
        if abs(after - before) > max(_WORTH_A_LINE, before / 3):
            found.append(f"{name}: {after} s of CPU (recorded: {before} s)")
    return found


def main() -> None:
    """Run, compare, record; see above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="of pytest-xdist")
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=list(TIERS), help="the others stay as recorded")
    options = parser.parse_args()
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    for name in options.tiers:
        new = measured(TIERS[name], options.processes)
        print("\n  ".join([f"{name}:", *changes(record.get(name, {}), new)]), flush=True)
        record[name] = new
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
