"""What mkdocs does for this site beside turning Markdown into pages.

* The front page is README.md. READMEs of examples and benchmarks, CONTRIBUTING.md and CHANGELOG.md are pages, too,
  below `repository/` and in the order of the repository, with their pictures.
* Links between all of these lead to pages of the site. A link to a file that is no page, such as a program, becomes its
  name, or a link into the repository where mkdocs.yml has a `repo_url`.
* The reference is made from the `__all__` of the package and its two public subpackages, the table of options from
  `LRegConfig`.
* Every tutorial can be had as a notebook.
* Formulas between dollar signs become MathML, which browsers draw without scripts.
"""

import ast
import os
import re
import sys
from pathlib import Path

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
from notebooks import notebook

ROOT = Path(__file__).parents[2]
MIRROR = "repository"
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)\s]+)\)")
FENCE = re.compile(r"^( *)```.*?^\1```[^\n]*\n?", flags=re.DOTALL | re.MULTILINE)

#: Folder of the package -> the page of the reference that its public names are on.
ROOMS = {
    "tuner": ("adapters", "Configuration and adapters"),
    "training": ("training", "Starting and training"),
    "fitting": ("fitting", "Fits and caches"),
    "export": ("deployment", "Deployment"),
    "plotting": ("plotting", "Pictures"),
    "core": ("core", "Numerical core"),
    "regression": ("regression", "Regression"),
}


# --- pages that come from elsewhere in the repository ----------------------------------------------------------------


def mirrored() -> list[str]:
    """Paths, relative to the repository, of the Markdown outside docs/ that is part of the site."""
    found = [
        *(ROOT / "examples").rglob("README.md"),
        *(ROOT / "benchmarks").rglob("README.md"),
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
    ]
    return sorted(path.relative_to(ROOT).as_posix() for path in found if path.is_file())


def place(path: str) -> str | None:
    """Where a file of the repository is in the site; None if it is not."""
    if path in ("README.md", "docs/README.md"):
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in mirrored() or path.endswith((".png", ".svg")):
        return f"{MIRROR}/{path}"
    return None


def origin(page: str) -> str:
    """The file of the repository that a page of the site is made of."""
    if page == "index.md":
        return "README.md"
    return page.removeprefix(f"{MIRROR}/") if page.startswith(f"{MIRROR}/") else f"docs/{page}"


def outside_fences(text: str, change) -> str:
    """`change` applied to everything but fenced code."""
    parts, end = [], 0
    for fence in FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(text[end:])])


def relink(text: str, page: str, repo_url: str | None) -> str:
    """The links of a page as they must be in the site."""
    here = Path(origin(page)).parent

    def one(match: re.Match) -> str:
        bang, label, link = match.groups()
        target, _, anchor = link.partition("#")
        path = os.path.normpath(here / target)
        if (ROOT / path).is_dir():
            path = os.path.normpath(Path(path) / "README.md")
        if target.endswith(".ipynb") or (uri := place(path)) is None:
            if target.endswith(".ipynb"):
                return match[0]
            if repo_url:
                return f"[{label}]({repo_url.rstrip('/')}/blob/main/{path})"
            return f"{label} (`{path}`)" if Path(path).name not in label else f"`{path}`"
        relative = os.path.relpath(uri, Path(page).parent)
        return f"{bang}[{label}]({relative}{'#' + anchor if anchor else ''})"

    return outside_fences(text, lambda part: LINK.sub(one, part))


# --- the reference ---------------------------------------------------------------------------------------------------


def public_names(package: str) -> dict[str, str]:
    """The names in `__all__` of a package, each with the module that it comes from; read, not imported."""
    tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text(encoding="utf-8"))
    places, names = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            module = f"{package}.{node.module}" if node.module else package
            places.update({alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names})
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            names = ast.literal_eval(node.value)
    return {name: places.get(name, f"{package}.{name}") for name in names if not name.startswith("__")}


def options_table() -> str:
    """The fields of `LRegConfig` with their defaults and what they mean; read, not imported."""
    tree = ast.parse((ROOT / "lreg_peft" / "tuner" / "config.py").read_text(encoding="utf-8"))
    config = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "LRegConfig")
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for field in config.body:
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.value, ast.Call)):
            continue
        default, text = (ast.unparse(argument) for argument in field.value.args[:2])
        kind = ast.unparse(field.annotation).replace(" | ", " or ")
        text = ast.literal_eval(text).replace("|", "\\|").replace("\n", " ")
        rows.append(f"| `{field.target.id}` | `{default}` | `{kind}`. {text} |")
    return "\n".join(rows)


def reference_pages() -> dict[str, str]:
    """Page -> Markdown, in the order of `ROOMS`."""
    entries: dict[str, list[str]] = {}
    for package in ("lreg_peft", "lreg_peft.core", "lreg_peft.regression"):
        for name, full in public_names(package).items():
            room = full.split(".")[1]
            line = f"::: {full}\n    options:\n      heading_level: 2\n"
            if name == "LRegConfig":
                # The table says what a signature of thirty fields would.
                line += "      show_signature: false\n      members: false\n"
                line += f"\n### Options of `LRegConfig`\n\n{options_table()}\n"
            if line not in entries.setdefault(room, []):
                entries[room].append(line)
    pages = {}
    for room in [*ROOMS, *(room for room in entries if room not in ROOMS)]:
        if room in entries:
            name, title = ROOMS.get(room, (room, room.capitalize()))
            pages[f"reference/{name}.md"] = f"# {title}\n\n" + "\n".join(entries[room])
    return pages


# --- what mkdocs calls -----------------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Pages that are made are entered into the navigation."""
    sections = {next(iter(entry)): next(iter(entry.values())) for entry in config.nav}
    sections["Reference"][:0] = list(reference_pages())
    # Programs and records have pages of their own; the rest of the list is about the project.
    about = [path for path in mirrored() if "/" not in path]
    sections["Research"].append({"Programs and records": [f"{MIRROR}/{p}" for p in mirrored() if p not in about]})
    config.nav.append({"Project": [f"{MIRROR}/{path}" for path in about]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside docs/ and what is made."""

    def add(uri: str, **what) -> None:
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, **what))

    for path in ["README.md", *mirrored()]:
        text = (ROOT / path).read_text(encoding="utf-8")
        add(place(path), content=text)
    for page in [file for file in files if file.is_documentation_page()]:
        source = Path(origin(page.src_uri))
        for _, _, link in LINK.findall(page.content_string):
            picture = os.path.normpath(source.parent / link)
            if picture.endswith((".png", ".svg")) and not picture.startswith("docs/") and (ROOT / picture).is_file():
                add(f"{MIRROR}/{picture}", abs_src_path=str(ROOT / picture))
        if page.src_uri.startswith("tutorials/"):
            add(page.src_uri.replace(".md", ".ipynb"), content=notebook(page.content_string))
    for uri, text in reference_pages().items():
        add(uri, content=text)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links, formulas, and the notebook of a tutorial."""
    uri = page.file.src_uri
    if uri.startswith("tutorials/"):
        line = f"[This page as a notebook]({Path(uri).with_suffix('.ipynb').name}){{ download }}\n\n"
        markdown = re.sub(r"^(# [^\n]*\n\n)", rf"\1{line}", markdown, count=1)
    markdown = relink(markdown, uri, config.repo_url)
    return outside_fences(
        markdown,
        lambda part: re.sub(
            r"\$\$(.*?)\$\$",
            lambda match: latex2mathml.converter.convert(match[1].strip(), display="block"),
            part,
            flags=re.DOTALL,
        ),
    )
