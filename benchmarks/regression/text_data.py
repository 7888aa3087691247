"""Labelled texts: files of the AG News kind, or docstrings of four installed packages, the package being the label."""

import ast
import csv
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

from examples.comparison.options import UserError

PACKAGES = ("numpy", "scipy", "sklearn", "torch")
#: Words that name a package would give the label away.
_NAMES = {*PACKAGES, "np", "scikit", "pytorch", "nn", "linalg", "ndarray"}
_DOCUMENTS, _WORDS, _LEAST = 1500, 60, 8
_WORD = re.compile(r"[a-z][a-z']+")


@dataclass(frozen=True)
class Texts:
    """Documents as lists of words, and their labels."""

    documents: list[list[str]]
    labels: list[str]


def words(text: str) -> list[str]:
    """Lower case, letters only."""
    return _WORD.findall(text.lower())


def read_csv(path: Path, most: int | None) -> Texts:
    """Lines of a label and one or more columns of text, as AG News has them; a first line 'label,...' is a header."""
    documents, labels = [], []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if number == 1 and row and row[0].strip().lower() in ("label", "class", "class index"):
                    continue
                if len(row) < 2:
                    raise UserError(f"Line {number} of '{path}' must hold a label and a text, got {len(row)} columns.")
                labels.append(row[0].strip())
                documents.append(words(" ".join(row[1:]).replace("\\", " ")))
                if len(labels) == most:
                    break
    except OSError as error:
        raise UserError(f"The file '{path}' cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"The file '{path}' is no CSV file in UTF-8: {error}.") from error
    if len(set(labels)) < 2:
        raise UserError(f"The file '{path}' must hold at least two labels, got {sorted(set(labels))}.")
    return Texts(documents, labels)


def docstrings(documents: int = _DOCUMENTS) -> tuple[Texts, Texts]:
    """Training and test texts, split by source file; equally many of each package, each text once."""
    train, test = Texts([], []), Texts([], [])
    for package in PACKAGES:
        for path, text in _of_package(package, documents):
            part = test if crc32(path.encode()) % 5 == 0 else train
            part.documents.append(text)
            part.labels.append(package)
    return _mixed(train), test


def _mixed(texts: Texts) -> Texts:
    """In an order that a part of the texts can be taken from."""
    order = sorted(range(len(texts.labels)), key=lambda index: crc32(" ".join(texts.documents[index]).encode()))
    return Texts([texts.documents[index] for index in order], [texts.labels[index] for index in order])


def _of_package(package: str, documents: int) -> Iterator[tuple[str, list[str]]]:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"The offline texts need {package}; install it, or give --train and --test.")
    root = Path(spec.origin).parent
    seen: set[tuple[str, ...]] = set()
    # In an order that takes from everywhere, the same on every machine.
    files = sorted((path.relative_to(root).as_posix() for path in root.rglob("*.py")), key=lambda p: crc32(p.encode()))
    for path in files:
        if "test" in path:
            continue
        for text in _docstrings_of(root / path):
            document = [word for word in words(text) if word not in _NAMES][:_WORDS]
            if len(document) >= _LEAST and tuple(document) not in seen:
                seen.add(tuple(document))
                yield path, document
                if len(seen) == documents:
                    return


def _docstrings_of(path: Path) -> Sequence[str]:
    try:
        with tokenize.open(path) as source:
            tree = ast.parse(source.read())
    except (SyntaxError, UnicodeDecodeError):
        return []  # templates of code are no code
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]
