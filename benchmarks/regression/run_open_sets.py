"""LagrangeRegressor and LagrangeClassifier beside six peers on open real data sets, all with their defaults.

    python -m benchmarks.regression.run_open_sets --output_dir out

Five folds of every set that an installed package carries (see `open_sets.py`), the same for all methods: test R^2 or
the negative log loss, CPU seconds on one thread, ranks. Finished fits are kept in `out/fits.jsonl`, and a second start
goes on from there; `--again LReg` measures a method anew.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LogisticRegressionCV, RidgeCV
from sklearn.metrics import log_loss, r2_score
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import SplineTransformer, StandardScaler
from threadpoolctl import threadpool_limits

from benchmarks.regression.open_sets import OpenSet, open_sets
from lreg_peft.regression import LagrangeClassifier, LagrangeRegressor

OURS = "LReg"
FOLDS = 5
_PENALTIES = np.logspace(-4, 4, 9)
#: pyGAM's grid search takes minutes a fit beyond.
_PYGAM_FEATURES = 20
_PYGAM_SAMPLES = 10_000


def _logistic() -> Any:
    return LogisticRegressionCV(
        Cs=_PENALTIES, l1_ratios=(0.0,), cv=5, scoring="neg_log_loss", max_iter=200, use_legacy_attributes=False
    )


class _Pygam:
    """pyGAM with its own grid search; for classes only two."""

    def __init__(self, classes: bool):
        self.classes = classes

    def fit(self, x: Any, y: Any) -> "_Pygam":
        import pygam

        if self.classes:
            self.classes_ = np.unique(y)
            self.model = pygam.LogisticGAM().gridsearch(x, (y == self.classes_[1]).astype(float), progress=False)
        else:
            self.model = pygam.LinearGAM().gridsearch(x, y, progress=False)
        return self

    def predict(self, x: Any) -> Any:
        return self.model.predict(x)

    def predict_proba(self, x: Any) -> Any:
        p = self.model.predict_proba(x)
        return np.stack((1 - p, p), axis=1)


def _lightgbm(classes: bool) -> Any:
    import lightgbm

    return (lightgbm.LGBMClassifier if classes else lightgbm.LGBMRegressor)(n_jobs=1, verbose=-1)


#: name -> estimator for regression or classes
METHODS: dict[str, Callable[[bool], Any]] = {
    OURS: lambda classes: LagrangeClassifier() if classes else LagrangeRegressor(),
    "HistGradientBoosting": lambda classes: (
        HistGradientBoostingClassifier(random_state=0) if classes else HistGradientBoostingRegressor(random_state=0)
    ),
    "LightGBM": _lightgbm,
    "RandomForest": lambda classes: (
        RandomForestClassifier(random_state=0) if classes else RandomForestRegressor(random_state=0)
    ),
    "splines + ridge": lambda classes: make_pipeline(
        SplineTransformer(), StandardScaler(), _logistic() if classes else RidgeCV(_PENALTIES)
    ),
    "linear + ridge": lambda classes: make_pipeline(StandardScaler(), _logistic() if classes else RidgeCV(_PENALTIES)),
    "pyGAM": _Pygam,
}


def _refused(method: str, x: Any, y: Any, classes: bool) -> bool:
    if method != "pyGAM":
        return False
    return x.shape[1] > _PYGAM_FEATURES or len(x) > _PYGAM_SAMPLES or (classes and len(np.unique(y)) > 2)


def measure(method: str, entry: OpenSet, x: Any, y: Any) -> dict[str, Any]:
    """All folds of one method on one set."""
    splitter = (StratifiedKFold if entry.classes else KFold)(FOLDS, shuffle=True, random_state=0)
    scores, seconds = [], 0.0
    for train, test in splitter.split(x, y):
        model = METHODS[method](entry.classes)
        start = time.process_time()
        model.fit(x[train], y[train])
        seconds += time.process_time() - start
        if entry.classes:
            labels = np.unique(y)
            probability = np.full((len(test), len(labels)), 0.0)
            probability[:, np.searchsorted(labels, model.classes_)] = model.predict_proba(x[test])
            scores.append(-log_loss(y[test], probability, labels=labels))
        else:
            scores.append(r2_score(y[test], model.predict(x[test])))
    return {"scores": [float(s) for s in scores], "seconds": seconds / FOLDS}


def compare(fits: dict[tuple[str, str], dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """Ranks and standings of sets that all have `OURS`."""
    ranks: dict[str, list[float]] = {method: [] for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    standing = {}
    for name in names:
        scores = {m: fits[name, m]["scores"] for m in METHODS if fits.get((name, m), {}).get("scores")}
        if OURS not in scores:
            continue
        means = {m: float(np.mean(s)) for m, s in scores.items()}
        for m in means:
            ranks[m].append(1 + sum(other > means[m] for other in means.values()))
            seconds[m].append(fits[name, m]["seconds"])
        best = max((m for m in means if m != OURS), key=means.__getitem__)
        difference = np.subtract(scores[OURS], scores[best])
        error = float(difference.std(ddof=1) / np.sqrt(len(difference)))
        mean = float(difference.mean())
        word = "ahead" if mean > error else "behind" if mean < -error else "level"
        standing[name] = {"best": best, "difference": mean, "error": error, "standing": word}
    return {
        "ranks": {m: float(np.mean(r)) for m, r in ranks.items() if r},
        "seconds": {m: float(np.mean(s)) for m, s in seconds.items() if s},
        "sets": {m: len(r) for m, r in ranks.items() if r},
        "standing": standing,
    }


def report(fits: dict[tuple[str, str], dict[str, Any]], sets: list[OpenSet]) -> tuple[str, dict[str, Any]]:
    """The tables in Markdown, and the same as data."""
    lines, record = [], {}
    for classes, title in ((False, "Regression: test R^2"), (True, "Classes: test log loss, negative")):
        names = [entry.name for entry in sets if entry.classes == classes]
        result = record[title] = compare(fits, names)
        lines += [f"## {title}", "", "| | " + " | ".join(METHODS) + " | LReg against the best peer |"]
        lines += ["|---|" + "--:|" * len(METHODS) + "---|"]
        for name, row in result["standing"].items():
            cells = [
                f"{np.mean(fits[name, m]['scores']):.4f}" if fits.get((name, m), {}).get("scores") else "-"
                for m in METHODS
            ]
            text = f"{row['standing']}: {row['difference']:+.4f} ± {row['error']:.4f}, {row['best']}"
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {text} |")
        words = [row["standing"] for row in result["standing"].values()]
        lines.append(
            "| mean rank | " + " | ".join(f"{result['ranks'].get(m, np.nan):.2f}" for m in METHODS)
            + " | " + ", ".join(f"{words.count(w)} {w}" for w in ("ahead", "level", "behind")) + " |"
        )  # fmt: skip
        lines.append(
            "| CPU seconds | " + " | ".join(f"{result['seconds'].get(m, np.nan):.2f}" for m in METHODS) + " | |"
        )
        lines.append("")
    return "\n".join(lines), record


def main() -> None:
    """Run what is missing and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--sets", nargs="*", help="only these")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--again", nargs="*", default=[], help="methods to measure anew")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    file = options.output_dir / "fits.jsonl"
    fits: dict[tuple[str, str], dict[str, Any]] = {}
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            fits[entry.pop("set"), entry.pop("method")] = entry
    sets = [entry for entry in open_sets() if not options.sets or entry.name in options.sets]
    warnings.filterwarnings("ignore")
    with threadpool_limits(1):
        for entry in sets:
            try:
                x, y = entry.load()
            except ImportError as error:
                print(f"{entry.name}: left out, {error}")
                continue
            for method in options.methods:
                if _refused(method, x, y, entry.classes):
                    continue
                if (entry.name, method) in fits and method not in options.again:
                    continue
                try:
                    fit = measure(method, entry, x, y)
                except ImportError as error:
                    fit = {"scores": None, "seconds": 0.0, "error": str(error)}
                except Exception as error:  # a peer that fails on a set has no score there
                    if method == OURS:
                        raise
                    fit = {"scores": None, "seconds": 0.0, "error": f"{type(error).__name__}: {error}"}
                fits[entry.name, method] = fit
                with file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps({"set": entry.name, "method": method, **fit}) + "\n")
                mean = f"{np.mean(fit['scores']):.4f}" if fit["scores"] else "failed: " + fit["error"]
                print(f"{entry.name:>16} {method:<22}{mean} {fit['seconds']:8.2f} s", flush=True)
    text, record = report(fits, sets)
    (options.output_dir / "open_sets.md").write_text(text, encoding="utf-8")
    (options.output_dir / "open_sets.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
