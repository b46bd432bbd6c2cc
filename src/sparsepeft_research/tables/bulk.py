"""Tables of bulk scoring: its speed by workers, its memory by rows."""

from __future__ import annotations

from pathlib import Path

from sparsepeft_research.markdown import paragraphs, table
from sparsepeft_research.results import read_folder, read_result

_COMMAND = "By `python -m sparsepeft_research.experiments.bulk {}`."


def speed(results: Path) -> str:
    """Rows a second of one process, and of one and two of Ray's workers."""
    file = results / "bulk" / "speed.json"
    if not file.is_file():
        return "Not measured yet."
    run = read_result(file)
    settings, rates = run.settings, run.results["rows_per_second"]
    rows = [
        [name, f"{one['median']:,.0f}", ", ".join(f"{value:,.0f}" for value in sorted(one["runs"]))]
        for name, one in rates.items()
    ]
    return paragraphs(
        f"{settings['rows']:,} short texts, {settings['tasks']} task(s) on {settings['model']} in {settings['dtype']}, "
        f"one thread for each process or worker, medians of {settings['repeats']} alternating runs; "
        f"{run.environment['cpu']}, {run.environment['logical_cpus']} cores. {_COMMAND.format('speed')}",
        table(["", "rows a second", "runs"], rows),
        f"Two workers answer {2 * run.results['scaling']:.2f} times the rows of one.",
    )


def memory(results: Path) -> str:
    """The most that was resident, at few rows and at many."""
    runs = read_folder(results / "bulk", "memory-*.json")
    if not runs:
        return "Not measured yet."
    ordered = sorted(runs.values(), key=lambda run: (run.settings["kind"], run.settings["rows"]))
    rows = [
        [
            f"{run.settings['kind']}, {run.settings['rows']:,} rows",
            *(f"{run.results['peak_mib'][name]:,.0f}" for name in ("process", "largest_worker", "all")),
        ]
        for run in ordered
    ]
    return paragraphs(
        "MiB of physical memory, the most of samples: of the process that reads and writes, of the largest worker, and "
        "of all processes together, in which shared pages count more than once. "
        f"{ordered[0].environment['cpu']}. {_COMMAND.format('memory')}",
        table(["", "process", "worker", "all"], rows),
    )
