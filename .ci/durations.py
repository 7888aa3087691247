"""How long the tests take: every tier, and every file in it, in `durations.json` beside this file.

    python .ci/durations.py

runs the default suite and the other two tiers on two processes, prints what changed since the record, and writes that
anew. The suite is to stay below five minutes on two quiet cores. Seconds of CPU hardly depend on what else the machine
does; those of forked processes are not among them.
"""

import argparse
import datetime
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from versions import ROOT

RECORD = Path(__file__).with_name("durations.json")
TIERS = {"default": [], "slow": ["-m", "slow and not examples"], "examples": ["-m", "examples"]}
_WORTH_A_LINE = 2.0  # seconds


def measured(options: list[str], processes: int) -> dict[str, Any]:
    """Run a tier: its tests, seconds by the clock and of CPU, and seconds of each file."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(processes), "-o", "junit_family=xunit1"]
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([*command, f"--junitxml={report}", *options], cwd=ROOT, check=False)
        seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode != 0:
            raise SystemExit("Tests fail: the record stays as it is.")
        cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    files = Counter()
    for case in cases:
        files[case.attrib["file"]] += float(case.attrib["time"])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    longest_first = {name: round(spent, 1) for name, spent in files.most_common()}
    return {"tests": len(cases), "seconds": round(seconds), "cpu_seconds": round(cpu), "files": longest_first}


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What a tier took before and takes now, and its files that differ by more than a third."""
    lines = [f"{new['tests']} tests in {new['seconds']} s, {new['cpu_seconds']} s of CPU"]
    if old:
        lines[0] += f" (recorded: {old['tests']} in {old['seconds']} s, {old['cpu_seconds']} s of CPU)"
    for name in {**new["files"], **old.get("files", {})} if old else ():
        before, after = (tier["files"].get(name, 0.0) for tier in (old, new))
        if abs(after - before) > max(_WORTH_A_LINE, before / 3):
            lines.append(f"{name}: {after} s (recorded: {before} s)")
    return lines


def main() -> None:
    """Run, compare, record; see above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="of pytest-xdist")
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=list(TIERS), help="the others stay as recorded")
    options = parser.parse_args()
    recorded = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    tiers = dict(recorded.get("tiers", {}))
    for name in options.tiers:
        new = measured(TIERS[name], options.processes)
        print("\n  ".join([f"{name}:", *changes(tiers.get(name, {}), new)]), flush=True)
        new["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
        tiers[name] = new
    machine = {"python": platform.python_version(), "machine": platform.machine(), "processes": options.processes}
    RECORD.write_text(json.dumps({**machine, "tiers": tiers}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
