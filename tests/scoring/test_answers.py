"""Questions from tables and lines, answers as they come, rows for JSON lines and CSV."""

from __future__ import annotations

import csv
import gzip
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparsepeft.errors import UserError
from sparsepeft.inference.portable import Prediction
from sparsepeft.scoring.answers import Answer, AnswerLines, arriving, format_of
from sparsepeft.scoring.questions import TableOptions, read_lines, read_questions
from sparsepeft.tasks import TaskSpec
from sparsepeft.tasks.columns import Columns
from sparsepeft.tasks.labels import LabelReader

CLASSES = TaskSpec("custom", ("text",), ("a", "b"), ("accuracy",), "accuracy", 1)
PAIRS = TaskSpec("custom", ("text", "text_pair"), None, ("pearson",), "pearson", 1)


def asked(spec: TaskSpec, columns: tuple[str, ...] = ()) -> Any:
    """What questions are read for: a run's task, and what its columns were called."""
    return SimpleNamespace(spec=spec, columns=Columns(columns, "label") if columns else None)


def lines_of(text: str, spec: TaskSpec = CLASSES, columns: tuple[str, ...] = (), **options: Any) -> list[Any]:
    found = read_lines(text.split("\n"), asked(spec, columns), **options)
    return [question.error or question.texts for question in found]


def test_a_line_is_plain_text_or_json() -> None:
    assert lines_of('plain\n"json"\n[not json\n{nor this}\n\n{"text": "x", "id": 1}') == [
        *("plain", "json", "[not json", "{nor this}", "", "x")
    ]
    assert lines_of('one\ttwo\n["one", "two"]\n{"text": "one", "text_pair": "two"}', PAIRS) == [["one", "two"]] * 3
    assert lines_of('{"body": "x", "text": "y"}', columns=("body",)) == ["x"]
    assert lines_of('{"body": "x", "text": "y"}', columns=("body",), table=TableOptions("text")) == ["y"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "cut o', "Line 1 is not JSON"),
        ('{"text": NaN}', "NaN is no number in JSON"),
        ('{"txet": "x"}', "which column is the text"),
        ('{"review": "x", "sentence": "y"}', "more than one could be"),
    ],
)
def test_a_line_meant_as_json_that_is_none_has_an_error(line: str, words: str) -> None:
    (found, after) = lines_of(f"{line}\nplain")
    assert words in found
    assert after == "plain"


def test_tables_are_read_by_the_columns_of_training(tmp_path: Path) -> None:
    rows = ("id,body,topic", '1,"a, b",x', "2,,y")
    (tmp_path / "new.csv").write_text("\n".join(rows))
    found = list(read_questions(tmp_path / "new.csv", asked(CLASSES, ("body",))))
    assert [question.texts for question in found] == ["a, b", ""]
    assert found[0].columns == {"id": "1", "body": "a, b", "topic": "x"}
    with pytest.raises(UserError, match=r"new.csv: which column is the text\?.*'id', 'body', 'topic'; pass"):
        read_questions(tmp_path / "new.csv", asked(CLASSES))
    with pytest.raises(UserError, match=r"'id' were named, but an input of this task has two texts"):
        read_questions(tmp_path / "new.csv", asked(PAIRS), TableOptions("id"))
    (tmp_path / "bad.csv").write_text("\n".join((*rows, "3,x,y,z")))
    with pytest.raises(UserError, match=r"bad.csv:4: expected 3 fields"):
        read_questions(tmp_path / "bad.csv", asked(CLASSES, ("body",)))
    with gzip.open(tmp_path / "new.jsonl.gz", "wt") as stream:
        stream.write('{"sentence1": "x", "sentence2": "y", "id": 3}\n\nno json\n')
    first, second = read_questions(tmp_path / "new.jsonl.gz", asked(PAIRS))
    assert first.texts == ["x", "y"]
    assert second.error is not None
    assert "Line 3 is not JSON" in second.error
    with pytest.raises(UserError, match=r"`delimiter=;` goes with files"):
        read_questions(tmp_path / "new.jsonl.gz", asked(PAIRS), TableOptions(delimiter=";"))


