"""Linear layers by oneDNN compute what PyTorch's do, and are used only where they can be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from sparsepeft import MultiTaskEngine
from sparsepeft.engine import onednn
from sparsepeft.engine.onednn import OneDnnLinear, is_onednn_faster, use_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of PyTorch has no oneDNN")


def fast(sizes: tuple[int, int], *, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(*sizes, bias=bias)
    use_onednn(layer)
    assert type(layer) is OneDnnLinear
    return layer


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of what was given to oneDNN."""
    found: list[torch.Size] = []
    product = onednn.onednn_product

    def noting(given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        found.append(given.shape)
        return product(given, weight, bias)

    monkeypatch.setattr(onednn, "onednn_product", noting)
    return found


@pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 5), (0, 5), (2, 3, 5), (2, 1, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_any_shape_with_and_without_bias(shape: tuple[int, ...], bias: bool, calls: list[torch.Size]) -> None:
    layer, given = fast((5, 13), bias=bias), torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(layer(given), nn.functional.linear(given, layer.weight, layer.bias))
        crossed = torch.randn(5, 9).t()
        torch.testing.assert_close(layer(crossed), nn.functional.linear(crossed, layer.weight, layer.bias))
    assert calls == [torch.Size(shape), torch.Size((9, 5))]


def test_what_it_cannot_compute_is_pytorchs(calls: list[torch.Size]) -> None:
    layer, given = fast((6, 4)), torch.randn(3, 6)
    layer(given).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(given).dtype == torch.bfloat16
        assert layer.double()(given.double()).dtype == torch.float64
    assert calls == []


def test_an_engine_answers_the_same_and_leaves_the_model_alone(
    backbone: Path, folders: dict[str, Path], calls: list[torch.Size]
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(backbone)
    requests = [(task, text) for task in folders for text in ("one text", "another text that is longer")]
    answers = []
    for choice in (True, False):
        engine = MultiTaskEngine(model, folders, onednn=choice)
        calls.clear()
        answers.append([answer.score for answer in engine.predict(requests, on_error="raise")])
        assert bool(calls) == choice
    torch.testing.assert_close(*map(torch.tensor, answers), atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, OneDnnLinear) for module in model.modules())


def test_the_comparison_says_yes_or_no_and_draws_no_random_numbers() -> None:
    is_onednn_faster.cache_clear()
    state = torch.get_rng_state()
    assert is_onednn_faster() in (True, False)
    assert torch.equal(state, torch.get_rng_state())
