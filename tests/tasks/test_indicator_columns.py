"""A column of 0 and 1 for each label: named, found, and in files that come later."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsepeft.rows.formats import find_format
from sparsepeft.tasks import TaskData, TaskError, check_task, load_task
from sparsepeft.tasks.columns import Columns, choose_label_column
from sparsepeft.tasks.local import load_labelled

ROWS = [(1, 0, 0), (0, 1, 1), (0, 0, 0), (1, 0, 1), (0, 1, 0)]
NAMES = ("joy", "anger", "fear")


def write(path: Path, cells: list[tuple[Any, ...]], names: tuple[str, ...] = NAMES, text: str = "text") -> Path:
    """Rows with an id, a text and a column for each label, in the format of the file's ending."""
    columns = ["id", text, *names]
    rows = [dict(zip(columns, (number, f"text {number}", *row), strict=True)) for number, row in enumerate(cells)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        content = "\n".join(",".join(map(str, line)) for line in (columns, *(row.values() for row in rows))) + "\n"
        path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def load(path: Path, **options: Any) -> TaskData:
    return load_task("custom", train_file=path, validation_file=path, **options)


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "jsonl", "parquet"])
@pytest.mark.parametrize("given", [None, "joy,anger, fear", ["joy", "anger", "fear"]])
@pytest.mark.parametrize("kind", [int, float, bool, str])
def test_every_way_to_write_and_to_name_them(tmp_path: Path, ending: str, given: Any, kind: type) -> None:
    path = write(tmp_path / f"train.{ending}", [tuple(map(kind, row)) for row in ROWS])
    data = load(path, label_column=given)
    assert (data.spec.label_names, data.spec.multi_label) == (NAMES, True)
    assert data.train["label"][:] == [list(row) for row in ROWS]
    assert data.columns == Columns(("text",), NAMES)
    said = [note for note in data.notes if "hold only 0 and 1 and were taken for labels" in note]
    assert len(said) == (given is None)


def test_an_index_that_pandas_left_is_no_column_of_the_data(tmp_path: Path) -> None:
    cells = [(*row, number + 7) for number, row in enumerate(ROWS)]
    assert load(write(tmp_path / "a.parquet", cells, (*NAMES, "__index_level_0__"))).spec.label_names == NAMES


def test_the_order_is_the_caller_s_and_other_columns_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [(*row, 7, 0) for row in ROWS], (*NAMES, "votes", "sarcasm"))
    data = load(path, label_column="sarcasm,joy,anger", text_column="text")
    assert data.spec.label_names == ("sarcasm", "joy", "anger")
    assert data.train["label"][:] == [[0, joy, anger] for joy, anger, _ in ROWS]
    assert data.notes[0] == "custom: no training row has the label 'sarcasm'"
    with pytest.raises(TaskError, match="which column is the label"):  # the votes are no label
        load(path)


def test_the_only_other_column_is_the_text(tmp_path: Path) -> None:
    data = load(write(tmp_path / "a.csv", ROWS, text="comment_text"))
    assert data.columns == Columns(("comment_text",), NAMES)


def test_a_column_that_is_called_like_a_label_stays_the_label(tmp_path: Path) -> None:
    data = load(write(tmp_path / "a.csv", ROWS, ("label", "anger", "fear")))
    assert (data.spec.label_names, data.spec.multi_label) == (("0", "1"), False)
    data = load(write(tmp_path / "b.csv", [row[:1] for row in ROWS], ("joy",)))
    assert (data.columns, data.spec.multi_label) == (Columns(("text",), "joy"), False)
    assert load(tmp_path / "a.csv", label_column="anger,").columns == Columns(("text",), "anger")
    with_comma = write(tmp_path / "c.jsonl", [row[:2] for row in ROWS], ("joy,anger", "fear"))
    assert load(with_comma, label_column="joy,anger").columns == Columns(("text",), "joy,anger")


@pytest.mark.parametrize(
    ("cells", "options", "message"),
    [
        ([*ROWS, (2, 0, 0)], {"label_column": "joy,anger"}, r"a\.csv:7: joy is '2'; expected 0 or 1"),
        ([*ROWS, ("", 0, 0)], {"label_column": "joy,anger"}, r"a\.csv:7: joy is ''; expected 0 or 1"),
        (ROWS, {"label_column": "joy,angr"}, r"`label_column=angr` was given, but the columns are 'id', 'text', 'joy'"),
        (ROWS, {"label_column": "joy,joy"}, r"must be different"),
        (ROWS, {"label_column": ["joy", "text"], "text_column": "text"}, r"must be different"),
        (
            ROWS,
            {"problem_type": "single_label"},
            r"`problem_type=single_label.*` was given, but 'joy', 'anger', 'fear'",
        ),
        (
            [*ROWS, (0, "", 0), (2, 0, 0)],
            {},
            r"pass `label_column`; if 'joy', 'anger', 'fear' are columns of labels, correct line 8, where joy is '2'",
        ),
        ([(1, 0, 1), (0, 1, 0), (1, 1, "x")], {}, r"correct line 4, where fear is 'x'"),
        ([*ROWS, (0, "", 0)], {"text_column": "text"}, r"correct line 7, where anger is '' and not 0 or 1"),
        ([(0, 0, 0)] * 3, {}, r"no training row has any of the labels 'joy', 'anger', 'fear'; expected a 1"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, cells: Any, options: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.csv", cells)
    with pytest.raises(TaskError, match=message):
        check_task(None, train_file=path, **options)


def test_files_that_come_later(tmp_path: Path) -> None:
    spec = load(write(tmp_path / "a.csv", ROWS)).spec
    path, tags = tmp_path / "later.csv", tmp_path / "tags.jsonl"
    write(path, [row[::-1] for row in ROWS], NAMES[::-1])
    header = ["id", "text", *NAMES[::-1]]
    for trained in (NAMES, "tags"):  # of a task whose labels were columns, or lists
        label = choose_label_column(path, header, None, trained, NAMES)
        found, _ = load_labelled(path, spec, Columns(("text",), label), find_format(path))
        assert found["label"][:] == [list(row) for row in ROWS]
    tags.write_text("".join(json.dumps({"text": "x", "tags": tags}) + "\n" for tags in (["fear"], [])))
    assert choose_label_column(tags, ["text", "tags"], None, NAMES, NAMES) == "tags"
    found, _ = load_labelled(tags, spec, Columns(("text",), "tags"), find_format(tags))
    assert found["label"][:] == [[0, 0, 1], [0, 0, 0]]
    for named in (None, "joy,anger", NAMES[:2]):
        with pytest.raises(TaskError, match=r"of the labels 'joy', 'anger', 'fear' no column is called 'fear'; have"):
            choose_label_column(path, ["text", "joy", "anger"], named, NAMES, NAMES)
    with pytest.raises(TaskError, match=r"`label_column=mood` was given, but the columns are"):
        choose_label_column(path, header, "mood", NAMES, NAMES)
    with pytest.raises(TaskError, match=r"no column 'fear'; the columns found are 'id', 'text', 'joy', 'anger'"):
        check_task(None, train_file=path, test_file=write(tmp_path / "b.csv", [row[:2] for row in ROWS], NAMES[:2]))
