"""LagrangeRegressor beside its peers: test R^2 and CPU seconds on one thread, tables and pictures.

    python examples/regression/run_regression.py --output_dir out

Needs `pip install -e ".[examples,regression]"`; lightgbm, pygam, interpret-core, scikit-fem, inkan and mlxtend (two of
the real sets) take part where they are installed, and are listed as left out where not. Nothing is downloaded. Written
to `--output_dir`: results.md, results.json, pictures, and every finished fit (fits.jsonl), where a second start of the
same command goes on.
"""

import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `comparison`

from benchmark_sets import ONE_FEATURE, SEVERAL_FEATURES, DataSet, real_sets, synthetic
from comparison.environment import make_folder, provenance, set_threads, start_processes
from comparison.errors import UserError
from comparison.options import option, parse, require_at_least
from comparison.protocol import run_script
from comparison.report import JSON_FILE, MARKDOWN_FILE, finite
from measure import Measurements, measure
from peers import LREG, METHODS
from pictures import PICTURES, draw_pictures
from table1 import table1
from tables import left_out, scores_table, seconds_table, standing
from versions import installed_versions

REAL = "real"


@dataclass
class RegressionArguments:
    """What is compared, and how long."""

    output_dir: str = option(
        "outputs/regression", "Folder for everything that is written; a second start resumes there."
    )
    sets: list[str] = option(
        [], f"Any of {', '.join([*ONE_FEATURE, *SEVERAL_FEATURES])} and '{REAL}' for all real ones (default: all)."
    )
    methods: list[str] = option([], f"Any of {', '.join(repr(method.name) for method in METHODS)} (default: all).")
    seeds: int = option(5, "Seeds of the synthetic sets, from 0; the real ones get twice as many folds.")
    patience: float = option(
        4.0, "A method gets further seeds on a set only while its fits there took less than so many CPU seconds."
    )
    pictures: list[str] = option([], f"Any of {', '.join(PICTURES)}, or 'none' (default: all).")
    report_only: bool = option(False, "Fit nothing: tables from the fits that are there, of a run that was stopped.")
    progress: bool = option(True, "Show progress bars.")


def chosen_sets(names: Sequence[str]) -> list[DataSet]:
    """By name, in the order of the tables."""
    known = [*ONE_FEATURE, *SEVERAL_FEATURES, REAL]
    for name in names:
        if name not in known:
            raise UserError(f"There is no set '{name}'; there are {', '.join(known)}.")
    names = [name for name in known if not names or name in names]
    return [data for name in names for data in (real_sets() if name == REAL else [synthetic(name)])]


def compare(argv: Sequence[str]) -> None:
    """Options, fits, tables, pictures."""
    began = time.perf_counter()
    (arguments,) = parse([RegressionArguments], argv)
    require_at_least(seeds=(arguments.seeds, 1), patience=(arguments.patience, 0.0))
    sets = chosen_sets(arguments.sets)
    for name in arguments.methods:
        if name not in [method.name for method in METHODS]:
            raise UserError(f"There is no method '{name}'; there are {', '.join(m.name for m in METHODS)}.")
    for name in arguments.pictures:
        if name not in [*PICTURES, "none"]:
            raise UserError(f"There is no picture '{name}'; there are {', '.join(PICTURES)}, or 'none'.")
    methods = [method for method in METHODS if not arguments.methods or method.name in arguments.methods]
    start_processes()
    set_threads(1)
    folder = Path(arguments.output_dir)
    make_folder(folder)
    kept = Measurements(folder)
    if not arguments.report_only:
        measure(sets, methods, arguments.seeds, arguments.patience, kept, arguments.progress)

    groups = {
        "One feature": [data for data in sets if data.name in ONE_FEATURE],
        "Several features": [data for data in sets if data.name in SEVERAL_FEATURES],
        "Real data, mean over the folds ± standard error": [data for data in sets if data.real],
    }
    parts = ["# LagrangeRegressor beside its peers"]
    for title, group in groups.items():
        if group:
            described = "\n".join(f"- {data.name}: {data.description}" for data in group)
            parts += [f"## {title}", described, scores_table(group, methods, kept, arguments.seeds)]
            parts += [seconds_table(group, methods, kept)]
    if any(data.name in ("A1", "B1", "A2", "B2") for data in sets):
        parts += table1(folder, arguments.progress)
    record = {
        **provenance(Path(__file__).name, False),
        "versions": installed_versions(),
        "CPU seconds of all fits": round(sum(fit.seconds + fit.predict_seconds for fit in kept.fits.values()), 1),
    }
    for other in ("peak memory", "dtype"):  # of training networks
        record.pop(other)
    notes = [
        f"Mean over {arguments.seeds} seeds ± standard deviation; in brackets how many where there are fewer: further "
        f"ones only while a method's fits on a set took less than {arguments.patience:g} CPU seconds"
        + (", and the run was stopped before it was through." if arguments.report_only else "."),
        *(f"{method.name}: {method.summary}." for method in methods if method.installed),
        *(f"Left out: {line}" for line in left_out(sets, methods)),
    ]
    if LREG in [method.name for method in methods]:
        parts += ["## Who is ahead of LReg, on the same seeds", _list(standing(sets, methods, kept))]
    parts += ["## Notes", _list(notes), _list(f"{name}: {value}" for name, value in record.items())]
    if "none" not in arguments.pictures:
        draw_pictures(folder, arguments.pictures or PICTURES, sets, methods, kept, arguments.progress)
    text = "\n\n".join(parts) + "\n"
    (folder / MARKDOWN_FILE).write_text(text, encoding="utf-8")
    content = {
        "sets": {data.name: data.description for data in sets},
        "methods": {method.name: method.summary for method in methods},
        "settings": asdict(arguments) | {"output_dir": folder.name},
        "provenance": record,
        "fits": [asdict(fit) for fit in kept.fits.values()],
    }
    (folder / JSON_FILE).write_text(json.dumps(finite(content), indent=1) + "\n", encoding="utf-8")
    print(text)
    print(f"Written to {folder} in {time.perf_counter() - began:.0f} s.")


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison; a mistake in the command is one sentence and exit code 2."""
    run_script(compare, argv)


if __name__ == "__main__":
    main()
