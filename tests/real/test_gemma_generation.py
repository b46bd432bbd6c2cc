"""Gemma in bfloat16 with a memory in float32 continues texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tests.real.models import GEMMA, STEPS, Rows, language_model, tokenizer_of

from sparsepeft import SpartanConfig

pytestmark = pytest.mark.real
PROMPTS = ["One, two, three, four,", "Shares fell sharply on Wall Street after", "In the second half the striker"]
# Logits here are between 16 and 32, where bfloat16 has steps of 1/8, and two sums may each be off by a step.
TIE = 0.25


def _batch(texts: list[str]) -> dict[str, torch.Tensor]:
    return dict(tokenizer_of(GEMMA)(texts, padding=True, return_tensors="pt"))


def _generate(model: Any, texts: list[str], **values: Any) -> torch.Tensor:
    """The tokens that follow each of the texts, greedily."""
    batch = _batch(texts)
    # Without logits_to_keep=0 the head reads a slice of the states, and torch then copies a frozen weight for each row.
    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "logits_to_keep": 0}
    return model.generate(**batch, **(settings | values))[:, batch["input_ids"].shape[1] :]


def _with_memory() -> PeftModel:
    return get_peft_model(language_model(), SpartanConfig(task_type="CAUSAL_LM"))


@pytest.fixture(scope="module")
def tuned(rows: Rows) -> PeftModel:
    """A memory trained on the beginnings of two texts."""
    torch.manual_seed(0)
    model = _with_memory().train()
    batch = _batch([" ".join(row["text"].split()[:12]) for row in rows[:2]])
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    return model.eval()


def test_a_fresh_memory_continues_as_the_backbone_does() -> None:
    expected = _generate(language_model(), PROMPTS)
    model = _with_memory()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.dtype == torch.bfloat16
    assert torch.equal(_generate(model, PROMPTS), expected)
    with model.disable_adapter():
        expected = _generate(model, PROMPTS, use_cache=False)
    assert torch.equal(_generate(model, PROMPTS, use_cache=False), expected)


@torch.no_grad()
def test_cached_tokens_of_a_padded_batch_are_those_of_each_text_alone(tuned: PeftModel) -> None:
    assert tokenizer_of(GEMMA).padding_side == "left"
    tokens = _generate(tuned, PROMPTS)
    with tuned.disable_adapter():
        assert not torch.equal(_generate(tuned, PROMPTS), tokens)
    for text, continuation in zip(PROMPTS, tokens, strict=True):
        prompt = _batch([text])["input_ids"][0]
        logits = tuned(input_ids=torch.cat([prompt, continuation])[None], use_cache=False).logits[0].float()
        logits = logits[len(prompt) - 1 : -1]
        chosen = logits.gather(1, continuation[:, None])[:, 0]
        assert (logits.amax(1) - chosen).max() <= TIE


def test_in_float32_they_are_the_same_tokens(tuned: PeftModel) -> None:
    dtype = tuned.dtype
    tuned.get_base_model().float()
    try:
        tokens = _generate(tuned, PROMPTS)
        assert torch.equal(_generate(tuned, PROMPTS, use_cache=False), tokens)
        assert torch.equal(torch.cat([_generate(tuned, [text]) for text in PROMPTS]), tokens)
        with tuned.disable_adapter():
            bare = _generate(tuned, PROMPTS)
        mixed = _generate(tuned, PROMPTS, adapter_names=["default", "__base__", "default"])
        assert torch.equal(mixed, torch.stack([tokens[0], bare[1], tokens[2]]))
    finally:
        tuned.get_base_model().to(dtype)
