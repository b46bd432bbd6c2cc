"""The readers of files as people, spreadsheets, pandas and `datasets` write them, and errors with file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from sparsepeft.rows.decoding import UTF8
from sparsepeft.rows.formats import RAW_TSV, FileFormat, find_format
from sparsepeft.rows.reading import Row, read_header, read_rows
from sparsepeft.tasks import TaskError, load_task

TABLE = 'text{d}label\r\n"Sie sagte: ""ja{d} doch"", 5 €\nnaïve"{d}a\r\nplain, text{d}b\r\n'
ROWS = [
    Row(2, {"text": 'Sie sagte: "ja{d} doch", 5 €\nnaïve', "label": "a"}),
    Row(4, {"text": "plain, text", "label": "b"}),
]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_csv_as_spreadsheets_write_it(tmp_path: Path, delimiter: str, encoding: str) -> None:
    content = TABLE.replace("{d}", delimiter).encode(encoding)
    path = write(tmp_path / "a.csv", content)
    packed = write(tmp_path / "b.csv.gz", gzip.compress(content))
    expected = [Row(row.line, {k: v.replace("{d}", delimiter) for k, v in row.values.items()}) for row in ROWS]
    found = find_format(path)
    assert list(read_rows(path, found)) == list(read_rows(packed, find_format(packed))) == expected
    assert (found.delimiter, found.encoding) == (delimiter, UTF8 if encoding.startswith("utf-8") else encoding)
    said = "a.csv is not UTF-8 and was read as cp1252; pass `encoding` if that is wrong"
    assert found.notes == ((said,) if encoding == "cp1252" else ())
    if encoding == "cp1252":  # is not guessed where the note would not be seen
        with pytest.raises(TaskError, match="is not in UTF-8; save it as UTF-8"):
            list(read_rows(path))


@pytest.mark.parametrize(
    ("content", "is_quoted", "notes"),
    [
        ('text\tlabel\n"a\tb\nc\nd"\tx\n', True, ()),  # only so has every row two fields
        ('text\tlabel\n"open quote\tx\n', False, ()),
        ('text\tlabel\nhe said "no"\tx\n', False, ()),
        ('"text"\t"label"\n"plain"\t"x"\n', True, ()),
        ('text\tlabel\n"a ""b"" c"\tx\n', True, ('doubled ""',)),
        ('text\tlabel\n"No."\tx\n"Yes."\ty\n', False, ("the quotation marks around 2 fields",)),
    ],
)
def test_quotes_in_tsv(tmp_path: Path, content: str, is_quoted: bool, notes: tuple[str, ...]) -> None:
    found = find_format(write(tmp_path / "a.tsv", content))
    assert (found.delimiter, found.is_quoted) == ("\t", is_quoted)
    assert len(found.notes) == len(notes)
    assert all(words in note for words, note in zip(notes, found.notes, strict=True))


def test_tsv_takes_quotes_as_characters_and_only_newlines_as_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'text\tlabel\r\n"open quote\t0\r\nsplit\u2028here\x0cand\x85there\t1\r\n\n')
    assert list(read_rows(path)) == [
        Row(2, {"text": '"open quote', "label": "0"}),
        Row(3, {"text": "split\u2028here\x0cand\x85there", "label": "1"}),
    ]


def test_csv_quotes_and_line_numbers_across_multi_line_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\ufefftext,label\n"two\nlines, ""quoted""",a\nplain,b\n')
    assert list(read_rows(path)) == [
        Row(2, {"text": 'two\nlines, "quoted"', "label": "a"}),
        Row(4, {"text": "plain", "label": "b"}),
    ]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_a_field_may_be_a_long_document(tmp_path: Path, ending: str) -> None:
    long = 200_000 * "a"
    content = {"csv": f"text\n{long}\n", "tsv": f"text\n{long}\n", "jsonl": f'{{"text": "{long}"}}\n'}[ending]
    assert [row.values["text"] for row in read_rows(write(tmp_path / f"a.{ending}", content))] == [long]


