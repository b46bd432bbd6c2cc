"""What the tags of a local file's tokens mean: entities by IOB2 and its kin, or a class for each token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sparsepeft.errors import TaskError
from sparsepeft.tasks.labels import quoted

if TYPE_CHECKING:
    from sparsepeft.tasks.spec import TaskSpec

OUTSIDE: Final = "O"
_PLACES: Final = "BIES"  # begin, inside, end, single

Tags = tuple[str, ...]
TagLines = Sequence[tuple[int, Tags]]


def read_sentence(where: str, tokens: Any, tags: Any, names: tuple[str, str]) -> tuple[Tags, Tags]:
    """The tokens of a row and their tags.

    Args:
        where: file and line, for messages.
        tokens, tags: as the file has them.
        names: of their columns.

    Raises:
        TaskError: they are no lists of texts, of different lengths, or empty.
    """
    for name, values in zip(names, (tokens, tags), strict=True):
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            numbers = isinstance(values, list) and any(isinstance(value, int) for value in values)
            what = "correct the row"
            if numbers:
                what = f"write the {'tokens as texts' if name == names[0] else 'names of the tags'}"
            raise TaskError(f"{where}: {name} is {values!r:.60}; expected a list of texts, {what}")
        if not all(value.strip() for value in values):
            raise TaskError(f"{where}: {name} has an empty text; expected one for every token, correct the row")
    if not tokens:
        raise TaskError(f"{where}: the sentence is empty; expected at least one token, remove the row")
    if len(tokens) != len(tags):
        raise TaskError(
            f"{where}: {len(tokens)} {names[0]} have {len(tags)} {names[1]}; expected a tag for each token, correct "
            "the row"
        )
    return tuple(tokens), tuple(tag.strip() for tag in tags)


def entity_types(names: Iterable[str]) -> list[str]:
    """The types of entities that tags tell of, sorted; none where the tags are no entities'."""
    types: set[str] = set()
    for name in names:
        place, dash, kind = name.partition("-")
        if name != OUTSIDE and not (dash and kind and len(place) == 1 and place in _PLACES):
            return []
        types.add(kind)
    return sorted(types - {""})


@dataclass(frozen=True)
class TagReader:
    """Turns tags as written into indices.

    Attributes:
        names: of the tags, by index. Where they are entities', ``O`` and for each type all of its tags, whether the
            training file has them or not.
        is_iob1: the file writes ``B-`` only between neighbours of one type; its tags are turned into IOB2's.
        notes: what looked unusual.
    """

    names: tuple[str, ...]
    is_iob1: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def from_training(cls, path: Path, labels: TagLines) -> TagReader:
        """Decide from the tags of the training file.

        Tags are entities' if each is ``O`` or begins with ``B-``, ``I-``, ``E-`` or ``S-``; else every token has a
        class of its own, as with parts of speech. An entity that begins with ``I-`` counts as one, as seqeval counts.

        Raises:
            TaskError: all tokens have the same tag.
        """
        tags = {tag for _, row in labels for tag in row}
        if len(tags) < 2:
            raise TaskError(
                f"{path}: every tag is {next(iter(tags))!r}; expected at least two, add examples or name another "
                "column with `label_column`"
            )
        types = entity_types(tags)
        if not types:
            others = sorted(tag for tag in tags if not entity_types([tag]) and tag != OUTSIDE)
            note = f"tags such as {quoted(others, 3)} mark no entities, as B- and I- do: tokens are scored one by one"
            return cls(tuple(sorted(tags)), notes=(note,))
        places = {tag[0] for tag in tags if tag != OUTSIDE} | {"B", "I"}
        names = (OUTSIDE, *(f"{place}-{kind}" for kind in types for place in _PLACES if place in places))
        return cls(names).of_file(path, labels)

    @classmethod
    def for_task(cls, path: Path, spec: TaskSpec, labels: TagLines) -> TagReader:
        """Read the tags of a task that was trained before from another file."""
        return cls(spec.label_names or ()).of_file(path, labels)

    def of_file(self, path: Path, labels: TagLines) -> TagReader:
        """The reader of one of the task's files, each of which may be in IOB1 or not."""
        num_without, is_iob1 = _beginnings(labels) if entity_types(self.names) else (0, False)
        if is_iob1:
            note = f"{path.name} is in IOB1 (B- only between neighbours of one type) and was turned into IOB2"
        else:
            note = f"{num_without:,} entities of {path.name} begin with I- and not with B-; they count as entities"
        return replace(self, is_iob1=is_iob1, notes=(note,) if num_without else ())

    def read(self, path: Path, labels: TagLines) -> list[list[int]]:
        """Give the indices of each row's tags.

        Raises:
            TaskError: tags that training never saw; all are named.
        """
        index = {name: number for number, name in enumerate(self.names)}
        unseen = sorted({tag for _, row in labels for tag in row if tag not in index})
        if unseen:
            line = next(line for line, row in labels if not index.keys() >= set(row))
            raise TaskError(
                f"{path}:{line}: {quoted(unseen)} is no tag of this task; expected {quoted(self.names)} (the tags of "
                "the training set); correct the tags or add training examples"
            )
        return [[index[tag] for tag in (_to_iob2(row) if self.is_iob1 else row)] for _, row in labels]


def _begin(row: Tags) -> Iterator[tuple[str, bool]]:
    """The tags with which entities begin, and whether the token before belongs to one of the same type."""
    before = ""
    for tag in row:
        kind = tag[2:]
        if tag != OUTSIDE and (tag[0] in "BS" or kind != before):
            yield tag, kind == before
        before = kind


def _beginnings(labels: TagLines) -> tuple[int, bool]:
    """How many entities begin with ``I-``, and whether all do that IOB1 begins so."""
    found = [each for _, row in labels for each in _begin(row)]
    num_without = sum(tag[0] == "I" for tag, _ in found)
    return num_without, num_without > 0 and all(tag[0] == "I" or is_neighbour for tag, is_neighbour in found)


def _to_iob2(row: Tags) -> list[str]:
    before, made = "", []
    for tag in row:
        kind = tag[2:]
        made.append(f"B-{kind}" if tag[0] == "I" and kind != before else tag)
        before = kind
    return made
