"""What the comparison is given and what a kill leaves of its ledger: named, or gone on from."""

import json
import math
from pathlib import Path

import kills
import pytest
from example_scripts import example_modules

RUN = {
    "method": "lreg",
    "size": 2,
    "n_nodes": 3,
    "learning_rate": 1e-3,
    "tuning": {"loss": 1.0},
    "steps": 10,
    "best_step": 10,
    "seconds": 1.0,
    "step_seconds": 0.1,
    "peak_memory": None,
}
SETTINGS = {"text": "Lagrange über Ἀθῆναι \u2028 𒀭", "steps": 10}


@pytest.fixture(scope="module")
def modules():
    with example_modules("wikitext") as load:
        yield load


@pytest.fixture(scope="module")
def ledger(modules):
    return modules("comparison.ledger")


def write(ledger, folder: Path, seeds) -> None:
    for seed in seeds:
        book = ledger.Ledger(folder, SETTINGS, is_main=True)
        run = ledger.Run(seed=seed, **RUN)
        if book.find(run.key) is None:
            book.add(run)


def test_a_ledger_torn_at_any_byte_loses_one_line(tmp_path, ledger):
    write(ledger, tmp_path, range(3))
    file = tmp_path / ledger.LEDGER_FILE
    whole = file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    assert len(ends) == 4
    for size in range(len(whole) + 1):
        file.write_bytes(whole[:size])
        book = ledger.Ledger(tmp_path, SETTINGS, is_main=True)
        complete = sum(end <= size for end in ends)
        assert book.n_found == max(0, complete - 1)
        assert file.read_bytes() == whole[: ends[complete - 1] if complete else 0]
    write(ledger, tmp_path, range(3))
    assert file.read_bytes() == whole


def test_a_ledger_killed_at_any_operation_goes_on(tmp_path, ledger):
    (tmp_path / "whole").mkdir()
    write(ledger, tmp_path / "whole", range(4))
    expected = (tmp_path / "whole" / ledger.LEDGER_FILE).read_bytes()
    (tmp_path / "count").mkdir()
    total = kills.count_operations(lambda: write(ledger, tmp_path / "count", range(4)), tmp_path / "count")
    assert total >= 8
    for instant in range(total):
        folder = tmp_path / str(instant)
        folder.mkdir()
        kills.kill_at(lambda folder=folder: write(ledger, folder, range(4)), folder, instant)
        write(ledger, folder, range(4))
        assert (folder / ledger.LEDGER_FILE).read_bytes() == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("name", ["warmup_ratio", "weight_decay", "lr_ratio", "head_learning_rate"])
def test_numbers_that_mean_nothing(modules, name, value):
    options = modules("comparison.options")
    with pytest.raises(modules("comparison.errors").UserError, match=f"--{name} must be"):
        options.check(options.ComparisonArguments(**{name: value}), options.RunArguments())


@pytest.mark.parametrize("text", ["{", "[]\n", '{"settings": 3', "\x00\n", '"x"\n'])
def test_a_ledger_that_is_something_else(tmp_path, ledger, text):
    (tmp_path / ledger.LEDGER_FILE).write_text(text)
    if "\n" in text:
        with pytest.raises(ledger.UserError, match=r"is damaged.*delete it"):
            ledger.Ledger(tmp_path, SETTINGS, is_main=True)
    else:
        assert ledger.Ledger(tmp_path, SETTINGS, is_main=True).n_found == 0


def test_settings_are_compared_as_json_has_them(tmp_path, ledger):
    write(ledger, tmp_path, [1])
    first = json.loads((tmp_path / ledger.LEDGER_FILE).read_text(encoding="utf-8").split("\n")[0])
    assert first == {"settings": SETTINGS}
