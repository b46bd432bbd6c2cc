"""Which columns of a local file hold the text, the second text and the label."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from sparsepeft.errors import TaskError
from sparsepeft.tasks.indicators import Indicators

PAIRS: Final = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text1", "text2"),
)
SINGLES: Final = ("text", "sentence", "review", "content", "document")
_COUNTERS: Final = ("", "id", "idx", "index", "guid", "uid", "unnamed: 0")  # "": of pandas
_INDEX: Final = "__index_level_"  # in parquet, of pandas
LABELS: Final = ("label", "labels", "target", "score", "class", "category", "gold_label", "is_duplicate")
TOKENS: Final = ("tokens", "words")  # lists
TAGS: Final = ("tags", "ner_tags", "labels", "label")  # lists, too; of several the first in this order


Label = str | tuple[str, ...]  # a column, or columns of 0 and 1, each of which is called like its label


class Columns(NamedTuple):
    """Names of the text columns (one or two) and of the label column, or of those of 0 and 1."""

    texts: tuple[str, ...]
    label: Label

    @property
    def labels(self) -> tuple[str, ...]:
        """The label column, or all of them."""
        return (self.label,) if isinstance(self.label, str) else self.label

    @property
    def all(self) -> tuple[str, ...]:
        """Every column that is read."""
        return (*self.texts, *self.labels)


def choose_columns(
    path: Path,
    columns: Sequence[str],
    text: str | None,
    text_pair: str | None,
    label: str | Sequence[str] | None,
    find_indicators: Callable[[], Indicators] = Indicators,
) -> Columns:
    """Take the columns named by the caller; detect those that were not, where only one reading is possible.

    Args:
        path: of the file, for messages.
        columns: those that it has.
        text, text_pair: named by the caller.
        label: named by the caller; several are columns of 0 and 1, in a list or with commas between them.
        find_indicators: finds the columns of 0 and 1; asked where none is called like a label.

    Raises:
        TaskError: a named column is not there, or the columns can be read in more than one way or in none.
    """
    for parameter, name in (("text_column", text), ("text_pair_column", text_pair)):
        if name is not None:
            _check_named(path, columns, parameter, name)
    if text_pair is not None and text is None:
        raise TaskError(f"{path}: `text_pair_column={text_pair}` was given without `text_column`; name both")
    texts = tuple(name for name in (text, text_pair) if name is not None)
    chosen = _named_label(path, columns, label) if label else None
    if chosen is None:
        try:
            chosen = _detect_label(path, columns, texts)
        except TaskError as error:
            indicators = find_indicators()
            found = _detect_indicators(path, columns, texts, indicators.names)
            if found is not None:
                return found
            hint = _hint_on_indicators(path, columns, texts, indicators)
            if hint is None:
                raise
            raise TaskError(f"{error}; {hint}") from None
    labels = Columns((), chosen).labels
    texts = texts or _detect_texts(path, [name for name in columns if name not in labels])
    if len({*texts, *labels}) != len(texts) + len(labels):
        raise TaskError(f"{path}: the columns {_listed((*texts, *labels))} must be different; name another one")
    return Columns(texts, chosen)


def _is_counter(name: str) -> bool:
    return name.lower() in _COUNTERS or name.startswith(_INDEX)


def holds_tokens(row: Mapping[str, Any], text: str | None, label: str | Sequence[str] | None) -> bool:
    """Whether a row of a file has lists of tokens and tags, under the caller's names or usual ones, and no text."""
    label = _label(row, label) if label is not None else None
    if not isinstance(label, str | None):
        return False
    names = ((text,) if text is not None else TOKENS, (label,) if label is not None else TAGS)
    tokens, tags = ([row[name] for name in each if isinstance(row.get(name), list)] for each in names)
    has_text = text is None and any(isinstance(row.get(name), str) for name in SINGLES)
    return bool(tokens and tags) and (not has_text or len(tokens[0]) == len(tags[0]))


