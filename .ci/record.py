"""Run the essential tests with the Python and the packages at hand, and record the outcome in a file beside this one.

    python .ci/record.py NAME [--tests TEST ...]

writes `NAME.json`. `lowest.py` and `newest` use it, in environments that they make, and so does a matrix of Pythons.
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from versions import ROOT, ranges

ESSENTIALS = ["tests/test_essentials.py", "tests/tuner/test_model.py"]


def main() -> None:
    """Test, record; see above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the record")
    parser.add_argument("--tests", nargs="+", default=ESSENTIALS, help="other tests than the essential ones")
    options = parser.parse_args()
    # Warnings of other versions about themselves are not ours: they are shown, and do not fail.
    tests = [sys.executable, "-m", "pytest", "-q", "-W", "default", *options.tests]
    passed = subprocess.run(tests, cwd=ROOT, check=False).returncode == 0
    record = {
        "outcome": "passed" if passed else "failed",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ranges()},
        "tests": options.tests,
    }
    text = json.dumps(record, indent=2)
    Path(__file__).with_name(f"{options.name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
