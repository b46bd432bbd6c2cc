"""A folder in which the commands of README and docs find what they name."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from contextlib import chdir
from pathlib import Path
from unittest import mock

import transformers as hf
from tests.tiny import save_tiny_backbone, save_tiny_language_model, topics_rows, topics_text

from sparsepeft import backbones
from sparsepeft.tasks.spec import GLUE_TASKS, SPECS
from sparsepeft.training import RunConfig, train

_COLUMNS = {  # of the data folder's files: docs/data.md
    "sst2": ("sentence", None, "label"),
    "mrpc": ("#1 String", "#2 String", "Quality"),
    "qqp": ("question1", "question2", "is_duplicate"),
    "stsb": ("sentence1", "sentence2", "score"),
    "mnli": ("sentence1", "sentence2", "gold_label"),
    "qnli": ("question", "sentence", "label"),
    "rte": ("sentence1", "sentence2", "label"),
    "wnli": ("sentence1", "sentence2", "label"),
}
_NUMBERED = ("sst2", "mrpc", "qqp", "wnli")  # whose labels are class indices
_RUNS = ("sst2", "rte", "cola", "bbc-news")


def build_workspace(folder: Path) -> Path:
    """Make the models, data and trained tasks that the pages use, all of them tiny."""
    save_tiny_backbone(folder / "minilm")
    save_tiny_backbone(
        folder / "FacebookAI" / "roberta-base",
        build=lambda **values: hf.RobertaForSequenceClassification(hf.RobertaConfig(**values)),
        max_positions=64,
        max_position_embeddings=66,
    )
    save_tiny_language_model(folder / "MODEL")
    _write_data(folder / "DATA")
    _write_own_files(folder)
    with chdir(folder), mock.patch.object(backbones, "default_backbone", return_value=folder / "minilm"):
        for task in _RUNS:
            train(RunConfig(task, f"out/{task}", model="FacebookAI/roberta-base", data_dir="DATA", max_steps=1))
        train(RunConfig("topics", "out/topics", max_steps=1))
        train(RunConfig("custom", "out/mine", train_file="mine.csv", max_steps=1))
    return folder


def _write_data(folder: Path) -> None:
    rows = topics_rows("train")
    texts = [row["text"] for row in rows[:250]]
    for task in GLUE_TASKS:
        for part, part_texts in (("train", texts[:230]), ("dev", texts[230:])):
            labels = SPECS[task].label_names
            values: Iterable[object] = range(len(part_texts))
            if labels is None:
                values = [f"{number % 6:.1f}" for number in values]
            elif task in _NUMBERED or task == "cola":
                values = [number % 2 for number in values]
            else:
                values = [labels[number % len(labels)] for number in values]
            path = folder / task / f"{part}.tsv"
            if task == "cola":
                _write_tsv(path, [("x", label, "", text) for text, label in zip(part_texts, values, strict=True)])
                continue
            text, pair, label = _COLUMNS[task]
            header = tuple(name for name in (text, pair, label) if name)
            pairs = zip(part_texts, reversed(part_texts), values, strict=True)
            _write_tsv(path, [header, *((a, b, c) if pair else (a, c) for a, b, c in pairs)])
    names = {"health": "tech", "science": "politics", "travel": "entertainment"}
    articles = [(row["text"], names.get(row["label"], row["label"])) for row in rows]
    _write_tsv(folder / "bbc-news" / "all.tsv", [("text", "label"), *articles])


def _write_own_files(folder: Path) -> None:
    for name in ("mine.txt", "typical.txt"):
        topics_text(folder).rename(folder / name)
    (folder / "prompts.txt").write_text("Once upon a time\nThe first week\n")
    rows = [(row["text"], row["label"]) for row in topics_rows("train")]
    for name in ("mine.csv", "tickets.csv"):
        _write_csv(folder / name, [("text", "label"), *rows[:100]])
    _write_csv(folder / "new.csv", [("id", "text"), *((number, text) for number, (text, _) in enumerate(rows[:9]))])
    mails = [(text, "spam" if number % 3 else "ham") for number, (text, _) in enumerate(rows[:90])]
    _write_csv(folder / "mails.csv", [("text", "label"), *mails])
    settings = {"class_weights": {"spam": 3, "ham": 1}, "settings": {"num_parents": 8, "top_k": 4}, "max_steps": 1}
    config = {"task": "custom", "train_file": "mails.csv", "output_dir": "out/yaml"} | settings
    (folder / "mails.yaml").write_text(json.dumps(config))
    _write_csv(folder / "reviews.csv", [("text", "mood"), *rows[:60]])
    for name, part in (("train.tsv", rows[:60]), ("dev.tsv", rows[60:90])):
        _write_tsv(folder / name, [("claim", "evidence", "verdict"), *((text, text, label) for text, label in part)])


def _write_tsv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")


def _write_csv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