def test_jsonl_skips_empty_lines_and_counts_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a", "label": 1}\n\n{"text": "b", "label": 2.5}\n')
    assert list(read_rows(path)) == [Row(1, {"text": "a", "label": 1}), Row(3, {"text": "b", "label": 2.5})]


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"none\.csv does not exist"):
        list(read_rows(tmp_path / "none.csv"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(TaskError, match=r"folder\.csv is a folder"):
        list(read_rows(tmp_path / "folder.csv"))


def test_files_of_a_layout_stay_raw(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"a ""b"" c"\tx\n')
    assert next(read_rows(path, RAW_TSV)).values["text"] == '"a ""b"" c"'


def test_one_column_and_other_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text\nsome; words\nmore\n")
    assert [row.values for row in read_rows(path)] == [{"text": "some; words"}, {"text": "more"}]
    path = write(tmp_path / "b.csv", "text,label\ra,1\rb,2\r")  # of old programs on the Macintosh
    assert [row.line for row in read_rows(path)] == [2, 3]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("name", "first", "char"), [("a.csv", "sep=;", ";"), ("a.csv", '"SEP=:"', ":"), ("a.tsv", "sep=\t", "\t")]
)
def test_a_first_line_for_excel_says_the_delimiter(
    tmp_path: Path, name: str, first: str, char: str, end: str, encoding: str
) -> None:
    rows = [first, f"text{char}label", f'"a,b"{char}x', "", f"c{char}y"]
    found = find_format(write(tmp_path / name, end.join(rows).encode(encoding)))
    assert found.delimiter == char
    read = list(read_rows(tmp_path / name, found))
    assert [row.line for row in read] == [3, 5]
    assert [row.values["label"] for row in read] == ["x", "y"]
    assert read_header(tmp_path / name, found) == ["text", "label"]


def test_quotes_in_tsv_after_the_line_for_excel(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'sep=\t\ntext\tlabel\n"a\tb\nc\td"\tx\n"e"\ty\n')
    found = find_format(path)
    assert found.is_quoted
    assert [row.line for row in read_rows(path, found)] == [3, 5]


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ("text,,\na,,\nb,,2\n", ["", "2"]),
        ("text,,\na,1,\nb,,\n", ["1", ""]),
        ("text, ,,\na,,1,\nb,,2,\n", ["1", "2"]),
        ("text,\na,1\nb,2\n", ["1", "2"]),
    ],
)
def test_of_columns_without_a_name_the_one_with_values_is_kept(tmp_path: Path, content: str, kept: list[str]) -> None:
    assert [row.values for row in read_rows(write(tmp_path / "a.csv", content))] == [
        {"text": text, "": value} for text, value in zip("ab", kept, strict=True)
    ]


