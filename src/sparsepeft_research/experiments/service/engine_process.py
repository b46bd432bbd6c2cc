"""The engine without a service, in a process of its own, by the commands of ``benchmarks.inference.processes.serving``.

python -m sparsepeft_research.experiments.service.engine_process SETTINGS.json
"""

from __future__ import annotations

import os
from typing import Any

import torch

from sparsepeft.devices import keep_freed_memory
from sparsepeft.inference import MultiTaskEngine
from sparsepeft_research.benchmarks.inference.processes.serving import Pass, serve


def prepare(settings: dict[str, Any]) -> tuple[dict[str, Pass], dict[str, Any]]:
    """Passes: ``one`` text, the texts ``together`` (so many at a time), ``at once``, and ``every`` task for each."""
    os.sched_setaffinity(0, {settings["core"]})
    torch.set_num_threads(settings["threads"])
    keep_freed_memory()
    engine = MultiTaskEngine(settings["model"], settings["tasks"])
    requests = [tuple(request) for request in settings["requests"]]
    texts, size = settings["texts"], settings["together"]

    def one() -> None:
        engine.predict(requests[:1])

    def at_once() -> None:
        engine.predict(requests)

    def together() -> None:
        for start in range(0, len(requests), size):
            engine.predict(requests[start : start + size])

    def every() -> None:
        for start in range(0, len(texts), size):
            engine.predict_all(texts[start : start + size])

    return {"one": one, "together": together, "at once": at_once, "every": every}, {}


if __name__ == "__main__":
    serve(prepare)
