"""What a reader of a table must know: everything in which its runs are not the paper's whole protocol."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from sparsepeft.tasks import task_spec
from sparsepeft.tasks.labels import TOKENS
from sparsepeft.training import RunConfig
from sparsepeft.training.fit import FEW_SHOT_STEPS
from sparsepeft_research.reproduction import paper
from sparsepeft_research.reproduction.matrix import SEEDS, Run
from sparsepeft_research.reproduction.protocols import FEW_SHOT_EXAMPLES, SEARCHED
from sparsepeft_research.reproduction.results import is_timed

Key = TypeVar("Key")
Value = TypeVar("Value")
Finished = Sequence[tuple[Run, dict[str, Any]]]

# Fields that decide which run it is, or that have a note of their own.
_TOLD = {
    *("task", "method", "seed", "output_dir", "data_dir", "model", "recipe", "precision"),
    *("epochs", "max_steps", "max_train_samples", "few_shot", "max_length"),
}


def notes_on(
    name: str, runs: Sequence[Run], finished: Finished, is_paper: bool, undecided: list[str] | None, has_devices: bool
) -> list[str]:
    """The lines under a table.

    Args:
        name: the table's.
        runs: the whole matrix.
        finished: its runs with results.
        is_paper: whether the backbone is the paper's.
        undecided: tasks and methods whose grid search has not ended; None where there is no search.
        has_devices: whether throughput on an emulated device is known.
    """
    searched = undecided is not None
    return [
        *([f"Not decided by the grid search yet: {', '.join(undecided)}."] if undecided else []),
        *_incomplete(runs, finished),
        *_seeds(finished),
        *_data(finished),
        *_lengths(finished),
        *_values(finished, searched),
        *_about_columns(name, finished, is_paper, has_devices),
    ]


def _incomplete(runs: Sequence[Run], finished: Finished) -> list[str]:
    finished_names = {run.name for run, _ in finished}
    missing = [run for run in runs if run.name not in finished_names]
    notes = []
    if missing:
        seeds = _grouped(((run.config.method, run.config.task), run.config.seed) for run in missing)
        tasks = _grouped(((method, tuple(pair_seeds)), task) for (method, task), pair_seeds in seeds.items())
        named = [f"{method} on {', '.join(on)} ({_listed(pair_seeds)})" for (method, pair_seeds), on in tasks.items()]
        notes.append(f"Missing: {len(missing)} of {len(runs)} runs, by method, task and seed: {'; '.join(named)}.")
    absent = [task for task in paper.TASKS if task not in {run.config.task for run, _ in finished}]
    if absent:
        notes.append(f"A subset of GLUE: without {', '.join(absent)}.")
    methods = list(dict.fromkeys(run.config.method for run, _ in finished))
    present = list(dict.fromkeys(run.config.task for run, _ in finished))
    have = {(run.config.task, run.config.method) for run, _ in finished}
    partial = [task for task in present if any((task, method) not in have for method in methods)]
    if partial:
        notes.append(f"Not in the averages, since not every method has it: {', '.join(partial)}.")
    return notes


def _seeds(finished: Finished) -> list[str]:
    seeds = _grouped(((run.config.method, run.config.task), run.config.seed) for run, _ in finished)
    pairs = _grouped((tuple(sorted(pair_seeds)), f"{method} on {task}") for (method, task), pair_seeds in seeds.items())
    if len(pairs) == 1:
        (pair_seeds,) = pairs
        short = "" if len(pair_seeds) >= len(SEEDS) else f", fewer than the paper's {len(SEEDS)}"
        return [f"Mean and standard deviation (n - 1) over seeds, n={len(pair_seeds)} ({_listed(pair_seeds)}){short}."]
    if not pairs:
        return []
    counts = ", ".join(str(count) for count in sorted({len(pair_seeds) for pair_seeds in pairs}))
    return [f"Mean and standard deviation (n - 1) over seeds; how many differs ({counts}), the paper has {len(SEEDS)}."]


def _data(finished: Finished) -> list[str]:
    notes = _grouped((note, run.config.task) for run, result in finished for note in result["notes"])
    lines = [f"{_prefix(note, tasks)}{note.rstrip('.')}." for note, tasks in notes.items()]
    capped = {
        f"{run.config.task} ({run.config.max_train_samples:,} of {run.facts.num_train:,})": None
        for run, _ in finished
        if run.config.max_train_samples is not None and run.config.max_train_samples < run.facts.num_train
    }
    if capped:
        lines.append(f"A subset of the training examples: {', '.join(capped)}.")
    splits = _grouped((result["score_split"], run.config.task) for run, result in finished)
    splits.pop("validation", None)
    lines += [f"Scored on the {split} part: {', '.join(tasks)}." for split, tasks in splits.items()]
    return lines


def _lengths(finished: Finished) -> list[str]:
    notes = []
    few = {run.config.few_shot for run, _ in finished} - {None, FEW_SHOT_EXAMPLES}
    if few:
        notes.append(f"Training examples: {_listed(few)} instead of the paper's {FEW_SHOT_EXAMPLES}.")
    steps = {run.config.max_steps for run, _ in finished} - {None, FEW_SHOT_STEPS}
    if steps:
        whole = f"{FEW_SHOT_STEPS}" if finished[0][0].config.few_shot else "epochs"
        notes.append(f"Steps: {_listed(steps)} instead of the paper's {whole}.")
    if not steps:
        epochs = _grouped(
            (f"{run.config.epochs:g} instead of the protocol's {usual}", run.config.task)
            for run, _ in finished
            if run.config.epochs is not None and run.config.epochs != (usual := task_spec(run.config.task).paper_epochs)
        )
        notes += [f"Epochs: {text}: {', '.join(tasks)}." for text, tasks in epochs.items()]
    lengths = _grouped((f"{run.config.max_length}", run.config.task) for run, _ in finished if run.config.max_length)
    notes += [f"Texts are cut to {length} tokens: {', '.join(tasks)}." for length, tasks in lengths.items()]
    cut: dict[str, int] = {}
    for run, result in finished:
        cut[run.config.task] = max(cut.get(run.config.task, 0), result.get("num_cut", 0))
    if any(cut.values()):
        named = ", ".join(f"{task} {count:,}" for task, count in cut.items() if count)
        notes.append(f"Texts cut, since they are longer: {named}.")
    return notes


def _values(finished: Finished, searched: bool) -> list[str]:
    notes = []
    precisions = {run.config.precision for run, _ in finished} - {"fp32"}
    if precisions:
        notes.append(f"Trained in {_listed(precisions)}, not fp32.")
    foreign = [
        method for method in dict.fromkeys(run.config.method for run, _ in finished) if method not in paper.METHODS
    ]
    if foreign:
        notes.append(f"Not in the paper: {', '.join(foreign)}.")
    recipes = {run.config.recipe for run, _ in finished} - {"paper"}
    if recipes:
        notes.append(f"Hyperparameters of the recipe {_listed(recipes)!r}, not the paper's.")
    if searched:
        notes.append("Hyperparameters chosen per task and method on a tenth of the training data (the paper's grid).")
    has_note = _TOLD | set(SEARCHED) if searched else _TOLD
    fields = [f for f in dataclasses.fields(RunConfig) if f.name not in has_note]
    others = _grouped(
        (f"{f.name}={value!r}", run.config.method)
        for run, _ in finished
        for f in fields
        if (value := getattr(run.config, f.name)) and value != f.default
    )
    methods = {run.config.method for run, _ in finished}
    if others:
        named = (text if set(of) == methods else f"{text} ({', '.join(of)})" for text, of in others.items())
        notes.append(f"Other values: {', '.join(named)}.")
    return notes


def _about_columns(name: str, finished: Finished, is_paper: bool, has_devices: bool) -> list[str]:
    notes = [
        "Storage: the files of the averaged tasks and one backbone (full fine-tuning: the files alone) over the "
        "backbone's bytes. Bytes per task are those of the weight files written."
    ]
    if name == "table1":
        notes.append(
            "Device throughput: inputs per minute in batches of 32, float32, with the device's cores and memory but "
            "this machine's processor; the files of the measurement say what else could not be emulated."
            if has_devices
            else "Device throughput is not measured; --device-throughput takes a measurement."
        )
    machines = {
        f"{about.get('gpu') or about.get('cpu')} ({about.get('threads')} threads)": None
        for _, result in finished
        if is_timed(result) and (about := result.get("environment"))
    }
    if not machines:
        notes.append("Steps per minute: none, as no run had the machine to itself without interruption.")
    elif len(machines) == 1:
        notes.append(
            f"Steps per minute: training with its evaluations on {next(iter(machines))}, of the runs that had the "
            "machine to themselves."
        )
    else:
        notes.append(f"Steps per minute come from several machines, do not compare them: {', '.join(machines)}.")
    if any(run.config.task == "mrpc" for run, _ in finished):
        notes.append("mrpc is the mean of accuracy and F1, as GLUE has it; the paper's figure is an accuracy.")
    of_tokens = (run.config.task for run, result in finished if result.get("problem_type") == TOKENS)
    notes += [f"{task} is the F1 of entities: type, beginning and end are right." for task in dict.fromkeys(of_tokens)]
    if not is_paper:
        notes.append("The paper's figures, which are RoBERTa-base's, are not comparable to this backbone's.")
    else:
        notes.append(
            f'Rows "paper": {paper.SOURCE}, RoBERTa-base, nine tasks, three seeds; its averages are over the tasks '
            "averaged here."
        )
        if name != "table1":
            notes.append(
                "The paper's throughput is table 2's, without a unit; table 3's column for the same has the opposite "
                "order, as seconds per batch would."
            )
    return notes


def _prefix(note: str, tasks: list[str]) -> str:
    """Whose note it is, unless it says so itself."""
    return "" if len(tasks) == 1 and note.startswith(tasks[0]) else f"{', '.join(tasks)}: "


def _grouped(pairs: Iterable[tuple[Key, Value]]) -> dict[Key, list[Value]]:
    """``[(a, 1), (a, 2), (a, 1)]`` -> ``{a: [1, 2]}``."""
    groups: dict[Key, dict[Value, None]] = {}
    for key, value in pairs:
        groups.setdefault(key, {})[value] = None
    return {key: list(values) for key, values in groups.items()}


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(str(value) for value in sorted(values))
