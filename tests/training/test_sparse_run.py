"""Tasks on models that were made sparse first: what a run leaves, how it resumes, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import Interrupt, run_config

from sparsepeft.errors import UserError
from sparsepeft.runs.files import RESULTS
from sparsepeft.spt import sparsification
from sparsepeft.training import Predictor, RunConfig, evaluate, load_config, train

Trained = Callable[..., tuple[Path, dict]]
SPT = {"top_l": 0.5, "values": "routed", "num_blocks": 4, "num_active_blocks": 2, "codebook_interval": 3}


def test_flags_and_file_say_what_becomes_sparse(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("task: topics\nmethod: lora\noutput_dir: o\nspt: {num_blocks: 4}\n")
    file = tmp_path / "c.yaml"
    assert load_config({"spt": None, "spt_set": None}, file).spt == {"num_blocks": 4}
    assert load_config({"spt": None, "spt_set": {"top_l": 3}}, file).spt == {"num_blocks": 4, "top_l": 3}
    assert load_config({"task": "topics", "output_dir": "o", "spt": True}).spt == {}
    assert load_config({"task": "topics", "output_dir": "o"}).spt is None
    with pytest.raises(UserError, match="without `spt`"):
        load_config({"task": "topics", "output_dir": "o", "spt_set": {"top_l": 3}})
    for changes, words in (
        ({"method": "full", "spt": {}}, "full.*lora"),
        ({"spt": {"num_active_block": 3}}, "did you mean 'num_active_blocks'"),
        ({"spt": {}, "cache_frozen_layers": True}, "cache_frozen_layers.*spt"),
    ):
        with pytest.raises(UserError, match=words):
            RunConfig("topics", "o", **changes)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "spartan", "head"])
def test_a_sparse_run_leaves_what_evaluate_agrees_with(method: str, trained: Trained) -> None:
    folder, results = trained(method=method, spt=SPT)
    assert json.loads((folder / RESULTS).read_text()) == results
    scores = evaluate(folder)
    for part, metrics in scores.items():
        assert metrics == pytest.approx(results["metrics"][part])
    assert results["metrics_by_infer"]["sparse"] == results["metrics"]
    for infer, parts in scores.metrics_by_infer.items():
        for part, metrics in parts.items():
            assert metrics == pytest.approx(results["metrics_by_infer"][infer][part])
    texts = ["The striker scored twice.", "Shares fell again."]
    sparse, dense = (Predictor(folder, infer=infer).logits(texts) for infer in ("sparse", "dense"))
    assert (sparse != dense).any()
    with pytest.raises(UserError, match="did you mean 'dense'"):
        Predictor(folder, infer="densely")
    assert results["parameters"]["routers"] == 2 * 4 * (32 + 1)
    dense = trained(method=method)[1]
    assert "spt" not in dense
    assert results["parameters"]["trained"] == dense["parameters"]["trained"] + results["parameters"]["routers"]
    assert results["parameters"]["head"] == dense["parameters"]["head"]
    converted = sparsification(Predictor(folder).model)
    assert converted is not None
    assert len(converted.attention) == len(converted.feed_forwards) == 2
    assert isinstance(results["spt"]["config"]["top_l"], int)
    assert converted.config.top_l == results["spt"]["config"]["top_l"] > 1


@pytest.mark.slow
def test_an_interrupted_sparse_run_ends_as_if_it_had_not_been(
    tiny_backbone: Path, trained: Trained, tmp_path: Path
) -> None:
    values = {"method": "lora", "spt": SPT}
    whole, results = trained(**values)
    with pytest.raises(KeyboardInterrupt):
        train(run_config(tiny_backbone, tmp_path, **values), callbacks=[Interrupt(7)])
    resumed = train(run_config(tiny_backbone, tmp_path, **values))
    assert resumed["metrics"] == results["metrics"]
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, tmp_path))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


@pytest.mark.slow
def test_what_a_routed_ffn_does_not_let_act_inside(tiny_backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no plain LoRA"):
        train(run_config(tiny_backbone, tmp_path / "o", method="ia3", spt=SPT))
    assert not (tmp_path / "o").exists()
