"""One fit after the other, with its test R^2 and its CPU seconds; finished ones are kept and found again."""

import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import r2_score
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from benchmarks.regression.benchmark_sets import Array, DataSet, Split
from benchmarks.regression.peers import Method
from examples.comparison.report import finite

FITS_FILE = "fits.jsonl"
TRUTH = "the true function"


@dataclass(frozen=True)
class Fit:
    """One method on one split.

    Attributes:
        data: name of the set.
        method: name of the method.
        seed: of the split.
        r2: on the test samples; the outputs weighted by their variance.
        r2_truth: against the function without noise, None where it is not known.
        seconds: of CPU time for the fit, its choice of options included.
        predict_seconds: of CPU time for the test samples.
    """

    data: str
    method: str
    seed: int
    r2: float
    r2_truth: float | None
    seconds: float
    predict_seconds: float


class Measurements:
    """All fits of a folder."""

    def __init__(self, folder: Path):
        self._file = folder / FITS_FILE
        self.fits: dict[tuple[str, str, int], Fit] = {}
        if self._file.exists():
            for line in self._file.read_text(encoding="utf-8").splitlines():
                self._keep(Fit(**json.loads(line)))

    def _keep(self, fit: Fit) -> None:
        self.fits[fit.data, fit.method, fit.seed] = fit

    def add(self, fit: Fit) -> None:
        """Keep a fit, also for a later start."""
        self._keep(fit)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(asdict(fit))) + "\n")

    def of(self, data: str, method: str) -> dict[int, Fit]:
        """By seed."""
        return {seed: fit for (name, by, seed), fit in self.fits.items() if (name, by) == (data, method)}

    def seconds(self, data: str, method: str) -> float:
        """CPU time spent on all seeds so far."""
        return sum(fit.seconds + fit.predict_seconds for fit in self.of(data, method).values())


def score(y: Array, predicted: Array) -> float:
    """R^2, the outputs weighted by their variance; minus infinity for what is not a number."""
    if not np.isfinite(predicted).all():
        return -np.inf
    return float(r2_score(y, predicted, multioutput="variance_weighted"))


def fit_once(method: Method, data: DataSet, seed: int, split: Split) -> Fit:
    """Fit and test, on one thread."""
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")  # of peers: convergence, what a later version will change
        began = time.process_time()
        model = method.build(seed).fit(split.x, split.y)
        fitted = time.process_time()
        predicted = np.asarray(model.predict(split.x_test))
        done = time.process_time()
    truth = None if split.truth is None else score(split.truth, predicted)
    return Fit(
        data.name, method.name, seed, score(split.y_test, predicted), truth, fitted - began, done - fitted
    )  # fmt: skip


def measure(
    sets: Sequence[DataSet], methods: Sequence[Method], seeds: int, patience: float, kept: Measurements, progress: bool
) -> None:
    """Every method on every set. Further seeds only while a method's fits on a set took less than `patience` seconds.

    Args:
        sets: of data.
        methods: of regression.
        seeds: at most so many, from 0; twice so many folds for real data.
        patience: CPU seconds.
        kept: where finished fits are, and new ones go.
        progress: show a bar.
    """
    rounds = [
        (seed, data, method)
        for seed in range(2 * seeds)
        for data in sets
        if seed < (2 * seeds if data.real else seeds)
        for method in methods
        if method.refuses(data.n_features, data.n_train, data.n_outputs) is None
    ]
    rounds.sort(key=lambda round: round[2].slow)  # an interrupted run has the quick ones complete
    current: tuple[Any, Any] = (None, None)
    split: Split | None = None
    with tqdm(rounds, desc="fits", unit="fit", disable=not progress) as bar:
        for seed, data, method in bar:
            if (data.name, method.name, seed) in kept.fits:
                continue
            if seed and kept.seconds(data.name, method.name) > patience:
                continue
            bar.set_postfix_str(f"{data.name}, {method.name}, seed {seed}")
            if split is None or current != (data.name, seed):
                current, split = (data.name, seed), data.split(seed)
            if (data.name, TRUTH, seed) not in kept.fits and split.truth is not None:
                ceiling = score(split.y_test, split.truth)
                kept.add(Fit(data.name, TRUTH, seed, ceiling, 1.0, 0.0, 0.0))
            kept.add(fit_once(method, data, seed, split))
