"""The machinery of the comparisons on a task of a few hundred parameters: what is trained, found again, refused."""

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import TOKEN, HubServer
from huggingface_hub import HfApi
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    utils,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from comparison import hub
from comparison.budget import Sizes, count_trainable, given_sizes, learning_rate_grids
from comparison.environment import peak_memory, reset_peak_memory, start_processes, without_places
from comparison.errors import UserError
from comparison.ledger import LEDGER_FILE, Ledger, Run
from comparison.method import WITH_HEAD
from comparison.methods import METHODS, Fit, select_methods
from comparison.options import ComparisonArguments, RunArguments, check, parse
from comparison.placements import layer_sizes, linear_layers
from comparison.protocol import run_comparison
from comparison.task import Metric, Task
from comparison.trained_state import put_back, read_state, save_trained, trained_state, write_state
from comparison.training import KeepBest, _Trainer, batches_to_start_from, start_batches, start_from_data

from lreg_peft.training.label_shift import PSEUDOCOUNTS

# One worker of pytest-xdist runs this module: its runs share the process state of Accelerate.
pytestmark = pytest.mark.xdist_group("comparison")

SIZES = {
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
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2 = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, pad_token_id=0, **NO_DROPOUT)
LLAMA = LlamaConfig(**{**SIZES, "num_key_value_heads": 2})


class Toy(Task):
    """Tell sequences in which the token 5 occurs often from the others. Counts what it is asked to do."""

    script, title = "run_toy.py", "A toy"
    task_type = "SEQ_CLS"
    auto_class = AutoModelForSequenceClassification
    rates = "classification"
    metrics = (Metric("accuracy", higher_is_better=True, digits=1, scale=100), Metric("loss", higher_is_better=False))
    unit, units_per_sample = "samples", 1
    has_base_row = False

    def __init__(self, config: PretrainedConfig | None = None) -> None:
        self.config = config or BertConfig(**SIZES)
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(192) % 2
        ids = torch.randint(6, 40, (192, 8), generator=generator)
        ids[labels == 1, ::2] = 5
        samples = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]
        self.train_data = [{name: value.tolist() for name, value in sample.items()} for sample in samples[:64]]
        self._splits = {"tuning": (ids[64:128], labels[64:128]), "test": (ids[128:], labels[128:])}
        self.n_loaded = 0
        self.tested: list[str] = []

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
        self.tested.append(split)
        ids, labels = self._splits[split]
        logits = model.eval()(input_ids=ids).logits
        loss = nn.functional.cross_entropy(logits, labels).item()
        return {"accuracy": (logits.argmax(-1) == labels).double().mean().item(), "loss": loss}

    def settings(self) -> dict[str, Any]:
        return {"toy": 1}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """As `run_script` has it; and the threads and warnings of other tests stay what they are."""
    start_processes()
    verbosity = utils.logging.get_verbosity()
    utils.logging.set_verbosity_error()
    utils.logging.disable_progress_bar()
    yield
    utils.logging.set_verbosity(verbosity)
    utils.logging.enable_progress_bar()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Toy, dict[str, Any]]]:
    """Run a comparison in one folder, return its task and its JSON."""

    def start(
        methods: list[str], task: Toy | None = None, push: str | None = None, picture: bool = False, **options: Any
    ) -> Any:
        task = task or Toy()
        if not picture:  # drawing takes longer than training the toy
            monkeypatch.setattr("comparison.protocol.write_picture", lambda report, folder: None)
        arguments = ComparisonArguments(
            methods=methods, **{"steps": 4, "batch_size": 16, "lr_trials": 2, "seeds": [1, 2], **options}
        )
        check(arguments, where := RunArguments(output_dir=str(tmp_path), progress=False, push_to_hub=push))
        run_comparison(task, arguments, where, 0.0)
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
    (BertConfig(**SIZES), "SEQ_CLS"),
    (RobertaConfig(**SIZES), "SEQ_CLS"),
    (GPT2, "SEQ_CLS"),
    (BertConfig(**SIZES), "MASKED_LM"),
    (RobertaConfig(**SIZES), "MASKED_LM"),
    (GPT2, "CAUSAL_LM"),
    (LLAMA, "CAUSAL_LM"),
]


