"""From finished runs to a comparison: their answers to the same rows, their speed and their size."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsepeft.backbones import describe_backbone
from sparsepeft.comparison.noise import Scorer
from sparsepeft.comparison.report import BEST, FAILED, NOISE, WORSE, Compared, Comparison, recommend
from sparsepeft.comparison.speed import Speed, measure_speed
from sparsepeft.devices import find_device
from sparsepeft.errors import UserError
from sparsepeft.inference import MultiTaskEngine
from sparsepeft.provenance import environment
from sparsepeft.runs.config import RunConfig
from sparsepeft.runs.files import HELD_OUT, HISTORY, RESULTS
from sparsepeft.runs.held_out import load_task_data, rows_of
from sparsepeft.tasks import TaskSpec
from sparsepeft.tasks.thresholds import cuts
from sparsepeft.training.callbacks import Watcher
from sparsepeft.training.data import LabelledData
from sparsepeft.training.report import shared_values

Texts = list[tuple[str, ...]]

_NOT_NEEDED = (RESULTS, HISTORY, HELD_OUT, "README.md")  # of a run's files, to answer with it
_BUSY = 0.1  # share of the processors' time that others may have while a method is timed
_DECIDED = ("method", "seed")  # of a config: each run has its own


@dataclass(frozen=True)
class Run:
    """What came of a run: its results, or the error that ended it."""

    folder: Path
    results: dict[str, Any] | None = None
    error: Exception | None = None


def measure(config: RunConfig, data: LabelledData, runs: Mapping[str, Sequence[Run]], watcher: Watcher) -> Comparison:
    """Compare finished runs.

    Args:
        config: what they have in common.
        data: their data.
        runs: one for each seed, by method.
        watcher: told what is being measured.

    Raises:
        Exception: every method has failed, and this is how the first did.
    """
    errors = {method: next((run.error for run in each if run.error is not None), None) for method, each in runs.items()}
    loaded = load_task_data(config)
    parts = {"validation": loaded.validation, **({} if loaded.test is None else {"test": loaded.test})}
    texts = {name: list(rows_of(part, data.spec)) for name, part in parts.items()}
    scorers = {name: Scorer(data.spec, np.asarray(part["label"][:])) for name, part in parts.items()}
    engine = MultiTaskEngine(config.model, device=str(find_device(config.device)))
    answers: dict[str, dict[str, np.ndarray]] = {}
    for method in [method for method, error in errors.items() if error is None]:
        watcher.measuring(f"scoring {method}")
        try:
            answers[method] = _answers(engine, method, runs[method], texts)
        except UserError as error:
            errors[method] = error
    if not answers:
        raise next(error for error in errors.values() if error is not None)
    watcher.measuring("timing answers")
    speeds = measure_speed(engine, list(answers), texts["validation"])
    watcher.measuring("comparing scores")
    results = [run.results for run in runs[next(iter(answers))] if run.results is not None]
    seeds, answer = [each["seed"] for each in results], results[0]["baseline"]["answer"]
    constant = np.tile(_logits_of(data.spec, answer), (len(seeds), len(texts["validation"]), 1))
    standings, baseline_standing = _standings(scorers["validation"], answers, constant)
    methods = tuple(
        Compared(method, FAILED, sentence(error))
        if error is not None
        else _compared(method, standings[method], runs[method], answers[method], scorers, speeds[method])
        for method, error in errors.items()
    )
    baseline = {
        "answer": answer,
        "score": statistics.mean(scorers["validation"].scores(constant)),
        "standing": baseline_standing,
    }
    recommended, recommendation = recommend(methods, baseline)
    return Comparison(
        task=Path(config.train_file).name.partition(".")[0] if config.train_file else data.spec.name,
        metric=data.spec.main_metric,
        num_rows=data.sizes,
        methods=methods,
        baseline=baseline,
        recommended=recommended,
        recommendation=recommendation,
        notes=(*data.notes, *_notes([run for method in answers for run in runs[method]])),
        settings={
            "model": describe_backbone(data.model),
            "methods": list(runs),
            "seeds": seeds,
            "interval": scorers["validation"].interval_by,
            "config": {key: value for key, value in shared_values(config).items() if key not in _DECIDED},
        },
        environment=environment(),
    )


def _answers(
    engine: MultiTaskEngine, method: str, runs: Sequence[Run], texts: Mapping[str, Texts]
) -> dict[str, np.ndarray]:
    """Logits (S, N, C) of each part; where several labels may hold, above 0 for those that do.

    The first run stays in the engine, under the method's name.

    Raises:
        UserError: a run cannot be loaded.
    """
    found: dict[str, list[np.ndarray]] = {part: [] for part in texts}
    for number, run in enumerate(runs):
        name = run.folder.name if number else method
        engine.add(name, run.folder)
        for part, rows in texts.items():
            found[part].append(engine.logits(name, rows) - cuts(engine.tasks[name].thresholds))
        if number:
            engine.remove(name)
    return {part: np.stack(of_seeds) for part, of_seeds in found.items()}


def _logits_of(spec: TaskSpec, answer: Any) -> np.ndarray:
    """Logits (C,) that say a run's constant answer: a label, those that hold, or a value."""
    if spec.label_names is None:
        return np.array([answer])
    held = [answer] if isinstance(answer, str) else answer
    return np.array([1.0 if name in held else -1.0 for name in spec.label_names])


