"""The Dockerfile, as far as it can be followed without Docker."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = ("opt", "source", "wheels", "data", "run")  # at the root of the image, which its steps name
_PATH = re.compile(rf"(?<![\w.:/])/(?=(?:{'|'.join(_FOLDERS)})\b)")
_HERE = re.compile(r"HOME$|LANG$|PIP_|SSL_|\w+_proxy$", re.IGNORECASE)


class Step(NamedTuple):
    """An instruction and what stands behind it."""

    name: str
    argument: str

    @property
    def words(self) -> list[str]:
        """Of a list in JSON, or divided by spaces."""
        _, start, rest = self.argument.partition('["')
        return json.loads(start + rest) if start else self.argument.split()


def read_steps(file: Path = ROOT / "Dockerfile") -> list[Step]:
    """The instructions, in order."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [Step(*line.split(maxsplit=1)) for line in joined if line.strip()]


def only(name: str) -> Step:
    """The instruction of that name of the last stage, which is the image."""
    steps = read_steps()
    start = max(place for place, step in enumerate(steps) if step.name == "FROM")
    (step,) = (step for step in steps[start:] if step.name == name)
    return step


class Image:
    """A folder in the place of an image: paths at its root that steps name lie inside the folder.

    The interpreter is the one at hand, the user too, and ``FROM`` brings nothing.

    Args:
        root: the folder.
        arguments: of the build, as ``--build-arg`` gives them.
    """

    def __init__(self, root: Path, arguments: Mapping[str, str] = {}) -> None:
        self.root, self._former, self._arguments = root, root.with_name(f"{root.name}.build"), dict(arguments)
        self.folder, self.variables = root, {}

    def inside(self, text: str) -> str:
        """The text with its paths inside the folder."""
        return _PATH.sub(f"{self.root}/", text)

    @property
    def environment(self) -> dict[str, str]:
        """Of the steps, and of what runs in the image: theirs, and of this machine's where packages come from."""
        here = {name: value for name, value in os.environ.items() if _HERE.match(name)}
        return here | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | self.variables

    def build(self) -> None:
        """Follow the steps."""
        for step in read_steps():
            if method := getattr(self, f"_{step.name.lower()}", None):
                method(step)

    def _from(self, step: Step) -> None:
        """What a stage made is left behind, but for what the next one copies."""
        if self.root.exists():
            self.root.rename(self._former)
        self.root.mkdir()
        self.folder = self.root
        self.variables.clear()

    def _workdir(self, step: Step) -> None:
        self.folder = Path(self.inside(step.argument))
        self.folder.mkdir(parents=True, exist_ok=True)

    def _arg(self, step: Step) -> None:
        name, _, default = step.argument.partition("=")
        self.variables[name] = self._arguments.get(name, default)

    def _env(self, step: Step) -> None:
        for pair in step.words:
            name, _, value = pair.partition("=")
            self.variables[name] = self.inside(value).replace("$PATH", self.environment["PATH"])

    def _run(self, step: Step) -> None:
        subprocess.run(["sh", "-ec", self.inside(step.argument)], cwd=self.folder, env=self.environment, check=True)

    def _copy(self, step: Step) -> None:
        *sources, target = (word for word in step.words if not word.startswith("--"))
        if step.argument.startswith("--from="):
            # Environments do not like to be moved: it has to come to where it was.
            if sources != [target]:
                raise ValueError(f"COPY {step.argument} moves what another stage made; copy it to the same path.")
            Path(self.inside(target)).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(self._former / target.lstrip("/"), self.inside(target))
            return
        for source in sources:
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
                shutil.copytree(ROOT / source, self.folder / target, ignore=ignored)
            else:
                shutil.copy(ROOT / source, self.folder / target)