@pytest.mark.parametrize(("config", "task_type"), ARCHITECTURES, ids=lambda value: getattr(value, "model_type", value))
def test_every_method_trains_what_is_counted_within_the_budget(config: PretrainedConfig, task_type: str) -> None:
    task = task_on(config, task_type)
    sizes = Sizes(task, None)
    methods = select_methods([], task_type, task.empty_model())
    assert {"ft", "lora", "lreg"} <= {method.name for method in methods}
    budget = sizes.default_budget()
    for method, (name, size) in zip(methods, sizes.choose(methods, budget, {}).items(), strict=True):
        assert name == method.name
        model = method.attach(task.load_base(), sizes.fit(method, size))
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        new = sum(p.numel() for n in task.new_modules for p in task.empty_model().get_submodule(n).parameters())
        assert count_trainable(model) == sizes.count(method, size) + new, name
        for module in task.new_modules:
            assert any(module in n for n in trained), f"{name} leaves the new head as it is"
        if size is not None:
            assert sizes.count(method, size) <= budget
            more = budget // 9 if method.fills_budget else 1  # less than one component of one of these layers
            assert budget < sizes.count(method, size + more)


def test_lora_and_lreg_divide_a_budget_alike() -> None:
    """LReg by `recommended_config`, which gives single components where a rank everywhere would be too much; without
    the norm before the head, which LoRA cannot take."""
    task = task_on(GPT2, "CAUSAL_LM")
    lora = METHODS["lora-linear-head"].attach(task.load_base(), Fit("CAUSAL_LM", size=2, placement=WITH_HEAD))
    found = {"lora-linear-head": ("lora_A", lora)}
    ranks = sum(len(p) for n, p in lora.named_parameters() if "lora_A" in n)
    overhead = (1 + 4) * ranks  # bias and profile of every component
    fit = Fit("CAUSAL_LM", size=count_trainable(lora) + overhead, n_nodes=4)
    found["lreg"] = ("lreg_projection.", METHODS["lreg-no-norm"].attach(task.load_base(), fit))
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
    base = task_on(GPT2, "CAUSAL_LM").load_base().eval()
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 13, (8, 16), generator=generator) for _ in range(4)]
    counts = torch.bincount(torch.cat(ids)[:, 1:].flatten(), minlength=base.config.vocab_size)
    with torch.no_grad():
        before = base(torch.cat(ids)).logits
    model = METHODS["vocab-bias"].attach_on_data(base, Fit("CAUSAL_LM"), [{"input_ids": i, "labels": i} for i in ids])
    with torch.no_grad():
        shift = model(torch.cat(ids)).logits - before
    expected = before[:, :-1].softmax(-1).sum((0, 1))
    forms = [((counts + a) / (expected + a)).log() for a in PSEUDOCOUNTS]
    assert min((shift - form).abs().max() for form in forms) < 1e-4


def test_new_heads_start_alike_with_lora_and_lreg() -> None:
    """From the same samples by the same solver; and stay as they are drawn where the row says so."""
    task, fit = Toy(), Fit("SEQ_CLS", size=4096, n_nodes=4, new_modules=("classifier",))

    def base() -> PreTrainedModel:
        torch.manual_seed(3)  # of the head
        return task.load_base()

    batches = batches_to_start_from(task.train_data, None, 0, 32)
    control = METHODS["lora-linear-start"]
    assert control.attach_on_data is not None
    models = {control.name: control.attach_on_data(base(), replace(fit, size=2), batches)}
    for name in ("lreg", "lreg-random-head"):
        models[name] = METHODS[name].attach(base(), fit)
        output = METHODS[name].start == "gradient and output"
        start_from_data(models[name], task.train_data, None, 0, 32, output=output)
    heads = {name: model.get_base_model().classifier.modules_to_save.default for name, model in models.items()}
    drawn = base().classifier
    assert torch.equal(heads["lreg-random-head"].weight, drawn.weight)
    assert not torch.equal(heads["lreg"].weight, drawn.weight)
    torch.testing.assert_close(heads["lora-linear-start"].weight, heads["lreg"].weight, rtol=1e-4, atol=1e-5)


