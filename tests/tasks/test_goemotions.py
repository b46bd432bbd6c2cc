"""GoEmotions from small files and the hub's form, and the real ones: rows, labels, parts and draws."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsepeft.tasks import TaskError, check_task, few_shot, load_task, split_train, task_spec

NAMES = task_spec("goemotions").label_names or ()
ROWS = {
    "train": ['she said "hi"\t2,27\ta1', "fine\t0\ta2"],
    "dev": ["so so\t27\tb"],
    "test": ["oh\t6\tc", "no\t3, 10\td"],
}


def write(root: Path, rows: dict[str, list[str]] = ROWS, names: tuple[str, ...] = NAMES) -> Path:
    folder = root / "goemotions"
    folder.mkdir(parents=True, exist_ok=True)
    for part, lines in rows.items():
        (folder / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    (folder / "labels.txt").write_text("\n".join(names))
    return root


def held(label: list[float]) -> list[str]:
    return [name for name, value in zip(NAMES, label, strict=True) if value]


def test_small_files(tmp_path: Path) -> None:
    check_task("goemotions", write(tmp_path))
    data = load_task("GoEmotions", data_dir=tmp_path)
    assert (len(NAMES), data.spec.main_metric, data.spec.multi_label) == (28, "macro_f1", True)
    assert data.train["text"][:] == ['she said "hi"', "fine"]
    assert [held(label) for label in data.train["label"][:]] == [["anger", "neutral"], ["admiration"]]
    assert data.test is not None
    assert held(data.test[1]["label"]) == ["annoyance", "disapproval"]
    assert list(data.fingerprints) == [f"goemotions/{part}.tsv" for part in ("train", "dev", "test")]
    assert data.notes[0].startswith("goemotions: 2 train rows, the release has 43,410: scores are not comparable")


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"goemotions does not exist; put train\.tsv, dev\.tsv, test\.tsv there"):
        check_task("goemotions", tmp_path)
    for label in ("28", "joy", "", "1;2"):
        write(tmp_path, ROWS | {"dev": ["a\t0\tx", f"b\t{label}\ty"]})
        with pytest.raises(TaskError, match=rf"dev\.tsv:2: the labels are '{label}'; expected numbers from 0 to 27"):
            load_task("goemotions", data_dir=tmp_path)
    write(tmp_path, names=NAMES[::-1])
    with pytest.raises(TaskError, match=r"labels\.txt names other labels, or in another order; expected admiration"):
        load_task("goemotions", data_dir=tmp_path)
    (tmp_path / "goemotions" / "test.tsv").unlink()
    with pytest.raises(TaskError, match=r"has no test\.tsv"):
        check_task("goemotions", tmp_path)


def test_the_real_files(data_dir: Path) -> None:
    data = load_task("goemotions", data_dir=data_dir)
    assert data.test is not None
    assert [len(part) for part in (data.train, data.validation, data.test)] == [43410, 5426, 5427]
    assert data.notes == ()
    counts = dict(zip(NAMES, map(sum, zip(*data.train["label"][:], strict=True)), strict=True))
    assert (counts["neutral"], counts["grief"]) == (14219, 77)  # as published
    assert sum(sum(label) > 1 for label in data.train["label"][:]) == 7102
    train, selection = split_train(data.train, data.spec)
    assert (len(train), len(selection)) == (39069, 4341)
    drawn = few_shot(data.train, data.spec, 200, seed=1)
    for part, share in ((selection, 0.1), (drawn, 200 / 43410)):
        found = dict(zip(NAMES, map(sum, zip(*part["label"][:], strict=True)), strict=True))
        assert min(found.values()) >= 1  # rows are drawn by the rarest of their labels
        assert found["neutral"] == pytest.approx(share * counts["neutral"], rel=0.15)
