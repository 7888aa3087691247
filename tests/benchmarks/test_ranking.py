"""Ranks over several studies, by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peft_methods import ranking, ranking_data

# Test figures of two seeds: classification, where more is better, and a language model, where less is.
WORDS = {"lreg": [0.8, 0.9], "unilora": [0.7, 0.9], "lora-linear": [0.6, 0.5], "lora-linear-start": [0.9, 0.7]}
TEXT = {
    "lreg": [20.0, 21.0],
    "unilora": [19.0, 20.5],
    "lora-linear-head": [30.0, 19.0],
    "lora-linear-bias": [18.0, 18.0],
}


def record(
    figures: dict[str, list[float]], metric: str, scale: float, seeds: tuple[int, ...] = (1, 2)
) -> dict[str, Any]:
    """What the ranking reads of a study."""
    rows = [
        {
            "method": name,
            "steps": 200,
            "seeds": list(seeds),
            "cpu_seconds": 10.0,
            "test": [{metric: value} for value in values],
        }
        for name, values in figures.items()
    ]
    return {"metric": {"name": metric, "higher_is_better": metric == "accuracy", "scale": scale}, "rows": rows}


@pytest.fixture
def cells() -> list[ranking.Cell]:
    """Both."""
    return [
        *ranking.cells_of(record(WORDS, "accuracy", 100.0), "words"),
        *ranking.cells_of(record(TEXT, "perplexity", 1.0), "text"),
    ]


def test_ranks_wins_and_distances(cells: list[ranking.Cell]) -> None:
    found = ranking.summary(cells)
    assert list(found) == ["unilora", "lreg", "lora-linear", "lora-linear, started as lreg"]
    # words: 1 and 1.5; text: 2 and 3
    assert found["lreg"]["mean_rank"] == pytest.approx((1.25 + 2.5) / 2)
    assert found["lreg"]["standard_error"] == pytest.approx((2.5 - 1.25) / 2)
    # words: 2 and 1.5; text: 1 and 2
    assert found["unilora"]["mean_rank"] == pytest.approx((1.75 + 1.5) / 2)
    assert [one["wins"] for one in found.values()] == [1, 1, 0, 1]
    assert [one["last"] for one in found.values()] == [0, 0, 2, 0]
    # behind Uni-LoRA by 1 and 0.5, mean 0.75 with a standard error of 0.25
    assert found["lreg"]["most_behind"] == pytest.approx(3.0)
    # words: 2 of 4, then 1.5; text: 3 of 4, then 4
    assert found["lreg"]["rank_with_controls"] == pytest.approx((1.75 + 3.5) / 2)
    assert found["lreg"]["cpu_seconds"] == 20.0


def test_table_and_picture(cells: list[ranking.Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (("words", record(WORDS, "accuracy", 100.0)), ("text", record(TEXT, "perplexity", 1.0))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.json").write_text(json.dumps(content), encoding="utf-8")
    paths = [str(tmp_path / "words" / "study.json"), f"prose={tmp_path / 'text' / 'study.json'}"]
    monkeypatch.setattr("sys.argv", ["ranking", *paths, "--output_dir", str(tmp_path / "out")])
    ranking.main()
    text = (tmp_path / "out" / "ranking.md").read_text("utf-8")
    assert "| words (accuracy) | 200 | 80.0 ± 14.1 | **85.0 ± 7.1** | 55.0 ± 7.1 | 80.0 ± 14.1 |" in text
    assert "| prose (perplexity) | 200 | **19.8 ± 1.1** | 20.5 ± 0.7 |" in text
    assert (tmp_path / "out" / "ranking.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_that_differ_are_refused() -> None:
    content = record(WORDS, "accuracy", 100.0)
    content["rows"][1]["seeds"] = [1, 3]
    with pytest.raises(ValueError, match=r"words, 200 steps: every method needs the same seeds"):
        ranking.cells_of(content, "words")


def test_data_from_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        f"Package: a{i}\nSource: s{i}\nDescription: Text {i}\nSection: {s}\n"
        for i, s in enumerate(["net", "math"] * 80)
    ]
    entries += ["Package: b\nSource: s0\nDescription: the second one of a source\nSection: net\n"]
    entries += ["Package: c\nDescription: in another section\nSection: rust\n"]
    (tmp_path / "Packages").write_text("\n".join(entries), encoding="utf-8")
    (tmp_path / "sts").mkdir()
    short, long = "main\tx\ty\t1\t3.2\tA cat.\tThe cat sits.\n", f"main\tx\ty\t2\t1.0\t{'word ' * 17}\tone\n"
    for part in ("train", "test"):
        (tmp_path / "sts" / f"sts-{part}.csv").write_text(short + long, encoding="utf-8")
    (tmp_path / "said").mkdir()
    sayings = [f"{i} " + "word\n" * 12 for i in range(10)]
    (tmp_path / "said" / "all").write_text("\n%\n".join([*sayings, sayings[0], "too short"]), encoding="utf-8")
    options = ["--packages", tmp_path / "Packages", "--sts", tmp_path / "sts", "--fortunes", tmp_path / "said"]
    monkeypatch.setattr("sys.argv", ["data", *map(str, options), "--output_dir", str(tmp_path / "out")])
    ranking_data.main()
    out = tmp_path / "out"
    sections = (out / "sections" / "train.csv").read_text("utf-8") + (out / "sections" / "validation.csv").read_text(
        "utf-8"
    )
    assert sections.count(",net\n") == sections.count(",math\n") == 80
    assert "second" not in sections
    assert (out / "sts" / "dev.tsv").read_text("utf-8").splitlines()[1:] == ["0\tx\tA cat.\tThe cat sits.\t3.2"]
    assert (out / "paraphrases" / "dev.tsv").read_text("utf-8").splitlines()[1:] == ["1\t0\t0\tA cat.\tThe cat sits."]
    parts = [(out / "fortunes" / f"{name}.txt").read_text("utf-8").splitlines() for name in ("train", "test")]
    assert list(map(len, parts)) == [8, 2]
