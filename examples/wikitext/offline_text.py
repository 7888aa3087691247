"""Real English that every CPython carries: two domains, with no download.

* base domain: the docstrings of the standard library, read from its source files with `ast` (nothing is imported);
* target domain: the language reference in `pydoc_data.topics`, one document per topic.

Pages of the language reference quote each other (`specialnames` repeats `customization` and a dozen more), so a split
by topic alone would put held-out sentences into the training text. Every paragraph is therefore kept once only, in the
shortest document that has it, and leaves the base domain if the target domain has it too.

The text belongs to the Python version that runs: figures are comparable between runs on the same version.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from examples.comparison.options import UserError
from examples.comparison.standard_library import standard_library_trees

# Shorter paragraphs ("Example:", "See also") recur by nature and give nothing away.
MIN_DUPLICATE_CHARS = 40
# Topics sorted by length are dealt in rounds of this many, so every split gets long and short documents.
DEAL = ("train", "train", "test", "train", "train", "tuning", "train", "train")


@dataclass(frozen=True)
class OfflineText:
    """Documents of the two domains; the three target splits share no topic and no paragraph."""

    base: list[str]
    train: list[str]
    tuning: list[str]
    test: list[str]


@cache
def load_offline_text(max_base_chars: int | None = None) -> OfflineText:
    """Read both domains from the running Python.

    Args:
        max_base_chars: stop reading docstrings after this many characters; None reads all of them.
    """
    seen: set[str] = set()
    topics = reference_topics()
    # Shortest first: a page that quotes whole other pages then keeps only what is its own.
    ordered = sorted(topics, key=lambda name: (len(topics[name]), name))
    unique = {name: drop_seen_paragraphs(topics[name], seen) for name in ordered}

    splits: dict[str, list[str]] = {"train": [], "tuning": [], "test": []}
    for rank, name in enumerate(sorted(unique, key=lambda name: (-len(unique[name]), name))):
        if unique[name]:
            splits[DEAL[rank % len(DEAL)]].append(unique[name])

    base: list[str] = []
    n_chars = 0
    for document in standard_library_docstrings():
        document = drop_seen_paragraphs(document, seen)
        if document:
            base.append(document)
            n_chars += len(document)
        if max_base_chars is not None and n_chars >= max_base_chars:
            break
    if not base:
        raise UserError(
            "This Python carries no standard library source files to read docstrings from; "
            "give your own text with --train_file and --validation_file, and a model with --model_name_or_path."
        )
    return OfflineText(base=base, **splits)


def reference_topics() -> dict[str, str]:
    """The language reference by topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(
            f"This Python does not carry pydoc_data.topics ({error}); "
            "give your own text with --train_file and --validation_file."
        ) from error
    return dict(topics)


def standard_library_docstrings() -> Iterator[str]:
    """One document per standard library module: its docstrings in source order."""
    for _, tree in standard_library_trees():
        docstrings = list(docstrings_in(tree))
        if docstrings:
            yield "\n\n".join(docstrings) + "\n"


def docstrings_in(tree: ast.Module) -> Iterator[str]:
    """Docstrings of a module, its classes and its functions, in source order."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
        pending.extend(reversed(list(ast.iter_child_nodes(node))))


def drop_seen_paragraphs(text: str, seen: set[str]) -> str:
    """Remove paragraphs already in `seen` (compared without regard to white space); add the others to it."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        key = paragraph_key(paragraph)
        if len(key) >= MIN_DUPLICATE_CHARS:
            if key in seen:
                continue
            seen.add(key)
        kept.append(paragraph)
    joined = "\n\n".join(kept)
    return joined if joined.strip() else ""


def paragraph_key(paragraph: str) -> str:
    """What makes two paragraphs the same: their words."""
    return " ".join(paragraph.split())
