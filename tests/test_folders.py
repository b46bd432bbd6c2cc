"""Replacing the files of a folder: whatever a crash cuts short, the folder holds the old files or the new ones."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from sparsepeft.errors import RunFailed, UserError
from sparsepeft.folders import check_output, in_use, locked, replacing, settle, write_json
from tests.disks import small_disk

OLD = ("a.*", "b.json", "parts")


class Killed(BaseException):
    """Ends the process as far as the code can tell."""


def _content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", ".sparsepeft.json"))
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def _fill(folder: Path, text: str, names: tuple[str, ...]) -> dict[str, str]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return dict.fromkeys(names, text)


def _replace(folder: Path) -> None:
    with replacing(folder, OLD) as work:
        _fill(work, "new", ("a.json", "c.json", "parts/2"))


def test_the_new_files_take_the_place_of_the_old_and_others_stay(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    _replace(folder)
    new = {"a.json": "new", "c.json": "new", "parts/2": "new"}
    assert _content(folder) == new
    others = _fill(folder, "mine", ("a.txt", "b.json", "own/file"))  # as OLD has them, but not in the list
    _fill(folder, "old", ("parts/1",))
    _replace(folder)
    assert _content(folder) == new | others


def test_new_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path, OLD) as work:
            _fill(work, "new", ("a.json", "parts/1", "run.py"))
            for name, mode in (("a.json", 0o600), ("parts/1", 0o600), ("parts", 0o700), ("run.py", 0o700)):
                (work / name).chmod(mode)  # as safetensors and tempfile leave them
    finally:
        os.umask(before)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("a.json", "parts/1", "parts", "run.py")}
    assert modes == {"a.json": 0o640, "parts/1": 0o640, "parts": 0o750, "run.py": 0o740}


def test_what_was_written_without_a_list_goes_by_its_names(tmp_path: Path) -> None:
    _fill(tmp_path, "old", ("a.txt", "b.json", "parts/1"))
    others = _fill(tmp_path, "mine", ("mine.txt",))
    _replace(tmp_path)
    assert _content(tmp_path) == {"a.json": "new", "c.json": "new", "parts/2": "new"} | others


def test_somebody_elses_file_is_never_written_over(tmp_path: Path) -> None:
    _replace(tmp_path)
    before = _content(tmp_path)
    others = _fill(tmp_path, "mine", ("d.json",))
    with pytest.raises(RunFailed, match=r"holds d\.json of another origin"), replacing(tmp_path, OLD) as work:
        _fill(work, "new", ("a.json", "d.json"))
    assert _content(tmp_path) == before | others


@pytest.mark.parametrize(
    ("names", "overwrite", "message"),
    [
        ((), False, None),
        ((".gitignore", ".DS_Store"), False, None),
        (("part/run.json", "mine.txt"), False, None),
        (("run.json", "NOTES.md"), True, None),
        (("run.json", "NOTES.md"), False, "already holds a finished run; pass another `output_dir`, or `overwrite`"),
        (("README.md",), True, r"holds other files \(README.md\); pass a new or empty folder to `output_dir`"),
        (("a", "b", "c/d", "e"), True, r"holds other files \(a, b and 2 more\)"),
    ],
)
def test_only_what_is_ours_may_be_written_to(
    tmp_path: Path, names: tuple[str, ...], overwrite: bool, message: str | None
) -> None:
    files = _fill(tmp_path / "out", "x", names)
    (tmp_path / "out" / "part").mkdir(parents=True, exist_ok=True)  # as a full disk may leave it
    with contextlib.nullcontext() if message is None else pytest.raises(UserError, match=message):
        check_output(tmp_path / "out", ("run.json", "part/run.json"), "a finished run", overwrite)
    assert _content(tmp_path / "out") == {f"{name}": "x" for name in files}


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "file", ("run.json",), "a finished run", False)
    with pytest.raises(RunFailed, match="cannot be written to"):
        check_output(tmp_path / "file" / "out", ("run.json",), "a finished run", False)


@pytest.mark.parametrize("name", ["replace", "rmdir", "unlink"])
@pytest.mark.parametrize("calls", range(4))
def test_a_crash_at_any_point_can_be_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, calls: int
) -> None:
    old = _fill(tmp_path, "old", ("a.json", "b.json", "parts/1"))
    others, original, left = _fill(tmp_path, "mine", ("mine.txt",)), getattr(os, name), [calls]

    def crash(*args: Any, **kwargs: Any) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        original(*args, **kwargs)

    monkeypatch.setattr(os, name, crash)
    with contextlib.suppress(Killed):
        _replace(tmp_path)
    monkeypatch.undo()
    settle(tmp_path)
    found = {key: value for key, value in _content(tmp_path).items() if not key.startswith(".unfinished")}
    assert found in (old | others, {"a.json": "new", "c.json": "new", "parts/2": "new"} | others)
    _replace(tmp_path)
    assert _content(tmp_path) == {"a.json": "new", "c.json": "new", "parts/2": "new"} | others


def test_what_fails_leaves_what_was_there(tmp_path: Path) -> None:
    old = _fill(tmp_path, "old", ("a.json",))

    def fail(folder: Path, error: Exception) -> None:
        with replacing(folder, OLD) as work:
            _fill(work, "new", ("a.json",))
            raise error

    for folder in (tmp_path, tmp_path / "fresh"):
        with pytest.raises(KeyError):
            fail(folder, KeyError("x"))
        with pytest.raises(RunFailed, match="could not be written"):
            fail(folder, OSError("full"))
    assert _content(tmp_path) == old
    assert not (tmp_path / "fresh").exists()


def test_a_file_on_a_full_disk_stays_as_it_was(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=16) as disk:
        write_json(disk / "result.json", {"seed": 1})
        with pytest.raises(OSError, match="No space left"):
            write_json(disk / "result.json", {"seeds": list(range(10_000))})
        assert _content(disk) == {"result.json": '{\n  "seed": 1\n}\n'}


def test_one_process_at_a_time(tmp_path: Path) -> None:
    assert not in_use(tmp_path)
    with locked(tmp_path):
        assert in_use(tmp_path)
        with pytest.raises(UserError, match="Another process is writing"), locked(tmp_path, timeout=0):
            pass
        with pytest.raises(UserError, match="Another process is writing"):
            _replace(tmp_path)
    assert not in_use(tmp_path)
    (tmp_path / ".lock").touch()  # of a process that was killed
    assert not in_use(tmp_path)
    _replace(tmp_path)
