"""Plans that keep to a budget: how they are chosen, and that they do."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
import transformers as hf
from tests.spt.models import SIZES, V, build, inputs

from sparsepeft.models.blocks import find_blocks
from sparsepeft.planning import DENSE, Choice, LossMeter, Text, fastest, read_text, search
from sparsepeft.spt import Plan, SptConfig, desparsify, load_sparse, save_sparse, sparsification, sparsify


def masked() -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = hf.BertForMaskedLM(hf.BertConfig(**SIZES, initializer_range=0.2)).eval()
    given = inputs("bert", "right")
    labels = torch.where(torch.arange(24) % 5 == 1, given["input_ids"], -100) * given["attention_mask"]
    return model, given | {"labels": torch.where(given["attention_mask"].bool(), labels, -100)}


def test_the_fastest_plan_is_that_of_all_combinations() -> None:
    generator = torch.Generator().manual_seed(0)
    for allowance in (0.0, 0.01, 0.05, 1.0):
        options = {}
        for name in "abcd":
            changes = torch.rand(3, generator=generator) * 0.03 - 0.003
            times = torch.rand(3, generator=generator)
            sparse = [Choice({"top_l": i}, float(changes[i]), 1.0, float(times[i])) for i in range(3)]
            options[name] = [Choice(DENSE, 0.0, 1.0, 1.0), *sparse]

        def cost(plan: Any) -> float:
            return sum(max(choice.loss_change, 0.0) for choice in plan)

        def time(plan: Any) -> float:
            return sum(choice.sparse_ms for choice in plan)

        found = list(fastest(options, allowance).values())
        assert cost(found) <= allowance
        # Losses are rounded up, by a 4096th of the allowance for each module.
        allowed = [plan for plan in itertools.product(*options.values()) if cost(plan) <= allowance * (1 - 4 / 4096)]
        assert time(found) <= min(map(time, allowed)) + 1e-9


def test_a_surcharge_drops_what_saves_the_least() -> None:
    """Losses that fell by chance cost nothing alone; together they do."""
    options = {
        name: [Choice(DENSE, 0.0, 1.0, 1.0), Choice({"top_l": 8}, -0.001, 1.0, sparse_ms)]
        for name, sparse_ms in (("a", 0.2), ("b", 0.5), ("c", 0.9))
    }
    options["d"] = [Choice(DENSE, 0.0, 1.0, 1.0), Choice({"values": "exact"}, 0.0, 1.0, 0.8)]

    def sparse(surcharge: float) -> str:
        chosen = fastest(options, 0.01, surcharge)
        assert sum(choice.cost(surcharge) for choice in chosen.values()) <= 0.01
        return "".join(name for name, choice in chosen.items() if choice.settings != DENSE)

    assert [sparse(each) for each in (0.0, 0.004, 0.006, 0.02)] == ["abcd", "abd", "ad", "d"]


def test_what_gives_no_number_is_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, bad = Choice(DENSE, 0.0, 1.0, 1.0), [Choice({"top_l": 1}, loss, 1.0, 0.1) for loss in (math.nan, math.inf)]
    for allowance in (0.0, 0.1):
        assert fastest({"a": [dense, *bad]}, allowance) == {"a": dense}

    class Failing(LossMeter):
        """Of a whole plan."""

        def loss(self, changed: str = "") -> float:
            return super().loss(changed) if changed else math.nan

    faster_when_sparser(monkeypatch)
    monkeypatch.setattr(search, "LossMeter", Failing)
    config = SptConfig(budget=0.5, num_blocks=4, num_active_blocks=2)
    modules = sparsification(sparsify(build("llama"), config, inputs("llama")["input_ids"])).plan.modules
    assert all(choice.loss_change == 0.0 for choice in modules.values())


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "opt", "gemma4", "masked"])
def test_a_meter_that_runs_the_changed_layers_alone(name: str) -> None:
    model, data = masked() if name == "masked" else (build(name), inputs(name, "left"))
    labels = data.pop("labels", None)
    text = read_text(model, {**data, "labels": labels})
    expected = model(**data, labels=text.labels).loss.item()
    meter = LossMeter(model, text)
    assert meter.initial == pytest.approx(expected, rel=1e-5)
    first, *_, last = find_blocks(model)
    with torch.no_grad():
        for parameter in last.module.parameters():
            parameter.mul_(0.9)
    changed = model(**data, labels=text.labels).loss.item()
    assert changed != pytest.approx(expected, rel=1e-4)
    assert meter.loss(f"{last.name}.anything") == pytest.approx(changed, rel=1e-5)
    with torch.no_grad():
        for parameter in first.module.parameters():
            parameter.mul_(0.9)
    if name != "gemma4":  # whose last layers take the keys of others
        assert meter.loss(f"{last.name}.anything") == pytest.approx(changed, rel=1e-5)  # the layer before is not run
    assert meter.loss() == pytest.approx(model(**data, labels=text.labels).loss.item(), rel=1e-5)


def test_some_of_a_text() -> None:
    labels = torch.arange(60).view(3, 20)
    labels[:, 0] = -100
    few = Text({"input_ids": labels}, labels).at_most(45)
    assert few.labels.shape == (2, 20)
    assert (few.labels != -100).sum() == 38
    fewer = Text({"input_ids": labels}, labels).at_most(5)
    assert fewer.labels.shape == (1, 20)
    assert fewer.labels[fewer.labels != -100].tolist() == [1, 5, 10, 14, 19]


def faster_when_sparser(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is for larger models: forms are listed from the mildest."""
    monkeypatch.setattr(search, "_alternately", lambda forms, inputs: [[10.0 - i] for i in range(len(forms))])
    monkeypatch.setattr(search, "_step_times", lambda *_: {"dense": 10.0, "sparse": 9.0})


