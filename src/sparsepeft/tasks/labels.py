"""What the labels of a local file mean: classes or values."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Final

from sparsepeft.tasks.errors import TaskError

# Not int() and float() alone: these also take "1_000", which is a name rather than a number.
_INTEGER: Final = re.compile(r"[+-]?\d+(\.0*)?", re.ASCII)
_NUMBER: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)
MAX_FLOAT32: Final = 3.4e38  # labels are float32
# "classification" for short.
PROBLEM_TYPES: Final = ("regression", "single_label_classification", "classification")

Lines = Sequence[tuple[int, str]]


@dataclass(frozen=True)
class LabelReader:
    """Turns labels as written into class indices or values.

    Attributes:
        names: class names by index; ``None`` for regression.
        integers: classes are whole numbers, so ``1``, ``01`` and ``1.0`` are the same one.
        notes: what looked unusual.
    """

    names: tuple[str, ...] | None
    integers: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def for_names(cls, names: Sequence[str]) -> LabelReader:
        """Read known class names."""
        return cls(tuple(names), integers=all(_INTEGER.fullmatch(name) for name in names))

    @classmethod
    def from_training(cls, path: Path, labels: Lines, problem_type: str | None) -> LabelReader:
        """Decide from the training labels: any number that is not whole means regression, all else classes.

        Raises:
            TaskError: unknown ``problem_type``, or a single class.
        """
        if problem_type not in (None, *PROBLEM_TYPES):
            raise TaskError(
                f"problem_type is {problem_type!r}; expected {', '.join(PROBLEM_TYPES[:2])}, or leave it out"
            )
        texts = {text for _, text in labels}
        integers = all(_INTEGER.fullmatch(text) for text in texts)
        numbers = all(_NUMBER.fullmatch(text) for text in texts)
        if problem_type == "regression" or (problem_type is None and numbers and not integers):
            return cls(None)
        names = sorted({_whole(text) for text in texts}, key=Decimal) if integers else sorted(texts)
        if len(names) < 2:
            raise TaskError(
                f"{path}: every label is {names[0]!r}; expected at least two classes, add examples or name another "
                "label column"
            )
        notes: tuple[str, ...] = ()
        if len(names) > 20 and 2 * len(names) > len(labels):
            notes = (
                f"{len(names):,} classes in {len(labels):,} rows: for values rather than classes pass --problem-type "
                "regression, or name another label column",
            )
        return cls(tuple(names), integers, notes)

    def read(self, path: Path, labels: Lines) -> list[int] | list[float]:
        """Give class indices or values.

        Raises:
            TaskError: labels that training never saw (all are named), or a value that is no finite number.
        """
        if self.names is None:
            return [_finite(path, line, text) for line, text in labels]
        index = {name: number for number, name in enumerate(self.names)}
        written = [(line, self._name(text)) for line, text in labels]
        unseen = sorted({text for _, text in written if text not in index})
        if unseen:
            line = next(line for line, text in written if text not in index)
            raise TaskError(
                f"{path}:{line}: {_some(unseen)} is no label of this task; expected {_some(self.names)} "
                "(the labels of the training set); correct the labels or add training examples"
            )
        return [index[text] for _, text in written]

    def _name(self, text: str) -> str:
        return _whole(text) if self.integers and _INTEGER.fullmatch(text) else text


def _whole(text: str) -> str:
    """``+01.0`` -> ``1``; by the text, since int() refuses thousands of digits."""
    digits = text.lstrip("+-").partition(".")[0].lstrip("0")
    return ("-" if text.startswith("-") else "") + digits if digits else "0"


def _finite(path: Path, line: int, text: str) -> float:
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not abs(value) <= MAX_FLOAT32:  # also false for NaN
        raise TaskError(
            f"{path}:{line}: the label is {text!r}; expected a finite number for regression, correct the row"
        )
    return value


def _some(names: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more
