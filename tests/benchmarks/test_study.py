"""The study: one row per method and cell or the reason why not, found again, extended, drawn."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from toy_task import Toy, options
from transformers import PreTrainedModel, Trainer

from benchmarks.peft_methods import study as studies
from benchmarks.peft_methods.options import add_study_options
from benchmarks.peft_methods.search import next_rate
from benchmarks.peft_methods.study import run_study
from benchmarks.peft_methods.study_report import StudyReport, StudyRow
from benchmarks.peft_methods.tuners import TUNERS
from benchmarks.peft_methods.wikitext import CONFIG
from examples.comparison.methods import Fit, Method, rates
from examples.comparison.options import Parser
from examples.comparison.task import Metric
from examples.wikitext.run_wikitext import make_parser, parse_arguments

pytestmark = pytest.mark.xdist_group("comparison")

HEAD = 34  # parameters of the classifier


def study(folder: Path, methods: list[str], **given: Any) -> tuple[Toy, Any]:
    task = Toy()
    task.metrics = task.metrics[1:]
    defaults = {"steps": 2, "batch_size": 8, "lr_trials": 2, "seeds": [1, 2], "budget": 700}
    args = options(folder, add_study_options(Parser(None, "toy"), None), methods=methods, **{**defaults, **given})
    run_study(task, args, 0.0)
    return task, json.loads((folder / "study.json").read_text())


def test_cells_rows_and_reasons(tmp_path: Path) -> None:
    methods = ["lora-linear", "rslora", "vera", "ln-tuning"]
    _, found = study(tmp_path, methods, budgets=[100], step_counts=[3], eval_steps=1)
    rows = {(row["budget"], row["steps"], row["method"]): row for row in found["rows"]}
    assert {key for key in rows if key[0] == 700} == {(700, steps, name) for steps in (2, 3) for name in methods}
    assert {key for key in rows if key[0] == 100} == {(100, 2, name) for name in ("rslora", "vera")}
    assert rows[100, 2, "rslora"]["placement"] == "attention output"
    for name in ("lora-linear", "ln-tuning"):
        assert "smallest size has" in found["left_out"][f"{name}, budget-100-steps-2"]
    assert "XLORA" in found["left_out"]
    row = rows[700, 2, "rslora"]
    assert row["trainable"] <= 700 + HEAD and row["placement"] == "linear layers"
    assert row["seeds"] == [1, 2] and len(row["test"]) == 2 and row["test_spread"] is not None
    assert [at["step"] for at in row["curves"][0]] == [1, 2]
    assert 0 < row["curves"][0][0]["cpu_seconds"] < row["curves"][0][1]["cpu_seconds"] <= row["cpu_seconds"] * 1.5
    text = (tmp_path / "study.md").read_text()
    assert "700 parameters, 3 steps" in text and "Left out" in text and str(tmp_path) not in text
    assert (tmp_path / "study.png").exists()
    again, _ = study(tmp_path, methods, budgets=[100], step_counts=[3], eval_steps=1)
    assert again.n_loaded == 0 and again.evaluated == []


def test_a_search_reads_no_test_figure_and_the_test_follows_without_another(tmp_path: Path) -> None:
    searched, found = study(tmp_path, ["rslora"], search_only=True)
    assert set(searched.evaluated) == {"tuning"} and found["rows"][0]["test"] == []
    tested, found = study(tmp_path, ["rslora"], seeds=[1])
    assert tested.evaluated == ["tuning", "test"] and tested.n_loaded == 1, "the best run is made again, no other"
    assert len(found["rows"][0]["test"]) == 1


def test_a_tuner_that_breaks_does_not_take_the_others_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: PreTrainedModel, fit: Fit, batches: Any) -> nn.Module:
        raise RuntimeError("it does not fit\nat all")

    known = {**studies.everything(), "broken": [Method("broken", "breaks", broken, rates(1.0, 1.0, 1.0, 1.0))]}
    monkeypatch.setattr(studies, "everything", lambda: known)
    _, found = study(tmp_path, ["broken", "ln-tuning"], search_only=True)
    assert [row["method"] for row in found["rows"]] == ["ln-tuning"]
    assert "RuntimeError: it does not fit" in found["left_out"]["broken, budget-700-steps-2"]


def test_the_search_goes_on_by_one_rule(tmp_path: Path) -> None:
    inside = {0.01: 1.0, 0.03: 3.0, 0.09: 2.0}
    assert next_rate(inside, 3.0, may_refine=True) == 0.052  # the root of 0.03 * 0.09
    assert next_rate(inside, 3.0, may_refine=False) is None
    assert next_rate({0.01: 3.0, 0.03: 1.0}, 3.0, may_refine=False) == 0.00333
    assert next_rate({0.01: 1.0, 0.03: 3.0}, 3.0, may_refine=False) == 0.09
    # All of them diverged: smaller ones.
    assert next_rate({0.01: float("-inf"), 0.03: float("-inf")}, 3.0, may_refine=True) == 0.00333
    _, found = study(tmp_path, ["ln-tuning"], search_only=True, lr_trials=1, lr_refine=1, lr_extend=2, seeds=[1])
    assert 2 <= len(found["rows"][0]["trials"]) <= 4


def test_what_methods_do_beside_the_model_reaches_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA+ has a rate of its own for B; AdaLoRA counts its steps from one, with the gradients still there."""
    rates: dict[str, float] = {}
    create = Trainer.create_scheduler

    def spy(self: Trainer, num_training_steps: int, optimizer: Any = None) -> Any:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        groups = self.optimizer.param_groups
        rates.update({names[p]: group["lr"] for group in groups for p in group["params"]})
        return create(self, num_training_steps, optimizer)

    monkeypatch.setattr(Trainer, "create_scheduler", spy)
    one = {"lr_trials": 1, "seeds": [1], "search_only": True}
    study(tmp_path / "plus", ["lora-plus"], learning_rates=["lora-plus=1e-2"], **one)
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {0.16}
    assert {rate for name, rate in rates.items() if "lora_B" not in name} == {1e-2}

    steps: list[tuple[int, bool]] = []
    (tuner,) = (tuner for tuner in TUNERS if tuner.name == "adalora")

    def count(model: nn.Module, step: int) -> None:
        steps.append((step, any(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)))
        tuner.after_step(model, step)

    known = {**studies.everything(), "adalora": replace(tuner, after_step=count).methods()}
    monkeypatch.setattr(studies, "everything", lambda: known)
    study(tmp_path / "ada", ["adalora"], steps=3, budget=1000, **one)
    assert steps == [(1, True), (2, True), (3, True)]


