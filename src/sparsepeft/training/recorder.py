"""Writing the history of a run while it trains."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sparsepeft.folders import write_bytes
from sparsepeft.runs.history import read_lines

_NOT_KEPT = ("runtime", "_per_second", "flos", "train_loss", "epoch")  # ends of names: timings, and sums over a run


class Recorder(TrainerCallback):
    """Appends each of the trainer's logs to a file, one JSON object a line.

    A line has ``step``, ``epoch`` and ``seconds`` (since the start, pauses left out), and by the trainer's names what
    was logged: ``loss``, ``learning_rate`` and ``grad_norm``, or ``eval_loss`` and the metrics. A resumed run drops
    the lines after its checkpoint and goes on.

    Args:
        path: of the file, whose folder exists.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what belongs to the steps that are done."""
        kept = (
            [line for line in read_lines(self._path) if line["step"] <= state.global_step] if state.global_step else []
        )
        write_bytes(self._path, "".join(map(_line, kept)).encode())
        self._start = time.monotonic() - (kept[-1]["seconds"] if kept else 0.0)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Write a line."""
        values = {key: _finite(value) for key, value in (logs or {}).items() if not key.endswith(_NOT_KEPT)}
        if not values:
            return
        seconds = round(time.monotonic() - self._start, 1)
        epoch = None if state.epoch is None else round(state.epoch, 4)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line({"step": state.global_step, "epoch": epoch, "seconds": seconds, **values}))


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The value; None for what JSON has no number for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
