"""The comparison: base model, one method after the other, the files after each of them."""

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

from accelerate import PartialState
from accelerate.utils import set_seed
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

from examples.comparison.environment import peak_memory, provenance, without_places
from examples.comparison.methods import METHODS, Method, quiet_about_lora, select_methods
from examples.comparison.options import UserError
from examples.comparison.picture import draw_comparison
from examples.comparison.report import Report, Row
from examples.comparison.sizes import Sizes, count_trainable, given_sizes, learning_rate_grids
from examples.comparison.task import LANGUAGE_MODELS, Task
from examples.comparison.training import Progress, Settings, batches_to_start_from, put_back, train
from lreg_peft import save_as_lora

#: Options that every run of a folder shares. Methods, sizes, rates and seeds may change between two starts.
SHARED = ("steps", "batch_size", "gradient_accumulation_steps", "bf16")
CONVERTED_BATCHES = 16  # of the task's size, that a conversion to LoRA is fitted on
LEDGER_FILE = "runs.jsonl"


@dataclass
class Run:
    """One training run and what came of it.

    Attributes:
        method: its name.
        size: rank, number of components or parameters; None without one.
        n_nodes: nodes per component; None without a mesh.
        learning_rate: its peak.
        seed: of order of the data and start.
        tuning: all metrics on the tuning split.
        seconds: of the training, with a start from data, without evaluation.
        cpu_seconds: the same as processor time.
        step_seconds: median of a step.
        peak_memory: bytes, see `environment.peak_memory`.
        trainable: parameters that were trained, new modules included.
        test: all metrics on the test split, None unless this run is one of those reported.
        as_lora: of the LoRA that it was converted to: figures on the test split, parameters, bytes, seconds to convert.
        extra: what else a study has seen.
    """

    method: str
    size: int | None
    n_nodes: int | None
    learning_rate: float
    seed: int
    tuning: dict[str, float]
    seconds: float
    cpu_seconds: float
    step_seconds: float
    peak_memory: int | None
    trainable: int
    test: dict[str, float] | None = None
    as_lora: dict[str, Any] | None = None
    extra: Any = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it this run and no other, under the settings of the ledger."""
        return self.method, self.size, self.n_nodes, self.learning_rate, self.seed


class Ledger:
    """The finished runs, a line of JSON each after one with the settings that all share: what an interruption leaves.

    Args:
        folder: where it lies.
        settings: everything that moves a figure and is the same for all runs.

    Raises:
        UserError: if the folder holds runs under other settings, with the name of the first one that differs, or
            something else.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._path, self._is_main = folder / LEDGER_FILE, PartialState().is_main_process
        #: Figures of the base model, once it is complete.
        self.base: dict[str, float] | None = None
        self.runs: dict[tuple[Any, ...], Run] = {}
        settings = json.loads(json.dumps(settings))  # what it looks like when it is read back
        lines = self._lines()
        self._head = [] if lines else [{"settings": settings}]
        if not lines:
            return
        old = lines[0]["settings"]
        for name in [*settings, *old]:
            if old.get(name) != settings.get(name):
                was, now = (json.dumps(each.get(name), ensure_ascii=False) for each in (old, settings))
                raise UserError(
                    f"The folder '{folder}' holds runs with {name} {was}, and this command has {name} {now}; give "
                    "another --output_dir, or delete that folder."
                )
        for line in lines[1:]:
            if "base" in line:
                self.base = line["base"]
            else:
                run = Run(**line["run"])
                self.runs[run.key] = run

    def _lines(self) -> list[dict[str, Any]]:
        # What follows the last line end was cut off in the middle of writing, perhaps in the middle of a character.
        content = self._path.read_bytes() if self._path.exists() else b""
        complete, end, torn = content.rpartition(b"\n")
        if torn and self._is_main:
            os.truncate(self._path, len(complete) + len(end))
        try:
            lines = [json.loads(line) for line in complete.split(b"\n") if line]
            if lines and "settings" not in lines[0]:
                raise ValueError("its first line holds no settings")
            return lines
        except (TypeError, ValueError) as error:
            raise UserError(
                f"The file '{self._path}' is damaged ({error}); delete it to start anew, or the line to lose one run."
            ) from error

    def add(self, run: Run) -> None:
        """Write a finished run; the same run again, now with its test figures, replaces the earlier line."""
        self.runs[run.key] = run
        self._write({"run": asdict(run)})

    def add_base(self, figures: dict[str, float]) -> None:
        """Write that the base model is complete, and its test figures where they mean something."""
        self.base = figures
        self._write({"base": figures})

    def _write(self, line: dict[str, Any]) -> None:
        if self._is_main:
            with self._path.open("ab") as file:
                file.write("".join(json.dumps(each) + "\n" for each in [*self._head, line]).encode())
                file.flush()
                os.fsync(file.fileno())
            self._head = []


