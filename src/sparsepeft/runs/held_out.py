"""Which rows a run was not trained on, so that they are found again when the file they were drawn from has changed."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsepeft.errors import UserError
from sparsepeft.folders import write_json
from sparsepeft.runs.files import HELD_OUT
from sparsepeft.tasks import TaskData, TaskSpec

if TYPE_CHECKING:
    from datasets import Dataset

Digests = dict[str, list[str]]
_VERSION = 1
_LENGTH = 16  # hex digits: of ten million rows, one is taken for another among a million in one case of two million


def save_held_out(folder: Path, data: TaskData) -> None:
    """Write down which rows were drawn, if any were; the texts themselves are not stored."""
    parts = {"validation": data.validation, "test": data.test}
    drawn = {name: part for name, part in parts.items() if name in data.drawn and part is not None}
    if drawn:
        write_held_out(folder, {name: digests_of(rows_of(part, data.spec)) for name, part in drawn.items()})


def write_held_out(folder: Path, parts: Digests) -> None:
    """Write the digests of held-out texts, by name of the part."""
    write_json(folder / HELD_OUT, {"format_version": _VERSION, "parts": parts})


def read_held_out(folder: Path) -> Digests:
    """The digests of held-out texts, by name of the part; empty where a run has none.

    Raises:
        UserError: the file is damaged, or of a newer version.
    """
    path = folder / HELD_OUT
    if not path.exists():
        return {}
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        version, parts = content["format_version"], {name: list(part) for name, part in content["parts"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); copy the run's folder again.") from error
    if version != _VERSION:
        raise UserError(f"{path} has the format version {version}, but {_VERSION} is known here; upgrade sparsepeft.")
    return parts


def rows_of(part: Dataset, spec: TaskSpec) -> Iterable[tuple[str, ...]]:
    """The texts of each row."""
    return zip(*(part.with_format(None)[name][:] for name in spec.text_columns), strict=True)


def digests_of(rows: Iterable[Sequence[str]]) -> list[str]:
    """A digest of each row's texts; white space and case do not count, in which copies of a data set differ."""
    return [_digest(texts) for texts in rows]


def still_there(rows: Iterable[Sequence[str]], held_out: Sequence[str]) -> list[int]:
    """Places of the rows that were held out; of equal rows as many as were."""
    left, places = Counter(held_out), []
    for place, digest in enumerate(digests_of(rows)):
        if left[digest]:
            left[digest] -= 1
            places.append(place)
    return places


def not_held_out_any_more(folder: Path, file: str, is_known: bool) -> UserError:
    """The error where a training file has changed and nothing in it is known to be new to the model."""
    reason = (
        "nothing that was held out is in it any more" if is_known else "the run does not say what of it was held out"
    )
    return UserError(
        f"{file} has changed since the run in {folder} was trained on it, and {reason}; score other rows by "
        "`test_file`, or train again."
    )


def _digest(texts: Sequence[str]) -> str:
    plain = "\x1f".join(" ".join(text.split()).casefold() for text in texts)
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()[:_LENGTH]
