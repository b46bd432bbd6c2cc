"""Own files: formats, columns, classes or values, held-out validation, and every error a user can make."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from sparsepeft.tasks import TaskData, TaskError, load_task

Rows = list[tuple[object, ...]]


def write(path: Path, columns: tuple[str, ...], rows: Rows) -> Path:
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "jsonl":
        lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
    else:
        lines = [{"csv": ",", "tsv": "\t"}[kind].join(map(str, row)) for row in (columns, *rows)]
    content = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def load(tmp_path: Path, labels: list[object], validation: list[object] | None = None, **kwargs: object) -> TaskData:
    def part(name: str, values: list[object]) -> Path:
        return write(tmp_path / f"{name}.jsonl", ("text", "label"), [(f"text {i}", v) for i, v in enumerate(values)])

    files = {"train_file": part("train", labels)}
    if validation is not None:
        files["validation_file"] = part("validation", validation)
    return load_task("custom", **files, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("ending", [f"{kind}{gz}" for kind in ("csv", "tsv", "jsonl") for gz in ("", ".gz")])
def test_every_format(tmp_path: Path, ending: str) -> None:
    rows: Rows = [("Good film", "pos"), ("Bad film", "neg"), ("", "pos")]
    paths = [write(tmp_path / f"{name}.{ending}", ("text", "label"), rows) for name in ("train", "valid", "test")]
    data = load_task("custom", train_file=paths[0], validation_file=str(paths[1]), test_file=paths[2])
    assert data.spec.label_names == ("neg", "pos")
    assert data.spec.num_labels == 2
    assert data.spec.problem_type == "single_label_classification"
    for part in (data.train, data.validation, data.test):
        assert part is not None
        assert part["text"][:] == ["Good film", "Bad film", ""]
        assert part["label"][:] == [1, 0, 1]
    assert data.source == f"train.{ending}"
    assert set(data.fingerprints) == {f"{name}.{ending}" for name in ("train", "valid", "test")}
    assert len([note for note in data.notes if "same content as the training file" in note]) == 2


@pytest.mark.parametrize(
    ("columns", "texts"),
    [
        (("text", "label"), ("text",)),
        (("Sentence", "Label"), ("Sentence",)),
        (("idx_text", "label"), ("idx_text",)),
        (("id", "review", "target"), ("review",)),
        (("sentence1", "sentence2", "score"), ("sentence1", "sentence2")),
        (("premise", "hypothesis", "gold_label"), ("premise", "hypothesis")),
        (("index", "question", "sentence", "label"), ("question", "sentence")),
        (("text", "text_pair", "label", "file"), ("text", "text_pair")),
    ],
)
def test_columns_are_detected(tmp_path: Path, columns: tuple[str, ...], texts: tuple[str, ...]) -> None:
    label = columns[2] if len(columns) == 3 else next(name for name in columns if name.lower() == "label")
    rows: Rows = [tuple(str(i % 2) if name == label else f"{name} {i}" for name in columns) for i in range(4)]
    data = load_task("custom", train_file=write(tmp_path / "train.csv", columns, rows))
    assert data.spec.is_pair == (len(texts) == 2)
    seen = {data.train[i][column] for i in range(len(data.train)) for column in data.spec.text_columns}
    assert {value.rsplit(" ", 1)[0] for value in seen} == set(texts)


@pytest.mark.parametrize("columns", [("text", "mood"), ("id", "text", "mood"), ("", "mood", "premise", "hypothesis")])
def test_the_only_column_that_is_left_is_the_label(tmp_path: Path, columns: tuple[str, ...]) -> None:
    rows: Rows = [tuple(f"{name} {i % 2}" for name in columns) for i in range(4)]
    data = load_task("custom", train_file=write(tmp_path / "train.csv", columns, rows))
    assert data.spec.label_names == ("mood 0", "mood 1")


def test_columns_by_name(tmp_path: Path) -> None:
    rows: Rows = [("x", "p", "1", "q"), ("y", "r", "2", "s"), ("", "", "2", "")]
    path = write(tmp_path / "train.csv", ("a", "b", "c", "d"), rows)
    data = load_task("custom", train_file=path, text_column="b", text_pair_column="d", label_column="c")
    found = [(row["text"], row["text_pair"], row["label"]) for row in (*data.train, *data.validation)]
    assert sorted(found) == [("", "", 1), ("p", "q", 0), ("r", "s", 1)]


@pytest.mark.parametrize(
    ("columns", "kwargs", "message"),
    [
        (("a", "b", "label"), {}, r"which column is the text\? none is known; .* are 'a', 'b'; pass `text_column`"),
        (("text", "sentence1", "sentence2", "label"), {}, r"more than one could be \(sentence1 \+ sentence2, text\)"),
        (("text", "mood", "day"), {}, r"which column is the label\? none is called like one; the columns are 'text',"),
        (("text", "label", "score"), {}, r"more than one could be \('label', 'score'\)"),
        (
            ("text", "label"),
            {"text_column": "body"},
            r"`text_column=body` was given, but the columns are 'text', ",
        ),
        (("text", "label"), {"label_column": "y"}, r"`label_column=y` was given, but the columns are"),
        (("a", "b", "label"), {"text_pair_column": "b"}, r"`text_pair_column=b` was given without `text_column`"),
        (("text", "label"), {"text_column": "label", "label_column": "label"}, r"must be different"),
    ],
)
def test_columns_that_cannot_be_told(
    tmp_path: Path, columns: tuple[str, ...], kwargs: dict[str, str], message: str
) -> None:
    path = write(tmp_path / "train.csv", columns, [tuple("x" for _ in columns)])
    with pytest.raises(TaskError, match=message):
        load_task("custom", train_file=path, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b", "a"], ("a", "b")),
        ([10, 9, 10, 9], ("9", "10")),
        (["10", "9", "-1", "09"], ("-1", "9", "10")),
        (["1.0", "0.0", "1", "0"], ("0", "1")),
        ([True, False, True, False], ("false", "true")),
        (["True", "FALSE", "true", "True", "False"], ("FALSE", "True")),
        (["1", "two", "1", "two"], ("1", "two")),
        (["1_0", "2_0", "1_0", "2_0"], ("1_0", "2_0")),
    ],
)
def test_classes_are_sorted(tmp_path: Path, labels: list[object], names: tuple[str, ...]) -> None:
    assert load(tmp_path, labels, labels).spec.label_names == names


@pytest.mark.parametrize("labels", [[0.5, 1, 2], ["0.5", "1", "1e-1"], ["-.5", "3.", "2"]])
def test_numbers_that_are_not_whole_mean_regression(tmp_path: Path, labels: list[object]) -> None:
    data = load(tmp_path, labels, labels)
    assert data.spec.label_names is None
    assert (data.spec.num_labels, data.spec.problem_type) == (1, "regression")
    assert data.train.features["label"].dtype == "float32"
    assert data.train["label"][:] == pytest.approx([float(str(label)) for label in labels])


def test_problem_type_overrides(tmp_path: Path) -> None:
    assert load(tmp_path, [1, 2, 3], [1], problem_type="regression").spec.label_names is None
    classes = load(tmp_path, [0.5, 1.5, "nan"], [0.5], problem_type="classification").spec
    assert classes.label_names == ("0.5", "1.5", "nan")
    assert load(tmp_path, [0.5, 1, 1], problem_type="single_label").spec.num_labels == 2
    with pytest.raises(TaskError, match=r"`problem_type=ranking` was given; expected regression, single_label, "):
        load(tmp_path, [1, 2], [1], problem_type="ranking")


@pytest.mark.parametrize(
    ("labels", "validation", "kwargs", "message"),
    [
        (["a", "b"], ["a", "c", "d"], {}, r"validation\.jsonl:2: 'c', 'd' is no label of this task; expected 'a', 'b'"),
        ([0, 1], [0, 1, 2], {}, r"validation\.jsonl:3: '2' is no label"),
        (["a", ""], None, {}, r"train\.jsonl:2: the label is empty"),
        (["a", "  "], None, {}, r"train\.jsonl:2: the label is empty"),
        (["a", None], None, {}, r"train\.jsonl:2: the label is empty"),
        (["['a']", "", "['b']"], None, {}, r"train\.jsonl:2: the label is empty where others are lists; write \[\] or"),
        (["a", {"b": 1}], None, {}, r"train\.jsonl:2: label is {'b': 1}; expected a text, a number or a list"),
        (["a", "a"], None, {}, r"every label is 'a'; expected at least two classes"),
        ([0.5, float("nan")], None, {}, r"train\.jsonl:2: the label is 'nan'; expected a finite number"),
        ([0.5, float("inf")], None, {}, r"train\.jsonl:2: the label is 'inf'; expected a finite number"),
        ([0.5, 1e39], None, {}, r"train\.jsonl:2: the label is '1e\+39'; expected a finite number"),
        ([0.5, 1.5], [1, "high"], {}, r"validation\.jsonl:2: the label is 'high'; expected a finite number"),
        (["low", 1.5], None, {"problem_type": "regression"}, r"train\.jsonl:1: the label is 'low'"),
    ],
)
def test_labels_that_do_not_fit(
    tmp_path: Path, labels: list[object], validation: list[object] | None, kwargs: dict[str, str], message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        load(tmp_path, labels, validation, **kwargs)


def test_a_text_must_be_a_text(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", ("text", "label"), [("a", 1), (None, 0)])
    with pytest.raises(TaskError, match=r"train\.jsonl:2: text is None; expected a text"):
        load_task("custom", train_file=path)
    good = ("caf\u00e9 \U0001f600", "\U0001f600")
    for name, row in (("text", ("\ud83d", "a")), ("label", ("b", "\ud83d"))):
        path = write(tmp_path / "train.jsonl", ("text", "label"), [good, row])
        with pytest.raises(TaskError, match=rf"train\.jsonl:2: {name} has half of a surrogate pair"):
            load_task("custom", train_file=path)


def test_whole_numbers_of_any_length_are_classes(tmp_path: Path) -> None:
    long = "1" + 5000 * "0"  # more digits than int() takes
    data = load(tmp_path, [long, "7", "-12", "+07", f"0{long}.0"], ["7.0"])
    assert data.spec.label_names == ("-12", "7", long)
    assert data.validation["label"][:] == [1]


def test_a_stratified_tenth_is_held_out_without_a_validation_file(tmp_path: Path) -> None:
    labels: list[object] = ["a"] * 60 + ["b"] * 40 + ["rare"]
    data = load(tmp_path, labels)
    assert Counter(data.validation["label"][:]) == {0: 6, 1: 4}
    assert (len(data.train), len(data.validation)) == (91, 10)
    assert not set(data.train["text"][:]) & set(data.validation["text"][:])
    assert data.notes == (
        "custom: no validation file: 10 of 101 training rows (a seeded, stratified tenth, seed 42) "
        "are held out as validation",
        "custom: 1 of 3 labels have no validation row: 'rare'",
        "custom: the validation part has 10 row(s): scores on fewer than 50 mean little",
    )
    assert load(tmp_path, labels).validation["text"][:] == data.validation["text"][:]
    assert load(tmp_path, labels, seed=1).validation["text"][:] != data.validation["text"][:]


def test_rows_held_out_that_are_trained_on_are_noted(tmp_path: Path) -> None:
    rows = [(("good", "bad")[number % 2], number % 2) for number in range(100)]
    data = load_task("custom", train_file=write(tmp_path / "train.csv", ("text", "label"), rows))
    assert any("10 of the rows held out have the texts of rows that are trained on" in note for note in data.notes)


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        ([0.5, 1, 1.5, 2, "n/a"], "taken for classes, as 'n/a' cannot be read as numbers"),
        (["1,000.5", "2.5", "3.5"], "as '1,000.5' cannot"),
        (["10%", "2%", "30%"], "as '10%', '2%', '30%' cannot"),
        (["\N{MINUS SIGN}1", "-1", "1"], "as '\N{MINUS SIGN}1' cannot"),
        (["1,5", "2,5", "3"], "labels such as '1,5' were taken for classes; if they are values, write a point for"),
        (
            ["0,5", "1", "1,5", "5"],
            "labels such as '0,5' were taken for classes; if they are values, write a point for",
        ),
        (["caf\u00e9", "cafe\u0301"], r"the labels 'cafe\u0301' and 'caf\xe9' look alike but are two"),
        (["so so", "so\u00a0so"], "look alike"),
        (["good", "go\u00adod"], "look alike"),
        (["a", "b", "1"], None),
    ],
)
def test_labels_that_may_be_meant_otherwise_are_noted(tmp_path: Path, labels: list[object], note: str | None) -> None:
    found = [each for each in load(tmp_path, labels * 3, labels).notes if "classes" in each or "alike" in each]
    assert [note in each for each in found if note] == ([True] if note else [])
    assert bool(found) == bool(note)


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        ([0, 1, 2, 3, 4, 5], "labels 0 to 5 were taken for 6 classes; if they are scores, pass `problem_type="),
        (["1", "2", "4", "5"], "labels 1 to 5 were taken for 4 classes"),
        ([0, 1, 2], None),
        ([1, 100, 1000, 10000], None),
        (["a", "b", "c", "d"], None),
    ],
)
def test_whole_numbers_that_could_be_scores_are_noted(tmp_path: Path, labels: list[object], note: str | None) -> None:
    noted = [each for each in load(tmp_path, labels * 3, [labels[0]]).notes if "scores, pass" in each]
    assert [note in each for each in noted if note] == ([True] if note else [])
    assert not [n for n in load(tmp_path, labels * 3, problem_type="single_label").notes if "scores, pass" in n]


def test_three_rows_are_the_fewest_and_scores_on_few_and_many_classes_are_noted(tmp_path: Path) -> None:
    data = load(tmp_path, ["a", "b", "a"])
    assert (len(data.train), len(data.validation)) == (2, 1)
    assert "custom: the validation part has 1 row(s): scores on fewer than 50 mean little" in data.notes
    with pytest.raises(TaskError, match=r"train\.jsonl has 2 row\(s\); expected at least 3"):
        load(tmp_path, ["a", "b"])
    data = load(tmp_path, list(range(30)), [0])
    assert "30 classes in 30 rows: for values rather than classes pass `problem_type=regression`" in data.notes[0]
