"""The paper's protocols as run configs: all of a task's training data, a few hundred examples of it, a grid search."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sparsepeft.errors import UserError
from sparsepeft.runs.config import RunConfig
from sparsepeft.tasks import task_spec

# Appendices A and B of arXiv:2211.16634.
FEW_SHOT_EXAMPLES = 200
GRID_LEARNING_RATES = (2e-5, 1e-4, 1e-3)
GRID_EPOCHS = (3, 20)
GRID_SIZES = {
    "spartan": ("num_parents", (12, 16)),
    "pfeiffer": ("reduction_factor", (12, 16)),
    "houlsby": ("reduction_factor", (12, 16)),
}
SEARCHED = ("learning_rate", "epochs", "settings")  # the fields of a config in which the points of a grid differ


def full_data(
    task: str, method: str, seed: int, output_dir: str | Path, max_epochs: float | None = None, **values: Any
) -> RunConfig:
    """Train on all examples for the task's number of epochs; the paper's table 1.

    Args:
        task, method, seed, output_dir: as in :class:`RunConfig`.
        max_epochs: train no longer than this.
        **values: further fields of :class:`RunConfig`.

    Raises:
        UserError: a value cannot be used, or ``few_shot`` is among them.
    """
    if values.get("few_shot") is not None:
        raise UserError(f"few_shot={values['few_shot']} was given to the full-data protocol; leave it out.")
    if max_epochs is not None and max_epochs <= 0:
        raise UserError(f"max_epochs={max_epochs} was given, but it must be a positive number.")
    config = RunConfig(task=task, method=method, seed=seed, output_dir=str(output_dir), **values)
    epochs = config.epochs or config.recipe_values().epochs or task_spec(task).paper_epochs
    # Always written out, so that a cap above a task's own epochs changes nothing about its run.
    return dataclasses.replace(config, epochs=min(epochs, max_epochs or epochs))


def few_shot(
    task: str, method: str, seed: int, output_dir: str | Path, num_examples: int = FEW_SHOT_EXAMPLES, **values: Any
) -> RunConfig:
    """Train 1000 steps on a few examples, stratified by label and drawn by ``seed``; the paper's tables 2 and 3.

    Args:
        task, method, seed, output_dir: as in :class:`RunConfig`.
        num_examples: the paper's K.
        **values: further fields of :class:`RunConfig`; ``max_steps`` replaces the 1000.

    Raises:
        UserError: a value cannot be used, or one is given that this protocol decides.
    """
    fixed = [name for name in ("epochs", "max_train_samples") if values.get(name) is not None]
    if fixed:
        raise UserError(
            f"{' and '.join(fixed)} came with the few-shot protocol, which counts examples and steps; use few_shot and "
            "max_steps."
        )
    return RunConfig(task=task, method=method, seed=seed, output_dir=str(output_dir), few_shot=num_examples, **values)


def grid_search(
    task: str,
    method: str,
    seed: int,
    output_dir: str | Path,
    num_examples: int | None = None,
    max_epochs: float | None = None,
    **values: Any,
) -> dict[str, RunConfig]:
    """The points of the paper's grid, each scored on a tenth of the training data; the validation set is not touched.

    Learning rate for all methods, reduction factor or number of parents where a method has one, epochs where all data
    are trained on (few-shot runs count steps).

    Args:
        task, method, seed, output_dir: as in :class:`RunConfig`; each point has a folder of its own name in it.
        num_examples: K of the few-shot protocol; None is the full-data protocol.
        max_epochs: cap on the epochs; points that it makes equal are one.
        **values: further fields of :class:`RunConfig`.

    Returns:
        Configs by name, such as ``"lr1e-3-num_parents12-epochs3"``.

    Raises:
        UserError: a value cannot be used, or is searched.
    """
    size, sizes = GRID_SIZES.get(method, ("", (None,)))
    settings = values.pop("settings", None) or {}
    fixed = [name for name in ("learning_rate", "epochs") if values.get(name) is not None]
    fixed += [size] if size in settings else []
    if fixed:
        raise UserError(f"{' and '.join(fixed)} came with a grid search, which looks for the best one; leave it out.")
    configs = {}
    for rate in GRID_LEARNING_RATES:
        for value in sizes:
            point: dict[str, Any] = {
                "learning_rate": rate,
                "settings": settings | ({size: value} if size else {}),
                "score_on": "selection",
            }
            name = f"lr{rate:.0e}".replace("e-0", "e-") + (f"-{size}{value}" if size else "")
            if num_examples is not None:
                configs[name] = few_shot(task, method, seed, Path(output_dir) / name, num_examples, **values, **point)
                continue
            if values.get("max_steps") is not None:  # which decides alone how long a run is
                configs[name] = full_data(task, method, seed, Path(output_dir) / name, max_epochs, **values, **point)
                continue
            for epochs in dict.fromkeys(min(epochs, max_epochs or epochs) for epochs in GRID_EPOCHS):
                full = f"{name}-epochs{epochs:g}"
                configs[full] = full_data(task, method, seed, Path(output_dir) / full, epochs=epochs, **values, **point)
    return configs
