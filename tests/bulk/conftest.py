"""Runs of every kind of task on the tiny backbone, and rows to answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.tiny import run_config, topics_rows, write_jsonl

from sparsepeft.training import train

_SAMPLE = topics_rows("train")[:40]
_TEXTS = [row["text"].lower().rstrip(".") for row in _SAMPLE]
# What each task is trained on, a row for each text; `text` is called so in all files.
_TRAINED: dict[str, list[dict[str, Any]]] = {
    "mood": [{"text": text, "label": ("good", "bad")[number % 2]} for number, text in enumerate(_TEXTS)],
    "degree": [{"text": text, "label": number / 7} for number, text in enumerate(_TEXTS)],
    "several": [{"text": text, "labels": [("x", "y")[number % 2]]} for number, text in enumerate(_TEXTS)],
    "same": [
        {"text": text, "text_pair": _TEXTS[number // 2], "label": ("yes", "no")[number % 2]}
        for number, text in enumerate(_TEXTS)
    ],
    "names": [
        {"tokens": text.split(), "tags": [("O", "B-PER", "I-PER")[len(word) % 3] for word in text.split()]}
        for text in _TEXTS
    ],
}
LONG = " ".join(_TEXTS[:12])  # longer than the backbone takes
ROWS = [{"id": number, "text": text, "text_pair": _TEXTS[-number]} for number, text in enumerate(_TEXTS[:20], 1)] + [
    {"id": 21, "text": LONG, "text_pair": "a"},
    {"id": 22, "text": " ", "text_pair": "a"},
    {"id": 23, "text": 'a "quoted", text', "text_pair": ""},
]


@pytest.fixture(scope="session")
def runs(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind, of one step."""
    root = tmp_path_factory.mktemp("runs")
    for name, rows in _TRAINED.items():
        file = {"task": "custom", "train_file": str(write_jsonl(root / f"{name}.jsonl", rows))}
        options = {"max_steps": 1, "score_on": "selection", "method": "lora" if name == "degree" else "spartan"}
        train(run_config(tiny_backbone, root / name, **file, **options))
    return {name: root / name for name in _TRAINED}
