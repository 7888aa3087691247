"""GLUE's data and figures: official files with their habits, labels, splits, the offline pairs, the metrics."""

import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from example_scripts import module

modules = partial(module, "glue")


def options(**given: object) -> SimpleNamespace:
    """The data options with their defaults."""
    sources = {"task": None, "train_file": None, "data_dir": None, "dataset_name": "nyu-mll/glue"}
    sizes = {"tuning_samples": None, "max_train_samples": None, "max_eval_samples": None}
    return SimpleNamespace(**{**sources, **sizes, **given})


# --- official files -------------------------------------------------------------------------------------------------

MNLI_HEADER = (
    "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
)
# Two rows of every task as its official training file lays them out, and what has to come out of them.
OFFICIAL = {
    "cola": (None, ["gj04\t1\t\tThe sailors rode.", "gj04\t0\t*\tThey drank free."], ["The sailors rode."], [1, 0]),
    "sst2": ("sentence label", ["hide new secretions \t0", "a joy \t1"], ["hide new secretions"], [0, 1]),
    "mrpc": (
        "Quality #1_ID #2_ID #1_String #2_String",
        ['1\t70\t71\tHe said "no .\tShe said "no .', "0\t72\t73\tA b .\tC d ."],
        ['He said "no .', 'She said "no .'],
        [1, 0],
    ),
    "qqp": (
        "id qid1 qid2 question1 question2 is_duplicate",
        ["1\t3\t4\tWho?\tWhat?\t0", "2\t5\t6\tWhy?\tWhy so?\t1"],
        ["Who?", "What?"],
        [0, 1],
    ),
    "stsb": (
        "index genre filename year old_index source1 source2 sentence1 sentence2 score",
        ["0\tnews\tf\t2012\t1\tn\tn\tA plane.\tAn aeroplane.\t5.000", "1\tnews\tf\t2012\t1\tn\tn\tA.\tB.\t0.250"],
        ["A plane.", "An aeroplane."],
        [5.0, 0.25],
    ),
    "mnli": (
        f"{MNLI_HEADER} sentence1 sentence2 label1 gold_label",
        [f"{i}\t1\t1e\tfiction\t(\t)\t(\t)\tIt rains.\tIt is wet.\tneutral\t{label}" for i, label in enumerate("en")],
        ["It rains.", "It is wet."],
        [0, 1],
    ),
    "qnli": (
        "index question sentence label",
        ["0\tWhen?\tIn 1901.\tentailment", "1\tWhere?\tNo.\tnot_entailment"],
        ["When?", "In 1901."],
        [0, 1],
    ),
    "rte": (
        "index sentence1 sentence2 label",
        ["0\tIt is so.\tSo it is.\tentailment", "1\tA.\tB.\tnot_entailment"],
        ["It is so.", "So it is."],
        [0, 1],
    ),
    "wnli": (
        "index sentence1 sentence2 label",
        ["0\tI put it in.\tIt went in.\t1", "1\tA.\tB.\t0"],
        ["I put it in.", "It went in."],
        [1, 0],
    ),
}
SPELLED = {"\te": "\tentailment", "\tn": "\tneutral"}


def write_official(folder: Path, name: str, repeat: int = 10) -> None:
    """A folder of the official download with one task; the header of MRPC has blanks in its names and a BOM before."""
    header, rows, _, _ = OFFICIAL[name]
    if name == "mnli":
        rows = [row[:-2] + SPELLED[row[-2:]] for row in rows]
    lines = rows * repeat
    if header is not None:
        lines = ["\t".join(header.split()).replace("_", " ") if name == "mrpc" else "\t".join(header.split()), *lines]
    folder.mkdir(parents=True, exist_ok=True)
    names = ["train", "dev_matched", "dev_mismatched"] if name == "mnli" else ["train", "dev"]
    for part in names:
        text = "\n".join(lines) + "\n"
        (folder / f"{part}.tsv").write_text(text, encoding="utf-8-sig" if name == "mrpc" else "utf-8")


