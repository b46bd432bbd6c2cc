"""What came of a sweep: its trials by task, best first, and a config for the best of each."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sparsepeft.folders import write_bytes, write_json
from sparsepeft.provenance import environment
from sparsepeft.reprs import duration
from sparsepeft.runs.config import RunConfig, defaults_of
from sparsepeft.sweeps.files import DONE, LEFT, STOPPED, SWEEP, Standing
from sparsepeft.sweeps.space import Space

if TYPE_CHECKING:
    from sparsepeft.sweeps.running import SweepOptions

BEST = "best"
_VERSION = 1
_ORDER = (DONE, STOPPED)  # the others have no score
_NOT_TRAINED_AGAIN = ("output_dir", "score_on")


@dataclass(frozen=True)
class Sweep:
    """What came of a sweep.

    Attributes:
        trials: by task, finished ones first, best first.
        best: the finished trial of each task with the best values; where seeds are searched, by their mean.
        configs: of these, for ``sparsepeft train --config``.
        file: ``sweep.json``.
        content: its content.
    """

    trials: tuple[Standing, ...]
    best: dict[str, Standing]
    configs: dict[str, Path]
    file: Path
    content: dict[str, Any]

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of trials that failed by no fault of their values, or are left."""
        return tuple(each.trial.name for each in self.trials if each.state in ("failed", LEFT))

    def cells(self) -> tuple[tuple[str, ...], list[list[str]]]:
        """A table: its header, and a row for each trial, numbers as texts."""
        keys = [key for key in dict.fromkeys(key for each in self.trials for key in each.trial.values) if key != "task"]
        has_tasks = len({each.trial.group for each in self.trials}) > 1
        header = (*(["task"] if has_tasks else []), *keys, "score", "state", "steps", "time")
        return header, [self._row(each, keys, has_tasks) for each in self.trials]

    def _row(self, each: Standing, keys: Sequence[str], has_task: bool) -> list[str]:
        values = each.trial.values
        return [
            *([each.trial.group] if has_task else []),
            *(str(values.get(key, "")) for key in keys),
            "" if each.score is None else f"{each.score:.4f}",
            BEST if self.best.get(each.trial.group) is each else each.state,
            "" if each.steps is None else f"{each.steps}/{each.max_steps}",
            "" if each.seconds is None else duration(each.seconds),
        ]


def write_sweep(output_dir: Path, space: Space, options: SweepOptions, standings: Sequence[Standing]) -> Sweep:
    """Rank the trials, and write ``sweep.json`` and the configs of the best."""
    groups = list(dict.fromkeys(each.trial.group for each in standings))
    ranked = sorted(standings, key=lambda each: (groups.index(each.trial.group), *_rank(each)))
    best = _best(ranked)
    configs = {group: output_dir / BEST / f"{_file_name(group)}.yaml" for group in best}
    for group, path in configs.items():
        write_bytes(path, _best_config(best[group], output_dir / BEST / _file_name(group)).encode())
    content = {
        "format_version": _VERSION,
        "space": {
            "fixed": space.fixed,
            "searched": {".".join(k): {s.kind: s.values} for k, s in space.searched.items()},
        },
        "options": dataclasses.asdict(options),
        "best": {group: each.trial.name for group, each in best.items()},
        "trials": [each.to_dict() for each in ranked],
        "environment": environment(),
    }
    write_json(output_dir / SWEEP, content)
    return Sweep(tuple(ranked), best, configs, output_dir / SWEEP, content)


def _best(ranked: Sequence[Standing]) -> dict[str, Standing]:
    """The finished trial of each task whose values are best, by the mean of the seeds that were finished with them."""
    done = [each for each in ranked if each.state == DONE]
    scores: dict[str, list[float]] = {}
    for each in done:
        scores.setdefault(_but_seed(each), []).append(-_rank(each)[1])
    best: dict[str, Standing] = {}
    for each in sorted(done, key=lambda each: -statistics.mean(scores[_but_seed(each)])):
        best.setdefault(each.trial.group, each)
    return best


def _but_seed(each: Standing) -> str:
    values = {key: value for key, value in each.trial.values.items() if key != "seed"}
    return json.dumps([each.trial.group, values], default=str)


def _rank(each: Standing) -> tuple[int, float]:
    place = _ORDER.index(each.state) if each.state in _ORDER else len(_ORDER)
    return place, math.inf if each.score is None or math.isnan(each.score) else -each.score


def _best_config(best: Standing, output_dir: Path) -> str:
    """A config file that trains the best trial again, to be scored on what no trial has seen."""
    values, defaults = best.trial.config.to_dict(), defaults_of(RunConfig)
    chosen = {
        key: value
        for key, value in values.items()
        if key not in _NOT_TRAINED_AGAIN and value != _plain(defaults[key]) and value is not None
    }
    dumped: str = yaml.safe_dump(chosen | {"output_dir": str(output_dir)}, sort_keys=False, allow_unicode=True)
    return f"# The best of a sweep: {best.trial.name}, {best.metric} {best.score:.4f} on the selection part.\n{dumped}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _file_name(group: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", group)
