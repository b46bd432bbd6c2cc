"""Processes that end by SIGKILL before their Nth operation on a file."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path

from sparsepeft_research.experiments.killing import before_changes


def killed_at(number: int, folder: Path, work: Callable[[], object]) -> bool:
    """Do ``work`` in a process of its own; whether it was killed before it was done.

    Args:
        number: of the operation that changes a file of the folder, from 0, before which it is.
    """
    child = os.fork()
    if child == 0:
        operations = count()
        before_changes(folder, lambda: next(operations) == number and os.kill(os.getpid(), signal.SIGKILL))
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False
