"""Fine-tuning a sparse model: LoRA and SPARTAN on top, Trainer, resuming, checkpointing, refreshed codebooks, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.spt.models import DECODERS, TARGETS, build, inputs, logits, sparse
from transformers import Trainer, TrainingArguments, set_seed

from sparsepeft import SpartanConfig
from sparsepeft.errors import UserError
from sparsepeft.spt import load_sparse, sparsification


def with_lora(name: str, **values: Any) -> PeftModel:
    values = {"top_l": 6, "codebook_interval": 2} | values
    return get_peft_model(sparse(name, "left", **values), LoraConfig(target_modules=TARGETS[name], r=3))


def step(model: Any, name: str, optimizer: torch.optim.Optimizer) -> float:
    given = inputs(name)
    labels = torch.tensor([0, 1, 0]) if name == "bert" else given["input_ids"]
    loss = model(**given, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_saved_and_loaded_with_the_adapter(name: str, tmp_path: Path) -> None:
    model = with_lora(name).train()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    losses = [step(model, name, optimizer) for _ in range(6)]
    assert losses[-1] < losses[0]
    model.eval()
    expected = logits(model, name)
    model.save_pretrained(str(tmp_path))
    again = load_sparse(build(name), tmp_path)
    torch.testing.assert_close(logits(again, name), expected, rtol=0, atol=0)
    assert sparsification(again).config == sparsification(model).config
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size < sum(p.numel() * p.element_size() for p in build(name).parameters()) / 2


def test_codebooks_follow_between_steps_and_only_then() -> None:
    model = with_lora("llama").train()
    states = [layer.state for layer in sparsification(model).attention.values()]
    before = [state.current.codebooks.clone() for state in states]
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    changed = []
    for _ in range(5):
        step(model, "llama", optimizer)
        changed.append(any(not torch.equal(s.current.codebooks, b) for s, b in zip(states, before, strict=True)))
        before = [state.current.codebooks.clone() for state in states]
    assert changed == [False, False, True, False, True]  # due after steps 2 and 4, computed and used after 3 and 5
    # Keys of the first layer stay as they were: LoRA is on queries.
    assert not torch.equal(states[1].current.codebooks, states[1].original_module.codebooks)
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    model(**inputs("llama"))
    other.step()
    assert all(torch.equal(s.current.codebooks, b) for s, b in zip(states, before, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_gradient_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = with_lora(name).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.hidden_dropout_prob = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        optimizer = torch.optim.SGD(trained(model), lr=1e-2)
        found.append([step(model, name, optimizer) for _ in range(5)])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_padding_has_no_part_in_load_balancing() -> None:
    gradients = []
    for token in (0, 7):
        model = sparse("llama", attention=False, load_balancing_coef=10.0).train()
        given = inputs("llama", padding="right")
        mask = given["attention_mask"].bool()
        given["input_ids"] = torch.where(mask, given["input_ids"], token)
        labels = torch.where(mask, given["input_ids"], -100)
        model(**given, labels=labels).loss.backward()
        routers = [routed.spt_router.current for _, routed in sparsification(model).feed_forwards]
        gradients.append([router.weight.grad for router in routers])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def arguments(folder: Path, **values: Any) -> TrainingArguments:
    return TrainingArguments(str(folder), use_cpu=True, report_to="none", **values)


@pytest.mark.slow
def test_trainer(tmp_path: Path) -> None:
    model = with_lora("llama")
    given = inputs("llama", padding=None, batch=4)["input_ids"]
    data = [{"input_ids": row, "labels": row} for row in given]
    settings = {"per_device_train_batch_size": 4, "gradient_checkpointing": True, "bf16": True}
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=20, learning_rate=2e-2, logging_steps=1, **settings), train_dataset=data
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert load_sparse(build("llama"), tmp_path / "checkpoint-20")


def trainer(name: str, adapter: Any, folder: Path) -> Trainer:
    set_seed(0)
    model = get_peft_model(sparse(name, top_l=6, codebook_interval=2, dense_steps=4), adapter)
    ids = inputs(name, padding=None, batch=12)["input_ids"]
    data = [{"input_ids": row, "labels": row if name in DECODERS else int(row[0]) % 2} for row in ids]
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    return Trainer(
        model, arguments(folder, max_steps=7, save_steps=1, learning_rate=1e-2, **batches), train_dataset=data
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("llama", LoraConfig(target_modules=TARGETS["llama"], r=3, lora_dropout=0.2)),
        ("bert", SpartanConfig(task_type="SEQ_CLS", load_balancing_coef=0.1)),
    ],
    ids=["lora", "spartan"],
)
def test_resumed_training_is_uninterrupted_training(name: str, adapter: Any, tmp_path: Path) -> None:
    """From the checkpoint of a step after which codebooks are due, of one before, and of the last dense step."""
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


def test_adapters_of_dense_models_are_told(tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=TARGETS["llama"], r=3)
    get_peft_model(build("llama"), lora).save_pretrained(str(tmp_path / "dense"))
    with pytest.raises(UserError, match="not trained on a sparse model"):
        load_sparse(build("llama"), tmp_path / "dense")
    with_lora("llama").save_pretrained(str(tmp_path / "sparse"))
    with pytest.raises(UserError, match="does not belong to this model"):
        load_sparse(build("opt"), tmp_path / "sparse")
    with pytest.raises(ValueError, match="sparse already"):
        load_sparse(sparse("llama"), tmp_path / "sparse")


def test_report() -> None:
    model = sparse("llama", top_l=0.25)
    done = sparsification(model)
    assert done.config.top_l == 6
    report = done.report
    assert list(report.recall) == [f"model.layers.{layer}.self_attn" for layer in (0, 1)]
    assert all(0 < recall < 1 for recall in report.recall.values())
    assert all(0 < error < 1.5 for error in [*report.attention_error.values(), *report.feed_forward_error.values()])
    assert report.feed_forward_operations == pytest.approx(0.5 + 32 * 4 / (3 * 32 * 64))
    whole = sparsification(sparse("llama", top_l=24, num_active_blocks=4))
    errors = [*whole.report.attention_error.values(), *whole.report.feed_forward_error.values()]
    assert errors == pytest.approx([0.0] * 4, abs=1e-5)
    assert list(whole.report.recall.values()) == [1.0, 1.0]


def test_codebooks_are_refreshed_by_whatever_a_batch_has() -> None:
    """Fewer tokens than codewords, none that counts, one text of one token."""
    model = with_lora("bert", codebook_interval=1, ffn=False).train()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    codebooks = next(iter(sparsification(model).attention.values())).state
    changed = []
    for tokens, mask in ((5, 1), (5, 1), (1, 1), (4, 0)):
        before = codebooks.current.codebooks.clone()
        ids = torch.full((1, tokens), 7)
        model(input_ids=ids, attention_mask=torch.full_like(ids, mask), labels=torch.tensor([1])).loss.backward()
        optimizer.step()
        changed.append(not torch.equal(codebooks.current.codebooks, before))
        assert codebooks.current.codebooks.isfinite().all()
    assert changed == [False, True, True, False]
