"""sparse_attention: every implementation against the reference, in outputs and in every gradient."""

from __future__ import annotations

import functools
import itertools
import platform
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.ops import sparse_attention_cases as cases
from tests.ops.sparse_attention_cases import CASES, NAMES, Case, assert_all_close, grad_like, make_inputs, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparsepeft.ops import explain, sparse_attention
from sparsepeft.ops.sparse_attention import choice, cpu, pytorch, selection
from sparsepeft.ops.sparse_attention.arguments import Attended, Settings, Visibility
from sparsepeft.ops.sparse_attention.quantization import select

FAST = ("cpu", "torch")
ALL = ("reference", *FAST)
GRANULARITIES = (
    {"granularity": "token"},
    {"granularity": "token", "similarity": "matches"},
    {"granularity": "block", "block_size": 16},
    {"granularity": "block", "block_size": 7, "similarity": "matches"},
)


@pytest.fixture
def _nan_in_fresh_memory() -> Iterator[None]:
    """Fill uninitialised memory, scratch included, with NaN: what reads it before writing it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_nan_in_fresh_memory")
@pytest.mark.parametrize("name", CASES)
def test_cpu_and_torch_match_reference(name: str) -> None:
    for granularity in GRANULARITIES:
        cases.check_case(name, impls=FAST, **granularity)


@pytest.mark.parametrize("name", ["causal", "scattered mask", "softcap"])
def test_torch_matches_reference_in_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_TILE_ENTRIES", 1000)  # several chunks, the last one short
    for granularity in GRANULARITIES:
        cases.check_case(name, impls=("torch",), dtype=torch.float64, **granularity)


@pytest.mark.parametrize("name", ["several tiles", "grouped heads", "values of another size", "odd heads"])
def test_cpu_and_torch_in_half_precision(name: str) -> None:
    for dtype, granularity in itertools.product((torch.bfloat16, torch.float16), GRANULARITIES[:3]):
        cases.check_half(CASES[name], dtype, impls=FAST, **granularity)


@pytest.mark.parametrize("name", ["window and padding", "a row wholly masked", "softcap"])
def test_gradcheck_of_the_reference(name: str) -> None:
    sizes = {"batch": 2, "num_queries": 5, "num_keys": 6, "head_size": 4, "value_size": 3, "width": 2, "top_l": 3}
    case = CASES[name]._replace(**sizes, heads=2, kv_heads=1)
    tensors, options = make_inputs(case, torch.float64)
    query, key, _ = tensors = [tensor + 0.01 * torch.randn_like(tensor) for tensor in tensors]  # away from ties
    for similarity in ("inner_product", "matches"):
        for vectors in (key,) if similarity == "inner_product" else (query, key):  # no code flips
            books = options["codebooks"].double().repeat_interleave(vectors.shape[1] // case.kv_heads, 0)
            distances = torch.cdist(vectors.unflatten(-1, (-1, 2)).movedim(2, 3), books).sort(-1).values
            assert (distances[..., 1] - distances[..., 0]).min() > 1e-4
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        for granularity in ({"granularity": "token"}, {"granularity": "block", "block_size": 2}):
            how = options | granularity | {"similarity": similarity}
            assert torch.autograd.gradcheck(functools.partial(sparse_attention, **how, impl="reference"), leaves)


@pytest.mark.parametrize("granularity", ["token", "block"])
@pytest.mark.parametrize("causal", [False, True])
def test_cpu_keeping_all_keys_is_dense_attention(causal: bool, granularity: str) -> None:
    case = Case(2, 4, 2, 75, 75, 32, 32, 8, 75, "right", {"causal": causal, "granularity": granularity})
    tensors, options = make_inputs(case)
    grad_output = grad_like(case)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    mask = options["key_mask"][:, None, None]
    if causal:
        mask = mask & torch.ones(75, 75, dtype=torch.bool).tril()
    dense = F.scaled_dot_product_attention(*leaves, attn_mask=mask, enable_gqa=True)
    expected = dict(zip(NAMES, (dense.detach(), *torch.autograd.grad(dense, leaves, grad_output)), strict=True))
    for impl in ALL:
        assert_all_close(run(tensors, grad_output, **options, impl=impl), expected, tolerance=4e-6)  # float32 rounding


@pytest.mark.parametrize("granularity", ["token", "block"])
def test_cpu_queries_without_a_key_give_zeros(granularity: str) -> None:
    tensors, options = make_inputs(CASES["a row wholly masked"])
    for impl in ALL:
        actual = run(tensors, grad_like(CASES["a row wholly masked"]), **options, granularity=granularity, impl=impl)
        for name in NAMES:
            assert not actual[name][1].any()
            assert actual[name][0].any()


@pytest.mark.parametrize("granularity", ["token", "block"])
def test_cpu_layouts_autocast_and_nan(granularity: str) -> None:
    cases.check_layouts(impls=ALL, granularity=granularity)
    cases.check_nan(impls=ALL, granularity=granularity)


@pytest.mark.parametrize("granularity", ["token", "block"])
@pytest.mark.parametrize("threads", [2, 3])
def test_cpu_threads_share_heads(threads: int, granularity: str) -> None:
    # Three heads on two threads are split by queries, on three threads by heads; one head on three by queries.
    for heads in (3, 1):
        case = Case(1, 2 * heads, heads, 300, 300, 16, 16, 8, 40, options={"causal": True, "granularity": granularity})
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            cases.check_half(case, torch.bfloat16, impls=("cpu",))
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("impl", FAST)
def test_gradients_only_where_required(impl: str) -> None:
    tensors, options = make_inputs(CASES["causal"])
    grad_output = grad_like(CASES["causal"])
    expected = run(tensors, grad_output, **options, impl="reference")
    for needed in ((0,), (1, 2), (2,)):
        leaves = [tensor.clone().requires_grad_(index in needed) for index, tensor in enumerate(tensors)]
        sparse_attention(*leaves, **options, impl=impl).backward(grad_output)
        assert [leaf.grad is not None for leaf in leaves] == [index in needed for index in range(3)]
        for index in needed:
            torch.testing.assert_close(leaves[index].grad, expected[NAMES[1 + index]], rtol=0, atol=1e-5)


def test_blocks_by_inner_products_take_no_codebooks() -> None:
    tensors, options = make_inputs(CASES["left padding"])
    options |= {"granularity": "block", "block_size": 7}
    grad_output = grad_like(CASES["left padding"])
    expected = run(tensors, grad_output, **options, impl="reference")
    for impl in ALL:
        assert_all_close(
            run(tensors, grad_output, **options | {"codebooks": None}, impl=impl), expected, tolerance=4e-6
        )


def test_channel_weights_reach_every_implementation() -> None:
    tensors, options = make_inputs(CASES["grouped heads"])
    weights = torch.randint(1, 9, (2, 16)) / 4
    grad_output = grad_like(CASES["grouped heads"])
    expected = run(tensors, grad_output, **options, channel_weights=weights, impl="reference")
    assert not torch.equal(expected["output"], run(tensors, grad_output, **options, impl="reference")["output"])
    for impl in FAST:
        assert_all_close(run(tensors, grad_output, **options, channel_weights=weights, impl=impl), expected, 4e-6)


@pytest.mark.parametrize("granularity", ["token", "block"])
def test_cached_steps_equal_one_full_pass(granularity: str) -> None:
    # Token by token with a cache, as in generation: the same keys are kept at a fixed top_l. Blocks: block by block.
    case = Case(2, 4, 2, 48, 48, 16, 16, 8, 9, "left", {"causal": True, "granularity": granularity, "block_size": 16})
    (query, key, value), options = make_inputs(case)
    mask, step = options.pop("key_mask"), 1 if granularity == "token" else 16
    whole = sparse_attention(query, key, value, **options, key_mask=mask)
    for end in range(step, 49, step):
        part = sparse_attention(
            *(query[:, :, end - step : end], key[:, :, :end], value[:, :, :end]), **options, key_mask=mask[:, :end]
        )
        torch.testing.assert_close(part, whole[:, :, end - step : end], rtol=0, atol=2e-6)  # another order of sums


def test_static_cache_ignores_what_lies_ahead() -> None:
    (query, key, value), options = make_inputs(CASES["last queries"])
    positions = torch.arange(20, 39)
    expected = sparse_attention(query, key[:, :, :39], value[:, :, :39], **options)
    for tensor in (key, value):
        tensor[:, :, 39:] = 0  # slots that are not filled yet
    actual = sparse_attention(query, key, value, **options, query_positions=positions)
    each = sparse_attention(query, key, value, **options, query_positions=positions.expand(2, -1))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert torch.equal(each, actual)


# Memory


class _Largest(TorchDispatchMode):
    """Remember the bytes of the largest tensor made."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("granularity", ["token", "block"])