@dataclass
class Search:
    """What the search for a learning rate found: all runs in their order, the best, and its model if it is at hand."""

    trials: list[Run]
    best: Run
    model: nn.Module | None

    @property
    def at_edge(self) -> bool:
        """Whether a wider grid might do better."""
        rates = [trial.learning_rate for trial in self.trials]
        return len(rates) > 1 and self.best.learning_rate in (min(rates), max(rates))


class Protocol:
    """What all runs share. One method at a time goes through `run`, or through `search` and `test`.

    Args:
        task: what is compared on.
        args: the options, with steps and batch_size filled in.
        folder: where the finished runs lie.
    """

    make_sizes = Sizes

    def __init__(self, task: Task, args: argparse.Namespace, folder: Path) -> None:
        self._task, self._args, self._folder = task, args, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.sizes = self.make_sizes(task, args.n_nodes, args.steps)
        self.shared = without_places({**task.settings(), **{name: getattr(args, name) for name in SHARED}})
        self.settings = Settings(args.batch_size, folder, args.gradient_accumulation_steps, args.bf16)
        _ = self.settings.per_device  # refuses a batch that cannot be divided, before any work is done
        self.ledger = Ledger(folder, self.shared)
        self.progress: Progress

    def base(self) -> dict[str, float]:
        """The base stage and what it reached on the test split, unless an earlier start has done that."""
        task, seed = self._task, self._args.seeds[0]
        if self.ledger.base is not None:
            self.progress.advance(task.base_steps)
            return self.ledger.base

        def base_stage(model: nn.Module, samples: Sequence[dict[str, Any]], rate: float) -> nn.Module:
            options: dict[str, Any] = {"steps": task.base_steps, "learning_rate": rate, "seed": seed}
            trained = train(model, task, self.settings, self.progress, samples=samples, **options)
            return model if trained.state is None else put_back(type(model)(model.config), trained.state)

        self.progress.stage("base stage")
        set_seed(seed)
        task.make_base(base_stage)
        PartialState().wait_for_everyone()
        self.ledger.add_base(task.evaluate(task.load_base(), "test") if task.has_base_row else {})
        return self.ledger.base or {}

    def run(self, method: Method, size: int | None, grid: list[float]) -> list[Row]:
        """Choose the learning rate on the tuning split with the first seed, then test every seed with it.

        Returns:
            The method's row, and that of the LoRA it converts to where that is shown.
        """
        found = self.search(method, size, grid)
        runs = self.test(method, found, self._folder / "adapters" / method.name)
        row = self._row(method, size, runs, found)
        return [row, self._row_as_lora(row, runs)] if method.as_lora else [row]

    def search(
        self,
        method: Method,
        size: int | None,
        grid: list[float],
        further: Callable[[Mapping[float, float], int], float | None] = lambda scores, n_trials: None,
    ) -> Search:
        """Choose the learning rate on the tuning split with the first seed.

        Args:
            method: to search for.
            size: of it.
            grid: the rates to try.
            further: (rate -> score, higher is better; how many) -> another rate to try, or None.

        Raises:
            UserError: if the method diverged at every rate.
        """
        scores: dict[float, float] = {}
        trials: list[Run] = []
        best, model, pending = None, None, list(grid)
        while pending:
            rate = pending.pop(0)
            trial, trained = self._found_or_trained(method, size, rate, self._args.seeds[0])
            trials.append(trial)
            scores[rate] = self._score(trial)
            if best is None or scores[rate] > self._score(best):
                best, model = trial, trained
            another = None if pending else further(scores, len(trials))
            pending += [] if another is None else [another]
        if best is None or self._score(best) == float("-inf"):
            raise UserError(
                f"The method '{method.name}' diverged at every learning rate of {sorted(scores)}; "
                f"give smaller ones with --learning_rates {method.name}=..."
            )
        return Search(trials, best, model)

    def test(self, method: Method, found: Search, save_to: Path | None = None) -> list[Run]:
        """The runs of all seeds at the chosen learning rate with their test figures; the first one is saved."""
        best, runs = found.best, []
        for seed in self._args.seeds:
            is_first = seed == self._args.seeds[0]
            key = (best.method, best.size, best.n_nodes, best.learning_rate, seed)
            run, model = (best, found.model) if is_first else (self.ledger.runs.get(key), None)
            if run is not None and run.test is not None and (run.as_lora or not method.as_lora):
                self.progress.advance(0 if is_first else self._args.steps)
                runs.append(run)
                continue
            if model is None:  # another seed, or an earlier start was interrupted between training and test
                model, trained = self.train(method, best.size, best.learning_rate, seed)
                run = run or trained
            assert run is not None
            if is_first and save_to is not None:
                save_trained(model, save_to)
            run.test = self._task.evaluate(model, "test")
            if method.as_lora:
                run.as_lora = self._as_lora(run, model)
            self.ledger.add(run)
            runs.append(run)
        return runs

    def _found_or_trained(
        self, method: Method, size: int | None, rate: float, seed: int
    ) -> tuple[Run, nn.Module | None]:
        found = self.ledger.runs.get((method.name, size, self.sizes.nodes(method), rate, seed))
        if found is not None:
            self.progress.advance(self._args.steps)
            return found, None
        model, run = self.train(method, size, rate, seed)
        self.ledger.add(run)
        return run, model

    def _score(self, run: Run) -> float:
        return self._task.metric_score(run.tuning)

    def attach(self, method: Method, size: int | None, seed: int, with_start: bool = True) -> nn.Module:
        """The model of a run before its training."""
        set_seed(seed)
        base, fit = self._task.load_base(), self.sizes.fit(method, size, seed)
        start = batches_to_start_from(self._task, seed, self._task.start_samples) if with_start else None
        return method.attach(base, fit, start)

    def train(self, method: Method, size: int | None, rate: float, seed: int) -> tuple[nn.Module, Run]:
        """One training run from the base model, with its figures on the tuning split."""
        task, args = self._task, self._args
        self.progress.stage(f"{method.name}, learning rate {rate:g}, seed {seed}")
        peak_memory(reset=True)
        began, cpu_began = time.perf_counter(), time.process_time()
        model = self.attach(method, size, seed)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        seen: dict[str, Any] = {"start_cpu_seconds": cpu_seconds}
        options: dict[str, Any] = {"steps": args.steps, "learning_rate": rate, "seed": seed}
        customize = self.customize(method, seen)
        trained = train(model, task, self.settings, self.progress, customize=customize, **options)
        seconds, cpu_seconds = seconds + trained.seconds, cpu_seconds + sum(trained.cpu_seconds)
        if trained.state is not None:
            model = put_back(self.attach(method, size, seed, with_start=False), trained.state)
        n_trained = count_trainable(model)
        began, cpu_began = time.perf_counter(), time.process_time()
        # What a method does in the end is about the output of language models.
        if method.finish is not None and task.task_type in LANGUAGE_MODELS:
            method.finish(model, trained.batches)
        run = Run(
            method=method.name,
            size=size,
            n_nodes=self.sizes.nodes(method),
            learning_rate=rate,
            seed=seed,
            tuning={},
            seconds=seconds + time.perf_counter() - began,
            cpu_seconds=cpu_seconds + time.process_time() - cpu_began,
            step_seconds=trained.step_seconds,
            peak_memory=peak_memory(),
            trainable=n_trained,
            extra=seen.get("curve"),
        )
        run.tuning = task.evaluate(model, "tuning")
        return model, run

    def customize(self, method: Method, seen: dict[str, Any]) -> Callable[[Any], None] | None:
        """What is done to the Trainer of a run; a study adds to it and leaves what it saw in `seen`."""
        return method.customize

    def _as_lora(self, run: Run, model: nn.Module) -> dict[str, Any]:
        """The LoRA that a trained model converts to, loaded from its files on a fresh base model."""
        task, began = self._task, time.perf_counter()
        batches = batches_to_start_from(task, run.seed, CONVERTED_BATCHES * self._args.batch_size)
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            quiet_about_lora()
            warnings.filterwarnings("ignore", message="as a LoRA the adapter has a loss of")  # the figure says it
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

    def _row(self, method: Method, size: int | None, runs: list[Run], found: Search) -> Row:
        task = self._task
        units_per_step = self._args.batch_size * task.units_per_sample
        trials = sorted(found.trials, key=lambda trial: trial.learning_rate)
        return Row(
            method=method.name,
            summary=method.summary,
            test={metric.name: [run.test[metric.name] for run in runs if run.test] for metric in task.metrics},
            adapter_parameters=self.sizes.count(method, size),
            head_parameters=self.sizes.new_parameters,
            size={} if method.size_name is None or size is None else {method.size_name: size},
            n_nodes=self.sizes.nodes(method),
            adapter_bytes=weight_bytes(self._folder / "adapters" / method.name),
            units_per_second=units_per_step / median(run.step_seconds for run in [*trials, *runs[1:]]),
            training_seconds=mean(run.seconds for run in runs),
            peak_memory=max((run.peak_memory for run in runs if run.peak_memory is not None), default=None),
            learning_rate=found.best.learning_rate,
            at_grid_edge=found.at_edge,
            trials=[{"learning_rate": trial.learning_rate, **trial.tuning} for trial in trials],
        )


