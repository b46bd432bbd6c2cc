"""The paper's Figure 2: which topics the parent cells of the last memory specialise in, on BBC News."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsepeft.errors import UserError
from sparsepeft.inspection.collect import find_memories
from sparsepeft.inspection.figures import label_figure, save_figure
from sparsepeft.inspection.page import check_folder, write_inspection
from sparsepeft.inspection.report import MemoryReport
from sparsepeft.inspection.run import inspect_run
from sparsepeft.plotting import require_matplotlib
from sparsepeft.runs.files import RESULTS, read_run
from sparsepeft.training import RunConfig, train
from sparsepeft.training.callbacks import RunPlan

TITLE = "What the parent cells have learned: BBC News, 5 parents with 1 child each"
_NOT_COMPARED = ("output_dir", "data_dir")  # may differ between machines


class AnnealTopK(TrainerCallback):
    """Lets K fall from P to the config's ``top_k``, in equal steps over the first half of the training.

    A parent that never comes among the first few gets no gradient and stays where it was drawn; with K = P at first all
    of them find their place. It depends on the step alone, so an interrupted training goes on as it would have.
    """

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the K of every memory of the model in ``kwargs``."""
        model = kwargs["model"]
        least = model.peft_config[model.active_adapter].top_k
        for layer in find_memories(model):
            most = layer.memory.num_parents
            fallen = int(2 * state.global_step / state.max_steps * (most - least + 1))
            layer.memory.top_k = max(least, most - fallen)


def reproduce_figure2(
    output_dir: Path,
    *,
    top_k: int = 2,
    anneal: bool = True,
    epochs: float = 10,
    recipe: str = "paper",
    settings: dict[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    announce: Callable[[RunPlan], None] = lambda plan: None,
    **values: Any,
) -> MemoryReport:
    """Train, unless that is done, inspect the test part, and write figure, page and numbers.

    Source: arXiv:2211.16634, section 5 and appendix D. Differs: the paper uses a BERT-small and does not give K. With
    K = 1 the renormalised weight is always 1 and the parents get no gradient, so two are kept here and the first of
    them is looked at.

    Args:
        output_dir: gets ``figure2.png`` and ``figure2.svg`` (the last layer), what :func:`write_inspection` writes, and
            the trained run in ``run``, or ``run-annealed``.
        top_k: K.
        anneal: let K fall from 5 to ``top_k`` while training, see :class:`AnnealTopK`.
        epochs: passes over the training part.
        recipe: where learning rate and schedule come from.
        settings: further keys of the memory's config or of the optimisation.
        callbacks: shown loss and metrics while training.
        announce: told what the training is about to do.
        values: further fields of :class:`sparsepeft.training.RunConfig`.

    Returns:
        The report over all layers, with that of an untrained memory.

    Raises:
        UserError: the folder holds another run, matplotlib is missing, or something given cannot be used.
        RunFailed: training could not be finished.
    """
    require_matplotlib()
    check_folder(output_dir, "run", "run-annealed")
    run = output_dir / ("run-annealed" if anneal else "run")
    memory = {"num_parents": 5, "num_children": 1, "top_k": top_k}
    config = RunConfig(
        task="bbc-news", output_dir=str(run), epochs=epochs, recipe=recipe, settings=memory | (settings or {}), **values
    )
    if not _is_done(run, config):
        train(config, [*callbacks, AnnealTopK()] if anneal else callbacks, announce=announce)
    report = inspect_run(run, split="test", data_dir=config.data_dir, model=config.model, compare_untrained=True)
    # What the run was made with, without the places on this machine.
    made_with = {key: value for key, value in config.to_dict().items() if key not in (*_NOT_COMPARED, "model")}
    report = dataclasses.replace(report, source=report.source | {"annealed": anneal, "config": made_with})
    write_inspection(report, output_dir, TITLE)
    save_figure(label_figure(report.layers[-1]), output_dir / "figure2")
    return report


def _is_done(run: Path, config: RunConfig) -> bool:
    if not (run / RESULTS).exists():
        return False
    before, now = read_run(run)["config"], config.to_dict()
    differing = sorted(key for key in now if key not in _NOT_COMPARED and before.get(key, now[key]) != now[key])
    if differing:
        raise UserError(
            f"{run} holds a finished run with other values of {', '.join(differing)}; pass another `output_dir`, or "
            "remove that folder."
        )
    return True
