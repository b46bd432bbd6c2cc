"""Result files: one schema, one reader that checks it, one way to write it.

A file is a JSON object. ``measured`` names what was measured, ``seed`` is that of data and weights, ``settings`` what
it was measured with, ``results`` the figures, and ``environment`` has commit, date, versions and hardware
(:func:`sparsepeft.provenance.environment`). Other keys (``notes``, ``left_out``, ...) belong to the kind of
measurement. Files made before there was a schema, and those that ``sparsepeft train`` writes, are read as what they
are.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsepeft.errors import UserError
from sparsepeft.folders import write_json
from sparsepeft.provenance import environment

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "research" / "results"
_ENVIRONMENT = ("commit", "date", "versions", "cpu", "threads")
# What `results` was called in files made before there was a schema.
_FORMER_NAMES = ("results", "groups", "cases", "tasks", "layers", "perplexity")


@dataclass(frozen=True)
class Result:
    """What a result file holds.

    Attributes:
        measured: what was measured: the name of a benchmark or an experiment.
        settings: what it was measured with.
        results: the figures, a list or a mapping.
        environment: commit, date, versions and hardware.
        seed: of data and weights; None where nothing is random, or an early file does not say.
        others: the file's other keys.
    """

    measured: str
    settings: dict[str, Any]
    results: Any
    environment: dict[str, Any]
    seed: int | None = None
    others: dict[str, Any] = field(default_factory=dict)

    @property
    def machine(self) -> str:
        """Processor and threads, in words."""
        return f"{self.environment['cpu']}, {self.environment['threads']} threads"

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a file."""
        described = {"measured": self.measured, "seed": self.seed, "settings": self.settings, "results": self.results}
        return described | self.others | {"environment": self.environment}


def describe_machine(seed: int | None) -> dict[str, Any]:
    """The environment of a benchmark, with how busy the machine was before it began; call it first."""
    return environment() | {"load_average": os.getloadavg()[0], "seed": seed}


def write_result(path: Path, result: Result) -> None:
    """Write a result file, whole or not at all."""
    write_json(path, result.to_dict())


def read_result(path: Path) -> Result:
    """Read a result file of any time.

    Raises:
        UserError: it cannot be read, or does not say when, by what code and on which machine it was made.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        made_on = content["environment"]
        missing = [name for name in _ENVIRONMENT if name not in made_on]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a result file ({error!r}); pass a JSON file that a benchmark wrote.") from error
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)} in its `environment`; measure again.")
    others = {key: value for key, value in content.items() if key != "environment"}
    settings = others.pop("settings", None) or others.get("config") or {}
    if "measured" not in content:  # settings stood among the figures
        settings |= {key: value for key, value in others.items() if isinstance(value, str | int | float)}
    seed = others.pop("seed", settings.get("seed", made_on.get("seed")))
    name = next((name for name in _FORMER_NAMES if name in others), None)
    results = dict(others) if name is None else others.pop(name)
    return Result(others.pop("measured", path.stem), settings, results, made_on, seed, others)


def read_folder(folder: Path, pattern: str = "*.json") -> dict[str, Result]:
    """All result files of a folder, by name without suffix, sorted."""
    return {file.stem: read_result(file) for file in sorted(folder.glob(pattern))}
