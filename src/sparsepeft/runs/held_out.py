"""A run's data as it was not trained on.

Data may have changed since training. A part in a file of its own is scored as it is now, and a note says that it has
changed. A part that was drawn from the training file cannot be drawn anew, as that would mix in rows that were trained
on: digests of what was held out are stored in the run's folder, and of these rows those that are still there are
scored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsepeft.errors import UserError
from sparsepeft.extras import require
from sparsepeft.folders import write_json
from sparsepeft.runs.config import DATA_FIELDS, RunConfig
from sparsepeft.runs.files import HELD_OUT, read_run, spec_of
from sparsepeft.tasks import TaskData, TaskSpec, load_task
from sparsepeft.tasks.spec import CUSTOM, build_dataset

if TYPE_CHECKING:
    from datasets import Dataset

CHANGED = "changed since training"  # in the notes on data that has
Digests = dict[str, list[str]]
_VERSION = 1
_LENGTH = 16  # hex digits: of ten million rows, one is taken for another among a million in one case of two million


def load_task_data(config: RunConfig) -> TaskData:
    """The labelled data that a config names.

    Raises:
        TaskError: there is no such task, or its files cannot be used.
    """
    return load_task(config.task, **{name: getattr(config, name) for name in DATA_FIELDS})


def held_out_data(folder: Path, data_dir: str | None = None, *, run: dict[str, Any] | None = None) -> TaskData:
    """A run's data with the parts that it was not trained on; labels are the run's, notes say what has changed.

    Args:
        data_dir: where the task's files are, if they have moved since training.
        run: the content of its ``run.json``, if that was read already.

    Raises:
        UserError: the data is gone, or it cannot be told any more which rows were trained on.
    """
    run = read_run(folder) if run is None else run
    spec, config = spec_of(run), RunConfig(**run["config"])
    if data_dir is not None:
        config = dataclasses.replace(config, data_dir=data_dir)
    _check_there(folder, spec.name, config, is_stored=data_dir is None)
    data = load_task_data(config)
    before, now = run.get("data_fingerprints") or {}, data.fingerprints
    changed = [name for name, digest in now.items() if before and digest not in before.values()]
    parts = data.scored_parts
    notes: list[str] = []
    if data.drawn and changed:
        source, stored = next(iter(now)), read_held_out(folder)
        is_same = all(stored.get(part) == digests_of(rows_of(parts[part], data.spec)) for part in data.drawn)
        # Runs from before there was such a list: the draw is the same if the file is.
        if not is_same and (stored or source in changed):
            remaining, notes = _find_drawn(folder, data, stored)
            parts |= remaining
            changed = [name for name in changed if name != source and len(data.drawn) < len(parts)]
    if changed:
        notes.append(f"{', '.join(changed)} {'has' if len(changed) == 1 else 'have'} {CHANGED}")
    parts = {name: _as_trained(folder, name, part, data.spec, spec) for name, part in parts.items()}
    return dataclasses.replace(
        data,
        spec=spec,
        validation=parts.pop("validation"),
        test=parts.pop("test", None),
        extra=parts,
        notes=(*data.notes, *(f"{spec.name}: {note}" for note in notes)),
    )


def _check_there(folder: Path, task: str, config: RunConfig, is_stored: bool) -> None:
    needs_folder = is_stored and task not in (CUSTOM, "topics") and config.data_dir is not None
    if needs_folder and not Path(str(config.data_dir)).is_dir():
        raise UserError(
            f"The run in {folder} was trained on data in {config.data_dir}, which is not there any more; pass the "
            "folder that it has moved to as `data_dir`."
        )
    for file in (config.train_file, config.validation_file, config.test_file):
        if file is not None and not Path(file).exists():
            raise UserError(
                f"The run in {folder} was trained with the file {file}, which is not there any more; put it back, or "
                "score other rows by `test_file`."
            )


def _find_drawn(folder: Path, data: TaskData, stored: Digests) -> tuple[dict[str, Dataset], list[str]]:
    """Of the rows that were drawn in training those that are still in the file, by part, and notes on them."""
    everything = [data.train, data.validation]
    if "test" in data.drawn and data.test is not None:
        everything.append(data.test)
    rows = require("datasets", "train", "Scoring a run").concatenate_datasets(everything)
    remaining, notes = {}, []
    for name in data.drawn:
        places = still_there(rows_of(rows, data.spec), stored.get(name, ()))
        if not places:
            raise not_held_out_any_more(folder, data.source, is_known=name in stored)
        remaining[name] = rows.select(places)
        notes.append(
            f"{data.source} has {CHANGED}; of the {len(stored[name]):,} rows held out as {name} then, "
            f"{len(places):,} are still there and were scored"
        )
    return remaining, notes


def _as_trained(folder: Path, name: str, part: Dataset, current: TaskSpec, spec: TaskSpec) -> Dataset:
    """A part whose labels are those of the run: the training file, which says what labels there are, may have changed.

    Raises:
        UserError: the part has a label that the run does not know, or is of another kind.
    """
    same = [(one.text_columns, one.problem_type) for one in (current, spec)]
    if same[0] != same[1]:
        raise UserError(
            f"The files of the run in {folder} now hold another kind of task ({current.problem_type} of "
            f"{len(current.text_columns)} text(s) instead of {spec.problem_type} of {len(spec.text_columns)}); score "
            "other rows by `test_file`, or train again."
        )
    if current.label_names == spec.label_names or current.label_names is None or spec.label_names is None:
        return part
    place = {label: index for index, label in enumerate(spec.label_names)}
    plain = part.with_format(None)
    labels, names = plain["label"][:], current.label_names
    if spec.labels_tokens:
        labels = [[place.get(names[tag], names[tag]) for tag in row] for row in labels]
        unknown = sorted({tag for row in labels for tag in row if isinstance(tag, str)})
    else:
        labels = [_moved(label, names, place) for label in labels]
        unknown = sorted({label for label in labels if isinstance(label, str)})
    if unknown:
        raise UserError(
            f"The {name} part of the run in {folder} now has the label {', '.join(map(repr, unknown[:5]))}, which it "
            "was not trained on; correct the file, score other rows by `test_file`, or train again."
        )
    return build_dataset(spec, list(zip(*(plain[column][:] for column in spec.input_columns), labels, strict=True)))


def _moved(label: Any, names: Sequence[str], place: Mapping[str, int]) -> Any:
    """A label's index, or its ones and zeros, as in training; the name of one that was not known then."""
    if not isinstance(label, list):
        return place.get(names[label], names[label])
    held = [name for name, value in zip(names, label, strict=True) if value]
    unknown = [name for name in held if name not in place]
    return unknown[0] if unknown else [float(name in held) for name in place]


def digests_of_drawn(data: TaskData) -> Digests:
    """Digests of the rows of each part that was drawn from the training rows."""
    parts = data.scored_parts
    return {name: digests_of(rows_of(parts[name], data.spec)) for name in data.drawn}


def write_held_out(folder: Path, parts: Digests) -> None:
    """Write down which rows were drawn, if any were; the texts themselves are not stored."""
    if parts:
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
    plain = ("\x1f".join(" ".join(text.split()).casefold() for text in texts) for texts in rows)
    return [hashlib.sha256(each.encode("utf-8", "surrogatepass")).hexdigest()[:_LENGTH] for each in plain]


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
