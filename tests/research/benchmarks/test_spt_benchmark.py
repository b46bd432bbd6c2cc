"""The benchmark of a fine-tuning step: what its candidates are, and what it says of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import record_function
from transformers import AutoConfig

from sparsepeft.errors import UserError
from sparsepeft.spt import SptConfig, sparsification
from sparsepeft_research.benchmarks import spt, step_memory
from sparsepeft_research.benchmarks.measuring import memory_by_phase
from sparsepeft_research.benchmarks.spt import SptBenchmark, candidates, run
from sparsepeft_research.benchmarks.stacks import STACKS, Stack, stack_config


def small(model: Path, **changes: Any) -> SptBenchmark:
    values = {"model": str(model), "layers": 2, "lengths": (48,), "repeats": 2, "num_blocks": 4, "active_blocks": (2,)}
    return SptBenchmark(**(values | {"granularity": "token"} | changes))


def test_candidates_are_what_their_names_say(tiny_language_model: Path) -> None:
    benchmark = small(tiny_language_model)
    config = stack_config(benchmark.model, 2, 48)
    stacks = {name: Stack(benchmark, config, 48, **arguments) for name, arguments in candidates(benchmark, 48).items()}
    for name, stack in stacks.items():
        done, base = sparsification(stack.model), stack.model.get_base_model()
        is_sparse = {"attention": name.startswith(("sparse", "both")), "ffn": name.startswith(("FFN", "both"))}
        values = done.config.values if done is not None else None
        assert not is_sparse["ffn"] or values == name.rpartition(" ")[2]
        assert (done is not None) == any(is_sparse.values())
        if done is not None:
            assert {"attention": bool(done.attention), "ffn": bool(done.feed_forwards)} == is_sparse
            assert done.config.top_l == 6 or not done.attention
        implementation = "spt" if is_sparse["attention"] else "eager" if name == "eager" else "sdpa"
        assert base.config._attn_implementation == implementation
        assert base.is_gradient_checkpointing == (name == "sdpa, checkpointing")


def test_a_step_trains_lora_and_routers_and_leaves_no_gradients(tiny_language_model: Path) -> None:
    benchmark = small(tiny_language_model, batch_size=2)
    stack = Stack(benchmark, stack_config(benchmark.model, 2, 48), 48, spt=benchmark.spt(48, active=2, values="routed"))
    trained = {n: p for n, p in stack.model.named_parameters() if p.requires_grad}
    assert {"lora" in name or "spt_router" in name for name in trained} == {True}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    for _ in range(2):  # LoRA's first half moves once the second is not zero
        stack.step()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in trained.items())
    assert all(parameter.grad is None for parameter in stack.model.parameters())
    codebooks = next(iter(sparsification(stack.model).attention.values())).state.current  # type: ignore[union-attr]
    old = codebooks.codebooks.clone()
    stack.step()
    assert torch.equal(codebooks.codebooks, old)
    stack.step(refresh=True)
    assert not torch.equal(codebooks.codebooks, old)


def test_a_plan_holds_for_the_layers_that_there_are(tiny_language_model: Path, tmp_path: Path) -> None:
    own = {"model.layers.0.self_attn": {"dense": True}, "model.layers.1.mlp": {"num_active_blocks": 1}}
    planned = SptConfig(values="routed", num_blocks=4, top_l=6, num_active_blocks=2, budget=0.1, overrides=own)
    plan = tmp_path / "spt.json"
    plan.write_text(json.dumps({"config": asdict(planned)}))
    benchmark = small(tiny_language_model, plan=str(plan), layers=1)
    arguments = candidates(benchmark, 48)["plan"]
    done = sparsification(Stack(benchmark, stack_config(benchmark.model, 1, 48), 48, **arguments).model)
    assert done is not None
    assert not done.attention
    assert done.config.overrides == {"layers.0.self_attn": {"dense": True}}
    assert done.config.budget is None


@pytest.mark.slow
def test_figures_fit_together(tiny_language_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    report = run(small(tiny_language_model, lengths=(32, 48), values=("routed",)), told.append)
    assert [result["length"] for result in report["results"]] == [32, 48]
    assert any("48 tokens: timing" in message for message in told)
    for result in report["results"]:
        found, chosen = result["candidates"], ["FFN 2/4 routed", "both 2/4 routed"]
        assert list(found) == ["sdpa", "sdpa, checkpointing", "eager", "sparse attention", *chosen]
        for name, each in found.items():
            for other, speedup in each["speedup_over"].items():
                assert speedup == found[other]["step"]["median_ms"] / each["step"]["median_ms"]
                assert each["peak_of"][other] == each["peak_bytes"] / found[other]["peak_bytes"]
            assert name not in each["speedup_over"]
            assert ("codebook_refresh" in each) == name.startswith(("sparse", "both"))
            if "checkpointing" not in name:
                assert all(milliseconds > 0 for milliseconds in each["split_ms"].values())
        assert found["sdpa, checkpointing"]["peak_bytes"] < found["sdpa"]["peak_bytes"]
    monkeypatch.setattr(spt, "_memory_bytes", lambda device: 10)
    (result,) = run(small(tiny_language_model))["results"]
    assert "eager" not in result["candidates"]
    assert "attention matrices" in result["left_out"]["eager"]


@pytest.mark.parametrize("name", STACKS)
def test_named_stacks_can_be_built(name: str) -> None:
    config = stack_config(name, 1, 4096)
    assert str(config.hidden_size) in name
    assert config.hidden_size % config.num_attention_heads == 0
    inner = getattr(config, "ffn_dim", None) or config.intermediate_size
    assert inner % 8 == 0
    assert (config.hidden_size // config.num_attention_heads) % 8 == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 0}, "layers=0"),
        ({"lengths": ()}, "lengths"),
        ({"repeats": 1}, "repeats=1"),
        ({"dtype": "int8"}, "int8"),
        ({"device": "tpu"}, "tpu"),
        ({"active_blocks": (5,)}, "num_active_blocks=5"),
        ({"granularity": "row"}, "row"),
        ({"values": ("dense",)}, "'dense' is unknown"),
        ({"plan": "nowhere.json"}, "plan=nowhere.json"),
    ],
)
def test_bad_values(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        SptBenchmark(**({"num_blocks": 4, "active_blocks": (2,)} | changes))


def test_models_that_cannot_be_measured(tiny_language_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 2"):
        stack_config(str(tiny_language_model), 3, 32)
    with pytest.raises(UserError, match="at most 64"):
        stack_config(str(tiny_language_model), 1, 65)
    with pytest.raises(UserError, match="opt-1024"):
        stack_config(str(tmp_path / "none"), 1, 32)
    benchmark = small(tiny_language_model, num_blocks=7)
    with pytest.raises(UserError, match="num_blocks=7"):
        run(benchmark)


def test_a_phase_is_where_its_tensors_are() -> None:
    def function() -> None:
        kept = torch.empty(1000)
        with record_function("second"):
            pass
        torch.empty(3000)
        with record_function("third"):
            pass
        del kept
        torch.empty(500)

    phases = memory_by_phase(function, ("second", "third"))
    assert phases == {"": (0, 4000), "second": (4000, 16_000), "third": (4000, 4000)}


@pytest.mark.slow
def test_the_parts_of_a_step(tiny_language_model: Path) -> None:
    report = step_memory.run(
        model=str(tiny_language_model), length=48, dtypes="float32", only="", seed=0, progress=lambda _: None
    )
    found = {one["candidate"]: one for one in report["results"]}
    assert list(found) == list(step_memory.CANDIDATES)
    dense, chunked = found[step_memory.BASELINE], found["loss in chunks"]
    vocabulary = AutoConfig.from_pretrained(tiny_language_model).vocab_size
    assert dense["loss_bytes"] > 2 * 4 * 48 * vocabulary
    assert dense["kept_activations_bytes"] == chunked["kept_activations_bytes"]
    assert chunked["loss_bytes"] < dense["loss_bytes"]
    for name, less in (("exact FFN at a quarter", chunked), ("checkpointing", chunked)):
        assert found[f"loss in chunks, {name}"]["kept_activations_bytes"] < less["kept_activations_bytes"]
    for one in found.values():
        outside = one["weights_bytes"] + one["adapter_and_optimizer_bytes"]
        assert one["peak_bytes"] == outside + one["step_bytes"]
        assert one["step_bytes"] >= one["kept_activations_bytes"] + one["loss_bytes"]
    assert dense["share_of_transformers"] == 1
