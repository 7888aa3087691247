"""The machinery of the comparisons on a task of a few hundred parameters: what is trained, found again, refused."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy_task import BERT, Toy, options
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    RobertaConfig,
)

from benchmarks.peft_methods.methods import everything
from examples.comparison.methods import METHODS, Fit, layer_sizes, select_methods
from examples.comparison.options import UserError
from examples.comparison.picture import spread_out
from examples.comparison.protocol import LEDGER_FILE, Ledger, Run, run_comparison
from examples.comparison.sizes import Sizes, count_trainable, given_sizes, learning_rate_grids
from examples.comparison.training import batches_to_start_from, start_batches
from lreg_peft.training.label_shift import PSEUDOCOUNTS

# One worker of pytest-xdist runs this module: its runs share the process state of Accelerate.
pytestmark = pytest.mark.xdist_group("comparison")

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2 = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, pad_token_id=0, **NO_DROPOUT)
LLAMA = LlamaConfig(**{**BERT, "num_key_value_heads": 2})
KNOWN = {name: places[0] for name, places in everything().items()} | METHODS


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[Toy, dict[str, Any]]]:
    """Run a comparison in one folder, return its task and its JSON."""

    def start(methods: list[str], task: Toy | None = None, **given: Any) -> Any:
        task = task or Toy()
        run_comparison(task, options(tmp_path, methods=methods, **{"seeds": [1, 2], **given}), 0.0, KNOWN)
        return task, json.loads((tmp_path / "results.json").read_text())

    return start


def rows(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in results["rows"]}


# --- methods and budgets --------------------------------------------------------------------------------------------


def task_on(config: PretrainedConfig, task_type: str) -> Toy:
    task = Toy(config)
    task.task_type = task_type
    classes = {"CAUSAL_LM": AutoModelForCausalLM, "MASKED_LM": AutoModelForMaskedLM}
    task.auto_class = classes.get(task_type, AutoModelForSequenceClassification)
    return task


ARCHITECTURES = [
    (BertConfig(**BERT), "SEQ_CLS"),
    (RobertaConfig(**BERT), "SEQ_CLS"),
    (GPT2, "SEQ_CLS"),
    (BertConfig(**BERT), "MASKED_LM"),
    (RobertaConfig(**BERT), "MASKED_LM"),
    (GPT2, "CAUSAL_LM"),
    (LLAMA, "CAUSAL_LM"),
]


@pytest.mark.parametrize(("config", "task_type"), ARCHITECTURES, ids=lambda value: getattr(value, "model_type", value))
def test_every_method_trains_what_is_counted_within_the_budget(config: PretrainedConfig, task_type: str) -> None:
    task = task_on(config, task_type)
    sizes = Sizes(task)
    has_bias = any(name.endswith("bias") for name, _ in task.empty_model().named_parameters())
    methods = select_methods([], task_type, has_bias)
    assert {"ft", "lora", "lreg"} <= {method.name for method in methods}
    budget = sizes.default_budget()
    for method, (name, size) in zip(methods, sizes.choose(methods, budget, {}).items(), strict=True):
        assert name == method.name
        model = method.attach(task.load_base(), sizes.fit(method, size), None)
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert count_trainable(model) == sizes.count(method, size) + sizes.new_parameters, name
        for module in task.new_modules:
            assert any(module in n for n in trained), f"{name} leaves the new head as it is"
        if size is not None:
            assert sizes.count(method, size) <= budget
            more = budget // 9 if method.size_name == "parameters" else 1  # less than one component of such a layer
            assert budget < sizes.count(method, size + more)


def test_lora_and_lreg_divide_a_budget_alike() -> None:
    """LReg by `recommended_config`, which gives single components where a rank everywhere would be too much; without
    the norm before the head, which LoRA cannot take."""
    task = task_on(GPT2, "CAUSAL_LM")
    lora = METHODS["lora-linear-head"].attach(task.load_base(), Fit(task, size=2), None)
    found = {"lora-linear-head": ("lora_A", lora)}
    ranks = sum(len(p) for n, p in lora.named_parameters() if "lora_A" in n)
    overhead = (1 + 4) * ranks  # bias and profile of every component
    fit = Fit(task, size=count_trainable(lora) + overhead, n_nodes=4)
    found["lreg"] = ("lreg_projection.", KNOWN["lreg-no-norm"].attach(task.load_base(), fit, None))
    sizes = {
        name: {n.split(f".{key[:4]}")[0]: len(p) for n, p in model.named_parameters() if key in n}
        for name, (key, model) in found.items()
    }
    assert sizes["lora-linear-head"] == sizes["lreg"]
    assert {n.split(".")[-1]: size for n, size in sizes["lreg"].items() if "h.0.attn" in n or "lm_head" in n} == {
        "c_attn": 2,
        "c_proj": 2,
        "lm_head": 1,
    }


def test_the_bias_of_the_controls_is_the_closed_form() -> None:
    """The same at every position, log((n + a) / (q + a)) with one of the pseudocounts."""
    task = task_on(GPT2, "CAUSAL_LM")
    base = task.load_base().eval()
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 13, (8, 16), generator=generator) for _ in range(4)]
    counts = torch.bincount(torch.cat(ids)[:, 1:].flatten(), minlength=base.config.vocab_size)
    with torch.no_grad():
        before = base(torch.cat(ids)).logits
    model = KNOWN["vocab-bias"].attach(base, Fit(task), [{"input_ids": i, "labels": i} for i in ids])
    with torch.no_grad():
        shift = model(torch.cat(ids)).logits - before
    expected = before[:, :-1].softmax(-1).sum((0, 1))
    forms = [((counts + a) / (expected + a)).log() for a in PSEUDOCOUNTS]
    assert min((shift - form).abs().max() for form in forms) < 1e-4


def test_new_heads_start_alike_with_lora_and_lreg() -> None:
    """From the same samples by the same solver; and stay as they are drawn where the row says so."""
    task = Toy()
    models = {}
    for name, size in (("lora-linear-start", 2), ("lreg", 4096), ("lreg-random-head", 4096)):
        torch.manual_seed(3)  # of the head
        batches = batches_to_start_from(task, 0, 32)
        models[name] = KNOWN[name].attach(task.load_base(), Fit(task, size=size, n_nodes=4), batches)
    torch.manual_seed(3)
    drawn = task.load_base().classifier
    heads = {name: model.get_base_model().classifier.modules_to_save.default for name, model in models.items()}
    assert torch.equal(heads["lreg-random-head"].weight, drawn.weight)
    assert not torch.equal(heads["lreg"].weight, drawn.weight)
    torch.testing.assert_close(heads["lora-linear-start"].weight, heads["lreg"].weight, rtol=1e-4, atol=1e-5)


def test_the_attention_comes_first_in_a_pattern() -> None:
    """`output.dense` would also match the attention's output layer."""
    task = Toy()
    names = list(layer_sizes(task.empty_model(), 4))
    assert names.index("attention.output.dense") < names.index("output.dense")
    model = METHODS["lora-linear"].attach(task.load_base(), Fit(task, size=4), None)
    ranks = {n: p.shape[0] for n, p in model.named_parameters() if "lora_A" in n}
    assert {r for n, r in ranks.items() if "attention" in n} == {4}
    assert {r for n, r in ranks.items() if "attention" not in n} == {2}


