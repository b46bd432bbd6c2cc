"""The nine GLUE tasks, from TSV files (ours or the official download's layout) or from the hub."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from sparsepeft.errors import TaskError
from sparsepeft.rows.formats import RAW_TSV
from sparsepeft.rows.reading import Row, find_file, read_rows, require_file, sha256
from sparsepeft.tasks.spec import TaskData, TaskSpec, build_dataset

if TYPE_CHECKING:
    from datasets import Dataset

COLA_HEADER: Final = ("source", "label", "star", "sentence")
MSR_IDS: Final = ("#1 ID", "#2 ID")
MISMATCHED: Final = "validation_mismatched"
HUB_REPOSITORY: Final = "nyu-mll/glue"
BINARY: Final = ("0", "1")


@dataclass(frozen=True)
class Layout:
    """Where a task is found in files and on the hub.

    Attributes:
        folder: its name in the official download.
        texts: text columns of the TSV files.
        label: label column of the TSV files.
        written: labels as the TSV files write them, by class index; ``None`` for regression.
        hub_texts: text columns on the hub.
        num_train, num_validation: official numbers of rows.
    """

    folder: str
    texts: tuple[str, ...]
    label: str
    written: tuple[str, ...] | None
    hub_texts: tuple[str, ...]
    num_train: int
    num_validation: int


_SENTENCES: Final = ("sentence1", "sentence2")
_QUESTIONS: Final = ("question1", "question2")
_RELATIONS: Final = ("entailment", "neutral", "contradiction")
_ENTAILS: Final = ("entailment", "not_entailment")
LAYOUTS: Final = MappingProxyType(
    {
        "cola": Layout("CoLA", ("sentence",), "label", BINARY, ("sentence",), 8551, 1043),
        "sst2": Layout("SST-2", ("sentence",), "label", BINARY, ("sentence",), 67349, 872),
        "mrpc": Layout("MRPC", ("#1 String", "#2 String"), "Quality", BINARY, _SENTENCES, 3668, 408),
        "qqp": Layout("QQP", _QUESTIONS, "is_duplicate", BINARY, _QUESTIONS, 363846, 40430),
        "stsb": Layout("STS-B", _SENTENCES, "score", None, _SENTENCES, 5749, 1500),
        "mnli": Layout("MNLI", _SENTENCES, "gold_label", _RELATIONS, ("premise", "hypothesis"), 392702, 9815),
        "qnli": Layout("QNLI", ("question", "sentence"), "label", _ENTAILS, ("question", "sentence"), 104743, 5463),
        "rte": Layout("RTE", _SENTENCES, "label", _ENTAILS, _SENTENCES, 2490, 277),
        "wnli": Layout("WNLI", _SENTENCES, "label", BINARY, _SENTENCES, 635, 71),
    }
)


def load_glue_files(spec: TaskSpec, data_dir: Path) -> TaskData:
    """Load a GLUE task from ``data_dir/<name>`` or, as the official download names it, ``data_dir/<folder>``."""
    layout = LAYOUTS[spec.name]
    folder, train_path, dev_path = find_glue_files(spec.name, data_dir)
    notes: list[str] = []
    in_dev = read_rows(dev_path, RAW_TSV, required=MSR_IDS) if train_path.name.startswith("msr_") else ()
    exclude = frozenset(map(_ids, in_dev))
    train = _read(spec, layout, train_path, notes, exclude)
    validation = _read(spec, layout, dev_path, notes)
    paths, extra = [train_path, dev_path], {}
    mismatched = find_file(folder, ("dev_mismatched.tsv",)) if spec.name == "mnli" else None
    if mismatched is not None:
        paths.append(mismatched)
        extra[MISMATCHED] = _read(spec, layout, mismatched, notes)
    return TaskData(
        spec,
        train,
        validation,
        test=None,
        extra=extra,
        notes=(*size_notes(spec.name, len(train), len(validation)), *notes),
        source="glue files",
        fingerprints={f"{folder.name}/{path.name}": sha256(path) for path in paths},
    )


def find_glue_files(name: str, data_dir: Path) -> tuple[Path, Path, Path]:
    """A GLUE task's folder, training file and development file.

    Raises:
        TaskError: one is missing.
    """
    official = LAYOUTS[name].folder
    if not data_dir.is_dir():
        raise TaskError(f"the data folder {data_dir} does not exist; expected one with {name}/ or {official}/ in it")
    folder = next((folder for folder in (data_dir / name, data_dir / official) if folder.is_dir()), None)
    if folder is None:
        raise TaskError(
            f"{data_dir} has neither {name}/ nor {official}/; put the task's files there, choose another data folder, "
            "or give none (and unset SPARSEPEFT_DATA) to load from the hub"
        )
    dev_names = ("dev_matched.tsv", "dev.tsv") if name == "mnli" else ("dev.tsv",)
    train_names = ("train.tsv", "msr_paraphrase_train.txt") if name == "mrpc" else ("train.tsv",)
    return folder, require_file(folder, train_names), require_file(folder, dev_names)


def size_notes(name: str, num_train: int, num_validation: int) -> tuple[str, ...]:
    """Notes on numbers of rows that differ from GLUE's."""
    layout, notes = LAYOUTS[name], []
    if num_train != layout.num_train:
        part = "a subset" if num_train < layout.num_train else "not GLUE's training set"
        notes.append(f"{name}: {num_train:,} training rows, GLUE has {layout.num_train:,}: {part}")
    if num_validation != layout.num_validation:
        notes.append(
            f"{name}: {num_validation:,} validation rows, GLUE's development set has {layout.num_validation:,}: "
            "scores are not comparable to published ones"
        )
    return tuple(notes)


