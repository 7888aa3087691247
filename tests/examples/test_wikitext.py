"""The WikiText example: a small run end to end, what it writes, and one clear sentence for each kind of bad input."""

import json
import math
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from example_scripts import EXAMPLES, launch, launch_two, module
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GPT2Config,
    RobertaConfig,
)

import lreg_peft  # noqa: F401  (registers LREG, which PeftModel.from_pretrained needs)

SCRIPT = EXAMPLES / "wikitext" / "run_wikitext.py"
AS_LORA = "lreg, as LoRA"
LORA, LREG = ["lora", "lora-linear-head"], ["lreg-head", "lreg"]
METHODS = ["ft", "bitfit", *LORA, *LREG]
SIZED = {**dict.fromkeys(LORA, "rank"), **dict.fromkeys(LREG, "n_components"), "lreg": "parameters"}

# One worker of pytest-xdist runs this module, so the small run happens once.
pytestmark = pytest.mark.xdist_group("wikitext")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """Output folder, standard output and JSON of one small run."""
    folder = tmp_path_factory.mktemp("wikitext")
    done = launch(
        ["-m", "accelerate.commands.launch", str(SCRIPT), "--smoke", "--no_progress", "--output_dir", str(folder)]
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, json.loads((folder / "results.json").read_text(encoding="utf-8"))


modules = partial(module, "wikitext")


# --- the small run --------------------------------------------------------------------------------------------------


def test_table_has_one_row_per_method(smoke: tuple[Path, str, dict[str, Any]]) -> None:
    folder, output, results = smoke
    assert [row["method"] for row in results["rows"]] == ["base", *METHODS, AS_LORA]
    table = [line for line in output.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["base", *METHODS, AS_LORA]
    assert len({len(line) for line in table}) == 1, "columns are not aligned"
    for line, row in zip(table[2:], results["rows"], strict=True):
        assert f"{figure(row):.2f}" in line
        assert f"{row['trainable_parameters']:,}" in line
    markdown = (folder / "results.md").read_text(encoding="utf-8")
    assert all(line in markdown for line in table)


def test_base_model_is_trained_and_every_method_gains(smoke: tuple[Path, str, dict[str, Any]]) -> None:
    """Bounds at about half of the gains seen, 3 to 20 %; a method that trains nothing stays at exactly 1."""
    results = smoke[2]
    perplexity = {row["method"]: figure(row) for row in results["rows"]}
    (unigram,) = results["references"].values()
    assert perplexity["base"] < 0.9 * unigram
    bounds = {
        "ft": 0.88,
        "bitfit": 0.985,
        "lora": 0.985,
        "lora-linear-head": 0.93,
        "lreg-head": 0.94,
        "lreg": 0.93,
    }
    assert bounds.keys() == set(METHODS)
    bounds[AS_LORA] = bounds["lreg"]
    for method, bound in bounds.items():
        assert perplexity[method] < bound * perplexity["base"], method


def test_budget_is_kept_and_used(smoke: tuple[Path, str, dict[str, Any]]) -> None:
    results = smoke[2]
    rows = {row["method"]: row for row in results["rows"]}
    counts = [rows[method]["trainable_parameters"] for method in SIZED]
    assert max(counts) == results["budget"], "the default is the least budget every adapter fits in"
    assert min(counts) > 0.75 * results["budget"]
    assert all(rows[method]["size"][name] >= 1 for method, name in SIZED.items())


def test_same_number_of_trials_and_best_one_taken(smoke: tuple[Path, str, dict[str, Any]]) -> None:
    rows = smoke[2]["rows"][1:-1]
    assert {len(row["trials"]) for row in rows} == {smoke[2]["settings"]["lr_trials"]}
    for row in rows:
        best = min(row["trials"], key=lambda trial: trial["perplexity"])
        assert row["learning_rate"] == best["learning_rate"]


def test_lreg_as_lora_has_a_row_of_its_own(smoke: tuple[Path, str, dict[str, Any]]) -> None:
    """Not trained again; its parameters are the LoRA's, and its time counts training and conversion."""
    folder, output, results = smoke
    lreg, lora = results["rows"][-2:]
    assert (lreg["method"], lora["method"], lora["source"]) == ("lreg", AS_LORA, "lreg")
    assert figure(lora) == pytest.approx(figure(lreg), rel=0.02)  # seen: 0.001
    assert figure(lora) != figure(lreg)
    assert lora["training_seconds"] > lreg["training_seconds"]
    assert lora["trials"] == [] and lora["units_per_second"] is None
    # The norm's components become ranks of the output layer, which has many outputs.
    assert lora["trainable_parameters"] > lreg["trainable_parameters"]
    assert 4 * lora["trainable_parameters"] <= lora["adapter_bytes"] < 4 * lora["trainable_parameters"] + 12_000
    assert "lreg, as LoRA: what lreg has trained, converted" in output
    lines = (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    runs = [json.loads(line).get("run") for line in lines]
    assert [run["as_lora"]["test"] for run in runs if run and run["as_lora"]] == [{"perplexity": figure(lora)}]


def test_files_and_provenance(smoke: tuple[Path, str, dict[str, Any]]) -> None:
    folder, _, results = smoke
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "base" / "model.safetensors").is_file()
    assert (folder / "base" / "tokenizer.json").is_file()
    for row in results["rows"][1:-1]:
        saved = sum(path.stat().st_size for path in (folder / "adapters" / row["method"]).glob("*.safetensors"))
        # fp32 values, mesh nodes and file headers; a saved backbone or head would be far beyond.
        assert 4 * row["trainable_parameters"] <= saved == row["adapter_bytes"]
        assert saved < 4 * row["trainable_parameters"] + 12_000
        assert row["units_per_second"] > 0
        assert row["training_seconds"] > 0
        assert (row["peak_memory"] is not None) == (sys.platform == "linux" or torch.cuda.is_available())
    provenance = results["provenance"]
    assert {"lreg_peft", "peft", "torch", "transformers", "python"} <= provenance["versions"].keys()
    assert {"command", "device", "dtype", "threads per process", "wall time in seconds"} <= provenance.keys()
    assert results["settings"]["seeds"] == [42]


@pytest.mark.parametrize("method", list(SIZED))
def test_saved_adapter_gives_the_reported_perplexity(smoke: tuple[Path, str, dict[str, Any]], method: str) -> None:
    """An evaluation of its own: every token but the first predicted once, from the tokens before it in its block."""
    folder, _, results = smoke
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    documents = modules("offline_text").load_offline_text(max_base_chars=1).test
    ids = [token for text in documents for token in [*encode_lines(tokenizer, text), tokenizer.eos_token_id]]
    assert len(ids) == results["data"]["tokens"]["test"]
    with warnings.catch_warnings():
        # PEFT notes that it tied weights of the base model; here nothing is merged.
        warnings.simplefilter("ignore", UserWarning)
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        model = PeftModel.from_pretrained(base, folder / "adapters" / method).eval()
    block_size = results["settings"]["block_size"]
    nll, predicted = 0.0, 0
    for start in range(0, len(ids) - 1, block_size - 1):
        block = torch.tensor([ids[start : start + block_size]])
        with torch.no_grad():
            log_probabilities = model(input_ids=block).logits[0, :-1].double().log_softmax(-1)
        nll -= log_probabilities.gather(1, block[0, 1:, None]).sum().item()
        predicted += block.shape[1] - 1
    assert predicted == len(ids) - 1
    reported = figure(next(row for row in results["rows"] if row["method"] == method))
    # fp32 logits of two batch shapes: relative differences of a few 1e-7 per token, in the mean far less.
    assert math.exp(nll / predicted) == pytest.approx(reported, rel=1e-5)


def test_a_second_start_with_other_settings_is_refused(
    smoke: tuple[Path, str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (smoke[0] / "results.json").read_bytes()
    with pytest.raises(SystemExit) as ended:
        modules("run_wikitext").main(["--smoke", "--no_progress", "--output_dir", str(smoke[0]), "--steps", "21"])
    assert ended.value.code == 2
    assert "holds runs with steps 20, and this command has steps 21" in capsys.readouterr().err
    assert (smoke[0] / "results.json").read_bytes() == before, "finished results are kept"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `gpt2` and `roberta` with random models and tokenizers of their own, and two texts."""
    folder = tmp_path_factory.mktemp("tiny")
    text = modules("offline_text").load_offline_text(max_base_chars=1)
    (folder / "train.txt").write_text("\n".join(text.train)[:40_000], encoding="utf-8")
    (folder / "test.txt").write_text("\n".join(text.test)[:8_000], encoding="utf-8")
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    for name in ("gpt2", "roberta"):
        tokenizer = modules("data").train_tokenizer(text.train, 400, masked=name == "roberta")
        config = AutoConfig.for_model(name, vocab_size=len(tokenizer), max_position_embeddings=40, **shape)
        torch.manual_seed(0)
        kind = AutoModelForMaskedLM if name == "roberta" else AutoModelForCausalLM
        kind.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def tiny_command(tiny: Path, name: str, output_dir: Path) -> list[str]:
    files = ["--train_file", str(tiny / "train.txt"), "--test_file", str(tiny / "test.txt")]
    methods = ["--methods", "lora-linear-head", "lreg", "--learning_rates", "lora-linear-head=1e-2", "lreg=1e-2"]
    lengths = ["--base_steps", "3", "--steps", "4", "--block_size", "32", "--lr_trials", "1", "--num_threads", "1"]
    return [
        *("--model_name_or_path", str(tiny / name), "--output_dir", str(output_dir), "--no_progress"),
        *(*files, *methods, *lengths),
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param("gpt2", "replicated", marks=pytest.mark.slow),
        ("gpt2", "sharded"),
        pytest.param("roberta", "replicated", marks=pytest.mark.slow),
    ],
)
def test_one_and_two_processes_give_the_same_figures(tiny: Path, name: str, kind: str, tmp_path: Path) -> None:
    """Batch, masks and start from data are divided, not multiplied: two processes take the same steps as one."""
    modules("run_wikitext").main(tiny_command(tiny, name, tmp_path / "one"))
    done = launch_two(kind, SCRIPT, tiny_command(tiny, name, tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| base ") == 1, "more than one process prints"
    one, two = (json.loads((tmp_path / n / "results.json").read_text(encoding="utf-8")) for n in ("one", "two"))
    assert one["settings"]["task_type"] == {"gpt2": "CAUSAL_LM", "roberta": "MASKED_LM"}[name]
    assert two["provenance"]["processes"] == 2
    converted = [AS_LORA] if name == "gpt2" else []
    assert [row["method"] for row in one["rows"]] == ["base", "lora-linear-head", "lreg", *converted]
    for alone, together in zip(one["rows"], two["rows"], strict=True):
        # Gradients are summed in another order: 7 steps of fp32 training let 1e-7 grow to less than 1e-5.
        assert figure(together) == pytest.approx(figure(alone), rel=1e-5), alone["method"]
    base, *adapted = map(figure, one["rows"])
    assert max(adapted) < 0.999 * base


@pytest.mark.slow
def test_a_model_that_cannot_be_sharded_is_one_sentence(tiny: Path, tmp_path: Path) -> None:
    done = launch_two("sharded", SCRIPT, tiny_command(tiny, "roberta", tmp_path))
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "'lm_head.bias' and 'lm_head.decoder.bias' are one parameter" in error
    assert "accelerate_ddp.yaml" in error


def figure(row: dict[str, Any]) -> float:
    return row["test"]["perplexity"]["mean"]


def encode_lines(tokenizer: Any, text: str) -> list[int]:
    return [token for line in text.splitlines(keepends=True) for token in tokenizer(line)["input_ids"]]


# --- the text and the blocks ----------------------------------------------------------------------------------------


def test_offline_splits_share_no_paragraph() -> None:
    offline_text = modules("offline_text")
    text = offline_text.load_offline_text()
    again = offline_text.load_offline_text(max_base_chars=1)
    assert (text.train, text.tuning, text.test) == (again.train, again.tuning, again.test), "not deterministic"
    paragraphs = {}
    for part, documents in vars(text).items():
        assert sum(map(len, documents)) > 20_000, f"too little text in {part}"
        keys = (offline_text.paragraph_key(p) for document in documents for p in document.split("\n\n"))
        paragraphs[part] = {key for key in keys if len(key) >= offline_text.MIN_DUPLICATE_CHARS}
    parts = list(paragraphs)
    for index, part in enumerate(parts):
        for other in parts[index + 1 :]:
            assert not paragraphs[part] & paragraphs[other], f"{part} and {other} overlap"


def test_masks_follow_from_seed_epoch_and_sample_alone(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny / "roberta")
    ids = [tokenizer.cls_token_id, *range(10, 250), tokenizer.sep_token_id]
    samples = [{"input_ids": ids, "index": index} for index in range(4)]

    def masking(seed: int = 1, epoch: int = 0) -> Any:
        made = modules("data").SeededMasking(tokenizer, 0.15, seed)
        made.set_epoch(epoch)
        return made

    together = masking()(samples)
    alone = masking()(samples[::-1])
    for name in ("input_ids", "labels"):
        assert torch.equal(together[name], alone[name].flip(0))
    found = together["labels"] != -100
    assert not found[:, [0, -1]].any(), "special tokens need not be found"
    assert 0.1 < found.double().mean() < 0.2
    assert torch.equal(together["labels"][found], torch.tensor(ids).expand(4, -1)[found])
    others = [masking(seed=2)(samples), masking(epoch=1)(samples), {"labels": together["labels"].roll(1, 0)}]
    assert not any(torch.equal(together["labels"], other["labels"]) for other in others)


@pytest.mark.parametrize("n_tokens", [1, 29, 30, 31, 200])
def test_masked_evaluation_has_every_token_in_one_block(tiny: Path, n_tokens: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny / "roberta")
    tokens = torch.arange(10, 10 + n_tokens)
    masking = modules("data").SeededMasking(tokenizer, 0.99, 0)
    batches = modules("data").masked_evaluation_batches(tokens, 32, 3, tokenizer, masking)
    whole = [torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"]) for batch in batches]
    inner = torch.cat([row[1:-1] for batch in whole for row in batch])
    assert torch.equal(inner, tokens)


@pytest.mark.parametrize("causal", [True, False])
def test_perplexity_is_that_of_the_labels(causal: bool) -> None:
    """Against the formula, for a model whose logits are what they are, in two batches of different shape."""
    torch.manual_seed(0)
    table = torch.nn.Embedding(7, 7)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = table

        def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
            return SimpleNamespace(logits=self.table(input_ids))

    batches = [{"input_ids": ids, "labels": ids.roll(2, 1).masked_fill(ids == 3, -100)} for ids in
               (torch.randint(0, 7, (3, 5)), torch.randint(0, 7, (1, 4)))]  # fmt: skip
    nll = []
    for batch in batches:
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            pairs = zip(ids, labels[1:], strict=False) if causal else zip(ids, labels, strict=True)
            nll += [-table.weight[i].log_softmax(-1)[label].item() for i, label in pairs if label != -100]
    expected = math.exp(sum(nll) / len(nll))
    assert modules("language_model").perplexity(Model(), batches, causal) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n_tokens", [2, 5, 8, 9, 15, 16, 100])
def test_evaluation_predicts_every_token_but_the_first_once(n_tokens: int) -> None:
    batches = modules("data").overlapping(torch.arange(n_tokens), block_size=8, batch_size=3)
    predicted = torch.cat([batch[:, 1:].flatten() for batch in batches])
    assert torch.equal(predicted, torch.arange(1, n_tokens))


# --- presets --------------------------------------------------------------------------------------------------------

GPT2_SHAPES = {"gpt2": (768, 12), "gpt2-medium": (1024, 24), "gpt2-large": (1280, 36)}


@pytest.mark.parametrize(
    ("name", "lora", "lreg"),
    [
        ("gpt2", 294_912, 202_566),
        ("gpt2-medium", 393_216, 404_106),
        ("gpt2-large", 737_280, 606_927),
        ("roberta-base", 294_912, 303_128),
    ],
)
def test_paper_presets_have_the_published_counts(name: str, lora: int, lreg: int) -> None:
    args = modules("run_wikitext").parse_arguments(["--model_name_or_path", f"hub/{name}", "--preset", "paper"])
    assert (args.base_steps, args.steps) == (200, 200)
    assert args.dataset_name == "Salesforce/wikitext"
    if name in GPT2_SHAPES:
        width, depth = GPT2_SHAPES[name]
        config = GPT2Config(n_embd=width, n_layer=depth, n_head=width // 64)
        task_type, kind = "CAUSAL_LM", AutoModelForCausalLM
    else:
        config, task_type, kind = RobertaConfig(vocab_size=50_265), "MASKED_LM", AutoModelForMaskedLM

    def empty_model() -> Any:
        with torch.device("meta"):
            return kind.from_config(config)

    task = SimpleNamespace(task_type=task_type, new_modules=(), empty_model=empty_model, rates="language_model")
    sizes = modules("comparison.sizes")
    methods = modules("comparison.methods").select_methods(args.methods, task_type)
    given, counts = sizes.given_sizes(args.sizes, methods), sizes.Sizes(task, args.n_nodes)
    assert {m.name: counts.count(m, given[m.name]) for m in methods} == {"lora": lora, "lreg-head": lreg}
    grids = sizes.learning_rate_grids(methods, task, 1, 3.0, args.learning_rates)
    assert grids == {"lora": [1e-5], "lreg-head": [1e-3]}


@pytest.mark.parametrize("name", [*GPT2_SHAPES, "roberta-base"])
def test_fair_presets_search_every_method_alike(name: str) -> None:
    command = ["--model_name_or_path", name, "--train_file", "a.txt", "--test_file", "b.txt", "--seeds", "7"]
    args = modules("run_wikitext").parse_arguments(command)
    assert args.seeds == [7]
    assert (args.dataset_name, args.train_file) == (None, "a.txt"), "files take the preset's place"
    assert {entry.partition("=")[0] for entry in args.learning_rates} == set(METHODS)
    assert {len(entry.split(",")) for entry in args.learning_rates} == {args.lr_trials}


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Callable[..., str]:
    """Run the script in this process, expect exit code 2 and one sentence, return the sentence."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.txt").write_text("One line of text.\nAnother line of text.\n" * 200, encoding="utf-8")
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "latin1.txt").write_bytes("Füße".encode("latin-1"))

    def run(*argv: str) -> str:
        with pytest.raises(SystemExit) as ended:
            modules("run_wikitext").main(["--smoke", "--no_progress", *argv])
        assert ended.value.code == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ")
        assert len(error.splitlines()) == 1
        return error

    return run


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--methods", "lora", "loar"], ["'loar'", "ft, bitfit, lora"]),
        (["--train_file", "empty.txt", "--validation_file", "good.txt"], ["'empty.txt'", "no text"]),
        (["--train_file", "latin1.txt", "--validation_file", "good.txt"], ["'latin1.txt'", "UTF-8", "0xfc"]),
        (["--train_file", "missing.txt", "--validation_file", "good.txt"], ["'missing.txt'", "No such file"]),
        (["--train_file", "good.txt"], ["--validation_file or a --test_file", "missing"]),
        (["--train_file", "good.txt", "--validation_file", "good.txt", "--dataset_name", "x"], ["not both"]),
        (["--train_file", "good.txt", "--validation_file", "good.txt", "--block_size", "9999"], ["--block_size"]),
        (["--budget", "10"], ["budget of 10", "lreg-head has", "--budget"]),
        (["--budget", "0"], ["--budget must be at least 1"]),
        (["--base_steps", "0"], ["--base_steps must be at least 1"]),
        (["--n_nodes", "1"], ["--n_nodes must be at least 2"]),
        (["--model_name_or_path", "./missing"], ["'./missing'", "does not exist"]),
        (["--model_name_or_path", "."], ["Could not load '.'", "its folder"]),
        (["--learning_rates", "lora=fast"], ["--learning_rates", "'lora=fast'"]),
        (["--output_dir", "good.txt"], ["'good.txt'", "cannot be created"]),
        (["--preset", "fairer"], ["no preset 'fairer'", "fair or paper"]),
        (["--preset", "paper"], ["'paper' needs --model_name_or_path", "gpt2-large, gpt2-medium, roberta-base"]),
        (["--architecture", "gpt5"], ["no model type 'gpt5'"]),
        (["--architecture", "vit"], ["'vit'", "no language model"]),
        (["--mlm_probability", "1"], ["--mlm_probability"]),
        (["--stepz", "3"], ["no option --stepz"]),
        (["--methods", "vocab-bias"], ["'vocab-bias'", "for CAUSAL_LM"]),
        (["--batch_size", "100000"], ["training samples", "--batch_size 100000"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_bad_input_is_one_sentence(refused: Callable[..., str], argv: list[str], expected: list[str]) -> None:
    error = refused(*argv)
    for part in expected:
        assert part in error


def test_unreachable_hub_is_one_sentence_that_names_the_offline_way() -> None:
    """In a process of its own: the hub client reads its address once, when it is imported."""
    nowhere = "http://127.0.0.1:9"  # the discard port: nothing listens
    done = launch([str(SCRIPT), "--smoke", "--dataset_name", "someone/text"], HF_ENDPOINT=nowhere)
    assert done.returncode == 2
    assert done.stdout == ""
    (error,) = done.stderr.strip().splitlines()
    assert "'someone/text'" in error
    assert "without a hub, run with no arguments or give local text with --train_file" in error
