"""BBC News (Greene and Cunningham, ICML 2006): five topics, no official split, so one is made here.

100 of the 2,225 articles occur twice. Duplicates go first, then the texts are split by label and seed: what is in which
part depends on the seed and on the set of texts, not on their order in the file.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Final

from sparsepeft.errors import TaskError
from sparsepeft.rows.formats import RAW_TSV
from sparsepeft.rows.reading import read_rows, require_file, sha256
from sparsepeft.tasks.spec import TaskData, TaskSpec, build_dataset
from sparsepeft.tasks.splits import hold_out

HUB_REPOSITORY: Final = "SetFit/bbc-news"
FILE: Final = "all.tsv"


def load_bbc_files(spec: TaskSpec, data_dir: Path, seed: int) -> TaskData:
    """Load ``data_dir/bbc-news/all.tsv[.gz]``, columns ``text`` and ``label``."""
    path = find_bbc_file(spec.name, data_dir)
    names = spec.label_names or ()
    rows = []
    for row in read_rows(path, RAW_TSV, required=("text", "label")):
        label = row.values["label"].strip()
        if label not in names:
            raise TaskError(
                f"{path}:{row.line}: label is {label!r}; expected one of {', '.join(names)}, correct the row"
            )
        rows.append((row.values["text"], names.index(label)))
    key = f"{spec.name}/{path.name}"
    return _split(spec, rows, seed, source=key, fingerprints={key: sha256(path)})


def find_bbc_file(name: str, data_dir: Path) -> Path:
    """The file with the articles.

    Raises:
        TaskError: it is missing.
    """
    if not data_dir.is_dir():
        raise TaskError(f"the data folder {data_dir} does not exist; expected one with {name}/{FILE} in it")
    return require_file(data_dir / name, (FILE,))


def load_bbc_hub(spec: TaskSpec, seed: int) -> TaskData:
    """Load the hub's copy (lower-cased); its two parts are joined, freed of duplicates and split anew."""
    from sparsepeft.tasks.hub import content_sha256, load_splits, pick_columns

    splits = load_splits(HUB_REPOSITORY, None, ["train", "test"])
    sets = {name: pick_columns(part, spec, ("text",), name, label="label_text") for name, part in splits.items()}
    rows = [(row["text"], row["label"]) for part in sets.values() for row in part]
    fingerprints = {name: content_sha256(part) for name, part in sets.items()}
    return _split(spec, rows, seed, source=f"hub:{HUB_REPOSITORY}", fingerprints=fingerprints)


def _split(
    spec: TaskSpec, rows: list[tuple[str, int]], seed: int, *, source: str, fingerprints: dict[str, str]
) -> TaskData:
    labels: dict[str, int] = {}
    for text, label in rows:
        text = " ".join(text.split())  # copies differ in white space
        if labels.setdefault(text, label) != label:
            raise TaskError(f"{source}: the text {text[:60]!r}... has two different labels; keep one of them")
    texts = sorted(labels)
    rng = random.Random(f"{spec.name}:{seed}")
    if len(texts) < 10:
        raise TaskError(
            f"{source}: {len(texts)} distinct texts; expected at least 10 to split them 80/10/10, add texts"
        )
    rng.shuffle(texts)
    test = _take(texts, labels, 1 / 10, rng)
    rest = [text for text in texts if text not in test]
    validation = _take(rest, labels, 1 / 9, rng)
    part = {text: "test" if text in test else "validation" if text in validation else "train" for text in texts}
    sets = {
        name: build_dataset(spec, [(text, labels[text]) for text in texts if part[text] == name])
        for name in ("train", "validation", "test")
    }
    notes = [f"{spec.name}: no official split; 80/10/10 by label and seed {seed}, test is a part of its own"]
    if len(texts) != len(rows):
        notes.append(f"{spec.name}: {len(rows) - len(texts):,} duplicate texts of {len(rows):,} were left out")
    drawn = ("validation", "test")
    return TaskData(spec, **sets, notes=tuple(notes), source=source, fingerprints=fingerprints, drawn=drawn)


def _take(texts: list[str], labels: dict[str, int], fraction: float, rng: random.Random) -> set[str]:
    groups: dict[int, list[int]] = {}
    for index, text in enumerate(texts):
        groups.setdefault(labels[text], []).append(index)
    return {texts[index] for index in hold_out(groups, fraction, rng)}
