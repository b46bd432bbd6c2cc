"""A sweep from start to finish: what is left is run on a cluster, and what came of it is written."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsepeft.arguments import check_number, check_whole
from sparsepeft.backbones import resolve_model
from sparsepeft.clusters import check_room, local_or
from sparsepeft.devices import find_device
from sparsepeft.errors import UserError
from sparsepeft.extras import require
from sparsepeft.folders import UNFINISHED, check_output, locked, remove
from sparsepeft.methods.models import adapter_config, load_model_config
from sparsepeft.runs.config import DATA_FIELDS
from sparsepeft.runs.files import CHECKPOINTS
from sparsepeft.runs.folder import check_folder
from sparsepeft.runs.held_out import load_task_data
from sparsepeft.sweeps.files import (
    DIVERGED,
    DONE,
    STOPPED,
    SWEEP,
    Standing,
    described,
    forget,
    standing_of,
    write_stopped,
)
from sparsepeft.sweeps.report import Sweep, write_sweep
from sparsepeft.sweeps.space import Space, Trial
from sparsepeft.sweeps.telling import tell
from sparsepeft.training.callbacks import Watcher

_SCRATCH = ".tune"  # of Ray Tune, which is told nothing that is not in the trials' folders, too
_PURPOSE = "A sweep"
_VARIABLES = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # trials write files of their own
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends this program
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints even if told not to
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep is run.

    Args:
        num_samples: draws for each combination of the space's grids.
        seed: of the draws; the runs' own is a value of the space.
        asha: stop trials early whose scores are behind those of the same task.
        grace_period: share of its steps that every trial does.
        reduction_factor: of the trials that come to a rung one in so many goes on; the next rung is at so many times
            the steps.
        max_concurrent: trials at once; None is as many as the cluster has room for.
        cpus_per_trial, gpus_per_trial: that a trial needs; it computes with as many threads as CPUs.
        max_failures: how often a trial is started again whose worker process dies.

    Raises:
        UserError: a value is out of its range.
    """

    num_samples: int = 1
    seed: int = 0
    asha: bool = True
    grace_period: float = 0.1
    reduction_factor: float = 3
    max_concurrent: int | None = None
    cpus_per_trial: int = 1
    gpus_per_trial: float = 0
    max_failures: int = 3

    def __post_init__(self) -> None:
        for name in ("num_samples", "cpus_per_trial"):
            check_whole(name, getattr(self, name))
        for name in ("seed", "max_failures"):
            check_whole(name, getattr(self, name), least=0)
        if self.max_concurrent is not None:
            check_whole("max_concurrent", self.max_concurrent)
        check_number("grace_period", self.grace_period, least=0.01, most=1)
        check_number("reduction_factor", self.reduction_factor, above=1)
        check_number("gpus_per_trial", self.gpus_per_trial, least=0)


def plan_sweep(space: Space, output_dir: Path, options: SweepOptions, overwrite: bool = False) -> list[Standing]:
    """The trials of a sweep and how they stand; changes nothing.

    Args:
        space: what is searched.
        output_dir: folder of the sweep.
        options: which decide what is drawn.
        overwrite: runs in the folder that have other values may be replaced.

    Raises:
        UserError: values, data or the folder cannot be used.
    """
    trials = space.trials(output_dir, options.num_samples, options.seed)
    check_output(output_dir, (SWEEP,), "a sweep", overwrite=True)
    checked: dict[tuple[str, str | None], Any] = {}
    standings = []
    for trial in trials:
        try:
            trial = dataclasses.replace(trial, data_fingerprints=_check(trial, options, checked))
            standing = standing_of(trial, overwrite)
            if standing.state != DONE:
                check_folder(Path(trial.config.output_dir), described(trial), overwrite)
        except UserError as error:
            raise trial.refused(error) from error
        standings.append(standing)
    return standings


def _check(trial: Trial, options: SweepOptions, checked: dict[tuple[str, str | None], Any]) -> dict[str, str]:
    """Find what is wrong with a trial before the first run; returns the fingerprints of its data.

    Args:
        trial: is looked at.
        options: of the sweep.
        checked: what came of loading models' configs and tasks' data, which is done once for each.

    Raises:
        UserError: something is.
    """
    config = trial.config
    adapter_config(config.method, config.recipe_values().adapter)
    if config.device is None or not config.device.startswith("cuda"):
        find_device(config.device)
    elif not options.gpus_per_trial:
        raise UserError(
            f"`device={config.device}` was given, but trials get no GPU; pass `gpus_per_trial`, or leave `device` out."
        )
    data = ("task", repr([config.task, *(getattr(config, name) for name in DATA_FIELDS)]))
    for what, load in (
        (("model", config.model), lambda: load_model_config(resolve_model(config.model))),
        (data, lambda: dict(load_task_data(config).fingerprints)),
    ):
        if what not in checked:
            checked[what] = load()
    fingerprints: dict[str, str] = checked[data]
    return fingerprints


