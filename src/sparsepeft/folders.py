"""Writing files and folders without harm: to what was there, to what others write, and whenever the process ends.

A single file is written beside its place and renamed. The files of a folder are made in a part of it. When all are
there, that part is renamed to ``.finished``, and from then on they are what the folder holds: what was only needed to
make them and the old files are removed, the part is renamed to ``.moving``, and its files are moved up. :func:`settle`
does what a crash has left undone of that. ``.sparsepeft.json`` lists what was written, so that nothing else is ever
removed or replaced.

Nothing here needs PyTorch, so that a folder can be looked at before anything is loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from sparsepeft.errors import RunFailed, UserError

UNFINISHED = "unfinished"  # where a run works, to go on there after an interruption
MANIFEST = ".sparsepeft.json"  # lists what was written
_WORK, _FINISHED, _MOVING, _LOCK = ".unfinished", ".finished", ".moving", ".lock"


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` to ``path`` through a temporary file, so that a failure leaves what was there."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` through a temporary file, so that a failure leaves what was there."""
    with writing(path) as stream:
        stream.write(content)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """What is to stand in ``path``, and does when all of it was written; a failure leaves what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_output(folder: Path, names: Sequence[str], kind: str, overwrite: bool) -> None:
    """See that a command may write to ``folder``: it is new, empty, or holds what a command of the kind left there.

    Hidden files do not count.

    Args:
        folder: for the output.
        names: files or folders by which the output is known; the first one stands for finished output.
        kind: of output, in words: ``"a finished run"``.
        overwrite: finished output may be replaced.

    Raises:
        UserError: the folder is a file, holds other files, or holds finished output and ``overwrite`` is not set.
        RunFailed: it cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"The output folder {folder} is a file; pass a folder to `output_dir`.")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir():
        raise RunFailed(f"{folder} cannot be written to ({existing} does not allow it); pass another `output_dir`.")
    settle(folder)
    if (folder / names[0]).exists():
        if not overwrite:
            raise UserError(f"{folder} already holds {kind}; pass another `output_dir`, or `overwrite` to replace it.")
    elif not any((folder / name).exists() for name in names):
        refuse_foreign(folder)


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder with files in it, hidden ones aside.

    Raises:
        UserError: there are some.
    """
    if others := _visible(folder):
        named = ", ".join(others[:2]) + (f" and {len(others) - 2} more" if len(others) > 2 else "")
        raise UserError(
            f"The output folder {folder} holds other files ({named}); pass a new or empty folder to `output_dir`."
        )


def check_not_in_use(folder: Path) -> None:
    """Refuse a folder that another process holds just now.

    Raises:
        UserError: it does.
    """
    if in_use(folder):
        raise _taken(folder)


@contextlib.contextmanager
def locked(folder: Path, timeout: float = 1.0) -> Iterator[None]:
    """Hold a folder, which is made if there is none, against other processes that would write to it.

    Args:
        folder: removed again, like parents of it, where it was made here and stayed empty.
        timeout: seconds to wait for another holder.

    Raises:
        UserError: another process holds it.
        RunFailed: it cannot be written to.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / _LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=timeout)
    except Timeout as error:
        raise _taken(folder) from error
    except OSError as error:
        raise RunFailed(f"{folder} cannot be written to ({error}); pass another `output_dir`.") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / _LOCK).unlink()  # before the release, or it could be the next holder's
        lock.release()
        with contextlib.suppress(OSError):  # one that is not empty
            for path in made:
                path.rmdir()


def in_use(folder: Path) -> bool:
    """Whether a process holds the folder just now (:func:`locked`); True also where that cannot be told."""
    if not (folder / _LOCK).exists():
        return False
    try:
        with FileLock(folder / _LOCK).acquire(timeout=0):
            return False
    except (Timeout, OSError):
        return True


@contextlib.contextmanager
def replacing(folder: Path, old: Sequence[str] = ()) -> Iterator[Path]:
    """A new folder whose files take the place of those that were written before when all went well; else those stay.

    Args:
        folder: where the files are to stand.
        old: as for :func:`finish`.

    Raises:
        UserError: another process is writing to the folder.
        RunFailed: files cannot be written, or somebody else's are in their place.
    """
    with locked(folder):
        work = folder / _WORK
        try:
            _settle(folder)
            remove(work)  # of a process that was killed
            work.mkdir()
            yield work
            finish(folder, work, old)
        except OSError as error:
            raise RunFailed(f"The files could not be written to {folder} ({error}); free space, try again.") from error
        finally:
            remove(work)


