"""What the labels of a local file mean: a class, several, or a value."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sparsepeft.errors import TaskError
from sparsepeft.reprs import first_of

if TYPE_CHECKING:
    from sparsepeft.tasks.spec import TaskSpec

# Not int() and float() alone: these also take "1_000", which is a name rather than a number.
_INTEGER: Final = re.compile(r"[+-]?\d+(\.0*)?", re.ASCII)
_NUMBER: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)
_DECIMAL_COMMA: Final = re.compile(r"[+-]?\d+,\d+", re.ASCII)
_WITH_THOUSANDS: Final = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", re.ASCII)
MAX_FLOAT32: Final = 3.4e38  # labels are float32
REGRESSION, SINGLE, MULTI = "regression", "single_label_classification", "multi_label_classification"
TOKENS: Final = "token_classification"
_SHORT: Final = {"single_label": SINGLE, "classification": SINGLE, "multi_label": MULTI}
_SEPARATORS: Final = "|;,"
_ITEM: Final = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[+-]?\d+\.?\d*"""
_SPACED: Final = re.compile(rf"\[\s*(?:{_ITEM})(?:\s+(?:{_ITEM}))*\s*\]", re.ASCII)  # as NumPy writes an array
_BOOLEANS: Final = {"true", "false"}

Label = str | tuple[str, ...]
Lines = Sequence[tuple[int, Label]]


def problem_type_of(value: str | None) -> str | None:
    """The name that transformers has for a kind of problem; None stays None.

    Raises:
        TaskError: it is none.
    """
    name = value if value is None else _SHORT.get(value, value)
    if name not in (None, REGRESSION, SINGLE, MULTI, TOKENS):
        raise TaskError(
            f"`problem_type={value}` was given; expected regression, single_label, multi_label or "
            "token_classification, or leave it out"
        )
    return name


