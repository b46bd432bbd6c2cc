"""A command of sparsepeft in a process of its own that SIGKILL ends at a moment drawn beforehand.

The process is forked from one that has imported everything, since that takes longer than the short runs here.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from sparsepeft.folders import UNFINISHED
from sparsepeft.runs.files import CHECKPOINTS, HELD_OUT, HISTORY, LOGS, RUN

CACHE = "frozen_layers.bin"
CACHING, CHECKPOINT, END, OPERATION, TIME = "caching", "checkpoint", "end", "operation", "time"
_POLL_S = 0.015
_DELAYS_S = {CACHING: 1.0, CHECKPOINT: 0.05, END: 0.05}  # at most, after a file has appeared
_FROM_THE_START = (RUN, HELD_OUT, HISTORY, LOGS)
_CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.chmod", "os.truncate"}


@dataclass(frozen=True)
class Moment:
    """When a process is killed.

    Attributes:
        kind: ``"operation"``, before the process does something to a file of the folder; ``"time"``; or the phase in
            which a file appears.
        number: of the operation, or of the file among those of its phase, from 1; what a former process left counts.
        delay_s: after the file has appeared, or after the start.
    """

    kind: str
    number: int = 0
    delay_s: float = 0.0


@dataclass(frozen=True)
class Course:
    """What became of a process.

    Attributes:
        code: its exit code, -9 if it was killed.
        seconds: that it lived.
        operations: on files of the folder.
        appeared: how many files, by phase.
        said: what it printed.
    """

    code: int
    seconds: float
    operations: int
    appeared: dict[str, int]
    said: str

    @property
    def was_killed(self) -> bool:
        """Whether the moment came before its end."""
        return self.code == -signal.SIGKILL


def draw(random: Random, kind: str, whole: Course) -> Moment:
    """A moment of a kind in a process that would take a course such as ``whole``."""
    if kind == TIME:
        return Moment(kind, delay_s=random.uniform(0, whole.seconds))
    if kind == OPERATION:
        return Moment(kind, random.randint(1, whole.operations))
    return Moment(kind, random.randint(1, whole.appeared[kind]), random.uniform(0, _DELAYS_S[kind]))


def run(arguments: list[str], folder: Path, log: Path, moment: Moment | None = None) -> Course:
    """Run a command of sparsepeft, to its end or to a moment.

    Args:
        folder: that the command writes to.
        log: gets what the command prints.
        moment: None lets it end.
    """
    context: Any = multiprocessing.get_context("fork")
    count, start = context.Value("i", 0), time.monotonic()
    last = moment.number if moment is not None and moment.kind == OPERATION else None
    process = context.Process(target=_command, args=(arguments, folder, log, count, last))
    process.start()
    seen: set[tuple[str, ...]] = set()
    if moment is not None and moment.kind in (OPERATION, TIME):
        process.join(moment.delay_s if moment.kind == TIME else None)
    else:
        while process.is_alive() and (moment is None or _by_phase(seen)[moment.kind] < moment.number):
            seen |= _files(folder)
            time.sleep(_POLL_S)
        time.sleep(0.0 if moment is None else moment.delay_s)
    process.kill()  # if it has not ended
    process.join()
    said = log.read_text(errors="replace")
    return Course(process.exitcode, round(time.monotonic() - start, 2), count.value, _by_phase(seen), said)


def before_changes(folder: Path, act: Callable[[], object]) -> None:
    """From now on, call ``act`` before each operation of this process that changes a file of a folder."""
    inside = os.fspath(folder.absolute())

    def hook(event: str, values: tuple[Any, ...]) -> None:
        if _changes_a_file(event, values, inside):
            act()

    sys.addaudithook(hook)


def has_trained(folder: Path) -> bool:
    """Whether a run that is not finished has got beyond its last step: files of its result are there."""
    return _by_phase(_files(folder))[END] > 0 and (folder / UNFINISHED).exists()


def _command(arguments: list[str], folder: Path, log: Path, count: Any, last: int | None) -> None:
    with log.open("w") as stream:
        for standard in (1, 2):
            os.dup2(stream.fileno(), standard)

    def count_and_die() -> None:
        count.value += 1
        if count.value == last:
            os.kill(os.getpid(), signal.SIGKILL)

    before_changes(folder, count_and_die)
    sys.argv = ["sparsepeft", *arguments]
    try:
        runpy.run_module("sparsepeft_cli", run_name="__main__")
    finally:
        log.with_suffix(".modules").write_text("\n".join(sys.modules))


def import_all(log: Path) -> None:
    """Import what a command has imported, so that those which are forked from now on need not."""
    modules = log.with_suffix(".modules")
    for name in modules.read_text().splitlines() if modules.exists() else ():
        with contextlib.suppress(Exception):  # of optional packages, and names that stand for no module
            importlib.import_module(name)


def _changes_a_file(event: str, values: tuple[Any, ...], folder: str) -> bool:
    if event == "open":
        path, _, flags = values
        is_change = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    else:
        path, is_change = values[0] if values else None, event in _CHANGES
    if not is_change or not isinstance(path, str | os.PathLike):
        return False
    is_within = os.path.abspath(path).startswith(folder)
    # What shutil.rmtree removes has a name beside a descriptor of the folder that it is in.
    return is_within or (event in ("os.remove", "os.rmdir") and not os.path.isabs(path) and values[-1] != -1)


def _files(folder: Path) -> set[tuple[str, ...]]:
    return {Path(root, name).relative_to(folder).parts for root, _, names in os.walk(folder) for name in names}


def _by_phase(seen: set[tuple[str, ...]]) -> dict[str, int]:
    return {CACHING: 0, CHECKPOINT: 0, END: 0} | Counter(phase for parts in seen if (phase := _phase(parts)))


def _phase(parts: tuple[str, ...]) -> str | None:
    """Of the appearance of a file, by its path in the folder."""
    if parts[0] != UNFINISHED:
        return END if parts[0] in (".finished", ".moving") else None
    if parts[1] == CHECKPOINTS:
        return CACHING if parts[2] == CACHE else CHECKPOINT
    return None if parts[1].lstrip(".").startswith(_FROM_THE_START) else END
