"""Where the files of a run are, and whether a run may start there: told without loading anything."""

from __future__ import annotations

import json
from pathlib import Path

from sparsepeft.folders import MANIFEST, UNFINISHED, check_output, refuse_foreign

RUN, RESULTS, HISTORY = "run.json", "results.json", "history.jsonl"
CHECKPOINTS, LOGS = "checkpoints", "logs"


def check_output_folder(folder: Path, overwrite: bool) -> None:
    """See that a run may start, or go on, in ``folder``, as far as can be told before its values are known.

    Args:
        folder: of the run.
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
