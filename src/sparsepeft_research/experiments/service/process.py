"""A server as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import psutil

HOST = "127.0.0.1"
SERVER_CORE, CLIENT_CORE = 0, 1
_START_S, _STOP_S = 300, 120


class Server:
    """A server that is started, answers, and is stopped; on a processor of its own if asked.

    Args:
        module: of Python, and its arguments; the port comes last.
        log: where its output goes.
        core: the processor it may use, with one thread; None: as it likes.

    Raises:
        RuntimeError: it ended before it answered.
    """

    def __init__(self, module: list[str], log: Path, core: int | None = None) -> None:
        self.log, self.port = log, _free_port()
        one_thread = {} if core is None else {"OMP_NUM_THREADS": "1"}
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *module, str(self.port)],
                stdout=errors,
                stderr=errors,
                env=os.environ | one_thread,
                preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
            )
        self.address = f"http://{HOST}:{self.port}"
        self._wait_until_it_listens()

    @property
    def memory_mib(self) -> float:
        """What it holds of physical memory."""
        return float(psutil.Process(self.process.pid).memory_info().rss / 2**20)

    @property
    def log_lines(self) -> list[str]:
        """What it said."""
        return self.log.read_text(errors="replace").splitlines()

    @property
    def requests(self) -> list[dict[str, Any]]:
        """Those that a service logged: method, path, status and ms."""
        return [json.loads(line[start:]) for line in self.log_lines if (start := line.find('{"method"')) >= 0]

    def stop(self) -> int:
        """Ask it to end, and wait; returns its code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _wait_until_it_listens(self) -> None:
        until = time.monotonic() + _START_S
        while time.monotonic() < until and self.process.poll() is None:
            try:
                socket.create_connection((HOST, self.port)).close()
                return
            except ConnectionRefusedError:
                time.sleep(0.05)
        self.stop()
        last = (self.log_lines or ["nothing"])[-1]
        raise RuntimeError(f"the server did not start and said last: {last}")


def service(model: str | None, tasks: dict[str, Path], log: Path, *more: Any, core: int | None = None) -> Server:
    """``sparsepeft serve`` on a free port, with an option for each of ``more``."""
    arguments = ["sparsepeft_cli", "serve", *(() if model is None else ("--model", model))]
    for name, folder in tasks.items():
        arguments += ["--task", f"{name}={folder}"]
    if core is not None:
        arguments += ["--threads", "1"]
    return Server([*arguments, *map(str, more), "--port"], log, core)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


def as_client() -> None:
    """Keep this process off the server's processor."""
    os.sched_setaffinity(0, {CLIENT_CORE})
