"""The folder of answers: what it was made with, what is done, and what was left by a process that was killed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsepeft.errors import RunFailed, UserError
from sparsepeft.folders import locked, refuse_foreign, write_json

MANIFEST = ".bulk.json"  # hidden, so that no pattern takes it for an answer
_VERSION = 1


@contextmanager
def held(
    folder: Path, settings: dict[str, Any], names: Sequence[str], usable: Sequence[Path], overwrite: bool
) -> Iterator[set[Path]]:
    """Hold a folder for answers, with a note of what they are made with, and of what files.

    Args:
        folder: new, empty, or with answers that were made with the same settings.
        settings: what answers depend on.
        names: of the files that will be there.
        usable: files that can be answered.
        overwrite: remove the answers that are there, with whatever they were made.

    Yields:
        The usable files that are still to be answered. Their former answers are removed, since the note is of the files
        as they are now, which no answers are of yet.

    Raises:
        UserError: the folder holds other files, or answers that were made with other settings; or another process
            holds it.
        RunFailed: it cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"The output folder {folder} is a file; pass a folder to `output_dir`.")
    with locked(folder):
        before = _read(folder)
        if before is None:
            refuse_foreign(folder)
        elif overwrite:
            for name in before["files"]:
                (folder / name).unlink(missing_ok=True)
            before = None
        elif changed := [name for name in settings if before["settings"].get(name) != settings[name]]:
            raise UserError(
                f"{folder} holds answers made with {_shown(changed[0], before['settings'].get(changed[0]), settings)}; "
                "pass another `output_dir`, or `overwrite` to answer all files anew."
            )
        for left in folder.glob(".*.tmp"):  # by a process that was killed
            left.unlink()
        todo = _undone(usable, folder, before)
        files = sorted({*names, *(before["files"] if before else ())})
        inputs = (before or {}).get("inputs", {}) | {path.name: _state(path) for path in todo}
        note = {"format_version": _VERSION, "settings": settings, "files": files, "inputs": inputs}
        try:
            for path in todo:
                (folder / path.name).unlink(missing_ok=True)
            write_json(folder / MANIFEST, note)
        except OSError as error:
            raise RunFailed(f"{folder} cannot be written to ({error}); pass another `output_dir`.") from error
        yield {*todo}


def undone(paths: Iterable[Path], folder: Path) -> list[Path]:
    """The files whose answers are not there, or are of a file that was another when it was answered.

    Raises:
        UserError: the folder's note is damaged.
    """
    return _undone(paths, folder, _read(folder))


def _undone(paths: Iterable[Path], folder: Path, note: dict[str, Any] | None) -> list[Path]:
    inputs = (note or {}).get("inputs", {})
    return [path for path in paths if not _is_done(path, folder / path.name, inputs.get(path.name))]


def _is_done(path: Path, output: Path, noted: Any) -> bool:
    if not output.is_file():
        return False
    if noted is None:  # answered when inputs were not noted yet
        return output.stat().st_mtime_ns >= path.stat().st_mtime_ns
    return bool(noted == _state(path))


def _state(path: Path) -> dict[str, int]:
    """What tells a file from another that takes its place, also from an older one."""
    found = path.stat()
    return {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns}


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        valid = all(isinstance(each, dict) for each in (content["settings"], content.get("inputs", {}))) and all(
            isinstance(name, str) and name == Path(name).name for name in content["files"]
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError):
        valid = False
    if not valid or content.get("format_version") != _VERSION:
        raise UserError(
            f"{folder / MANIFEST} is damaged, or of another version of sparsepeft; pass another `output_dir`."
        )
    return dict(content)


def _shown(name: str, before: Any, settings: dict[str, Any]) -> str:
    """What was other then, in words."""
    if name != "tasks":
        return f"`{name}={before}`" if before is not None else f"no `{name}`"
    former, now = (each if isinstance(each, dict) else {} for each in (before, settings[name]))
    if former.keys() != now.keys():
        return f"other tasks ({', '.join(former)})"
    return f"another version of the task {next(task for task in now if former[task] != now[task])!r}"
