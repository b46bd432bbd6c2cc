"""Tables of a model card: scores, by class too, and how they came about."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparsepeft.runs.history import by_step

_MOST_LABELS = 30  # of which a table of confusions can be read
_WORDS = {"f1": "F1", "mae": "mean absolute error", "rmse": "root mean square error"}
_MEANS = {"accuracy_f1": "mean of accuracy and F1", "pearson_spearman": "mean of both"}


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> str:
    """A Markdown table; empty without rows. All columns but the first hold ``numbers``."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    rule = "| --- |" + (" ---: |" if numbers else " --- |") * (len(header) - 1)
    return "\n".join([f"| {' | '.join(header)} |", rule, *lines]) if lines else ""


def title(metric: str) -> str:
    """A metric's name for people."""
    return _MEANS.get(metric) or " ".join(_WORDS.get(word, word) for word in metric.split("_"))


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def scores(results: Mapping[str, Any]) -> str:
    """Metrics of all parts, what a constant answer has, and how each label is recognised."""
    names = list(dict.fromkeys(name for metrics in results["metrics"].values() for name in metrics))
    rows = [
        (part, *(_number(metrics[name]) if name in metrics else "" for name in names))
        for part, metrics in results["metrics"].items()
    ]
    rows += [
        (f"{part}, with 0.5 as every label's threshold", *(_number(metrics[n]) for n in names))
        for part, metrics in results.get("metrics_at_half", {}).items()
    ]
    own, *others = results.get("metrics_by_infer", {}) or [""]
    for infer in others:
        rows += [
            (f"{part}, as the {infer} model (above: the {own} one)", *(_number(metrics[n]) for n in names))
            for part, metrics in results["metrics_by_infer"][infer].items()
        ]
    for kind, metrics in results.get("before", {}).items():
        rows.append((f"{results['score_split']}, {kind} model before training", *(_number(metrics[n]) for n in names)))
    parts = ["## Scores", table(("part", *map(title, names)), rows)]
    parts += _beside(results)
    return "\n\n".join(parts)


def _beside(results: Mapping[str, Any]) -> list[str]:
    baseline, report, part = results.get("baseline"), results.get("report") or {}, results["score_split"]
    paragraphs = []
    if baseline:
        answer = baseline["answer"]
        if isinstance(answer, float):
            said = f"{answer:.4g}, the mean in training"
        else:
            said = f"`{answer if isinstance(answer, str) else ', '.join(answer)}`, the most frequent in training"
        scores = ", ".join(f"{title(name)} {_number(value)}" for name, value in baseline["metrics"].items())
        paragraphs.append(f"Always answering {said}, scores on {part}: {scores}.")
    per_class = report.get("per_class")
    if per_class is None:
        if report:
            paragraphs.append(f"On {part}: " + ", ".join(f"{title(n)} {_number(v)}" for n, v in report.items()) + ".")
        return paragraphs
    columns, thresholds = ("precision", "recall", "f1"), results.get("thresholds", {})
    rows = [
        (
            _cell(name),
            *(f"{v[c]:.3f}" for c in columns),
            f"{v['support']:,}",
            *([f"{thresholds[name]:.3f}"] if thresholds else []),
        )
        for name, v in per_class.items()
    ]
    header = ("label", "precision", "recall", "F1", "support", *(["holds above"] if thresholds else []))
    paragraphs.append(f"By label, on {part}:\n\n" + table(header, rows))
    matrix = report.get("confusion_matrix")
    if matrix and len(per_class) <= _MOST_LABELS:
        names = [_cell(name) for name in per_class]
        lines = [(name, *map(str, row)) for name, row in zip(names, matrix, strict=True)]
        paragraphs.append("True labels by row, predicted ones by column:\n\n" + table(("", *names), lines))
    return paragraphs


def training(results: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> str:
    """Steps, hyperparameters, and the scores on the way; ``history`` are the trainer's logs."""
    values = results.get("hyperparameters", {})
    flat = {**{key: value for key, value in values.items() if key != "adapter"}, **values.get("adapter", {})}
    rows = (
        (f"`{key}`", f"`{json.dumps(value, ensure_ascii=False)}`") for key, value in flat.items() if value is not None
    )
    said = [f"{results['steps']:,} steps in {results['train_seconds']:,.0f} s."]
    if results.get("best_step"):
        said.append(f"The weights are those of step {results['best_step']:,}, which scored best on the selection part.")
    steps = by_step(history)
    kept = [row for row in steps if "eval_score" in row] or steps[-1:]
    columns = [key for key in ("step", "epoch", "loss", "eval_loss", "eval_score") if any(key in row for row in kept)]
    lines = ([_number(row[key]) if key in row else "" for key in columns] for row in kept)
    course = table(columns, lines) if kept else ""
    return "\n\n".join(
        part for part in ("## Training", " ".join(said), table(("", "value"), rows, numbers=False), course) if part
    )
