"""What a comparison comes to: a row for each method, which one to take, and the files that say so."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsepeft.comparison.noise import LEVEL
from sparsepeft.folders import write_bytes, write_json
from sparsepeft.plotting import COLOURS, MARKERS, write_drawing
from sparsepeft.reprs import megabytes
from sparsepeft.runs.card_tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULT = "comparison.json"
MEASURED = "comparison"
BEST, NOISE, WORSE, FAILED = "best", "within noise", "worse", "failed"


@dataclass(frozen=True)
class Compared:
    """One method of a comparison; of one that failed there is nothing but ``error``.

    Attributes:
        method: its name.
        standing: ``"best"``, ``"within noise"`` of the best score, ``"worse"``, or ``"failed"``.
        error: what ended its training; None if nothing did.
        score: the main metric on the validation rows, the mean over the seeds.
        interval: where the score may lie on other such rows, with 95 % confidence.
        scores: by seed.
        test_score: on the test rows, the mean over the seeds; None where there are none.
        train_seconds: of training alone, which includes scoring the part that checkpoints are chosen on; mean over
            the seeds.
        trained_parameters: with the head.
        file_bytes: of the task's weights on disk.
        task_bytes: what one more task adds to a device: its weights and the small files that go with them; with full
            fine-tuning a whole model and its tokenizer.
        shared_bytes: of the backbone, which all tasks of the method share; 0 with full fine-tuning.
        latency_ms: for one text by itself.
        texts_per_second: of a batch.
    """

    method: str
    standing: str
    error: str | None = None
    score: float | None = None
    interval: tuple[float, float] | None = None
    scores: tuple[float, ...] = ()
    test_score: float | None = None
    train_seconds: float | None = None
    trained_parameters: int | None = None
    file_bytes: int | None = None
    task_bytes: int | None = None
    shared_bytes: int | None = None
    latency_ms: float | None = None
    texts_per_second: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Methods on the same data, trained by their recipes, scored on the same rows, timed side by side.

    Attributes:
        task: its name, or that of the training file.
        metric: what the scores are.
        num_rows: of each part, by name; the scores are of ``"validation"``.
        methods: in the order asked for.
        baseline: a constant answer: the most frequent label, or the mean value. ``answer``, ``score`` and ``standing``.
        recommended: the method that :func:`recommend` takes; None if none is better than the baseline.
        recommendation: why, in one sentence.
        notes: what a reader must know.
        settings: what all runs have in common, the seeds, and how the interval was found.
        environment: commit, date, versions and hardware.
        files: what was written, beside the runs.
    """

    task: str
    metric: str
    num_rows: dict[str, int]
    methods: tuple[Compared, ...]
    baseline: dict[str, Any]
    recommended: str | None
    recommendation: str
    notes: tuple[str, ...]
    settings: dict[str, Any]
    environment: dict[str, Any]
    files: tuple[Path, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """What stands in ``comparison.json``."""
        return {
            "measured": MEASURED,
            "seed": self.settings["seeds"][0],
            "settings": {"task": self.task, "metric": self.metric, "num_rows": self.num_rows, **self.settings},
            "results": [dataclasses.asdict(method) for method in self.methods],
            "baseline": self.baseline,
            "recommended": self.recommended,
            "recommendation": self.recommendation,
            "notes": list(self.notes),
            "environment": self.environment,
        }

    @property
    def failed(self) -> tuple[str, ...]:
        """Methods that failed."""
        return tuple(method.method for method in self.methods if method.error is not None)

    @property
    def heading(self) -> str:
        """What was scored, in words."""
        seeds = ", ".join(map(str, self.settings["seeds"]))
        kind = "seeds" if len(self.settings["seeds"]) > 1 else "seed"
        return f"{self.task}: {self.metric} on {self.num_rows['validation']:,} validation rows, {kind} {seeds}"

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """A header, and a row for each method and for the baseline, as texts."""
        has_test = "test" in self.num_rows
        header = ["method", "score", "95 %", "standing", *(["test"] if has_test else []), "training"]
        header += ["weights", "+1 task", "one text", "texts/s"]
        rows = [_cells(method, has_test) for method in self.methods]
        constant = [_always(self.baseline), _score(self.baseline["score"]), "", self.baseline["standing"]]
        return header, [*rows, constant + [""] * (len(header) - len(constant))]

    def explanations(self) -> list[str]:
        """What the table does not say by itself."""
        shared = next((each.shared_bytes for each in self.methods if each.shared_bytes), None)
        backbone = f"the backbone ({megabytes(shared)}), but for full fine-tuning" if shared else "nothing"
        return [
            *(f"{method.method} failed: {method.error}" for method in self.methods if method.error is not None),
            f"95 %: {self.settings['interval']}. Standing: a method is within noise of the best one where a paired "
            f"test on the same rows, at {100 * LEVEL:.0f} %, does not tell them apart.",
            f"+1 task: what one more task adds on disk, its weights and what goes with them; tasks share {backbone}.",
        ]


def recommend(methods: Sequence[Compared], baseline: dict[str, Any]) -> tuple[str | None, str]:
    """Which method to take, by a plain rule, and the sentence that says so.

    Of the methods whose scores are within noise of the best, it is the one that adds the fewest bytes with one more
    task; where two add the same, the one whose training took less time. If a constant answer is within noise of the
    best score, too, it is none.
    """
    good = [method for method in methods if method.standing in (BEST, NOISE)]
    best = next(method for method in good if method.standing == BEST)
    named = f"{best.method}, {_score(best.score)}"
    if baseline["standing"] != WORSE:
        return None, (
            f"None can be recommended: a constant answer ({_always(baseline)}) is within noise of the best score "
            f"({named}); try more rows, or more steps."
        )
    taken = min(good, key=lambda method: (method.task_bytes or 0, method.train_seconds or 0.0))
    size = megabytes(taken.task_bytes or 0)
    if len(good) == 1:
        return taken.method, f"Take {named}: no other method is within noise of its score."
    if taken is best:
        return taken.method, f"Take {named}: the best score, and of those within noise of it the smallest ({size})."
    return taken.method, (
        f"Take {taken.method}: it is the smallest ({size}) of the methods within noise of the best score ({named})."
    )


def write_comparison(comparison: Comparison, folder: Path) -> Comparison:
    """Write the result as JSON and Markdown, and where matplotlib is installed a figure.

    Returns:
        The comparison with its files.
    """
    result = folder / RESULT
    write_json(result, comparison.to_dict())
    page = result.with_suffix(".md")
    write_bytes(page, _page(comparison).encode())
    files = [result, page]
    if importlib.util.find_spec("matplotlib") is not None:
        files += write_drawing(lambda: _draw(comparison), result.with_suffix(""))
    return dataclasses.replace(comparison, files=tuple(files))


def _page(comparison: Comparison) -> str:
    header, rows = comparison.cells()
    machine = comparison.environment
    parts = [
        f"# {comparison.heading}",
        f"On {comparison.settings['model']}; {machine['cpu']}, threads: {machine['threads']}, {machine['date']}.",
        table(header, rows),
        comparison.recommendation,
        "\n".join(f"- {note}" for note in (*comparison.explanations(), *comparison.notes)),
    ]
    return "\n\n".join(parts) + "\n"


def _cells(method: Compared, has_test: bool) -> list[str]:
    if method.error is not None or method.interval is None:
        return [method.method, "", "", FAILED, *[""] * (6 if has_test else 5)]
    return [
        method.method,
        _score(method.score),
        f"{method.interval[0]:.3f}–{method.interval[1]:.3f}",
        method.standing,
        *([_score(method.test_score)] if has_test else []),
        f"{method.train_seconds:,.1f} s",
        megabytes(method.file_bytes or 0),
        megabytes(method.task_bytes or 0),
        f"{method.latency_ms:,.1f} ms",
        f"{method.texts_per_second:,.0f}",
    ]


def _always(baseline: dict[str, Any]) -> str:
    answer = baseline["answer"]
    if isinstance(answer, float):
        return f"always {answer:.4g}, the mean"
    return f"always {answer if isinstance(answer, str) else ', '.join(answer) or 'no label'}"


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _draw(comparison: Comparison) -> Figure:
    """Score by what one more task adds, with the intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    for number, method in enumerate(comparison.methods):
        if method.score is None or method.interval is None:
            continue
        low, high = method.interval
        axis.errorbar(
            [(method.task_bytes or 0) / 1e6],
            [method.score],
            yerr=[[max(0.0, method.score - low)], [max(0.0, high - method.score)]],
            label=method.method,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle="",
            capsize=3,
        )
    axis.axhline(comparison.baseline["score"], color="0.6", linestyle="--", label="a constant answer")
    axis.set_xscale("log")
    axis.set_xlabel("MB that one more task adds")
    axis.set_ylabel(comparison.metric)
    axis.set_title(comparison.heading, loc="left")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure
