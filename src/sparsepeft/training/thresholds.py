"""The thresholds of a run whose texts may have several labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsepeft.errors import UserError
from sparsepeft.runs.config import RunConfig
from sparsepeft.runs.config_values import SELECTION
from sparsepeft.tasks import TaskSpec
from sparsepeft.tasks.thresholds import HALF, LEAST_POSITIVES, choose_thresholds

if TYPE_CHECKING:
    import numpy as np


def check_thresholds(spec: TaskSpec, config: RunConfig) -> None:
    """See that a task has what thresholds are for.

    Raises:
        UserError: it has not.
    """
    if config.thresholds != SELECTION and not spec.multi_label:
        has = "a value" if spec.label_names is None else "one label"
        raise UserError(f"`thresholds` was given, but each example of {spec.name} has {has}; leave it out.")


def thresholds_by(
    spec: TaskSpec,
    config: RunConfig,
    answer: tuple[np.ndarray, np.ndarray] | None,
    least_positives: int = LEAST_POSITIVES,
) -> tuple[float, ...] | None:
    """The probability above which each label holds, (C,); None is 0.5 for all, and for tasks without several labels.

    Args:
        spec: the task.
        config: of the run.
        answer: logits and labels, (N, C), of the rows that they are to be chosen on; None where there are none.
        least_positives: see :func:`sparsepeft.tasks.thresholds.choose_thresholds`.
    """
    if not spec.multi_label or config.thresholds == HALF:
        return None
    if config.thresholds != SELECTION:
        return (float(config.thresholds),) * spec.num_labels
    return None if answer is None else choose_thresholds(*answer, least_positives)
