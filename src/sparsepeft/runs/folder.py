"""Whether a run may start in a folder, and holding the folder until the run is finished."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparsepeft.errors import RunFailed, UserError
from sparsepeft.folders import (
    MANIFEST,
    UNFINISHED,
    check_output,
    discard,
    finish,
    locked,
    refuse_foreign,
    remove,
    renew,
    settle,
    write_json,
)
from sparsepeft.runs.config import RunConfig
from sparsepeft.runs.files import CHECKPOINTS, HISTORY, LOGS, RESULTS, RUN, WRITTEN, describe_run, read_run_file

_NOT_TRAINED = {"output_dir", "save_dtype", "device", "report_to"}  # of a config: decides nothing before the end
_KEPT = (RUN, CHECKPOINTS, HISTORY, LOGS)  # of an interrupted run, which goes on from it


def check_output_folder(folder: Path, overwrite: bool) -> None:
    """See that a run may start, or go on, in ``folder``, as far as can be told before its values are known.

    Args:
        overwrite: it may take the place of a finished run.

    Raises:
        UserError: the folder is a file, or holds a finished run or anything that is no run's.
        RunFailed: it cannot be written to.
    """
    names = (RUN, f"{UNFINISHED}/{RUN}")
    for name in names:
        if (folder / name).is_file() and not _is_ours(folder / name):
            refuse_foreign(folder)
    check_output(folder, names, "a finished run", overwrite)


def _is_ours(path: Path) -> bool:
    """Whether a file called ``run.json`` is a run's; a damaged one is where other files say so."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (path.parent / MANIFEST).exists() or (path.parent / CHECKPOINTS).exists()
    return isinstance(content, dict) and "config" in content


def has_checkpoint(folder: Path) -> bool:
    """Whether an interrupted run in ``folder`` has got as far as a checkpoint."""
    return any((folder / UNFINISHED / CHECKPOINTS).glob("checkpoint-*/trainer_state.json"))


def check_folder(folder: Path, run: dict[str, Any], overwrite: bool) -> bool:
    """See that a run may start, or go on, in ``folder``.

    Args:
        run: what is known of its ``run.json``.
        overwrite: it may take the place of another run.

    Returns:
        Whether the very same run was interrupted there and can go on.

    Raises:
        UserError: the folder is a file, or holds anything that is no run's, a finished run, or one that was interrupted
            after a checkpoint and has other values.
        RunFailed: it cannot be written to.
    """
    check_output_folder(folder, overwrite)
    if not (folder / UNFINISHED / RUN).exists():
        return False
    is_protected = has_checkpoint(folder) and not overwrite
    try:
        differing = _differing(read_run_file(folder / UNFINISHED / RUN), run)
    except UserError:
        if is_protected:
            raise
        return False
    if differing and is_protected:
        raise UserError(
            f"{folder} holds an unfinished run with other values of {', '.join(differing)}; repeat its command to "
            "resume it, pass another `output_dir`, or `overwrite` to start anew."
        )
    return not differing


@contextlib.contextmanager
def open_run(folder: Path, run: dict[str, Any], overwrite: bool) -> Iterator[Callable[[dict[str, Any]], Path]]:
    """Hold a run's folder, so that no other process starts there, until the run is finished.

    A run works in a part of its folder, whose files then take the place of a former run's. If the run is interrupted,
    what it has written stays there, to go on from.

    Args:
        run: what is known of its ``run.json`` before anything is loaded.
        overwrite: the run may take the place of another.

    Yields:
        What begins the work: takes the whole content of ``run.json``, and returns where to write.

    Raises:
        UserError: as for :func:`check_folder`, or another process is writing to the folder.
        RunFailed: files cannot be written or moved.
    """
    check_folder(folder, run, overwrite)
    work, has_begun = folder / UNFINISHED, False

    def begin(run: dict[str, Any]) -> Path:
        nonlocal has_begun
        goes_on, has_begun = check_folder(folder, run, overwrite), True
        if not goes_on:
            renew(work, RUN, run)
            return work
        for path in work.iterdir():
            if path.name not in _KEPT:
                remove(path)
        write_json(work / RUN, run)
        return work

    with locked(folder):
        try:
            yield begin
            finish(folder, work, _former(folder), left_out=(CHECKPOINTS,))
        except Exception as error:
            if has_begun and not has_checkpoint(folder):  # there is nothing to go on from
                discard(work)
            if has_begun and isinstance(error, OSError):
                raise RunFailed(
                    f"The run in {folder} could not be written ({error}); free space and resume."
                ) from error
            raise


def _former(folder: Path) -> tuple[str, ...]:
    """Names of what may be a former run's, for one that has no list of its files."""
    return WRITTEN if (folder / RUN).exists() else ()


def can_resume(folder: Path, config: RunConfig) -> bool:
    """Whether the very same run was interrupted in ``folder`` after a checkpoint."""
    return check_folder(folder, describe_run(config), overwrite=True) and (folder / UNFINISHED / CHECKPOINTS).exists()


def is_finished(folder: Path, run: dict[str, Any], overwrite: bool = False) -> bool:
    """Whether the very same run was finished in ``folder``.

    Args:
        run: what is known of its ``run.json``.
        overwrite: another run may be there, as it is to be replaced.

    Raises:
        UserError: the folder holds another finished run, or a damaged one.
    """
    settle(folder)
    if not (folder / RESULTS).is_file() or not (folder / RUN).is_file() or (folder / UNFINISHED / RUN).exists():
        return False
    try:
        before = read_run_file(folder / RUN)
    except UserError:
        if overwrite:
            return False
        raise
    differing = _differing(before, run)
    if before["config"].get("save_dtype") != run["config"].get("save_dtype"):
        differing.append("save_dtype")
    if differing and not overwrite:
        raise UserError(
            f"{folder} holds a finished run with other values of {', '.join(differing)}; pass another `output_dir`, or "
            "`overwrite` to replace it."
        )
    return not differing


def interrupted_values(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """What ``run.json`` holds of the very same run, interrupted in ``folder`` after a checkpoint; {} without one."""
    goes_on = check_folder(folder, run, overwrite=True) and has_checkpoint(folder)
    return read_run_file(folder / UNFINISHED / RUN) if goes_on else {}


def _differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of the values in which two runs would train differently; only what ``now`` has is compared."""
    now = json.loads(json.dumps(now))  # tuples are lists, as in the file
    names: set[str] = set()
    # Columns follow from config and data; older runs say nothing of their backbone.
    passed_over = {"format_version", "columns"} | ({"backbone_fingerprint"} - before.keys())
    for part, values in now.items():
        old = before.get(part)
        if isinstance(values, dict) and isinstance(old, dict):
            keys = {**old, **values}.keys() - _NOT_TRAINED
            different = {key for key in keys if old.get(key) != values.get(key)}
            names |= {f"{key} (its content)" for key in different} if part == "data_fingerprints" else different
        elif values != old and part not in passed_over:
            names.add(part)
    return sorted(names)