def _standings(
    scorer: Scorer, answers: Mapping[str, Mapping[str, np.ndarray]], constant: np.ndarray
) -> tuple[dict[str, str], str]:
    """How each method stands against the best, and how the constant answer does."""
    of_rows = {method: parts["validation"] for method, parts in answers.items()}
    best = max(of_rows, key=lambda method: statistics.mean(scorer.scores(of_rows[method])))

    def standing(other: np.ndarray) -> str:
        return NOISE if scorer.is_within_noise(of_rows[best], other) else WORSE

    standings = {method: BEST if method == best else standing(each) for method, each in of_rows.items()}
    return standings, standing(constant)


def _compared(
    method: str,
    standing: str,
    runs: Sequence[Run],
    answers: Mapping[str, np.ndarray],
    scorers: Mapping[str, Scorer],
    speed: Speed,
) -> Compared:
    results = [run.results for run in runs if run.results is not None]
    scores = {part: scorer.scores(answers[part]) for part, scorer in scorers.items()}
    return Compared(
        method,
        standing,
        score=statistics.mean(scores["validation"]),
        interval=scorers["validation"].interval(answers["validation"]),
        scores=tuple(scores["validation"]),
        test_score=statistics.mean(scores["test"]) if "test" in scores else None,
        train_seconds=statistics.mean(result["train_seconds"] for result in results),
        trained_parameters=results[0]["parameters"]["trained"],
        file_bytes=results[0]["saved_bytes"],
        task_bytes=_task_bytes(runs[0].folder),
        shared_bytes=0 if method == "full" else results[0]["model_bytes"],
        latency_ms=speed.latency_ms,
        texts_per_second=speed.texts_per_second,
    )


def _task_bytes(folder: Path) -> int:
    files = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return sum(path.stat().st_size for path in files if path.name not in _NOT_NEEDED)


def _notes(runs: Sequence[Run]) -> list[str]:
    """What makes the seconds of trainings hard to compare."""
    results = {run.folder.name: run.results for run in runs if run.results is not None}
    notes = []
    if len({tuple(each["environment"].get(key) for key in ("cpu", "threads", "gpu")) for each in results.values()}) > 1:
        notes.append("the runs were not all trained by the same processor with as many threads: do not compare seconds")
    busy = {name: share for name, each in results.items() if (share := each["others_cpu_share"] or 0.0) > _BUSY}
    if busy:
        notes.append(
            f"other programs had up to {100 * max(busy.values()):.0f} % of the processors' time while "
            f"{', '.join(busy)} trained: their seconds say little"
        )
    return notes


def sentence(error: BaseException) -> str:
    """An error's message in one line."""
    return " ".join(str(error).split())
