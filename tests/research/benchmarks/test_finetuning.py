"""The bare steps of the benchmark ``finetuning``: every candidate trains, on equal batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsepeft.ops import dropout
from sparsepeft_research.benchmarks.finetuning import steps
from sparsepeft_research.peers.training import training_step
from sparsepeft_research.tables import training as tables


@pytest.fixture(autouse=True)
def without_marks_on_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(dropout.CompiledDropout, "__enter__", lambda mode: mode)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_candidate_trains(precision: str, tiny_backbone: Path, tmp_path: Path) -> None:
    case = steps.Case(2, 8, precision)
    steps.write_tokens(str(tiny_backbone), case, 0, tmp_path / "examples")
    examples = load_file(tmp_path / "examples")
    assert examples["input_ids"].shape == (steps.NUM_EXAMPLES, 8)
    assert examples["attention_mask"].all()
    common = {"model": str(tiny_backbone), "examples": str(tmp_path / "examples"), "precision": precision}
    common |= {"batch_size": 2, "learning_rate": 1e-3, "max_steps": 4}
    chosen = {name: values for group in steps.candidates(False).values() for name, values in group.items()}
    assert {"spartan", "pfeiffer", "houlsby", "lora", "full", "spartan, all off"} <= chosen.keys()
    for values in chosen.values():
        settings = common | values
        step = training_step(steps.our_model(settings), settings)
        assert torch.isfinite(torch.tensor([step(), step()])).all()


def test_sets_of_steps_are_told_in_one_table() -> None:
    def candidate(speed: float) -> dict[str, float]:
        return {"steps_per_minute": speed}

    results = {
        "steps, MiniLM, 16 x 128, fp32, methods": {
            "spartan": candidate(120.0),
            "pfeiffer": candidate(125.0),
            "adapters pfeiffer": candidate(100.0),
            "adapters houlsby": {"failed": "no memory"},
        },
        "steps, MiniLM, 16 x 128, fp32, factors": {"spartan": candidate(120.0), "spartan, oneDNN off": candidate(60.0)},
    }
    lines = tables.steps(results).splitlines()
    assert "MiniLM, 16 x 128, fp32" in lines[2]
    assert "1.20" in lines[2]
    assert "2.00" in lines[2]
