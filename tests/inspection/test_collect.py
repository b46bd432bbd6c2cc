"""Watching real (tiny, random) models of several architectures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from tests.models import ARCHITECTURES, adapted, add, build, run

from sparsepeft import HeadConfig, SpartanConfig
from sparsepeft.errors import UserError
from sparsepeft.inspection import MemoryReport, Words, find_memories, inspect_memories, quantile_edges
from sparsepeft.tuners.spartan import SpartanLayer

LABELS = torch.tensor([0, 1, 1])


def inputs(name: str = "bert", **extra: Any) -> dict[str, Any]:
    return ARCHITECTURES[name].inputs() | extra


def hooks(model: PeftModel) -> int:
    layers = (layer for layer in model.modules() if isinstance(layer, SpartanLayer))
    memories = (memory for layer in layers for memory in layer.spartan_memory.values())
    return sum(len(memory._forward_pre_hooks) + len(memory._forward_hooks) for memory in memories)


def same(one: Any, other: Any) -> None:
    """Equal in counts, near in fractions."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            same(value, other[key])
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for left, right in zip(value, other[key], strict=True):
                same(left, right)
        else:
            assert value == (pytest.approx(other[key], rel=1e-4) if isinstance(value, float) else other[key]), key


def test_outputs_mode_adapters_and_randomness_are_left_alone() -> None:
    model = adapted("bert")
    add(model, "other")
    model.train()
    model.get_base_model().bert.embeddings.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    names = [name for name, _ in model.named_parameters()]
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    model.eval()
    before = run(model, inputs())
    for name, module in model.named_modules():
        module.training = modes[name]
    state = torch.get_rng_state()

    report = inspect_memories(model, [inputs(labels=LABELS)], compare_untrained=True)

    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [name for name, _ in model.named_parameters()] == names
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert (model.active_adapter, sorted(model.peft_config)) == ("default", ["default", "other"])
    assert torch.equal(run(model.eval(), inputs()), before)
    assert hooks(model) == 0
    assert report.adapter == "default"
    assert report.untrained is not None
    assert all(layer.moved == 0 for layer in report.untrained.layers)
    assert all(layer.moved > 0 for layer in report.layers)


def test_the_model_answers_the_same_while_it_is_watched() -> None:
    model = adapted("bert")
    expected, seen = run(model, inputs()), []
    handle = model.get_base_model().register_forward_hook(lambda module, args, output: seen.append(output.logits))
    inspect_memories(model, [inputs(labels=LABELS)])
    handle.remove()
    assert torch.equal(seen[0], expected)


def test_hooks_are_removed_after_an_error() -> None:
    model = adapted("bert").train()
    with pytest.raises(IndexError):
        inspect_memories(model, [inputs(input_ids=torch.full((3, 7), 10_000))])
    with pytest.raises(UserError, match="label names"):
        inspect_memories(model, [inputs(labels=LABELS + 5)], compare_untrained=True)
    assert hooks(model) == 0
    assert model.training
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(("name", "side"), [("bert", "right"), ("llama", "right"), ("llama", "left")])
def test_padding_never_counts(name: str, side: str) -> None:
    model = adapted(name)
    batch = inputs(name)

    def padded(by: int) -> dict[str, Any]:
        where = (0, by) if side == "right" else (by, 0)
        return {key: torch.nn.functional.pad(value, where) for key, value in batch.items()} | {"labels": LABELS}

    few, many = (inspect_memories(model, [padded(by)]) for by in (0, 6))
    assert few.layers[0].positions == int(batch["attention_mask"].sum()) == 19
    same(few.to_dict(), many.to_dict())


def test_batching_does_not_matter_and_memory_is_bounded() -> None:
    model = adapted("bert")
    rows = [{key: value[i : i + 1] for key, value in inputs(labels=LABELS).items()} for i in range(3)]
    together, apart = inspect_memories(model, [inputs(labels=LABELS)]), inspect_memories(model, iter(rows))
    same(together.to_dict(), apart.to_dict())
    assert together.layers[0].documents == 3
    parts = inspect_memories(model, [inputs(labels=LABELS) | {"documents": np.array([0, 0, 1])}])
    assert sum(sum((parent.labels_documents or {}).values()) for parent in parts.layers[0].parents) == 2
    assert (parts.layers[0].documents, parts.layers[0].positions) == (2, together.layers[0].positions)


def test_one_layer() -> None:
    model = adapted("bert")
    report = inspect_memories(model, [inputs()], layer=1)
    assert [(layer.index, layer.name) for layer in report.layers] == [(1, "bert.encoder.layer.1")]
    with pytest.raises(UserError, match=r"`layer=7` was given.*choose one of 0, 1, 2"):
        inspect_memories(model, [inputs()], layer=7)


def without_labels(report: MemoryReport) -> bool:
    dumped = [value for layer in report.layers for value in (layer.nmi_documents, layer.nmi_positions)]
    dumped += [v for layer in report.layers for p in layer.parents for v in (p.purity, p.labels_positions)]
    return report.label_names is None and dumped == [None] * len(dumped)


