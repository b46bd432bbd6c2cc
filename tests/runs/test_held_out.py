"""What a run held out is found again, or its absence is said, when its data has changed since training."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import topics_rows, topics_text, write_jsonl

from sparsepeft.errors import UserError
from sparsepeft.folders import write_json
from sparsepeft.runs.files import HELD_OUT, RUN, describe_run
from sparsepeft.runs.held_out import digests_of_drawn, held_out_data, load_task_data, write_held_out
from sparsepeft.training import RunConfig, evaluate, train

Rows = list[tuple[str, str]]
ROWS: Rows = [(f"text number {index}", "ab"[index % 2]) for index in range(60)]


def write(path: Path, rows: Rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    return str(path)


def leave_run(folder: Path, **values: Any) -> Path:
    """What a training run leaves of its data; a model is not needed here."""
    config = RunConfig(output_dir=str(folder), **values)
    data = load_task_data(config)
    run = describe_run(config)
    write_json(folder / RUN, run | {"task": vars(data.spec), "data_fingerprints": data.fingerprints})
    write_held_out(folder, digests_of_drawn(data))
    return folder


def rows_of(part: Any, names: tuple[str, ...] | None) -> set[tuple[str, str]]:
    assert names is not None
    return {(row["text"], names[row["label"]]) for row in part}


@pytest.fixture
def drawn(tmp_path: Path) -> tuple[Path, Path, set[tuple[str, str]]]:
    """A training file, a run whose validation part was drawn from it, and that part's rows."""
    file = tmp_path / "mine.tsv"
    run = leave_run(tmp_path / "run", task="custom", train_file=write(file, ROWS))
    data = held_out_data(run)
    assert not any("changed" in note for note in data.notes)
    return file, run, rows_of(data.validation, data.spec.label_names)


def test_rows_are_found_wherever_they_are_now(drawn: tuple[Path, Path, set[tuple[str, str]]]) -> None:
    file, run, before = drawn
    write(file, [*ROWS, ROWS[0]])  # the same rows are drawn
    assert held_out_data(run).notes[-1] == "custom: mine.tsv has changed since training"
    gone, other = sorted(before)[:2]
    turned = (other[0], "ab"[other[1] == "a"])
    rows = [row for row in ROWS if row not in (gone, other)] + [turned]
    rows += [(f"new {index}", "ab"[index % 2]) for index in range(60)] + [("of a new kind", "A")]
    random.Random(0).shuffle(rows)
    write(file, rows)
    data = held_out_data(run)
    assert data.spec.label_names == ("a", "b")  # those of training, which "A" would come before
    assert rows_of(data.validation, ("a", "b")) == before - {gone, other} | {turned}
    assert data.notes[-1] == (
        "custom: mine.tsv has changed since training; of the 6 rows held out as validation then, 5 are still there and "
        "were scored"
    )


def test_what_cannot_be_told_is_refused(drawn: tuple[Path, Path, set[tuple[str, str]]]) -> None:
    file, run, before = drawn
    write(file, [(text, "c" if (text, label) in before else label) for text, label in ROWS])
    with pytest.raises(UserError, match=r"validation part .* now has the label 'c', which it was not trained on"):
        held_out_data(run)
    write(file, [row for row in ROWS if row not in before])
    with pytest.raises(UserError, match=r"mine.tsv has changed .* nothing that was held out .* `test_file`"):
        held_out_data(run)
    (run / HELD_OUT).unlink()  # as runs of earlier versions
    with pytest.raises(UserError, match=r"mine.tsv has changed .* does not say what of it was held out"):
        held_out_data(run)
    write(file, ROWS)
    assert len(held_out_data(run).validation) == 6
    (run / HELD_OUT).write_text("{}")
    write(file, ROWS[1:])
    with pytest.raises(UserError, match=r"held_out.json is damaged"):
        held_out_data(run)
    write(file, [(text, str(index / 7)) for index, (text, _) in enumerate(ROWS)])
    (run / HELD_OUT).unlink()
    with pytest.raises(UserError):
        held_out_data(run)
    file.unlink()
    with pytest.raises(UserError, match=r"mine.tsv, which is not there any more; .* `test_file`"):
        held_out_data(run)


def test_files_of_their_own_are_scored_as_they_are(tmp_path: Path) -> None:
    names = ("train_file", "validation_file", "test_file")
    files = {name: write(tmp_path / f"{name}.tsv", ROWS[start:]) for start, name in enumerate(names)}
    run = leave_run(tmp_path / "run", task="custom", **files)
    assert not (run / HELD_OUT).exists()
    write(tmp_path / "test_file.tsv", ROWS[:20])
    write(tmp_path / "train_file.tsv", [*ROWS, ("new", "A")])  # a label that comes first from now on
    data = held_out_data(run)
    assert data.test is not None
    assert rows_of(data.test, data.spec.label_names) == set(ROWS[:20])
    assert rows_of(data.validation, data.spec.label_names) == set(ROWS[1:])
    assert "custom: train_file.tsv, test_file.tsv have changed since training" in data.notes


