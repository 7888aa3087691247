"""A task of a few hundred parameters for the comparisons and the study, and the options they are given."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, PretrainedConfig, PreTrainedModel

from examples.comparison.environment import start_processes
from examples.comparison.options import Parser, check, fill
from examples.comparison.task import Metric, Task

BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


class Toy(Task):
    """Tell sequences in which the token 5 occurs often from the others. Counts what it is asked to do."""

    script, title = "run_toy.py", "A toy"
    task_type = "SEQ_CLS"
    auto_class = AutoModelForSequenceClassification
    rates = "classification"
    metrics = (Metric("accuracy", higher_is_better=True, digits=1, scale=100), Metric("loss", higher_is_better=False))
    unit = "samples"
    longest_sample = 8
    has_base_row = False

    def __init__(self, config: PretrainedConfig | None = None) -> None:
        self.config = config or BertConfig(**BERT)
        labels = torch.arange(192) % 2
        ids = torch.randint(6, 40, (192, 8), generator=torch.Generator().manual_seed(0))
        ids[labels == 1, ::2] = 5
        samples = zip(ids[:64].tolist(), labels[:64].tolist(), strict=True)
        self.train_data = [{"input_ids": tokens, "labels": label} for tokens, label in samples]
        self.splits = {"tuning": (ids[64:128], labels[64:128]), "test": (ids[128:], labels[128:])}
        self.n_loaded = 0
        self.evaluated: list[str] = []

    def load_base(self) -> PreTrainedModel:
        self.n_loaded += 1
        rng = torch.random.get_rng_state()
        torch.manual_seed(0)
        base = self.auto_class.from_config(self.config)
        torch.random.set_rng_state(rng)
        for module in self.new_modules:
            base.get_submodule(module).apply(base._init_weights)
        return base

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        self.evaluated.append(split)
        ids, labels = self.splits[split]
        logits = model.eval()(input_ids=ids).logits
        loss = nn.functional.cross_entropy(logits, labels).item()
        return {"accuracy": (logits.argmax(-1) == labels).double().mean().item(), "loss": loss}

    def settings(self) -> dict[str, Any]:
        return {"toy": 1}


def options(folder: Path, parser: Parser | None = None, **given: Any) -> argparse.Namespace:
    """Options of a small comparison in a folder, checked as those of the scripts are."""
    args = (parser or Parser(None, "toy")).parse(["--output_dir", str(folder), "--no_progress"])
    for name, value in given.items():
        setattr(args, name, value)
    fill(args, steps=4, batch_size=16, lr_trials=2)
    check(args)
    start_processes(None, args.output_dir)
    return args
