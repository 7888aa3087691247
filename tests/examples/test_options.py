"""What scripts answer before they import anything slow, and how options become what a comparison takes."""

import resource
from pathlib import Path

import pytest
from example_scripts import EXAMPLES, ROOT, launch

from examples.comparison.environment import without_places
from examples.comparison.options import Parser, UserError, check

SCRIPTS = [
    *(("", f"{name}/finetune_{name}.py") for name in ("glue", "vision", "wikitext")),
    *(("", f"{name}/run_{name}.py") for name in ("glue", "wikitext")),
    *(("", f"{path}.py") for path in ("how_it_works/draw", "regression/regress")),
    *(("-m", f"benchmarks.peft_methods.{name}") for name in ("glue", "wikitext")),
    *(("-m", f"benchmarks.{name}.run_{name}") for name in ("regression", "vision")),
]


@pytest.mark.parametrize(("option", "name"), SCRIPTS)
def test_help_comes_at_once(option: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch and transformers are imported, which takes seconds."""
    monkeypatch.chdir(ROOT)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = launch([*([option, name] if option else [str(EXAMPLES / name)]), "--help"])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5  # seen: 0.1 to 0.3


def test_options_from_files_and_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "steps: 3\nseeds: [1, 2]\nbudget:\nlearning_rates: {lora: [1e-3, 2e-3], ft: 1e-4}\n"
    )
    (tmp_path / "b.json").write_text('{"steps": 4, "smoke": true, "sizes": {"lora": 8}}')
    args = Parser(None, "toy").parse([str(tmp_path / "a.yaml"), str(tmp_path / "b.json"), "--seeds", "7"])
    assert (args.steps, args.seeds, args.budget, args.smoke) == (4, [7], None, True)
    assert args.learning_rates == ["lora=1e-3,2e-3", "ft=1e-4"]
    assert args.sizes == ["lora=8"]
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
            Parser(None, "toy").parse([str(tmp_path / name)])


@pytest.mark.parametrize("wrong", ["--seeds 1 1", "--lr_ratio 1", "--lr_ratio nan", "--steps 0", "--n_nodes 1"])
def test_options_that_cannot_be_are_refused_by_name(wrong: str) -> None:
    with pytest.raises(UserError, match=wrong.split()[0]):
        check(Parser(None, "toy").parse(wrong.split()))


def test_places_become_names(tmp_path: Path) -> None:
    found = without_places({"a": [str(tmp_path / "model"), "Salesforce/wikitext", "lora=1e-3"], "b": ("./x/y", 3)})
    assert found == {"a": ["model", "Salesforce/wikitext", "lora=1e-3"], "b": ["y", 3]}
