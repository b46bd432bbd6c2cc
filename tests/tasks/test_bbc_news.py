"""BBC News from a small file: duplicates, and a split that depends on seed and texts alone."""

from __future__ import annotations

import gzip
import random
from collections import Counter
from pathlib import Path

import pytest

from sparsepeft.tasks import TaskData, TaskError, load_task

LABELS = ("business", "entertainment", "politics", "sport", "tech")
PARTS = ("train", "validation", "test")


def articles() -> list[tuple[str, str]]:
    return [(f"{label} story {number}", label) for label in LABELS for number in range(20 if label != "tech" else 40)]


def write(root: Path, rows: list[tuple[str, str]], *, gz: bool = True) -> Path:
    content = "text\tlabel\tfile\n" + "".join(f"{text}\t{label}\tx.txt\n" for text, label in rows)
    folder = root / "bbc-news"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"all.tsv{'.gz' * gz}").write_bytes(gzip.compress(content.encode()) if gz else content.encode())
    return root


def contents(data: TaskData) -> dict[str, list[tuple[str, int]]]:
    return {part: [(row["text"], row["label"]) for row in getattr(data, part)] for part in PARTS}


@pytest.mark.parametrize("gz", [False, True])
def test_the_split_is_stratified(tmp_path: Path, gz: bool) -> None:
    parts = contents(load_task("bbc-news", data_dir=write(tmp_path, articles(), gz=gz)))
    counts = {part: Counter(label for _, label in rows) for part, rows in parts.items()}
    assert counts["test"] == counts["validation"] == {0: 2, 1: 2, 2: 2, 3: 2, 4: 4}
    assert counts["train"] == {0: 16, 1: 16, 2: 16, 3: 16, 4: 32}
    assert sorted(row for rows in parts.values() for row in rows) == sorted(
        (text, LABELS.index(label)) for text, label in articles()
    )


def test_the_split_depends_on_seed_and_texts_not_on_order_or_copies(tmp_path: Path) -> None:
    rows = articles()
    base = load_task("bbc", data_dir=write(tmp_path / "a", rows))
    shuffled = random.Random(3).sample(rows, len(rows)) + [(f" {text.replace(' ', '  ')} ", y) for text, y in rows[:7]]
    other = load_task("bbc", data_dir=write(tmp_path / "b", shuffled))
    assert contents(base) == contents(other)
    assert contents(load_task("bbc", data_dir=tmp_path / "a", seed=1)) != contents(base)
    assert base.notes == ("bbc-news: no official split; 80/10/10 by label and seed 42, test is a part of its own",)
    assert other.notes[1] == "bbc-news: 7 duplicate texts of 127 were left out"
    assert base.source == "bbc-news/all.tsv.gz"
    assert list(base.fingerprints) == ["bbc-news/all.tsv.gz"]


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"gone does not exist; expected one with bbc-news/all\.tsv"):
        load_task("bbc-news", data_dir=tmp_path / "gone")
    with pytest.raises(TaskError, match=r"bbc-news has no all\.tsv"):
        load_task("bbc-news", data_dir=tmp_path)
    write(tmp_path, [*articles(), ("a story", "weather")])
    with pytest.raises(TaskError, match=r"all\.tsv\.gz:122: label is 'weather'; expected one of business, "):
        load_task("bbc-news", data_dir=tmp_path)
    write(tmp_path, [*articles(), ("tech story 1", "sport")])
    with pytest.raises(TaskError, match=r"'tech story 1'\.\.\. has two different labels"):
        load_task("bbc-news", data_dir=tmp_path)
    write(tmp_path, articles()[:9])
    with pytest.raises(TaskError, match=r"9 distinct texts; expected at least 10"):
        load_task("bbc-news", data_dir=tmp_path)
