"""Counted memory, and the split of a step by module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsepeft_research.benchmarks import peak_bytes, time_alternating
from sparsepeft_research.benchmarks.split import Span, measuring

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
