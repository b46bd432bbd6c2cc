"""Trainings of sparse models that are interrupted and resumed by Trainer alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.spt.models import DECODERS, build, inputs
from transformers import Trainer, TrainingArguments, set_seed

from sparsepeft import SpartanConfig
from sparsepeft.spt import SptConfig, sparsification, sparsify

LORA = LoraConfig(target_modules=["q_proj", "up_proj", "down_proj"], r=3, lora_dropout=0.2)
INTERVAL, STEPS = 2, 7


def trainer(name: str, adapter: Any, folder: Path) -> Trainer:
    set_seed(0)
    config = SptConfig(top_l=6, num_blocks=4, num_active_blocks=2, codebook_interval=INTERVAL)
    model = sparsify(build(name), config, inputs(name, padding=None))
    model = get_peft_model(model, adapter)
    ids = inputs(name, padding=None, batch=12)["input_ids"]
    data = [{"input_ids": row, "labels": row if name in DECODERS else int(row[0]) % 2} for row in ids]
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        save_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        report_to="none",
    )
    return Trainer(model, arguments, train_dataset=data)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "adapter"),
    [("llama", LORA), ("bert", SpartanConfig(task_type="SEQ_CLS", load_balancing_coef=0.1))],
    ids=["lora", "spartan"],
)
def test_resumed_training_is_uninterrupted_training(name: str, adapter: Any, tmp_path: Path) -> None:
    """From the checkpoint of a step after which codebooks are due, and of one before."""
    whole = trainer(name, adapter, tmp_path)
    before = [layer.state.current.codebooks.clone() for layer in sparsification(whole.model).attention.values()]
    whole.train()
    after = [layer.state.current.codebooks for layer in sparsification(whole.model).attention.values()]
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))
    expected = {key: tensor.clone() for key, tensor in whole.model.state_dict().items()}
    for step in (3, 4):
        resumed = trainer(name, adapter, tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        found = resumed.model.state_dict()
        assert found.keys() == expected.keys()
        assert [key for key in found if not torch.equal(found[key], expected[key])] == []
