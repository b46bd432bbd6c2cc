"""From a prediction to scores of labels."""

from __future__ import annotations

import math
from typing import Any, Literal

from sparsepeft.inference import Prediction, TaskInfo
from sparsepeft_serve.errors import ServiceError, kind_of

Function = Literal["none", "sigmoid", "softmax"]
VALUE = "LABEL_0"  # what transformers calls the only output of a regression


def label_names(info: TaskInfo) -> tuple[str, ...]:
    """Of a task's outputs."""
    return info.label_names or (VALUE,)


def label_of(prediction: Prediction, info: TaskInfo) -> str:
    """The likeliest label; that of a task's only output where it predicts a value."""
    return label_names(info)[0] if prediction.label is None else prediction.label


def check_labels_texts(task: str, info: TaskInfo) -> None:
    """See that a task can be asked for scores of a text.

    Raises:
        ServiceError: it labels tokens.
    """
    if info.labels_tokens:
        raise ServiceError(
            f"The task {task!r} labels tokens, and was asked for the scores of a text; post to /tasks/{task}, as "
            "InferenceClient.token_classification does, or to /v1/predict_all."
        )


def scores(prediction: Prediction, info: TaskInfo, function: Function | None = None) -> list[float]:
    """A number for each output of a task, in the task's order.

    Args:
        prediction: of the task.
        info: of the task.
        function: of the logits; None is the task's own: softmax, sigmoid where several labels may hold, none for a
            value.
    """
    logits = list(prediction.logits)
    if function is None:
        return list(prediction.scores.values()) if info.label_names else logits
    if function == "sigmoid":
        return [_sigmoid(value) for value in logits]
    if function == "softmax":
        largest = max(logits)
        powers = [math.exp(value - largest) for value in logits]
        total = sum(powers)
        return [power / total for power in powers]
    return logits


def ranked(prediction: Prediction, info: TaskInfo, function: Function | None = None) -> list[dict[str, Any]]:
    """``{"score", "label"}`` of each output, the best first."""
    pairs = zip(scores(prediction, info, function), label_names(info), strict=True)
    return [{"score": score, "label": label} for score, label in sorted(pairs, key=lambda pair: -pair[0])]


def raised(prediction: Prediction) -> Prediction:
    """The prediction, if it is one.

    Raises:
        ServiceError: the input could not be answered.
    """
    if prediction.error is not None:
        raise ServiceError(prediction.error, kind_of(prediction.error))
    return prediction


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
