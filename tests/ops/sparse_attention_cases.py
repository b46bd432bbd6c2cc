"""What every implementation of sparse attention must satisfy, on a CPU, in Triton's interpreter, or on a GPU (cuda).

Functions at module level, so that they can be handed to the interpreter's process by reference.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsepeft.ops.sparse_attention import encode, sparse_attention
from sparsepeft.ops.sparse_attention.arguments import Attended, Settings, Visibility
from sparsepeft.ops.sparse_attention.selection import keep_tokens
from sparsepeft.ops.sparse_attention.similarity import Codes, query_tables

NAMES = ("output", "query", "key", "value")


class Case(NamedTuple):
    """Sizes, a padding mask by name, and the options of the call."""

    batch: int
    heads: int
    kv_heads: int
    num_queries: int
    num_keys: int
    head_size: int
    value_size: int
    width: int
    top_l: int
    mask: str = "none"
    options: Mapping[str, Any] = MappingProxyType({})


# Odd on purpose; each name says what it adds.
CASES = {
    "plain": Case(2, 2, 2, 65, 65, 16, 16, 8, 9),
    "causal": Case(2, 2, 2, 65, 65, 16, 16, 8, 9, options={"causal": True}),
    "several tiles": Case(1, 2, 1, 130, 130, 24, 24, 8, 33, options={"causal": True}),
    "grouped heads": Case(2, 6, 2, 37, 37, 16, 16, 4, 7, options={"causal": True}),
    "one key head": Case(1, 4, 1, 70, 70, 16, 16, 4, 7),
    "left padding": Case(3, 2, 2, 66, 66, 16, 16, 8, 9, "left", {"causal": True}),
    "right padding": Case(3, 2, 1, 66, 66, 16, 16, 8, 9, "right"),
    "a row wholly masked": Case(3, 2, 1, 41, 41, 16, 16, 8, 9, "row"),
    "scattered mask": Case(2, 2, 2, 90, 90, 16, 16, 8, 12, "scattered", {"causal": True}),
    "window": Case(1, 2, 2, 130, 130, 16, 16, 8, 9, options={"causal": True, "window": 40}),
    "window and padding": Case(3, 2, 2, 90, 90, 16, 16, 8, 9, "scattered", {"causal": True, "window": 21}),
    "window of one": Case(1, 2, 2, 20, 20, 16, 16, 8, 4, options={"causal": True, "window": 1}),
    "one query": Case(2, 4, 2, 1, 77, 16, 16, 8, 9, "left", {"causal": True}),
    "last queries": Case(2, 2, 2, 19, 77, 16, 16, 8, 9, options={"causal": True}),
    "positions": Case(2, 2, 2, 19, 77, 16, 16, 8, 9, options={"causal": True, "query_positions": range(30, 49)}),
    "positions outside": Case(1, 2, 2, 7, 20, 16, 16, 8, 4, options={"query_positions": range(-3, 25, 4)}),
    "positions before all keys": Case(
        1, 2, 2, 5, 20, 16, 16, 8, 4, options={"causal": True, "query_positions": range(-3, 2)}
    ),
    "more queries than keys": Case(1, 2, 2, 50, 20, 16, 16, 8, 4),
    "one token": Case(2, 2, 1, 1, 1, 16, 16, 8, 3, options={"causal": True}),
    "seven tokens": Case(2, 2, 2, 7, 7, 8, 8, 8, 3, options={"causal": True}),
    "one sub-vector": Case(1, 2, 2, 65, 65, 8, 8, 8, 9, options={"causal": True}),
    "sub-vectors of one number": Case(1, 2, 2, 33, 33, 20, 20, 1, 5),
    "one key kept": Case(1, 2, 2, 65, 65, 16, 16, 8, 1, options={"causal": True}),
    "one key kept, not the own": Case(1, 2, 2, 65, 65, 16, 16, 8, 1, options={"keep_self": False, "keep_first": False}),
    "two keys kept": Case(1, 2, 2, 65, 65, 16, 16, 8, 2, options={"causal": True}),
    "nothing forced": Case(2, 2, 2, 65, 65, 16, 16, 4, 9, "scattered", {"keep_self": False, "keep_first": False}),
    "first alone forced": Case(1, 2, 2, 65, 65, 16, 16, 4, 9, options={"keep_self": False}),
    "all keys": Case(2, 2, 2, 65, 65, 16, 16, 8, 65, "scattered", {"causal": True}),
    "more than all keys": Case(2, 2, 2, 65, 65, 16, 16, 8, 1000),
    "values of another size": Case(1, 2, 2, 40, 40, 16, 40, 8, 9, options={"causal": True}),
    "wide heads": Case(1, 2, 2, 70, 70, 128, 128, 8, 12, options={"causal": True}),
    "odd heads": Case(1, 2, 2, 70, 70, 80, 72, 8, 12),
    "narrow heads": Case(1, 3, 3, 70, 70, 8, 5, 4, 12),
    "scale": Case(1, 2, 2, 40, 40, 16, 16, 8, 9, options={"scale": 0.7}),
    "softcap": Case(1, 2, 2, 65, 65, 16, 16, 8, 20, "left", {"causal": True, "softcap": 1.5}),
}


def make_mask(name: str, batch: int, num_keys: int) -> Tensor | None:
    if name == "none":
        return None
    mask = torch.ones(batch, num_keys, dtype=torch.bool)
    for row in range(1, batch):
        hidden = num_keys * row // (2 * batch) + 1
        if name == "left":
            mask[row, :hidden] = False
        if name == "right":
            mask[row, num_keys - hidden :] = False
    if name == "row":
        mask[1] = False
    if name == "scattered":
        mask = torch.rand(batch, num_keys) > 0.3
    return mask


def on_grid(tensor: Tensor) -> Tensor:
    """To multiples of 1/8, which every dtype has."""
    return (tensor * 8).round() / 8


def make_inputs(
    case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[list[Tensor], dict[str, Any]]:
    """Return query, key, value, and the keyword arguments of the call, codebooks included.

    What keys are chosen by is on a grid: products and their sums are exact, and all implementations choose the same.
    """
    tensors = [
        on_grid(torch.randn(case.batch, case.heads, case.num_queries, case.head_size)).to(dtype),
        on_grid(torch.randn(case.batch, case.kv_heads, case.num_keys, case.head_size)).to(dtype),
        torch.randn(case.batch, case.kv_heads, case.num_keys, case.value_size).to(dtype),
    ]
    codebooks = on_grid(torch.randn(case.kv_heads, case.head_size // case.width, 16, case.width))
    options = dict(case.options)
    if "query_positions" in options:
        options["query_positions"] = torch.tensor(list(options["query_positions"]))
    mask = make_mask(case.mask, case.batch, case.num_keys)
    options = {"codebooks": codebooks, "top_l": case.top_l, "key_mask": mask, **options}
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    return [tensor.to(device) for tensor in tensors], moved


def selection_arguments(case: Case, options: Mapping[str, Any], device: str = "cpu") -> tuple[Visibility, Settings]:
    """What a selection is given beside codes, for the options of :func:`make_inputs`."""
    limits = {name: options[name] for name in ("causal", "window", "query_positions", "key_mask") if name in options}
    visibility = Visibility.of(case.batch, case.num_queries, case.num_keys, device=device, **limits)
    always = options.get("keep_self", True), options.get("keep_first", True)
    inner_product = options.get("similarity", "inner_product") == "inner_product"
    return visibility, Settings(inner_product, min(case.top_l, case.num_keys), 1.0, 0.0, *always, 0)


def run(
    tensors: list[Tensor], grad_output: Tensor, function: Any = sparse_attention, **options: Any
) -> dict[str, Tensor]:
    """Output and gradients, by name."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*leaves, **options)
    grads = torch.autograd.grad(output, leaves, grad_output)
    return dict(zip(NAMES, (output.detach(), *grads), strict=True))