def test_the_attention_comes_first_in_a_pattern() -> None:
    """`output.dense` would also match the attention's output layer."""
    layers = linear_layers(AutoModelForMaskedLM.from_config(BertConfig(**SIZES)))
    names = list(layer_sizes(layers, 4))
    assert names.index("attention.output.dense") < names.index("output.dense")
    model = METHODS["lora-linear"].attach(Toy().load_base(), Fit("SEQ_CLS", size=4, new_modules=("classifier",)))
    ranks = {n: p.shape[0] for n, p in model.named_parameters() if "lora_A" in n}
    assert {r for n, r in ranks.items() if "attention" in n} == {4}
    assert {r for n, r in ranks.items() if "attention" not in n} == {2}


def test_an_impossible_budget_names_the_least_one() -> None:
    sizes = Sizes(task_on(GPT2, "CAUSAL_LM"), None)
    least = sizes.count(METHODS["lora"], 1)
    with pytest.raises(UserError, match=rf"budget of 5 .* lora has {least}; give --budget {least} or more"):
        sizes.choose([METHODS["lora"]], 5, {})
    assert sizes.choose([METHODS["lora"]], 5, {"lora": 3}) == {"lora": 3}


def test_grids_have_the_same_length_and_ratio() -> None:
    methods = [METHODS["lora"], METHODS["lreg"]]
    grids = learning_rate_grids(methods, 3, 2.0, "language_model", ["lreg=3e-2,1e-2,2e-2", "ft=1,2,3"])
    assert grids == {"lora": [0.005, 0.01, 0.02], "lreg": [0.01, 0.02, 0.03]}
    for wrong in ("lreg=1e-2", "lreg=1,1,2", "lreg=0,1,2", "lreg=nan,1,2", "nothing=1,2,3", "lreg"):
        with pytest.raises(UserError, match="--learning_rates wants"):
            learning_rate_grids(methods, 3, 2.0, "language_model", [wrong])
    for wrong in ("lora", "lora=0", "lora=x", "ft=3"):
        with pytest.raises(UserError, match="--sizes wants"):
            given_sizes([wrong])


# --- a comparison ---------------------------------------------------------------------------------------------------


def test_methods_learn_the_toy_and_the_report_is_complete(run: Callable[..., Any], tmp_path: Path) -> None:
    methods = ["ft", "bitfit", "head-only", "lora", "lreg-attention", "lreg"]
    rates = {**dict.fromkeys(methods, "1e-2,3e-2"), "lreg-attention": "1e-1,3e-1"}
    _, results = run(methods, picture=True, steps=20, learning_rates=[f"{name}={grid}" for name, grid in rates.items()])
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
    assert task.tested == []
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


def test_weights_of_the_best_trial_outlive_an_interruption(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Exception):
        pass

    def stop(self: Toy, model: nn.Module, split: str) -> dict[str, float]:
        if split == "test":
            raise Interrupted
        return evaluate(self, model, split)

    evaluate = Toy.evaluate
    monkeypatch.setattr(Toy, "evaluate", stop)
    with pytest.raises(Interrupted):
        run(["lreg"], seeds=[1])
    assert (tmp_path / "unfinished" / "lreg.safetensors").exists()
    monkeypatch.setattr(Toy, "evaluate", evaluate)
    task, resumed = run(["lreg"], seeds=[1])
    assert task.tested == ["test", "test"], "as LReg and as LoRA; nothing was trained, so nothing was tuned"
    assert not (tmp_path / "unfinished" / "lreg.safetensors").exists()
    (tmp_path / LEDGER_FILE).unlink()
    _, anew = run(["lreg"], seeds=[1])
    assert anew["rows"][0]["test"] == resumed["rows"][0]["test"]


