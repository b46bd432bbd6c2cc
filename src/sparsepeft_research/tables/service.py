"""Tables of the service: its load, its faults, its speed, and cases made from its description."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsepeft_research.markdown import paragraphs, table
from sparsepeft_research.results import Result, read_result

_COMMAND = "`python -m sparsepeft_research.experiments.service {} --data-dir DATA --model MODEL`"


def load(results: Path) -> str:
    """Twice its capacity, for each of the runs."""
    runs = [read_result(file) for file in sorted((results / "service").glob("load*.json"))]
    rows = []
    for run in runs:
        overload, memory = run.results["overload"], run.results["memory_mib"]
        latency, statuses = overload["latency_ms"], overload["statuses"]
        rows.append(
            [
                f"{overload['seconds']:.0f} s",
                f"{run.results['capacity']['answered_per_second']:.0f}",
                f"{overload['answered_per_second']:.0f}",
                str(statuses.get("200", 0)),
                str(statuses.get("429", 0)),
                str(sum(count for status, count in statuses.items() if status not in ("200", "429"))),
                *(f"{latency[name]:.0f}" for name in ("p50", "p95", "p99")),
                f"{run.results['health']['latency_ms']['p99']:.0f}",
                f"{memory['after_10_s']:.0f}, {memory['at_the_end']:.0f}",
            ]
        )
    header = ["run", "capacity a second", "answered a second", "200", "429", "others", "p50 ms", "p95 ms", "p99 ms"]
    first = runs[0]
    return paragraphs(
        f"{_model(first)}, float32, single sentences of SST-2 at {first.settings['factor']:g} times what "
        f"{first.settings['capacity_clients']} callers get, at most {first.settings['queue_size']} waiting, so that "
        f"the latency of those that are answered is mostly their wait; {_cores(first)}. `/health` is asked each "
        f"second; memory is that after ten seconds and at the end. By {_COMMAND.format('load')}.",
        table([*header, "/health p99 ms", "memory MiB"], rows),
    )


def speed(results: Path) -> str:
    """Beside the engine and a server with pipelines."""
    run = _read(results, "speed")
    figures, times = run.results, run.results["times"]

    def both(name: str) -> str:
        return " and ".join(f"{value:.2f}" for value in figures[name].values())

    kinds = {
        "the engine alone": ("engine, 32 texts at a time", "engine, every task", "engine, one text", "engine"),
        "the service": ("service, 32 callers", "service, every task", "service, one caller", "service"),
        "the service in bfloat16": (
            *("service in bfloat16, 32 callers", "service in bfloat16, every task"),
            *("service in bfloat16, one caller", "service in bfloat16"),
        ),
        "a pipeline for each task": (
            *("pipelines, 32 callers", "pipelines, every task", "pipelines, one caller", "pipelines"),
        ),
    }
    rows = [
        [
            name,
            *(f"{times[key]['texts'] / times[key]['seconds']:.1f}" for key in (single, every)),
            f"{1e3 * times[one]['seconds']:.1f}",
            f"{figures['memory_mib'][memory]:.0f}",
        ]
        for name, (single, every, one, memory) in kinds.items()
    ]
    return paragraphs(
        f"{_model(run)}, float32 but where it says bfloat16, {run.settings['callers']} callers with a "
        f"sentence of SST-2 each; {_cores(run)}; "
        f"medians of {run.settings['rounds']} alternating rounds. The pipelines' models are whole ones, as full "
        "fine-tuning leaves them. For every task a caller of the pipelines asks once for each. By "
        f"{_COMMAND.format('speed')}.",
        table(["", "texts a second, one task each", "texts a second, every task", "one text ms", "memory MiB"], rows),
        "Texts a second, with one task each and for every task: the service over the engine "
        f"{both('service_over_engine')}; over the pipelines {both('service_over_pipelines')} (batches, and what tasks "
        f"share), in bfloat16 {both('bfloat16_over_pipelines')} (that, and the precision). The pipelines take "
        f"{figures['pipelines_memory_over']['service']:.1f} times the service's memory, "
        f"{figures['pipelines_memory_over']['service in bfloat16']:.1f} times that of the one in bfloat16.",
    )


def faults(results: Path) -> str:
    """What went wrong, and whether what is documented came."""
    run = _read(results, "faults")
    figures = run.results
    swaps, stop, many, slow = (figures[name] for name in ("swaps", "SIGTERM", "many texts", "slow callers"))
    seconds = ", ".join(f"{each['closed_after_s']:.0f} s ({name})" for name, each in slow["connections"].items())
    wrong, left = figures["wrong requests"], figures["callers who leave"]
    rows = {
        "swaps": f"{run.settings['swaps']} swaps of a task while {run.settings['clients']} callers ask: "
        f"{swaps['load']['requests'] + swaps['right_after_a_swap']['asked']} answers, "
        f"{swaps['load']['wrong'] + swaps['right_after_a_swap']['wrong']} wrong, none failed",
        "SIGTERM": f"{stop['taken']} requests taken, {stop['answered']} answered",
        "slow callers": f"600 connections given up after {seconds}; others answered meanwhile",
        "callers who leave": f"{left['texts_left_behind']} texts left behind, not computed",
        "broken files": "garbage, half a file, an empty file: the former version answers; then a good one",
        "many texts": f"10,000 in a call: {many['as_a_batch']}; as a stream {many['as_a_stream']['lines']} lines in "
        f"{many['as_a_stream']['seconds']:.0f} s, one caller beside it waits "
        f"{many['beside']['latency_ms']['p99']:.0f} ms (p99)",
        "wrong requests": f"{len(wrong['cases'])} kinds, each with its documented status",
    }
    return paragraphs(
        f"{_model(run)}; {run.machine}. By {_COMMAND.format('faults')}.",
        table(
            ["", "what came", "as documented"],
            [[name, text, "yes" if figures[name]["as_promised"] else "**no**"] for name, text in rows.items()],
        ),
    )


def fuzz(results: Path) -> str:
    """Cases by Schemathesis."""
    run = _read(results, "fuzz")
    figures = run.results
    statuses = ", ".join(f"{count} of {status}" for status, count in figures["statuses"].items())
    failures = sum(failure["count"] for round_ in figures["rounds"] for failure in round_["failures"])
    return paragraphs(
        f"{figures['cases']} cases on {_model(run)}: {figures['server_errors']} of them 5xx, the longest "
        f"{figures['longest']['ms']:.0f} ms, {failures} answers that the description does not have. Statuses: "
        f"{statuses}. By {_COMMAND.format('fuzz')}."
    )


def _read(results: Path, name: str) -> Result:
    return read_result(results / "service" / f"{name}.json")


def _model(run: Result) -> str:
    settings: dict[str, Any] = run.settings
    return f"{settings['model']}, {settings['tasks']} SPARTAN tasks"


def _cores(run: Result) -> str:
    return f"the server has one core of an {run.environment['cpu']} and the callers another"
