"""SPT on the real models: made sparse, fine-tuned, saved, and dense again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.real.models import GEMMA, MPNET, Rows, batch_of, changed_tensors, classifier, language_model, tokenizer_of
from transformers import Trainer, TrainingArguments

from sparsepeft import SptConfig, sparsify
from sparsepeft.spt import desparsify, load_sparse, sparsification
from sparsepeft.tasks import TaskData

pytestmark = pytest.mark.real
T = 48


@pytest.fixture(scope="module")
def ids(news: TaskData) -> torch.Tensor:
    """Two blocks of text, (2, T)."""
    text = " ".join(row["text"] for row in news.train.select(range(8)))
    return tokenizer_of(GEMMA)(text, return_tensors="pt")["input_ids"][:, : 2 * T].reshape(2, T)


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits


def test_gemma_is_dense_again_bit_for_bit(ids: torch.Tensor) -> None:
    model, original = language_model(), language_model()
    expected = _logits(original, ids)
    sparsify(model, SptConfig(), ids)
    done = sparsification(model)
    assert done is not None
    assert len(done.attention) == len(done.feed_forwards) == model.config.num_hidden_layers
    assert not torch.equal(_logits(model, ids), expected)
    assert desparsify(model) is model
    assert changed_tensors(model, original) == []
    assert torch.equal(_logits(model, ids), expected)


@pytest.mark.parametrize(
    "form",
    [
        {"granularity": "token"},
        {"granularity": "block", "block_size": 16},
        {"similarity": "matches", "values": "routed"},
    ],
    ids=["token", "block", "paper"],
)
def test_gemma_with_all_keys_and_blocks_is_the_dense_model(form: dict[str, Any], ids: torch.Tensor) -> None:
    model = language_model(dtype=torch.float32)
    expected = _logits(model, ids)
    everything = SptConfig(top_l=T, num_active_blocks=1.0, **form)
    sparsify(model, everything, ids)
    # float32's rounding in sums of another order, through eighteen layers, on logits of up to 35
    torch.testing.assert_close(_logits(model, ids), expected, rtol=1e-4, atol=1e-3)


def test_of_mpnet_the_ffns_alone(rows: Rows) -> None:
    model, original = classifier(MPNET, 5), classifier(MPNET, 5)
    batch = batch_of(MPNET, rows)
    expected = original(**batch).logits
    with pytest.raises(ValueError, match="does not attend through"):
        sparsify(model, SptConfig(), batch)
    assert changed_tensors(model, original) == []
    sparsify(model, SptConfig(attention=False, values="routed", num_active_blocks=1.0), batch)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    desparsify(model)
    sparsify(model, SptConfig(attention=False, values="routed"), batch)
    assert not torch.allclose(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    desparsify(model)
    assert changed_tensors(model, original) == []
    assert torch.equal(model(**batch).logits, expected)


def test_lora_on_a_sparse_gemma_learns_and_is_loaded_again(ids: torch.Tensor, tmp_path: Path) -> None:
    model = sparsify(language_model(), SptConfig(codebook_interval=4), ids)
    targets = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    done = sparsification(model)
    assert done is not None
    books = {name: layer.state.current.codebooks.clone() for name, layer in done.attention.items()}
    arguments = TrainingArguments(
        str(tmp_path / "checkpoints"),
        max_steps=10,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    examples = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model, arguments, train_dataset=examples, eval_dataset=examples)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before
    _, *others = done.attention  # LoRA is not on what the first layer's keys are made of
    assert all(not torch.equal(done.attention[name].state.current.codebooks, books[name]) for name in others)
    model.save_pretrained(str(tmp_path / "adapter"))
    again = load_sparse(language_model(), tmp_path / "adapter")
    assert torch.equal(_logits(again, ids), _logits(model, ids))
