"""Topics of short texts from one number per topic, as in the paper: AG News with 256 parameters, and its controls.

    python -m benchmarks.regression.text --train ag_news/train.csv --test ag_news/test.csv --max_train 10001
    python -m benchmarks.regression.text

A document's features are the mean label proportions of its words: one per topic. LReg puts a function of 16 nodes on
each feature for each topic, 16 x 4 x 4 = 256 values for the four topics of AG News. The proportions come from a table
of words and labels that the training labels fill; it is part of the model and is counted here. Without files the texts
are docstrings of four installed packages, and the package is the topic; nothing is downloaded.
"""

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from benchmarks.regression.text_data import Texts, docstrings, read_csv
from benchmarks.regression.versions import installed_versions
from examples.comparison.options import UserError, require_at_least, run_script
from examples.comparison.report import markdown_table
from lreg_peft.regression import LagrangeClassifier, LagrangeEncoder

N_NODES = 16


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Where the texts are, and where the table goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help="CSV file: label, text, ... (default: docstrings of installed packages)")
    parser.add_argument("--test", help="CSV file of the same kind")
    parser.add_argument("--max_train", type=int, help="take so many training documents, the first ones")
    parser.add_argument("--output_dir", default="outputs/text", help="folder for text.md and text.json")
    parser.add_argument("--no_progress", action="store_true", help="show no bar")
    args = parser.parse_args(argv)
    require_at_least(args, max_train=2)
    return args


@dataclass(frozen=True)
class Row:
    """Accuracy on training and test documents; numbers that training set, those of the count table apart."""

    method: str
    parameters: int
    table: int
    train: float
    test: float
    seconds: float


@dataclass(frozen=True)
class Counts:
    """Words of documents `[n, V]`, labels `[n]` from 0, and the table `[V, C]`: how often a word has a label."""

    train: sparse.csr_matrix
    test: sparse.csr_matrix
    y_train: np.ndarray
    y_test: np.ndarray
    table: np.ndarray


def count(train: Texts, test: Texts) -> Counts:
    """Words once per document."""
    labels = {label: index for index, label in enumerate(sorted(set(train.labels)))}
    if unknown := set(test.labels) - labels.keys():
        raise UserError(f"The test file has labels that the training file lacks: {', '.join(sorted(unknown))}.")
    vectorizer = CountVectorizer(analyzer=lambda document: document, binary=True)
    x_train = vectorizer.fit_transform(train.documents).astype(float).tocsr()
    y_train = np.array([labels[label] for label in train.labels])
    table = x_train.T @ np.eye(len(labels))[y_train]
    x_test = vectorizer.transform(test.documents).astype(float).tocsr()
    return Counts(x_train, x_test, y_train, np.array([labels[label] for label in test.labels]), np.asarray(table))


def proportions(words: sparse.csr_matrix, table: np.ndarray, own: np.ndarray | None = None) -> np.ndarray:
    """Mean label proportions of the words of each document, `[n, C]`; with `own` labels without the document itself."""
    n_classes = table.shape[1]
    total = table.sum(axis=1)
    if own is None:
        share = words @ (table / np.maximum(total, 1)[:, None])
        number = np.asarray(words.sum(axis=1)).ravel()
    else:
        # A word of this document alone says nothing about it.
        others = np.maximum(total - 1, 0)
        weight = np.where(others > 0, 1 / np.maximum(others, 1), 0)
        share = words @ (table * weight[:, None]) - np.eye(n_classes)[own] * (words @ weight)[:, None]
        number = np.asarray(words @ (others > 0).astype(float)).ravel()
    share = np.asarray(share)
    unknown = number == 0
    share[unknown], number[unknown] = 1 / n_classes, 1
    return share / number[:, None]


class LeastSquares:
    """Hat functions on equal steps and least squares on the labels: what the paper's text gives of its construction."""

    def fit(self, x: np.ndarray, y: np.ndarray) -> "LeastSquares":
        self.encoder = LagrangeEncoder(n_nodes=N_NODES, scale="minmax").fit(x)
        basis = self.encoder.transform(x)
        normal = (basis.T @ basis).toarray()
        normal.flat[:: len(normal) + 1] += 1e-6 * len(x)
        self.values = np.linalg.solve(normal, basis.T @ np.eye(y.max() + 1)[y])
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        return (self.encoder.transform(x) @ self.values).argmax(axis=1)


