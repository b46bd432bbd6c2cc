"""Processes that end by SIGKILL before their Nth operation on a file."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

_CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.chmod"}


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Do ``work`` in a process of its own; whether it was killed before it was done.

    Args:
        number: of the operation that changes a file, from 0, before which it is.
    """
    child = os.fork()
    if child == 0:
        _die_at(number)
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


def _die_at(number: int) -> None:
    left = number

    def before(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in _CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(before)
