"""Ctrl-C and SIGTERM: a run that trains saves a checkpoint first, and every command says what is left."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

_WORDS = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Terminated"}
_WAIT = b"\nStopping after this step, with a checkpoint; once more stops at once.\n"


class Stop(KeyboardInterrupt):
    """A signal that ends the program.

    Attributes:
        number: of the signal.
        left: what is left of the command's work, as the end of a sentence; None where there is nothing to say.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.number = number
        self.left: str | None = None

    def __str__(self) -> str:
        word = _WORDS.get(signal.Signals(self.number), "Stopped")
        return f"{word} {self.left}" if self.left else f"{word}."


class Stopped(Exception):
    """Takes a stop out of typer, which would end the program without a word."""

    def __init__(self, stop: KeyboardInterrupt) -> None:
        super().__init__()
        self.stop = stop if isinstance(stop, Stop) else Stop()


@contextlib.contextmanager
def handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Let ``handler`` have both signals, but those that are ignored, as in the background of a script."""
    former: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        former = {number: signal.getsignal(number) for number in _WORDS}
    changed = [number for number, old in former.items() if old not in (None, signal.SIG_IGN)]
    for number in changed:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, former[number])


def stop_at_once(number: int, frame: Any) -> None:
    """Handle a signal by raising :class:`Stop`."""
    raise Stop(number)


def stop_after_step(stopper: Any) -> Callable[[int, Any], None]:
    """A handler that has a run stop after its step where it is at one, by a ``StopAfterStep``."""

    def handle(number: int, frame: Any) -> None:
        stop = Stop(number)
        if not stopper.ask(stop):
            raise stop
        os.write(2, _WAIT)  # not through a console, whose lock this may have interrupted

    return handle