def choose_token_columns(
    path: Path,
    columns: Sequence[str],
    text: str | None,
    text_pair: str | None,
    label: str | Sequence[str] | None,
    trained: Columns | None = None,
) -> Columns:
    """The columns of a file whose rows are lists: of tokens, and of their tags.

    Args:
        path, columns, text, text_pair, label: see :func:`choose_columns`.
        trained: what they are called in the training file; taken where the caller names none, if all are there.

    Raises:
        TaskError: a named column is not there, or none has a usual name.
    """
    if len(columns) == 1:
        raise TaskError(f"{path} has one column, {_listed(columns)}; expected tokens and a tag for each, add the tags")
    label = _label(columns, label) if label is not None else None
    if text_pair is not None:
        raise TaskError(f"{path}: `text_pair_column={text_pair}` was given, but tokens come in one list; leave it out")
    if not isinstance(label, str | None):
        raise TaskError(f"{path}: `label_column={','.join(label)}` was given, but tags are in one column; name that")
    if trained is not None and set(trained.all) <= set(columns):
        text, label = text or trained.texts[0], label or trained.labels[0]
    chosen = []
    for parameter, name, usual in (("text_column", text, TOKENS), ("label_column", label, TAGS)):
        found = name if name is not None else next((one for one in usual if one in columns), None)
        if found is None or found not in columns:
            expected = f"`{parameter}={name}` was given" if name is not None else f"none is called {_listed(usual)}"
            what = "the tokens" if parameter == "text_column" else "their tags"
            raise TaskError(
                f"{path}: which column has {what}? {expected}; the columns are {_listed(columns)}; pass `{parameter}`"
            )
        chosen.append(found)
    return Columns((chosen[0],), chosen[1])


def choose_text_columns(
    path: Path,
    columns: Sequence[str],
    num_texts: int,
    text: str | None = None,
    text_pair: str | None = None,
    trained: Sequence[str] = (),
    *,
    any_name: bool = True,
) -> tuple[str, ...]:
    """The text columns of a file for a task that was trained before: the file may have no label, and more columns.

    Args:
        path: of the file, for messages.
        columns: those that it has.
        num_texts: texts of an input, 1 or 2.
        text, text_pair: named by the caller.
        trained: what the columns were called in the training file; taken where the caller names none.
        any_name: a column that is the only one is the text, whatever its name.

    Raises:
        TaskError: a named column is not there, or the columns can be read in more than one way or in none.
    """
    named = tuple(name for name in (text, text_pair) if name is not None)
    for name in named:
        if name not in columns:
            raise TaskError(f"{path}: the column {name!r} is not among {_listed(columns)}; name one of these")
    if not named and trained and set(trained) <= set(columns):
        named = tuple(trained)
    texts = named or _detect_texts(path, columns, num_texts, any_name)
    if len(texts) != num_texts:
        expected = "one text, `text_column`" if num_texts == 1 else "two texts, `text_column` and `text_pair_column`"
        raise TaskError(f"{path}: the columns {_listed(texts)} were named, but an input of this task has {expected}")
    return texts


def choose_label_column(
    path: Path,
    columns: Sequence[str],
    label: str | Sequence[str] | None = None,
    trained: Label = "",
    names: Sequence[str] = (),
) -> Label:
    """The label column of a file for a task that was trained before, or those of 0 and 1.

    Args:
        path: of the file, for messages.
        columns: those that it has.
        label: named by the caller, see :func:`choose_columns`.
        trained: what it was called in the training file; taken where the caller names none.
        names: labels of the task, where several may hold; columns that are called so are taken where there is no other.

    Raises:
        TaskError: a named column is not there, or it cannot be told which one it is.
    """
    if label:
        chosen = _named_label(path, columns, label)
        if not isinstance(chosen, str):
            _check_every_label(path, names, chosen)
        return chosen
    if trained and set(Columns((), trained).labels) <= set(columns):
        return trained
    try:
        return _detect_label(path, columns)
    except TaskError:
        if not set(names) & set(columns):
            raise
    _check_every_label(path, names, columns)
    return tuple(names)


def _check_every_label(path: Path, names: Sequence[str], columns: Collection[str]) -> None:
    if missing := [name for name in names if name not in columns]:
        raise TaskError(
            f"{path}: of the labels {_listed(names)} no column is called {_listed(missing)}; have a column of 0 and 1 "
            "for each, or name one that holds all labels with `label_column`"
        )