def test_a_split_of_bbc_news_is_kept(tmp_path: Path) -> None:
    names = ("business", "entertainment", "politics", "sport", "tech")
    rows = [(f"Article {index}", names[index % 5]) for index in range(100)]
    write(tmp_path / "data" / "bbc-news" / "all.tsv", rows)
    run = leave_run(tmp_path / "run", task="bbc-news", data_dir=str(tmp_path / "data"))
    before = held_out_data(run)
    shutil.move(tmp_path / "data", tmp_path / "moved")
    with pytest.raises(UserError, match=r"data, which is not there any more; .* `data_dir`"):
        held_out_data(run)
    assert held_out_data(run, str(tmp_path / "moved")).notes == before.notes
    more = [(text.lower(), label) for text, label in rows[5:]] + [(f"new {index}", "tech") for index in range(50)]
    write(tmp_path / "moved" / "bbc-news" / "all.tsv", more)
    now = held_out_data(run, str(tmp_path / "moved"))
    assert before.test is not None
    assert now.test is not None
    for was, found, name in ((before.validation, now.validation, "validation"), (before.test, now.test, "test")):
        kept = {row["text"].lower() for row in was} - {f"article {index}" for index in range(5)}
        assert {row["text"] for row in found} == kept
        assert any(f"of the 10 rows held out as {name} then, {len(kept)} are" in note for note in now.notes)


def test_a_changed_glue_file_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "sst2"
    for part in ("train", "dev"):
        (tmp_path / "sst2").mkdir(exist_ok=True)
        (folder / f"{part}.tsv").write_text("sentence\tlabel\n" + "".join(f"{part} {i}\t{i % 2}\n" for i in range(20)))
    run = leave_run(tmp_path / "run", task="sst2", data_dir=str(tmp_path))
    (folder / "dev.tsv").write_text("sentence\tlabel\nother\t1\n")
    assert "sst2: sst2/dev.tsv has changed since training" in held_out_data(run).notes
    content = json.loads((run / RUN).read_text())
    write_json(run / RUN, {key: value for key, value in content.items() if key != "data_fingerprints"})
    assert not any("changed" in note for note in held_out_data(run).notes)  # a run that says nothing of its files


@pytest.mark.slow
def test_documents_of_a_language_model_are_found_again(tiny_language_model: Path, tmp_path: Path) -> None:
    documents, file = topics_rows("train"), tmp_path / "text.jsonl"
    write_jsonl(file, documents)
    values: dict[str, Any] = {"model": str(tiny_language_model), "max_steps": 1, "block_length": 16}
    run = tmp_path / "run"
    results = train(RunConfig("lm", str(run), text=(str(file),), **values))
    assert evaluate(run).metrics == {"validation": pytest.approx(results["metrics"]["validation"])}
    write_jsonl(file, [{"text": f"new document {index}"} for index in range(30)] + documents)
    found = evaluate(run)
    assert found.metrics == {"validation": pytest.approx(results["metrics"]["validation"])}
    count = round(len(documents) / 10)
    assert found.notes == (
        f"the text has changed since training; of the {count} documents held out then, {count} are still there and "
        "were scored",
    )
    write_jsonl(file, [{"text": f"new document {index}"} for index in range(300)])
    with pytest.raises(UserError, match=r"text.jsonl has changed since training, and none .* `test_file`"):
        evaluate(run)
    assert evaluate(run, test_file=file).metrics.keys() == {"test"}

    plain = topics_text(tmp_path)  # one document, whose end is held out
    train(RunConfig("lm", str(tmp_path / "tail"), text=(str(plain),), **values))
    plain.write_text("a new beginning " + plain.read_text())
    with pytest.raises(UserError, match=r"topics.txt has changed .* does not say what of it was held out"):
        evaluate(tmp_path / "tail")
    train(RunConfig("lm", str(tmp_path / "own"), text=(str(plain),), validation_text=(str(file),), **values))
    write_jsonl(file, documents)
    assert evaluate(tmp_path / "own").notes == ("text.jsonl has changed since training",)
    file.unlink()
    with pytest.raises(UserError, match=r"text.jsonl, which is not there any more; .* `test_file`"):
        evaluate(tmp_path / "own")
