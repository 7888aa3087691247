"""Imports point one way. Reads the import statements, wherever in a file they stand."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lreg_peft

PACKAGE = Path(lreg_peft.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
# From the bottom to the top; what stands in one line does not import its neighbours.
ORDER = [
    ["_version", "tuner.registration", "labels", "modules"],
    ["tuner.model_card", "tuner.hooks.registry"],
    ["core.mesh", "core.solve.problem"],
    [
        "core.basis",
        "core.coordinates",
        "core.adapt",
        "core.solve.subspace",
        "core.fused_loss",
        "core.distributed",
        "core.deferred",
    ],
    ["core.free_knots", "core.product", "core.solve.cross_entropy", "core.solve.least_squares"],
    ["tuner.config", "tuner.penalty", "tuner.statistics"],
    ["tuner.layer"],
    ["tuner.targets", "tuner.hooks.backbone", "tuner.hooks.reminder", "training.tracking"],
    ["tuner.hooks.native_transformer"],
    ["tuner.hooks.output_head"],
    ["tuner.hooks.head_loss"],
    ["training.initialization", "fitting.output_shortcut"],
    ["training.mesh_update", "plotting", "tuner.grades", "fitting.linearize"],
    ["fitting.cached_forward", "fitting.coefficients"],
    ["tuner.model", "training.callback", "fitting.feature_cache", "fitting.meshes"],
]


def imports(path: Path) -> set[str]:
    """Absolute names of what a file imports: `torch.nn`, `lreg_peft.core.mesh`, ..."""
    package = ("lreg_peft", *path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*start, *([node.module] if node.module else [])])
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def own_imports(path: Path) -> set[str]:
    """The modules of this package that a file imports; `core` means what `core/__init__.py` hands on."""
    own = {name.removeprefix("lreg_peft.") for name in imports(path) if name.startswith("lreg_peft.")}
    found = set()
    for name in own:
        if name in MODULES:  # from . import penalty
            found.add(name)
        elif name.rpartition(".")[0] in MODULES:  # from .penalty import watch
            found.add(name.rpartition(".")[0])
        elif name.split(".")[0] == "core":  # from .core import evaluate
            found.update(module for module in MODULES if module.startswith("core.") and module in HANDED_ON)
    return found


HANDED_ON = {f"core.{name.split('.')[2]}" for name in imports(PACKAGE / "core" / "__init__.py")}
GRAPH = {name: own_imports(path) for name, path in MODULES.items()}


def test_the_reader_sees_what_is_there():
    assert "core.basis" in GRAPH["tuner.layer"]
    assert "tuner.config" in GRAPH["tuner.layer"]
    assert {"tuner.hooks.backbone", "tuner.hooks.output_head", "tuner.targets"} <= GRAPH["tuner.model"]
    assert GRAPH["tuner.registration"] >= {"tuner.model_card"}  # inside a function
    assert "core.mesh" in GRAPH["core.basis"]


def test_no_module_imports_itself_by_a_detour():
    list(TopologicalSorter({name: found - {name} for name, found in GRAPH.items()}).static_order())


def test_imports_point_down():
    level = {name: i for i, names in enumerate(ORDER) for name in names}
    assert level.keys() == GRAPH.keys()
    late = {("tuner.registration", "tuner.model_card")}  # inside a function, when both are there
    upward = [
        f"{name} imports {other}"
        for name, found in GRAPH.items()
        for other in found
        if name in level and other in level and level[other] >= level[name] and (name, other) not in late
    ]
    assert not upward


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("core.")])
def test_core_knows_torch_and_nothing_above(name):
    roots = {item.split(".")[0] for item in imports(MODULES[name])}
    assert roots <= {"torch", "lreg_peft", *sys.stdlib_module_names}
    assert all(other.startswith("core.") for other in GRAPH[name])


def test_mathematics_does_not_import_peft_or_transformers():
    for name in ("tuner.penalty", "_version"):
        assert not {"peft", "transformers"} & {item.split(".")[0] for item in imports(MODULES[name])}, name


def test_one_file_touches_the_tables_of_peft():
    words = ("PEFT_TYPE_TO_", "register_peft_method", "_member_map_", "setattr(PeftModel")
    touching = {name for name, path in MODULES.items() if any(word in path.read_text("utf-8") for word in words)}
    assert touching == {"tuner.registration"}


def test_registration_imports_nothing_but_the_standard_library_to_begin_with():
    """So that its enum code runs on any interpreter."""
    tree = ast.parse(MODULES["tuner.registration"].read_text("utf-8"))
    names = [
        alias.name if isinstance(node, ast.Import) else node.module
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    ]
    assert {str(name).split(".")[0] for name in names} <= sys.stdlib_module_names