@pytest.mark.parametrize(("name", "value"), [("steps", 7), ("batch_size", 8), ("weight_decay", 0.1), ("eval_steps", 3)])
def test_a_changed_setting_is_refused_by_name(run: Callable[..., Any], name: str, value: float) -> None:
    run(["head-only"], seeds=[1])
    with pytest.raises(UserError, match=f"holds runs with {name} .* has {name} {value}; give another --output_dir"):
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
    # The last ones: a start from data comes first. The fourth reading is that of the conversion to a LoRA.
    orders = {seed: [v[-4:] for k, v in seen.items() if k.endswith(f"seed {seed}")] for seed in (1, 2)}
    assert [len(found) for found in orders.values()] == [4, 4]
    orders = {seed: found[:3] for seed, found in orders.items()}
    assert all(order == found[0] for found in orders.values() for order in found)
    assert orders[1][0] != orders[2][0]


def test_best_state_is_kept_and_patience_ends_a_run() -> None:
    scores = iter([0.5, 0.7, 0.6, 0.6, 0.9])
    model = nn.Linear(1, 1)
    keep = KeepBest(2, 2, lambda m: {"accuracy": next(scores)}, lambda figures: figures["accuracy"])

    class Control:
        should_training_stop = False

    class State:
        max_steps = 100

    for step in range(1, 11):
        State.global_step = step
        nn.init.constant_(model.weight, step)
        keep.on_step_end(None, State, Control, model=model)
        if Control.should_training_stop:
            break
    assert step == 8, "evaluated at 2, 4, 6, 8; the last two did not gain"
    assert (keep.best_step, keep.figures) == (4, {"accuracy": 0.7})
    put_back(model, keep.state)
    assert model.weight.item() == 4


def test_evaluation_during_training_ends_in_the_best_state(run: Callable[..., Any]) -> None:
    task, results = run(["lora"], eval_steps=2, seeds=[1], lr_trials=1, learning_rates=["lora=3e-2"])
    assert task.tested == ["tuning"] * 2 + ["test"]
    (steps,) = rows(results)["lora"]["steps"]
    assert steps["taken"] == 4
    assert steps["kept"] in (2, 4)


def test_head_learning_rate_is_that_of_the_head_alone(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]) -> None:
    groups = []
    create = _Trainer.create_optimizer

    def spy(self: _Trainer, model: Any = None) -> Any:
        optimizer = create(self, model)
        names = {p: n for n, p in self.model.named_parameters()}
        groups.append({names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]})
        return optimizer

    monkeypatch.setattr(_Trainer, "create_optimizer", spy)
    run(["lora", "head-only"], lr_trials=1, learning_rates=["lora=1e-2", "head-only=2e-2"], head_learning_rate=1e-3)
    lora, head_only = groups[0], groups[-1]
    assert {rate for name, rate in lora.items() if "lora_" in name} == {1e-2}
    assert {rate for name, rate in lora.items() if "classifier" in name} == {1e-3}
    assert set(head_only.values()) == {2e-2}, "where the head is all there is, the search is about it"


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


