"""The recorded study: every method at one budget and number of steps, and some along an axis of either.

Each pair of a budget and a number of steps is a cell: a folder with a ledger of its own, so that everything is found
again after an interruption and methods, seeds, budgets and steps may be added in any order.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.peft_methods.methods import READS_WEIGHTS, everything
from benchmarks.peft_methods.search import next_rate
from benchmarks.peft_methods.study_picture import draw_study
from benchmarks.peft_methods.study_report import StudyReport, StudyRow
from benchmarks.peft_methods.tuners import LEFT_OUT
from examples.comparison.environment import provenance, without_places
from examples.comparison.methods import Method, select_methods
from examples.comparison.options import UserError
from examples.comparison.protocol import Protocol, Run, Search
from examples.comparison.sizes import Sizes, learning_rate_grids
from examples.comparison.task import Task
from examples.comparison.training import Progress


class StudySizes(Sizes):
    """Sizes that may be counted on random weights."""

    def model_to_count(self, method: Method) -> PreTrainedModel:
        """On the meta device where that is enough."""
        if method.name not in READS_WEIGHTS:
            return super().model_to_count(method)
        return self._task.auto_class.from_config(self._task.config)


class StudyProtocol(Protocol):
    """The protocol of the comparisons, which may look at the tuning figures during training."""

    make_sizes = StudySizes

    def customize(self, method: Method, seen: dict[str, Any]) -> Callable[[Any], None]:
        """With --eval_steps, leave a curve in `seen`."""

        def customize(trainer: Any) -> None:
            if method.customize is not None:
                method.customize(trainer)
            if self._args.eval_steps is not None:
                trainer.add_callback(Curve(self._task, self._args.eval_steps, seen))

        return customize


class Curve(TrainerCallback):
    """Evaluates on the tuning split every so many steps and after the last."""

    def __init__(self, task: Task, every: int, seen: dict[str, Any]) -> None:
        self._task, self._every, self._seen = task, every, seen
        self._began, self._spent = 0.0, seen["start_cpu_seconds"]

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start of a step."""
        self._began = time.process_time()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any, **kwargs: Any
    ) -> None:
        """Evaluate if it is time."""
        self._spent += time.process_time() - self._began
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            point = {"step": state.global_step, "cpu_seconds": self._spent, **self._task.evaluate(model, "tuning")}
            self._seen.setdefault("curve", []).append(point)
            model.train()


class BudgetTooSmall(UserError):
    """The smallest size of a method is beyond the budget."""

    def __init__(self, least: int) -> None:
        super().__init__(
            f"its smallest size has {least:,} parameters" if least else "the model has no place left for it"
        )


@dataclass(frozen=True)
class Cell:
    """One budget and one number of steps."""

    budget: int
    steps: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"budget-{self.budget}-steps-{self.steps}"


def run_study(task: Task, args: argparse.Namespace, began: float) -> StudyReport:
    """All cells of a study, resumed where an earlier start was interrupted.

    Args:
        task: what is compared on.
        args: the options, with those of `options.add_study_options`.
        began: `time.perf_counter()` at the start of the script.
    """
    folder = Path(args.output_dir)
    known = everything()
    has_bias = any(name.endswith("bias") for name, _ in task.empty_model().named_parameters())
    first = {name: places[0] for name, places in known.items()}
    names = [m.name for m in select_methods(args.methods, task.task_type, has_bias, _of_task(first, known, task))]
    # What all cells share: the base model alone.
    root = StudyProtocol(task, changed(args, steps=0), folder)
    centre = Cell(args.budget or root.sizes.default_budget(), args.steps)
    cells = [centre, *(Cell(budget, args.steps) for budget in args.budgets)]
    cells = list(dict.fromkeys([*cells, *(Cell(centre.budget, steps) for steps in args.step_counts)]))
    n_runs = args.lr_trials + args.lr_refine + (0 if args.search_only else len(args.seeds) - 1)
    n_steps = task.base_steps + sum(cell.steps for cell in cells) * len(names) * n_runs
    root.progress = progress = Progress(n_steps, not args.no_progress)
    report = StudyReport(
        title=task.title,
        metric=task.metrics[0],
        reference=args.reference,
        left_out={name: f"PEFT's {name}: {reason}" for name, reason in LEFT_OUT.items()},
        data=task.describe(),
        settings=without_places({**root.shared, **vars(args)}),
        provenance=provenance("study", args.bf16),
    )
    base = root.base() if task.base_steps > 0 or not args.search_only else {}
    if base and not args.search_only:
        report.base = base
    for cell in cells:
        protocol = StudyProtocol(task, changed(args, budget=cell.budget, steps=cell.steps), folder / cell.name)
        protocol.progress = progress
        progress.say(f"{cell.name}: {len(protocol.ledger.runs)} finished runs found.")
        for name in names:
            _one_method(report, cell, protocol, known[name], task, args)
            report.provenance["wall time in seconds"] = round(time.perf_counter() - began, 1)
            if PartialState().is_main_process:
                report.write(folder)  # now and not at the end: an interruption keeps what is finished
    progress.close()
    if PartialState().is_main_process:
        report.write(folder, draw_study)
        print(report.closing(folder))
    PartialState().wait_for_everyone()
    return report


