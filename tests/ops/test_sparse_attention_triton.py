"""Sparse attention for GPUs without one: interpreted and assembled kernels, FlexAttention's forward, and the choice."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from tests.ops import sparse_attention_cases as cases
from tests.ops.sparse_attention_cases import CASES, make_inputs
from tests.ops.triton_aot import assert_assembles, interpreted, needs_triton
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsepeft.ops import explain, registry, sparse_attention
from sparsepeft.ops.sparse_attention.quantization import encode
from sparsepeft.ops.sparse_attention.selection import keep_blocks, pooled_scores

HALF = [torch.bfloat16, torch.float16]
# The rest of the cases run on a GPU; what they add is a matter of the selection, tested by itself below.
INTERPRETED = [
    "several tiles",
    "grouped heads",
    "a row wholly masked",
    "window and padding",
    "positions outside",
    "one token",
    "values of another size",
    "narrow heads",
    "softcap",
]


# Triton, token granularity


@needs_triton
@pytest.mark.parametrize("name", INTERPRETED)
def test_matches_reference(name: str) -> None:
    interpreted(cases.check_case, name)


@needs_triton
def test_matches_reference_where_equal_codes_are_counted() -> None:
    interpreted(cases.check_case, "window and padding", similarity="matches")


@needs_triton
def test_matches_reference_with_channel_weights() -> None:
    interpreted(cases.check_case, "grouped heads", channel_weights=torch.randint(1, 8, (2, 16)) / 2)


@needs_triton
@pytest.mark.parametrize("similarity", ["inner_product", "matches"])
def test_keeps_the_same_keys_as_the_reference(similarity: str) -> None:
    for index in range(len(cases.SELECTIONS)):
        interpreted(cases.check_selection, index, similarity)


@needs_triton
def test_encoding_matches_the_plain_one() -> None:
    for *sizes, dtype in (
        (2, 8, 16, torch.float32),
        (9, 3, 5, torch.float32),
        (1, 1, 1, torch.float32),
        (3, 4, 16, torch.bfloat16),
    ):
        interpreted(cases.check_encoding, *sizes, dtype)


@needs_triton
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype: torch.dtype) -> None:
    interpreted(cases.check_half, CASES["values of another size"], dtype)


@needs_triton
@pytest.mark.parametrize(
    "check",
    [cases.check_layouts, cases.check_nan, cases.check_compiles_and_is_registered, cases.check_saved_memory_is_linear],
    ids=lambda check: check.__name__,
)
def test_interpreted(check: Callable[[], None]) -> None:
    interpreted(check)


ATTENTION = ["_attention_fwd_kernel", "_attention_bwd_query_kernel", "_attention_bwd_key_value_kernel"]


@needs_triton
def test_assembles_without_spills() -> None:
    kernels = assert_assembles(cases.launch, 64, 8, torch.bfloat16, 0.0, capability=90)
    assert [kernel.name for kernel in kernels] == ["_table_kernel", "_encode_kernel", "_select_kernel", *ATTENTION]


@needs_triton
@pytest.mark.slow
def test_assembles_where_every_size_is_one() -> None:
    # Triton makes a constant of a number that is 1, which not every expression takes.
    assert_assembles(cases.launch, 64, 8, torch.bfloat16, 0.0, heads=1, num_queries=1, capability=90)


@needs_triton
@pytest.mark.slow  # float32 products take the assembler long
@pytest.mark.parametrize(
    ("case", "capability"),
    [
        ((64, 8, torch.float32, 30.0), 90),
        ((128, 16, torch.bfloat16, 30.0), 80),
        ((80, 10, torch.float16, 0.0), 80),
        ((256, 32, torch.bfloat16, 0.0), 90),
    ],
    ids=str,
)
def test_assembles_without_spills_at_other_sizes(case: tuple[int, int, torch.dtype, float], capability: int) -> None:
    assert_assembles(cases.launch, *case, capability=capability)


# FlexAttention, block granularity: forward alone without a GPU


def test_flex_matches_reference() -> None:
    for name, block_size in [*((name, 16) for name in CASES), ("plain", 7), ("window and padding", 7), ("softcap", 64)]:
        tensors, options = make_inputs(CASES[name])
        options |= {"granularity": "block", "block_size": block_size}
        expected = sparse_attention(*tensors, **options, impl="reference")
        actual = sparse_attention(*tensors, **options, impl="flex")
        # Float32 rounding (6e-8) through two sums of up to 130 terms and an exponential.
        torch.testing.assert_close(actual, expected, rtol=0, atol=4e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ["scattered mask", "grouped heads", "positions before all keys"])
def test_flex_is_given_the_lists(name: str) -> None:
    # On a GPU the lists alone say which blocks are read, on a CPU they are not looked at.
    from sparsepeft.ops.sparse_attention.flex import _block_mask

    (query, key, _), options = make_inputs(CASES[name])
    visibility, settings = cases.selection_arguments(CASES[name], options)
    settings = settings._replace(block_size=7)
    lists = keep_blocks(pooled_scores(query, key, visibility, settings), key.shape[2], visibility, settings)
    mask = _block_mask(lists, query.shape[2], key.shape[2], visibility, 7, eager=False)
    expected = lists.to_mask(-(-key.shape[2] // 7))
    assert torch.equal(mask.to_dense().bool(), expected)
    assert mask.q_indices is not None
    backwards = torch.zeros_like(expected.mT)
    for place in mask.q_num_blocks.nonzero().tolist():
        backwards[(*place, mask.q_indices[*place, : mask.q_num_blocks[*place]].long())] = True
    assert torch.equal(backwards, expected.mT)


def test_flex_compiles_to_one_graph() -> None:
    torch.compiler.reset()
    tensors, options = make_inputs(CASES["left padding"])
    options |= {"granularity": "block", "block_size": 16}
    compiled = torch.compile(lambda *t: sparse_attention(*t, **options, impl="flex"), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), sparse_attention(*tensors, **options, impl="flex"))


def test_flex_refuses_what_it_cannot_do() -> None:
    tensors, options = make_inputs(CASES["seven tokens"])
    with pytest.raises(ValueError, match="impl is 'flex', but granularity is 'token'"):
        sparse_attention(*tensors, **options, impl="flex")
    with pytest.raises(ValueError, match="a gradient is wanted on cpu, but FlexAttention has a backward on CUDA only"):
        sparse_attention(tensors[0].requires_grad_(), *tensors[1:], **options, granularity="block", impl="flex")


# The choice


@needs_triton
def test_choice_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(head_size: int, dtype: torch.dtype, width: int = 8, **options: object) -> tuple[str, dict[str, str]]:
        with FakeTensorMode():
            tensor = torch.empty(1, 2, 64, head_size, dtype=dtype, device="cuda")
            codebooks = torch.empty(2, head_size // width, 16, width, device="cuda")
        explanation = explain(sparse_attention, tensor, tensor, tensor, codebooks, top_l=8, **options)
        return explanation.impl, explanation.others

    impl, others = chosen(64, torch.bfloat16)
    assert impl == "torch"
    assert "not run on one yet" in others["triton"]
    monkeypatch.setattr(registry, "ENABLED", frozenset({"triton"}))
    assert chosen(64, torch.bfloat16)[0] == "triton"
    assert chosen(64, torch.bfloat16, granularity="block")[0] == "flex"
    for arguments, granularity, kernels, why in (
        ((64, torch.float64), "token", "triton", "torch.float64"),
        ((320, torch.bfloat16), "token", "triton", "the head size is 320"),
        ((65, torch.bfloat16, 1), "token", "triton", "65 sub-vectors"),
        ((8, torch.bfloat16), "block", "flex", "the head sizes are 8 to 8"),
        ((64, torch.float64), "block", "flex", "torch.float64"),
    ):
        impl, others = chosen(*arguments, granularity=granularity)
        assert impl == "torch"
        assert why in others[kernels]
    impl, others = chosen(64, torch.bfloat16, granularity="block", block_size=96)
    assert impl == "torch"
    assert "block_size is 96, FlexAttention's kernels take multiples of 64" in others["flex"]


@needs_triton
def test_triton_refuses_what_it_cannot_run() -> None:
    tensors, options = make_inputs(CASES["seven tokens"])
    with pytest.raises(ValueError, match="impl is 'triton', but the tensors are on no CUDA device"):
        sparse_attention(*tensors, **options, impl="triton")
    with pytest.raises(ValueError, match="impl is 'triton', but the tensors are on no CUDA device"):
        encode(tensors[0], options["codebooks"], impl="triton")
    with pytest.raises(ValueError, match="impl is 'triton', but granularity is 'block'"):
        interpreted(sparse_attention, *tensors, **options, granularity="block", impl="triton")


@pytest.mark.slow
def test_importing_the_package_leaves_the_kernels_alone() -> None:
    code = (
        "import sys, sparsepeft.ops; "
        "sys.exit(any(f'sparsepeft.ops.sparse_attention.{name}' in sys.modules for name in ('triton', 'flex')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
