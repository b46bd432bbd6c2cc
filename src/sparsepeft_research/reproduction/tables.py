"""One of the paper's tables from the results of a matrix."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsepeft.backbones import resolve_model
from sparsepeft.errors import UserError, unknown_name
from sparsepeft.storage.counting import load_config
from sparsepeft_research.reproduction import paper
from sparsepeft_research.reproduction.matrix import Run
from sparsepeft_research.reproduction.notes import notes_on
from sparsepeft_research.reproduction.paper import MISMATCHED, PaperRow, is_roberta_base, paper_rows
from sparsepeft_research.reproduction.results import find_result, is_timed

PROTOCOLS = {"table1": "full-data", "table2": "few-shot", "table3": "few-shot"}
TITLES = {
    "table1": "Table 1: storage, device throughput and scores, trained on all data",
    "table2": "Table 2: storage, fine-tuning throughput and mean score, trained on a few examples",
    "table3": "Table 3: storage, fine-tuning throughput and scores, trained on a few examples",
}
MRPC_ACCURACY = "mrpc-accuracy"  # what the paper reports; the column "mrpc" is GLUE's mean of accuracy and F1


@dataclass(frozen=True)
class Score:
    """A mean over seeds, x 100; ``std`` is the sample's standard deviation, None with fewer than two."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class Row:
    """What one method reached.

    Attributes:
        method: its name.
        scores: by column: a task, ``"mnli-mm"`` or ``"mrpc-accuracy"``.
        average: over the tasks that all methods have; its deviation is over the seeds that have all of these.
        average_as_paper: the same with MRPC's accuracy in the place of accuracy and F1.
        parameters: trained, by task, the head among them.
        saved_bytes: of the weight files written, by task.
        storage: bytes of the common tasks' files and one backbone (full fine-tuning: of the files) over a backbone's.
        steps_per_minute: of training, over the common tasks; None if no run was timed (see ``results.is_timed``).
    """

    method: str
    scores: dict[str, Score]
    average: Score | None
    average_as_paper: Score | None
    parameters: dict[str, int]
    saved_bytes: dict[str, int]
    storage: float | None
    steps_per_minute: float | None


@dataclass(frozen=True)
class Table:
    """A table's content.

    Attributes:
        name: ``"table1"``, ``"table2"`` or ``"table3"``.
        title: one line.
        model: the backbone.
        tasks: with a result, in the paper's order.
        common_tasks: those that every method shown has.
        rows: methods with a result.
        devices: inputs per minute at inference, by emulated device, then by method (table 1).
        paper: the paper's row by method; empty unless the backbone is the paper's.
        chosen: what a grid search chose, by "task method".
        notes: all in which these results are not the paper's whole protocol.
    """

    name: str
    title: str
    model: str
    tasks: tuple[str, ...]
    common_tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    devices: dict[str, dict[str, float]]
    paper: dict[str, PaperRow]
    chosen: dict[str, dict[str, Any]]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return dataclasses.asdict(self)


def make_table(
    name: str,
    runs: Sequence[Run],
    chosen: Mapping[tuple[str, str], dict[str, Any] | None] | None = None,
    devices: Mapping[str, dict[str, float]] | None = None,
) -> Table:
    """Compute a table from the results that are there.

    Args:
        name: ``"table1"``, ``"table2"`` or ``"table3"``.
        runs: the matrix; those without a result that counts are named in a note.
        chosen: what a grid search chose for each task and method, None where it is not decided; None without a search.
        devices: inputs per minute by device, then by method; None if nothing was measured.

    Raises:
        UserError: there is no such table.
    """
    if name not in PROTOCOLS:
        raise UserError(unknown_name("table", name, PROTOCOLS))
    finished = [(run, result) for run in runs if (result := find_result(run).result) is not None]
    results = _by_method(finished)
    tasks = sorted(
        {task for by_task in results.values() for task in by_task}, key=_place(paper.TASKS, finished, "task")
    )
    common = tuple(task for task in tasks if all(task in by_task for by_task in results.values()))
    is_paper = bool(runs) and is_roberta_base(load_config(resolve_model(runs[0].config.model)))
    undecided = None if chosen is None else [" ".join(pair) for pair, values in chosen.items() if values is None]
    printed = paper_rows(PROTOCOLS[name]) if is_paper else {}
    return Table(
        name=name,
        title=TITLES[name],
        model=runs[0].model if runs else "",
        tasks=tuple(tasks),
        common_tasks=common,
        rows=tuple(_row(method, by_task, common) for method, by_task in results.items()),
        devices=dict(devices or {}),
        paper={method: printed[method] for method in results if method in printed},
        chosen={" ".join(pair): dict(values) for pair, values in (chosen or {}).items() if values is not None},
        notes=tuple(notes_on(name, runs, finished, is_paper, undecided, bool(devices))),
    )


