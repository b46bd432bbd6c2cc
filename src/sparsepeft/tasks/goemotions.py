"""GoEmotions (Demszky et al., ACL 2020): comments with any of 27 emotions, or neutral ones."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from sparsepeft.errors import TaskError
from sparsepeft.rows.decoding import lines
from sparsepeft.rows.formats import RAW_TSV
from sparsepeft.rows.reading import find_file, read_rows, require_file, sha256
from sparsepeft.tasks.spec import TaskData, TaskSpec, build_dataset

if TYPE_CHECKING:
    from datasets import Dataset

HUB_REPOSITORY: Final = "google-research-datasets/go_emotions"
HUB_CONFIG: Final = "simplified"
HEADER: Final = ("text", "labels", "id")  # which the files lack
NAMES: Final = "labels.txt"
FILES: Final = MappingProxyType({"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"})
SIZES: Final = MappingProxyType({"train": 43410, "validation": 5426, "test": 5427})


def load_goemotions_files(spec: TaskSpec, data_dir: Path) -> TaskData:
    """Load ``data_dir/goemotions``: ``train.tsv``, ``dev.tsv`` and ``test.tsv``, as they are or with .gz.

    Their rows are a text, numbers of labels with commas between them, and an id; there is no header. Where there is a
    ``labels.txt``, it must name the labels in the order of this package.

    Raises:
        TaskError: a file is missing or malformed, or the labels are others.
    """
    paths = find_goemotions_files(spec.name, data_dir)
    sets = {part: _read(spec, path) for part, path in paths.items()}
    sums = {f"{spec.name}/{path.name}": sha256(path) for path in paths.values()}
    return TaskData(spec, **sets, notes=_size_notes(spec, sets), source="GoEmotions files", fingerprints=sums)


def find_goemotions_files(name: str, data_dir: Path) -> dict[str, Path]:
    """The files by part, training first.

    Raises:
        TaskError: one is missing.
    """
    folder = data_dir / name
    if not folder.is_dir():
        raise TaskError(
            f"{folder} does not exist; put {', '.join(FILES.values())} there, choose another data folder, or give none "
            "(and unset SPARSEPEFT_DATA) to load from the hub"
        )
    return {part: require_file(folder, (file,)) for part, file in FILES.items()}


def load_goemotions_hub(spec: TaskSpec) -> TaskData:
    """Load the hub's copy, which has the same parts."""
    from sparsepeft.tasks.hub import content_sha256, load_splits, pick_columns

    splits = load_splits(HUB_REPOSITORY, HUB_CONFIG, list(FILES))
    sets = {part: pick_columns(split, spec, ("text",), part, label="labels") for part, split in splits.items()}
    sums = {part: content_sha256(dataset) for part, dataset in sets.items()}
    notes = _size_notes(spec, sets)
    return TaskData(spec, **sets, notes=notes, source=f"hub:{HUB_REPOSITORY}", fingerprints=sums)


def _read(spec: TaskSpec, path: Path) -> Dataset:
    names = spec.label_names or ()
    named = find_file(path.parent, (NAMES,))
    if named is not None and tuple(line.strip() for _, line in lines(named) if line.strip()) != names:
        raise TaskError(f"{named} names other labels, or in another order; expected {', '.join(names)}")
    known = [str(number) for number in range(len(names))]
    rows = []
    for row in read_rows(path, RAW_TSV, required=HEADER, header=HEADER):
        numbers = [number.strip() for number in row.values["labels"].split(",")]
        if not set(numbers) <= set(known):
            raise TaskError(
                f"{path}:{row.line}: the labels are {row.values['labels']!r:.60}; expected numbers from 0 to "
                f"{len(names) - 1} with commas between them, correct the row"
            )
        rows.append((row.values["text"], [float(number in numbers) for number in known]))
    return build_dataset(spec, rows)


def _size_notes(spec: TaskSpec, sets: dict[str, Dataset]) -> tuple[str, ...]:
    return tuple(
        f"{spec.name}: {len(dataset):,} {part} rows, the release has {SIZES[part]:,}: scores are not comparable to "
        "published ones"
        for part, dataset in sets.items()
        if len(dataset) != SIZES[part]
    )
