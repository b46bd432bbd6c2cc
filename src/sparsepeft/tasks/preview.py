"""A look at a task's data before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsepeft.tasks.spec import TaskData, TaskSpec

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_COVERED = 0.99  # of the inputs that a suggested length leaves whole
_STEP = 16  # lengths are suggested in multiples of this


def describe_data(data: TaskData, num_examples: int = 3) -> dict[str, Any]:
    """Rows, labels, duplicates, empty texts and a few examples of each part.

    Returns:
        What JSON can hold: ``task``, ``source``, ``problem_type``, ``num_labels``, ``metrics`` and ``notes``; ``rows``
        of all parts, and ``parts``: for each its ``rows``, its ``labels`` (rows by label; tokens by tag; for values
        ``least``, ``quartiles`` and ``greatest``), ``duplicates`` (rows whose texts occurred before in that part),
        ``contradictions`` (of these, with another label), ``seen_in_train`` (rows whose texts are among the training
        rows), ``empty_texts`` and ``examples``.
    """
    parts = {"train": data.train, **data.scored_parts}
    about = {name: _part(data.spec, part, num_examples) for name, part in parts.items()}
    trained_on = set(_texts(data.spec, data.train))
    for name in about.keys() - {"train"}:
        about[name]["seen_in_train"] = sum(key in trained_on for key in _texts(data.spec, parts[name]))
    return {
        "task": data.spec.name,
        "source": data.source,
        "problem_type": data.spec.problem_type,
        "num_labels": data.spec.num_labels,
        "metrics": list(dict.fromkeys([data.spec.main_metric, *data.spec.metrics])),
        "notes": list(data.notes),
        "rows": sum(map(len, parts.values())),
        "parts": about,
    }


def describe_lengths(data: TaskData, tokenizer: PreTrainedTokenizerBase, limit: int) -> dict[str, Any]:
    """How many tokens the inputs of all parts have.

    Args:
        limit: tokens that the model takes.

    Returns:
        ``median``, ``p95`` and ``longest`` in tokens, special ones included; ``limit``; ``over_limit``, the share of
        inputs that are longer; ``suggested``, the ``max_length`` that leaves 99 % of the inputs whole where the model
        takes as many, and ``over_suggested``, the share that it cuts.
    """
    lengths: list[int] = []
    for part in (data.train, *data.scored_parts.values()):
        columns = [part[name][:] for name in data.spec.text_columns]
        lengths += map(len, tokenizer(*columns, truncation=False, verbose=False)["input_ids"])
    lengths.sort()
    suggested = min(limit, -(-_quantile(lengths, _COVERED) // _STEP) * _STEP)
    return {
        "median": _quantile(lengths, 0.5),
        "p95": _quantile(lengths, 0.95),
        "longest": lengths[-1],
        "limit": limit,
        "over_limit": _share_over(lengths, limit),
        "suggested": suggested,
        "over_suggested": _share_over(lengths, suggested),
    }


def _part(spec: TaskSpec, part: Dataset, num_examples: int) -> dict[str, Any]:
    texts, labels = _texts(spec, part), part["label"][:]
    first: dict[tuple[str, ...], Any] = {}
    contradictions = 0
    for key, label in zip(texts, labels, strict=True):
        contradictions += first.setdefault(key, label) != label
    by_label = sorted(range(len(part)), key=lambda row: labels[row])
    step = max(1, (len(part) - 1) // max(1, num_examples - 1))
    chosen = by_label[::step][:num_examples]
    return {
        "rows": len(part),
        "labels": _values(labels) if spec.label_names is None else _counts(spec, labels),
        "duplicates": len(texts) - len(first),
        "contradictions": contradictions,
        "empty_texts": sum(not all(map(str.strip, key)) for key in texts),
        "examples": [{"texts": list(texts[row]), "label": _label(spec, labels[row])} for row in chosen],
    }


def _texts(spec: TaskSpec, part: Dataset) -> list[tuple[str, ...]]:
    return list(zip(*(part[name][:] for name in spec.text_columns), strict=True))


def _label(spec: TaskSpec, label: Any) -> Any:
    """As the file would name it: a value, a name, or a list of names."""
    if spec.label_names is None:
        return round(label, 6)
    if spec.labels_tokens:
        return [spec.label_names[tag] for tag in label]
    if spec.multi_label:
        return [name for name, value in zip(spec.label_names, label, strict=True) if value]
    return spec.label_names[label]


def _counts(spec: TaskSpec, labels: Sequence[Any]) -> dict[str, int]:
    named = [_label(spec, label) for label in labels]
    has_several = spec.multi_label or spec.labels_tokens
    counts = Counter(name for each in named for name in each) if has_several else Counter(named)
    return {name: counts[name] for name in spec.label_names or ()}


def _values(labels: Sequence[float]) -> dict[str, Any]:
    ordered = sorted(labels)
    quartiles = [round(_quantile(ordered, share), 6) for share in (0.25, 0.5, 0.75)]
    return {"least": round(ordered[0], 6), "quartiles": quartiles, "greatest": round(ordered[-1], 6)}


def _quantile(ordered: Sequence[Any], share: float) -> Any:
    """The least value that at least this share does not exceed."""
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def _share_over(lengths: Sequence[int], limit: int) -> float:
    return sum(length > limit for length in lengths) / len(lengths)