def _by_method(finished: Sequence[tuple[Run, dict[str, Any]]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Results of all seeds by method and task, both in the paper's order, then in the matrix's."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    by_task = sorted(finished, key=lambda pair: _place(paper.TASKS, finished, "task")(pair[0].config.task))
    for run, result in sorted(
        by_task, key=lambda pair: _place(paper.METHODS, finished, "method")(pair[0].config.method)
    ):
        groups.setdefault(run.config.method, {}).setdefault(run.config.task, []).append(result)
    return groups


def _place(first: Sequence[str], finished: Sequence[tuple[Run, dict[str, Any]]], name: str) -> Callable[[str], int]:
    return list(dict.fromkeys([*first, *(getattr(run.config, name) for run, _ in finished)])).index


def _row(method: str, results: dict[str, list[dict[str, Any]]], common: Sequence[str]) -> Row:
    scores = {}
    for task, repeats in results.items():
        scores[task] = _score([result["score"] for result in repeats])
        mismatched = [result["metrics"].get("validation_mismatched") for result in repeats]
        if task == "mnli" and all(mismatched):
            scores[MISMATCHED] = _score([metrics[repeats[0]["main_metric"]] for metrics in mismatched])
        if task == "mrpc":
            scores[MRPC_ACCURACY] = _score([_accuracy(result) for result in repeats])
    common_results = {task: results[task] for task in common}
    return Row(
        method=method,
        scores=scores,
        average=_average(common_results, lambda result: float(result["score"])),
        average_as_paper=_average(common_results, lambda r: _accuracy(r) if r["task"] == "mrpc" else float(r["score"])),
        parameters={task: repeats[0]["parameters"]["trained"] for task, repeats in results.items()},
        saved_bytes={task: repeats[0]["saved_bytes"] for task, repeats in results.items()},
        storage=_storage(method, common_results),
        steps_per_minute=_steps_per_minute(common_results),
    )


def _score(values: Sequence[float]) -> Score:
    hundred = [100 * value for value in values]
    return Score(statistics.mean(hundred), statistics.stdev(hundred) if len(hundred) > 1 else None, len(hundred))


def _accuracy(result: dict[str, Any]) -> float:
    return float(result["metrics"][result["score_split"]]["accuracy"])


def _average(results: dict[str, list[dict[str, Any]]], score_of: Callable[[dict[str, Any]], float]) -> Score | None:
    """The mean of the tasks' means; spread and count are of the seeds that have every task."""
    if not results:
        return None
    by_seed: dict[int, list[float]] = {}
    for repeats in results.values():
        for result in repeats:
            by_seed.setdefault(result["seed"], []).append(score_of(result))
    whole = [statistics.mean(scores) for scores in by_seed.values() if len(scores) == len(results)]
    mean = statistics.mean(statistics.mean(map(score_of, repeats)) for repeats in results.values())
    std = 100 * statistics.stdev(whole) if len(whole) > 1 else None
    return Score(100 * mean, std, len(whole))


def _storage(method: str, results: dict[str, list[dict[str, Any]]]) -> float | None:
    if not results:
        return None
    first = [repeats[0] for repeats in results.values()]
    backbone: int = first[0]["model_bytes"]
    shared = 0 if method == "full" else backbone
    return (shared + sum(result["saved_bytes"] for result in first)) / backbone


def _steps_per_minute(results: dict[str, list[dict[str, Any]]]) -> float | None:
    """One over the tasks' mean minutes per step, of runs without interruption that had the machine to themselves."""
    minutes = []
    for repeats in results.values():
        whole = [result for result in repeats if is_timed(result)]
        if not whole:
            return None
        minutes.append(statistics.mean(result["train_seconds"] / result["steps"] for result in whole) / 60)
    return 1 / statistics.mean(minutes) if minutes else None
