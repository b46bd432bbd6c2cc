"""Several labels per text: how files write them, what is made of them, how they are split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsepeft.tasks import TaskData, TaskError, few_shot, load_task, split_train, subsample
from sparsepeft.tasks.labels import LabelReader

TAGS: list[list[str]] = [["a", "b"], ["b"], [], ["c", "a"], ["b"]]


def load(path: Path, rows: list[tuple[str, Any]], **options: Any) -> TaskData:
    if path.suffix == ".jsonl":
        content = "".join(json.dumps({"text": text, "tags": tags}) + "\n" for text, tags in rows)
    else:
        content = "text\ttags\n" + "".join(f"{text}\t{tags}\n" for text, tags in rows)
    path.write_text(content)
    return load_task("custom", train_file=path, validation_file=path, label_column="tags", **options)


@pytest.mark.parametrize(
    ("ending", "written", "given"),
    [
        ("jsonl", list, None),
        ("jsonl", lambda tags: tags or None, None),
        ("tsv", json.dumps, None),
        ("tsv", repr, None),  # as pandas writes a column of lists
        ("tsv", lambda tags: str(np.array(tags, object)), None),  # and of arrays, as it reads them from parquet
        ("tsv", "|".join, "multi_label"),
        ("tsv", ", ".join, "multi_label"),
        ("tsv", ";".join, "multi_label_classification"),
    ],
)
def test_every_way_to_write_them(tmp_path: Path, ending: str, written: Any, given: str | None) -> None:
    rows = [(f"text {number}", written(tags)) for number, tags in enumerate(TAGS)]
    data = load(tmp_path / f"train.{ending}", rows, problem_type=given)
    spec = data.spec
    assert (spec.label_names, spec.multi_label) == (("a", "b", "c"), True)
    assert spec.problem_type == "multi_label_classification"
    assert data.train["label"][:] == [[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0]]
    assert spec.main_metric == "micro_f1"


def test_whole_numbers_and_separators_within_names(tmp_path: Path) -> None:
    data = load(tmp_path / "a.tsv", [("x", "10,9"), ("y", "09"), ("z", "")], problem_type="multi_label")
    assert data.spec.label_names == ("9", "10")
    data = load(tmp_path / "b.tsv", [("x", "arts, crafts|sport"), ("y", "sport")], problem_type="multi_label")
    assert data.spec.label_names == ("arts, crafts", "sport")
    assert data.notes[0] == "custom: labels were separated at '|'; ',' was taken for a part of their names"


def test_another_file_may_write_the_same_labels_otherwise(tmp_path: Path) -> None:
    spec = load(tmp_path / "a.tsv", [("x", "arts, crafts;sport"), ("y", "sport")], problem_type="multi_label").spec
    for written in ("arts, crafts", '["arts, crafts"]', "sport|arts, crafts", "arts, crafts;sport"):
        labels = [(1, written), (2, "sport")]
        assert LabelReader.for_task(spec, labels).read(tmp_path, labels)[0][0] == 1
    spec = load(tmp_path / "b.jsonl", [("x", True), ("y", False)]).spec
    assert LabelReader.for_task(spec, []).read(tmp_path, [(1, "True"), (2, "FALSE"), (3, "true")]) == [1, 0, 1]
    with pytest.raises(TaskError, match=r"the label is \['true'\]; expected one label, correct the row$"):
        LabelReader.for_task(spec, []).read(tmp_path, [(1, ("true",))])
    numbers = load(tmp_path / "c.jsonl", [("x", [0, 1]), ("y", [1, 0])])  # which may be names
    assert numbers.spec.label_names == ("0", "1")


def test_what_looks_like_several_is_noted(tmp_path: Path) -> None:
    data = load(tmp_path / "a.tsv", [("x", "a|b"), ("y", "a"), ("z", "b")])
    assert data.spec.label_names == ("a", "a|b", "b")
    assert data.notes[0].startswith("custom: labels such as 'a|b' were taken for classes of their own; if they are")


@pytest.mark.parametrize(
    ("rows", "given", "message"),
    [
        ([("x", ["a"]), ("y", ["b"])], "single_label", r":1: the label is \['a'\]; expected one label"),
        ([("x", ["a", ["b"]]), ("y", [])], None, r":1: tags is \['a', \['b'\]\]; expected a text, a number or a list"),
        ([("x", []), ("y", [])], None, r"no row has a label; expected at least two"),
        ([("x", [0.0, 1.0, 1.0]), ("y", [1.0, 0.0, 0.0])], None, r"lists of 3 ones and zeros; expected the names"),
        ([("x", "[0, 0]"), ("y", "[1, 0]")], None, r"lists of 2 ones and zeros; .* a column of 0 and 1 for each label"),
        ([("x", "[a"), ("y", "[b, c]")], "multi_label", r":2: the label '\[b, c\]' is no list"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, rows: list[tuple[str, Any]], given: str | None, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load(tmp_path / "a.jsonl", rows, problem_type=given)


def test_parts_have_the_rare_labels_too(tmp_path: Path) -> None:
    rows = [
        (f"text {number}", ["common", *(["rare"] if number % 10 == 0 else [])] if number % 4 else [])
        for number in range(400)
    ]
    data = load(tmp_path / "a.jsonl", rows)
    total = [sum(column) for column in zip(*data.train["label"][:], strict=True)]
    train, held_out = split_train(data.train, data.spec, 0.1, seed=1)
    drawn = [few_shot(data.train, data.spec, 40, seed=1), subsample(data.train, 40), held_out]
    for part in drawn:
        found = [sum(column) for column in zip(*part["label"][:], strict=True)]
        assert len(part) == 40
        assert found == [pytest.approx(count / 10, abs=1) for count in total]
    assert len(train) == 360
    assert split_train(data.train, data.spec, 0.1, seed=1)[1]["text"][:] == held_out["text"][:]