def read_label(where: str, value: Any) -> Label:
    """A label as a file has it, as text; a list of labels as a tuple; empty where there is none.

    Raises:
        TaskError: it is neither a text, a number nor a list of these.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int | float):
        return repr(value)
    parts = [read_label(where, part) for part in value] if isinstance(value, list) else [None]
    texts = tuple(part for part in parts if isinstance(part, str) and part)
    if len(texts) != len(parts):
        raise TaskError(f"{where} is {value!r:.60}; expected a text, a number or a list of these, correct the row")
    return texts


@dataclass(frozen=True)
class LabelReader:
    """Turns labels as written into class indices, ones and zeros, or values.

    Attributes:
        names: class names by index; ``None`` for regression.
        integers: classes are whole numbers, so ``1``, ``01`` and ``1.0`` are the same one.
        multi_label: a row has any number of classes.
        separator: between those in one text.
        notes: what looked unusual.
    """

    names: tuple[str, ...] | None
    integers: bool = False
    multi_label: bool = False
    separator: str | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def for_names(cls, names: Sequence[str]) -> LabelReader:
        """Read known class names; those of columns may be numbers such as ``01``, which stay as they are."""
        return cls(tuple(names), integers=all(_INTEGER.fullmatch(name) and _whole(name) == name for name in names))

    @classmethod
    def for_task(cls, spec: TaskSpec, labels: Lines) -> LabelReader:
        """Read the labels of a task that was trained before from another file, which may separate several otherwise."""
        if spec.label_names is None:
            return cls(None)
        known = cls.for_names(spec.label_names)
        if not spec.multi_label:
            return known
        guess, others = _separators(labels)
        readers = [replace(known, multi_label=True, separator=char) for char in (None, guess, *others)]
        return next((reader for reader in readers if reader._knows_all(labels)), readers[1])

    @classmethod
    def from_training(cls, path: Path, labels: Lines, problem_type: str | None) -> LabelReader:
        """Decide from the training labels: lists mean several at once, any number that is not whole a regression.

        All else are classes.

        Raises:
            TaskError: unknown ``problem_type``, a row without a label or with several, or a single class.
        """
        kind = problem_type_of(problem_type)
        if kind == MULTI or (kind is None and _are_lists(labels)):
            return cls._of_several(path, labels)
        if kind is None:
            _refuse_empty_beside_lists(path, labels)
        remedy = " or pass `problem_type=multi_label`"
        texts = [_single(path, line, label, remedy) for line, label in labels]
        distinct = set(texts)
        integers = all(_INTEGER.fullmatch(text) for text in distinct)
        numbers = all(_NUMBER.fullmatch(text) for text in distinct)
        if kind == REGRESSION or (kind is None and numbers and not integers):
            return cls(None)
        names = _sorted(_written_alike(distinct), integers)
        _require_two(path, names)
        notes = (_note_on_classes(names, integers, len(texts)) if kind is None else None, _note_on_looks(names))
        return cls(names, integers, notes=tuple(note for note in notes if note))

    @classmethod
    def for_columns(cls, names: Sequence[str], labels: Lines, problem_type: str | None) -> LabelReader:
        """Read labels that have a column of 0 and 1 each.

        Raises:
            TaskError: the kind of problem is another than several labels, or no row has one.
        """
        if problem_type_of(problem_type) not in (None, MULTI):
            raise TaskError(
                f"`problem_type={problem_type}` was given, but {quoted(names)} are columns of labels of which any may "
                "hold; leave it out, or name one column with `label_column`"
            )
        held = {name for _, row in labels for name in row}
        if not held:
            raise TaskError(
                f"no training row has any of the labels {quoted(names)}; expected a 1 in some row of their columns, "
                "correct the file or name another column with `label_column`"
            )
        never = [name for name in names if name not in held]
        notes = (f"no training row has the label {quoted(never)}",) if never else ()
        return cls(tuple(names), multi_label=True, notes=notes)

    @classmethod
    def _of_several(cls, path: Path, labels: Lines) -> LabelReader:
        separator, others = _separators(labels)
        notes: tuple[str, ...] = ()
        if others:
            notes = (f"labels were separated at {separator!r}; {quoted(others)} was taken for a part of their names",)
        rows = [_parts(path, line, label, separator) for line, label in labels]
        if _are_indicators(rows):
            raise TaskError(
                f"{path}: the labels are lists of {len(rows[0])} ones and zeros; expected the names of the labels that "
                'hold, such as ["a", "b"]; write those, or a column of 0 and 1 for each label'
            )
        parts = {part for row in rows for part in row}
        integers = bool(parts) and all(_INTEGER.fullmatch(part) for part in parts)
        names = _sorted(parts, integers)
        _require_two(path, names)
        looks = _note_on_looks(names)
        return cls(names, integers, True, separator, (*notes, looks) if looks else notes)

    def read(self, path: Path, labels: Lines) -> list[int] | list[float] | list[list[float]]:
        """Give class indices, or values, or for several labels a one or zero for each class.

        Raises:
            TaskError: labels that training never saw (all are named), a row without one or with several where it needs
                one, or a value that is no finite number.
        """
        if self.names is None:
            return [_finite(path, line, _single(path, line, label)) for line, label in labels]
        index = {name: number for number, name in enumerate(self.names)}
        rows = [(line, [self.name_of(part) for part in self._parts(path, line, label)]) for line, label in labels]
        unseen = sorted({name for _, names in rows for name in names if name not in index})
        if unseen:
            line = next(line for line, names in rows if not index.keys() >= set(names))
            raise TaskError(
                f"{path}:{line}: {quoted(unseen)} is no label of this task; expected {quoted(self.names)} "
                "(the labels of the training set); correct the labels or add training examples"
            )
        if not self.multi_label:
            return [index[name] for _, (name,) in rows]
        return [[float(name in names) for name in self.names] for names in (set(row) for _, row in rows)]

    def _parts(self, path: Path, line: int, label: Label) -> tuple[str, ...]:
        return _parts(path, line, label, self.separator) if self.multi_label else (_single(path, line, label),)

    def _knows_all(self, labels: Lines) -> bool:
        """Whether every label between separators is one of the names; those in lists say nothing of separators."""
        texts = {label for _, label in labels if isinstance(label, str) and not _is_list(label)}
        return all(self.name_of(part) in (self.names or ()) for text in texts for part in _split(text, self.separator))

    def name_of(self, text: str) -> str:
        """A label's name, of which numbers and truth values have several forms."""
        if self.integers and _INTEGER.fullmatch(text):
            return _whole(text)
        return self._booleans.get(text.lower(), text)

    @cached_property
    def _booleans(self) -> dict[str, str]:
        """The names by their lower case, if they are true and false, which pandas and Excel write otherwise."""
        lower = {name.lower(): name for name in self.names or ()}
        return lower if lower.keys() == _BOOLEANS else {}


