"""Candidates that need a process of their own: told by lines, answering by lines of JSON."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Self

_FAREWELL_S = 5.0


class Worker:
    """A process that says when it is ready and then does what each line tells it.

    Args:
        program: what to start, with a file of its settings as the last argument.
        settings: its own, written to that file; ``threads`` among them.
        file: that file; what the process says besides goes to one beside it.

    Attributes:
        ready: its first line.

    Raises:
        RuntimeError: it died before it was ready.
    """

    def __init__(self, program: list[str], settings: dict[str, Any], file: Path) -> None:
        self.log = file.with_suffix(".log")
        file.write_text(json.dumps(settings))
        with self.log.open("w") as errors:
            self._process = subprocess.Popen(
                [*program, str(file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(settings["threads"])},
            )
        self.ready = self._answer()

    def ask(self, line: str | int) -> dict[str, Any]:
        """Send a line and return the answer.

        Raises:
            RuntimeError: the process died; the message has the end of what it said.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died since; there is no answer, which says so
        return self._answer()

    def close(self) -> None:
        """End the process: its input ends, and it is killed if it goes on."""
        try:
            self._process.communicate(timeout=_FAREWELL_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            last = (self.log.read_text().strip().splitlines() or ["nothing"])[-1]
            raise RuntimeError(f"the process ended with code {self._process.returncode} and said last: {last}")
        answer: dict[str, Any] = json.loads(line)
        return answer
