"""Public datasets from the Hugging Face hub, with one clear error where it cannot be reached."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsepeft.errors import TaskError, first_line
from sparsepeft.extras import require
from sparsepeft.tasks.spec import TaskSpec, build_dataset

if TYPE_CHECKING:
    from datasets import Dataset

_TRUE = frozenset({"1", "ON", "YES", "TRUE"})


def load_splits(repository: str, config: str | None, names: Sequence[str]) -> dict[str, Dataset]:
    """Load the named splits of a dataset repository; `datasets` answers from its cache where it can.

    Raises:
        TaskError: not reachable and not cached, or a split is missing.
    """
    datasets = require("datasets", "train", "Loading a dataset from the hub")
    tried = f"datasets.load_dataset({', '.join(repr(part) for part in (repository, config) if part)})"
    try:
        loaded = datasets.load_dataset(repository, config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0").upper() in _TRUE else ""
        raise TaskError(
            f"tried {tried}{offline}, which failed: {first_line(error)}; connect to the network, or pass "
            "`data_dir` (or set SPARSEPEFT_DATA) with the folder that holds the task's files"
        ) from error
    missing = [name for name in names if name not in loaded]
    if missing:
        raise TaskError(
            f"{tried} has no split {', '.join(missing)}, only {', '.join(loaded)}; "
            "pass `data_dir` with the task's files"
        )
    return {name: loaded[name] for name in names}


def pick_columns(dataset: Dataset, spec: TaskSpec, texts: Sequence[str], split: str, label: str = "label") -> Dataset:
    """Bring a hub dataset to the columns ``text[, text_pair], label``.

    Labels may be class indices or class names; lists of these where several may hold.

    Raises:
        TaskError: a column is missing or a label is not one of the task's.
    """
    where = f"{spec.name}, split {split} from the hub"
    missing = [name for name in (*texts, label) if name not in dataset.column_names]
    if missing:
        raise TaskError(
            f"{where}: no column {', '.join(missing)}; found {', '.join(dataset.column_names)}; "
            "pass `data_dir` with the task's files"
        )
    plain = dataset.with_format(None)
    labels = plain[label][:]
    if spec.label_names is not None:
        feature = dataset.features[label]
        names = getattr(getattr(feature, "feature", feature), "names", None)
        index = {name: number for number, name in enumerate(spec.label_names)}
        rows = labels if spec.multi_label else [[value] for value in labels]
        written = [[names[value] if names and 0 <= value < len(names) else value for value in row] for row in rows]
        unknown = sorted({str(v) for row in written for v in row if v not in index and v not in index.values()})
        if unknown:
            raise TaskError(
                f"{where}: label {', '.join(unknown)}; expected {', '.join(spec.label_names)}; "
                "pass `data_dir` with the task's files"
            )
        classes = [[index.get(value, value) for value in row] for row in written]
        if spec.multi_label:
            labels = [[float(number in row) for number in index.values()] for row in classes]
        else:
            labels = [number for (number,) in classes]
    return build_dataset(spec, list(zip(*(plain[name][:] for name in texts), labels, strict=True)))


def content_sha256(dataset: Dataset) -> str:
    """``"sha256:<hex>"`` of the rows, the same on every machine."""
    digest = hashlib.sha256()
    for row in dataset.with_format(None):
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
        digest.update(b"\n")
    return f"sha256:{digest.hexdigest()}"
