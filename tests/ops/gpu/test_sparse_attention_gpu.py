"""Sparse attention on a real GPU: the comparisons of the interpreter, all cases and larger ones, and FlexAttention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.ops import sparse_attention_cases as cases
from tests.ops.sparse_attention_cases import CASES, NAMES, Case, assert_all_close, grad_like, make_inputs, run

from sparsepeft.ops import explain, registry, sparse_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

HALF = [torch.bfloat16, torch.float16]
SIMILARITIES = ["inner_product", "matches"]
LARGE = Case(2, 4, 2, 1500, 1500, 64, 64, 8, 190, "left", {"causal": True})


def on_gpu(case: Case, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor, dict[str, Any]]:
    tensors, options = make_inputs(case, dtype, "cuda")
    return tensors, grad_like(case, dtype, "cuda"), options


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("name", CASES)
def test_matches_reference(name: str, similarity: str) -> None:
    cases.check_case(name, "cuda", similarity=similarity)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("index", range(len(cases.SELECTIONS)))
def test_keeps_the_same_keys_as_the_reference(index: int, similarity: str) -> None:
    cases.check_selection(index, similarity, "cuda")


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [((2, 8, 16), torch.float32), ((9, 3, 5), torch.float32), ((1, 1, 1), torch.float32), ((3, 4, 16), torch.bfloat16)],
    ids=str,
)
def test_encoding_matches_the_plain_one(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    cases.check_encoding(*sizes, dtype, "cuda")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["several tiles", "grouped heads", "values of another size", "odd heads"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    cases.check_half(CASES[name], dtype, "cuda")


@pytest.mark.parametrize(
    "check", [cases.check_layouts, cases.check_nan, cases.check_compiles_and_is_registered], ids=lambda c: c.__name__
)
def test_check(check: Any) -> None:
    check("cuda")


def test_many_tokens() -> None:
    tensors, grad_output, options = on_gpu(LARGE, torch.float32)
    expected = run(tensors, grad_output, **options, impl="reference")
    # Float32 rounding (6e-8) through sums of up to 1500 terms.
    assert_all_close(run(tensors, grad_output, **options, impl="triton"), expected, tolerance=2e-5)


def test_gradients_are_the_same_every_time() -> None:
    tensors, grad_output, options = on_gpu(LARGE, torch.bfloat16)
    first, second = (run(tensors, grad_output, **options, impl="triton") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_auto_runs_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ENABLED", frozenset({"triton"}))
    tensors, _, options = on_gpu(LARGE, torch.bfloat16)
    for granularity, impl in (("token", "triton"), ("block", "flex")):
        options["granularity"] = granularity
        assert explain(sparse_attention, *tensors, **options).impl == impl
        assert torch.equal(sparse_attention(*tensors, **options), sparse_attention(*tensors, **options, impl=impl))


# FlexAttention compiles for every case and tries its tiles: few of them


FLEX = {
    "causal": LARGE,
    "both ways": Case(2, 2, 2, 300, 300, 32, 32, 8, 100, "scattered"),
    "a row wholly masked": Case(3, 2, 1, 150, 150, 16, 16, 8, 70, "row"),
    "window and softcap": Case(
        1, 2, 2, 300, 300, 64, 32, 8, 100, options={"causal": True, "window": 150, "softcap": 1.5}
    ),
    "few queries": Case(2, 4, 2, 3, 400, 64, 64, 8, 100, "left", {"causal": True}),
}


@pytest.mark.parametrize("name", FLEX)
def test_flex_matches_reference(name: str) -> None:
    tensors, grad_output, options = on_gpu(FLEX[name], torch.float32)
    options["granularity"] = "block"
    expected = run(tensors, grad_output, **options, impl="reference")
    assert_all_close(run(tensors, grad_output, **options, impl="flex"), expected, tolerance=2e-5)


@pytest.mark.parametrize("name", ["causal", "both ways"])
def test_flex_in_half_precision(name: str) -> None:
    tensors, grad_output, options = on_gpu(FLEX[name], torch.bfloat16)
    options["granularity"] = "block"
    exact = run([t.float() for t in tensors], grad_output.float(), **options, impl="reference")
    actual = run(tensors, grad_output, **options, impl="flex")
    for key in NAMES:
        error = (actual[key].float() - exact[key]).abs().max()
        assert error <= 4 * torch.finfo(torch.bfloat16).eps * exact[key].abs().max(), key  # a few roundings


@pytest.mark.parametrize("block_size", [64, 128])
def test_block_granularity_compiles_to_one_graph(block_size: int) -> None:
    torch.compiler.reset()
    tensors, grad_output, options = on_gpu(FLEX["both ways"], torch.float32)
    options |= {"granularity": "block", "block_size": block_size}
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output = torch.compile(lambda *t: sparse_attention(*t, **options), fullgraph=True)(*leaves)
    grads = torch.autograd.grad(output, leaves, grad_output)
    actual = dict(zip(NAMES, (output.detach(), *grads), strict=True))
    assert_all_close(actual, run(tensors, grad_output, **options, impl="reference"), tolerance=2e-5)