def _separators(labels: Lines) -> tuple[str | None, list[str]]:
    """The separator of several labels in one text, and other candidates."""
    texts = [label for _, label in labels if isinstance(label, str) and not _is_list(label)]
    present = [char for char in _SEPARATORS if any(char in text for text in texts)]
    return (present[0] if present else None), present[1:]


def _single(path: Path, line: int, label: Label, remedy: str = "") -> str:
    if isinstance(label, tuple):
        raise TaskError(f"{path}:{line}: the label is {list(label)!r:.60}; expected one label, correct the row{remedy}")
    if not label:
        raise TaskError(f"{path}:{line}: the label is empty; expected one in every row, fill it in or remove the row")
    return label


def _are_lists(labels: Lines) -> bool:
    """Whether labels are lists, or texts that all look like one."""
    if any(isinstance(label, tuple) for _, label in labels):
        return True
    return bool(labels) and all(isinstance(label, str) and _is_list(label) for _, label in labels)


def _refuse_empty_beside_lists(path: Path, labels: Lines) -> None:
    """TaskError for a label that is missing where the others are lists as text: none of the labels, or an oversight?"""
    empty = [line for line, label in labels if not label]
    if empty and _are_lists([each for each in labels if each[1]]):
        raise TaskError(
            f"{path}:{empty[0]}: the label is empty where others are lists; write [] or pass "
            "`problem_type=multi_label` if none of the labels holds there, else fill it in or remove the row"
        )


def _written_alike(texts: set[str]) -> set[str]:
    """The same labels with true and false, if they are nothing else, in one spelling each."""
    lower = {text.lower(): text for text in sorted(texts, reverse=True)}
    return set(lower.values()) if lower.keys() == _BOOLEANS else texts


def _is_list(text: str) -> bool:
    return text.startswith("[") and text.endswith("]")


def _parts(path: Path, line: int, label: Label, separator: str | None) -> tuple[str, ...]:
    """The labels of one row: a list, one as text (JSON, or as pandas or NumPy write it), or text between separators."""
    if isinstance(label, tuple):
        return label
    if _is_list(label):
        for read in (json.loads, _spaced_items, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                return tuple(read_label(f"{path}:{line}: the label", read(label)))
        raise TaskError(
            f'{path}:{line}: the label {label!r:.60} is no list; expected one such as ["a", "b"], or names with | '
            "between them, correct the row"
        )
    return _split(label, separator)


def _are_indicators(rows: Sequence[Sequence[str]]) -> bool:
    """Whether each row says of each label whether it holds: ones and zeros, equally many, of which some come twice."""
    values = {part for row in rows for part in row}
    return (
        all(_INTEGER.fullmatch(value) and _whole(value) in ("0", "1") for value in values)
        and len({len(row) for row in rows}) == 1
        and any(len(set(map(_whole, row))) < len(row) for row in rows)
    )


def _split(text: str, separator: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text.split(separator) if separator else [text]) if part.strip())


def _spaced_items(text: str) -> list[Any]:
    """The items of ``['a' 'b']``, which Python would read as one text; ValueError for any other text."""
    if not _SPACED.fullmatch(text):
        raise ValueError("no array as NumPy writes it")
    return [ast.literal_eval(item) for item in re.findall(_ITEM, text, re.ASCII)]


def _sorted(texts: set[str], integers: bool) -> tuple[str, ...]:
    return tuple(sorted({_whole(text) for text in texts}, key=Decimal) if integers else sorted(texts))