def test_a_decoder_without_labels() -> None:
    model = adapted("llama")
    report = inspect_memories(model, [inputs("llama")], compare_untrained=True)
    assert without_labels(report)
    assert any("no labels" in note for note in report.notes)
    next_tokens = inspect_memories(model, [inputs("llama", labels=inputs("llama")["input_ids"])])
    assert without_labels(next_tokens)
    assert any("next tokens" in note for note in next_tokens.notes)
    assert next_tokens.layers[-1].positions == 19


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_counts_each_stack_by_its_own_mask(name: str) -> None:
    model = adapted(name)
    batch = inputs(name)
    decoder_mask = torch.ones_like(batch["decoder_input_ids"])
    decoder_mask[0, 3:] = 0
    report = inspect_memories(model, [batch | {"decoder_attention_mask": decoder_mask}])
    assert [layer.index for layer in report.layers] == [0, 1, 2, 0, 1, 2]
    encoder, decoder = report.layers[0].positions, report.layers[-1].positions
    assert (encoder, decoder) == (19, int(decoder_mask.sum()))
    # Labels from which the model makes the decoder's inputs: it gets them, and -100 does not count.
    labels = torch.full((3, 4), 5)
    labels[1, 2:] = -100
    of_labels = {key: value for key, value in batch.items() if not key.startswith("decoder")} | {"labels": labels}
    assert inspect_memories(model, [of_labels]).layers[-1].positions == 10


def test_a_layer_that_is_called_several_times() -> None:
    report = inspect_memories(adapted("albert"), [inputs(labels=LABELS)])
    (layer,) = report.layers
    assert (layer.positions, layer.documents) == (3 * 19, 3)


@pytest.mark.parametrize("name", ["xlnet", "vit", "swin", "clip-imagecls", "wav2vec2", "whisper", "modernbert"])
def test_other_architectures(name: str) -> None:
    labels = {} if name == "whisper" else {"labels": LABELS}
    report = inspect_memories(adapted(name), [inputs(name) | labels])
    assert all(layer.documents == 3 and layer.positions > 0 for layer in report.layers)
    if name == "xlnet":
        assert report.layers[0].positions == 19


def test_classes_of_positions() -> None:
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.BertConfig(**sizes, intermediate_size=64, id2label={0: "O", 1: "NAME"})
    torch.manual_seed(0)
    backbone = hf.BertForTokenClassification(config)
    model = get_peft_model(backbone, SpartanConfig(num_parents=4, top_k=2, task_type="TOKEN_CLS"))
    labels = torch.randint(0, 2, (3, 7))
    labels[:, 0] = -100
    report = inspect_memories(model, [inputs(labels=labels)])
    counted = (labels >= 0) & (inputs()["attention_mask"] == 1)
    totals = [sum((p.labels_positions or {})[name] for p in report.layers[0].parents) for name in ("O", "NAME")]
    assert totals == [int((labels[counted] == 0).sum()), int((labels[counted] == 1).sum())]
    assert report.layers[0].nmi_positions is not None
    assert report.layers[0].nmi_documents is None
    assert any("belong to positions" in note for note in report.notes)


def test_values_are_put_into_bins() -> None:
    model = adapted("bert")
    values = torch.tensor([0.5, 2.0, 4.5])
    with pytest.raises(UserError, match="label_edges=quantile_edges"):
        inspect_memories(model, [inputs(labels=values)])
    edges = quantile_edges([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], num_bins=3)
    report = inspect_memories(model, [inputs(labels=values[:, None])], label_edges=edges)
    assert edges == pytest.approx([5 / 3, 10 / 3])
    assert report.label_names == ("up to 1.667", "1.667 to 3.333", "above 3.333")
    counts = [sum((p.labels_documents or {})[name] for p in report.layers[0].parents) for name in report.label_names]
    assert counts == [1, 1, 1]
    assert quantile_edges([2.0, 2.0, 2.0]) == []


def test_words_of_the_batch() -> None:
    batch = inputs()
    ids = batch["input_ids"].flatten().tolist()
    occurrence = torch.where(batch["attention_mask"] == 1, torch.arange(len(ids)).view_as(batch["input_ids"]), -1)
    words = Words([f"word {token}" for token in ids], occurrence.numpy())
    report = inspect_memories(adapted("bert"), [batch | {"words": words}] * 20, keep_stop_words=True)
    found = {word.word: word for parent in report.layers[0].parents for word in parent.words}
    assert set(found) <= set(words.texts)
    assert any(word.count % 20 == 0 and word.z >= 2 for word in found.values())


def test_what_cannot_be_inspected() -> None:
    head = get_peft_model(build("bert"), HeadConfig(task_type="SEQ_CLS"))
    for model, words in ((head, "has no SPARTAN memory"), (build("bert"), "is no PeftModel")):
        with pytest.raises(UserError, match=words):
            find_memories(model)
    model = adapted("bert")
    with pytest.raises(UserError, match="nothing to count"):
        inspect_memories(model, [])
    with pytest.raises(UserError, match="an iterator was given"):
        inspect_memories(model, iter([inputs()]), compare_untrained=True)


def test_product_keys_are_inspected_and_of_many_parents_those_that_were_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsepeft.inspection.report.MAX_LISTED", 40)
    monkeypatch.setattr("sparsepeft.inspection.collect.MAX_LISTED", 40)
    model = adapted("bert", parent_keys="product", num_parents=900)
    words = Words(["one"], np.zeros(inputs()["input_ids"].shape, dtype=np.int64))
    report = inspect_memories(model, [inputs(labels=LABELS, words=words)])
    assert report.notes == (
        "The memories have 900 parents; the 40 of each that were picked most are listed, and no words were counted.",
    )
    for layer in report.layers:
        assert (layer.num_parents, len(layer.parents)) == (900, 40)
        picked = 900 - len(layer.dead_parents)
        assert sum(parent.share_picked > 0 for parent in layer.parents) == min(40, picked)
        assert layer.describe_dead() == f"{900 - picked} of 900"
