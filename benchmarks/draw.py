"""Draw every picture that stands on a record anew, from the record.

    python -m benchmarks.draw              all of them
    python -m benchmarks.draw sst2 axes    those whose path has one of these words in it

Nothing is measured. Pictures that are computed have commands of their own: the figures of the paper
(`python -m benchmarks.regression.run_regression --pictures figure_1 ...`), the picture of the front page
(`python examples/how_it_works/draw.py`), those of the documentation (`python docs/tools/pictures.py`).
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments() -> argparse.Namespace:
    """Which pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="draw what has one of them in its path (default: everything)")
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # before the imports that take seconds, so that --help does not

from benchmarks.measurements import (
    multigrade_anchor,
    solver_agreement,
    sst2_fit,
    training_speed,
    wikitext_fit,
    wikitext_study,
)
from benchmarks.peft_methods import ranking
from benchmarks.peft_methods.study_picture import draw_study
from benchmarks.peft_methods.study_report import StudyReport, StudyRow
from benchmarks.regression.benchmark_sets import ONE_FEATURE, SEVERAL_FEATURES, real_sets, synthetic
from benchmarks.regression.measure import Fit, Measurements
from benchmarks.regression.peers import METHODS
from benchmarks.regression.pictures import draw_results
from examples.comparison.picture import draw_comparison
from examples.comparison.task import Metric


def record(path: str) -> Any:
    """What a file of JSON holds."""
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def comparison(title: str, *paths: str, study: str | None = None, renamed: str | None = None) -> Callable[[Path], None]:
    """The picture of a comparison.

    Args:
        title: what is shown.
        paths: of records; rows of later ones are added to those of the first.
        study: a record of the study whose row `lreg` is added.
        renamed: what the row that the first record calls `lreg` is called today.
    """

    def draw(path: Path) -> None:
        first, *others = map(record, paths)
        for row in first["rows"]:
            row["method"] = renamed if renamed and row["method"] == "lreg" else row["method"]
        for other in others:
            first["rows"] += other["rows"]
        if study is not None:
            first["rows"] += [as_row(row) for row in record(study)["rows"] if row["method"] == "lreg"]
        draw_comparison(first, path, title)

    return draw


