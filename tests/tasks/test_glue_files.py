"""GLUE from files: both layouts of every task, and what is wrong with a file is said with its line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from sparsepeft.tasks import TaskError, load_task
from sparsepeft.tasks.spec import GLUE_TASKS

PAIR = ("A first one.", 'It says "so')
ENTAILS, NLI = ("entailment", "not_entailment"), ("contradiction", "entailment", "neutral")
PAIR_COLUMNS = "index,sentence1,sentence2,label"
MRPC_COLUMNS = "Quality,#1 ID,#2 ID,#1 String,#2 String"
QQP_COLUMNS = "id,qid1,qid2,question1,question2,is_duplicate"
STSB_COLUMNS = "index,genre,filename,year,old_index,source1,source2,sentence1,sentence2,score"
PARSES = "sentence1_binary_parse,sentence2_binary_parse,sentence1_parse,sentence2_parse"
MNLI_COLUMNS = f"index,promptID,pairID,genre,{PARSES},sentence1,sentence2,label1,gold_label"
# task: official folder, header, a row as a function of its label, labels as written, labels expected
OFFICIAL = {
    "cola": ("CoLA", "", lambda y: ("gj04", y, "" if y == "1" else "*", PAIR[1]), ("0", "1"), (0, 1)),
    "sst2": ("SST-2", "sentence,label", lambda y: (PAIR[1], y), ("0", "1"), (0, 1)),
    "mrpc": ("MRPC", MRPC_COLUMNS, lambda y: (y, "10" + y, "20" + y, *PAIR), ("0", "1"), (0, 1)),
    "qqp": ("QQP", QQP_COLUMNS, lambda y: ("7", "8", "9", *PAIR, y), ("1", "0"), (1, 0)),
    "stsb": ("STS-B", STSB_COLUMNS, lambda y: (*"0123456", *PAIR, y), ("5.000", "0.25"), (5.0, 0.25)),
    "mnli": ("MNLI", MNLI_COLUMNS, lambda y: (*"01234567", *PAIR, y, y), NLI, (2, 0, 1)),
    "qnli": ("QNLI", "index,question,sentence,label", lambda y: ("0", *PAIR, y), ENTAILS, (0, 1)),
    "rte": ("RTE", PAIR_COLUMNS, lambda y: ("0", *PAIR, y), ENTAILS[::-1], (1, 0)),
    "wnli": ("WNLI", PAIR_COLUMNS, lambda y: ("0", *PAIR, y), ("1", "0"), (1, 0)),
}


def tsv(header: str, *rows: tuple[str, ...], end: str = "\n") -> str:
    return "".join("\t".join(row) + end for row in (*([header.split(",")] if header else []), *rows))


def write_official(root: Path, task: str, *, gz: bool = False) -> Path:
    folder, header, row, labels, _ = OFFICIAL[task]
    (root / folder).mkdir(parents=True)
    text = tsv(header, *map(row, labels))
    for name in ("train", "dev_matched" if task == "mnli" else "dev"):
        if gz:
            (root / folder / f"{name}.tsv.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (root / folder / f"{name}.tsv").write_text(text, encoding="utf-8")
    return root / folder


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("task", GLUE_TASKS)
def test_the_official_layout(tmp_path: Path, task: str, gz: bool) -> None:
    write_official(tmp_path, task, gz=gz)
    data = load_task(task, data_dir=tmp_path)
    expected = list(OFFICIAL[task][4])
    assert data.train["label"][:] == data.validation["label"][:] == expected
    assert data.train.features["label"].dtype == ("float32" if task == "stsb" else "int64")
    assert data.train.column_names == [*data.spec.text_columns, "label"]
    row = data.train[0]
    assert [row[name] for name in data.spec.text_columns] == list(PAIR if data.spec.is_pair else PAIR[1:])
    assert data.test is None
    assert data.extra == {}
    assert data.source == "glue files"
    assert len(data.fingerprints) == 2
    assert all(value.startswith("sha256:") for value in data.fingerprints.values())
    assert f"{task}: {len(expected)} training rows" in data.notes[0]
    assert "not comparable" in data.notes[1]


def test_layouts_of_our_own(tmp_path: Path) -> None:
    cola = tsv("source,label,star,sentence", ("gj04", "1", "", "One."), ("gj04", "0", "*", "Two."))  # with a header
    mnli = tsv("index,sentence1,sentence2,gold_label", ("0", *PAIR, "neutral"))  # with one dev file
    for task, rows in (("cola", cola), ("mnli", mnli)):
        (tmp_path / task).mkdir()
        for name in ("train.tsv", "dev.tsv"):
            (tmp_path / task / name).write_text(rows)
    assert load_task("CoLA", data_dir=tmp_path).train["text"][:] == ["One.", "Two."]
    assert load_task("mnli", data_dir=tmp_path).validation["label"][:] == [1]


def test_mnli_mismatched_is_an_extra_set_and_dashes_are_left_out(tmp_path: Path) -> None:
    folder = write_official(tmp_path, "mnli")
    _, header, row, _, _ = OFFICIAL["mnli"]
    (folder / "dev_mismatched.tsv").write_text(tsv(header, row("neutral"), row("-"), row("neutral")))
    data = load_task("mnli", data_dir=tmp_path)
    assert data.extra["validation_mismatched"]["label"][:] == [1, 1]
    assert data.notes[-1] == "mnli: 1 rows of dev_mismatched.tsv without a label were left out, as the hub does"
    assert "MNLI/dev_mismatched.tsv" in data.fingerprints


def test_mrpc_from_the_microsoft_file_leaves_out_the_dev_pairs(tmp_path: Path) -> None:
    _, header, row, _, _ = OFFICIAL["mrpc"]
    folder = tmp_path / "MRPC"
    folder.mkdir()
    text = tsv(header, row("0"), row("1"), ("1", "101", "999", "Other", "pair"), end="\r\n")
    (folder / "msr_paraphrase_train.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (folder / "dev.tsv").write_bytes(b"\xef\xbb\xbf" + tsv(header, row("1")).encode())
    data = load_task("mrpc", data_dir=tmp_path)
    assert data.train["text"][:] == [PAIR[0], "Other"]
    assert data.train["label"][:] == [0, 1]
    assert data.validation["label"][:] == [1]


def test_qqp_rows_cut_short_are_left_out_and_noted(tmp_path: Path) -> None:
    folder = write_official(tmp_path, "qqp")
    with (folder / "train.tsv").open("a") as stream:
        stream.write("1\t2\t3\tonly one question\n1\t2\t3\ta\tb\t\n")
    data = load_task("qqp", data_dir=tmp_path)
    assert len(data.train) == 2
    assert "qqp: 2 rows of train.tsv without a label were left out, as the hub does" in data.notes


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("sst2", "fine\t2", r"train\.tsv:4: label is '2'; expected one of 0, 1"),
        ("sst2", "fine\t", r"train\.tsv:4: label is ''"),
        ("sst2", "fine", r"train\.tsv:4: expected 2 fields as in the header, found 1"),
        ("rte", "1\ta\tb\tneutral", r"train\.tsv:4: label is 'neutral'; expected one of entailment, not_entailment"),
        ("stsb", "\t".join("0123456") + "\ta\tb\tnan", r"train\.tsv:4: score is 'nan'; expected a finite number"),
        ("stsb", "\t".join("0123456") + "\ta\tb\tx", r"train\.tsv:4: score is 'x'; expected a finite number"),
        ("qqp", "1\t2\t3\ta\tb\t0\t0", r"train\.tsv:4: expected 6 fields as in the header, found 7"),
        ("cola", "gj04\t1\tno star", r"train\.tsv:3: expected 4 fields as in the header, found 3"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, task: str, line: str, message: str) -> None:
    folder = write_official(tmp_path, task)
    with (folder / "train.tsv").open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(TaskError, match=message):
        load_task(task, data_dir=tmp_path)


def test_missing_folders_files_and_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"nowhere does not exist; expected one with rte/ or RTE/"):
        load_task("rte", data_dir=tmp_path / "nowhere")
    with pytest.raises(TaskError, match=r"has neither rte/ nor RTE/"):
        load_task("rte", data_dir=tmp_path)
    folder = write_official(tmp_path, "rte")
    (folder / "dev.tsv").rename(folder / "elsewhere.tsv")
    with pytest.raises(TaskError, match=r"RTE has no dev\.tsv"):
        load_task("rte", data_dir=tmp_path)
    (folder / "dev.tsv").write_text("index\tsentence1\tlabel\n0\ta\tentailment\n")
    with pytest.raises(TaskError, match=r"dev\.tsv: no column 'sentence2'; the columns found are 'index', "):
        load_task("rte", data_dir=tmp_path)
    (folder / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n")
    with pytest.raises(TaskError, match=r"dev\.tsv has no rows"):
        load_task("rte", data_dir=tmp_path)
