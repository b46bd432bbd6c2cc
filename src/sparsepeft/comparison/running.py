"""Training each method on the same data, and comparing what comes of it."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import logging
import re
import traceback
from collections.abc import Sequence
from pathlib import Path

from sparsepeft.comparison.measuring import Run, measure, sentence
from sparsepeft.comparison.names import COMPARED, check_names
from sparsepeft.comparison.report import MEASURED, RESULT, Comparison, write_comparison
from sparsepeft.errors import UserError
from sparsepeft.extras import require
from sparsepeft.folders import check_output, locked, refuse_foreign
from sparsepeft.methods.recipes import METHODS
from sparsepeft.runs.config import RunConfig
from sparsepeft.runs.files import describe_run, read_results
from sparsepeft.runs.folder import check_folder, is_finished
from sparsepeft.training.callbacks import Watcher
from sparsepeft.training.data import LabelledData, prepare_data
from sparsepeft.training.fit import training_device
from sparsepeft.training.run import train

logger = logging.getLogger(__name__)
_RUN = re.compile(rf"({'|'.join(METHODS)})-\d+")  # a run's folder


def compare(
    config: RunConfig,
    methods: Sequence[str] = COMPARED,
    seeds: Sequence[int] = (),
    *,
    watcher: Watcher | None = None,
    overwrite: bool = False,
) -> Comparison:
    """Train each method by its recipe on the same data, and compare scores, seconds, bytes and speed.

    Each run is made by :func:`sparsepeft.training.train` in a folder METHOD-SEED of the output folder. Runs that are
    done there, on the same data with the same values, are taken as they are, and one that was interrupted goes on; a
    method that fails is a row that says so. Then all answer through one
    :class:`~sparsepeft.inference.MultiTaskEngine`: the validation rows (the validation file, or a tenth of the training
    file, the same for all), which the scores are of, and test rows where there are some; then the same few texts in
    turn, to be timed. The output folder gets ``comparison.json``, ``comparison.md`` and, where matplotlib is installed,
    a figure.

    Args:
        config: what the runs have in common: task, data, model, steps, ...; its method and seed do not matter, and its
            output folder is that of the comparison.
        methods: some of :data:`sparsepeft.methods.recipes.METHODS`.
        seeds: every method is trained with each of them; without any, with the config's.
        watcher: told about each run.
        overwrite: runs with other values may be replaced.

    Raises:
        UserError: something given cannot be used, another process is writing to the folder, or runs in it have other
            values.
        RunFailed: the folder cannot be written to. Where all methods fail, the first one's error is raised.

    Example:
        >>> from sparsepeft.training import RunConfig
        >>> comparison = compare(RunConfig("topics", "out/compare-topics", max_steps=30), ["head", "spartan"])
        >>> ", ".join(method.method for method in comparison.methods)
        'head, spartan'
    """
    methods, seeds = check_names(config.task, methods), tuple(dict.fromkeys(seeds)) or (config.seed,)
    watcher, folder = watcher or Watcher(), Path(config.output_dir)
    if config.score_on != "validation":
        raise UserError(
            f"`score_on={config.score_on}` was given, but methods are compared on validation; leave `score_on` out."
        )
    configs = {
        method: [
            dataclasses.replace(config, method=method, seed=seed, output_dir=str(folder / _name(method, seed)))
            for seed in seeds
        ]
        for method in methods
    }
    require("datasets", "train", "Training").disable_progress_bars()
    training_device(config.device)
    _check_output(folder)
    data = prepare_data(config)
    assert isinstance(data, LabelledData)  # a language model was refused
    if data.spec.labels_tokens:
        raise UserError(
            f"The task {data.spec.name!r} labels tokens, but methods are compared on labels of whole texts; train it "
            "by `sparsepeft train` with each method."
        )
    with locked(folder):
        every = itertools.chain.from_iterable(configs.values())
        done = {each.output_dir for each in every if _is_done(each, data, overwrite)}
        watcher.begins(len(methods) * len(seeds))
        runs = {
            method: [_run(each, each.output_dir in done, watcher, overwrite) for each in of_method]
            for method, of_method in configs.items()
        }
        return write_comparison(measure(config, data, runs, watcher), folder)


def _name(method: str, seed: int) -> str:
    return f"{method}-{seed}"


def _check_output(folder: Path) -> None:
    """See that the folder is new, empty, or a comparison's.

    Raises:
        UserError: it is not.
        RunFailed: it cannot be written to.
    """
    result = folder / RESULT
    if result.is_file():
        try:
            content = json.loads(result.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = None
        if not isinstance(content, dict) or content.get("measured") != MEASURED:
            refuse_foreign(folder)
    # Runs of other seeds, too, of a comparison that was interrupted before it had a result.
    found = [path.name for path in folder.glob("*-*") if _RUN.fullmatch(path.name) and path.is_dir()]
    check_output(folder, (RESULT, *found), "a comparison", overwrite=True)


def _is_done(config: RunConfig, data: LabelledData, overwrite: bool) -> bool:
    """Whether a run was finished; else it is one that may start, or go on.

    Raises:
        UserError: its folder holds something else.
    """
    run, folder = describe_run(config) | {"data_fingerprints": data.fingerprints}, Path(config.output_dir)
    if is_finished(folder, run, overwrite):
        return True
    check_folder(folder, run, overwrite)
    return False


def _run(config: RunConfig, is_done: bool, watcher: Watcher, overwrite: bool) -> Run:
    folder = Path(config.output_dir)
    try:
        if is_done:
            results = read_results(folder)
        else:
            results = train(config, watcher.callbacks(folder.name), overwrite)
    except Exception as error:  # the boundary between runs: whatever ends one is told, and the others go on
        logger.info("%s failed.", folder.name, exc_info=True)
        watcher.failed(folder.name, {"type": type(error).__name__, "message": sentence(error)})
        traceback.clear_frames(error.__traceback__)  # which hold the model
        return Run(folder, error=error)
    finally:
        gc.collect()  # a Trainer and its model hold each other
    watcher.finished(folder.name, results, here=not is_done)
    return Run(folder, results)
