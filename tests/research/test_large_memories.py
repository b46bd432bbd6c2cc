"""The benchmark and the experiment of large memories."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from sparsepeft_research.benchmarks.memories.large import BASE
from sparsepeft_research.benchmarks.registry import run_benchmark
from sparsepeft_research.experiments import large_memories


def test_the_benchmark_compares_sizes_and_kinds() -> None:
    said: list[str] = []
    threads = torch.get_num_threads()
    result = run_benchmark("large_memory", quick=True, repeats=2, threads=1, progress=said.append)
    torch.set_num_threads(threads)
    assert [(one["kind"], one["parents"]) for one in result.results] == [
        *[("product", 256), ("flat", 256)],
        *[("product", 1024), ("flat", 1024)],
    ]
    for one in result.results:
        assert one["largest_relative_error"] < 1e-4
        for direction in ("forward", "forward_backward", "step"):
            assert one["microseconds_per_token"][direction] > 0
        assert (one["parents_read"] or 1) <= one["parents"]
    assert result.results[1][f"over_flat_{BASE}"] == {"forward": 1, "forward_backward": 1, "step": 1}
    assert "product 1024: step" in said[-4]


def test_the_experiment_takes_the_best_rate_and_lists_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "rates").mkdir()
    assert large_memories.best_rate(tmp_path, "qnli", "product-256") is None
    for name, score in (("lr0.0003", 0.7), ("lr0.001", 0.8), ("lr0.003", 0.75)):
        (tmp_path / "rates" / f"qnli-product-256-{name}.json").write_text(json.dumps({"score": score}))
    assert large_memories.best_rate(tmp_path, "qnli", "product-256") == 1e-3
    assert list(large_memories.table(tmp_path)) == []
    for seed, score in enumerate((0.81, 0.83)):
        (tmp_path / f"qnli-product-256-{seed}.json").write_text(
            json.dumps({"score": score, "hyperparameters": {"learning_rate": 1e-3}})
        )
    (line,) = large_memories.table(tmp_path)
    assert line.split() == ["qnli", "product-256", "0.8200", "±", "0.0141", "2", "seeds,", "rate", "0.001"]


@pytest.mark.slow
def test_a_run_of_the_experiment() -> None:
    options = Namespace(data_dir=None, max_steps=4, precision="fp32", layers=[5])
    results = large_memories._run(options, "topics", "product-256", 1e-3, 0, "selection")
    assert results["hyperparameters"]["max_steps"] == 4
    assert results["formula"].startswith("(√P+2PC)dL = (16+2·256·3)·384·1 = 595,968")