def save_trained(model: nn.Module, folder: Path) -> None:
    """Save what was trained and nothing else, once.

    PEFT adapters and the fully fine-tuned model are saved as such; BitFit and the other parts of a model have no format
    of their own, so their parameters go into trained.safetensors under their names.
    """
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(model, PeftModel):
            # Without the output embedding, which PEFT would add to an adapter on the head: it is the base model's.
            model.save_pretrained(folder, save_embedding_layers=False)
        elif all(parameter.requires_grad for parameter in model.parameters()):
            model.save_pretrained(folder)  # type: ignore[operator]
        else:
            trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
            save_file(trained, folder / "trained.safetensors")
    PartialState().wait_for_everyone()


def weight_bytes(folder: Path) -> int:
    """Size of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def run_comparison(task: Task, args: argparse.Namespace, began: float, known: Mapping[str, Method] = METHODS) -> None:
    """The whole comparison, resumed where an earlier start of it was interrupted.

    Args:
        task: what is compared on.
        args: the options, with steps, batch_size and lr_trials filled in.
        began: `time.perf_counter()` at the start of the script.
        known: methods to choose from.
    """
    # PEFT 0.21 asks for this property whenever it wraps a model; nothing the user of the examples could change.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    folder = Path(args.output_dir)
    has_bias = any(name.endswith("bias") for name, _ in task.empty_model().named_parameters())
    methods = select_methods(args.methods, task.task_type, has_bias, known)
    grids = learning_rate_grids(methods, task, args.lr_trials, args.lr_ratio, args.learning_rates)
    protocol = Protocol(task, args, folder)
    budget = args.budget or protocol.sizes.default_budget(list(known.values()))
    chosen = protocol.sizes.choose(methods, budget, given_sizes(args.sizes, methods))
    n_runs = len(methods) * (args.lr_trials + len(args.seeds) - 1)
    protocol.progress = progress = Progress(task.base_steps + n_runs * args.steps, not args.no_progress)
    report = Report(
        title=task.title,
        metrics=task.metrics,
        unit=task.unit,
        budget=budget,
        references=task.references(),
        rows=[],
        data=task.describe(),
        settings=without_places(
            {**protocol.shared, **vars(args), "methods": [method.name for method in methods], "grids": grids}
        ),
        provenance=provenance(task.script, args.bf16),
    )
    progress.say(report.opening(chosen))
    if protocol.ledger.runs:
        progress.say(f"Resuming: {len(protocol.ledger.runs)} finished runs found in {folder}.")
        report.provenance["runs found finished"] = len(protocol.ledger.runs)
    if base := protocol.base():
        report.add(Row("base", "the model every method starts from", {name: [base[name]] for name in base}), progress)
    for method in methods:
        for row in protocol.run(method, chosen[method.name], grids[method.name]):
            report.add(row, progress)
        report.provenance["wall time in seconds"] = round(time.perf_counter() - began, 1)
        if PartialState().is_main_process:
            report.write_json(folder)  # now and not at the end: an interruption keeps what is finished
    progress.close()
    if PartialState().is_main_process:
        report.write_markdown(folder)
        draw_comparison(report.content(), folder / "results.png")
        print(f"\n{report.table()}\n\n{report.notes()}\n\nWritten to {folder}.")
    PartialState().wait_for_everyone()