@pytest.mark.parametrize("name", list(OFFICIAL))
def test_official_files_of_every_task(tmp_path: Path, name: str) -> None:
    task = modules("tasks").find_task(name)
    write_official(tmp_path / task.folder, name)
    data = modules("data").load_data(options(task=name, data_dir=str(tmp_path), tuning_samples=4))
    _, _, texts, labels = OFFICIAL[name]
    assert list(data.evaluations) == [evaluation for evaluation, _ in task.evaluations]
    for samples in data.evaluations.values():
        assert samples.texts[0] == tuple(texts)
        assert samples.labels == labels * 10
    assert (len(data.train), len(data.tuning)) == (16, 4)
    assert len(data.train.texts[0]) == len(task.sentences)


def test_mnli_has_two_evaluations_and_the_folder_may_be_the_task_s_own(tmp_path: Path) -> None:
    write_official(tmp_path, "mnli")
    data = modules("data").load_data(options(task="MNLI", data_dir=str(tmp_path)))
    assert list(data.evaluations) == ["matched", "mismatched"]


def test_quotation_marks_are_characters(tmp_path: Path) -> None:
    """A CSV reader with its usual settings makes one row of these three."""
    lines = ['"an open quote \t1', 'said " and left \t0', '"" \t1', "plain \t0"]
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "\n".join(lines) + "\n", encoding="utf-8")
    texts, labels, n_torn = modules("tsv").read_tsv(tmp_path / "train.tsv", modules("tasks").find_task("sst2"))
    assert texts == [('"an open quote',), ('said " and left',), ('""',), ("plain",)]
    assert labels == ["1", "0", "1", "0"]
    assert n_torn == 0


def test_only_line_feeds_end_a_row(tmp_path: Path) -> None:
    """str.splitlines would also break at U+0085 and U+2028, which occur in real questions."""
    (tmp_path / "train.tsv").write_text("sentence\tlabel\none\u0085two\u2028three\t1\n", encoding="utf-8")
    texts, _, _ = modules("tsv").read_tsv(tmp_path / "train.tsv", modules("tasks").find_task("sst2"))
    assert texts == [("one\u0085two\u2028three",)]