def test_an_impossible_budget_names_the_least_one() -> None:
    sizes = Sizes(task_on(GPT2, "CAUSAL_LM"))
    least = sizes.count(METHODS["lora"], 1)
    with pytest.raises(UserError, match=rf"budget of 5 .* lora has {least}; give --budget {least} or more"):
        sizes.choose([METHODS["lora"]], 5, {})
    assert sizes.choose([METHODS["lora"]], 5, {"lora": 3}) == {"lora": 3}


def test_grids_have_the_same_length_and_ratio() -> None:
    methods, task = [METHODS["lora"], METHODS["lreg"]], Toy()
    task.rates = "language_model"
    grids = learning_rate_grids(methods, task, 3, 2.0, ["lreg=3e-2,1e-2,2e-2", "ft=1,2,3"])
    assert grids == {"lora": [0.005, 0.01, 0.02], "lreg": [0.01, 0.02, 0.03]}
    for wrong in ("lreg=1e-2", "lreg=1,1,2", "lreg=0,1,2", "lreg=nan,1,2", "lreg"):
        with pytest.raises(UserError, match="--learning_rates wants"):
            learning_rate_grids(methods, task, 3, 2.0, [wrong])
    for wrong in ("lora", "lora=0", "lora=x", "ft=3"):
        with pytest.raises(UserError, match="--sizes wants"):
            given_sizes([wrong], methods)


