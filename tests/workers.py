"""Killing a process of Ray's in the middle of a run."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def killed_worker(folder: Path) -> Iterator[None]:
    """While this lasts, the process that trains in a folder is killed once, after it has written a checkpoint."""
    killed: list[int] = []
    thread = threading.Thread(target=_kill, args=(folder, killed))
    thread.start()
    yield
    thread.join()
    assert len(killed) == 1


def _kill(folder: Path, killed: list[int]) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        has_checkpoint = list(folder.glob("unfinished/checkpoints/checkpoint-*/trainer_state.json"))
        if has_checkpoint and (process := _holder_of(folder / ".lock")) is not None:
            os.kill(process, signal.SIGKILL)
            killed.append(process)
            return
        time.sleep(0.02)


def _holder_of(lock: Path) -> int | None:
    """The process, but this one, that has a file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) == str(lock) and int(link.parts[2]) != os.getpid():
                return int(link.parts[2])
    return None