def test_a_few_torn_rows_are_left_out_and_named(tmp_path: Path) -> None:
    write_official(tmp_path, "qqp", repeat=100)
    with (tmp_path / "train.tsv").open("a", encoding="utf-8") as file:
        file.write("7\t8\t9\tA question that breaks\n")
    data = modules("data").load_data(options(task="qqp", data_dir=str(tmp_path)))
    assert data.notes[0] == "1 rows of train.tsv lack a column and were left out."


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("sentence\n" + "good\n" * 9, ["no column 'label'", "'sentence'"]),
        ("sentence\tlabel\n" + "good\t1\n" * 9 + "bad\t7\n", ["Sample 10", "'7'", "0 (negative), 1 (positive)"]),
        ("sentence\tlabel\n" + "good\t-1\n" * 9, ["Sample 1", "not published"]),
        ("sentence\tlabel\n" + "good\tpositive\nhalf\t0.5\n", ["Sample 2", "'0.5'"]),
        ("sentence\tlabel\n" + "no label\n" * 9, ["9 of the 9 rows", "columns 1, 2"]),
        ("sentence\tlabel\n", ["has no rows"]),
        ("", ["no column 'sentence', 'label'", "names none"]),
        (b"sentence\tlabel\nFu\xdfball\t1\n", ["not UTF-8"]),
    ],
)
def test_bad_files_are_one_sentence(tmp_path: Path, content: str | bytes, expected: list[str]) -> None:
    as_bytes = content if isinstance(content, bytes) else content.encode()
    for part in ("train", "dev"):
        (tmp_path / f"{part}.tsv").write_bytes(as_bytes)
    with pytest.raises(modules("comparison.options").UserError) as refused:
        modules("data").load_data(options(task="sst2", data_dir=str(tmp_path)))
    message = str(refused.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize("label", ["5.01", "-0.1", "nan", "five"])
def test_regression_labels_stay_on_their_scale(label: str) -> None:
    samples, task = modules("samples"), modules("tasks").find_task("stsb")
    with pytest.raises(modules("comparison.options").UserError, match="numbers from 0 to 5"):
        samples.parse_labels(task, ["2.5", label], "a file")


def test_what_cannot_be_found_is_said(tmp_path: Path) -> None:
    error, load = modules("comparison.options").UserError, modules("data").load_data
    with pytest.raises(error, match=r"no GLUE task 'sts-3'; did you mean 'stsb'\? The tasks are cola, sst2"):
        load(options(task="sts-3"))
    with pytest.raises(error, match="does not exist"):
        load(options(task="rte", data_dir=str(tmp_path / "missing")))
    with pytest.raises(error, match=r"no train file of RTE: looked for RTE/train.tsv, train.tsv"):
        load(options(task="rte", data_dir=str(tmp_path)))
    with pytest.raises(error, match="Name it with --task"):
        load(options(data_dir=str(tmp_path)))
    write_official(tmp_path, "rte")
    with pytest.raises(error, match="--tuning_samples 15 and --max_train_samples 6 need 21 training samples"):
        load(options(task="rte", data_dir=str(tmp_path), tuning_samples=15, max_train_samples=6))


# --- files of one's own ---------------------------------------------------------------------------------------------


def own(folder: Path, train: str, validation: str | None = None, ending: str = ".csv") -> SimpleNamespace:
    """Options for two files with this content."""
    for name, text in (("train", train), ("validation", train if validation is None else validation)):
        (folder / f"{name}{ending}").write_text(text, encoding="utf-8")
    files = {f"{name}_file": str(folder / f"{name}{ending}") for name in ("train", "validation")}
    return options(**files, tuning_samples=1)


@pytest.mark.parametrize(
    ("ending", "text", "classes", "labels"),
    [
        (".csv", 'text,label\n"red, wine",drink\nbread,food\nale,drink\n', ("drink", "food"), [0, 1, 0]),
        (".tsv", 'text\tlabel\nsay "no\t2\nbread\t7\nale\t2\n', ("2", "7"), [0, 1, 0]),
        (".jsonl", '{"text": "a", "label": true}\n{"text": "b", "label": false}\n', ("False", "True"), [1, 0]),
        (".csv", "idx,one,two,label\n0,a,b,0.5\n1,c,d,3\n", (), [0.5, 3.0]),
        (".csv", "text,label\n12,yes\n1.5,no\n", ("no", "yes"), [1, 0]),
    ],
)
def test_the_labels_of_own_files_make_the_task(
    tmp_path: Path, ending: str, text: str, classes: tuple[str, ...], labels: list[float]
) -> None:
    data = modules("data").load_data(own(tmp_path, text, ending=ending))
    assert data.task.labels == classes
    assert data.task.is_regression == (not classes)
    assert data.evaluations["validation"].labels == labels
    assert all(isinstance(each, str) for texts in data.train.texts for each in texts)
    assert len(data.train) + len(data.tuning) == len(labels)
    assert not data.is_glue


def test_a_scale_takes_what_lies_beyond_it(tmp_path: Path) -> None:
    data = modules("data").load_data(own(tmp_path, "text,label\na,0.5\nb,1\n", "text,label\na,2\n"))
    assert data.evaluations["validation"].labels == [2.0]


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ("text,class\na,b\n", None, "has no column 'label'; it has text, class"),
        ("label\n1\n", None, "one or two columns of text; it has label"),
        ("a,b,c,label\n1,2,3,4\n", None, "it has a, b, c, label"),
        ("text,label\na,x\nb,y\n", "words,label\na,x\n", "has no column 'text'; it has words, label"),
        ("text,label\na,x\nb,y\n", "text,label\na,z\n", "the label 'z', which no sample to train on has"),
        ("text,label\na,x\nb,y\n", "text,label\na,1\n", "the label 1, which"),
        ("text,label\na,0.5\nb,1\n", "text,label\na,much\n", "the label 'much', and the others are numbers"),
        ("text,label\na,x\nb,x\n", None, "All labels of .* are 'x'"),
        ("text,label\na,x\nb,\n", None, "Sample 2 of .* has nothing in the column 'label'"),
        ("text,label\n", None, "cannot be read as csv"),
    ],
)
def test_bad_files_of_ones_own(tmp_path: Path, train: str, validation: str | None, message: str) -> None:
    with pytest.raises(modules("comparison.options").UserError, match=message):
        modules("data").load_data(own(tmp_path, train, validation))