def test_a_study_takes_the_options_of_its_comparison() -> None:
    argv = [str(CONFIG), "--budgets", "10", "20", "--seeds", "1", "2", "--search_only", "--train_file", "a.txt"]
    args = parse_arguments(argv, add_study_options(make_parser(), "A study."))
    assert (args.budgets, args.search_only, args.seeds, args.train_file) == ([10, 20], True, [1, 2], "a.txt")
    assert (args.budget, args.lr_refine, args.lr_extend) == (32768, 1, 2)


def test_time_to_the_figure_of_the_reference() -> None:
    def row(name: str, curve: list[tuple[float, float]]) -> Any:
        points = [{"step": step, "cpu_seconds": at, "loss": loss} for step, (at, loss) in enumerate(curve)]
        last = {"loss": curve[-1][1]}
        numbers: dict[str, Any] = {"cpu_seconds": 9.0, "seconds": 9.0, "peak_memory": None}
        return StudyRow(
            10, 2, name, "", "", {}, None, 5, 0.1, False, last, [1], [last], trials=[], curves=[points], **numbers
        )

    report = StudyReport("t", Metric("loss", False), "slow", {}, {}, {}, {})
    report.rows = [
        row("slow", [(1.0, 3.0), (2.0, 2.0)]),
        row("fast", [(0.5, 2.5), (1.5, 1.9)]),
        row("never", [(1.0, 9.0)]),
    ]
    (rows,) = report.cells().values()
    assert report.target(rows) == 2.0
    assert {r.method: r.seconds_to(report.metric, 2.0) for r in rows} == {"slow": 2.0, "fast": 1.5, "never": None}
