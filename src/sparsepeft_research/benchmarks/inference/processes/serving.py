"""The loop of a measured process. Imports nothing of this package nor torch, which some of them do without.

Says a line of JSON when it is ready. Then each line is answered: ``pass NAME`` by the milliseconds of that pass, ``warm
NAME`` by those of its second pass of two, ``peak`` by the most bytes the process has had in memory.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from safetensors import safe_open

Pass = Callable[[], object]


def serve(prepare: Callable[[dict[str, Any]], tuple[Mapping[str, Pass], dict[str, Any]]]) -> None:
    """Prepare what the settings (a JSON file, the program's argument) ask for, and run its passes on command.

    Args:
        prepare: settings to passes by name, and what to say of them. A pass returns the logits of its batches, or
            nothing where it checks its answers itself.

    Raises:
        RuntimeError: a pass gave logits that are not finite, so its speed would mean nothing.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # nobody else writes between the answers
    settings = json.loads(Path(sys.argv[1]).read_text())
    passes, about = prepare(settings)
    _say(answers, about)
    for line in sys.stdin:
        command, _, name = line.rstrip("\n").partition(" ")
        if command == "peak":
            _say(answers, {"peak_bytes": peak_resident_bytes()})
            continue
        if command == "warm":
            passes[name]()
        start = time.perf_counter()
        result = passes[name]()
        milliseconds = 1e3 * (time.perf_counter() - start)
        if isinstance(result, Sequence) and not all(math.isfinite(logits.sum()) for logits in result):
            raise RuntimeError(f"{name} gave logits that are not finite, so a speed would mean nothing")
        _say(answers, {"ms": milliseconds})


def load_batches(path: str, framework: str = "pt") -> list[dict[str, Any]]:
    """Read padded batches: tensors, or arrays with the framework ``"np"``, (B, T) by the names of a model's inputs."""
    batches: dict[int, dict[str, Any]] = {}
    with safe_open(path, framework) as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            number, _, key = name.partition(".")
            batches.setdefault(int(number), {})[key] = file.get_tensor(name)
    return [batches[number] for number in sorted(batches)]


def resident_bytes() -> int:
    """Of this process, after what is unreachable was freed."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int:
    """The most physical memory this process has had: weights, activations, libraries, and what loading took."""
    try:
        # Not getrusage: its figure is inherited from the process that started this one.
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        match = None
    if match:
        return 1024 * int(match[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _say(answers: TextIO, content: dict[str, Any]) -> None:
    print(json.dumps(content), file=answers, flush=True)
