"""LagrangeRegressor beside its peers: test R^2 and CPU seconds on one thread, tables and pictures.

    python -m benchmarks.regression.run_regression --output_dir out

Needs `pip install -e ".[examples,regression]"`; lightgbm, pygam, interpret-core, scikit-fem, inkan and mlxtend (two of
the real sets) take part where they are installed, and are listed as left out where not. Nothing is downloaded. Written
to `--output_dir`: results.md, results.json, pictures, and every finished fit (fits.jsonl), where a second start of the
same command goes on.
"""

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from examples.comparison.options import UserError, require_at_least, run_script

REAL = "real"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """What is compared, and how long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", default="outputs/regression", help="folder of all results; a second start resumes there")
    add(
        "--sets",
        nargs="+",
        default=[],
        help=f"some sets, '{REAL}' for all real ones (default: all); then only the picture of the results is drawn, "
        "unless --pictures names others",
    )
    add("--methods", nargs="+", default=[], help="some methods (default: all)")
    add("--seeds", type=int, default=5, help="of the synthetic sets, from 0; the real ones get twice as many folds")
    add(
        "--patience",
        type=float,
        default=4.0,
        help="a method gets further seeds on a set only while its fits there took less than so many CPU seconds",
    )
    add("--pictures", nargs="+", default=[], help="some of the pictures, or 'none' (default: all)")
    add("--report_only", action="store_true", help="fit nothing: tables of a run that was stopped")
    add("--no_progress", action="store_true", help="show no bars")
    args = parser.parse_args(argv)
    require_at_least(args, seeds=1, patience=0.0)
    return args


def chosen_sets(names: Sequence[str]) -> list[Any]:
    """By name, in the order of the tables."""
    from benchmarks.regression.benchmark_sets import ONE_FEATURE, SEVERAL_FEATURES, real_sets, synthetic

    known = [*ONE_FEATURE, *SEVERAL_FEATURES, REAL]
    for name in names:
        if name not in known:
            raise UserError(f"There is no set '{name}'; there are {', '.join(known)}.")
    names = [name for name in known if not names or name in names]
    return [data for name in names for data in (real_sets() if name == REAL else [synthetic(name)])]


def compare(argv: Sequence[str]) -> None:
    """Options, fits, tables, pictures."""
    began = time.perf_counter()
    args = parse_arguments(argv)
    # After the options: these imports take seconds.
    import torch

    from benchmarks.regression.benchmark_sets import ONE_FEATURE, SEVERAL_FEATURES
    from benchmarks.regression.measure import Measurements, measure
    from benchmarks.regression.peers import LREG, METHODS
    from benchmarks.regression.pictures import PICTURES, RESULTS, draw_pictures
    from benchmarks.regression.table1 import SETS, table1
    from benchmarks.regression.tables import left_out, scores_table, seconds_table, standing
    from benchmarks.regression.versions import installed_versions
    from examples.comparison.report import JSON_FILE, MARKDOWN_FILE, finite

    sets = chosen_sets(args.sets)
    for name in args.methods:
        if name not in [method.name for method in METHODS]:
            raise UserError(f"There is no method '{name}'; there are {', '.join(m.name for m in METHODS)}.")
    for name in args.pictures:
        if name not in [*PICTURES, "none"]:
            raise UserError(f"There is no picture '{name}'; there are {', '.join(PICTURES)}, or 'none'.")
    methods = [method for method in METHODS if not args.methods or method.name in args.methods]
    pictures = args.pictures or ([RESULTS] if args.sets or args.methods else PICTURES)
    torch.set_num_threads(1)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    kept = Measurements(folder)
    if not args.report_only:
        measure(sets, methods, args.seeds, args.patience, kept, not args.no_progress)
    wanted = {data.name for data in sets}
    fits = [fit for fit in kept.fits.values() if fit.data in wanted]

    groups = {
        "One feature": [data for data in sets if data.name in ONE_FEATURE],
        "Several features": [data for data in sets if data.name in SEVERAL_FEATURES],
        "Real data, mean over the folds ± standard error": [data for data in sets if data.real],
    }
    parts = ["# LagrangeRegressor beside its peers"]
    for title, group in groups.items():
        if group:
            described = "\n".join(f"- {data.name}: {data.description}" for data in group)
            parts += [f"## {title}", described, scores_table(group, methods, kept, args.seeds)]
            parts += [seconds_table(group, methods, kept)]
    if wanted.issuperset(SETS) and not args.methods:
        parts += table1(folder, not args.no_progress)
    record = {
        "command": f"run_regression.py {' '.join(argv)}".replace(args.output_dir, folder.name),
        "versions": installed_versions(),
        "CPU seconds of all fits": round(sum(fit.seconds + fit.predict_seconds for fit in fits), 1),
    }
    notes = [
        f"Mean over {args.seeds} seeds ± standard deviation; in brackets how many where there are fewer: further "
        f"ones only while a method's fits on a set took less than {args.patience:g} CPU seconds"
        + (", and the run was stopped before it was through." if args.report_only else "."),
        *(f"{method.name}: {method.summary}." for method in methods if method.installed),
        *(f"Left out: {line}" for line in left_out(sets, methods)),
    ]
    if LREG in [method.name for method in methods]:
        parts += ["## Who is ahead of LReg, on the same seeds", _list(standing(sets, methods, kept))]
    parts += ["## Notes", _list(notes), _list(f"{name}: {value}" for name, value in record.items())]
    if "none" not in pictures:
        draw_pictures(folder, pictures, sets, methods, kept, not args.no_progress)
    text = "\n\n".join(parts) + "\n"
    (folder / MARKDOWN_FILE).write_text(text, encoding="utf-8")
    content = {
        "sets": {data.name: data.description for data in sets},
        "methods": {method.name: method.summary for method in methods},
        "settings": vars(args) | {"output_dir": folder.name},
        "provenance": record,
        "fits": [asdict(fit) for fit in fits],
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
