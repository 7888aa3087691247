"""What README and docs show is what happens: every block of Python in them runs, in order, on small stand-ins."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import lreg_peft

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


def test_quick_start_prints_what_the_readme_says(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", block("quick-start")], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == block("quick-start-output").split()
    size = (tmp_path / "my-adapter" / "adapter_model.safetensors").stat().st_size
    assert round(size / 1e6, 1) == 0.8


# --- all blocks -------------------------------------------------------------------------------------------------------

SMALL_GPT2 = {**tiny.SIZES["gpt2"], "n_positions": 16}


class Samples(torch.utils.data.Dataset):
    """A few sentences for the tiny models."""

    def __init__(self, n_samples: int = 16) -> None:
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(3, tiny.VOCABULARY, (n_samples, 9), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def names_of_every_page() -> dict[str, Any]:
    """What docs/README.md says is given: model, samples, batches, arguments."""
    dataset = Samples()
    arguments = TrainingArguments("out", max_steps=6, per_device_train_batch_size=4, use_cpu=True, report_to=[])
    arguments.disable_tqdm = True
    return {
        "base": tiny.gpt2(),
        "train_dataset": dataset,
        "train_dataloader": DataLoader(dataset, batch_size=4),
        "args": arguments,
    }


def prepare_readme(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The quick start makes a GPT-2 at full size, which its own test above does."""
    monkeypatch.setattr(transformers, "GPT2Config", lambda: transformers.AutoConfig.for_model("gpt2", **SMALL_GPT2))
    return {"Trainer": Trainer}


def prepare_meshes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Moves after every second step; batches to look at."""
    monkeypatch.setattr(lreg_peft, "LRegCallback", lambda every: lreg_peft.callback.LRegCallback(every=2))
    return {"batches": DataLoader(Samples(), batch_size=4)}


def prepare_saved_adapter(
    folder: str, task: str, base: Callable[[], torch.nn.Module], base_folder: str
) -> Callable[[pytest.MonkeyPatch], dict[str, Any]]:
    """What a comparison leaves behind: a base checkpoint and an adapter that names it."""

    def prepare(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        model = base()
        model.save_pretrained(base_folder)
        model.name_or_path = base_folder
        lreg_peft_model = tiny.adapt(model, task_type=task, target_modules="all-linear")
        lreg_peft_model.peft_config["default"].base_model_name_or_path = base_folder
        lreg_peft_model.save_pretrained(folder)
        return {}

    return prepare


#: Page -> what it needs beside the names above, made in the empty folder that the page runs in.
PREPARE: dict[str, Callable[[pytest.MonkeyPatch], dict[str, Any]]] = {
    "README.md": prepare_readme,
    "docs/meshes.md": prepare_meshes,
}


@pytest.mark.parametrize("page", PAGES_WITH_CODE)
def test_every_block_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, in an empty folder; a warning is an error."""
    monkeypatch.chdir(tmp_path)
    namespace = names_of_every_page()
    if page in PREPARE:
        namespace |= PREPARE[page](monkeypatch)
    for line, source in python_blocks(page):
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
