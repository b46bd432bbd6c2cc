"""linear_cross_entropy: in chunks against the reference, in value and in every gradient."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsepeft.ops import explain, linear_cross_entropy

chunks = importlib.import_module("sparsepeft.ops.linear_cross_entropy.pytorch")
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "softcap": {"softcap": 2.5},
    "scaled, softcap, sum": {"scale": 1.7, "softcap": 2.5, "reduction": "sum"},
}
SIZES = {
    "odd": ((3, 7), 5, 11),
    "one token": ((1,), 5, 11),
    "no token": ((0,), 5, 11),
    "several chunks": ((130,), 9, 77),
}
ALL = (True, True, True)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_CHUNK", 77 * 31)


ALL = (True, True, True)


def make(
    shape: tuple[int, ...], hidden_size: int, vocabulary: int, dtype: torch.dtype = torch.float64, ignored: float = 0.4
) -> tuple[list[Tensor], Tensor]:
    """Hidden states, weight and bias, and labels of which some are ignored."""
    leaves = [
        torch.randn(size, dtype=dtype) for size in ((*shape, hidden_size), (vocabulary, hidden_size), (vocabulary,))
    ]
    labels = torch.randint(vocabulary, shape)
    return leaves, labels.masked_fill(torch.rand(shape) < ignored, -100)


def run(leaves: list[Tensor], labels: Tensor, trained: tuple[bool, ...], **how: Any) -> list[Tensor]:
    """The loss, and the gradients of what is trained for an upstream gradient of 3."""
    leaves = [leaf.detach().requires_grad_(is_trained) for leaf, is_trained in zip(leaves, trained, strict=True)]
    loss = linear_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2], **how)
    return [
        loss.detach(),
        *torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad], torch.tensor(3.0).to(loss)),
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", SIZES)
def test_chunks_match_the_reference(sizes: str, form: str) -> None:
    for ignored in (0.4, 1.1):  # all, too
        leaves, labels = make(*SIZES[sizes], ignored=ignored)
        for trained in (ALL, (True, False, False), (False, True, False)):
            got, want = (run(leaves, labels, trained, impl=impl, **FORMS[form]) for impl in ("torch", "reference"))
            for one, other in zip(got, want, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_the_reference_is_what_pytorch_computes() -> None:
    (hidden, weight, bias), labels = make((3, 7), 5, 11)
    logits = 2.5 * (0.3 * F.linear(hidden, weight, bias) / 2.5).tanh()
    want = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    got = linear_cross_entropy(hidden, weight, labels, bias=bias, scale=0.3, softcap=2.5, impl="reference")
    torch.testing.assert_close(got, want)
    other = labels.masked_fill(labels == -100, 3)
    want = F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), other.flatten(), ignore_index=3)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, other, ignore_index=3), want)


def test_gradients() -> None:
    leaves, labels = make((7,), 3, 5)
    for impl in ("torch", "reference"):

        def loss(*tensors: Tensor, impl: str = impl) -> Tensor:
            return linear_cross_entropy(
                tensors[0], tensors[1], labels, bias=tensors[2], scale=0.7, softcap=2.0, impl=impl
            )

        torch.autograd.gradcheck(loss, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float32_as_the_reference(dtype: torch.dtype) -> None:
    leaves, labels = make((2, 65), 16, 77, torch.float32)
    leaves = [leaf.to(dtype) for leaf in leaves]
    exact = run([leaf.double() for leaf in leaves], labels, ALL, softcap=9.0)
    got, reference = (run(leaves, labels, ALL, softcap=9.0, impl=impl) for impl in ("torch", "reference"))
    assert got[0].dtype == torch.float32
    for one, other, want in zip(got, reference, exact, strict=True):
        assert one.dtype == other.dtype
        errors = [(each.double() - want).abs().max() for each in (one, other)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * want.abs().max()


def test_autocast_takes_the_products_in_its_dtype() -> None:
    leaves, labels = make((2, 65), 16, 77, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (run(leaves, labels, ALL, impl=impl) for impl in ("torch", "reference"))
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)  # of products rounded to bfloat16


def test_a_frozen_weight_costs_no_gradient_product(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    (hidden, weight, _), labels = make((130,), 9, 77, torch.float32)
    num_counted, operations = int(labels.ne(-100).sum()), []
    for trained in (False, True):
        with FlopCounterMode(display=False) as counter:
            linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(trained), labels).backward()
        operations.append(counter.get_total_flops())
    assert operations == [2 * products * num_counted * 9 * 77 for products in (2, 3)]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, weight, labels)
    assert counter.get_total_flops() == operations[0] // 2


def test_memory_is_that_of_a_chunk() -> None:
    from sparsepeft_research.benchmarks.measuring import peak_bytes

    (hidden, weight, _), labels = make((130,), 8, 2048, torch.float32, ignored=0.0)
    chunks._CHUNK = 13 * 2048  # type: ignore[attr-defined]
    hidden.requires_grad_()
    logits = 4 * 130 * 2048

    def step(impl: str) -> None:
        linear_cross_entropy(hidden, weight, labels, impl=impl).backward()

    peaks = [peak_bytes(partial(step, impl)) for impl in ("torch", "reference")]
    assert peaks[0] < 0.25 * logits
    assert peaks[1] > 2 * logits


def test_wrong_arguments_are_named() -> None:
    (hidden, weight, bias), labels = make((7,), 5, 11)
    for error, words, call in (
        (TypeError, "labels have dtype torch.float32", lambda: linear_cross_entropy(hidden, weight, labels.float())),
        (TypeError, "hidden has dtype torch.int64", lambda: linear_cross_entropy(hidden.long(), weight, labels)),
        (ValueError, "weight has shape", lambda: linear_cross_entropy(hidden, weight.t(), labels)),
        (ValueError, "labels have shape", lambda: linear_cross_entropy(hidden, weight, labels[:-1])),
        (ValueError, "bias has shape", lambda: linear_cross_entropy(hidden, weight, labels, bias=bias[1:])),
        (ValueError, "reduction is 'none'", lambda: linear_cross_entropy(hidden, weight, labels, reduction="none")),
    ):
        with pytest.raises(error, match=words):
            call()
    assert explain(linear_cross_entropy, hidden, weight, labels).impl == "torch"
