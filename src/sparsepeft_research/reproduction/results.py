"""Result files: which of them count, and writing them without losing one."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from sparsepeft.folders import write_json
from sparsepeft.methods.recipes import Recipe
from sparsepeft.runs.config import OF_RECIPE, defaults_of
from sparsepeft.runs.files import RESULTS_VERSION
from sparsepeft.training import RunConfig
from sparsepeft_research.reproduction.matrix import Run

ABOUT = "reproduction"  # the key under which a result file says more than `train` returns
_ELSEWHERE = ("output_dir", "data_dir", "model", "device")  # not in a result: they differ between machines
# Not compared as they were given, since the recipe that came of them is.
_OF_RECIPE = ("settings", *OF_RECIPE)
_REQUIRED = (
    *("format_version", "task", "method", "seed", "score", "metrics", "parameters", "saved_bytes", "model"),
    *("train_seconds", "steps", "data_fingerprints", "config", ABOUT),
)
# Beside more than this share of the processors' time for others a run's seconds are not its speed.
MAX_OTHERS = 0.1


class StoredResult(NamedTuple):
    """What a run's result file holds.

    Attributes:
        result: its content, if it is this run's.
        problem: why it is not counted, in a few words; None if it is, or if there is no file.
    """

    result: dict[str, Any] | None = None
    problem: str | None = None


def find_result(run: Run) -> StoredResult:
    """Read a run's result file and compare it with what the run would do now."""
    return read_result(run, run.result_file, {})


def read_result(run: Run, path: Path, added: dict[str, Any]) -> StoredResult:
    """The same for a file elsewhere, with something added to its content."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return StoredResult()
    except (OSError, ValueError) as error:
        return StoredResult(problem=f"it is damaged ({error})")
    if isinstance(content, dict):
        content |= added
    problem = _damage(content) or _difference(content, run)
    return StoredResult(problem=problem) if problem else StoredResult(result=content)


def about(run: Run, seconds: float | None, resumed: bool) -> dict[str, Any]:
    """What a result file says under :data:`ABOUT`: the resolved recipe, and how long the whole run took."""
    return {"recipe": vars(run.config.recipe_values()), "seconds": seconds, "resumed": resumed}


def write_result(run: Run, result: dict[str, Any]) -> None:
    """Write a run's result; a file in its place that is not counted is moved aside, never overwritten."""
    if run.result_file.exists():
        number = 1
        while (aside := run.result_file.with_name(f"{run.result_file.name}.stale-{number}")).exists():
            number += 1
        os.replace(run.result_file, aside)
    write_json(run.result_file, result)
    run.error_file.unlink(missing_ok=True)


def same_values(cls: type, before: Any, now: dict[str, Any], ignored: tuple[str, ...] = ()) -> list[str]:
    """Names of the fields of a dataclass in which two JSON forms differ.

    A field that ``before`` lacks has its default there: the file is older than the field.
    """
    if not isinstance(before, dict):
        return ["all values"]
    defaults, current = (json.loads(json.dumps(values)) for values in (defaults_of(cls), now))  # as in the file
    names = [name for name in {**current, **before} if name not in ignored]
    return sorted(name for name in names if before.get(name, defaults.get(name)) != current.get(name))


def _damage(content: Any) -> str | None:
    if not isinstance(content, dict):
        return f"it is damaged (it holds {type(content).__name__}, not an object)"
    missing = [name for name in _REQUIRED if name not in content]
    if missing:
        return f"it is damaged or not a result (it lacks {', '.join(missing)})"
    score = content["score"]
    if not isinstance(score, (int, float)) or not math.isfinite(score):
        return f"it is damaged (its score is {score!r})"
    return None


def _difference(content: dict[str, Any], run: Run) -> str | None:
    if content["format_version"] != RESULTS_VERSION:
        return f"it has format version {content['format_version']}, but {RESULTS_VERSION} is read"
    if content["model"] != run.model:
        return f"it was made with the model {content['model']}, not {run.model}"
    values = same_values(RunConfig, content["config"], run.config.to_dict(), (*_ELSEWHERE, *_OF_RECIPE))
    recipe = content[ABOUT].get("recipe") if isinstance(content[ABOUT], dict) else None
    values += same_values(Recipe, recipe, vars(run.config.recipe_values()))
    if values:
        return f"it was made with other values of {', '.join(dict.fromkeys(values))}"
    if content["data_fingerprints"] != run.facts.fingerprints:
        return "it was made from other data files"
    return None


def read_error(path: Path) -> dict[str, Any]:
    """How a run's last attempt failed."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {"type": content["type"], "message": content["message"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {"type": "unknown", "message": f"{path.name} is damaged ({error})"}


def is_timed(result: dict[str, Any]) -> bool:
    """Whether a run's seconds are its speed: it was not interrupted, and the machine was known to do little else."""
    share = result.get("others_cpu_share")
    return not result[ABOUT].get("resumed") and share is not None and share <= MAX_OTHERS
