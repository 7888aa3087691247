"""A sentence-pair task from real English that every CPython carries, with no download.

The first text is the signature of a function of the standard library, the second the first paragraph of a docstring:
of that function, or of one in another module? As in QNLI and MRPC, one has to see what two short texts have to do with
each other. Half of the pairs belong together; every report states what the words they share give alone
(`overlap_accuracy`), which is much, but not all. Some labels are a matter of luck: other functions are called `close`.

Modules (with all of a package as one module) are divided among training, tuning and held-out test, and a description
that occurs twice is kept once: no function of a test pair has been seen in training.

The text belongs to the Python version that runs: figures are comparable between runs on the same version.
"""

import ast
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache

from examples.comparison.options import UserError
from examples.comparison.standard_library import standard_library_trees
from examples.glue.samples import Samples
from examples.glue.tasks import Task, TsvColumns

OFFLINE_TASK = Task(
    *("docstrings", "Docstrings", ""),
    ("signature", "description"),
    ("of another function", "of this function"),
    ("accuracy",),
    TsvColumns(("signature", "description"), "label"),
    (("held-out", ""),),
)
SEED = 0  # of the pairs; they are part of the task and do not depend on --seeds

WORDS = range(4, 31)  # shorter descriptions say nothing, longer ones are mostly lists of parameters
# Modules sorted by size are dealt in rounds of this many, so every split gets large and small ones.
DEAL = ("train", "train", "test", "train", "train", "tuning", "train", "test")
PAIRS = {"train": 3000, "tuning": 400, "test": 1000}
Function = tuple[str, str]  # signature, description


def load_offline_pairs() -> dict[str, Samples]:
    """The samples of the three splits, "train", "tuning" and "test"; the same on every call."""
    modules = functions_by_module()
    splits: dict[str, dict[str, list[Function]]] = {name: {} for name in PAIRS}
    for rank, name in enumerate(sorted(modules, key=lambda name: (-len(modules[name]), name))):
        splits[DEAL[rank % len(DEAL)]][name] = modules[name]
    if any(len(split) < 2 for split in splits.values()):
        raise UserError(
            "This Python carries no standard library source files to read docstrings from; "
            "name a GLUE task with --task, and its files with --data_dir."
        )
    return {name: make_pairs(splits[name], n_pairs, f"{SEED} {name}") for name, n_pairs in PAIRS.items()}


@cache
def functions_by_module() -> dict[str, list[Function]]:
    """Signatures and descriptions by top-level module, each description once."""
    modules: dict[str, list[Function]] = defaultdict(list)
    seen: set[str] = set()
    for path, tree in standard_library_trees():
        name = path.parts[0].removesuffix(".py").lstrip("_")  # `_pydatetime` and `datetime` are one
        for signature, description in functions_in(tree):
            if len(description.split()) in WORDS and description.lower() not in seen:
                seen.add(description.lower())
                modules[name].append((signature, description))
    return dict(modules)


def functions_in(tree: ast.Module) -> Iterator[Function]:
    """Documented functions and methods of a module; special methods all have the same few names and are left out."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("__"):
            continue
        docstring = ast.get_docstring(node)
        if docstring:
            arguments = ", ".join(item.arg for item in node.args.args if item.arg not in ("self", "cls"))
            paragraph, *_ = re.split(r"\n\s*\n", docstring.strip())
            yield f"def {node.name}({arguments})", " ".join(paragraph.split())


def make_pairs(modules: Mapping[str, Sequence[Function]], n_pairs: int, seed: str) -> Samples:
    """Half of the pairs of one function, half of functions of two modules, in random order.

    A module is drawn with the square root of its size: large packages would otherwise make most of the pairs.
    """
    draw = random.Random(seed)
    names = sorted(modules)
    weights = [len(modules[name]) ** 0.5 for name in names]
    samples: list[tuple[Function, int]] = []
    for index in range(n_pairs):
        label = index % 2
        name = other = draw.choices(names, weights)[0]
        signature, description = draw.choice(modules[name])
        while label == 0 and other == name:
            other = draw.choices(names, weights)[0]
        if label == 0:
            _, description = draw.choice(modules[other])
        samples.append(((signature, description), label))
    draw.shuffle(samples)
    return Samples([texts for texts, _ in samples], [label for _, label in samples])


# --- what the words alone give ---------------------------------------------------------------------------------------


def overlap(texts: Sequence[str]) -> float:
    """Words that two texts share, as a part of those of the shorter one; `call_later` is two words."""
    first, second = (set(re.findall(r"[a-z]{3,}", text.lower())) - {"def"} for text in texts)
    return len(first & second) / max(1, min(len(first), len(second)))


def overlap_accuracy(train: Samples, test: Samples) -> float:
    """Accuracy of "together" above a threshold on the overlap, the threshold that is best on the training pairs."""
    known = [overlap(texts) for texts in train.texts]
    threshold = max(sorted(set(known)), key=lambda value: accuracy_above(value, known, train.labels))
    return accuracy_above(threshold, [overlap(texts) for texts in test.texts], test.labels)


def accuracy_above(threshold: float, values: Iterable[float], labels: Sequence[float]) -> float:
    """Share of labels that agree with "above the threshold"."""
    return sum((value > threshold) == bool(label) for value, label in zip(values, labels, strict=True)) / len(labels)
