"""What the options of the examples say of themselves, and who decides on the number of threads."""

import os
import resource
from pathlib import Path

import pytest
from example_scripts import EXAMPLES, example_modules, launch


@pytest.mark.parametrize("name", ["glue", "wikitext"])
def test_the_opposite_of_an_option_has_a_help_of_its_own(name: str) -> None:
    with example_modules(name) as load:
        parser = load("comparison.options").Parser(load("arguments").KINDS)
        helps = {option: action.help for action in parser._actions for option in action.option_strings}
    opposites = [option for option in helps if option.startswith("--no_")]
    assert "--no_progress" in opposites
    for option in opposites:
        positive = option.replace("--no_", "--")
        assert helps[option] == f"Switch {positive} off."
        assert helps[positive] not in (None, helps[option])


@pytest.mark.parametrize("name", ["glue", "vision", "wikitext"])
def test_help_comes_at_once(name: str) -> None:
    """Before torch and transformers are imported, which takes seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = launch([str(EXAMPLES / name / f"finetune_{name}.py"), "--help"])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "--learning_rate" in done.stdout, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0


PROBE = """
import sys
sys.path.insert(0, {examples!r})
import torch
from comparison.environment import set_threads, start_processes
start_processes()
for n_threads in (None, 3):
    set_threads(n_threads)
    print("threads", torch.get_num_threads())
"""


@pytest.mark.parametrize("given", [pytest.param("1", marks=pytest.mark.slow), None])
def test_threads_are_those_of_the_option_then_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    """Under `accelerate launch`, which sets OMP_NUM_THREADS to 1 for its process where nobody has set it."""
    script = tmp_path / "probe.py"
    script.write_text(PROBE.format(examples=str(EXAMPLES)), encoding="utf-8")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    done = launch(
        ["-m", "accelerate.commands.launch", str(script)], **({} if given is None else {"OMP_NUM_THREADS": given})
    )
    assert done.returncode == 0, done.stderr
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    wanted = int(given) if given else min(usable, 8)
    assert [line for line in done.stdout.splitlines() if "threads" in line] == [f"threads {wanted}", "threads 3"]


@pytest.mark.parametrize(
    ("value", "wanted"), [("1", 1), ("6", 6), ("0", None), ("-2", None), ("many", None), ("", None)]
)
def test_without_a_launcher_the_environment_is_the_users(
    monkeypatch: pytest.MonkeyPatch, value: str, wanted: int | None
) -> None:
    """What is no number of threads is left to OpenMP, which says so itself."""
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    with example_modules("wikitext") as load:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert load("comparison.environment").threads_from_environment() == wanted