@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")  # the hub's own client
def test_the_best_adapter_is_sent_with_its_figures(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setattr(hub, "HfApi", partial(HfApi, endpoint=server.endpoint, token=TOKEN))
        _, results = run(
            ["ft", "lora", "lreg"], push="tester/best", learning_rates=["lora=1e-9,2e-9", "lreg=1e-1,3e-1"]
        )
        card = server.read("tester/best", "README.md").decode()
        files = server.files("tester/best")
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(files)
    assert "this is the adapter `lreg`" in card, "lora hardly learns at these rates, and ft is no adapter"
    assert f"{100 * rows(results)['lreg']['test']['accuracy']['mean']:.1f}" in card
    assert "import lreg_peft" in card


def test_an_upload_that_fails_is_one_sentence(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"Could not send .*lora.* to the hub as 'tester/best'"):
        run(["lora"], push="tester/best", seeds=[1])
    with pytest.raises(UserError, match="none of the chosen methods has one"):
        run(["ft"], push="tester/best")


# --- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ft", "bitfit", "lora", "lreg"])
def test_trained_state_comes_back(name: str, tmp_path: Path) -> None:
    # The size of lreg is a number of parameters.
    fit = Fit("SEQ_CLS", size=2000 if name == "lreg" else 2, n_nodes=4, new_modules=("classifier",))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, other = (METHODS[name].attach(Toy().load_base(), fit) for _ in range(2))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    for buffer in (b for n, b in model.named_buffers() if n.endswith(".nodes")):
        buffer[:, 1:-1] += 0.01
    write_state(trained_state(model), tmp_path / "x" / "state.safetensors", "a run")
    assert read_state(tmp_path / "x" / "state.safetensors", "another run") is None
    state = read_state(tmp_path / "x" / "state.safetensors", "a run")
    assert state is not None
    put_back(other, state)
    ids = Toy()._splits["test"][0]
    assert torch.equal(model.eval()(input_ids=ids).logits, other.eval()(input_ids=ids).logits)
    assert save_trained(model, state, tmp_path / "saved") < 4 * count_trainable(model) + 20_000


def test_settings_and_runs_are_read_back(tmp_path: Path) -> None:
    run = Run("lora", 4, None, 1e-3, 1, {"accuracy": float("inf")}, 5, 5, 1.0, 0.2, None)
    ledger = Ledger(tmp_path, {"a": (1, 2)}, is_main=True)
    ledger.add_base({})
    ledger.add(run)
    with (tmp_path / LEDGER_FILE).open("a") as file:
        file.write('{"run": {"method": "lo')  # the power went out here
    again = Ledger(tmp_path, {"a": (1, 2)}, is_main=True)
    assert again.find(run.key) == run
    assert again.n_found == 1
    again.add(Run("lora", 4, None, 2e-3, 1, {"accuracy": 0.5}, 5, 5, 1.0, 0.2, None))
    assert Ledger(tmp_path, {"a": (1, 2)}, is_main=True).n_found == 2
    with pytest.raises(UserError, match=r"runs with a \[1, 2\], and this command has a not set"):
        Ledger(tmp_path, {}, is_main=True)
    (tmp_path / LEDGER_FILE).write_text('{"settings": {}}\n{"run"\n{"base": {}}\n')
    with pytest.raises(UserError, match=f"{LEDGER_FILE}' is damaged"):
        Ledger(tmp_path, {}, is_main=True)


def test_options_from_files_and_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "steps: 3\nseeds: [1, 2]\nbudget:\nlearning_rates: {lora: [1e-3, 2e-3], ft: 1e-4}\n"
    )
    (tmp_path / "b.json").write_text('{"steps": 4, "smoke": true, "sizes": {"lora": 8}}')
    kinds = (ComparisonArguments, RunArguments)
    options, run = parse(kinds, [str(tmp_path / "a.yaml"), str(tmp_path / "b.json"), "--seeds", "7"])
    assert (options.steps, options.seeds, options.budget, run.smoke) == (4, [7], None, True)
    assert options.learning_rates == ["lora=1e-3,2e-3", "ft=1e-4"]
    assert options.sizes == ["lora=8"]
    for name, text, message in (
        ("c.yaml", "stepz: 3", "There is no option --stepz"),
        ("d.yaml", "- 3", "must hold options"),
        ("e.json", "{", "not valid JSON"),
        ("f.yaml", "steps: many", "invalid int value: 'many'"),
        ("missing.yaml", None, "cannot be read: No such file"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            parse(kinds, [str(tmp_path / name)])


@pytest.mark.parametrize(
    "wrong",
    [{"patience": 2}, {"eval_steps": 0}, {"seeds": [1, 1]}, {"seeds": []}, {"warmup_ratio": -1.0}, {"lr_ratio": 1.0}],
    ids=str,
)
def test_options_that_cannot_be_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        check(ComparisonArguments(**wrong), RunArguments())


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


def test_places_become_names(tmp_path: Path) -> None:
    found = without_places({"a": [str(tmp_path / "model"), "Salesforce/wikitext", "lora=1e-3"], "b": ("./x/y", 3)})
    assert found == {"a": ["model", "Salesforce/wikitext", "lora=1e-3"], "b": ["y", 3]}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_peak_memory_forgets_an_earlier_peak() -> None:
    reset_peak_memory()
    before = peak_memory()
    block = torch.ones(40_000_000)
    with_block = peak_memory()
    del block
    reset_peak_memory()
    assert before is not None and with_block is not None
    assert with_block - before > 100e6
    assert with_block - (peak_memory() or 0) > 100e6
