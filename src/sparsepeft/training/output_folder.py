"""Where the files of a run are, and whether a run may start there: told without loading anything."""

from __future__ import annotations

from pathlib import Path

from sparsepeft.folders import UNFINISHED, check_output

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
    check_output(folder, (RUN, f"{UNFINISHED}/{RUN}"), "a finished run", overwrite)


def has_checkpoint(folder: Path) -> bool:
    """Whether an interrupted run in ``folder`` has got as far as a checkpoint."""
    return any((folder / UNFINISHED / CHECKPOINTS).glob("checkpoint-*/trainer_state.json"))
