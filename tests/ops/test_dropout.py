"""Compiled dropout: what is dropped, again in backward, attention around it, and where PyTorch's own is used."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsepeft.ops import dropout as package
from sparsepeft.ops.dropout import CompiledDropout, cpu, is_compiled_dropout_faster

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_and_no_pattern_in_it(probability: float) -> None:
    size = 300_007
    kept = (cpu.dropout(torch.ones(2, size), probability) != 0).double()
    deviation = (probability * (1 - probability)) ** 0.5
    assert abs(kept.mean() - (1 - probability)) < 5 * deviation / (2 * size) ** 0.5
    rest = (kept - kept.mean()) / kept.std()
    pairs = [(rest[0], rest[1]), *((rest[0, :-lag], rest[0, lag:]) for lag in (1, 2, 7, 16, 64, 768, 4096))]
    for one, other in pairs:  # calls, and neighbours, know nothing of each other
        assert abs((one * other).mean()) < 5 / len(one) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (3, 5), (7, 4099)])
def test_backward_drops_what_forward_drops(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.rand(shape).add(0.5).to(dtype).requires_grad_()
    torch.manual_seed(1)
    output = cpu.dropout(x, 0.4)
    torch.manual_seed(1)
    assert torch.equal(cpu.dropout(x, 0.4), output)
    grad_output = torch.rand(shape).add(0.5).to(dtype)
    (grad,) = torch.autograd.grad(output, x, grad_output)
    for result, given in ((output, x), (grad, grad_output)):
        expected = torch.where(output == 0, 0, given.detach().float() / 0.6).to(dtype)
        torch.testing.assert_close(result, expected)


def test_what_is_dropped_does_not_depend_on_layout_or_threads() -> None:
    x, threads_before = torch.rand(90, 70), torch.get_num_threads()
    outputs = []
    for threads, given in ((1, x), (3, x.t().contiguous().t())):
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(0)
            outputs.append(cpu.dropout(given, 0.3))
        finally:
            torch.set_num_threads(threads_before)
    assert torch.equal(*outputs)


def test_dropout_is_linear_so_it_has_gradients_of_gradients() -> None:
    x = torch.rand(5, 6, requires_grad=True)
    (grad,) = torch.autograd.grad((cpu.dropout(x, 0.5) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(second, 2 * grad.detach() / x.detach())  # of 8 x^3 where kept


# Attention


def attend(mask: str | None, dtype: torch.dtype, function: Callable[..., Tensor]) -> list[Tensor]:
    torch.manual_seed(3)
    lead, queries, keys, hidden = (2, 3), 5, 19, 8
    query, key = (torch.randn(2, size, 3, hidden).transpose(1, 2) for size in (queries, keys))
    value = torch.randn(*lead, keys, 4)
    given: Tensor | None = None
    if mask == "boolean":
        given = torch.rand(2, 1, 1, keys) > 0.3
        given[1] = False  # nothing may be seen
    elif mask == "added":
        given = torch.randn(3, queries, keys)
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (query, key, value)]
    output = function(*leaves, given, 0.3, 0.4, mask == "causal", 11)
    return [output, *torch.autograd.grad(output, leaves, torch.ones_like(output))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [None, "boolean", "added", "causal"])
def test_attention_is_that_of_plain_operations(mask: str | None, dtype: torch.dtype) -> None:
    actual = attend(mask, dtype, cpu._Attend.apply)
    expected = attend(mask, dtype, lambda *arguments: cpu._plain(*(a.float() for a in arguments[:3]), *arguments[3:]))
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2  # a few roundings of products of unit size
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=tolerance, atol=tolerance)


def test_without_random_numbers_attention_is_pytorchs() -> None:
    query, key, value = (torch.randn(2, 3, 9, 8) for _ in range(3))
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(cpu.attention(query, key, value, None, 1e-12, 8**-0.5, False), expected)


def test_attentions_gradients_can_be_differentiated() -> None:
    def penalty(function: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(0)
        leaves = [torch.randn(1, 2, 4, 3, requires_grad=True) for _ in range(3)]
        output = function(*leaves, None, 0.3, 0.5, False, 7)
        grads = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves))

    torch.testing.assert_close(penalty(cpu._Attend.apply), penalty(cpu._plain), rtol=1e-4, atol=1e-5)


# Where it is used


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the kernels were called."""
    found: list[str] = []
    for kernel in (cpu.dropout, cpu.attention):

        def noting(*args: Any, kernel: Callable[..., Tensor] = kernel) -> Tensor:
            found.append(kernel.__name__)
            return kernel(*args)

        monkeypatch.setattr(package, kernel.__name__, noting)
    return found


def test_the_mode_computes_what_it_can_and_leaves_the_rest_to_pytorch(calls: list[str]) -> None:
    x, layer = torch.randn(4, 6), torch.nn.Dropout(0.2)
    query = torch.randn(2, 3, 5, 8)
    layer(x)
    assert calls == []
    with CompiledDropout():
        layer(x)
        F.scaled_dot_product_attention(query, query, query, dropout_p=0.1)
        F.scaled_dot_product_attention(query, query, query, torch.ones(5, 5, dtype=torch.bool), 0.1)
        with torch.autocast("cpu", torch.bfloat16):
            assert F.scaled_dot_product_attention(query, query, query, dropout_p=0.1).dtype == torch.bfloat16
        assert calls == ["dropout", *["attention"] * 3]
        calls.clear()
        F.dropout(x, 0.2, training=False)
        F.dropout(x.clone(), 0.2, inplace=True)
        assert not F.dropout(x, 1.0).any()
        layer(x.double())
        layer.eval()(x)
        F.scaled_dot_product_attention(query, query, query)
        F.scaled_dot_product_attention(query, query[:, :1], query[:, :1], dropout_p=0.1, enable_gqa=True)
        bias = torch.randn(5, 5, requires_grad=True)
        F.scaled_dot_product_attention(query, query, query, bias, 0.1).sum().backward()
        assert bias.grad is not None
        torch.func.vmap(torch.nn.Dropout(0.2), randomness="different")(x)
        elsewhere = threading.Thread(target=torch.nn.Dropout(0.2), args=(x,))
        elsewhere.start()
        elsewhere.join()
    assert calls == []


def test_the_comparison_says_yes_or_no_and_draws_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    is_compiled_dropout_faster.cache_clear()
    assert is_compiled_dropout_faster() in (True, False)
    assert torch.equal(state, torch.get_rng_state())
    monkeypatch.setattr(package, "DISABLED", frozenset({"cpu"}))
    assert not is_compiled_dropout_faster.__wrapped__()