def grad_like(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(case.batch, case.heads, case.num_queries, case.value_size).to(device, dtype)


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare by the largest entry of each tensor; NaN never matches."""
    for name in NAMES:
        scale = max(1.0, expected[name].abs().max().item())
        torch.testing.assert_close(
            actual[name], expected[name], rtol=0, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


def check_case(
    name: str,
    device: str = "cpu",
    impls: Iterable[str] = ("triton",),
    dtype: torch.dtype = torch.float32,
    **granularity: Any,
) -> None:
    tensors, options = make_inputs(CASES[name], dtype, device)
    grad_output = grad_like(CASES[name], dtype, device)
    expected = run(tensors, grad_output, **options, **granularity, impl="reference")
    # Float32 rounding (6e-8) through two sums of up to 130 terms and an exponential; in float64 the order of sums.
    tolerance = 1e-14 if dtype == torch.float64 else 4e-6
    for impl in impls:
        actual = run(tensors, grad_output, **options, **granularity, impl=impl)
        assert_all_close(actual, expected, tolerance)


def check_half(
    case: Case, dtype: torch.dtype, device: str = "cpu", impls: Iterable[str] = ("triton",), **granularity: Any
) -> None:
    tensors, options = make_inputs(case, dtype, device)
    grad_output = grad_like(case, dtype, device)
    exact = run([t.float() for t in tensors], grad_output.float(), **options, **granularity, impl="reference")
    for impl in impls:
        actual = run(tensors, grad_output, **options, **granularity, impl=impl)
        # Sums are float32: results are rounded once, and gradients once more through the rounded output. Triton's
        # kernels also round weights and their gradients, before the products that read them.
        roundings = 2 if impl == "triton" else 1
        for key in NAMES:
            assert actual[key].dtype == dtype
            error = (actual[key].float() - exact[key]).abs().max()
            assert error <= roundings * torch.finfo(dtype).eps * exact[key].abs().max(), (key, impl)


def check_layouts(device: str = "cpu", impls: Iterable[str] = ("triton",), **granularity: Any) -> None:
    """Strided tensors and a gradient as from a sum; autocast changes nothing, around what has a backward of its own."""

    def under_autocast(*tensors: Tensor, **options: Any) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return sparse_attention(*tensors, **options)

    case = Case(2, 4, 2, 33, 33, 16, 16, 8, 9, "left", {"causal": True, "block_size": 16, **granularity})
    tensors, options = make_inputs(case, device=device)
    grad_output = torch.randn(1, 1, 1, 1, device=device).expand(2, 4, 33, 16)
    expected = run(tensors, grad_output.contiguous(), **options, impl="reference")
    as_from_a_projection = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    last_strided = [t.mT.contiguous().mT for t in tensors]
    for strided, impl in itertools.product((as_from_a_projection, last_strided), impls):
        assert not any(tensor.is_contiguous() for tensor in strided)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=impl != "reference"):
            actual = run(strided, grad_output, under_autocast, **options, impl=impl)
        assert_all_close(actual, expected, tolerance=4e-6)


def check_nan(device: str = "cpu", impls: Iterable[str] = ("triton",), **granularity: Any) -> None:
    """NaN in a query reaches its row and no other."""
    tensors, options = make_inputs(CASES["causal"], device=device)
    options |= {"block_size": 16, **granularity}
    poisoned = [tensors[0].clone(), *tensors[1:]]
    poisoned[0][1, 0, 20] = torch.nan
    for impl in impls:
        clean = sparse_attention(*tensors, **options, impl=impl)
        output = sparse_attention(*poisoned, **options, impl=impl)
        assert output[1, 0, 20].isnan().all()
        rows = slice(16, 32) if options.get("granularity") == "block" else 20  # codes of NaN: what its block keeps
        output[1, 0, rows] = clean[1, 0, rows]
        assert torch.equal(output, clean)


def check_compiles(name: str, device: str = "cpu", impl: str = "triton", **granularity: Any) -> None:
    torch.compiler.reset()
    tensors, options = make_inputs(CASES[name], device=device)
    options |= {"block_size": 16, **granularity}
    grad_output = grad_like(CASES[name], device=device)

    def step(*tensors: Tensor) -> Tensor:
        return sparse_attention(*tensors, **options, impl=impl)

    actual = run(tensors, grad_output, torch.compile(step, fullgraph=True, backend="aot_eager"))
    assert_all_close(actual, run(tensors, grad_output, **options, impl="reference"), tolerance=4e-6)


def check_compiles_and_is_registered(device: str = "cpu", impl: str = "triton", block_size: int = 0) -> None:
    check_compiles("seven tokens", device, impl, granularity="block" if block_size else "token")
    tensors, options = make_inputs(CASES["seven tokens"], device=device)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    for inner_product in (True, False):
        packed = Settings(inner_product, 3, 0.25, 0.0, True, True, block_size).pack()
        arguments = (options["codebooks"], None, *Visibility.of(2, 7, 7, causal=True, device=device), packed, impl)
        torch.library.opcheck(torch.ops.sparsepeft.sparse_attention.default, (*leaves, *arguments))


def check_saved_memory_is_linear(impl: str = "triton", num_tokens: int = 128, **granularity: Any) -> None:
    small, large = (_saved_bytes(n, impl, granularity) for n in (num_tokens // 2, num_tokens))
    assert 0 < large <= 2 * small
    # Query, key, value and output; codes (or thresholds), log-sum-exp and limits are less than a fifth of that at a
    # head size of 16.
    assert large <= 1.2 * (2 + 1 + 1 + 2) * num_tokens * 16 * 4 + 3 * num_tokens * 4


def _saved_bytes(num_tokens: int, impl: str, granularity: dict[str, Any]) -> int:
    """What is kept for backward."""
    case = Case(1, 2, 1, num_tokens, num_tokens, 16, 16, 8, 16, options={"causal": True, **granularity})
    tensors, options = make_inputs(case)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sparse_attention(*(tensor.requires_grad_() for tensor in tensors), **options, impl=impl)
    return sum(saved.values())


# -- for Triton's kernels alone --

# Of 3, 2 and 1 codewords nearly all keys tie. Batch, heads, key heads, queries, keys, M, C, L, mask, options.
SELECTIONS = [
    (1, 2, 1, 70, 70, 1, 3, 9, "none", {"causal": True}),
    (1, 1, 1, 70, 70, 1, 3, 9, "none", {}),
    (2, 2, 2, 66, 131, 3, 2, 20, "scattered", {"causal": True, "window": 90}),
    (2, 1, 1, 40, 131, 2, 2, 33, "scattered", {}),
    (1, 1, 1, 37, 150, 9, 1, 70, "none", {"query_positions": range(-40, 182, 6)}),
    (2, 1, 1, 37, 90, 17, 2, 3, "left", {"keep_self": False, "query_positions": range(90, 53, -1)}),
    (2, 1, 1, 37, 37, 4, 2, 1, "scattered", {"causal": True}),
    (2, 1, 1, 37, 37, 4, 2, 2, "scattered", {"causal": True}),
    (1, 1, 1, 67, 67, 5, 2, 66, "none", {"keep_first": False}),
    (1, 1, 1, 20, 70, 40, 2, 6, "none", {"causal": True}),
]


def check_selection(index: int, similarity: str, device: str = "cpu") -> None:
    """The same tables and keys, whatever ties: what is chosen by is exact."""
    from sparsepeft.ops.sparse_attention.triton import select_triton, selection_limits

    batch, heads, kv_heads, num_queries, num_keys, num_subvectors, num_codewords, *rest = SELECTIONS[index]
    width = 2
    case = Case(batch, heads, kv_heads, num_queries, num_keys, num_subvectors * width, 4, width, *rest)
    (query, key, _), options = make_inputs(case, device=device)
    codebooks = options["codebooks"][:, :, :num_codewords]
    visibility, settings = selection_arguments(case, options | {"similarity": similarity}, device)
    queries = None if settings.inner_product else encode(query, codebooks)
    scores = Codes(encode(key, codebooks), queries, codebooks).scores(query, slice(None))
    expected = keep_tokens(scores, visibility, settings)

    selection = select_triton(query, key, codebooks, None, visibility, settings)
    if settings.inner_product:
        tables = selection.tables.unflatten(-1, (-1, 16))[..., :num_subvectors, :num_codewords].int() + 128
        assert torch.equal(tables, query_tables(query, codebooks).int())
    cut, reach = selection.thresholds.unsqueeze(-1).unbind(2)
    keys = torch.arange(num_keys, device=device)
    position, _, _, first, own, _ = selection_limits(visibility, settings, num_keys).unsqueeze(-1).unbind(1)
    offset = keys - position
    distance = torch.where(offset > 0, 2 * offset, -2 * offset - 1).where(offset != 0, 0).unsqueeze(1)
    above = (scores > cut) | ((scores == cut) & (distance <= reach))
    forced = ((keys == own) | (keys == first)).unsqueeze(1)
    assert torch.equal((above | forced) & visibility.pairs(num_keys), expected)


def check_encoding(
    num_subvectors: int, width: int, num_codewords: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    vectors = on_grid(torch.randn(2, 4, 130, num_subvectors * width)).to(device, dtype)
    codebooks = on_grid(torch.randn(2, num_subvectors, num_codewords, width)).to(device)
    codebooks[:, :, num_codewords // 2 + 1 :] = codebooks[:, :, :1]  # exact ties: the lowest is taken
    strided = vectors.transpose(1, 2).contiguous().transpose(1, 2)
    for weights in (None, torch.randint(1, 8, (2, num_subvectors * width)).to(device) / 2):
        codes = encode(strided, codebooks, channel_weights=weights, impl="triton")
        assert codes.dtype == torch.uint8
        assert torch.equal(codes, encode(vectors, codebooks, channel_weights=weights, impl="torch"))


def launch(
    head_size: int, num_subvectors: int, dtype: torch.dtype, softcap: float, *, heads: int = 4, num_queries: int = 256
) -> None:
    """Encode, select, forward and backward on any numbers."""
    from sparsepeft.ops.sparse_attention.triton import select_triton, triton_backward, triton_forward

    kv_heads, num_keys = max(1, heads // 2), num_queries
    query, grad_output = (torch.zeros(1, heads, num_queries, head_size, dtype=dtype) for _ in range(2))
    key, value = (torch.zeros(1, kv_heads, num_keys, head_size, dtype=dtype) for _ in range(2))
    codebooks = torch.zeros(kv_heads, num_subvectors, 16, head_size // num_subvectors)
    mask = torch.ones(1, num_keys, dtype=torch.bool)
    visibility = Visibility.of(1, num_queries, num_keys, causal=True, key_mask=mask)
    settings = Settings(True, max(1, num_keys // 8), 0.125, softcap, True, True, 0)
    selection = select_triton(query, key, codebooks, None, visibility, settings)
    output, log_sum_exp = triton_forward(query, key, value, selection, visibility, settings)
    triton_backward(grad_output, Attended(query, key, value, output, log_sum_exp), selection, visibility, settings)
