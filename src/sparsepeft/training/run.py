"""A training run: data, model, fit, report. Each step hands one frozen object to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import TaskType
from transformers import TrainerCallback

from sparsepeft.extras import require
from sparsepeft.folders import UNFINISHED, write_json
from sparsepeft.launch import is_first
from sparsepeft.methods.models import adapter_config
from sparsepeft.runs.card import write_model_card
from sparsepeft.runs.config import RunConfig
from sparsepeft.runs.files import HISTORY, LOGS, PLAN, RESULTS, RUN, THRESHOLDS, describe_run
from sparsepeft.runs.folder import interrupted_values, open_run
from sparsepeft.runs.held_out import write_held_out
from sparsepeft.training.callbacks import Announcer, Recorder, RunPlan, make_reporters
from sparsepeft.training.data import prepare_data
from sparsepeft.training.fit import fit, training_device
from sparsepeft.training.model import build_model
from sparsepeft.training.processes import connect, wait
from sparsepeft.training.report import save_and_score


def train(
    config: RunConfig,
    callbacks: Sequence[TrainerCallback] = (),
    overwrite: bool = False,
    announce: Callable[[RunPlan], None] = lambda plan: None,
) -> dict[str, Any]:
    """Train, save, score what was saved once.

    On labelled texts, the best checkpoint is chosen on a tenth of the training data, and so are the probabilities above
    which labels hold where a text may have several. A language model (``task="lm"``) is trained on blocks of its text
    (see :mod:`sparsepeft.runs.corpus`), and its perplexity on the validation text is measured before and after. With
    ``spt`` the model is made sparse first, calibrated on a few training examples.

    The output folder then holds the weights (for adapters: adapter, head and what makes the model sparse), ``run.json``
    (the resolved config), ``results.json`` and a model card. They come there together, when the run is finished; until
    then it works in a part of the folder. A run that was interrupted goes on from its last complete checkpoint when it
    is started again with the same config and data.

    Several processes that `accelerate launch` or `torchrun` started train one run together: each takes its share of a
    batch, and the first one writes.

    Args:
        config: what to do.
        callbacks: shown loss and metrics as they come.
        overwrite: take the place of another run in the output folder, which stays as it is until this one is finished.
        announce: told what the run is about to do, when all is loaded.

    Returns:
        The results, as in ``results.json``.

    Raises:
        UserError: the config, its data or its model cannot be used.
        RunFailed: the loss diverged, or a file could not be written; the last good checkpoint is left.

    Example:
        >>> from sparsepeft.training import RunConfig, train
        >>> results = train(RunConfig("topics", "out/first"))
        >>> sorted(results["metrics"])
        ['test', 'validation']
    """
    require("datasets", "train", "Training").disable_progress_bars()
    folder = Path(config.output_dir)
    # What can be refused is refused before data and weights are read.
    task_type = TaskType.CAUSAL_LM if config.is_language_model else TaskType.SEQ_CLS
    adapter_config(config.method, config.recipe_values().adapter, task_type=task_type)
    connect(training_device(config.device))
    reporters = make_reporters(config.report_to, folder / UNFINISHED / LOGS)
    run = describe_run(config)
    with _open_run(folder, run, overwrite) as begin:
        data = prepare_data(config)
        built = build_model(config, data, interrupted_values(folder, run).get(PLAN))
        described = run | data.run_values | built.run_values
        work = begin(described)
        if is_first():
            write_held_out(work, data.held_out)
        watching = [Announcer(announce, config, data), Recorder(work / HISTORY), *reporters, *callbacks]
        fitted = fit(config, data, built, work, watching)
        results = save_and_score(config, data, built, fitted, work)
        if is_first():
            if THRESHOLDS in results:  # which the trained model decides
                write_json(work / RUN, described | {THRESHOLDS: results[THRESHOLDS]})
            write_json(work / RESULTS, results)
            write_model_card(work)
    return results


@contextmanager
def _open_run(folder: Path, run: dict[str, Any], overwrite: bool) -> Iterator[Callable[[dict[str, Any]], Path]]:
    """Hold a run's folder in the first process; the others go where it works, when it is there, until it is done."""
    if is_first():
        with open_run(folder, run, overwrite) as begin:

            def begin_all(described: dict[str, Any]) -> Path:
                work = begin(described)
                wait()
                return work

            yield begin_all
    else:

        def follow(described: dict[str, Any]) -> Path:
            wait()
            return folder / UNFINISHED

        yield follow
    wait()
