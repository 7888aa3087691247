"""Which samples are trained on, which choose the learning rate, which are reported; and how they become tokens.

Four sources, one result. The official validation samples are for the report alone: what learning rates and
checkpoints are chosen on is a part of the training samples that is set aside before anything else happens.
"""

import argparse
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from examples.comparison.environment import load_dataset
from examples.comparison.options import UserError
from examples.glue.offline_pairs import OFFLINE_TASK, load_offline_pairs, overlap_accuracy
from examples.glue.own_files import read_own
from examples.glue.samples import Samples, parse_labels
from examples.glue.tasks import HUB_LABEL, TASKS, Task, find_task
from examples.glue.tsv import find_file, read_tsv

SPLIT_SEED = 0  # of the slice and of the tuning samples: fixed, so that they are the same for all methods and seeds
TUNING_SHARE, MAX_TUNING = 0.1, 1000  # of the training samples, where --tuning_samples is not given


@dataclass(frozen=True)
class Data:
    """The samples of a task.

    Attributes:
        task: what is to be predicted.
        source: where the samples come from, for the report.
        train: to train on.
        tuning: to choose learning rates and checkpoints on.
        evaluations: to report on; two sets for MNLI, one for the others.
        notes: what a reader of the figures should know about the samples.
        references: accuracies of simpler ways to predict.
    """

    task: Task
    source: str
    train: Samples
    tuning: Samples
    evaluations: dict[str, Samples]
    notes: list[str] = field(default_factory=list)
    references: dict[str, float] = field(default_factory=dict)

    @property
    def is_glue(self) -> bool:
        """Whether the task has official figures."""
        return self.task.name in TASKS

    def describe(self) -> dict[str, dict[str, int | str]]:
        """Size and fingerprint of every part."""
        parts = {"train": self.train, "tuning": self.tuning, **self.evaluations}
        return {name: samples.describe() for name, samples in parts.items()}


# --- sources --------------------------------------------------------------------------------------------------------


def load_data(options: argparse.Namespace) -> Data:
    """Read the samples the options name: the offline pairs, files of one's own, official files, or the hub."""
    notes: list[str] = []
    if options.train_file is not None:
        task, available, validation = read_own(options.train_file, options.validation_file)
        evaluations = {"validation": validation}
    elif options.task is None:
        return load_offline(options)
    else:
        task = find_task(options.task)
        if options.data_dir is not None:
            available, evaluations, notes = read_official(task, options.data_dir)
        else:
            available, evaluations, notes = read_hub(task, options.dataset_name)
    train, tuning = set_aside(available, options.tuning_samples, options.max_train_samples)
    notes.append(
        f"Learning rates and checkpoints were chosen on {len(tuning):,} samples set aside from the training "
        f"samples, of which {len(train):,} others were trained on; the figures are on all the validation samples."
    )
    evaluations = {name: shorten(samples, options.max_eval_samples) for name, samples in evaluations.items()}
    if options.max_eval_samples is not None:
        notes[-1] = notes[-1].replace("all the", f"at most {options.max_eval_samples:,}")
    return Data(task, task.title, train, tuning, evaluations, notes)


def load_offline(options: argparse.Namespace) -> Data:
    """Pairs of docstrings of the running Python."""
    if options.data_dir is not None:
        raise UserError(f"--data_dir '{options.data_dir}' holds which task? Name it with --task.")
    splits = load_offline_pairs()
    train, tuning, test = splits["train"], splits["tuning"], splits["test"]
    return Data(
        OFFLINE_TASK,
        "Signatures and descriptions from Python's docstrings",
        shorten(train, options.max_train_samples),
        shorten(tuning, options.tuning_samples),
        {"held-out": shorten(test, options.max_eval_samples)},
        references={"words in common, no model": overlap_accuracy(train, test)},
    )


def read_official(task: Task, data_dir: str) -> tuple[Samples, dict[str, Samples], list[str]]:
    """Training and validation samples from a folder of the official download, with notes about left-out rows."""
    folder = Path(data_dir)
    if not folder.is_dir():
        raise UserError(f"The folder '{data_dir}' does not exist.")
    paths = {"train": find_file(folder, task, "train")}
    paths |= {name: find_file(folder, task, "validation", suffix) for name, suffix in task.evaluations}
    parts, notes = {}, []
    for name, path in paths.items():
        texts, labels, n_torn = read_tsv(path, task)
        parts[name] = Samples(texts, parse_labels(task, labels, f"'{path}'"))
        if n_torn:
            notes.append(f"{n_torn} rows of {path.name} lack a column and were left out.")
    return parts.pop("train"), parts, notes


def read_hub(task: Task, dataset_name: str) -> tuple[Samples, dict[str, Samples], list[str]]:
    """The same from the hub."""
    splits = load_dataset(dataset_name, task.name)
    wanted = {"train": "train"} | {name: "validation" + suffix for name, suffix in task.evaluations}
    parts = {name: hub_samples(task, splits, split, dataset_name) for name, split in wanted.items()}
    return parts.pop("train"), parts, []


def hub_samples(task: Task, splits: Mapping[str, Any], split: str, dataset_name: str) -> Samples:
    """One split of a hub data set."""
    if split not in splits:
        raise UserError(f"The data set '{dataset_name}' has no split '{split}'; it has {', '.join(splits)}.")
    names = splits[split].column_names
    missing = [column for column in (*task.sentences, HUB_LABEL) if column not in names]
    if missing:
        raise UserError(
            f"The data set '{dataset_name}' has no column {', '.join(map(repr, missing))}, which {task.title} needs; "
            f"it has {', '.join(names)}."
        )
    texts = list(zip(*(splits[split][column][:] for column in task.sentences), strict=True))
    labels = parse_labels(task, splits[split][HUB_LABEL][:], f"the split '{split}' of '{dataset_name}'")
    return Samples(texts, labels)


# --- parts ----------------------------------------------------------------------------------------------------------


def set_aside(available: Samples, n_tuning: int | None, n_train: int | None) -> tuple[Samples, Samples]:
    """Samples to train on and samples to choose on, from one fixed shuffle of the training samples."""
    if n_tuning is None:
        n_tuning = min(MAX_TUNING, max(1, round(TUNING_SHARE * len(available))))
    wanted = n_tuning + (n_train if n_train is not None else 1)
    if wanted > len(available):
        raise UserError(
            f"--tuning_samples {n_tuning:,} and --max_train_samples {n_train or 1:,} need {wanted:,} training samples, "
            f"and there are {len(available):,}."
        )
    order = random.Random(SPLIT_SEED).sample(range(len(available)), len(available))
    end = None if n_train is None else wanted
    return available.take(order[n_tuning:end]), available.take(order[:n_tuning])


def shorten(samples: Samples, limit: int | None) -> Samples:
    """The first samples up to a limit; the offline pairs and the validation samples have no order."""
    return samples if limit is None else samples.take(range(min(limit, len(samples))))


# --- tokens ---------------------------------------------------------------------------------------------------------


def tokenize(samples: Samples, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, Any]]:
    """Unpadded model inputs with their labels; a pair that is too long loses tokens of its longer text first."""
    columns = [list(column) for column in zip(*samples.texts, strict=True)]
    encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    names = list(encoded)
    return [
        {**dict(zip(names, values, strict=True)), "labels": label}
        for *values, label in zip(*(encoded[name] for name in names), samples.labels, strict=True)
    ]
