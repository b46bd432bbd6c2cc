"""The readers of TSV, CSV and JSONL: formats, quoting, and errors with file and line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from sparsepeft.tasks import TaskError
from sparsepeft.tasks.files import Row, read_rows


def write(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_tsv_takes_quotes_as_characters_and_only_newlines_as_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", 'text\tlabel\r\n"open quote\t0\r\nsplit\u2028here\x0cand\x85there\t1\r\n\n')
    assert list(read_rows(path)) == [
        Row(2, {"text": '"open quote', "label": "0"}),
        Row(3, {"text": "split\u2028here\x0cand\x85there", "label": "1"}),
    ]


def test_csv_quotes_and_line_numbers_across_multi_line_fields(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", '\ufefftext,label\n"two\nlines, ""quoted""",a\nplain,b\n')
    assert list(read_rows(path)) == [
        Row(2, {"text": 'two\nlines, "quoted"', "label": "a"}),
        Row(4, {"text": "plain", "label": "b"}),
    ]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_a_field_may_be_a_long_document(tmp_path: Path, ending: str) -> None:
    long = 200_000 * "a"
    content = {"csv": f"text\n{long}\n", "tsv": f"text\n{long}\n", "jsonl": f'{{"text": "{long}"}}\n'}[ending]
    assert [row.values["text"] for row in read_rows(write(tmp_path, f"a.{ending}", content))] == [long]


def test_jsonl_skips_empty_lines_and_counts_them(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "a", "label": 1}\n\n{"text": "b", "label": 2.5}\n')
    assert list(read_rows(path)) == [Row(1, {"text": "a", "label": 1}), Row(3, {"text": "b", "label": 2.5})]


@pytest.mark.parametrize(("name", "content"), [("a.tsv", "x\ty\n1\t2\n"), ("a.csv", "x,y\n1,2\n")])
def test_gzip_reads_the_same(tmp_path: Path, name: str, content: str) -> None:
    plain = write(tmp_path, name, content)
    packed = write(tmp_path, f"{name}.gz", gzip.compress(content.encode()))
    assert list(read_rows(plain)) == list(read_rows(packed)) == [Row(2, {"x": "1", "y": "2"})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "", r"a\.tsv has no rows"),
        ("a.csv", "text,label\n", r"a\.csv has no rows"),
        ("a.jsonl", "\n\n", r"a\.jsonl has no rows"),
        ("a.tsv", "x\ty\n1\t2\n1\t2\t3\n", r"a\.tsv:3: expected 2 fields as in the header, found 3"),
        ("a.csv", 'x,y\n"1\n1",2\n1\n', r"a\.csv:4: expected 2 fields as in the header, found 1"),
        ("a.csv", 'x,y\n1,2\n"1,2\n', r"a\.csv:3: malformed CSV"),
        ("a.jsonl", '{"x": 1}\n{"x": ' + "[" * 100_000 + "\n", r"a\.jsonl:2: not JSON \(maximum recursion depth"),
        ("a.jsonl", '{"x": 1' + "0" * 5000 + "}\n", r"a\.jsonl:1: not JSON \(Exceeds the limit"),
        ("a.csv", "x,x\n1,2\n", r"a\.csv: column 'x' occurs twice"),
        ("a.jsonl", '{"x": 1}\n{"x": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", '{"x": 1}\n[1]\n', r"a\.jsonl:2: found a JSON list; expected one object per row"),
        ("a.jsonl", '{"x": 1}\n{"y": 1}\n', r"a\.jsonl:2: no column 'x'; the columns found are 'y'"),
        ("a.tsv.gz", b"x\n1\n", r"a\.tsv\.gz: damaged gzip file"),
        # Without a time in it: all workers must see the same.
        ("a.jsonl.gz", gzip.compress(b'{"x": 1}\n' * 9, mtime=0)[:-9], r"a\.jsonl\.gz: damaged gzip file"),
        ("a.tsv", b"x\nna\xc3\xafve\n\xff\n", r"a\.tsv:3: the byte 0xff is no UTF-8, although the text before it is"),
        ("a.xlsx", "x", r"a\.xlsx is a spreadsheet .*; save it as CSV"),
        ("a.gz", b"x", r"a\.gz: the ending says no known format; expected \.csv, \.tsv, \.jsonl, \.json, \.parquet"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    required = ("x",) if name.endswith("jsonl") and content != "\n\n" else ()
    with pytest.raises(TaskError, match=message):
        list(read_rows(write(tmp_path, name, content), required=required))


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"none\.csv does not exist"):
        list(read_rows(tmp_path / "none.csv"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(TaskError, match=r"folder\.csv is a folder"):
        list(read_rows(tmp_path / "folder.csv"))
