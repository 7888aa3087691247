"""The README as a package index shows it; everything else is in pyproject.toml.

Away from the repository relative links and pictures lead nowhere. They get the address that [project.urls] names.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent


def readme() -> str:
    """With absolute addresses, as GitHub and those like it have them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project["urls"]["Repository"].rstrip("/")

    def absolute(link: re.Match[str]) -> str:
        return f"{link['before']}{repository}/{'raw' if link['picture'] else 'blob'}/main/{link['path']}"

    link = r"(?P<before>(?P<picture>!?)\[[^\]]*\]\()(?P<path>(?!\w+:|#)[^\s)]+)"
    return re.sub(link, absolute, (ROOT / "README.md").read_text(encoding="utf-8"))


setup(long_description=readme(), long_description_content_type="text/markdown")