@pytest.mark.parametrize(("name", "budget"), [("llama", 0.5), ("opt", 0.05), ("masked", 0.5)])
def test_a_plan_keeps_to_its_budget(name: str, budget: float, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    faster_when_sparser(monkeypatch)
    model, data = masked() if name == "masked" else (build(name), inputs(name, "left"))
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    held_out = {key: tensor.flip(0) for key, tensor in data.items()}
    sparsify(model, SptConfig(budget=budget, num_blocks=4, num_active_blocks=2), data, held_out_data=held_out)
    done = sparsification(model)
    plan = done.plan
    assert plan.modules.keys() == done.config.overrides.keys()
    assert len(plan.modules) == 4
    for text, change in plan.measured_change.items():
        assert change <= budget + 1e-6, text
    labels = data.get("labels")
    text = read_text(model, {**data, "labels": labels})
    assert math.exp(LossMeter(model, text).initial) == pytest.approx(plan.perplexity["calibration"]["sparse"], rel=1e-4)
    installed = dict(done.attention) | {each.name: layer for each, layer in done.feed_forwards}
    assert installed.keys() == {module for module, choice in plan.modules.items() if choice.settings != DENSE}
    assert installed
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert all(module in str(plan) for module in plan.modules)
    save_sparse(model, tmp_path)
    again = masked()[0] if name == "masked" else build(name)
    assert sparsification(load_sparse(again, tmp_path)).config == done.config
    assert all(parameter.requires_grad for parameter in model.parameters())
    desparsify(model)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in state.items())


def test_without_any_budget_only_what_costs_nothing_is_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    faster_when_sparser(monkeypatch)
    model = build("llama")
    sparsify(model, SptConfig(budget=0.0, num_blocks=4, num_active_blocks=2), inputs("llama")["input_ids"])
    plan = sparsification(model).plan
    assert plan.measured_change["calibration"] <= 1e-6
    assert all(choice.loss_change <= 0 for choice in plan.modules.values())
    assert all(choice.settings != DENSE for name, choice in plan.modules.items() if name.endswith("mlp"))


def test_what_has_no_perplexity_is_refused() -> None:
    config, ids = SptConfig(budget=0.02), torch.randint(3, V, (2, 24))
    with pytest.raises(ValueError, match="BertForSequenceClassification is no causal or masked language model"):
        sparsify(build("bert"), config, ids)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is no causal"):
        sparsify(build("t5"), SptConfig(budget=0.02, attention=False), inputs("t5"))
    with pytest.raises(ValueError, match="masked language model, and calibration_data has no labels; mask some"):
        sparsify(masked()[0], config, ids)
    with pytest.raises(ValueError, match=r"budget=0.02 needs calibration_data"):
        sparsify(build("llama"), SptConfig(budget=0.02, attention=False))
    for data, words in (
        ({"inputs_embeds": torch.randn(2, 24, SIZES["hidden_size"])}, "has inputs_embeds; pass input_ids"),
        ({"input_ids": ids, "labels": ids[:, 0]}, r"labels of shape \(2,\) were passed with input_ids"),
    ):
        with pytest.raises(ValueError, match=words):
            sparsify(build("llama"), config, data)
    with pytest.raises(ValueError, match=r"held_out_data has the token id 999, but LlamaForCausalLM knows 0 to"):
        sparsify(build("llama"), config, ids, held_out_data=torch.full((2, 24), 999))
    with pytest.raises(ValueError, match=r"held_out_data was passed without a budget"):
        sparsify(build("llama"), SptConfig(), ids, held_out_data=ids)
    with pytest.raises(
        ValueError, match=r"overrides was passed with a budget, but leaves out model.layers.0.self_attn"
    ):
        sparsify(build("llama"), SptConfig(budget=0.02, overrides={"model.layers.0.mlp": {"dense": True}}), ids)


def test_a_plan_of_which_nothing_is_sparse_takes_the_dense_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_alternately", lambda forms, inputs: [[10.0 + i] for i in range(len(forms))])
    config = SptConfig(budget=0.5, overrides={}, num_blocks=4)
    plan = sparsification(sparsify(build("llama"), config, inputs("llama")["input_ids"])).plan
    assert all(choice.settings == DENSE for choice in plan.modules.values())
    assert plan.measured_time == plan.predicted_time == 1.0


def test_a_plan_that_saves_no_time_is_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    faster_when_sparser(monkeypatch)
    monkeypatch.setattr(search, "_step_times", lambda *_: {"dense": 10.0, "sparse": 10.5})
    config = SptConfig(budget=0.5, num_blocks=4)
    state = sparsification(sparsify(build("llama"), config, inputs("llama")["input_ids"]))
    assert all(choice.settings == DENSE for choice in state.plan.modules.values())
    assert not state.attention
    assert not state.feed_forwards
    assert state.plan.measured_time == 1.0
    assert state.plan.measured_change == {"calibration": 0.0}
    assert "saves no time" in caplog.text