def compare(counts: Counts, progress: bool) -> list[Row]:
    """The published construction and what it has to be compared with."""
    n_classes, n_words = counts.table.shape[1], len(counts.table)
    leaking, honest = (proportions(counts.train, counts.table, own) for own in (None, counts.y_train))
    test = proportions(counts.test, counts.table)
    values, linear = N_NODES * n_classes**2, n_classes * (n_classes + 1)
    table = n_words * n_classes
    weights = n_words * n_classes

    def logistic() -> Any:
        return LogisticRegression(C=1e3, max_iter=2000)

    jobs: list[tuple[str, Any, Any, Any, int, int]] = [
        ("LReg, equal steps, least squares (the paper's kind)", LeastSquares(), leaking, test, values, table),
        ("LReg, quantiles, cross-entropy", LagrangeClassifier(n_nodes=N_NODES), leaking, test, values, table),
        ("logistic regression", logistic(), leaking, test, linear, table),
        ("LReg, leave-one-out proportions", LagrangeClassifier(n_nodes=N_NODES), honest, test, values, table),
        ("logistic regression, leave-one-out proportions", logistic(), honest, test, linear, table),
        ("naive Bayes on words", MultinomialNB(), counts.train, counts.test, n_classes, weights),
        (
            "tf-idf + logistic regression", make_pipeline(TfidfTransformer(), LogisticRegression(max_iter=2000)),
            counts.train, counts.test, weights + n_classes, 0,
        ),
    ]  # fmt: skip
    rows = []
    for name, model, x_train, x_test, parameters, counted in tqdm(jobs, desc="texts", disable=not progress):
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            began = time.process_time()
            model.fit(x_train, counts.y_train)
            seconds = time.process_time() - began
            accuracy = [
                float(np.mean(model.predict(x) == y))
                for x, y in ((x_train, counts.y_train), (x_test, counts.y_test))
            ]  # fmt: skip
        rows.append(Row(name, parameters, counted, accuracy[0], accuracy[1], seconds))
    return rows


def show(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    header = ["method", "parameters", "numbers in the word table", "train accuracy", "test accuracy", "CPU seconds"]
    lines = [
        [
            row.method,
            f"{row.parameters:,}",
            f"{row.table:,}",
            f"{row.train:.4f}",
            f"{row.test:.4f}",
            f"{row.seconds:.2f}",
        ]
        for row in rows
    ]
    return markdown_table([header, *lines])


def run(argv: Sequence[str]) -> None:
    """Options, texts, table."""
    arguments = parse_arguments(argv)
    if (arguments.train is None) != (arguments.test is None):
        raise UserError("--train and --test belong together; give both, or neither for the offline texts.")
    torch.set_num_threads(1)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.train is None:
        train, test = docstrings()
        train = Texts(train.documents[: arguments.max_train], train.labels[: arguments.max_train])
        source = "docstrings of installed packages"
    else:
        train, test = read_csv(Path(arguments.train), arguments.max_train), read_csv(Path(arguments.test), None)
        source = f"{Path(arguments.train).name}, {Path(arguments.test).name}"
    counts = count(train, test)
    rows = compare(counts, not arguments.no_progress)
    described = (
        f"{source}: {len(train.labels):,} training and {len(test.labels):,} test documents, {counts.table.shape[1]} "
        f"labels, {len(counts.table):,} words"
    )
    text = f"# Topics of short texts\n\n{described}\n\n{show(rows)}\n\nVersions: {installed_versions()}\n"
    (folder / "text.md").write_text(text, encoding="utf-8")
    content = {"texts": described, "rows": [vars(row) for row in rows], "versions": installed_versions()}
    (folder / "text.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Run it; a mistake in the command or its input is one sentence and exit code 2."""
    run_script(run, argv)


if __name__ == "__main__":
    main()
