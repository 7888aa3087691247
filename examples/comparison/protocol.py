"""The comparison: base model, one method after the other, the files after each of them."""

import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from accelerate import PartialState
from accelerate.utils import set_seed
from peft import PeftModel
from torch import nn

from comparison.budget import Sizes, count_trainable, given_sizes, learning_rate_grids
from comparison.environment import (
    make_folder,
    peak_memory,
    provenance,
    reset_peak_memory,
    start_processes,
    without_places,
)
from comparison.errors import UserError
from comparison.hub import push_adapter
from comparison.ledger import Ledger, Run, run_key
from comparison.method import LANGUAGE_MODELS, Method
from comparison.methods import select_methods
from comparison.options import ComparisonArguments, RunArguments
from comparison.picture import write_picture
from comparison.report import Report, Row, finite
from comparison.search import next_rate
from comparison.task import Task
from comparison.trained_state import put_back, read_state, save_trained, trained_state, weight_bytes, write_state
from comparison.training import KeepBest, Progress, TrainSettings, batches_to_start_from, start_from_data, train
from lreg_peft import save_as_lora
from lreg_peft.core.fingerprint import is_sharded

#: Settings of the comparison that every run of a folder shares. What is not here (methods, sizes, rates, seeds) may
#: change between two starts: it tells the runs apart.
SHARED = (
    "steps",
    "batch_size",
    "gradient_accumulation_steps",
    "warmup_ratio",
    "weight_decay",
    "head_learning_rate",
    "bf16",
    "eval_steps",
    "patience",
)
RESULT_FILE = "comparison.json"
CONVERTED_BATCHES = 16  # of the task's size, that a conversion to LoRA is fitted on


@dataclass
class Search:
    """What the search for a learning rate found.

    Attributes:
        trials: all runs, in the order in which they were made.
        best: the best of them on the tuning split.
        model: what the best one trained, None if it was found in the ledger.
    """

    trials: list[Run]
    best: Run
    model: nn.Module | None

    @property
    def at_edge(self) -> bool:
        """Whether a wider grid might do better."""
        rates = [trial.learning_rate for trial in self.trials]
        return len(rates) > 1 and self.best.learning_rate in (min(rates), max(rates))


