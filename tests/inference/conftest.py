"""A tiny backbone with tasks of several methods, label counts and kinds."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from tests.models import METHODS, randomize
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from sparsepeft import HeadConfig, MultiTaskEngine

TASKS: dict[str, PeftConfig] = {
    "two": METHODS["spartan"](num_labels=2, train_layer_norms=True),
    "five": METHODS["spartan"](num_labels=5, num_parents=9, top_k=4, head_type="linear"),
    "product": METHODS["spartan"](num_labels=3, num_parents=25, parent_keys="product"),
    "degree": METHODS["spartan"](num_labels=1, layers_to_transform=[1]),
    "upper": METHODS["spartan"](num_labels=3, layers_to_transform=[1], train_layer_norms=True),
    "pfeiffer": METHODS["pfeiffer"](num_labels=4),
    "houlsby": METHODS["houlsby"](num_labels=2),
    "bitfit": METHODS["bitfit"](num_labels=3),
    "head": HeadConfig(num_labels=3, task_type="SEQ_CLS"),
}
NAMES = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}
TOKEN_TASKS: dict[str, PeftConfig] = {
    "names": METHODS["spartan"](id2label=NAMES, task_type="TOKEN_CLS", train_layer_norms=True),
    "upper names": METHODS["spartan"](id2label=NAMES, task_type="TOKEN_CLS", layers_to_transform=[1]),
    "linear": METHODS["spartan"](num_labels=3, task_type="TOKEN_CLS", head_type="linear"),
    "pfeiffer names": METHODS["pfeiffer"](id2label=NAMES, task_type="TOKEN_CLS"),
    "houlsby names": METHODS["houlsby"](num_labels=1, task_type="TOKEN_CLS"),
    "bitfit names": METHODS["bitfit"](id2label=NAMES, task_type="TOKEN_CLS"),
    "head names": HeadConfig(id2label=NAMES, task_type="TOKEN_CLS"),
}


@pytest.fixture(scope="session")
def backbone(tiny_backbone: Path) -> Path:
    return tiny_backbone


@pytest.fixture(scope="session")
def folders(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders as ``save_pretrained`` leaves them."""
    root = tmp_path_factory.mktemp("tasks")
    return {name: save_task(backbone, root / name, config) for name, config in TASKS.items()}


@pytest.fixture(scope="session")
def token_folders(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same of tasks that label tokens."""
    root = tmp_path_factory.mktemp("token_tasks")
    return {name: save_task(backbone, root / name, config) for name, config in TOKEN_TASKS.items()}


@pytest.fixture(scope="session")
def engine(backbone: Path, folders: dict[str, Path]) -> MultiTaskEngine:
    """Shared by the tests that leave it as it is."""
    return MultiTaskEngine(backbone, folders, token_budget=64)


@pytest.fixture
def changing_engine(backbone: Path, folders: dict[str, Path]) -> MultiTaskEngine:
    """For a test that changes its tasks."""
    return MultiTaskEngine(backbone, folders, token_budget=64)


def save_task(backbone: Path, folder: Path, config: PeftConfig, seed: int = 0) -> Path:
    """Save an adapter with random values and a random head."""
    torch.manual_seed(seed)
    labels_tokens = config.task_type == "TOKEN_CLS"
    auto = AutoModelForTokenClassification if labels_tokens else AutoModelForSequenceClassification
    model = get_peft_model(auto.from_pretrained(backbone), copy.copy(config))  # PEFT notes the backbone in it
    randomize(model, "default")
    model.save_pretrained(str(folder))
    return folder
