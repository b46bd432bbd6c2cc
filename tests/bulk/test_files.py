"""Files answered by tasks of every kind, in every format; what is there already, and what cannot be read."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.bulk.conftest import ROWS
from tests.inference.conftest import TASKS, save_task
from tests.models import METHODS
from tests.tiny import write_jsonl

from sparsepeft.bulk import RayOptions, inputs, outputs, score_files
from sparsepeft.bulk.folder import MANIFEST
from sparsepeft.errors import UserError
from sparsepeft.folders import locked
from sparsepeft.inference import Prediction, Predictor
from sparsepeft.scoring import TableOptions

pytestmark = pytest.mark.slow
TEXT = TableOptions("text")
PAIR = TableOptions("text", "text_pair")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of a file, and of parquet several row groups."""
    monkeypatch.setattr(inputs, "WINDOW", 7)
    monkeypatch.setattr(outputs, "_GROUP_ROWS", 10)


@pytest.fixture(scope="module")
def expected(runs: dict[str, Path]) -> dict[str, list[Prediction]]:
    """What each run answers by itself."""
    pairs = [(row["text"], row["text_pair"]) for row in ROWS]
    return {
        name: Predictor(folder).predict(pairs if name == "same" else [a for a, _ in pairs], on_error="return")
        for name, folder in runs.items()
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file in the format of its name."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=9)
        return path
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as stream:
        if ".jsonl" in path.name:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if ".tsv" in path.name else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """Its rows, by libraries of others; lists of CSV are JSON, and empty fields None."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as stream:
        if ".jsonl" in path.name:
            return [json.loads(line) for line in stream]
        rows = csv.DictReader(stream, delimiter="\t" if ".tsv" in path.name else ",")
        return [{key: _value(value) for key, value in row.items()} for row in rows]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text or None


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet", "csv.gz", "jsonl.gz"])
def test_all_tasks_answer_as_each_does_by_itself(
    ending: str, runs: dict[str, Path], expected: dict[str, list[Prediction]], tmp_path: Path
) -> None:
    file = write(tmp_path / f"some.{ending}", ROWS)
    seen: list[float] = []
    report = score_files(file, tmp_path / "out", runs, table=PAIR, progress=lambda _, share: seen.append(share))
    assert (report.rows, report.failed, report.truncated, report.files) == (len(ROWS), 2, 1, 1)
    assert len(seen) > 3
    assert seen == sorted(seen)
    assert seen[-1] == 1
    rows = read(tmp_path / "out" / file.name)
    assert [
        {name: row[name] or "" for name in ROWS[0]} | {"text": given["text"]}
        for row, given in zip(rows, ROWS, strict=True)
    ] == ROWS
    for place, row in enumerate(rows):
        for name, predictions in expected.items():
            _check(row, name, predictions[place], is_flat=ending[:3] in ("csv", "tsv"))
    empty = "An input has an empty text; pass some words."
    assert [row.get("error") for row in rows[-3:]] == [None, empty, f"same: {empty}"]


def _check(row: dict[str, Any], name: str, one: Prediction, is_flat: bool) -> None:
    """Answers are a prediction, rounded; batches of other lengths may change a last digit."""
    if one.error is not None:
        assert all(row.get(f"{name}_{key}") is None for key in ("label", "score", "labels", "entities", "truncated"))
    elif one.entities is not None:
        found = row[f"{name}_entities"]
        assert [(each["label"], each["start"], each["word"]) for each in found] == [
            (each.label, each.start, each.word) for each in one.entities
        ]
    elif one.label is None:
        assert row[f"{name}_score"] == pytest.approx(one.score, abs=1e-4)
    else:
        scores = {label: row[f"{name}_score_{label}"] for label in one.scores} if is_flat else row[f"{name}_scores"]
        assert scores == pytest.approx(one.scores, abs=2e-4)
        if one.labels is None:
            assert row[f"{name}_label"] == one.label
            assert row[f"{name}_score"] == scores[one.label]
        else:
            assert row[f"{name}_labels"] == (("|".join(one.labels) or None) if is_flat else list(one.labels))
    if not is_flat and one.error is None:
        assert bool(row.get(f"{name}_truncated")) == one.truncated


def test_one_task_has_the_columns_of_predict(runs: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": "true", "when": datetime(2026, 1, 2, tzinfo=UTC)} for row in ROWS[:12]]
    file = write(tmp_path / "some.parquet", rows)
    score_files(file, tmp_path / "out", {"mood": runs["mood"]})
    table = pq.read_table(tmp_path / "out" / "some.parquet")
    assert table.schema == pa.schema(
        [
            *pq.read_schema(file),
            ("predicted_label", pa.string()),
            ("score", pa.float64()),
            ("scores", pa.struct([("bad", pa.float64()), ("good", pa.float64())])),
            ("truncated", pa.bool_()),
            ("error", pa.string()),
        ]
    )
    assert table.select(list(rows[0])).to_pylist() == pq.read_table(file).to_pylist()
    assert set(table["predicted_label"].to_pylist()) <= {"good", "bad"}


def test_lists_of_tokens_are_texts(runs: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"tokens": row["text"].split()} for row in ROWS[:3]] + [{"tokens": None}]
    for name in ("own.parquet", "own.jsonl"):
        score_files(
            write(tmp_path / name, [row | {"text": "own"} for row in rows[:3]]),
            tmp_path / name[4:],
            {"names": runs["names"]},
        )
        found = read(tmp_path / name[4:] / name)
        assert [(row["text"], row["predicted_text"]) for row in found] == [("own", row["text"]) for row in ROWS[:3]]
    for name in ("some.parquet", "some.jsonl"):
        report = score_files(write(tmp_path / name, rows), tmp_path / name[5:], {"names": runs["names"]})
        assert (report.rows, report.failed) == (4, 1)
        found = read(tmp_path / name[5:] / name)
        assert [row.get("text") for row in found] == [*(row["text"] for row in ROWS[:3]), None]
        assert all(
            row["text"][each["start"] : each["end"]] == each["word"] for row in found[:3] for each in row["entities"]
        )


def test_a_name_means_the_same_in_all_lines(runs: dict[str, Path], tmp_path: Path) -> None:
    texts, tokens = (ROWS[:20], [{"tokens": row["text"].split()} for row in ROWS[:20]])
    texts = [{"text": row["text"]} for row in texts]
    texts[15] |= {"label": "true", "error": "none"}  # in another chunk than the first
    tokens[15] |= {"text": "own"}
    for name, rows, own, ours in (("mood", texts, "label", "score"), ("names", tokens, "text", "entities")):
        file = write(tmp_path / f"{name}.jsonl", rows)
        score_files(file, tmp_path / name, {name: runs[name]})
        found = read(tmp_path / name / file.name)
        assert [{key: row[key] for key in given} for row, given in zip(found, rows, strict=True)] == rows
        assert [place for place, row in enumerate(found) if own in row] == [15]
        assert all({f"predicted_{own}", ours} <= row.keys() for row in found)


def test_empty_files_have_empty_answers(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "header.csv").write_text("id,text\n")
    for name in ("nothing.csv", "nothing.jsonl"):
        (tmp_path / name).write_text("")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    report = score_files(
        [tmp_path / "*.csv", tmp_path / "*l", tmp_path / "*.parquet"], tmp_path / "out", {"a": runs["mood"]}
    )
    assert (report.rows, report.files, report.failed_files) == (0, 4, {})
    out = tmp_path / "out"
    assert (out / "header.csv").read_text() == "id,text,label,score,score_bad,score_good,error\n"
    assert [(out / name).read_text() for name in ("nothing.csv", "nothing.jsonl")] == ["", ""]
    assert pq.read_schema(out / "rows.parquet").names == ["text", "label", "score", "scores", "truncated", "error"]


def test_what_cannot_be_read_is_told_and_the_rest_is_answered(runs: dict[str, Path], tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.parquet", ROWS)
    content, column = whole.read_bytes(), pq.read_metadata(whole).row_group(1).column(1)
    start, size = column.dictionary_page_offset or column.data_page_offset, column.total_compressed_size
    (tmp_path / "damaged.parquet").write_bytes(content[:start] + b"\xff" * size + content[start + size :])
    (tmp_path / "cut.parquet").write_bytes(content[:-20])  # where a file says what is in it
    (tmp_path / "other.csv").write_text("id,body\n1,a\n")
    (tmp_path / "fields.csv").write_text("id,text\n1,a\n2,b,c\n")
    (tmp_path / "lines.jsonl").write_bytes(
        b'{"text": "\xc3\xa4"}\n{"text": "b\n\n"plain"\n["x", "y"]\n{"id": 3}\n{"text": "\xff"}\n'
    )
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 30)[:-9])
    report = score_files(tmp_path / "*.*", tmp_path / "out", {"mood": runs["mood"]})
    assert set(report.failed_files) == {"damaged.parquet", "cut.parquet", "other.csv", "fields.csv", "cut.jsonl.gz"}
    assert "which column is the text" in report.failed_files["other.csv"]
    assert "fields.csv:3: expected 2 fields" in report.failed_files["fields.csv"]
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == ["lines.jsonl", "whole.parquet"]
    lines = read(tmp_path / "out" / "lines.jsonl")
    assert [set(line) for line in lines] == [
        *({"text", "label", "score", "scores"}, {"error"}, {"label", "score", "scores"}, {"error"}, {"error"}),
        {"text", "error"},
    ]
    assert (report.rows, report.failed) == (len(ROWS) + 6, 1 + 4)
    (tmp_path / "fields.csv").write_text("id,text\n1,a\n2,b\n")
    for name in ("damaged.parquet", "cut.parquet", "other.csv", "cut.jsonl.gz"):
        (tmp_path / name).unlink()
    again = score_files(tmp_path / "*.*", tmp_path / "out", {"mood": runs["mood"]})
    assert (again.files, again.skipped, again.rows) == (1, 2, 2)


def test_raw_tsv_stays_raw(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "raw.tsv").write_text('text\tid\na "fine"\r film\t1\n"dull\t2\n', newline="")
    score_files(tmp_path / "raw.tsv", tmp_path / "out", {"names": runs["names"]})
    lines = (tmp_path / "out" / "raw.tsv").read_bytes().decode().split("\n")[:3]
    assert [line.split("\t")[:2] for line in lines] == [["text", "id"], ['a "fine"\r film', "1"], ['"dull', "2"]]


@pytest.fixture
def answered(runs: dict[str, Path], tmp_path: Path) -> Iterator[Path]:
    """A folder with the answers of one task to two files."""
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, ROWS[:3])
    score_files(tmp_path / "*.jsonl", tmp_path / "out", {"mood": runs["mood"]}, table=TEXT)
    return tmp_path / "out"


def test_only_what_is_missing_or_changed_is_answered(runs: dict[str, Path], answered: Path) -> None:
    tasks, files = {"mood": runs["mood"]}, answered.parent / "*.jsonl"
    before = {path.name: path.stat().st_mtime_ns for path in answered.glob("*.jsonl")}
    assert score_files(files, answered, tasks, table=TEXT).skipped == 2
    (answered / "a.jsonl").unlink()
    (answered / ".b.jsonl.123.tmp").write_text("half of it")  # a process was killed
    report = score_files(files, answered, tasks, table=TEXT)
    assert (report.files, report.skipped, report.rows) == (1, 1, 3)
    assert (answered / "b.jsonl").stat().st_mtime_ns == before["b.jsonl"]
    assert sorted(path.name for path in answered.iterdir()) == [MANIFEST, "a.jsonl", "b.jsonl"]
    changed = answered.parent / "b.jsonl"
    write_jsonl(changed, ROWS[:2])
    os.utime(changed, ns=(10**18, 10**18))  # another file, older than the answers
    assert score_files(files, answered, tasks, table=TEXT).rows == 2
    os.utime(changed, ns=(2**62, 2**62))  # newer than they will be
    assert [score_files(files, answered, tasks, table=TEXT).files for _ in range(2)] == [1, 0]


def test_answers_of_a_changed_file_do_not_outlive_an_interruption(runs: dict[str, Path], answered: Path) -> None:
    tasks, files, changed = {"mood": runs["mood"]}, answered.parent / "*.jsonl", answered.parent / "b.jsonl"
    before = (changed.stat().st_atime_ns, changed.stat().st_mtime_ns)
    write_jsonl(changed, ROWS[:2])
    os.utime(changed, ns=before)
    (answered / "a.jsonl").unlink()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_files(files, answered, tasks, table=TEXT, progress=stop)
    assert score_files(files, answered, tasks, table=TEXT).rows == 3 + 2


def test_a_folder_without_a_note_of_its_inputs_goes_on(runs: dict[str, Path], answered: Path) -> None:
    tasks, files = {"mood": runs["mood"]}, answered.parent / "*.jsonl"
    note = json.loads((answered / MANIFEST).read_text())
    assert note.pop("inputs").keys() == {"a.jsonl", "b.jsonl"}
    (answered / MANIFEST).write_text(json.dumps(note))
    os.utime(answered.parent / "a.jsonl", ns=(10**18, 10**18))
    os.utime(answered.parent / "b.jsonl", ns=(2**62, 2**62))
    assert [score_files(files, answered, tasks, table=TEXT).files for _ in range(2)] == [1, 0]  # the newer one


def test_answers_made_otherwise_are_refused(
    runs: dict[str, Path], answered: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    files, tasks = tmp_path / "a.jsonl", {"mood": runs["mood"]}
    other = {"mood": save_task(tiny_backbone, tmp_path / "other", TASKS["two"])}
    options: dict[str, Any] = {"table": TEXT, "model": str(tiny_backbone)}
    for given, words in (
        ({"tasks": tasks | {"degree": runs["degree"]}}, r"made with other tasks \(mood\); pass another `output_dir`"),
        ({"tasks": other}, "another version of the task 'mood'"),
        ({"dtype": "bf16"}, "made with `dtype=fp32`"),
        ({"table": TableOptions()}, "made with `text_column=text`"),
    ):
        with pytest.raises(UserError, match=words):
            score_files(files, answered, **({"tasks": tasks} | options | given))
    report = score_files(files, answered, other, overwrite=True, **options)
    assert report.files == 1
    assert sorted(path.name for path in answered.glob("*.jsonl")) == ["a.jsonl"]  # no answers of two kinds
    (answered / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="is damaged, or of another version"):
        score_files(files, answered, tasks)
    (answered / MANIFEST).unlink()
    with pytest.raises(UserError, match="holds other files"):
        score_files(files, answered, tasks)


def test_two_processes_do_not_share_a_folder(runs: dict[str, Path], answered: Path) -> None:
    with locked(answered), pytest.raises(UserError, match="Another process is writing to"):
        score_files(answered.parent / "a.jsonl", answered, {"mood": runs["mood"]}, table=TEXT)


def test_what_is_refused_before_anything_is_written(runs: dict[str, Path], tiny_backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("a.csv", "below/a.csv"):
        (tmp_path / name).write_text("id,body\n1,a\n")
    (tmp_path / "a.json").write_text("[]")
    file, mood = tmp_path / "a.csv", {"mood": runs["mood"]}
    lines = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    named = METHODS["spartan"](id2label={0: "label", 1: "b"})
    clash = {name: save_task(tiny_backbone, tmp_path / name, named) for name in ("x", "x_score")}
    for files, tasks, options, words in (
        (file, mood, {}, r"a.csv: which column is the text\?.*'id', 'body'; pass `text_column`"),
        (file, mood, {"table": TableOptions("text")}, "the column 'text' is not among 'id', 'body'"),
        (file, mood, {"table": TableOptions("id", "body")}, "an input of this task has one text"),
        (file, {"same": runs["same"]}, {"table": TableOptions("body")}, "an input of this task has two texts"),
        (file, mood | {"names": runs["names"]}, {}, "'names' was trained on the column 'tokens' and 'mood' on 'text'"),
        (file, {}, {}, "No task was given"),
        (file, {"none": tmp_path / "none"}, {}, "There is no folder"),
        (file, mood, {"dtype": "int8"}, "`dtype=int8` was given; pass"),
        (file, mood, {"threads": 0}, "`threads=0` was given, but it must be a whole number of at least 1"),
        (file, mood, {"ray": RayOptions(workers=0)}, "`workers=0` was given"),
        (file, mood, {"model": str(tmp_path / "none")}, "is neither an existing folder nor a hub id"),
        (tmp_path / "*.parquet", mood, {}, r"There is no file .*\*.parquet"),
        (tmp_path, mood, {}, "is a folder; pass a pattern"),
        (tmp_path / "a.json", mood, {}, "expected names that end in .parquet, .jsonl, .csv, .tsv"),
        ([], mood, {}, "No file was given"),
        (lines, mood, {"table": TableOptions(delimiter=";")}, "`delimiter=;` was given, but .*a.jsonl has none"),
        ([file, tmp_path / "below/a.csv"], mood, {}, "have the same name, as their answers would"),
        (file, clash, {"model": str(tiny_backbone)}, "Two columns of the answers would be called 'x_score_label'"),
    ):
        with pytest.raises(UserError, match=words):
            score_files(files, tmp_path / "out", tasks, **options)
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="holds the files to answer"):
        score_files(file, tmp_path, mood, table=TableOptions("body"))