def sweep(
    space: Space,
    output_dir: Path,
    options: SweepOptions | None = None,
    *,
    address: str | None = None,
    watcher: Watcher | None = None,
    overwrite: bool = False,
) -> Sweep:
    """Run the trials of a space on a Ray cluster, each as :func:`sparsepeft.training.train` would run it.

    Each trial has a folder of its own, with the files of any run. It is scored on a tenth of its training data; the
    validation and the test part are not looked at. Trials that are done, were stopped or have diverged are not run
    again when the same sweep is started again, and interrupted ones go on from their last checkpoints. A trial whose
    worker process dies is started again.

    The output folder gets ``sweep.json``, which ranks the trials of each task, and for each task ``best/TASK.yaml``, a
    config that trains the best of them and scores it on the held-out parts.

    Args:
        space: what is searched, from :func:`sparsepeft.sweeps.read_space`.
        output_dir: folder of the sweep; on a cluster of several machines one that all of them see.
        options: how it is run.
        address: of a running cluster, see :func:`sparsepeft.clusters.local_or`; None starts one here.
        watcher: told about each trial.
        overwrite: runs in the folder that have other values may be replaced.

    Raises:
        UserError: something given cannot be used, or Ray is missing.
        RunFailed: the folder cannot be written to.
    """
    options, watcher, output_dir = options or SweepOptions(), watcher or Watcher(), output_dir.absolute()
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    require("ray.tune", "ray", _PURPOSE)
    if address is not None and address.startswith("ray://"):
        raise UserError(
            f"`address={address}` is one for Ray's client, but a sweep is started on a machine of the cluster, whose "
            "folders it works with; pass HOST:6379 there."
        )
    plan = plan_sweep(space, output_dir, options, overwrite)
    left = [each.trial for each in plan if not _is_over(each, options)]
    names = {trial.name for trial in left}
    with locked(output_dir):
        write_sweep(output_dir, space, options, plan)
        watcher.begins(len(plan))
        for standing in plan:
            if standing.trial.name not in names:
                tell(watcher, standing, here=False)
        if left:
            with local_or(address, _PURPOSE) as ray:
                needed = {"cpus_per_trial": options.cpus_per_trial, "gpus_per_trial": options.gpus_per_trial}
                check_room(ray, address, **needed)
                remove(output_dir / _SCRATCH)  # of a sweep that was killed
                try:
                    _run(left, [each for each in plan if each.trial.name not in names], options, watcher, overwrite)
                finally:
                    remove(output_dir / _SCRATCH)
        standings = [standing_of(each.trial, overwrite) for each in plan]
        for standing in standings:
            if standing.state == STOPPED:  # of which nothing goes on
                remove(Path(standing.trial.config.output_dir) / UNFINISHED / CHECKPOINTS)
        return write_sweep(output_dir, space, options, standings)


def _is_over(standing: Standing, options: SweepOptions) -> bool:
    return standing.state in (DONE, DIVERGED) or (standing.state == STOPPED and options.asha)


def _run(
    left: Sequence[Trial],
    over: Sequence[Standing],
    options: SweepOptions,
    watcher: Watcher,
    overwrite: bool,
) -> None:
    """Run trials on the cluster that this process is connected to."""
    from ray import tune

    from sparsepeft.sweeps.scheduler import HalvingByTask
    from sparsepeft.sweeps.watching import Watching
    from sparsepeft.sweeps.worker import final_result, past_results, run_trial

    trials = {trial.name: trial for trial in left}
    scheduler = None
    if options.asha:
        groups = {trial.name: trial.group for trial in [*left, *(each.trial for each in over)]}
        scheduler = HalvingByTask(
            groups,
            100 * options.grace_period,
            options.reduction_factor,
            on_stop=lambda name, result: write_stopped(trials[name], result),
        )
        for each in over:
            if each.max_steps is not None:
                finals = [final_result(each)] if each.state == DONE else []
                scheduler.remember(each.trial.name, [*past_results(each.trial, each.max_steps, each.steps), *finals])
    for trial in left:
        forget(trial)
    threads, resources = options.cpus_per_trial, {"cpu": options.cpus_per_trial, "gpu": options.gpus_per_trial}
    run = tune.with_parameters(run_trial, trials=trials, threads=threads, overwrite=overwrite)
    tuner = tune.Tuner(
        tune.with_resources(run, resources),
        param_space={"name": tune.grid_search(list(trials))},
        tune_config=tune.TuneConfig(
            scheduler=scheduler,
            max_concurrent_trials=options.max_concurrent,
            reuse_actors=True,  # which saves the seconds that PyTorch takes to load
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(Path(left[0].config.output_dir).parent / _SCRATCH),
            failure_config=tune.FailureConfig(max_failures=options.max_failures),
            callbacks=[Watching(trials, watcher, options.max_failures)],
            verbose=0,
        ),
    )
    tuner.fit()