def test_files_of_lines_are_read_as_training_reads_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ask, file = asked(CLASSES, ("body",)), tmp_path / "new.txt"
    file.write_text("body\ttopic\na, b\tx\n")
    assert [question.columns for question in read_questions(file, ask)] == [{"body": "a, b", "topic": "x"}]
    assert [question.texts for question in read_questions(file, asked(CLASSES))] == ["body\ttopic", "a, b\tx"]
    assert [question.texts for question in read_questions(file, asked(CLASSES), TableOptions("topic"))] == ["x"]
    file.write_text("one\nand two\n")
    assert [question.texts for question in read_questions(file, ask)] == ["one", "and two"]
    for name, packed in (("NEW.TXT", False), ("NEW.TXT.GZ", True)):
        (tmp_path / name).write_bytes(gzip.compress(file.read_bytes()) if packed else file.read_bytes())
        assert [question.texts for question in read_questions(tmp_path / name, ask)] == ["one", "and two"]
    lines, file = '{"body": "café"}\n', tmp_path / "new.jsonl"
    for encoding in ("utf-8", "utf-16", "cp1252"):
        file.write_bytes(lines.encode(encoding))
        assert [question.texts for question in read_questions(file, ask)] == ["café"]
    assert "new.jsonl is not UTF-8 and was read as cp1252" in caplog.text
    for name, content in (("old.txt", b"one\rtwo\r"), ("old.jsonl", b'{"body": "one"}\r{"body": "two"}\r')):
        (tmp_path / name).write_bytes(content)  # of old programs on the Macintosh
        assert [question.texts for question in read_questions(tmp_path / name, ask)] == ["one", "two"]
    file.write_bytes(lines.encode() + lines.encode("cp1252"))  # damaged
    assert [question.texts for question in read_questions(file, ask)] == ["café", "caf\udce9"]
    (tmp_path / "new.json").write_text('[{"body": "a"}]')
    with pytest.raises(UserError, match=r"`delimiter=;` was given, but .*new.json has none; leave it out"):
        read_questions(tmp_path / "new.json", ask, TableOptions(delimiter=";"))


def test_a_column_called_text_stays_beside_lists_of_tokens() -> None:
    spec = TaskSpec("custom", ("tokens",), ("O", "B-x"), ("f1",), "f1", 1, labels_tokens=True)
    row = {"text": "O'Neil's", "tokens": ["O'Neil", "'s"]}
    lines = map(json.dumps, (row, {"tokens": ["a"]}))
    line_of, none = AnswerLines("jsonl", spec), Prediction(None, 0.0, entities=())
    found = [
        json.loads(line_of(Answer(one.columns, none, one.added))) for one in read_lines(lines, asked(spec, ("tokens",)))
    ]
    assert found[0] == row | {"predicted_text": "O'Neil 's", "entities": []}
    assert found[1] == {"tokens": ["a"], "predicted_text": "a", "entities": []}


def test_what_has_come_is_handed_on_without_waiting_for_more() -> None:
    more = threading.Event()

    def slowly() -> Iterator[int]:
        yield 0
        assert more.wait(10)  # until the first has been handed on
        yield from range(1, 10)
        raise KeyError("broken")

    batches = arriving(slowly(), 4)
    assert next(batches) == [0]
    more.set()
    found: list[list[int]] = []
    with pytest.raises(KeyError, match="broken"):
        found.extend(batches)
    assert [item for batch in found for item in batch] == list(range(1, 10))
    assert max(map(len, found)) <= 4


ANSWERS = [
    Answer({"id": 7, "label": "b"}, Prediction("a", 0.912345, {"a": 0.912345, "b": 0.087655})),
    Answer({"id": float("nan"), "label": "\ud800"}, Prediction("b", 1.0, {"a": 1.23456e-9, "b": 1.0})),
    Answer({"id": 9, "label": ""}, Prediction.failed("An input has an empty text; pass some words.")),
]


