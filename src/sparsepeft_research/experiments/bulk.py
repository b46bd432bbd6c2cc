"""Rows a second and memory of `sparsepeft predict --input`, in this process and in Ray's workers.

    python -m sparsepeft_research.experiments.bulk speed memory

speed: one process, one of Ray's workers and two of them, one thread each, in turn. The rate is that of the last three
quarters of the chunks, without starting and loading. memory: the most that is resident at few rows and at very
many, sampled. Texts are the first words of the built-in sample's, each with a number of its own.

Results go to ``research/results/bulk/``, a file for each; what is there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from sparsepeft.bulk import BulkReport, RayOptions, score_files
from sparsepeft.devices import keep_freed_memory
from sparsepeft.extras import require
from sparsepeft.inference.answering import WINDOW
from sparsepeft.tasks import load_task
from sparsepeft_research.experiments import run_once
from sparsepeft_research.experiments.service.tasks import save_tasks
from sparsepeft_research.results import RESULTS, Result, describe_machine

KINDS: dict[str, int | None] = {"one process": None, "one worker": 1, "two workers": 2}  # workers of Ray
_HERE = "sparsepeft_research.experiments.bulk"
_WORDS, _SAMPLES_PER_S = 6, 4
_SKIPPED = 4  # of the chunks one in so many, at the start


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=("speed", "memory"), metavar="KIND", help="speed, memory")
    parser.add_argument("--model", help="the backbone: folder or hub id. [default: minilm]")
    parser.add_argument("--num-tasks", type=int, default=1)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--chunks", type=int, default=32, help=f"speed: of {WINDOW} rows")
    parser.add_argument("--repeats", type=int, default=3, help="speed: of each kind")
    parser.add_argument("--rows", nargs=2, type=int, default=[10_000, 1_000_000], help="memory: few and many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "bulk", help="folder of the results")
    options = parser.parse_args(arguments)
    require("ray.data", "ray", "This experiment")
    if "speed" in options.kinds:
        run_once(options.results / "speed.json", partial(_speed, options))
    for rows in options.rows if "memory" in options.kinds else ():
        for kind in ("one process", "two workers"):
            file = options.results / f"memory-{rows}-{kind.replace(' ', '-')}.json"
            run_once(file, partial(_memory, options, rows, kind))


def _speed(options: argparse.Namespace) -> dict[str, Any]:
    """The kinds in turn, each time another one first."""
    environment, names = describe_machine(options.seed), list(KINDS)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as work:
        settings = _prepare(options, Path(work), options.chunks * WINDOW)
        for number in range(options.repeats):
            place = number % len(names)
            for name in (*names[place:], *names[:place]):
                found[name].append(_measured(settings, name))
                print(f"{name}: {found[name][-1]['rows_per_second']} rows a second", flush=True)
    rates = {name: [one["rows_per_second"] for one in runs] for name, runs in found.items()}
    medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    results = {
        "rows_per_second": {name: {"median": medians[name], "runs": values} for name, values in rates.items()},
        "scaling": round(medians["two workers"] / (2 * medians["one worker"]), 3),
        "runs": found,
    }
    about = _about(options, options.chunks * WINDOW) | {"repeats": options.repeats}
    return Result("bulk-speed", about, results, environment, options.seed).to_dict()


def _memory(options: argparse.Namespace, rows: int, kind: str) -> dict[str, Any]:
    environment = describe_machine(options.seed)
    with tempfile.TemporaryDirectory() as work:
        results = _measured(_prepare(options, Path(work), rows), kind)
    return Result("bulk-memory", _about(options, rows) | {"kind": kind}, results, environment, options.seed).to_dict()


def _about(options: argparse.Namespace, rows: int) -> dict[str, Any]:
    model = Path(options.model).name if options.model else "minilm"
    return {"model": model, "tasks": options.num_tasks, "dtype": options.dtype, "rows": rows, "threads": 1}


def _prepare(options: argparse.Namespace, work: Path, rows: int) -> dict[str, Any]:
    """Write tasks and texts; returns the settings of a process that answers them."""
    folders = save_tasks(options.model, work, options.num_tasks, options.seed)
    topics = load_task("topics")
    texts = [" ".join(text.split()[:_WORDS]) for text in topics.train[topics.spec.text_columns[0]]]
    file, schema = work / "texts.parquet", pa.schema([("id", pa.int64()), ("text", pa.string())])
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, rows, 1 << 16):
            ids = range(start, min(rows, start + (1 << 16)))
            columns = [pa.array(ids), pa.array([f"{texts[number % len(texts)]} {number % 9973}" for number in ids])]
            writer.write_table(pa.table(columns, schema=schema))
    tasks = {name: str(folder) for name, folder in folders.items()}
    return {"file": str(file), "work": str(work), "tasks": tasks, "model": options.model, "dtype": options.dtype}


def _measured(settings: dict[str, Any], kind: str) -> dict[str, Any]:
    """Answer the texts in a process of its own, and watch its memory and that of those below it."""
    work = Path(settings["work"])
    with tempfile.TemporaryDirectory(dir=work) as out:
        about, result = Path(out) / "settings.json", Path(out) / "result.json"
        about.write_text(
            json.dumps(settings | {"out": f"{out}/answers", "workers": KINDS[kind], "result": str(result)})
        )
        command = [sys.executable, "-c", f"from {_HERE} import answer; answer()"]
        process = subprocess.Popen([*command, str(about)], env=os.environ | {"OMP_NUM_THREADS": "1"})
        peak = {"process": 0.0, "largest_worker": 0.0, "all": 0.0}
        while process.poll() is None:
            own, *below = _resident(process.pid)
            workers = [size for size, is_worker in below if is_worker]
            now = (own[0], max(workers, default=0.0), own[0] + sum(size for size, _ in below))
            peak = {name: max(value, one) for (name, value), one in zip(peak.items(), now, strict=True)}
            time.sleep(1 / _SAMPLES_PER_S)
        if process.returncode:
            raise RuntimeError(f"{kind} ended with {process.returncode}")
        return json.loads(result.read_text()) | {"peak_mib": {name: round(value, 1) for name, value in peak.items()}}


def _resident(pid: int) -> list[tuple[float, bool]]:
    """MiB that a process and each below it have of physical memory, and whether it is an actor of Ray's."""
    found = [(0.0, False)]
    try:
        process = psutil.Process(pid)
        found = [(process.memory_info().rss / 2**20, False)]
        for one in process.children(recursive=True):
            found.append((one.memory_info().rss / 2**20, "_Worker" in " ".join(one.cmdline())))
    except psutil.NoSuchProcess:  # it ended meanwhile
        pass
    return found


def answer() -> None:
    """Answer the texts of the settings in the file that the command line names, and write the rates."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    keep_freed_memory()
    chunks: list[tuple[float, int]] = []

    def note(report: BulkReport, share: float) -> None:
        chunks.append((time.perf_counter(), report.rows))

    report = score_files(
        settings["file"],
        settings["out"],
        settings["tasks"],
        model=settings["model"],
        dtype=settings["dtype"],
        threads=1,
        ray=None if settings["workers"] is None else RayOptions(workers=settings["workers"]),
        progress=note,
    )
    # The first chunks wait for loading, and those of a worker that has loaded sooner for these, as they come in order.
    first = min(max(len(chunks) // _SKIPPED, settings["workers"] or 1), len(chunks)) - 1
    seconds, rows = (after - before for before, after in zip(chunks[first], chunks[-1], strict=True))
    rates = {"rows_per_second": round(rows / seconds, 1) if seconds else 0.0, "with_start": report.to_dict()}
    Path(settings["result"]).write_text(json.dumps(rates))


if __name__ == "__main__":
    main()
