"""Shared fixtures: offline, deterministic, one thread per worker (two workers share two cores)."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background, which processes would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="module")
def frozen_objects() -> None:
    """Keep what is imported from being searched for garbage: half a second each time Trainer begins."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The real evaluation data, or a skip that says how to provide it."""
    value = os.environ.get("SPARSEPEFT_DATA")
    if not value or not Path(value).is_dir():
        pytest.skip("real data not found: set SPARSEPEFT_DATA to a folder with cola/, sst2/, ... (see docs/data.md)")
    return Path(value)


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BERT and its tokenizer."""
    from tests.tiny import save_tiny_backbone

    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="session")
def tiny_language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and its tokenizer."""
    from tests.tiny import save_tiny_language_model

    return save_tiny_language_model(tmp_path_factory.mktemp("language_model"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A Ray cluster of this machine, which this process is connected to: its address."""
    from sparsepeft.clusters import local_or

    with local_or() as ray:
        yield ray.get_runtime_context().gcs_address