def as_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a study as a comparison has it."""
    (metric,) = row["tuning"]
    values = [test[metric] for test in row["test"]]
    figures = {"mean": statistics.mean(values), "std": statistics.stdev(values), "values": values}
    return {
        "method": row["method"],
        "test": {metric: figures},
        "trainable_parameters": row["trainable"],
        "training_seconds": row["seconds"],
    }


def study(title: str, path: str) -> Callable[[Path], None]:
    """The picture of a study."""

    def draw(to: Path) -> None:
        content = record(path)
        rows = [StudyRow(**{k: v for k, v in row.items() if not k.startswith("test_")}) for row in content["rows"]]
        for row in rows:  # a diverged run is null in JSON
            row.tuning = {name: float("nan") if value is None else value for name, value in row.tuning.items()}
        fixed = {name: content[name] for name in ("reference", "left_out", "data", "settings", "provenance", "base")}
        draw_study(StudyReport(title, Metric(**content["metric"]), rows=rows, **fixed), to, title)

    return draw


def of_record(draw: Callable[..., None], path: str, *keys: str) -> Callable[[Path], None]:
    """The picture of a measuring script, from parts of its record."""
    return lambda to: draw(*(record(path)[key] for key in keys), to)


def ranked(path: Path) -> None:
    """Ranks over several studies."""
    content = record("benchmarks/peft_methods/results/ranking/ranking.json")
    ranking.draw([ranking.Cell(**cell) for cell in content["cells"]], content["methods"], path)


def regression(path: Path) -> None:
    """The study of regression."""
    kept = Measurements(path.parent)
    for fit in record("benchmarks/regression/results/results.json")["fits"]:
        found = Fit(**fit)
        kept.fits[found.data, found.method, found.seed] = found
    sets = [*(synthetic(name) for name in (*ONE_FEATURE, *SEVERAL_FEATURES)), *real_sets()]
    draw_results(path.parent, [data for data in sets if any(key[0] == data.name for key in kept.fits)], METHODS, kept)


WIKITEXT, GLUE = "examples/wikitext/results/", "examples/glue/results/"
STUDIES, MEASURED = "benchmarks/peft_methods/results/", "benchmarks/measurements/results/"
SEEDS = "mean and standard deviation of three seeds"
PICTURES: dict[str, Callable[[Path], None]] = {
    f"{WIKITEXT}offline.png": comparison(
        "A small GPT-2 to Python's language reference: test perplexity, one seed, adapters of at most 8,450 parameters",
        f"{WIKITEXT}offline.json",
    ),
    f"{GLUE}offline.png": comparison(
        f"MiniLM on pairs of signatures and docstrings: test accuracy, {SEEDS}, adapters of at most 64,536 parameters",
        f"{GLUE}offline.json",
        f"{GLUE}offline-lreg.json",
        renamed="lreg-plain",
    ),
    f"{GLUE}sst2.png": comparison(
        f"MiniLM on SST-2, 500 steps: validation accuracy, {SEEDS}, adapters of at most 64,536 parameters",
        f"{GLUE}sst2.json",
        f"{GLUE}sst2-lreg.json",
        renamed="lreg-plain",
    ),
    f"{STUDIES}wikitext-gpt2-mini.png": comparison(
        f"GPT-2 of 5.3 M to WikiText, 50 steps: test perplexity, {SEEDS}, adapters of at most 33,282 parameters",
        f"{STUDIES}wikitext-gpt2-mini.json",
        study=f"{STUDIES}wikitext.json",
        renamed="lreg-plain",
    ),
    f"{STUDIES}wikitext.png": study(
        "GPT-2 of 5.3 M to WikiText: ten methods with the whole search for the rate, three seeds",
        f"{STUDIES}wikitext.json",
    ),
    f"{STUDIES}wikitext-axes.png": study(
        "GPT-2 of 5.3 M to WikiText, 50 steps: LReg and the best four of PEFT over budgets, three seeds",
        f"{STUDIES}wikitext-axes.json",
    ),
    f"{STUDIES}wikitext-once.png": study(
        "GPT-2 of 5.3 M to WikiText, all methods once at the centre of their rates, tuning text",
        f"{STUDIES}wikitext-once.json",
    ),
    f"{STUDIES}glue-offline.png": study(
        "MiniLM on pairs of signatures and docstrings: five methods with the whole search, three seeds",
        f"{STUDIES}glue-offline.json",
    ),
    f"{STUDIES}ranking/ranking.png": ranked,
    "benchmarks/vision/results/offline.png": comparison(
        f"A small ResNet to MNIST: test accuracy, {SEEDS}, adapters of at most 4,193 parameters",
        "benchmarks/vision/results/offline.json",
    ),
    "benchmarks/regression/results/results.png": regression,
    f"{MEASURED}training_speed.png": of_record(training_speed.draw, f"{MEASURED}training_speed.json", "results"),
    f"{MEASURED}training_speed_sizes.png": of_record(
        training_speed.draw, f"{MEASURED}training_speed_sizes.json", "results"
    ),
    f"{MEASURED}solver_agreement.png": of_record(solver_agreement.draw, f"{MEASURED}solver_agreement.json", "runs"),
    f"{MEASURED}multigrade_anchor.png": of_record(
        multigrade_anchor.draw, f"{MEASURED}multigrade_anchor.json", "results"
    ),
    f"{MEASURED}sst2_fit.png": of_record(sst2_fit.draw, f"{MEASURED}sst2_fit.json", "rows", "mesh_history"),
    f"{MEASURED}wikitext_fit.png": of_record(wikitext_fit.draw, f"{MEASURED}wikitext_fit.json", "rows"),
    f"{MEASURED}wikitext_study.png": of_record(wikitext_study.draw, f"{MEASURED}wikitext_study.json", "rows"),
}


def main(words: list[str]) -> None:
    """Draw what is wanted, and say what was drawn."""
    wanted = [path for path in PICTURES if not words or any(word in path for word in words)]
    if not wanted:
        raise SystemExit(f"error: no picture has {' or '.join(words)} in its path; there are {', '.join(PICTURES)}.")
    for path in wanted:
        PICTURES[path](ROOT / path)
        print(path)


if __name__ == "__main__":
    main(ARGUMENTS.words)
