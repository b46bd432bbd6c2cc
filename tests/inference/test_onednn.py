"""Linear layers by oneDNN compute what PyTorch's do, and are used only where they can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from sparsepeft import MultiTaskEngine
from sparsepeft.models import onednn
from sparsepeft.models.onednn import OneDnnLinear, can_onednn_compute, is_onednn_faster, use_onednn

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

    def noting(given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        found.append(given.shape)
        return product(given, weight, bias)

    monkeypatch.setattr(onednn, "onednn_product", noting)
    monkeypatch.setattr(onednn, "_exact", set())
    return found


@pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 5), (0, 5), (2, 3, 5), (2, 1, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape_with_and_without_bias(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype, calls: list[torch.Size]
) -> None:
    if not can_onednn_compute(dtype):
        pytest.skip(f"oneDNN does not compute {dtype} on this processor")
    layer, given = fast((5, 13), bias=bias).to(dtype), torch.randn(shape, dtype=dtype)
    with torch.inference_mode():
        torch.testing.assert_close(layer(given), nn.functional.linear(given, layer.weight, layer.bias))
        crossed = torch.randn(5, 9, dtype=dtype).t()
        torch.testing.assert_close(layer(crossed), nn.functional.linear(crossed, layer.weight, layer.bias))
    assert calls == [torch.Size(shape), torch.Size((9, 5))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_made_for_few_numbers_of_rows(
    dtype: torch.dtype, calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_onednn_compute(dtype):
        pytest.skip(f"oneDNN does not compute {dtype} on this processor")
    monkeypatch.setattr(onednn, "_MOST_EXACT", 2)
    layer = fast((64, 48)).to(dtype)
    for shape in ((3, 64), (2, 5, 64), (7, 64), (1, 3, 64), (3, 9, 64), (300, 64), (0, 64)):
        given = torch.randn(shape, dtype=dtype)
        with torch.inference_mode():
            output = layer(given)
            assert torch.equal(output, onednn.onednn_product(given, layer.weight, layer.bias))
    used = [shape.numel() // 64 for shape in calls[::2]]  # each second one is the test's own
    assert used == [3, 10, 16, 3, 32, 320, 0]


def test_what_it_cannot_compute_is_pytorchs(calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, given = fast((6, 4)), torch.randn(3, 6)
    layer(given).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(given).dtype == torch.bfloat16
        assert layer.double()(given.double()).dtype == torch.float64
    assert calls == []
    # A processor without bfloat16.
    monkeypatch.setattr(onednn, "can_onednn_compute", lambda dtype: dtype == torch.float32)
    layer, given = fast((6, 4)).bfloat16(), torch.randn(3, 6, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert layer(given).dtype == torch.bfloat16
    assert calls == []
    assert not onednn.is_onednn_faster.__wrapped__(torch.bfloat16)


@pytest.mark.parametrize("form", onednn._BACKWARD)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 5), (0, 5), (2, 3, 5)])
def test_a_frozen_layer_has_the_gradient_of_its_input(
    shape: tuple[int, ...], bias: bool, form: str, calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "_LARGE_WEIGHT", 0)
    monkeypatch.setattr(onednn, "_backward_form", lambda *_: form)
    layer = fast((5, 13), bias=bias).requires_grad_(False)
    given = torch.randn(shape, requires_grad=True)
    output = layer(given)
    grad_output = torch.randn(13).expand_as(output)
    expected = nn.functional.linear(given, layer.weight, layer.bias)
    torch.testing.assert_close(output, expected)
    assert calls == [torch.Size(shape)]
    actual, wanted = (torch.autograd.grad(one, given, grad_output)[0] for one in (output, expected))
    torch.testing.assert_close(actual, wanted)
    assert not layer(given.detach()).requires_grad

    def penalty(result: torch.Tensor) -> torch.Tensor:  # its gradient has one, too
        (grad,) = torch.autograd.grad(result.square().sum(), given, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), given)[0]

    torch.testing.assert_close(penalty(layer(given)), penalty(nn.functional.linear(given, layer.weight, layer.bias)))


def test_the_form_of_a_backward_pass_is_measured_for_its_rows_and_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[object, ...]] = []

    def slowest_last(name: str, key: tuple[object, ...], forms: dict[str, Any]) -> dict[str, float]:
        measured.append(key)
        outputs = [form() for form in forms.values()]
        assert all(torch.equal(output, outputs[0]) for output in outputs)  # of ones
        return dict.fromkeys(forms, 1.0)

    monkeypatch.setattr(onednn, "fastest", slowest_last)
    onednn._backward_form.cache_clear()
    small, wide, tall = (fast(sizes).requires_grad_(False) for sizes in ((64, 32), (128, 512), (512, 128)))
    for layer, rows in ((small, 9), (wide, 9), (wide, 1000), (wide, 1024), (tall, 5000), (tall, 2048)):
        given = torch.randn(rows, layer.in_features, requires_grad=True)
        layer(given).sum().backward()
        torch.testing.assert_close(given.grad, layer.weight.sum(0).expand(rows, -1), atol=1e-4, rtol=1e-4)
    onednn._backward_form.cache_clear()
    shapes = ((256, 512, 128), (2048, 512, 128), (2048, 128, 512))
    assert measured == [("torch.float32", *shape) for shape in shapes]


def test_a_frozen_layer_under_autocast(calls: list[torch.Size]) -> None:
    if not can_onednn_compute(torch.bfloat16):
        pytest.skip("oneDNN does not compute bfloat16 on this processor")
    layer, given = fast((6, 4)).requires_grad_(False), torch.randn(3, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(given)  # its weight would be cast
        assert calls == []
        actual = layer.to(torch.bfloat16)(given)
    assert calls == [given.shape]
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(one, given, torch.ones_like(one))[0] for one in (actual, expected)]
    torch.testing.assert_close(*grads)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_comparison_says_yes_or_no_and_draws_no_random_numbers(dtype: torch.dtype) -> None:
    is_onednn_faster.cache_clear()
    state = torch.get_rng_state()
    assert is_onednn_faster(dtype) in ((True, False) if can_onednn_compute(dtype) else (False,))
    assert torch.equal(state, torch.get_rng_state())