def test_own_files_that_are_not_there_or_not_known(tmp_path: Path) -> None:
    error, load = modules("comparison.options").UserError, modules("data").load_data
    given = own(tmp_path, "text,label\na,x\nb,y\n")
    with pytest.raises(error, match=r"none\.csv' does not exist"):
        load(options(train_file=given.train_file, validation_file=str(tmp_path / "none.csv")))
    (tmp_path / "a.xlsx").write_bytes(b"")
    with pytest.raises(error, match=r"has the ending '\.xlsx'; known are \.csv, \.tsv, \.json, \.jsonl"):
        load(options(train_file=str(tmp_path / "a.xlsx"), validation_file=given.validation_file))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "go together"),
        (["--validation_file", "b.csv", "--task", "rte"], "--task for GLUE's"),
        (["--validation_file", "b.csv", "--data_dir", "glue"], "--data_dir for GLUE's"),
    ],
)
def test_own_files_and_those_of_glue_exclude_each_other(more: list[str], message: str) -> None:
    with pytest.raises(modules("comparison.options").UserError, match=message):
        modules("run_glue").parse_arguments(["--train_file", "a.csv", *more])


# --- the hub --------------------------------------------------------------------------------------------------------


class Split(dict[str, list[object]]):
    """What the example asks of a `datasets.Dataset`."""

    @property
    def column_names(self) -> list[str]:
        return list(self)


def test_hub_columns_and_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"premise": ["a"] * 20, "hypothesis": ["b"] * 20, "label": [2, 1] * 10, "idx": list(range(20))}
    splits = {name: Split(columns) for name in ("train", "validation_matched", "validation_mismatched")}
    asked = []
    monkeypatch.setattr(modules("data"), "load_dataset", lambda *names: asked.append(names) or splits)
    data = modules("data").load_data(options(task="mnli"))
    assert asked == [("nyu-mll/glue", "mnli")]
    assert (len(data.train), len(data.tuning), data.train.texts[0]) == (18, 2, ("a", "b"))
    assert data.evaluations["mismatched"].labels == [2, 1] * 10

    error = modules("comparison.options").UserError
    del splits["validation_matched"]["hypothesis"]
    with pytest.raises(error, match="no column 'hypothesis', which MNLI needs; it has premise, label, idx"):
        modules("data").load_data(options(task="mnli"))
    del splits["validation_mismatched"]
    with pytest.raises(error, match="no column"):
        modules("data").load_data(options(task="mnli"))
    splits["validation_matched"]["hypothesis"] = ["b"] * 20
    with pytest.raises(error, match="no split 'validation_mismatched'; it has train, validation_matched"):
        modules("data").load_data(options(task="mnli"))


# --- parts ----------------------------------------------------------------------------------------------------------


def test_tuning_and_training_samples_are_apart_and_fixed() -> None:
    numbers = modules("samples").Samples([(str(i),) for i in range(100)], list(range(100)))
    set_aside = modules("data").set_aside
    train, tuning = set_aside(numbers, None, None)
    assert (len(train), len(tuning)) == (90, 10)
    assert sorted(train.labels + tuning.labels) == list(range(100))
    assert set_aside(numbers, None, None) == (train, tuning), "not deterministic"
    assert train.labels != sorted(train.labels), "a slice of sorted samples would not stand for all of them"
    short, same = set_aside(numbers, None, 30)
    assert same == tuning, "the size of the slice changes what is tuned on"
    assert short.labels == train.labels[:30]


def test_offline_pairs_are_balanced_deterministic_and_disjoint() -> None:
    offline_pairs = modules("offline_pairs")
    splits = offline_pairs.load_offline_pairs()
    assert splits == offline_pairs.load_offline_pairs()
    functions = offline_pairs.functions_by_module()
    module_of = {description: name for name, members in functions.items() for _, description in members}
    own_signature = {description: signature for members in functions.values() for signature, description in members}
    used = {}
    for name, samples in splits.items():
        assert len(samples) == offline_pairs.PAIRS[name]
        assert sum(samples.labels) * 2 == len(samples)
        for (signature, description), label in zip(samples.texts, samples.labels, strict=True):
            assert not label or own_signature[description] == signature
        used[name] = {module_of[description] for _, description in samples.texts}
        assert len(used[name]) > 10
    assert not used["train"] & used["test"]
    assert not used["train"] & used["tuning"]
    assert not used["tuning"] & used["test"]
    # Words in common find much, and leave much to be found.
    assert 0.7 < offline_pairs.overlap_accuracy(splits["train"], splits["test"]) < 0.9