@pytest.mark.parametrize("impl", FAST)
def test_saved_memory_is_linear(impl: str, granularity: str) -> None:
    cases.check_saved_memory_is_linear(impl, 512, granularity=granularity)


@pytest.mark.parametrize("granularity", ["token", "block"])
@pytest.mark.parametrize("impl", FAST)
def test_no_tensor_grows_with_the_square(impl: str, granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_TILE_ENTRIES", 1 << 14)
    module = cpu if impl == "cpu" else pytorch
    sizes = []
    for num_tokens in (512, 1024):
        tensors, options = make_inputs(Case(1, 1, 1, num_tokens, num_tokens, 16, 16, 8, 16))
        visibility = Visibility.of(1, num_tokens, num_tokens)
        settings = Settings(True, 16, 0.25, 0.0, True, True, 64 if granularity == "block" else 0)
        with _Largest() as largest:
            selected = select(*tensors[:2], options["codebooks"], None, visibility, settings)
            output, total = getattr(module, f"{impl}_forward")(*tensors, selected, visibility, settings)
            getattr(module, f"{impl}_backward")(
                output, Attended(*tensors, output, total), selected, visibility, settings
            )
        sizes.append(largest.size)
    assert sizes[1] <= 2.1 * sizes[0]
    assert sizes[1] < 1024 * 1024  # not even a byte per pair


# Tracing and choice


@pytest.mark.parametrize("granularity", ["token", "block"])
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_compiles_to_one_graph(impl: str, granularity: str) -> None:
    cases.check_compiles("left padding", impl=impl, granularity=granularity)


def test_operator_is_registered_soundly() -> None:
    for block_size in (0, 4):
        cases.check_compiles_and_is_registered(impl="torch", block_size=block_size)


def test_auto_picks_the_compiled_kernels_where_they_apply() -> None:
    def chosen(dtype: torch.dtype, head_size: int) -> tuple[str, str | None]:
        query = torch.randn(1, 1, 4, head_size, dtype=dtype)
        codebooks = torch.randn(1, head_size // 8, 16, 8)
        explanation = explain(sparse_attention, query, query, query, codebooks, top_l=2)
        return explanation.impl, explanation.others.get("cpu")

    assert chosen(torch.float32, 16) == ("cpu", None)
    impl, reason = chosen(torch.float64, 16)
    assert impl == "torch"
    assert "float64" in str(reason)
    assert "head size is 320" in str(chosen(torch.float32, 320)[1])
    query = torch.randn(1, 1, 4, 16).double()
    with pytest.raises(ValueError, match=r"impl is 'cpu', but the tensors are torch\.float64"):
        sparse_attention(*[query] * 3, torch.randn(1, 2, 16, 8).double(), top_l=2, impl="cpu")


def test_an_unknown_processor_tries_the_compiled_kernels_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    query, codebooks = torch.randn(1, 1, 4, 16), torch.randn(1, 2, 16, 8)
    for times, is_right, impl in (
        ({"cpu": 1.0, "torch": 2.0}, True, "cpu"),
        ({"torch": 1.0, "cpu": 2.0}, True, "torch"),
        ({"cpu": 1.0, "torch": 2.0}, False, "torch"),
    ):
        monkeypatch.setattr(choice, "fastest", lambda *_, times=times: times)
        if not is_right:
            monkeypatch.setattr(choice, "cpu_forward", lambda q, *_: (torch.zeros_like(q),))
        choice.why_slower_here.cache_clear()
        with pytest.warns(UserWarning, match="have not been run on a processor like this one yet"):
            assert explain(sparse_attention, query, query, query, codebooks, top_l=2).impl == impl
    choice.why_slower_here.cache_clear()


# Bad arguments


BAD_ARGUMENTS = [
    ({"query": torch.randn(2, 4, 5)}, ValueError, r"query has shape \(2, 4, 5\); expected \(B, H, T, D\)"),
    ({"query": torch.randn(2, 4, 0, 8)}, ValueError, "none of them 0"),
    ({"query": torch.randn(2, 3, 5, 8)}, ValueError, "H a multiple of Hkv"),
    ({"query": torch.randn(2, 4, 5, 16)}, ValueError, "2 sub-vectors of width 4, 8 numbers, but the vectors have 16"),
    ({"query": torch.ones(2, 4, 5, 8, dtype=torch.long)}, TypeError, "query has dtype torch.int64"),
    ({"key": torch.randn(2, 2, 6, 8).half()}, TypeError, "expected one for all"),
    ({"value": torch.randn(2, 2, 7, 8)}, ValueError, "the same batch, heads and tokens"),
    ({"codebooks": torch.randn(2, 2, 17, 4)}, ValueError, "17 codewords; expected at most 16"),
    ({"codebooks": torch.randn(2, 3, 16, 3)}, ValueError, "choose a width that divides the head size"),
    ({"codebooks": torch.randn(4, 2, 16, 4)}, ValueError, "one per key-value head"),
    ({"codebooks": torch.randn(2, 16, 4)}, ValueError, "fit_codebooks makes them"),
    ({"codebooks": torch.ones(2, 2, 16, 4, dtype=torch.long)}, TypeError, "codebooks has dtype torch.int64"),
    ({"top_l": 0}, ValueError, "top_l is 0; expected at least 1"),
    ({"top_l": 0.125}, TypeError, "top_l is 0.125; expected an int"),
    ({"block_size": 0}, ValueError, "block_size is 0"),
    ({"codebooks": None}, ValueError, "codebooks is None; expected"),
    ({"channel_weights": torch.ones(8)}, ValueError, r"expected floating-point \(Hkv, D\), \(2, 8\)"),
    ({"channel_weights": torch.ones(2, 8), "similarity": "matches"}, ValueError, "similarity is 'matches', which has"),
    ({"similarity": "cosine"}, ValueError, "similarity is 'cosine'; expected 'inner_product' or 'matches'"),
    ({"granularity": "row"}, ValueError, "granularity is 'row'; expected 'token' or 'block'"),
    ({"key_mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, r"expected \(B, Tk\), \(2, 6\)"),
    ({"key_mask": torch.ones(2, 6)}, TypeError, "expected bool, True where"),
    ({"query_positions": torch.arange(4)}, ValueError, r"query_positions has shape \(4,\)"),
    ({"query_positions": torch.randn(5)}, TypeError, "expected int64 or int32"),
    ({"window": 3}, ValueError, "set causal=True"),
    ({"window": 0, "causal": True}, ValueError, "window is 0"),
    ({"scale": 0.0}, ValueError, "scale is 0.0; expected a positive finite number"),
    ({"softcap": float("inf")}, ValueError, "softcap is inf"),
    ({"impl": "cuda"}, ValueError, "impl is 'cuda'; expected one of auto, triton, flex, cpu, torch, reference"),
]


def test_bad_arguments() -> None:
    for changes, error, message in BAD_ARGUMENTS:
        arguments = {
            "query": torch.randn(2, 4, 5, 8),
            "key": torch.randn(2, 2, 6, 8),
            "value": torch.randn(2, 2, 6, 8),
            "codebooks": torch.randn(2, 2, 16, 4),
            "top_l": 3,
            **changes,
        }
        if "query" in changes and changes["query"].shape[-1] == 16:
            arguments["key"] = torch.randn(2, 2, 6, 16)
        with pytest.raises(error, match=message):
            sparse_attention(**arguments)
