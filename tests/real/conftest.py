"""Real texts, and adapters and runs on the real models, made once for all tests of a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tests.real.models import Rows, Trained, train_adapter

from sparsepeft.tasks import TaskData, load_task


@pytest.fixture(scope="session")
def news() -> TaskData:
    """BBC News where the real data is, else the sample that comes with the package."""
    return load_task("bbc-news" if os.environ.get("SPARSEPEFT_DATA") else "topics")


@pytest.fixture(scope="session")
def rows(news: TaskData) -> Rows:
    """A few training rows with every label."""
    return [row for label in range(news.spec.num_labels) for row in list(news.train.filter(lambda r: r["label"] == label).select(range(3)))]


@pytest.fixture(scope="session")
def trained(rows: Rows, news: TaskData, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Trained]:
    """An adapter by model and method."""
    root = tmp_path_factory.mktemp("adapters")

    @cache
    def get(name: str, method: str) -> Trained:
        return train_adapter(name, method, rows, news.spec.label_names, root / name / method)

    return get
