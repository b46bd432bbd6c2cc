"""What a task costs where there are many on one backbone: bytes, loading, memory, and answers from mixed batches.

    python -m sparsepeft_research.experiments.many_tasks [--model MODEL] [--numbers 1 10 100 1000]

A SPARTAN task of the recipe's size is made and loaded under as many names. With each number of tasks there, texts of
the built-in sample are answered, every text by a task of its own as far as there are enough. One thread. The result is
``research/results/many_tasks/MODEL.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from sparsepeft.backbones import describe_backbone, resolve_model
from sparsepeft.devices import keep_freed_memory
from sparsepeft.inference import MultiTaskEngine
from sparsepeft.tasks import load_task
from sparsepeft.training import RunConfig, train
from sparsepeft_research.benchmarks.inference.processes.serving import resident_bytes
from sparsepeft_research.results import RESULTS, Result, describe_machine, write_result

_REPEATS = 5


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a hub id or a folder; MiniLM by default")
    parser.add_argument("--numbers", nargs="+", type=int, default=[1, 10, 100, 1000])
    parser.add_argument("--num-texts", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    environment = describe_machine(seed=0)
    model = resolve_model(options.model)
    with tempfile.TemporaryDirectory() as folder:
        run = train(RunConfig("topics", folder, model=options.model, max_steps=1, max_train_samples=32))
        numbers = measure(model, folder, options.numbers, options.num_texts)
    settings = vars(options) | {"model": describe_backbone(model), "adapter": run["formula"], "dtype": "float32"}
    results = {"bytes": run["saved_bytes"], "model_bytes": run["model_bytes"], "numbers": numbers}
    name = Path(options.model).name if options.model else "all-MiniLM-L6-v2"
    write_result(RESULTS / "many_tasks" / f"{name}.json", Result("many_tasks", settings, results, environment, seed=0))
    print(json.dumps(results, indent=2))


def measure(model: str, folder: str, numbers: list[int], num_texts: int) -> list[dict[str, Any]]:
    """Figures for each number of tasks, by a single engine that gets more and more.

    Args:
        model: the backbone.
        folder: of the task.
        numbers: of tasks, rising.
        num_texts: in a call.
    """
    data = load_task("topics").train["text"]
    texts = [data[index % len(data)] for index in range(num_texts)]
    engine = MultiTaskEngine(model, tasks={})
    figures: list[dict[str, Any]] = []
    for number in numbers:
        seconds, before, others = [], resident_bytes(), len(engine.tasks)
        for index in range(len(engine.tasks), number):
            start = time.perf_counter()
            engine.add(f"task{index}", folder)
            seconds.append(time.perf_counter() - start)
        resident = round((resident_bytes() - before) / (number - others))
        mixed = [(f"task{index * number // num_texts % number}", text) for index, text in enumerate(texts)]
        figures.append(
            {
                "tasks": number,
                "load_ms": round(1000 * statistics.median(seconds), 2),
                "resident_bytes_per_task": resident,
                "texts_per_second": round(num_texts / _median(engine, mixed), 1),
                "one_text_ms": round(1000 * _median(engine, mixed[:1]), 2),
            }
        )
    return figures


def _median(engine: MultiTaskEngine, requests: list[tuple[str, str]]) -> float:
    """Seconds of a call, the median of several after one to warm up."""
    seconds = []
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        engine.predict(requests)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