def finish(folder: Path, work: Path, old: Sequence[str] = (), left_out: Sequence[str] = ()) -> None:
    """Let what is in ``work`` take the place of what was written to the folder before; the folder is held.

    Args:
        folder: where the files are to stand.
        work: a part of it, with the new files.
        old: patterns of the names of what was written before, for a folder without a list of them.
        left_out: names in ``work`` of what is not to stand there; kept until the new files count.

    Raises:
        RunFailed: somebody else's files are in their place.
    """
    new, before = {path.name for path in work.iterdir()} - {*left_out}, _written(folder, old)
    if others := sorted(name for name in new - before if (folder / name).exists()):
        raise RunFailed(
            f"{folder} holds {', '.join(others)} of another origin, where files of that name are to be written; move "
            "that elsewhere and repeat the command."
        )
    lists = {"written": new, "replaced": before, "left_out": left_out}
    write_json(work / MANIFEST, {key: sorted(names) for key, names in lists.items()})
    _set_usual_modes(work)
    os.replace(work, folder / _FINISHED)
    _settle(folder)


def settle(folder: Path) -> None:
    """Do what a crash has left undone of a replacement, if there was one.

    Raises:
        UserError: another process has been at it for a minute.
        RunFailed: files cannot be moved.
    """
    if not ((folder / _FINISHED).is_dir() or (folder / _MOVING).is_dir()):
        return
    with locked(folder, timeout=60):
        try:
            _settle(folder)
        except OSError as error:
            raise RunFailed(f"New files in {folder} could not be moved to their place ({error}).") from error


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(part: Path) -> None:
    """Remove a part of a folder that is held; whenever the process ends, all of it is there or nothing of it."""
    aside = part.with_name(_WORK)
    remove(aside)  # of a process that was killed
    if part.exists():
        os.replace(part, aside)
        remove(aside)


def renew(part: Path, name: str, content: Any) -> None:
    """Let a part of a folder that is held contain one JSON file and nothing else.

    Whenever the process ends, the part is there as it was, or with the file, or not at all.
    """
    discard(part)
    aside = part.with_name(_WORK)
    write_json(aside / name, content)
    os.replace(aside, part)


def _set_usual_modes(folder: Path) -> None:
    """Give all in a folder the permissions that the umask leaves: safetensors and tempfile give the owner's alone."""
    mask = os.umask(0o077)  # there is no way to ask without setting it
    os.umask(mask)
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o777 if path.is_dir() else 0o666) & ~mask)


def _settle(folder: Path) -> None:
    finished, moving = folder / _FINISHED, folder / _MOVING
    if finished.is_dir():
        for name in _listed(finished, "left_out") or ():
            remove(finished / name)
        for name in _listed(finished, "replaced") or ():
            remove(folder / name)
        os.replace(finished, moving)
    if moving.is_dir():
        for path in list(moving.iterdir()):
            os.replace(path, folder / path.name)
        moving.rmdir()


def _written(folder: Path, old: Sequence[str]) -> set[str]:
    """Names of what this package wrote to the folder; by the patterns where there is no list."""
    listed = _listed(folder, "written")
    if listed is None:
        return {path.name for pattern in old for path in folder.glob(pattern)}
    return {name for name in listed if (folder / name).exists()}


def _listed(folder: Path, key: str) -> list[str] | None:
    """Names in a folder's list, without any that would lead out of the folder."""
    try:
        names = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [name for name in names if isinstance(name, str) and name == Path(name).name and name not in (".", "..")]


def _visible(folder: Path) -> list[str]:
    """What there is to be careful with: names that are not hidden, of anything but empty folders."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(p.name for p in paths if not p.name.startswith(".") and not (p.is_dir() and not any(p.iterdir())))


def _taken(folder: Path) -> UserError:
    return UserError(f"Another process is writing to {folder}; wait until it is done, or pass another `output_dir`.")