# --- a comparison ---------------------------------------------------------------------------------------------------


def test_methods_learn_the_toy_and_the_report_is_complete(run: Callable[..., Any], tmp_path: Path) -> None:
    methods = ["ft", "bitfit", "head-only", "lora", "lreg-attention", "lreg"]
    rates = {**dict.fromkeys(methods, "1e-2,3e-2"), "lreg-attention": "1e-1,3e-1"}
    _, results = run(methods, steps=20, learning_rates=[f"{name}={grid}" for name, grid in rates.items()])
    table = rows(results)
    assert list(table) == [*methods, "lreg, as LoRA"]
    head = table["head-only"]
    assert head["adapter_parameters"] == 0
    for name, row in table.items():
        assert row["head_parameters"] == head["head_parameters"] == 34
        assert len(row["test"]["accuracy"]["values"]) == 2
        assert row["test"]["loss"]["mean"] < (0.68 if name == "head-only" else head["test"]["loss"]["mean"] - 0.01), (
            name
        )
        assert row["adapter_bytes"] >= 4 * row["trainable_parameters"]
    text = (tmp_path / "results.md").read_text()
    assert "of these the new head" in text
    assert str(tmp_path) not in (tmp_path / "results.json").read_text()
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_start_trains_nothing_again(run: Callable[..., Any], tmp_path: Path) -> None:
    _, first = run(["lora", "lreg"])
    task, second = run(["lora", "lreg"])
    assert task.n_loaded == 0
    assert task.evaluated == []
    assert [row["test"] for row in first["rows"]] == [row["test"] for row in second["rows"]]
    assert [row["adapter_bytes"] for row in first["rows"]] == [row["adapter_bytes"] for row in second["rows"]]
    task, third = run(["lora", "lreg"], seeds=[1, 2, 3])
    assert task.n_loaded == 3, "one more seed is one more run for each method, and one more LoRA that LReg converts to"
    assert rows(third)["lreg"]["test"]["accuracy"]["values"][:2] == rows(first)["lreg"]["test"]["accuracy"]["values"]


