"""A language model's loss without its logits: the model's own, in value and gradients."""

from __future__ import annotations

import copy
import importlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from peft import LoraConfig, get_peft_model
from tests.spt.models import DECODERS, SIZES, TARGETS, V, inputs, sparse
from tests.tiny import topics_text
from torch import Tensor, nn

from sparsepeft.models import DeferredLogits, deferred_logits, language_model_loss
from sparsepeft.training import RunConfig, train

_TAKEN = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "head_dim")
_SIZES = {name: getattr(DECODERS["gemma"][1], name) for name in (*_TAKEN, "num_key_value_heads")}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": V}
# What each does to what its head computes: nothing, a softcap, a factor, a divisor, a bias, a label for each position.
MODELS: dict[str, Any] = {
    "llama": lambda: hf.LlamaForCausalLM(DECODERS["llama"][1]),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_SIZES, final_logit_softcapping=3.0)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_SIZES)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**_SIZES, logit_scale=0.2)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**_SIZES, logits_scaling=3.0)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5, decoder_start_token_id=0)),
}


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Small chunks; arguments of the calls that took a loss in chunks."""
    logits, calls = importlib.import_module("sparsepeft.models.logits"), []
    operator = logits.linear_cross_entropy

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return operator(*args, **kwargs)

    monkeypatch.setattr(logits, "linear_cross_entropy", noted)
    monkeypatch.setattr(importlib.import_module("sparsepeft.ops.linear_cross_entropy.pytorch"), "_CHUNK", 5 * V)
    return calls


def both(model: nn.Module, **values: Any) -> None:
    """Loss and gradients with the logits deferred are those without."""
    results = []
    for context in (nullcontext(), deferred_logits(model)):
        model.zero_grad()
        with context:
            loss = model(**values).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 1
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert not any(type(head).__name__.startswith("Deferring") for head in heads)


def ids_and_labels() -> dict[str, Tensor]:
    ids = torch.randint(3, V, (3, 17))
    labels = ids.clone()
    labels[1, :9] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_models_own(name: str, taken: list[dict[str, Any]]) -> None:
    model = MODELS[name]().eval()
    both(model, **ids_and_labels())
    both(model, **ids_and_labels(), num_items_in_batch=torch.tensor(77))
    assert len(taken) == 2
    expected = {"gemma2": (1.0, 3.0), "cohere": (0.2, None), "granite": (1 / 3, None)}.get(name, (1.0, None))
    assert (taken[0]["scale"], taken[0]["softcap"]) == pytest.approx(expected)


def test_with_adapters(taken: list[dict[str, Any]]) -> None:
    for config, is_taken in (
        (LoraConfig(target_modules=["q_proj"], r=3, init_lora_weights=False), True),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), True),
        (LoraConfig(target_modules=["q_proj", "lm_head"], r=3, init_lora_weights=False), False),
    ):
        taken.clear()
        model = get_peft_model(MODELS["llama"](), config).eval()
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        both(model, **ids_and_labels())
        assert bool(taken) is is_taken


def test_a_sparse_model_keeps_its_balance(taken: list[dict[str, Any]]) -> None:
    model = sparse("llama", top_l=6, values="routed", load_balancing_coef=0.5, codebook_interval=0)
    model = get_peft_model(model, LoraConfig(target_modules=TARGETS["llama"], r=3, init_lora_weights=False)).train()
    values = inputs("llama", padding="right")
    labels = values["input_ids"].masked_fill(values["attention_mask"] == 0, -100)
    both(model, **values, labels=labels)
    both(model, **values, labels=labels, num_items_in_batch=torch.tensor(50))
    assert len(taken) == 2
    results = []
    for context in (nullcontext(), deferred_logits(model)):  # the loss is outside, as Trainer's label smoothing is
        model.zero_grad()
        with context:
            logits = model(**values).logits
            loss = 0.1 * F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
        loss.backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_the_logits_are_there_when_they_are_asked_for() -> None:
    head = nn.Linear(5, 11)
    hidden = torch.randn(2, 7, 5)
    logits, deferred = head(hidden), DeferredLogits(hidden, head.weight, head.bias)
    for use in (
        lambda x: x.float() * 2,
        lambda x: x[..., :-1, :].contiguous().view(-1, 11),
        lambda x: x[0],
        lambda x: x[:, :, 2:],
        lambda x: (x / 3).tanh() * 3,
        lambda x: ((x / 3).tanh() * 3).tanh(),
        lambda x: torch.tanh(x) + 1,
        lambda x: 1 - x,
        lambda x: x * -2,
        lambda x: abs(x) ** 2 + 2**x + x % 2 + x // 3,
        lambda x: x @ torch.ones(11),
        lambda x: (x == x) & (x != 0),
        lambda x: x.view(-1),
        lambda x: x.to(torch.float64),
        lambda x: x.softmax(-1),
        lambda x: torch.cat([x, x]),
        lambda x: F.cross_entropy(x.view(-1, 11), torch.arange(11).repeat(2)[:14], label_smoothing=0.1),
        lambda x: F.cross_entropy(x.transpose(1, 2), torch.zeros(2, 7, dtype=torch.long), reduction="none"),
    ):
        got = use(deferred)
        got = got.compute() if isinstance(got, DeferredLogits) else got
        torch.testing.assert_close(got, use(logits))
    assert (deferred.shape, deferred.ndim, deferred.size(-1), len(deferred)) == (logits.shape, 3, 11, 2)


def test_by_itself(taken: list[dict[str, Any]]) -> None:
    model, ids = MODELS["llama"]().eval(), torch.randint(3, V, (2, 9))
    torch.testing.assert_close(language_model_loss(model, ids), model(input_ids=ids, labels=ids).loss)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    with torch.no_grad():
        want = model(input_ids=ids, labels=ids.masked_fill(mask == 0, -100), attention_mask=mask).loss
        torch.testing.assert_close(language_model_loss(model, ids, attention_mask=mask), want)
        with torch.autocast("cpu", torch.bfloat16):
            want = model(input_ids=ids, labels=ids).loss
            torch.testing.assert_close(language_model_loss(model, ids), want, rtol=0.02, atol=0.02)
    assert len(taken) == 3
    with deferred_logits(nn.Linear(2, 2)):  # nothing to defer
        pass


def test_padding_predicts_nothing() -> None:
    model, ids = MODELS["llama"]().eval(), torch.randint(3, V, (1, 9))
    expected = language_model_loss(model, ids)
    padding, ones = torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)
    for order in (1, -1):  # to the right, to the left
        padded, mask = (torch.cat([real, padding][::order], dim=1) for real in (ids, ones))
        torch.testing.assert_close(language_model_loss(model, padded, attention_mask=mask), expected)


class DeferringTrainer(hf.Trainer):
    """As docs/spt.md has it."""

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with deferred_logits(model):
            return super().compute_loss(model, *args, **kwargs)


def test_trainer_evaluates_as_ever(tmp_path: Path, taken: list[dict[str, Any]]) -> None:
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, V, (4, 9))]
    options = {"report_to": "none", "use_cpu": True, "max_steps": 2, "disable_tqdm": True, "save_strategy": "no"}
    args = hf.TrainingArguments(str(tmp_path), **options)
    results = []
    for kind in (hf.Trainer, DeferringTrainer):
        torch.manual_seed(0)
        trainer = kind(
            MODELS["llama"](),
            args,
            train_dataset=rows,
            eval_dataset=rows,
            compute_metrics=lambda given: {"mean": given.predictions.mean()},
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        )
        found = trainer.evaluate()
        results.append([found["eval_loss"], found["eval_mean"], trainer.predict(rows).predictions.tolist()])
        assert not taken
        trainer.train()
    assert len(taken) == 2
    assert results[0] == results[1]


def test_logits_that_are_read_late() -> None:
    model, ids = MODELS["llama"](), torch.randint(3, V, (2, 9))
    with torch.no_grad(), deferred_logits(model):
        assert type(model(input_ids=ids, labels=ids).logits) is Tensor
    with torch.no_grad(), deferred_logits(model, always=True):
        output = model(input_ids=ids, labels=ids)
        expected = model.lm_head(model.model(ids).last_hidden_state).compute()
    assert not F.cross_entropy(output.logits.view(-1, V), ids.view(-1)).requires_grad
    for one in (output.logits, copy.deepcopy(output.logits), torch.from_numpy(output.logits.numpy())):
        torch.testing.assert_close(torch.as_tensor(one + 0), expected)
        assert not one.requires_grad

    with deferred_logits(model):
        output, unread = model(input_ids=ids, labels=ids), model(input_ids=ids, labels=ids)
    with torch.no_grad():
        assert not F.cross_entropy(output.logits.view(-1, V), ids.view(-1)).requires_grad
        read = output.logits.compute()  # as for an accuracy, before a loss of them
    assert read.requires_grad
    (read.square().mean() + output.loss).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(output.logits + 0, read)
    changed = "Logits were read after the model's head had changed"
    for late in (lambda: unread.logits + 1, lambda: F.cross_entropy(unread.logits.view(-1, V), ids.view(-1))):
        with pytest.raises(RuntimeError, match=changed):
            late()
    with torch.inference_mode(), deferred_logits(model, always=True):
        output = model(input_ids=ids, labels=ids)
    assert not output.logits.compute().requires_grad


@pytest.mark.slow
def test_training_and_perplexity_take_it(
    tiny_language_model: Path, tmp_path: Path, taken: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model": str(tiny_language_model), "text": str(topics_text(tmp_path)), "block_length": 32}
    short = {"max_steps": 2, "batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    results = []
    for name in ("deferred", "dense"):
        config = RunConfig("lm", str(tmp_path / name), **(options | short))  # type: ignore[arg-type]
        results.append(train(config)["metrics"]["validation"]["loss"])
        assert taken
        taken.clear()
        for module in ("sparsepeft.training.fit", "sparsepeft.models.logits"):
            monkeypatch.setattr(f"{module}.deferred_logits", lambda model, **values: nullcontext(taken.append({})))
    assert results[0] == pytest.approx(results[1], rel=1e-5)
