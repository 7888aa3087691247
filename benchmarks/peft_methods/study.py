"""The recorded study: every method at one budget and number of steps, and some along an axis of either.

Each pair of a budget and a number of steps is a cell: a folder with a ledger of its own, so that everything is found
again after an interruption and methods, seeds, budgets and steps may be added in any order.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from accelerate import PartialState

from comparison.budget import BudgetTooSmall, learning_rate_grids
from comparison.environment import provenance, start_processes, without_places
from comparison.errors import UserError
from comparison.ledger import Run
from comparison.method import Method
from comparison.methods import select_methods
from comparison.options import ComparisonArguments, Parser, RunArguments, option, require_at_least
from comparison.protocol import Protocol, Search, base_figures, open_protocol
from comparison.study_picture import draw_study
from comparison.study_report import StudyReport, StudyRow
from comparison.task import Task
from comparison.training import Progress
from comparison.tuners import LEFT_OUT


@dataclass
class StudyArguments:
    """What a study has beside the options of a comparison, of which --budget and --steps are the centre."""

    budgets: list[int] = option([], "Further budgets, each at --steps steps.")
    step_counts: list[int] = option([], "Further numbers of steps, each at the budget --budget.")
    search_only: bool = option(
        False, "Choose the learning rates on the tuning split with the first seed, and read no test figure."
    )
    reference: str = option(
        "lora-linear-head",
        "Method to whose last tuning figure the others' time is measured, where --eval_steps is given.",
    )


def study_arguments(argv: Sequence[str]) -> tuple[StudyArguments, list[str]]:
    """The options of the study, and what is left for the script."""
    parser = Parser((StudyArguments,), allow_abbrev=False)
    parser.epilog = "All options of the comparison of the same folder are taken too; its own --help lists them."
    arguments, rest = parser.parse_args_into_dataclasses(list(argv), return_remaining_strings=True)
    for name in ("budgets", "step_counts"):
        require_at_least(**{name: (min(getattr(arguments, name), default=None), 1)})
    return arguments, rest


def study_of(parse: Callable[[Sequence[str]], Any], prepare: Callable[[Any], Task]) -> Callable[[Sequence[str]], None]:
    """What a script of a study runs.

    Args:
        parse: the options that are not of the study, with `comparison` and `run` in the result.
        prepare: the task from that result.
    """

    def study(argv: Sequence[str]) -> None:
        began = time.perf_counter()
        own, rest = study_arguments(argv)
        arguments = parse(rest)
        start_processes()
        run_study(prepare(arguments), own, arguments.comparison, arguments.run, began)

    return study


@dataclass(frozen=True)
class Cell:
    """One budget and one number of steps."""

    budget: int
    steps: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"budget-{self.budget}-steps-{self.steps}"


def run_study(
    task: Task, study: StudyArguments, options: ComparisonArguments, run: RunArguments, began: float
) -> StudyReport:
    """All cells of a study, resumed where an earlier start was interrupted.

    Args:
        task: what is compared on.
        study: the axes.
        options: with steps, batch_size and lr_trials filled in.
        run: where the results go.
        began: `time.perf_counter()` at the start of the script.
    """
    folder = Path(run.output_dir)
    chosen = select_methods(options.methods, task.task_type, task.empty_model(), everything=True)
    methods = [replace(method, as_lora=False) for method in chosen]
    # What all cells share: the base model alone.
    root = open_protocol(task, replace(options, steps=None, eval_steps=None, patience=None), folder)
    centre = Cell(options.budget or root.sizes.default_budget(), options.steps or 1)
    cells = [
        centre,
        *(replace(centre, budget=budget) for budget in study.budgets),
        *(replace(centre, steps=steps) for steps in study.step_counts),
    ]
    cells = list(dict.fromkeys(cells))
    is_main = PartialState().is_main_process
    root.progress = progress = Progress(
        task.base_steps + sum(cell.steps for cell in cells) * len(methods) * _runs_per_method(study, options),
        is_main,
        run.progress,
    )
    report = StudyReport(
        title=task.title,
        metric=task.metric,
        reference=study.reference,
        left_out={name: f"PEFT's {name}: {reason}" for name, reason in LEFT_OUT.items()},
        data=task.describe(),
        settings=without_places({**root.shared, **asdict(options), **asdict(study)}),
        provenance=provenance("run_study.py", options.bf16),
    )
    wanted = task.base_steps > 0 or not study.search_only
    base = base_figures(task, root, root.ledger, options.seeds[0]) if wanted else {}
    if base and not study.search_only:
        progress.say(f"The base model: test {task.metric.name} {task.metric.show(base[task.metric.name])}")
        report.base = base
    for cell in cells:
        cell_options = replace(options, budget=cell.budget, steps=cell.steps)
        protocol = open_protocol(task, cell_options, folder / cell.name)
        protocol.progress = progress
        progress.say(f"{cell.name}: {protocol.ledger.n_found} finished runs found.")
        for method in methods:
            _one_method(report, cell, protocol, method, task, cell_options, study)
            report.provenance["wall time in seconds"] = round(time.perf_counter() - began, 1)
            if is_main:
                report.write(folder)  # now and not at the end: an interruption keeps what is finished
    progress.close()
    if is_main:
        report.write(folder, draw_study)
        print(report.closing(folder))
    PartialState().wait_for_everyone()
    return report


def _runs_per_method(study: StudyArguments, options: ComparisonArguments) -> int:
    searched = (options.lr_trials or 1) + options.lr_refine
    return searched + (0 if study.search_only else len(options.seeds) - 1)


def _one_method(
    report: StudyReport,
    cell: Cell,
    protocol: Protocol,
    method: Method,
    task: Task,
    options: ComparisonArguments,
    study: StudyArguments,
) -> None:
    """One row, or the reason why there is none: a tuner that breaks must not take the others with it."""
    try:
        size = protocol.sizes.largest(method, cell.budget)
        if method.size_name is None and not method.beyond_budget:
            least = protocol.sizes.count(method, None)
            if least > cell.budget:
                raise BudgetTooSmall(method, least)
        grids = learning_rate_grids(
            [method], options.lr_trials or 1, options.lr_ratio, task.rates, options.learning_rates
        )
        found = protocol.search(method, size, grids[method.name])
        tested = [] if study.search_only else protocol.test(method, size, found)
    except (KeyboardInterrupt, SystemExit):
        raise
    except UserError as error:
        reason = str(error)
    except Exception as error:  # what a tuner cannot do, it says by any kind of exception
        reason = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    else:
        report.rows.append(_row(cell, method, size, found, tested))
        protocol.progress.say(report.last_row())
        return
    report.left_out[f"{method.name}, {cell.name}"] = f"{method.name} at {cell.budget:,} parameters: {reason}"
    protocol.progress.say(report.left_out[f"{method.name}, {cell.name}"])


def _row(cell: Cell, method: Method, size: int | None, found: Search, tested: list[Run]) -> StudyRow:
    runs = tested or [found.best]
    peaks = [run.peak_memory for run in runs if run.peak_memory is not None]
    return StudyRow(
        budget=cell.budget,
        steps=cell.steps,
        method=method.name,
        summary=method.summary,
        placement=found.best.placement or "",
        size={} if method.size_name is None or size is None else {method.size_name: size},
        n_nodes=found.best.n_nodes,
        trainable=found.best.trainable or 0,
        learning_rate=found.best.learning_rate,
        at_grid_edge=found.at_edge,
        tuning=found.best.tuning,
        seeds=[run.seed for run in tested],
        test=[run.test or {} for run in tested],
        cpu_seconds=mean(run.cpu_seconds or 0.0 for run in runs),
        seconds=mean(run.seconds for run in runs),
        peak_memory=max(peaks, default=None),
        trials=[
            {"learning_rate": trial.learning_rate, **trial.tuning}
            for trial in sorted(found.trials, key=lambda trial: trial.learning_rate)
        ],
        curves=[run.curve for run in runs],
    )
