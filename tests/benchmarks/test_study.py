"""The study: one row per method and cell or the reason why not, found again, extended, drawn."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedModel, utils

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from comparison.environment import start_processes
from comparison.method import Fit, Method, Rates
from comparison.methods import METHODS
from comparison.options import ComparisonArguments, RunArguments
from comparison.search import next_rate
from comparison.study import StudyArguments, run_study, study_arguments
from comparison.study_report import StudyReport
from comparison.task import Metric, Task
from comparison.training import _Trainer

pytestmark = pytest.mark.xdist_group("comparison")

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


class Toy(Task):
    """Tell sequences with the token 5 from others."""

    script, title = "run_toy.py", "A toy"
    task_type = "SEQ_CLS"
    auto_class = AutoModelForSequenceClassification
    rates = "classification"
    metrics = (Metric("loss", higher_is_better=False, digits=4),)
    unit, units_per_sample, longest_sample = "samples", 1, 8
    has_base_row = False

    def __init__(self) -> None:
        self.config = BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        labels = torch.arange(64) % 2
        self.ids = torch.randint(6, 40, (64, 8), generator=torch.Generator().manual_seed(0))
        self.ids[labels == 1, ::2] = 5
        self.labels = labels
        samples = zip(self.ids.tolist(), labels.tolist(), strict=True)
        self.train_data = [{"input_ids": ids, "labels": label} for ids, label in samples]
        self.evaluated: list[str] = []
        self.n_loaded = 0

    def load_base(self) -> PreTrainedModel:
        self.n_loaded += 1
        return self.random_model()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        self.evaluated.append(split)
        logits = model.eval()(input_ids=self.ids).logits
        return {"loss": nn.functional.cross_entropy(logits, self.labels).item()}

    def settings(self) -> dict[str, Any]:
        return {"toy": 1}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training the toy."""
    monkeypatch.setattr("comparison.study.draw_study", None)


@pytest.fixture(autouse=True)
def quiet_transformers() -> Any:
    start_processes()
    verbosity = utils.logging.get_verbosity()
    utils.logging.set_verbosity_error()
    utils.logging.disable_progress_bar()
    yield
    utils.logging.set_verbosity(verbosity)
    utils.logging.enable_progress_bar()


def study(folder: Path, methods: list[str], axes: dict[str, Any] | None = None, **options: Any) -> tuple[Toy, Any]:
    task = Toy()
    defaults = {"steps": 2, "batch_size": 8, "lr_trials": 2, "seeds": [1, 2], "budget": 700}
    arguments = ComparisonArguments(methods=methods, **{**defaults, **options})
    where = RunArguments(output_dir=str(folder), progress=False)
    run_study(task, StudyArguments(**(axes or {})), arguments, where, 0.0)
    return task, json.loads((folder / "study.json").read_text())


def test_cells_rows_and_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # this one draws
    methods = ["lora-linear", "rslora", "vera", "ln-tuning"]
    _, found = study(tmp_path, methods, {"budgets": [100], "step_counts": [3]}, eval_steps=1)
    rows = {(row["budget"], row["steps"], row["method"]): row for row in found["rows"]}
    assert {key for key in rows if key[0] == 700} == {(700, steps, name) for steps in (2, 3) for name in methods}
    assert {key for key in rows if key[0] == 100} == {(100, 2, name) for name in methods[1:]}
    assert rows[100, 2, "rslora"]["placement"] == "attention output"
    assert "smallest size has" in found["left_out"]["lora-linear, budget-100-steps-2"]
    assert "XLORA" in found["left_out"]
    head = 34  # of the classifier
    row = rows[700, 2, "rslora"]
    assert row["trainable"] <= 700 + head and row["placement"] == "linear layers"
    assert row["seeds"] == [1, 2] and len(row["test"]) == 2 and row["test_spread"] is not None
    assert [at["step"] for at in row["curves"][0]] == [1, 2]
    assert 0 < row["curves"][0][0]["cpu_seconds"] < row["curves"][0][1]["cpu_seconds"] <= row["cpu_seconds"] * 1.5
    text = (tmp_path / "study.md").read_text()
    assert "700 parameters, 3 steps" in text and "Left out" in text and str(tmp_path) not in text
    assert (tmp_path / "study.png").exists()
    monkeypatch.setattr("comparison.study.draw_study", None)
    again, _ = study(tmp_path, methods, {"budgets": [100], "step_counts": [3]}, eval_steps=1)
    assert again.n_loaded == 0 and again.evaluated == []


def test_a_search_reads_no_test_figure_and_the_test_follows_without_training(tmp_path: Path) -> None:
    searched, found = study(tmp_path, ["rslora"], {"search_only": True})
    assert set(searched.evaluated) == {"tuning"} and found["rows"][0]["test"] == []
    tested, found = study(tmp_path, ["rslora"], seeds=[1])
    assert tested.evaluated == ["test"] and tested.n_loaded == 1 and len(found["rows"][0]["test"]) == 1


def test_a_tuner_that_breaks_does_not_take_the_others_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: PreTrainedModel, fit: Fit) -> nn.Module:
        raise RuntimeError("it does not fit\nat all")

    monkeypatch.setitem(METHODS, "broken", Method("broken", "breaks", broken, Rates(1.0, 1.0, 1.0, 1.0)))
    _, found = study(tmp_path, ["broken", "ln-tuning"], {"search_only": True})
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
    _, found = study(tmp_path, ["ln-tuning"], {"search_only": True}, lr_trials=1, lr_refine=1, lr_extend=2, seeds=[1])
    assert 2 <= len(found["rows"][0]["trials"]) <= 4


def test_what_methods_do_beside_the_model_reaches_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA+ has a rate of its own for B; AdaLoRA counts its steps from one, with the gradients still there."""
    rates: dict[str, float] = {}
    create = _Trainer.create_optimizer

    def spy(self: _Trainer, model: Any = None) -> Any:
        optimizer = create(self, model)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        rates.update({names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]})
        return optimizer

    monkeypatch.setattr(_Trainer, "create_optimizer", spy)
    one = {"lr_trials": 1, "seeds": [1]}
    study(tmp_path / "plus", ["lora-plus"], {"search_only": True}, learning_rates=["lora-plus=1e-2"], **one)
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {0.16}
    assert {rate for name, rate in rates.items() if "lora_B" not in name} == {1e-2}

    steps: list[tuple[int, bool]] = []
    allocate = METHODS["adalora"].after_step

    def count(model: nn.Module, step: int) -> None:
        steps.append((step, any(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)))
        allocate(model, step)

    monkeypatch.setitem(METHODS, "adalora", replace(METHODS["adalora"], after_step=count))
    study(tmp_path / "ada", ["adalora"], {"search_only": True}, steps=3, budget=1000, **one)
    assert steps == [(1, True), (2, True), (3, True)]


def test_the_options_of_a_study_are_taken_out_of_a_command() -> None:
    own, rest = study_arguments(["a.yaml", "--budgets", "10", "20", "--seeds", "1", "2", "--search_only"])
    assert own.budgets == [10, 20] and own.search_only
    assert rest == ["a.yaml", "--seeds", "1", "2"]


def test_time_to_the_figure_of_the_reference() -> None:
    def row(name: str, curve: list[tuple[float, float]]) -> Any:
        from comparison.study_report import StudyRow

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
