"""Real texts, and adapters and runs on the real models, made once for all tests of a session."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tests.real.models import LENGTH, Rows, Trained, find_model, train_adapter

from sparsepeft.tasks import TaskData, few_shot, load_task


@pytest.fixture(scope="session")
def news() -> TaskData:
    """BBC News where the real data is, else the sample that comes with the package."""
    return load_task("bbc-news" if os.environ.get("SPARSEPEFT_DATA") else "topics")


@pytest.fixture(scope="session")
def rows(news: TaskData) -> Rows:
    """Fifteen training rows, in the proportions of the labels."""
    return list(few_shot(news.train, news.spec, 15, seed=0))


@pytest.fixture(scope="session")
def trained(rows: Rows, news: TaskData, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Trained]:
    """An adapter by model and method."""
    root = tmp_path_factory.mktemp("adapters")

    @cache
    def get(name: str, method: str) -> Trained:
        return train_adapter(name, method, rows, news.spec.label_names, root / name / method)

    return get


def sparsepeft(*arguments: object, stdin: str = "") -> str:
    """What the command line, in a process of its own, prints."""
    command = [sys.executable, "-m", "sparsepeft_cli", *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def train_file(rows: Rows, news: TaskData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows as a user's own file."""
    file = tmp_path_factory.mktemp("files") / "news.jsonl"
    named = [{"text": row["text"], "label": news.spec.label_names[row["label"]]} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in named), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def run_of(train_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder that ``sparsepeft train`` leaves on a model."""
    root = tmp_path_factory.mktemp("runs")

    @cache
    def get(name: str) -> Path:
        sparsepeft(
            *("train", "--task", "custom", "--train-file", train_file, "--validation-file", train_file),
            *("--model", find_model(name), "--output-dir", root / name),
            *("--max-steps", 4, "--batch-size", 4, "--max-length", LENGTH),
        )
        return root / name

    return get
