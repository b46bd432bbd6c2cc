"""The space of a sweep: a config of ``sparsepeft train`` in which values may be searches, and the trials drawn from it.

Searches have Ray Tune's names and meanings; nothing here needs Ray. A trial is decided by the values of the grids, the
number of its draw and the seed of the draws, so that a sweep that grows keeps the trials that it has. Where the runs'
seed is searched, values are drawn once for all seeds, over which their scores are averaged.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sparsepeft.errors import UserError, unknown_name
from sparsepeft.runs.config import LM, RunConfig, defaults_of
from sparsepeft.runs.config_file import load_config, read_config
from sparsepeft.tasks.spec import CUSTOM

_LISTS = ("grid", "choice")
_RANGES = ("uniform", "loguniform", "randint", "lograndint")
_NESTED = ("settings", "spt")
_MAPPINGS = (*_NESTED, "class_weights")
_DIGITS = 4  # of drawn numbers, so that a name has all of them
_LONGEST_NAME = 120
_SEED = ("seed",)
Key = tuple[str, ...]


@dataclass(frozen=True)
class Search:
    """A value that is searched.

    Attributes:
        kind: ``grid`` tries every value of a list, ``choice`` draws one; ``uniform``, ``loguniform``, ``randint`` and
            ``lograndint`` draw a number of a range, whose end the last two never reach.
        values: the list, or the two ends of the range.
    """

    kind: str
    values: tuple[Any, ...]

    def draw(self, generator: np.random.Generator) -> Any:
        """A value of it."""
        if self.kind in _LISTS:
            return self.values[int(generator.integers(len(self.values)))]
        low, high = self.values
        if self.kind == "randint":
            return int(generator.integers(low, high))
        if self.kind == "uniform":
            return _rounded(generator.uniform(low, high), low, high)
        drawn = math.exp(generator.uniform(math.log(low), math.log(high)))
        return min(int(drawn), high - 1) if self.kind == "lograndint" else _rounded(drawn, low, high)


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        name: of its folder, made of its values.
        group: the task, or the file, whose trials are compared with each other.
        values: what was searched, by name.
        config: of the run.
        data_fingerprints: of the files that it is trained on, by name, once they were read.
    """

    name: str
    group: str
    values: dict[str, Any]
    config: RunConfig
    data_fingerprints: dict[str, str] = field(default_factory=dict)

    def refused(self, error: UserError) -> UserError:
        """What is wrong with the trial's values, said with its name."""
        return _refused(self.name, self.values, error)


@dataclass(frozen=True)
class Space:
    """What a sweep searches.

    Attributes:
        fixed: values of every run.
        searched: by the path of their keys.
    """

    fixed: dict[str, Any]
    searched: dict[Key, Search]

    def trials(self, output_dir: Path, num_samples: int = 1, seed: int = 0) -> list[Trial]:
        """The trials: for each combination of the grids so many draws of the rest, equal ones once.

        Args:
            output_dir: folder of the sweep; each trial has one of its own name in it.
            num_samples: draws for each combination.
            seed: of the draws.

        Raises:
            UserError: the values of a trial cannot be used.
        """
        trials: dict[str, Trial] = {}
        for values in self._draws(num_samples, seed):
            trial = self._trial(values, output_dir)
            trials.setdefault(trial.name, trial)
        return list(trials.values())

    def _draws(self, num_samples: int, seed: int) -> Iterator[dict[Key, Any]]:
        grids = {path: search.values for path, search in self.searched.items() if search.kind == "grid"}
        drawn = {path: search for path, search in self.searched.items() if search.kind != "grid"}
        for combination in itertools.product(*grids.values()):
            fixed = dict(zip(grids, combination, strict=True))
            for number in range(num_samples if drawn else 1):
                decided = [seed, number, [[list(path), value] for path, value in fixed.items() if path != _SEED]]
                generator = np.random.default_rng(int(_digest(decided), 16))
                values = fixed | {path: search.draw(generator) for path, search in drawn.items()}
                yield {path: values[path] for path in self.searched}  # in the order of the file

    def _trial(self, values: Mapping[Key, Any], output_dir: Path) -> Trial:
        flags: dict[str, Any] = {k: dict(v) if k in _NESTED and v else v for k, v in self.fixed.items()}
        for path, value in values.items():
            within = flags if len(path) == 1 else flags.setdefault(path[0], {})
            within[path[-1]] = value
        if flags.get("spt") is not None:
            flags |= {"spt": True, "spt_set": flags["spt"]}
        named = self._names(values)
        name = _folder_name(named)
        try:
            config = load_config(flags | {"score_on": "selection", "output_dir": str((output_dir / name).absolute())})
        except UserError as error:
            raise _refused(name, named, error) from error
        return Trial(name, self._group(config, named), named, config)

    def _group(self, config: RunConfig, named: Mapping[str, Any]) -> str:
        """What a trial is compared within: its task, by the name of the file where that is own data."""
        name = config.task
        if config.task == CUSTOM:
            search = self.searched.get(("train_file",))
            files = [Path(str(file)) for file in (search.values if search else [config.train_file])]
            stems, file = [_stem(each) for each in files], Path(str(config.train_file))
            is_alone = len(set(stems)) == len(files)
            name = _stem(file) if is_alone else f"{file.parent.name}/{_stem(file)}"
        return f"{name}:{_plain(named['label_column'])}" if "label_column" in named else name

    def _names(self, values: Mapping[Key, Any]) -> dict[str, Any]:
        """Values by the last of their keys, or by all of them where two end alike."""
        last = [path[-1] for path in values]
        return {path[-1] if last.count(path[-1]) == 1 else ".".join(path): value for path, value in values.items()}


