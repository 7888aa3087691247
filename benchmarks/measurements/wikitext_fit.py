"""A certified fit of the shortcut on a language model's head, beside AdamW and beside a vocabulary bias.

    python -m benchmarks.measurements.wikitext_fit --model MODEL --train_file TRAIN --test_file TEST --output_dir OUT
        [--train_tokens 8192] [--ridges 1e-4 3e-5 1e-5]

A language model of the GPT-2 family meets a new text. Blocks of tokens spread evenly over the training file are read
once; what the head sees of them is kept, nine tenths to fit and one tenth to choose by. Then

- the vocabulary-bias control, one number per token added to the logits, is fitted to its own certified optimum;
- the LReg shortcut on the head is fitted to its certified optimum, from principal components and quantile meshes. It
  contains the bias: the hat functions of a component sum to one;
- AdamW trains the coefficients of the same shortcut from the same start on the same objective, at the rate of the grid
  that reaches the lowest objective, and at that rate once more together with the projection.

Objective: mean cross-entropy of the next token + ridge/2 |c|^2. The ridge is the best of a grid on the tenth, chosen
for bias and shortcut apart, the largest first and each fit going on from the one before; AdamW gets that of the
shortcut. Perplexities are on blocks spread evenly over the test file. Seconds are CPU seconds of one thread.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks.measurements.head_training import (
    StoredRows,
    adapter_state,
    penalty,
    provenance,
    restore,
    save,
    score,
    train,
)
from lreg_peft import LRegConfig, fit_coefficients, initialize_lreg_weights
from lreg_peft.core import Chunk, Solution, solve_cross_entropy
from lreg_peft.fitting.output_layer import find_output_layer
from lreg_peft.fitting.problem import CoefficientFit

ROWS = 256
COLUMNS = {
    "parameters": ",",
    "ridge": "g",
    "objective": ".5f",
    "gap": ".1e",
    "passes": "d",
    "seconds": ".0f",
    "test": ".2f",
}
SETTINGS = (
    "train_tokens",
    "test_tokens",
    "block_size",
    "components",
    "n_nodes",
    "ridges",
    "epochs",
    "rates",
    "tolerance",
)


@dataclass(frozen=True)
class Best:
    """A fit that was chosen by its loss on the tenth."""

    tuning: float
    figures: dict[str, Any]
    state: Any


class Comparison:
    """Rows of one model, and everything that is fitted to them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(arguments.model)
        config = LRegConfig(
            task_type="CAUSAL_LM",
            target_modules=["lm_head"],
            n_components=arguments.components,
            n_nodes=arguments.n_nodes,
        )
        self.model: nn.Module = get_peft_model(base, config)
        self.output = find_output_layer(self.model)
        self.layer, self.name = self.output.layer, self.output.adapter_name
        blocks = self._blocks(tokenizer, arguments.train_file, arguments.train_tokens)
        held = torch.arange(len(blocks)) % 10 == 9
        batch = {"input_ids": blocks[~held], "labels": blocks[~held]}
        initialize_lreg_weights(self.model, [batch], method="pca", show_progress=False)
        self.start = adapter_state(self.layer, self.name)
        self.train, self.tuning = self._rows(blocks[~held]), self._rows(blocks[held])
        self.test = self._rows(self._blocks(tokenizer, arguments.test_file, arguments.test_tokens))
        self.results: list[dict[str, Any]] = []

    def _blocks(self, tokenizer: Any, path: Path, tokens: int) -> Tensor:
        """Blocks `[n, block_size]` spread evenly over a file."""
        ids = torch.tensor(tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"])
        size = self.arguments.block_size
        blocks = ids[: len(ids) // size * size].view(-1, size)
        wanted = min(max(10, tokens // size), len(blocks))
        return blocks[torch.linspace(0, len(blocks) - 1, wanted).long()]

    def _rows(self, blocks: Tensor) -> StoredRows:
        parts = [self.output.rows({"input_ids": part, "labels": part}) for part in blocks.split(16)]
        return StoredRows(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def add(self, method: str, *, tuning: float, test: float, **more: Any) -> None:
        """One line of the table, from losses."""
        row = {"method": method, "tuning": math.exp(tuning), "test": math.exp(test), **more}
        self.results.append(row)
        print(row, flush=True)

    def base(self) -> None:
        """The model as it comes."""
        restore(self.layer, self.name, self.start)
        self.add("base model", tuning=self._loss(self.tuning), test=self._loss(self.test))

    def bias(self) -> None:
        """The control."""
        c = torch.zeros(1, self.layer.out_features)

        def fit_at(ridge: float) -> tuple[Solution, float, Tensor]:
            nonlocal c
            fit = solve_cross_entropy(self._bias_chunks, c, ridge=ridge, tolerance=self.arguments.tolerance)
            c = fit.coefficients  # the next ridge starts here
            return fit, self._bias_loss(self.tuning, c), c

        best = self._best(fit_at)
        self.add(
            "vocabulary bias, certified",
            tuning=best.tuning,
            test=self._bias_loss(self.test, best.state),
            **best.figures,
            parameters=c.numel(),
        )

    def fit(self) -> float:
        """The shortcut; returns its ridge."""
        restore(self.layer, self.name, self.start)

        def fit_at(ridge: float) -> tuple[CoefficientFit, float, dict[str, Tensor]]:
            options = {"tolerance": self.arguments.tolerance, "show_progress": False}
            fit = fit_coefficients(self.model, self.train, ridge=ridge, **options)
            return fit, self._loss(self.tuning), adapter_state(self.layer, self.name)

        best = self._best(fit_at)
        restore(self.layer, self.name, best.state)
        test = self._loss(self.test)
        self.add("LReg on the head, certified", tuning=best.tuning, test=test, **best.figures, **self._parameters())
        return best.figures["ridge"]

    def _best(self, fit_at: Callable[[float], tuple[Any, float, Any]]) -> "Best":
        """The ridge with the best loss on the tenth; seconds and passes include those of the ridges before it."""
        tried, seconds, passes = [], 0.0, 0
        for ridge in sorted(self.arguments.ridges, reverse=True):
            started = time.process_time()
            fit, tuning, state = fit_at(ridge)
            seconds, passes = seconds + time.process_time() - started, passes + fit.passes
            print(ridge, math.exp(tuning), fit.message, f"{seconds:.0f} s", flush=True)
            figures = {
                "objective": fit.objective,
                "ridge": ridge,
                "gap": fit.gap,
                "status": fit.status,
                "solver": fit.method,
                "passes": passes,
                "seconds": seconds,
                "ms_per_pass_and_1000_tokens": 1e6 * seconds / passes / len(self.train),
            }
            tried.append(Best(tuning, figures, state))
        return min(tried, key=lambda best: best.tuning)

    def adamw(self, ridge: float, rates: list[float], *, projection: bool) -> float:
        """The same shortcut and objective by gradient training; returns the best rate. Seconds are those of one run."""
        best: tuple[float, float, float, dict[str, Tensor]] | None = None
        for rate in rates:
            restore(self.layer, self.name, self.start)
            seconds = train(
                self.output,
                self.train,
                ridge=ridge,
                rate=rate,
                epochs=self.arguments.epochs,
                batch_size=ROWS,
                projection=projection,
            )
            objective = self._loss(self.train) + penalty(self.output, ridge).item()
            print("adamw", projection, rate, objective, f"{seconds:.0f} s", flush=True)
            if best is None or objective < best[0]:
                best = objective, rate, seconds, adapter_state(self.layer, self.name)
        objective, rate, seconds, state = best
        restore(self.layer, self.name, state)
        self.add(
            f"LReg on the head, AdamW{' with projection' if projection else ''}",
            tuning=self._loss(self.tuning),
            test=self._loss(self.test),
            objective=objective,
            ridge=ridge,
            rate=rate,
            at_grid_edge=rate in (min(self.arguments.rates), max(self.arguments.rates)),
            seconds=seconds,
            passes=self.arguments.epochs,
            **self._parameters(projection),
        )
        return rate

    def _parameters(self, projection: bool = False) -> dict[str, int]:
        weights = list(self.layer.lreg_coefficients[self.name].parameters())
        if projection:
            weights += self.layer.lreg_projection[self.name].parameters()
        return {"parameters": sum(weight.numel() for weight in weights)}

    def _loss(self, rows: StoredRows) -> float:
        return score(self.output, rows, ROWS).loss

    @torch.no_grad()
    def _bias_chunks(self) -> Iterator[Chunk]:
        for features, targets in self.train.chunks(ROWS):
            yield Chunk(torch.ones(len(targets), 1), targets, self.output.base_output(features))

    @torch.no_grad()
    def _bias_loss(self, rows: StoredRows, bias: Tensor) -> float:
        total = 0.0
        for features, targets in rows.chunks(ROWS):
            logits = self.output.base_output(features).double() + bias
            total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        return total / len(rows)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| method | parameters | ridge | objective | gap | passes | CPU seconds | test perplexity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["method"] + (f" (rate {row['rate']:g})" if "rate" in row else "")
        cells = [f"{row[key]:{form}}" if key in row else "" for key, form in COLUMNS.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Test perplexity of every method."""
    figure, axes = plt.subplots(figsize=(7.5, 0.5 * len(rows) + 0.9))
    values = [row["test"] for row in rows]
    bars = axes.barh([row["method"] for row in rows], values, color="#0b5394")
    axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(values))
    axes.set_xlabel("test perplexity")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Compare, and write table, JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of a GPT-2 language model")
    parser.add_argument("--train_file", type=Path, required=True)
    parser.add_argument("--test_file", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--train_tokens", type=int, default=8192)
    parser.add_argument("--test_tokens", type=int, default=12_288)
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--components", type=int, default=4)
    parser.add_argument("--n_nodes", type=int, default=4)
    parser.add_argument("--ridges", type=float, nargs="+", default=[1e-3, 3e-4, 1e-4])
    parser.add_argument("--tolerance", type=float, default=1e-6)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-2, 3e-2, 1e-1, 3e-1])
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    comparison = Comparison(arguments)
    comparison.base()
    comparison.bias()
    ridge = comparison.fit()
    rate = comparison.adamw(ridge, arguments.rates, projection=False)
    comparison.adamw(ridge, [rate], projection=True)
    text = table(comparison.results)
    print(text)
    report = {
        "rows": comparison.results,
        "n_rows": {name: len(getattr(comparison, name)) for name in ("train", "tuning", "test")},
        "vocabulary": comparison.layer.out_features,
        "provenance": provenance({name: getattr(arguments, name) for name in SETTINGS}),
    }
    save(arguments.output_dir, "wikitext_fit", report, text)
    draw(comparison.results, arguments.output_dir / "wikitext_fit.png")


if __name__ == "__main__":
    main()
