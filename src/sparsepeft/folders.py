"""Replacing what stands in a folder as a whole, so that a crash at any point leaves the old files or the new ones.

The new files are made in a part of the folder, ``unfinished``. When all are there, that part is renamed to
``.finished``, and from then on they are what the folder holds: the old files are removed, the part is renamed to
``.moving``, and its files are moved up. :func:`settle` does what a crash has left undone of that.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from sparsepeft.errors import RunFailed, UserError

UNFINISHED = "unfinished"
_FINISHED, _MOVING, _LOCK = ".finished", ".moving", ".lock"


@contextlib.contextmanager
def locked(folder: Path, timeout: float = 1.0) -> Iterator[None]:
    """Hold a folder, which is made if there is none, against other processes that would write to it.

    Args:
        folder: removed again where it was made here and stayed empty.
        timeout: seconds to wait for another holder.

    Raises:
        UserError: another process holds it.
        RunFailed: it cannot be written to.
    """
    is_new = not folder.exists()
    lock = FileLock(folder / _LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=timeout)
    except Timeout as error:
        raise UserError(
            f"Another process is writing to {folder}; wait until it is done, or pass another --output-dir."
        ) from error
    except OSError as error:
        raise RunFailed(f"{folder} cannot be written to ({error}); pass another --output-dir.") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / _LOCK).unlink()  # before the release, or it could be the next holder's
        lock.release()
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


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
def replacing(folder: Path, old: Sequence[str]) -> Iterator[Path]:
    """A new folder whose files take the place of the old ones when all went well; else those stay.

    Args:
        folder: where the files are to stand.
        old: patterns of the names of what they replace; what else there is stays.

    Raises:
        UserError: another process is writing to the folder.
        RunFailed: files cannot be written.
    """
    with locked(folder):
        work = folder / UNFINISHED
        try:
            _settle(folder, old)
            remove(work)  # of a process that was killed
            work.mkdir()
            yield work
            finish(folder, old)
        except OSError as error:
            raise RunFailed(f"The files could not be written to {folder} ({error}); free space, try again.") from error
        finally:
            remove(work)


def finish(folder: Path, old: Sequence[str]) -> None:
    """Let the files in the folder's ``unfinished`` part take the place of the old ones; the folder is held."""
    _set_usual_modes(folder / UNFINISHED)
    os.replace(folder / UNFINISHED, folder / _FINISHED)
    _settle(folder, old)


def settle(folder: Path, old: Sequence[str]) -> None:
    """Do what a crash has left undone of a replacement, if there was one.

    Raises:
        UserError: another process has been at it for a minute.
        RunFailed: files cannot be moved.
    """
    if not ((folder / _FINISHED).is_dir() or (folder / _MOVING).is_dir()):
        return
    with locked(folder, timeout=60):
        try:
            _settle(folder, old)
        except OSError as error:
            raise RunFailed(f"New files in {folder} could not be moved to their place ({error}).") from error


def is_free(folder: Path) -> bool:
    """Whether there is no such folder, or nothing in it but what a killed process left here."""
    return not folder.is_dir() or not {path.name for path in folder.iterdir()} - {UNFINISHED, _LOCK}


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _set_usual_modes(folder: Path) -> None:
    """Give all in a folder the permissions that the umask leaves: safetensors and tempfile give the owner's alone."""
    mask = os.umask(0o077)  # there is no way to ask without setting it
    os.umask(mask)
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o777 if path.is_dir() else 0o666) & ~mask)


def _settle(folder: Path, old: Sequence[str]) -> None:
    finished, moving = folder / _FINISHED, folder / _MOVING
    if finished.is_dir():
        own = (finished, moving, folder / UNFINISHED, folder / _LOCK)
        for path in {path for pattern in old for path in folder.glob(pattern)}.difference(own):
            remove(path)
        os.replace(finished, moving)
    if moving.is_dir():
        for path in list(moving.iterdir()):
            os.replace(path, folder / path.name)
        moving.rmdir()
