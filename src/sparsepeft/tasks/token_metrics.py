"""Scores of labelled tokens: whole entities as CoNLL counts them, or token by token."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sparsepeft.errors import TaskError
from sparsepeft.extras import require
from sparsepeft.tasks.tags import OUTSIDE, entity_types

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from sparsepeft.tasks.spec import TaskSpec

NO_TOKEN: Final = -100  # as a label: of padding and pieces within words; losses ignore it, too
_OF_ENTITIES: Final = ("precision", "recall", "f1", "support")
_OF_TOKENS: Final = ("accuracy", "macro_f1")


def compute(spec: TaskSpec, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Score logits; see `TaskSpec.compute_metrics`.

    An entity is right if its type, beginning and end all are. Precision, recall and F1 are those of all entities
    together (micro), as ``conlleval`` has them.
    """
    logits, truth, lengths = _labelled(spec, predictions, labels)
    scores = _by_token(spec).compute_metrics(logits, truth)
    if entity_types(spec.label_names or ()):
        guessed, true = (_sentences(spec, classes, lengths) for classes in (_classes(logits), truth))
        scores |= dict(zip(_OF_ENTITIES, map(float, _measure(true, guessed, "micro")), strict=True))
    return {name: scores[name] for name in spec.metrics}


def report(spec: TaskSpec, predictions: ArrayLike, labels: ArrayLike) -> dict[str, Any]:
    """Scores by type of entity, where the tags are entities', else by tag.

    Returns:
        ``per_class``, see :func:`sparsepeft.tasks.metrics.report`; ``support`` is the number of true entities.
    """
    logits, truth, lengths = _labelled(spec, predictions, labels)
    types = entity_types(spec.label_names or ())
    if not types:
        from sparsepeft.tasks.metrics import report as report_on_classes

        return report_on_classes(_by_token(spec), logits, truth)
    guessed, true = (_sentences(spec, classes, lengths) for classes in (_classes(logits), truth))
    get_entities = require("seqeval.metrics.sequence_labeling", "train", "F1 of entities").get_entities
    found = sorted({kind for kind, _, _ in (*get_entities(true), *get_entities(guessed))})
    columns = zip(*_measure(true, guessed, None), strict=True) if found else ()
    scores = {
        kind: {"precision": float(precision), "recall": float(recall), "f1": float(f1), "support": int(support)}
        for kind, (precision, recall, f1, support) in zip(found, columns, strict=True)
    }
    nothing = dict.fromkeys(_OF_ENTITIES[:3], 0.0) | {"support": 0}
    return {"per_class": {kind: scores.get(kind, nothing) for kind in types}}


def _measure(true: list[list[str]], guessed: list[list[str]], average: str | None) -> list[Any]:
    """Precision, recall, F1 and support, of all entities or of each type that occurs, these in order of their names."""
    metrics = require("seqeval.metrics.sequence_labeling", "train", "F1 of entities")
    if not metrics.get_entities(true) and not metrics.get_entities(guessed):
        return [0.0, 0.0, 0.0, 0]
    measured = metrics.precision_recall_fscore_support(true, guessed, average=average, zero_division=0)
    return [0 if values is None else values for values in measured]  # it has no support of a mean


def _labelled(
    spec: TaskSpec, predictions: ArrayLike, labels: ArrayLike
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Logits (M, C) and classes (M,) of the tokens that have a label, and how many of them each sentence has."""
    logits, classes = np.asarray(predictions), np.asarray(labels)
    is_token = classes != NO_TOKEN
    if not is_token.any():
        raise TaskError(
            f"{spec.name}: no token can be scored; expected at least one with characters that the tokenizer knows, "
            "correct the file"
        )
    if classes.ndim != 2 or logits.shape != (*classes.shape, spec.num_labels):
        raise TaskError(
            f"{spec.name}: received predictions of shape {logits.shape} and labels of shape {classes.shape}; expected "
            f"(N, T, {spec.num_labels}) and (N, T)"
        )
    return logits[is_token], classes[is_token], is_token.sum(axis=1)


def _by_token(spec: TaskSpec) -> TaskSpec:
    """The task as one of texts, each of which is a token."""
    metrics = tuple(name for name in spec.metrics if name in _OF_TOKENS)
    return dataclasses.replace(spec, labels_tokens=False, metrics=metrics, main_metric=metrics[0])


def _classes(logits: NDArray[Any]) -> NDArray[Any]:
    """The likeliest class of each token; -1 where a logit is NaN, which argmax would take."""
    return np.where(np.isnan(logits).any(axis=1), -1, logits.argmax(axis=1))


def _sentences(spec: TaskSpec, classes: NDArray[Any], lengths: NDArray[Any]) -> list[list[str]]:
    """The tags of each sentence; no answer is no entity."""
    names = np.array([*(spec.label_names or ()), OUTSIDE], dtype=object)  # the last for class -1
    return [list(tags) for tags in np.split(names[classes], np.cumsum(lengths)[:-1])]
