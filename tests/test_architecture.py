"""Imports point one way (import-linter, contracts in pyproject.toml), and each private table of PEFT has one door."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lreg_peft

PACKAGE = Path(lreg_peft.__file__).parent
FOLDERS = [PACKAGE, *sorted(path for path in PACKAGE.rglob("*") if (path / "__init__.py").is_file())]


def test_imports_point_down_and_never_in_circles():
    # In a process of its own: import-linter configures logging, and that silences every logger that exists.
    command = "import sys; from importlinter.cli import lint_imports as lint; exit(lint(sys.argv[1], no_cache=True))"
    arguments = [sys.executable, "-c", command, str(PACKAGE.parent / "pyproject.toml")]
    done = subprocess.run(arguments, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_every_folder_says_what_lives_there(folder):
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8")))
    assert text and len(text.splitlines()) >= 1


def test_one_file_touches_the_tables_of_peft():
    words = ("PEFT_TYPE_TO_", "register_peft_method", "_member_map_", "setattr(PeftModel")
    touching = [path.name for path in PACKAGE.rglob("*.py") if any(word in path.read_text("utf-8") for word in words)]
    assert touching == ["registration.py"]


def test_registration_imports_nothing_but_the_standard_library_to_begin_with():
    """So that its enum code runs on any interpreter."""
    tree = ast.parse((PACKAGE / "tuner" / "registration.py").read_text("utf-8"))
    names = [
        alias.name if isinstance(node, ast.Import) else node.module
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    ]
    assert {str(name).split(".")[0] for name in names} <= sys.stdlib_module_names
