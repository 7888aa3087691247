"""The source files of the standard library, as real text that every CPython carries; nothing is imported."""

import ast
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

# Test suites are not prose; the others are split off by some distributions, and the text should not depend on that.
EXCLUDED_PACKAGES = {
    *("dist-packages", "distutils", "ensurepip", "idlelib", "lib2to3"),
    *("pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo"),
}
EXCLUDED_MODULES = {"turtle.py"}


def standard_library_trees() -> Iterator[tuple[Path, ast.Module]]:
    """Every module's path inside the library and its syntax tree, in the order of the paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if relative.name in EXCLUDED_MODULES or EXCLUDED_PACKAGES.intersection(relative.parts):
            continue
        try:
            with tokenize.open(path) as source:
                tree = ast.parse(source.read())
        except (SyntaxError, UnicodeDecodeError):
            # A distribution may place files of its own there; one unreadable file costs only its own text.
            continue
        yield relative, tree
