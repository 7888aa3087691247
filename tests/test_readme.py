"""What the README shows is what happens."""

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def block(marker: str) -> str:
    """The fenced block after `<!-- marker -->`."""
    match = re.search(rf"<!-- {marker} -->\n```\w+\n(.*?)```", README, flags=re.DOTALL)
    assert match is not None, marker
    return match[1]


def test_quick_start_prints_what_the_readme_says(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", block("quick-start")], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == block("quick-start-output").split()
    size = (tmp_path / "my-adapter" / "adapter_model.safetensors").stat().st_size
    assert round(size / 1e6, 1) == 0.8


def test_files_that_the_readme_names_exist():
    root = Path(__file__).parents[1]
    named = re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"examples/\w+/[\w.]+", README)
    assert named
    missing = [path for path in named if not (root / path).exists()]
    assert not missing