def changed(args: argparse.Namespace, **values: Any) -> argparse.Namespace:
    """The same options but for some."""
    return argparse.Namespace(**{**vars(args), **values})


def _of_task(first: Mapping[str, Method], known: Mapping[str, list[Method]], task: Task) -> dict[str, Method]:
    """A method of each name that exists for the task, in whatever place."""
    found = {}
    for name in first:
        there = [method for method in known[name] if task.task_type in method.tasks]
        if there:
            found[name] = there[0]
    return found


def fitted(sizes: Sizes, places: Sequence[Method], budget: int) -> tuple[Method, int | None]:
    """The first place where a method keeps the budget, and its largest size there.

    Raises:
        BudgetTooSmall: if there is no such place.
    """
    least = []
    for method in places:
        if method.size_name == "parameters":
            sizes.count(method, budget)  # refuses what is too small for any adapter
            return method, budget
        if method.size_name is None:
            if method.name == "ft" or sizes.count(method, None) <= budget:  # full fine-tuning is shown for comparison
                return method, None
            least.append(sizes.count(method, None))
        elif there := sizes.sizes(method):
            if sizes.count(method, there[0]) <= budget:
                return method, sizes.largest(method, there, budget)
            least.append(sizes.count(method, there[0]))
    raise BudgetTooSmall(min(least, default=0))


def _one_method(
    report: StudyReport, cell: Cell, protocol: Protocol, places: list[Method], task: Task, args: argparse.Namespace
) -> None:
    """One row, or the reason why there is none: a tuner that breaks must not take the others with it."""
    name = places[0].name
    try:
        there = [method for method in places if task.task_type in method.tasks]
        method, size = fitted(protocol.sizes, there, cell.budget)
        grid = learning_rate_grids([method], task, args.lr_trials, args.lr_ratio, args.learning_rates)[name]

        def further(scores: Mapping[float, float], n_trials: int) -> float | None:
            more = n_trials - len(grid)
            if more >= args.lr_refine + args.lr_extend:
                return None
            return next_rate(scores, args.lr_ratio, more < args.lr_refine)

        found = protocol.search(method, size, grid, further)
        tested = [] if args.search_only else protocol.test(method, found)
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
    report.left_out[f"{name}, {cell.name}"] = f"{name} at {cell.budget:,} parameters: {reason}"
    protocol.progress.say(report.left_out[f"{name}, {cell.name}"])


def _row(cell: Cell, method: Method, size: int | None, found: Search, tested: list[Run]) -> StudyRow:
    runs = tested or [found.best]
    peaks = [run.peak_memory for run in runs if run.peak_memory is not None]
    return StudyRow(
        budget=cell.budget,
        steps=cell.steps,
        method=method.name,
        summary=method.summary,
        placement=method.place,
        size={} if method.size_name is None or size is None else {method.size_name: size},
        n_nodes=found.best.n_nodes,
        trainable=found.best.trainable,
        learning_rate=found.best.learning_rate,
        at_grid_edge=found.at_edge,
        tuning=found.best.tuning,
        seeds=[run.seed for run in tested],
        test=[run.test or {} for run in tested],
        cpu_seconds=mean(run.cpu_seconds for run in runs),
        seconds=mean(run.seconds for run in runs),
        peak_memory=max(peaks, default=None),
        trials=[
            {"learning_rate": trial.learning_rate, **trial.tuning}
            for trial in sorted(found.trials, key=lambda trial: trial.learning_rate)
        ],
        curves=[run.extra or [] for run in runs],
    )
