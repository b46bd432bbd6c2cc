"""WNUT 2017 (Derczynski et al., W-NUT 2017): rare and emerging entities in short messages, in CoNLL files."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sparsepeft.errors import TaskError
from sparsepeft.rows.formats import find_format
from sparsepeft.rows.reading import require_file, sha256
from sparsepeft.tasks.columns import Columns
from sparsepeft.tasks.local import load_labelled
from sparsepeft.tasks.spec import TaskData, TaskSpec

FILES: Final = {"train": "train.conll", "validation": "dev.conll", "test": "test.conll"}


def find_wnut_files(name: str, data_dir: Path | None) -> dict[str, Path]:
    """The files ``data_dir/wnut17/{train,dev,test}.conll[.gz]``, by part.

    Raises:
        TaskError: there is no folder, or a file is missing.
    """
    if data_dir is None:
        raise TaskError(
            f"the task {name!r} is read from files; pass `data_dir` (or set SPARSEPEFT_DATA) with the folder that has "
            f"{', '.join(f'{name}/{file}' for file in FILES.values())} in it"
        )
    return {part: require_file(data_dir / name, (file,)) for part, file in FILES.items()}


def load_wnut(spec: TaskSpec, data_dir: Path | None) -> TaskData:
    """Load the three parts; the test part has its labels."""
    paths = find_wnut_files(spec.name, data_dir)
    columns = Columns(("tokens",), "tags")
    sets = {part: load_labelled(path, spec, columns, find_format(path))[0] for part, path in paths.items()}
    sums = {f"{spec.name}/{path.name}": sha256(path) for path in paths.values()}
    return TaskData(spec, **sets, source=next(iter(sums)), fingerprints=sums)