class Protocol:
    """What all runs share. One method at a time goes through `run`, or through `search` and `test`."""

    def __init__(self, task: Task, options: ComparisonArguments, folder: Path, sizes: Sizes, ledger: Ledger) -> None:
        self._task, self._options, self._folder = task, options, folder
        self.sizes, self.ledger = sizes, ledger
        self.shared: dict[str, Any]  # the settings that all runs of the ledger have
        self.settings: TrainSettings
        self.progress: Progress

    def run(self, method: Method, size: int | None, grid: list[float]) -> list[Row]:
        """Choose the learning rate on the tuning split with the first seed, then test every seed with it.

        Returns:
            The method's row, and that of the LoRA it converts to where that is shown.
        """
        found = self.search(method, size, grid)
        adapter_bytes = self._finish(method, found)
        reported = [found.best, *self._repeat_all(method, size, found.best.learning_rate)]
        row = self._row(method, size, reported, found, adapter_bytes)
        return [row, self._row_as_lora(row, reported)] if method.as_lora else [row]

    def search(self, method: Method, size: int | None, grid: list[float]) -> Search:
        """Choose the learning rate on the tuning split with the first seed.

        Raises:
            UserError: if the method diverged at every rate.
        """
        options = self._options
        scores: dict[float, float] = {}
        trials: list[Run] = []
        best: Run | None = None
        model: nn.Module | None = None
        rates = list(grid)
        while rates:
            rate = rates.pop(0)
            trial, trained = self._trial(method, size, rate, options.seeds[0], best)
            trials.append(trial)
            scores[rate] = self._score(trial)
            if best is None or scores[rate] > self._score(best):
                best, model = trial, trained
            further = len(trials) - len(grid)
            if not rates and further < options.lr_refine + options.lr_extend:
                another = next_rate(scores, options.lr_ratio, further < options.lr_refine)
                rates = [] if another is None else [another]
        if best is None or self._score(best) == float("-inf"):
            raise UserError(
                f"The method '{method.name}' diverged at every learning rate of {sorted(scores)}; "
                f"give smaller ones with --learning_rates {method.name}=..."
            )
        return Search(trials, best, model)

    def test(self, method: Method, size: int | None, found: Search) -> list[Run]:
        """The runs of all seeds at the chosen learning rate with their figures on the test split; nothing is saved."""
        if not self._is_tested(method, found.best):
            self._test(method, found.best, found.model or self._restore(method, found.best))
        self._state_file(method).unlink(missing_ok=True)
        return [found.best, *self._repeat_all(method, size, found.best.learning_rate)]

    def _repeat_all(self, method: Method, size: int | None, rate: float) -> list[Run]:
        return [self._repeat(method, size, rate, seed) for seed in self._options.seeds[1:]]

    def _trial(
        self, method: Method, size: int | None, rate: float, seed: int, best: Run | None
    ) -> tuple[Run, nn.Module | None]:
        """A run of the search: found in the ledger, or trained. The weights of the best so far are kept on disk."""
        found = self._find(method, size, rate, seed)
        if found is not None:
            self.progress.advance(self._options.steps or 0)
            return found, None
        model, run = self.train(method, size, rate, seed)
        if best is None or self._score(run) > self._score(best):
            self._keep(method, run, model)
        self.ledger.add(run)
        return run, model

    def _repeat(self, method: Method, size: int | None, rate: float, seed: int) -> Run:
        """A run at the chosen learning rate with another seed."""
        found = self._find(method, size, rate, seed)
        if found is not None and self._is_tested(method, found):
            self.progress.advance(self._options.steps or 0)
            return found
        model, run = self.train(method, size, rate, seed)
        self._test(method, run, model)
        return run

    @staticmethod
    def _is_tested(method: Method, run: Run) -> bool:
        return run.test is not None and not (method.as_lora and run.as_lora is None)

    def _test(self, method: Method, run: Run, model: nn.Module) -> None:
        """The figures of a run on the test split, also as a LoRA where that is shown."""
        run.test = self._task.evaluate(model, "test")
        if method.as_lora:
            run.as_lora = self._as_lora(run, self._whole(method, run.size, run.seed, model))
        self.ledger.add(run)

    def _as_lora(self, run: Run, model: nn.Module) -> dict[str, Any]:
        """The LoRA that a trained model converts to, loaded from its files on a fresh base model."""
        task, began = self._task, time.perf_counter()
        n_samples = CONVERTED_BATCHES * (self._options.batch_size or 1)
        batches = batches_to_start_from(task.train_data, task.collator(run.seed), run.seed, n_samples)
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            # What PEFT says of any LoRA here, see `_lora` in methods.py; and the figure says what the conversion costs.
            warnings.filterwarnings(
                "ignore", message="fan_in_fan_out is set to|.*tie_word_embeddings|.*tied_target_modules"
            )
            warnings.filterwarnings("ignore", message="as a LoRA the adapter has a loss of")
            save_as_lora(folder, model, batches, n_batches=len(batches), show_progress=False)
            seconds = time.perf_counter() - began
            set_seed(run.seed)
            lora = PeftModel.from_pretrained(task.load_base(), folder)
            n_bytes = weight_bytes(Path(folder))
        return {
            "test": task.evaluate(lora, "test"),
            "parameters": sum(weight.numel() for name, weight in lora.named_parameters() if ".lora_" in name),
            "bytes": n_bytes,
            "seconds": seconds,
        }

    def _finish(self, method: Method, found: Search) -> int:
        """Test the best run of the search and save what it trained; returns the bytes of its weights."""
        best, model = found.best, found.model
        folder, kept = self._folder / "adapters" / method.name, self._state_file(method)
        record = folder / RESULT_FILE
        if (
            self._is_tested(method, best)
            and record.exists()
            and json.loads(record.read_text("utf-8"))["run"] == best.key
        ):
            return weight_bytes(folder)
        if model is None:
            model = self._restore(method, best)
        if not self._is_tested(method, best):
            self._test(method, best, model)
        state = trained_state(model)
        if PartialState().is_main_process:
            save_trained(model, state, folder)
            content = finite({"run": best.key, "tuning": best.tuning, "test": best.test})
            record.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            kept.unlink(missing_ok=True)
        PartialState().wait_for_everyone()
        return weight_bytes(folder)

    def _restore(self, method: Method, run: Run) -> nn.Module:
        """The weights of a finished run: from disk, or trained again if they are gone."""
        state = read_state(self._state_file(method), run.key)
        if state is None:
            return self.train(method, run.size, run.learning_rate, run.seed)[0]
        model = self._attach(method, run.size, run.seed)
        put_back(model, state)
        return model

    def _keep(self, method: Method, run: Run, model: nn.Module) -> None:
        state = trained_state(model)
        if PartialState().is_main_process:
            write_state(state, self._state_file(method), run.key)

    def _state_file(self, method: Method) -> Path:
        return self._folder / "unfinished" / f"{method.name}.safetensors"

    def _find(self, method: Method, size: int | None, rate: float, seed: int) -> Run | None:
        placement = self.sizes.placement(method)
        return self.ledger.find(run_key(method.name, size, self._n_nodes(method, size), rate, seed, placement))

    def _n_nodes(self, method: Method, size: int | None) -> int | None:
        return None if method.n_nodes is None else self.sizes.fit(method, size).n_nodes

    def _score(self, run: Run) -> float:
        return self._task.metric.score(run.tuning[self._task.metric.name])

    def _attach(self, method: Method, size: int | None, seed: int) -> nn.Module:
        set_seed(seed)
        base, fit = self._task.load_base(), self.sizes.fit(method, size)
        if method.attach_on_data is None:
            return method.attach(base, fit)
        task = self._task
        batches = batches_to_start_from(task.train_data, task.collator(seed), seed, task.start_samples)
        return method.attach_on_data(base, fit, batches)

    def train(self, method: Method, size: int | None, rate: float, seed: int) -> tuple[nn.Module, Run]:
        """One training run from the base model, with its figures on the tuning split."""
        self.progress.stage(f"{method.name}, learning rate {rate:g}, seed {seed}")
        reset_peak_memory()
        task, options = self._task, self._options
        began, cpu_began = time.perf_counter(), time.process_time()
        model = self._attach(method, size, seed)
        collator = task.collator(seed)
        if method.start is not None:
            output = method.start == "gradient and output"
            start_from_data(model, task.train_data, collator, seed, task.start_samples, output=output)
        start_seconds, start_cpu = time.perf_counter() - began, time.process_time() - cpu_began
        keep_best = None
        if options.eval_steps is not None:
            keep_best = KeepBest(
                options.eval_steps,
                options.patience,
                lambda trained: task.evaluate(trained, "tuning"),
                lambda figures: task.metric.score(figures[task.metric.name]),
            )
        # What a method does in the end is about the output of language models.
        finish = method.finish if task.task_type in LANGUAGE_MODELS else None
        trained = train(
            model,
            task.train_data,
            steps=options.steps or 0,
            learning_rate=rate,
            seed=seed,
            settings=self.settings,
            progress=self.progress,
            name=f"{method.name}-lr{rate:g}-seed{seed}",
            collator=collator,
            loss=task.loss(),
            keep_best=keep_best,
            fixed_rate=self._fixed_rate(model),
            lengths=task.train_lengths,
            faster=method.faster,
            after_step=method.after_step,
            keep_batches=finish is not None,
        )
        elapsed = list(itertools.accumulate(trained.cpu_seconds, initial=start_cpu))
        figures = keep_best.figures if keep_best is not None else None
        finish_seconds = finish_cpu = 0.0
        if finish is not None:
            began, cpu_began = time.perf_counter(), time.process_time()
            model = self._whole(method, size, seed, model)
            finish(model, trained.batches)
            finish_seconds, finish_cpu = time.perf_counter() - began, time.process_time() - cpu_began
            figures = None
        run = Run(
            method=method.name,
            size=size,
            n_nodes=self._n_nodes(method, size),
            learning_rate=rate,
            seed=seed,
            tuning=figures or task.evaluate(model, "tuning"),
            steps=trained.steps,
            best_step=trained.steps if keep_best is None else keep_best.best_step,
            seconds=start_seconds + trained.seconds + finish_seconds,
            step_seconds=trained.step_seconds,
            peak_memory=peak_memory(),
            placement=self.sizes.placement(method) or None,
            trainable=count_trainable(model),
            cpu_seconds=elapsed[-1] + finish_cpu,
            curve=[]
            if keep_best is None
            else [{"step": step, "cpu_seconds": elapsed[step], **at} for step, at in keep_best.curve],
        )
        return model, run

    def _whole(self, method: Method, size: int | None, seed: int, model: nn.Module) -> nn.Module:
        """The same with nothing sharded."""
        if not is_sharded(model):
            return model
        state = trained_state(model)
        whole = self._attach(method, size, seed)
        put_back(whole, state)
        return whole

    def _fixed_rate(self, model: nn.Module) -> tuple[tuple[str, ...], float] | None:
        """The rate of the new modules, unless they are all there is: then the search is about them."""
        rate = self._options.head_learning_rate
        if rate is None or count_trainable(model) == self.sizes.new_parameters:
            return None
        return self._task.new_modules, rate

    def _row_as_lora(self, row: Row, runs: list[Run]) -> Row:
        found = [run.as_lora or {} for run in runs]
        return Row(
            method=f"{row.method}, as LoRA",
            summary="the same adapters, converted",
            test={name: [each["test"][name] for each in found] for name in row.test},
            adapter_parameters=found[0]["parameters"],
            head_parameters=row.head_parameters,
            adapter_bytes=found[0]["bytes"],
            training_seconds=mean(run.seconds + each["seconds"] for run, each in zip(runs, found, strict=True)),
            learning_rate=row.learning_rate,
            source=row.method,
        )

    def _row(self, method: Method, size: int | None, runs: list[Run], found: Search, adapter_bytes: int) -> Row:
        task, trials = self._task, found.trials
        units_per_step = (self._options.batch_size or 0) * task.units_per_sample
        peaks = [run.peak_memory for run in runs if run.peak_memory is not None]
        return Row(
            method=method.name,
            summary=method.summary,
            test={metric.name: [run.test[metric.name] for run in runs if run.test] for metric in task.metrics},
            adapter_parameters=self.sizes.count(method, size),
            head_parameters=self.sizes.new_parameters,
            size={} if method.size_name is None or size is None else {method.size_name: size},
            n_nodes=self._n_nodes(method, size),
            adapter_bytes=adapter_bytes,
            units_per_second=units_per_step / median(run.step_seconds for run in [*trials, *runs[1:]]),
            training_seconds=mean(run.seconds for run in runs),
            peak_memory=max(peaks, default=None),
            learning_rate=runs[0].learning_rate,
            at_grid_edge=found.at_edge,
            trials=[
                {"learning_rate": trial.learning_rate, **trial.tuning}
                for trial in sorted(trials, key=lambda trial: trial.learning_rate)
            ],
            steps=[{"seed": run.seed, "taken": run.steps, "kept": run.best_step} for run in runs],
        )


