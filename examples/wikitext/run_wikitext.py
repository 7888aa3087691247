"""Adapt one causal language model to a new domain by several methods, under the same conditions, and compare them.

    accelerate launch examples/wikitext/run_wikitext.py

With no arguments nothing is downloaded: a small GPT-2 with a tokenizer of its own is trained on the docstrings of the
standard library (the base stage), then every method starts from that checkpoint and adapts it to the language
reference in `pydoc_data.topics`. Other ways to run it:

    run_wikitext.py --smoke                                                         everything, very small (CI)
    run_wikitext.py --methods lora lreg-mlp --seeds 42 43 44                        some methods, several seeds
    run_wikitext.py --budget 20000 --dof 4                                          another parameter budget
    run_wikitext.py --train_file a.txt --validation_file b.txt [--test_file c.txt]  your text
    run_wikitext.py --model_name_or_path gpt2 --dataset_name Salesforce/wikitext \
        --dataset_config_name wikitext-2-raw-v1 --block_size 512                    model and text from the hub
    run_wikitext.py --model_name_or_path path/to/model --base_steps 200             200 steps of full fine-tuning
                                                                                    before the methods start
    torchrun --nproc_per_node 2 run_wikitext.py                                     two CPU processes

The protocol, the same for every method: the same base checkpoint, data order, batch size, number of steps and
schedule; a learning rate chosen on a tuning split from a grid of the same size; the figure in the table is the
perplexity over the whole held-out test split, which nothing was chosen on. LReg trains with the frozen backbone in eval
mode, so dropout is switched off for all methods: the comparison is not about dropout.

Written to `--output_dir`: the table (results.json, results.md), a picture (perplexity.png), the base checkpoint (base/)
and what each method trained (adapters/).
"""

import os

# Read when torch loads OpenMP. Its threads otherwise spin while they wait, and where other programs want the same cores
# that makes a small model many times slower (measured on two busy cores: 108 s against 12 s for a small run).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import platform
import shlex
import sys
import time
import warnings
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import set_seed
from arguments import MAX_THREADS, Arguments, parse_arguments
from base_model import base_config, load_base, prepare_base, prepare_tokenizer
from data import encode, evaluation_batches, load_corpus, training_blocks, unigram_perplexity
from errors import UserError
from methods import (
    Method,
    count_trainable,
    default_budget,
    fit_sizes,
    learning_rate_grids,
    save_trained,
    select_methods,
)
from report import Report, Row, versions
from torch import nn
from training import Progress, TrainSettings, perplexity, start_processes, train


class Protocol:
    """What all runs share: base checkpoint, text in tokens, conditions. One method at a time goes through `run`."""

    def __init__(
        self,
        arguments: Arguments,
        base_dir: Path,
        tokens: dict[str, torch.Tensor],
        settings: TrainSettings,
        progress: Progress,
    ) -> None:
        self._arguments = arguments
        self._base_dir = base_dir
        self.settings = settings
        self._progress = progress
        block_size, batch_size = arguments.data.block_size, arguments.comparison.batch_size
        self._blocks = training_blocks(tokens["train"], block_size, "training")
        self._tuning = evaluation_batches(tokens["tuning"], block_size, batch_size)
        self._test = evaluation_batches(tokens["test"], block_size, batch_size)

    def base_row(self) -> Row:
        """The base checkpoint as it is."""
        reached = perplexity(load_base(self._base_dir), self._test)
        return Row("base", "the checkpoint every method starts from", 0, [reached])

    def run(self, method: Method, size: int | None, grid: list[float], adapters_dir: Path) -> Row:
        """Choose the learning rate on the tuning split with the first seed, then test every seed with it."""
        first_seed, *other_seeds = self._arguments.comparison.seeds
        trials, durations = [], []
        best: nn.Module | None = None
        best_perplexity, best_rate = float("inf"), grid[0]
        for rate in grid:
            model, seconds = self._train(method, size, rate, first_seed)
            durations += seconds
            reached = perplexity(model, self._tuning)
            trials.append({"learning_rate": rate, "tuning_perplexity": reached})
            if reached < best_perplexity:
                best, best_perplexity, best_rate = model, reached, rate
        if best is None:
            raise UserError(
                f"The method '{method.name}' diverged at every learning rate of {grid}; "
                f"give smaller ones with --learning_rates {method.name}=..."
            )
        test = [perplexity(best, self._test)]
        for seed in other_seeds:
            model, seconds = self._train(method, size, best_rate, seed)
            durations += seconds
            test.append(perplexity(model, self._test))

        tokens_per_step = self.settings.batch_size * self._arguments.data.block_size
        row = Row(
            method=method.name,
            summary=method.summary,
            trainable_parameters=count_trainable(best),
            test_perplexities=test,
            size={} if method.size_name is None or size is None else {method.size_name: size},
            tokens_per_second=tokens_per_step / median(durations),
            learning_rate=best_rate,
            at_grid_edge=len(grid) > 1 and best_rate in (grid[0], grid[-1]),
            trials=trials,
        )
        if PartialState().is_main_process:
            row.adapter_bytes = save_trained(best, adapters_dir / method.name)
        return row

    def _train(self, method: Method, size: int | None, rate: float, seed: int) -> tuple[nn.Module, list[float]]:
        """One training run from the base checkpoint: the trained model and the seconds of every step."""
        self._progress.stage(f"{method.name}, learning rate {rate:g}, seed {seed}")
        set_seed(seed)
        model = method.attach(load_base(self._base_dir), size or 1, self._arguments.comparison.dof)
        seconds = train(
            model,
            self._blocks,
            steps=self._arguments.comparison.steps,
            learning_rate=rate,
            seed=seed,
            settings=self.settings,
            progress=self._progress,
        )
        return model, seconds