@pytest.mark.parametrize("n_lines", [2, 3, 4, 5])
def test_an_interruption_costs_only_the_run_it_hits(run: Callable[..., Any], tmp_path: Path, n_lines: int) -> None:
    """Cut after the settings, the base and: nothing, one trial, both trials, the test of the best trial."""
    _, whole = run(["lora"])
    ledger = tmp_path / LEDGER_FILE
    lines = ledger.read_text().splitlines(keepends=True)
    assert len(lines) == 6, "settings, base, two trials, the tested trial, the second seed"
    ledger.write_text("".join(lines[:n_lines]) + lines[n_lines][: len(lines[n_lines]) // 2])
    task, again = run(["lora"])
    assert again["rows"][0]["test"] == whole["rows"][0]["test"]
    assert again["rows"][0]["trials"] == whole["rows"][0]["trials"]
    # What is missing is trained; and so is the best trial, the second one, where its test was lost with its weights.
    assert whole["rows"][0]["learning_rate"] == whole["rows"][0]["trials"][1]["learning_rate"]
    assert task.n_loaded == {2: 3, 3: 2, 4: 2, 5: 1}[n_lines]


@pytest.mark.parametrize(("name", "value"), [("steps", 7), ("batch_size", 8), ("bf16", True)])
def test_a_changed_setting_is_refused_by_name(run: Callable[..., Any], name: str, value: float) -> None:
    run(["head-only"], seeds=[1])
    with pytest.raises(UserError, match=f"holds runs with {name} .* has {name} {json.dumps(value)}; give"):
        run(["head-only"], seeds=[1], **{name: value})


def test_same_data_order_for_every_method(run: Callable[..., Any]) -> None:
    seen: dict[str, list[Any]] = {}

    class Watched(Toy):
        def collator(self, seed: int) -> Any:
            batches = seen.setdefault(f"{len(seen)} seed {seed}", [])

            def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
                batches.append([sample["input_ids"] for sample in samples])
                return {name: torch.tensor([s[name] for s in samples]) for name in ("input_ids", "labels")}

            return collate

    run(["ft", "lora", "lreg"], task=Watched(), lr_trials=1)
    # Starts from data and conversions take batches of 8.
    orders = {seed: [v for k, v in seen.items() if k.endswith(f"seed {seed}") and len(v[0]) == 16] for seed in (1, 2)}
    assert [len(found) for found in orders.values()] == [3, 3]
    assert all(order == found[0] for found in orders.values() for order in found)
    assert orders[1][0] != orders[2][0]


def test_a_method_that_diverges_is_one_sentence_and_keeps_what_is_finished(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    class Diverging(Toy):
        def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
            return {name: float("nan") for name in super().evaluate(model, split)}

    run(["lora"])
    with pytest.raises(UserError, match=r"'head-only' diverged at every learning rate .*--learning_rates head-only="):
        run(["lora", "head-only"], task=Diverging())
    assert "lora" in (tmp_path / "results.json").read_text()


# --- parts ----------------------------------------------------------------------------------------------------------


def finished(rate: float, accuracy: float = 0.5) -> Run:
    return Run("lora", 4, None, rate, 1, {"accuracy": accuracy}, 1.0, 1.0, 0.2, None, 64)


SETTINGS = {"text": "Lagrange über Ἀθῆναι \u2028 𒀭", "a": (1, 2)}


def test_settings_and_runs_are_read_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, SETTINGS)
    ledger.add_base({})
    ledger.add(finished(1e-3, float("inf")))
    again = Ledger(tmp_path, SETTINGS)
    assert again.base == {} and again.runs == ledger.runs
    with pytest.raises(UserError, match=r"runs with a \[1, 2\], and this command has a null"):
        Ledger(tmp_path, {"text": SETTINGS["text"]})


def test_a_ledger_torn_at_any_byte_loses_one_line(tmp_path: Path) -> None:
    file = tmp_path / LEDGER_FILE
    ledger = Ledger(tmp_path, SETTINGS)
    for rate in (1e-3, 2e-3, 3e-3):
        ledger.add(finished(rate))
    whole = file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    assert len(ends) == 4
    for size in range(len(whole) + 1):
        file.write_bytes(whole[:size])
        complete = sum(end <= size for end in ends)
        assert len(Ledger(tmp_path, SETTINGS).runs) == max(0, complete - 1)
        assert file.read_bytes() == whole[: ends[complete - 1] if complete else 0]


@pytest.mark.parametrize("text", ["{\n", "[]\n", '{"settings": 3\n', "\x00\n", '"x"\n'])
def test_a_ledger_that_is_something_else(tmp_path: Path, text: str) -> None:
    (tmp_path / LEDGER_FILE).write_text(text)
    with pytest.raises(UserError, match=f"{LEDGER_FILE}' is damaged"):
        Ledger(tmp_path, SETTINGS)


def test_the_start_sees_the_same_batches_whatever_the_number_of_processes() -> None:
    alone = start_batches(32, 100, seed=0, num_processes=1)
    assert [len(batch) for batch in alone] == [8, 8, 8, 8]
    assert len({position for batch in alone for position in batch}) == 32
    assert alone == start_batches(32, 100, seed=0, num_processes=4) != start_batches(32, 100, seed=1, num_processes=1)


@pytest.mark.parametrize("num_processes", [5, 31, 64])
def test_the_start_leaves_no_process_without_a_batch(num_processes: int) -> None:
    batches = start_batches(32, 100, seed=0, num_processes=num_processes)
    assert len(batches) >= num_processes
    positions = [position for batch in batches for position in batch]
    assert len(set(positions)) == len(positions)


def test_labels_in_the_picture_keep_their_distance() -> None:
    heights = spread_out([0.1, 0.1, 0.1, 0.95, 0.99, 1.0], 0.06)
    assert heights == sorted(heights)
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 0.06 - 1e-12
    assert heights[0] >= 0.0
    assert heights[-1] <= 1.0