def _check_named(path: Path, columns: Sequence[str], parameter: str, name: str) -> None:
    if name not in columns:
        raise TaskError(
            f"{path}: `{parameter}={name}` was given, but the columns are {_listed(columns)}; name one of these"
        )


def _named_label(path: Path, columns: Sequence[str], label: str | Sequence[str]) -> Label:
    """The column, or columns, that a caller names."""
    chosen = _label(columns, label)
    for name in Columns((), chosen).labels:
        _check_named(path, columns, "label_column", name)
    return chosen


def _label(columns: Collection[str], label: str | Sequence[str]) -> Label:
    """What a caller names, as a text if it is one column, else as several: ``joy,`` and ``["joy"]`` are ``joy``."""
    if isinstance(label, str) and label in columns:
        return label
    names = [name.strip() for name in label.split(",")] if isinstance(label, str) else list(label)
    names = [name for name in names if name] or names[:1]
    return names[0] if len(names) == 1 else tuple(names)


def _detect_indicators(
    path: Path, columns: Sequence[str], texts: tuple[str, ...], indicators: Collection[str]
) -> Columns | None:
    """Two or more columns of 0 and 1 where all others, but for counters, are the texts; None where that is not so."""
    others = [name for name in columns if not _is_counter(name) and name not in texts]
    labels = tuple(name for name in others if name in indicators)
    others = [name for name in others if name not in labels]
    if not texts:
        with contextlib.suppress(TaskError):
            texts = _detect_texts(path, others)
    is_all = bool(texts) and set(others) <= set(texts)
    return Columns(texts, labels) if is_all and len(labels) > 1 else None


def _hint_on_indicators(
    path: Path, columns: Sequence[str], texts: tuple[str, ...], indicators: Indicators
) -> str | None:
    """What to do if columns that mostly hold 0 and 1 are labels; None where they cannot be."""
    found = _detect_indicators(path, columns, texts, {*indicators.names, *indicators.others})
    if found is None:
        return None
    name = next(name for name in found.labels if name in indicators.others)
    line, value = indicators.others[name]
    return (
        f"if {_listed(found.labels)} are columns of labels, correct line {line}, where {name} is {value!r:.60} and not "
        "0 or 1"
    )


def _detect_label(path: Path, columns: Sequence[str], texts: Sequence[str] = ()) -> str:
    matches = [name for name in columns if name.lower() in LABELS and name not in texts]
    if not matches:  # the only column that is left
        with contextlib.suppress(TaskError):
            texts = texts or _detect_texts(path, columns)
            matches = [name for name in columns if name not in texts and not _is_counter(name)]
            matches = matches if len(matches) == 1 else []
    if len(matches) == 1:
        return matches[0]
    state = f"more than one could be ({_listed(matches)})" if matches else "none is called like one"
    raise TaskError(
        f"{path}: which column is the label? {state}; the columns are {_listed(columns)}; pass `label_column`"
    )


def _detect_texts(
    path: Path, columns: Sequence[str], num_texts: int | None = None, any_name: bool = True
) -> tuple[str, ...]:
    lower = {name.lower(): name for name in columns}
    pairs = [(lower[a], lower[b]) for a, b in PAIRS if a in lower and b in lower]
    paired = {name for pair in pairs for name in pair}
    matches: list[tuple[str, ...]] = [*pairs]
    columns = [name for name in columns if name]  # pandas writes its index as a column without a name
    matches += [(lower[name],) for name in SINGLES if name in lower and (num_texts == 1 or lower[name] not in paired)]
    matches = [match for match in matches if num_texts in (None, len(match))]
    if not matches and len(columns) == 1 and num_texts != 2 and any_name:
        return (columns[0],)
    if len(matches) == 1:
        return matches[0]
    state = (
        f"more than one could be ({', '.join(' + '.join(match) for match in matches)})" if matches else "none is known"
    )
    raise TaskError(
        f"{path}: which column is the text? {state}; the columns besides the label are {_listed(columns)}; "
        "pass `text_column` (and `text_pair_column` for pairs)"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