def open_protocol(
    task: Task, options: ComparisonArguments, folder: Path, report_to: Sequence[str] = ("none",)
) -> Protocol:
    """The protocol whose finished runs lie in a folder, which is made if it is not there."""
    make_folder(folder)
    shared = without_places({**task.settings(), **{name: getattr(options, name) for name in SHARED}})
    ledger = Ledger(folder, shared, PartialState().is_main_process)
    protocol = Protocol(task, options, folder, Sizes(task, options.n_nodes, options.steps), ledger)
    protocol.shared = shared
    protocol.settings = TrainSettings(
        batch_size=options.batch_size or 1,
        output_dir=folder,
        accumulation=options.gradient_accumulation_steps,
        warmup_ratio=options.warmup_ratio,
        weight_decay=options.weight_decay,
        bf16=options.bf16,
        report_to=tuple(report_to),
    )
    _ = protocol.settings.per_device  # refuses a batch that cannot be divided, before any work is done
    return protocol


def run_comparison(task: Task, options: ComparisonArguments, run: RunArguments, began: float) -> None:
    """The whole comparison, resumed where an earlier start of it was interrupted.

    Args:
        task: what is compared on.
        options: with steps, batch_size and lr_trials filled in.
        run: where the results go.
        began: `time.perf_counter()` at the start of the script.
    """
    state = PartialState()
    folder = Path(run.output_dir)
    make_folder(folder)
    methods = select_methods(options.methods, task.task_type, task.empty_model())
    if task.task_type == "MASKED_LM":  # its output head is a block, beside which no LoRA can stand
        methods = [replace(method, as_lora=False) for method in methods]
    if run.push_to_hub and not any(method.size_name for method in methods):
        raise UserError(
            "--push_to_hub sends the best adapter, and none of the chosen methods has one; add lora or lreg."
        )
    grids = learning_rate_grids(methods, options.lr_trials or 1, options.lr_ratio, task.rates, options.learning_rates)
    protocol = open_protocol(task, options, folder, run.report_to)
    sizes, ledger = protocol.sizes, protocol.ledger
    budget = options.budget or sizes.default_budget()
    chosen = sizes.choose(methods, budget, given_sizes(options.sizes))
    runs_per_method = (options.lr_trials or 1) + len(options.seeds) - 1
    total = task.base_steps + len(methods) * runs_per_method * (options.steps or 0)
    protocol.progress = progress = Progress(total, state.is_main_process, run.progress)
    report = Report(
        title=task.title,
        metrics=task.metrics,
        unit=task.unit,
        budget=budget,
        references=task.references(),
        rows=[],
        data=task.describe(),
        settings=without_places(
            {**protocol.shared, **asdict(options), "methods": [m.name for m in methods], "grids": grids}
        ),
        provenance=provenance(task.script, options.bf16),
    )
    progress.say(report.opening(chosen, grids))
    if ledger.n_found:
        progress.say(f"Resuming: {ledger.n_found} finished runs found in {folder}.")
        report.provenance["runs found finished"] = ledger.n_found
    figures = base_figures(task, protocol, ledger, options.seeds[0])
    if figures:
        report.rows.append(
            Row("base", "the model every method starts from", {name: [figures[name]] for name in figures})
        )
        progress.say(report.last_row())
    for method in methods:
        for row in protocol.run(method, chosen[method.name], grids[method.name]):
            report.rows.append(row)
            progress.say(report.last_row())
        report.provenance["wall time in seconds"] = round(time.perf_counter() - began, 1)
        if state.is_main_process:
            report.write_json(folder)  # now and not at the end: an interruption keeps what is finished
    progress.close()
    if state.is_main_process:
        report.write_markdown(folder)
        write_picture(report, folder)
        print(report.closing(folder))
        if run.push_to_hub:
            print(f"Sent to {push_adapter(report, folder / 'adapters', run.push_to_hub, run.hub_private)}")
    state.wait_for_everyone()


def base_figures(task: Task, protocol: Protocol, ledger: Ledger, seed: int) -> dict[str, float]:
    """The base stage and what it reached on the test split, unless an earlier start has done that."""
    if ledger.base is not None:
        protocol.progress.advance(task.base_steps)
        return ledger.base["test"]

    def base_stage(model: nn.Module, samples: Sequence[dict[str, Any]], learning_rate: float) -> None:
        train(
            model,
            samples,
            steps=task.base_steps,
            learning_rate=learning_rate,
            seed=seed,
            settings=protocol.settings,
            progress=protocol.progress,
            name="base",
            collator=task.collator(seed),
            loss=task.loss(),
        )

    protocol.progress.stage("base stage")
    set_seed(seed)
    task.make_base(base_stage)
    PartialState().wait_for_everyone()
    figures = task.evaluate(task.load_base(), "test") if task.has_base_row else {}
    ledger.add_base(figures)
    return figures


def run_script(compare: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Run a comparison; a mistake in the command or its input is one sentence and exit code 2."""
    # PEFT 0.21 asks for this property whenever it wraps a model; nothing the user of the examples could change.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        compare(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        if start_processes().is_main_process:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
