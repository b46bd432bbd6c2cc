"""Tables of what grows: processes that share a training, tasks on one backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsepeft_research.markdown import paragraphs, table
from sparsepeft_research.results import read_folder

_STRATEGIES = ("ddp", "fsdp2")


def processes(results: Path) -> str:
    """How near two processes are to one, and what they send."""
    rows, machines = [], set()
    for report in read_folder(results / "processes").values():
        machines.add(report.machine)
        name = f"{report.settings['model']}, {report.settings.get('learning_rate', 1e-3):.0e}"
        rows += [_row(name, method, one) for method, one in report.results.items()]
    return paragraphs(
        "Twenty steps in two processes of a CPU (gloo) beside one, float32, without dropout, at a learning rate: the "
        "largest difference of a step's loss, the gradients that DDP sums in a step, and all bytes that a step sends "
        "over the loopback interface, for both processes together; a twentieth of the model is among them, as DDP "
        "sends it once, at the start. "
        f"{'; '.join(sorted(machines))}. By `python -m "
        "sparsepeft_research.experiments.processes`.",
        table(
            [
                *("", "trained parameters", "gradients (DDP)"),
                *(f"{name}: {what}" for name in ("DDP", "FSDP2") for what in ("difference", "sent")),
            ],
            rows,
        ),
    )


def many_tasks(results: Path) -> str:
    """What a task costs where there are many."""
    rows, machines = [], set()
    for report in read_folder(results / "many_tasks").values():
        machines.add(report.environment["cpu"])
        name, size = report.settings["model"], report.results["bytes"]
        rows += [
            [
                f"{name}, {one['tasks']:,}",
                _megabytes(size),
                "" if place == 0 else _megabytes(one["resident_bytes_per_task"]),  # the first passes' own memory
                f"{one['load_ms']:.0f}",
                f"{one['texts_per_second']:.0f}",
                f"{one['one_text_ms']:.0f}",
            ]
            for place, one in enumerate(report.results["numbers"])
        ]
    return paragraphs(
        "SPARTAN tasks of the recipe's size on one backbone, float32, one thread: bytes of a task's file, resident "
        "memory for each that is loaded after those of the line above, which first use what passes have freed, time to "
        "load one, texts a second in calls of 128 with as many tasks as there are, and a text alone. "
        f"{'; '.join(sorted(machines))}. By `python -m sparsepeft_research.experiments.many_tasks`.",
        table(["tasks", "file", "resident", "load (ms)", "texts a second", "one text (ms)"], rows),
    )


def _row(model: str, method: str, one: dict[str, Any]) -> list[str]:
    cells = [f"{model}, {method}", f"{one['trained_parameters']:,}", _megabytes(one["ddp"]["gradient_bytes_per_step"])]
    for strategy in _STRATEGIES:
        cells.append(f"{one[strategy]['largest_difference_of_losses']:.0e}")
        cells.append(_megabytes(one[strategy]["sent_bytes_per_step"]))
    return cells


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"