@pytest.mark.parametrize("given", ["semicolon", ";"])
def test_a_delimiter_that_is_given(tmp_path: Path, given: str) -> None:
    path = write(tmp_path / "a.csv", "text,more;label,x\na,b;c,d\n")
    with pytest.raises(TaskError, match=r"separated by more than one of comma, semicolon; pass `delimiter`"):
        find_format(path)
    assert next(read_rows(path, find_format(path, given))).values == {"text,more": "a,b", "label,x": "c,d"}


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.tsv", "", {}, r"a\.tsv has no rows"),
        ("a.csv", "text,label\n", {}, r"a\.csv has no rows"),
        ("a.jsonl", "\n\n", {}, r"a\.jsonl has no rows"),
        ("a.tsv", "x\ty\n1\t2\n1\t2\t3\n", {}, r"a\.tsv:3: expected 2 fields as in the header, found 3"),
        ("a.csv", 'x,y\n"1\n1",2\n1\n', {}, r"a\.csv:4: expected 2 fields as in the header, found 1"),
        ("a.csv", 'x,y\n1,2\n"1,2\n', {}, r"a\.csv:3: malformed CSV"),
        ("a.jsonl", '{"x": 1}\n{"x": ' + "[" * 100_000 + "\n", {}, r"a\.jsonl:2: not JSON \(maximum recursion depth"),
        ("a.jsonl", '{"x": 1' + "0" * 5000 + "}\n", {}, r"a\.jsonl:1: not JSON \(Exceeds the limit"),
        ("a.csv", "x,x\n1,2\n", {}, r"a\.csv: column 'x' occurs twice"),
        ("a.csv", "x,,\n1,2,\n1,,2\n", {}, r"a\.csv:3: columns 2 and 3 have values, but no name in the header; give"),
        ("a.tsv", "x\t\t\n1\t2\t3\n", {}, r"a\.tsv:2: columns 2 and 3 have values"),
        ("a.csv", 'sep=;\nx;y\n1;2\n"1;2\n', {}, r"a\.csv:4: malformed CSV"),
        ("a.csv", "sep=;\nx;y\n1;2;3\n", {}, r"a\.csv:3: expected 2 fields as in the header, found 3"),
        ("a.csv", "sep=;\nx;y\n1;2\n", {"delimiter": ","}, r"but the header 'x;y' has none; pass `delimiter=semi"),
        ("a.csv", "sep=;\n", {}, r"a\.csv has no rows"),
        ("a.jsonl", '{"x": 1}\n{"x": \n', {}, r"a\.jsonl:2: not JSON"),
        ("a.jsonl", '{"x": 1}\n[1]\n', {}, r"a\.jsonl:2: found a JSON list; expected one object per row"),
        ("a.jsonl", '{"x": 1}\n{"y": 1}\n', {}, r"a\.jsonl:2: no column 'x'; the columns found are 'y'"),
        ("a.tsv.gz", b"x\n1\n", {}, r"a\.tsv\.gz: damaged gzip file"),
        # Without a time in it: all workers must see the same.
        ("a.jsonl.gz", gzip.compress(b'{"x": 1}\n' * 9, mtime=0)[:-9], {}, r"a\.jsonl\.gz: damaged gzip file"),
        (
            "a.tsv",
            b"x\nna\xc3\xafve\n\xff\n",
            {},
            r"a\.tsv:3: the byte 0xff is no UTF-8, although the text before",
        ),
        (
            "a.gz",
            b"x",
            {},
            r"a\.gz: the ending says no known format; expected \.csv, \.tsv, \.jsonl, \.json, ",
        ),
        ("a.csv", "a;b\n1;2\n", {"delimiter": ","}, r"`delimiter=comma` was given, but .* none; pass `delimiter=semi"),
        ("a.csv", 'a;b\n1;2\n"x;y\n', {}, r"a\.csv:3: malformed CSV .* separated by a semicolon"),
        ("a.csv", "a;b\n1;2\nx;y;z\n", {}, r"a\.csv:3: expected 2 fields as in the header, found 3"),
        ("a.csv", "a,b\n1,2\n", {"delimiter": "::"}, r"`delimiter=::` was given; expected one character"),
        ("a.csv", "a,b\n1,2\n", {"encoding": "utf-9"}, r"`encoding=utf-9` was given; expected the name of"),
        ("a.csv", "a,b\n1,2\n", {"encoding": "base64"}, r"`encoding=base64` was given"),
        ("a.csv", "a,b\n1,é\n", {"encoding": "ascii"}, r"a\.csv: not ascii text after line 0"),
        ("a.csv", "привет,слово\nда,нет\n".encode("cp1251"), {}, r"hardly in Latin letters; pass `encoding`"),
        ("a.csv", "many words,more\nof text\x81\n".encode("latin-1"), {}, r"neither in UTF-8 nor in cp1252"),
        ("a.csv", b"\x89PNG\r\n\x1a\n\x00\x00", {}, r"a\.csv is not a text file"),
        ("a.csv", gzip.compress(b"a,b\n1,2\n", mtime=0), {}, r"a\.csv is gzipped, but its name does not say so"),
        ("a.ods", b"PK", {}, r"a\.ods is a spreadsheet .*; save it as CSV"),
        ("a.parquet", b"PAR1", {}, r"a\.parquet cannot be read as parquet"),
        ("a.json", '{"rows": []}', {}, r"a\.json:1: no column 'x'"),
        ("a.json", "[1]", {}, r"a\.json:1: found a JSON int; expected one object per row"),
        ("a.json", "[{]", {}, r"a\.json: not JSON"),
    ],
)
def test_what_is_wrong_is_said(
    tmp_path: Path, name: str, content: str | bytes, options: dict[str, str], message: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(TaskError, match=message):
        list(
            read_rows(
                path, find_format(path, **options), required=("x",) if ".json" in name and content.strip() else ()
            )
        )


def test_a_file_of_many_gigabytes_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("wb") as file:
        file.truncate(5 << 30)  # takes no room on the disk
    with pytest.raises(TaskError, match=r"a\.csv has 5\.4 GB, .* pass a part of it"):
        next(read_rows(tmp_path / "a.csv", FileFormat("csv", ",", UTF8)))


def test_json_is_a_list_or_one_object_per_line(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 2}]
    path = write(tmp_path / "a.json", json.dumps(rows, indent=1))
    assert find_format(path).kind == "json"
    assert [row.values for row in read_rows(path)] == rows
    path = write(tmp_path / "b.json", "\n".join(map(json.dumps, rows)))  # as datasets writes it
    assert find_format(path).kind == "jsonl"
    assert [row.values for row in read_rows(path)] == rows