def read_space(file: Path, data_dir: Path | None = None) -> Space:
    """Read the space of a sweep.

    Args:
        file: YAML or JSON with keys of :class:`sparsepeft.training.RunConfig`. A value, also one below ``settings`` or
            ``spt``, may be ``{grid: [...]}``, ``{choice: [...]}``, ``{uniform: [low, high]}``, ``{loguniform: [low,
            high]}``, ``{randint: [low, high]}`` or ``{lograndint: [low, high]}``.
        data_dir: where the tasks' files are, unless the file says it.

    Raises:
        UserError: there is no such file, it has unknown keys or what a sweep decides, or a search cannot be used.
    """
    content = {key: value for key, value in read_config(file, "space").items() if value is not None}
    valid = defaults_of(RunConfig)
    for key in content:
        if key not in valid:
            raise UserError(f"{file}: " + unknown_name("config key", str(key), valid))
    if "output_dir" in content:
        raise UserError(f"{file} has `output_dir`, but each trial gets a folder of its own; leave it out.")
    if content.pop("score_on", "selection") != "selection":
        raise UserError(
            f"{file} has another `score_on` than selection, but trials are chosen by a tenth of the training data, so "
            "that the held-out scores of the chosen one mean something; leave it out."
        )
    if data_dir is not None and "data_dir" not in content and "train_file" not in content:
        content["data_dir"] = str(data_dir)
    space = Space({}, {})
    for key, value in content.items():
        _sort_in(space, file, (key,), value)
    tasks = space.searched[("task",)].values if ("task",) in space.searched else (space.fixed.get("task"),)
    if LM in tasks:
        raise UserError(f"{file} has the task {LM}, which has no scores to choose by; sweep over labelled texts.")
    return space


def _sort_in(space: Space, file: Path, path: Key, value: Any) -> None:
    """Put a value of the file where it belongs."""
    key = ".".join(path)
    search = _as_search(file, key, value) if isinstance(value, Mapping) else None
    if search is not None:
        space.searched[path] = search
    elif isinstance(value, Mapping) and len(path) == 1 and key in _NESTED:
        space.fixed[key] = {}
        for name, below in value.items():
            _sort_in(space, file, (key, str(name)), below)
    elif isinstance(value, Mapping) and key not in _MAPPINGS:
        kinds = ", ".join(map(str, value))
        raise UserError(f"{file}: {key} is searched by " + unknown_name("search", kinds, (*_LISTS, *_RANGES)))
    elif len(path) == 1:
        space.fixed[key] = value
    else:
        space.fixed[path[0]][path[1]] = value


def _as_search(file: Path, key: str, value: Mapping[Any, Any]) -> Search | None:
    """The search that a mapping stands for; None where it stands for itself.

    Raises:
        UserError: its values cannot be used.
    """
    if len(value) != 1 or next(iter(value)) not in (*_LISTS, *_RANGES):
        return None
    ((kind, given),) = value.items()
    if kind in _LISTS:
        if not isinstance(given, list) or not given:
            raise UserError(f"{file}: {key} has {kind}: {given}, but {kind} takes a list of values, such as [1, 2].")
        return Search(kind, tuple(given))
    is_whole, is_log = kind.endswith("randint"), kind.startswith("log")
    numbers = (int,) if is_whole else (int, float)
    is_range = isinstance(given, list) and len(given) == 2
    if not is_range or not all(isinstance(end, numbers) and not isinstance(end, bool) for end in given):
        what = "whole numbers" if is_whole else "numbers"
        raise UserError(f"{file}: {key} has {kind}: {given}, but {kind} takes two {what}, [low, high].")
    low, high = given
    if not (0 if is_log else -math.inf) < low < high < math.inf:
        above = "0 < low < high" if is_log else "low < high"
        raise UserError(f"{file}: {key} has {kind}: {given}, but {kind} takes [low, high] with {above}.")
    return Search(kind, (low, high))


def _refused(name: str, named: Mapping[str, Any], error: UserError) -> UserError:
    return UserError(f"The trial {name} cannot be run: {error}") if named else error


def _folder_name(named: Mapping[str, Any]) -> str:
    """A folder's name made of a trial's values; where letters cannot be in one, a digest of the values ends it."""
    parts = []
    for key, value in named.items():
        is_file, word = key.endswith("_file"), _plain(value)
        parts.append(_stem(Path(word)) if is_file else word if key == "task" else f"{key}={word}")
    readable = ",".join(parts) or "run"
    safe = re.sub(r"[^\w.+=,-]+", "-", readable)
    if safe == readable and len(safe) <= _LONGEST_NAME and not any(key.endswith("_file") for key in named):
        return safe
    return f"{safe[:_LONGEST_NAME].strip('-.')}-{_digest([[key, value] for key, value in named.items()])[:8]}"


def _stem(file: Path) -> str:
    return file.name.partition(".")[0]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _rounded(drawn: float, low: float, high: float) -> float:
    return min(max(float(f"{drawn:.{_DIGITS}g}"), low), high)
