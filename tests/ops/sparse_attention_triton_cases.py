"""What sparse attention on GPUs must satisfy, wherever it runs: in Triton's interpreter (cpu) or on a GPU (cuda).

Functions at module level, so that they can be handed to the interpreter's process by reference.
"""

from __future__ import annotations

from typing import Any

import torch
from tests.ops.sparse_attention_cases import CASES, NAMES, Case, assert_all_close, grad_like, make_inputs, run
from torch import Tensor

from sparsepeft.ops.sparse_attention import count_matches, encode, sparse_attention
from sparsepeft.ops.sparse_attention.arguments import Settings, Visibility
from sparsepeft.ops.sparse_attention.selection import keep_tokens

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


def _to(device: str, tensors: list[Tensor], options: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    return [tensor.to(device) for tensor in tensors], moved


def check_case(name: str, device: str = "cpu", impl: str = "triton", **granularity: Any) -> None:
    case = CASES[name]
    tensors, options = _to(device, *make_inputs(case))
    grad_output = grad_like(case).to(device)
    expected = run(tensors, grad_output, **options, **granularity, impl="reference")
    actual = run(tensors, grad_output, **options, **granularity, impl=impl)
    # Float32 rounding (6e-8) through two sums of up to 130 terms and an exponential.
    assert_all_close(actual, expected, tolerance=4e-6)


def check_selection(index: int, device: str = "cpu") -> None:
    """The same keys, whatever ties: no rounding is involved."""
    from sparsepeft.ops.sparse_attention.triton import select_triton, selection_limits

    batch, heads, kv_heads, num_queries, num_keys, num_subvectors, num_codewords, top_l, mask, changes = SELECTIONS[
        index
    ]
    width = 2
    case = Case(batch, heads, kv_heads, num_queries, num_keys, num_subvectors * width, 4, width, top_l, mask, changes)
    tensors, options = make_inputs(case)
    (query, key, _), options = _to(device, tensors, options)
    codebooks = options["codebooks"][:, :, :num_codewords]
    settings = Settings(top_l, 1.0, 0.0, options.get("keep_self", True), options.get("keep_first", True), 0)
    visibility = Visibility.of(
        *(batch, num_queries, num_keys),
        causal=options.get("causal", False),
        window=options.get("window"),
        query_positions=options.get("query_positions"),
        key_mask=options["key_mask"],
        device=query.device,
    )
    codes = encode(query, codebooks, impl="triton"), encode(key, codebooks, impl="triton")
    expected = keep_tokens(*codes, visibility, settings)

    thresholds = select_triton(query, key, codebooks, visibility, settings).thresholds.long().unsqueeze(-1)
    keys = torch.arange(num_keys, device=device)
    position, _, _, first, own, _ = selection_limits(visibility, settings, num_keys).unsqueeze(-1).unbind(1)
    offset = keys - position
    distance = torch.where(offset > 0, 2 * offset, -2 * offset - 1).where(offset != 0, 0)
    above = (count_matches(*codes).long() << 24) - distance.unsqueeze(1) >= thresholds
    forced = ((keys == own) | (keys == first)).unsqueeze(1)
    assert torch.equal((above | forced) & visibility.pairs(num_keys), expected)


def check_encoding(
    num_subvectors: int, width: int, num_codewords: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    vectors = torch.randn(2, 4, 130, num_subvectors * width).to(device, dtype)
    codebooks = torch.randn(2, num_subvectors, num_codewords, width).to(device)
    codebooks[:, :, num_codewords // 2 + 1 :] = codebooks[:, :, :1]  # exact ties: the lowest is taken
    strided = vectors.transpose(1, 2).contiguous().transpose(1, 2)
    codes = encode(strided, codebooks, impl="triton")
    assert codes.dtype == torch.uint8
    assert torch.equal(codes, encode(vectors, codebooks, impl="torch"))


def check_half(name: str, dtype: torch.dtype, device: str = "cpu") -> None:
    case = CASES[name]
    tensors, options = _to(device, *make_inputs(case, dtype))
    grad_output = grad_like(case, dtype).to(device)
    exact = run([t.float() for t in tensors], grad_output.float(), **options, impl="reference")
    actual = run(tensors, grad_output, **options, impl="triton")
    # Weights and their gradients are rounded once before the products that read them; results once, and gradients
    # once more through the rounded output.
    for key in NAMES:
        assert actual[key].dtype == dtype
        error = (actual[key].float() - exact[key]).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps * exact[key].abs().max(), key


def check_layouts(device: str = "cpu") -> None:
    """Strided tensors and a gradient as from a sum; autocast changes nothing."""
    case = Case(2, 4, 2, 33, 33, 16, 16, 8, 9, "left", {"causal": True})
    tensors, options = _to(device, *make_inputs(case))
    grad_output = torch.randn(1, 1, 1, 1, device=device).expand(2, 4, 33, 16)
    expected = run(tensors, grad_output.contiguous(), **options, impl="reference")
    as_from_a_projection = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    last_strided = [t.mT.contiguous().mT for t in tensors]
    for strided in (as_from_a_projection, last_strided):
        with torch.autocast(device, dtype=torch.bfloat16):
            assert_all_close(run(strided, grad_output, **options, impl="triton"), expected, tolerance=4e-6)


def check_nan(device: str = "cpu") -> None:
    """NaN in a query reaches its row and no other."""
    tensors, options = _to(device, *make_inputs(CASES["causal"]))
    clean = sparse_attention(*tensors, **options, impl="triton")
    tensors[0][1, 0, 20] = torch.nan
    output = sparse_attention(*tensors, **options, impl="triton")
    assert output[1, 0, 20].isnan().all()
    output[1, 0, 20] = clean[1, 0, 20]
    assert torch.equal(output, clean)


def check_compiles_and_is_registered(device: str = "cpu") -> None:
    torch.compiler.reset()
    case = CASES["seven tokens"]
    tensors, options = _to(device, *make_inputs(case))
    grad_output = grad_like(case).to(device)
    limits = {"causal": True, "window": None, "query_positions": None, "key_mask": None, "device": tensors[0].device}
    packed = Settings(3, 0.25, 0.0, True, True, 0).pack()
    arguments = (options["codebooks"], *Visibility.of(2, 7, 7, **limits), packed, "triton")
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    torch.library.opcheck(torch.ops.sparsepeft.sparse_attention.default, (*leaves, *arguments))

    def step(*tensors: Tensor) -> Tensor:
        return sparse_attention(*tensors, **options, impl="triton")

    output = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    grads = torch.autograd.grad(output, leaves, grad_output)
    actual = dict(zip(NAMES, (output.detach(), *grads), strict=True))
    assert_all_close(actual, run(tensors, grad_output, **options, impl="reference"), tolerance=4e-6)


def launch(
    head_size: int, num_subvectors: int, dtype: torch.dtype, softcap: float, *, heads: int = 4, num_queries: int = 256
) -> None:
    """Encode, select, forward and backward on any numbers."""
    from sparsepeft.ops.sparse_attention.triton import encode_triton, select_triton, triton_backward, triton_forward

    kv_heads, num_keys = max(1, heads // 2), num_queries
    query, grad_output = (torch.zeros(1, heads, num_queries, head_size, dtype=dtype) for _ in range(2))
    key, value = (torch.zeros(1, kv_heads, num_keys, head_size, dtype=dtype) for _ in range(2))
    codebooks = torch.zeros(kv_heads, num_subvectors, 16, head_size // num_subvectors)
    mask = torch.ones(1, num_keys, dtype=torch.bool)
    limits = {"causal": True, "window": None, "query_positions": None, "key_mask": mask, "device": query.device}
    visibility = Visibility.of(1, num_queries, num_keys, **limits)
    settings = Settings(max(1, num_keys // 8), 0.125, softcap, True, True, 0)
    encode_triton(query, codebooks)
    selection = select_triton(query, key, codebooks, visibility, settings)
    output, log_sum_exp = triton_forward(query, key, value, selection, visibility, settings)
    triton_backward(grad_output, query, key, value, output, log_sum_exp, selection, visibility, settings)


def saved_bytes(num_tokens: int, device: str = "cpu") -> int:
    """What is kept for backward."""
    case = Case(1, 2, 1, num_tokens, num_tokens, 16, 16, 8, 16, options={"causal": True})
    tensors, options = _to(device, *make_inputs(case))
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sparse_attention(*(tensor.requires_grad_() for tensor in tensors), **options, impl="triton")
    return sum(saved.values())
