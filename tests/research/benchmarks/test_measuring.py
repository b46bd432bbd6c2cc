"""Alternating timing, counted memory, the split of a step by module, and candidates in processes of their own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsepeft_research.benchmarks.measuring import peak_bytes, require_agreement, sample_alternating, time_alternating
from sparsepeft_research.benchmarks.split import Span, measuring
from sparsepeft_research.benchmarks.workers import Worker

MIB = 2**20


def test_peak_is_of_what_is_alive_at_one_time() -> None:
    def one_after_the_other() -> None:
        for _ in range(3):
            torch.empty(MIB, dtype=torch.uint8).fill_(0)

    def together() -> list[torch.Tensor]:
        return [torch.empty(MIB, dtype=torch.uint8) for _ in range(3)]

    assert peak_bytes(one_after_the_other) == MIB
    assert peak_bytes(together) == 3 * MIB
    before = torch.empty(MIB)  # not made while it runs
    assert peak_bytes(lambda: before.add_(1)) < MIB


def test_what_autograd_keeps_is_counted() -> None:
    weight = torch.ones(MIB // 4, requires_grad=True)

    def step() -> None:
        kept = weight.exp()  # keeps its output
        kept = kept.exp()
        kept.sum().backward()
        weight.grad = None

    assert 3 * MIB <= peak_bytes(step) <= 5 * MIB


def test_candidates_take_turns() -> None:
    seen: list[str] = []
    timings = time_alternating({name: lambda n=name: seen.append(n) for name in "abc"}, repeats=3, warm_up=1)  # type: ignore[misc]
    assert "".join(seen) == "abc" + "abc" + "bca" + "cab"
    assert {timing.repeats for timing in timings.values()} == {3}
    with pytest.raises(ValueError, match="repeats is 1"):
        time_alternating({"a": list}, repeats=1)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, str]:
        return self.norm(self.down(self.up(states).relu())), "more"


@pytest.mark.parametrize("keyword", [False, True])
def test_split_counts_both_directions_and_changes_nothing(keyword: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, str]:
            return self.layer(hidden_states)

    torch.manual_seed(0)
    model, given = Attention(), torch.randn(3, 4, requires_grad=True)

    def gradients() -> list[torch.Tensor]:
        output, _ = model(hidden_states=given) if keyword else model(given)
        return list(torch.autograd.grad(output.square().sum(), [given, *model.parameters()]))

    expected = gradients()
    layer = model.layer
    parts = {"whole": [Span(model, model)], "inner": [Span(layer.up, layer.down)]}
    with measuring(parts) as spent:
        found = gradients()
        forward_and_backward = dict(spent)
        with torch.no_grad():
            model(given)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert 0 < forward_and_backward["inner"] < forward_and_backward["whole"]
    assert spent["inner"] > forward_and_backward["inner"]
    after = dict(spent)
    gradients()
    assert spent == after  # nothing is left behind


_ECHO = """
import json, os, sys
print(json.dumps({"threads": os.environ["OMP_NUM_THREADS"]}), flush=True)
for line in sys.stdin:
    if line == "die\\n":
        sys.exit("it was told to")
    print(json.dumps({"ms": float(line)}), flush=True)
open(sys.argv[1], "w").close()
"""


def test_a_worker_answers_line_by_line_and_ends_in_peace(tmp_path: Path) -> None:
    with Worker([sys.executable, "-c", _ECHO, str(tmp_path / "ended")], {"threads": 3}, tmp_path / "w.json") as worker:
        assert worker.ready == {"threads": "3"}
        samples = sample_alternating(
            {"slow": lambda: worker.ask(8), "fast": lambda: worker.ask("2")},
            repeats=2,
            warm_up=0,
            idle_wait_s=0.0,
            clock=lambda ask: float(ask()["ms"]),  # what the process says of itself, not how long the answer took
        )
        assert samples == {"slow": [8.0, 8.0], "fast": [2.0, 2.0]}
    assert (tmp_path / "ended").exists()


def test_a_worker_that_dies_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _ECHO, str(tmp_path / "ended")]
    with (
        Worker(command, {"threads": 1}, tmp_path / "w.json") as worker,
        pytest.raises(RuntimeError, match="code 1 and said last: it was told to"),
    ):
        worker.ask("die")
    with pytest.raises(RuntimeError, match="code 3 and said last: nothing"):
        Worker([sys.executable, "-c", "raise SystemExit(3)"], {"threads": 1}, tmp_path / "w.json")


def test_no_speed_is_reported_for_a_wrong_result() -> None:
    right, nearly = torch.ones(3), torch.ones(3) + 1e-6
    assert require_agreement("a kernel", [nearly], [right], tolerance=1e-4) == pytest.approx(1e-6, rel=0.1)
    for wrong in (right + 0.1, right * float("nan")):
        with pytest.raises(RuntimeError, match="a kernel differs from the reference"):
            require_agreement("a kernel", [wrong], [right], tolerance=1e-4)