def _require_two(path: Path, names: Sequence[str]) -> None:
    if len(names) < 2:
        problem = f"every label is {names[0]!r}" if names else "no row has a label"
        raise TaskError(
            f"{path}: {problem}; expected at least two classes, add examples or name another column with `label_column`"
        )


def _note_on_classes(names: Sequence[str], integers: bool, num_rows: int) -> str | None:
    """A note on classes that could be several labels or values."""
    if not integers and (note := _note_on_numbers(names)):
        return note
    for separator in _SEPARATORS:
        joined = [name for name in names if separator in name]
        parts = {part.strip() for name in joined for part in name.split(separator)}
        if 2 * len(parts.intersection(names)) > len(parts):
            return (
                f"labels such as {joined[0]!r} were taken for classes of their own; if they are several labels, pass "
                "`problem_type=multi_label`"
            )
    if len(names) > 20 and 2 * len(names) > num_rows:
        return (
            f"{len(names):,} classes in {num_rows:,} rows: for values rather than classes pass "
            "`problem_type=regression`, or name another column with `label_column`"
        )
    first, last = Decimal(names[0]) if integers else 0, Decimal(names[-1]) if integers else 0
    if integers and len(names) >= 4 and last - first < 2 * len(names):
        return (
            f"labels {names[0]} to {names[-1]} were taken for {len(names)} classes; if they are scores, pass "
            "`problem_type=regression`"
        )
    return None


def _note_on_numbers(names: Sequence[str]) -> str | None:
    """A note on classes most of which would be values, if some were not written otherwise."""
    others = [name for name in names if not _NUMBER.fullmatch(name)]
    num_numbers = len(names) - len(others) + sum(map(_is_written_number, others))
    if num_numbers == len(names) and all(_DECIMAL_COMMA.fullmatch(name) for name in others):
        return (
            f"labels such as {others[0]!r} were taken for classes; if they are values, write a point for the comma; if "
            "they are several labels, pass `problem_type=multi_label`"
        )
    if len(names) < 3 or 2 * num_numbers <= len(names):
        return None
    return (
        f"the labels were taken for classes, as {quoted(others, 3)} cannot be read as numbers; if they are values, "
        "correct these, or pass `problem_type=regression` and be told where they are"
    )


def _is_written_number(text: str) -> bool:
    """Whether people read it as a number: with a decimal comma, commas after thousands, percent or another minus."""
    plain = text.replace("\N{MINUS SIGN}", "-").rstrip("%").strip()
    return any(pattern.fullmatch(plain) for pattern in (_NUMBER, _DECIMAL_COMMA, _WITH_THOUSANDS))


def _note_on_looks(names: Sequence[str]) -> str | None:
    """A note on names that look alike: with other white space, or with characters that are not seen."""
    alike: dict[str, list[str]] = {}
    for name in names:
        seen = "".join(char for char in unicodedata.normalize("NFC", name) if unicodedata.category(char) != "Cf")
        alike.setdefault(" ".join(seen.split()), []).append(name)
    found = next((group for group in alike.values() if len(group) > 1), None)
    if found is None:
        return None
    written = " and ".join(ascii(name) for name in found[:2])
    return f"the labels {written} look alike but are two; write them in the same way if they are one"


def _whole(text: str) -> str:
    """``+01.0`` -> ``1``; by the text, since int() refuses thousands of digits."""
    digits = text.lstrip("+-").partition(".")[0].lstrip("0")
    return ("-" if text.startswith("-") else "") + digits if digits else "0"


def _finite(path: Path, line: int, text: str) -> float:
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not abs(value) <= MAX_FLOAT32:  # also false for NaN
        advice = "write a point for the comma" if _DECIMAL_COMMA.fullmatch(text) else "correct the row"
        raise TaskError(f"{path}:{line}: the label is {text!r}; expected a finite number for regression, {advice}")
    return value


def quoted(names: Sequence[str], limit: int = 10) -> str:
    """Names in quotation marks, of many only the first."""
    return first_of([repr(name) for name in names], limit)