# --- figures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def outputs() -> tuple[np.ndarray, np.ndarray]:
    """Predictions and labels of twelve samples, with 4 true and 2 false positives, 3 false and 3 true negatives."""
    predictions = np.array([1] * 6 + [0] * 6)
    labels = np.array([1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0])
    return predictions, labels


def test_figures_of_classification_by_hand(outputs: tuple[np.ndarray, np.ndarray]) -> None:
    formulas = modules("metrics").FORMULAS
    assert formulas["accuracy"](*outputs) == pytest.approx(7 / 12)
    assert formulas["f1"](*outputs) == pytest.approx(2 * 4 / (2 * 4 + 2 + 3))
    matthews = (4 * 3 - 2 * 3) / math.sqrt((4 + 2) * (4 + 3) * (3 + 2) * (3 + 3))
    assert formulas["matthews_correlation"](*outputs) == pytest.approx(matthews)


def test_correlations_by_their_definition() -> None:
    """Ties, where rank correlations differ, share the mean of their ranks; a relation that is no line tells the two."""
    predictions, labels = np.array([3.0, 1.0, 3.0, 2.0, 9.0]), np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    ranks = np.array([3.5, 1.0, 3.5, 2.0, 5.0])
    formulas = modules("metrics").FORMULAS
    # Sums of five terms in float64, in two orders.
    assert formulas["pearson"](predictions, labels) == pytest.approx(np.corrcoef(predictions, labels)[0, 1], rel=1e-12)
    assert formulas["spearmanr"](predictions, labels) == pytest.approx(np.corrcoef(ranks, labels)[0, 1], rel=1e-12)


@pytest.mark.parametrize("name", list(OFFICIAL))
def test_every_task_has_its_official_figures(name: str) -> None:
    task, metrics = modules("tasks").find_task(name), modules("metrics")
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(50, task.num_labels))
    labels = generator.integers(0, max(2, task.num_labels), 50).astype(np.float64 if task.is_regression else np.int64)
    figures = metrics.task_figures(metrics.computed_here(task), logits, labels, task.is_regression)
    assert tuple(figures) == task.metrics
    assert metrics.glue_score(figures) == pytest.approx(sum(figures.values()) / len(task.metrics))
    official = metrics.official_metric(task)
    if official is not None:
        expected = metrics.task_figures(official, logits, labels, task.is_regression)
        assert figures == pytest.approx(expected, rel=1e-6)  # the official script takes STS-B's scores as float32


def test_the_official_script_is_asked_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, task = modules("metrics"), modules("tasks").find_task("mrpc")
    asked = []

    def load(*names: str, **options: object) -> SimpleNamespace:
        asked.append(names)
        return SimpleNamespace(compute=lambda predictions, references: {"accuracy": 0.25, "f1": math.nan})

    monkeypatch.setitem(sys.modules, "evaluate", SimpleNamespace(load=load))
    monkeypatch.setattr(metrics, "prefer_cache_if_unreachable", lambda: None)
    figures = metrics.task_figures(metrics.official_metric(task), np.eye(2), np.arange(2), False)
    assert asked == [("glue", "mrpc")]
    assert figures == {"accuracy": 0.25, "f1": 0.0}
    monkeypatch.setitem(sys.modules, "evaluate", None)
    assert metrics.official_metric(task) is None


def test_a_constant_answer_scores_nothing() -> None:
    metrics, tasks = modules("metrics"), modules("tasks")
    constant = np.ones((8, 1))
    stsb = metrics.task_figures(metrics.computed_here(tasks.find_task("stsb")), constant, np.arange(8.0), True)
    assert stsb == {"pearson": 0.0, "spearmanr": 0.0}
    logits = np.tile([0.0, 1.0], (8, 1))
    cola = metrics.task_figures(metrics.computed_here(tasks.find_task("cola")), logits, np.arange(8) % 2, False)
    assert cola == {"matthews_correlation": 0.0}
