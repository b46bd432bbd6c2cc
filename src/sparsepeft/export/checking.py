"""Comparing what was exported with PyTorch, from text to score."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from sparsepeft.errors import RunFailed, UserError
from sparsepeft.export.tasks import ExportTask
from sparsepeft.inference import MultiTaskEngine
from sparsepeft.inference.portable import ExportedTasks, Text
from sparsepeft.inference.sentences import by_sentence, first_pieces, overlap
from sparsepeft.runs.files import RUN
from sparsepeft.runs.held_out import CHANGED, held_out_data
from sparsepeft.tasks import TaskSpec, load_task
from sparsepeft.tasks.thresholds import HALF
from sparsepeft.tasks.token_metrics import NO_TOKEN

Answers = list[dict[str, Any]]  # of the examples, as Prediction.to_dict has them


@dataclass(frozen=True)
class Examples:
    """Texts that a task is checked on.

    Attributes:
        source: where they come from, for the report.
        texts: inputs of the task.
        labels: theirs, with ``spec``; None where the texts are not the task's own.
        tokens: of each text, where these are labelled.
        thresholds: of the task.
    """

    source: str
    texts: list[Text]
    labels: list[Any] | None = None
    spec: TaskSpec | None = None
    tokens: list[list[str]] | None = None
    thresholds: tuple[float, ...] | None = None


def examples_of(
    task: ExportTask, data_dir: str | None, max_examples: int | None, split: str = "validation"
) -> Examples:
    """A part of the task's data; the built-in sample's texts where that cannot be had.

    Raises:
        UserError: the data has no such part.
    """
    if (task.info.folder / RUN).is_file():
        try:
            data = held_out_data(task.info.folder, data_dir)
        except (UserError, OSError) as error:
            source = f"texts of the built-in sample, as the task's own could not be had ({error})"
        else:
            part = data.scored_part(split)
            rows = part.shuffle(seed=0) if max_examples else part
            rows = rows.select(range(min(max_examples or len(rows), len(rows))))
            columns = [rows[name][:] for name in data.spec.text_columns]
            texts = list(columns[0] if len(columns) == 1 else zip(*columns, strict=True))
            changes = (note for note in data.notes if CHANGED in note)
            source = "; ".join((f"the task's {split} set", *changes))
            tokens = rows["tokens"][:] if data.spec.labels_tokens else None
            return Examples(source, texts, rows["label"][:], data.spec, tokens, task.info.thresholds)
    else:
        source = "texts of the built-in sample, as the folder does not say what the task was trained on"
    sample = load_task("topics").validation["text"][:][:max_examples]
    return Examples(source, list(pairwise(sample)) if task.info.num_texts == 2 else list(sample))


def eager_answers(engine: MultiTaskEngine, name: str, examples: Examples) -> tuple[Examples, Answers]:
    """PyTorch's answers, and the examples that it takes (none with an empty text)."""
    every_token: dict[str, Any] = {"aggregation_strategy": "none", "ignore_labels": []}
    with engine.loaded(name) as task:
        if task.info.labels_tokens:
            every_token["stride"] = overlap(task.encoder.tokenizer, task.max_length)
    predictions = engine.predict([(name, text) for text in examples.texts], **every_token)
    answered = [index for index, one in enumerate(predictions) if one.error is None]
    texts, labels, tokens = [examples.texts[index] for index in answered], examples.labels, examples.tokens
    kept = replace(
        examples,
        texts=texts,
        labels=labels and [labels[index] for index in answered],
        tokens=tokens and [tokens[index] for index in answered],
    )
    return kept, [predictions[index].to_dict() for index in answered]


def exported_answers(runner: ExportedTasks, name: str, examples: Examples) -> Answers:
    """The exported task's answers; texts of similar length share a batch.

    Raises:
        RunFailed: it has none for one of them.
    """
    order = sorted(range(len(examples.texts)), key=lambda index: len("".join(examples.texts[index])))
    rows: list[Any] = [None] * len(order)
    for index, row in zip(order, runner.answer(name, [examples.texts[i] for i in order], joined=False), strict=True):
        if "error" in row:
            raise RunFailed(f"The exported task {name} does not answer a text that PyTorch answers: {row['error']}")
        rows[index] = row
    return rows


def _scores(answers: Answers) -> np.ndarray:
    """Probabilities, or the predicted value, (N, number of labels); of tokens that of the label, (tokens, 1)."""
    if answers and "entities" in answers[0]:
        return np.array([[token["score"]] for row in answers for token in row["entities"]])
    return np.array([list(row["scores"].values()) or [row["score"]] for row in answers])


def _labels(answers: Answers) -> list[Any]:
    """Labels; of tokens with their places."""
    if answers and "entities" in answers[0]:
        return [(token["label"], token["start"], token["end"]) for row in answers for token in row["entities"]]
    return [(row.get("label"), row.get("labels")) for row in answers]


def differences(expected: Answers, exported: Answers) -> dict[str, Any]:
    """How far two sets of answers are apart.

    Returns:
        ``num_texts``; ``max_deviation`` of scores; ``usual_deviation``, within which they are in 999 of 1,000 texts, or
        tokens; ``num_other_labels``.
    """
    different = sum(one != other for one, other in zip(_labels(expected), _labels(exported), strict=True))
    deviations = np.abs(_scores(expected) - _scores(exported))
    largest = deviations.reshape(len(deviations), -1).max(axis=1) if deviations.size else np.zeros(1)
    return {
        "num_texts": len(exported),
        "max_deviation": float(largest.max()),
        "usual_deviation": float(np.quantile(largest, 0.999, method="inverted_cdf")),
        "num_other_labels": different,
    }


def score(examples: Examples, answers: Answers) -> float | None:
    """The task's main metric; None where the texts have no labels."""
    if examples.spec is None or not examples.labels:
        return None
    if examples.tokens is not None:
        return _score_of_tokens(examples, answers)
    # Metrics take logits: of several labels those above 0 hold, of one the largest, whatever the scale.
    spec, scores = examples.spec, _scores(answers)
    if spec.multi_label:
        scores -= HALF if examples.thresholds is None else examples.thresholds
    return spec.compute_metrics(scores, examples.labels)[spec.main_metric]


def _score_of_tokens(examples: Examples, answers: Answers) -> float:
    """The main metric where tokens are labelled: a token has the label of its first piece."""
    spec: Any = examples.spec
    logits, labels = [], []
    for tokens, tags, row in zip(examples.tokens or (), examples.labels or (), answers, strict=True):
        pieces = row["entities"]
        firsts = first_pieces(tokens, [(piece["start"], piece["end"]) for piece in pieces])
        logits.append(np.array([[piece["label"] == name for name in spec.label_names] for piece in pieces], float))
        labels.append([NO_TOKEN if token is None else tags[token] for token in firsts])
    return float(spec.compute_metrics(*by_sentence(logits, labels, range(len(logits))))[spec.main_metric])