def test_parquet_of_datasets_has_class_names(tmp_path: Path) -> None:
    names = ClassLabel(names=["no", "yes"])
    features = Features({"text": Value("string"), "label": names, "tags": List(names)})
    rows = {"text": ["a", "b"], "label": [1, 0], "tags": [[0, 1], []]}
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    assert [row.values for row in read_rows(tmp_path / "a.parquet")] == [
        {"text": "a", "label": "yes", "tags": ["no", "yes"]},
        {"text": "b", "label": "no", "tags": []},
    ]
    assert find_format(tmp_path / "a.parquet") == FileFormat("parquet")


def test_parquet_of_datasets_before_version_4_and_rows_without_a_class(tmp_path: Path) -> None:
    kinds: dict[str, Any] = {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}
    kinds |= {"tags": [kinds["label"]], "turns": [{"role": {"dtype": "string", "_type": "Value"}}], "none": []}
    table = pa.table({"label": [1, -1], "tags": [[0, -1], []], "turns": [[{"role": "x"}], []]})
    metadata = {"huggingface": json.dumps({"info": {"features": kinds}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    assert [row.values for row in read_rows(tmp_path / "a.parquet")] == [
        {"label": "yes", "tags": ["no", None], "turns": [{"role": "x"}]},
        {"label": None, "tags": [], "turns": []},
    ]
    pq.write_table(pa.table({"label": [2]}).replace_schema_metadata(metadata), tmp_path / "b.parquet")
    with pytest.raises(TaskError, match=r"b\.parquet: label has class 2 of 2; expected 0 to 1"):
        list(read_rows(tmp_path / "b.parquet"))


def test_own_files_are_read_as_the_options_say(tmp_path: Path) -> None:
    rows = "".join(f"Größe {i};{'ja' if i % 2 else 'nein'}\n" for i in range(60))
    path = write(tmp_path / "a.csv", f"text;label\n{rows}".encode("cp1252"))
    data = load_task("custom", train_file=path)
    assert data.notes[0] == "custom: a.csv is not UTF-8 and was read as cp1252; pass `encoding` if that is wrong"
    assert "Größe" in data.train[0]["text"]
    data = load_task("custom", train_file=path, encoding="cp1252", delimiter="semicolon")
    assert not any("UTF-8" in note for note in data.notes)
    write(tmp_path / "a.jsonl", '{"text": "a", "label": "b"}\n')
    with pytest.raises(TaskError, match=r"`delimiter=;` was given, but .* has none"):
        load_task("custom", train_file=tmp_path / "a.jsonl", delimiter=";")