def _read(
    spec: TaskSpec, layout: Layout, path: Path, notes: list[str], exclude: frozenset[tuple[str, str]] = frozenset()
) -> Dataset:
    needed = (*layout.texts, layout.label, *(MSR_IDS if exclude else ()))
    header = COLA_HEADER if spec.name == "cola" else None
    rows: list[tuple[Any, ...]] = []
    skipped = 0
    for row in read_rows(path, RAW_TSV, required=needed, header=header, allow_short=spec.name == "qqp"):
        if _unlabelled(spec.name, row, layout):
            skipped += 1
        elif not exclude or _ids(row) not in exclude:
            rows.append((*(row.values[name] for name in layout.texts), _label(path, row, layout)))
    if skipped:
        notes.append(f"{spec.name}: {skipped:,} rows of {path.name} without a label were left out, as the hub does")
    if not rows:
        raise TaskError(f"{path} has no labelled rows; expected at least one, check that it is the right file")
    return build_dataset(spec, rows)


def _unlabelled(name: str, row: Row, layout: Layout) -> bool:
    """The official QQP has rows cut short; MultiNLI marks rows without agreement by "-"."""
    if name == "qqp":
        return not row.values.get(layout.label, "").strip()
    return name == "mnli" and row.values[layout.label] == "-"


def _label(path: Path, row: Row, layout: Layout) -> int | float:
    text = row.values[layout.label].strip()
    if layout.written is None:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise TaskError(f"{path}:{row.line}: {layout.label} is {text!r}; expected a finite number, correct the row")
        return value
    if text not in layout.written:
        raise TaskError(
            f"{path}:{row.line}: {layout.label} is {text!r}; expected one of {', '.join(layout.written)}, "
            "correct the row"
        )
    return layout.written.index(text)


def _ids(row: Row) -> tuple[str, str]:
    return row.values[MSR_IDS[0]], row.values[MSR_IDS[1]]


def load_glue_hub(spec: TaskSpec) -> TaskData:
    """Load a GLUE task from the hub (``nyu-mll/glue``)."""
    from sparsepeft.tasks.hub import content_sha256, load_splits, pick_columns

    layout = LAYOUTS[spec.name]
    validation_name = "validation_matched" if spec.name == "mnli" else "validation"
    names = ["train", validation_name, *([MISMATCHED] if spec.name == "mnli" else [])]
    splits = load_splits(HUB_REPOSITORY, spec.name, names)
    sets = {name: pick_columns(split, spec, layout.hub_texts, name) for name, split in splits.items()}
    return TaskData(
        spec,
        sets["train"],
        sets[validation_name],
        test=None,
        extra={MISMATCHED: sets[MISMATCHED]} if MISMATCHED in sets else {},
        notes=size_notes(spec.name, len(sets["train"]), len(sets[validation_name])),
        source=f"hub:{HUB_REPOSITORY}",
        fingerprints={name: content_sha256(dataset) for name, dataset in sets.items()},
    )