def compare(arguments: Arguments) -> None:
    """The whole comparison: text, base checkpoint, every method, and the files after each of them."""
    started = time.perf_counter()
    state = start_processes()
    set_threads(arguments.run.num_threads)
    comparison = arguments.comparison
    from_nothing = arguments.model.model_name_or_path is None
    methods = select_methods(comparison.methods)
    grids = learning_rate_grids(
        methods, comparison.lr_trials, comparison.lr_ratio, not from_nothing, comparison.learning_rates
    )
    corpus = load_corpus(arguments.data, needs_base_text=from_nothing, max_base_chars=arguments.scale.max_base_chars)
    output_dir = Path(arguments.run.output_dir)
    base_dir = output_dir / "base"
    make_folder(output_dir)
    tokenizer = prepare_tokenizer(arguments, corpus, base_dir)
    config = base_config(arguments, tokenizer)
    budget = comparison.budget or default_budget(config, comparison.dof)
    sizes = fit_sizes(methods, config, budget, comparison.dof)

    tokens = {name: encode(tokenizer, getattr(corpus, name)) for name in ("train", "tuning", "test")}
    runs_per_method = comparison.lr_trials + len(comparison.seeds) - 1
    progress = Progress(
        total_steps=arguments.model.base_steps + len(methods) * runs_per_method * comparison.steps,
        is_main=state.is_main_process,
        enabled=arguments.run.progress,
    )
    protocol = Protocol(arguments, base_dir, tokens, TrainSettings(comparison.batch_size, output_dir), progress)
    report = Report(
        source=corpus.source,
        budget=budget,
        unigram_perplexity=unigram_perplexity(tokens["train"], tokens["test"], len(tokenizer)),
        rows=[],
        text=corpus.describe(),
        tokens={name: len(ids) for name, ids in tokens.items()},
        settings={**asdict(arguments), "learning_rate_grids": grids},
        provenance=provenance(),
    )
    progress.say(report.opening(sizes, grids))
    prepare_base(arguments, config, corpus, tokenizer, base_dir, protocol.settings, progress)
    report.rows.append(protocol.base_row())
    progress.say(report.last_row())
    for method in methods:
        report.rows.append(protocol.run(method, sizes[method.name], grids[method.name], output_dir / "adapters"))
        report.provenance["wall time in seconds"] = round(time.perf_counter() - started, 1)
        progress.say(report.last_row())
        if state.is_main_process:
            report.write_json(output_dir)  # now and not at the end: an interruption keeps what is finished
    progress.close()
    if state.is_main_process:
        report.write_markdown(output_dir)
        report.write_picture(output_dir)
        print(report.closing(output_dir))
    state.wait_for_everyone()


def set_threads(n_threads: int | None) -> None:
    """Use all usable cores: `accelerate launch` sets one thread per process unless told otherwise."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, usable // PartialState().num_processes)
    torch.set_num_threads(n_threads or min(share, MAX_THREADS))


def make_folder(path: Path) -> None:
    """The output folder, or one sentence why it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The output folder '{path}' cannot be created: {error.strerror}.") from error


def provenance() -> dict[str, Any]:
    """Command, machine and versions: what one needs to run this again and to judge the speed."""
    state = PartialState()
    on_cpu = state.device.type == "cpu"
    return {
        "command": shlex.join(["run_wikitext.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": platform.machine() + " CPU" if on_cpu else torch.cuda.get_device_name(state.device),
        "cores of the machine": os.cpu_count(),
        "threads per process": torch.get_num_threads(),
        "processes": state.num_processes,
        "dtype": "float32",
        "versions": versions(),
    }


def main(argv: list[str] | None = None) -> None:
    """Run the comparison; a mistake in the command or its input is one sentence and exit code 2."""
    # PEFT 0.21 asks for this property whenever it wraps a model; nothing the user of the example could change.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        compare(parse_arguments(argv))
    except UserError as error:
        if start_processes().is_main_process:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