def test_rows_keep_their_columns_and_have_no_number_that_json_lacks() -> None:
    first, second, third = (json.loads(line) for line in map(AnswerLines("jsonl", CLASSES), ANSWERS))
    assert first == {"id": 7, "label": "b", "predicted_label": "a", "score": 0.9123, "scores": first["scores"]}
    assert list(first) == ["id", "label", "predicted_label", "score", "scores"]
    assert second["id"] is None
    assert second["scores"] == {"a": 1.235e-9, "b": 1.0}
    assert third == {"id": 9, "label": "", "error": "An input has an empty text; pass some words."}
    value = json.loads(AnswerLines("jsonl", PAIRS)(Answer({"score": 3}, Prediction(None, 1234.56789))))
    assert value == {"score": 3, "predicted_score": 1234.57}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_no_prediction_stands_among_labels_that_some_rows_have(kind: str) -> None:
    line_of = AnswerLines(kind, CLASSES)
    text = "".join(map(line_of, [*ANSWERS, Answer({"id": 10}, ANSWERS[0].prediction)]))
    read = csv.DictReader(io.StringIO(text)) if kind == "csv" else map(json.loads, text.splitlines())
    last = list(read)[-1]
    assert (last.get("label") or None, last["predicted_label"]) == (None, "a")


def test_csv_has_the_same_columns_in_all_rows() -> None:
    line_of = AnswerLines("csv", CLASSES)
    rows = list(csv.DictReader(io.StringIO("".join(map(line_of, ANSWERS)))))
    assert list(rows[0]) == ["id", "label", "predicted_label", "score", "score_a", "score_b", "error"]
    assert rows[0]["predicted_label"] == "a"
    assert rows[0]["score_b"] == "0.08765"
    assert rows[1]["id"] == rows[2]["score"] == ""
    assert "empty text" in rows[2]["error"]
    with pytest.raises(UserError, match=r"the column 'more', which the first one lacks"):
        line_of(Answer({"id": 1, "label": "a", "more": 1}, ANSWERS[0].prediction))
    several = Prediction("a", 0.9, {"a": 0.9, "b": 0.8}, labels=("a", "b"))
    spec = TaskSpec("tags", ("text",), ("a", "b"), ("micro_f1",), "micro_f1", 1, multi_label=True)
    bad = Answer({}, Prediction.failed("Line 1 is not JSON"))
    line_of = AnswerLines("csv", CLASSES)
    rows = list(csv.DictReader(io.StringIO("".join(map(line_of, [bad, bad, *ANSWERS, bad])) + line_of.end())))
    assert [row["id"] for row in rows] == ["", "", "7", "", "9", ""]
    assert [row["error"][:6] for row in rows] == ["Line 1", "Line 1", "", "", "An inp", "Line 1"]
    line_of = AnswerLines("csv", CLASSES)
    assert (line_of(bad), line_of.end()) == ("", "label,score,score_a,score_b,error\n,,,,Line 1 is not JSON\n")
    line = AnswerLines("csv", spec)(Answer({}, several))
    assert line == "labels,score_a,score_b,error\na|b,0.9,0.8,\n"
    assert json.loads(AnswerLines("jsonl", CLASSES)(Answer({}, several)))["labels"] == ["a", "b"]


def test_labels_in_csv_are_read_again_as_what_they_were() -> None:
    names = ("a", "a|b", "b")
    spec = TaskSpec("tags", ("text",), names, ("micro_f1",), "micro_f1", 1, multi_label=True)
    line_of, scores = AnswerLines("csv", spec), dict.fromkeys(names, 0.5)
    text = "".join(
        line_of(Answer({}, Prediction("a", 0.5, scores, labels=found))) for found in (names[:2], names[:1], ())
    )
    labels = [(2, row["labels"]) for row in csv.DictReader(io.StringIO(text))]
    assert LabelReader.for_task(spec, labels).read(Path("a.csv"), labels) == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_ends_of_lines_within_a_field_of_csv_are_quoted(end: str) -> None:
    row = {"text": f"a{end}b", "note": f"c{end}", "id": "plain"}
    text = AnswerLines("csv", PAIRS)(Answer(row, Prediction(None, 1.0)))
    assert text == f'text,note,id,score,error\n"a{end}b","c{end}",plain,1.0,\n'


def test_the_format_is_the_files_ending_unless_it_is_given() -> None:
    assert [format_of(None, None), format_of(None, Path("a.csv")), format_of("csv", Path("a.txt"))] == [
        *("jsonl", "csv", "csv")
    ]
    for given in (("xlsx", None), (None, Path("a.xlsx"))):
        with pytest.raises(UserError, match=r"xlsx.* jsonl or csv"):
            format_of(*given)  # type: ignore[arg-type]
