"""One operator, opaque to ``torch.compile``, in front of the implementations that have a backward of their own.

Kept for backward are the inputs, the output, the log-sum-exp, and what was selected, in three tensors: codes of keys
and queries (token granularity, which selects again), those of keys packed and thresholds of queries (Triton), or block
lists and their counts; what is not needed is empty. Memory is linear in the number of tokens.

FlexAttention has its own derivative, so it stands outside, and only the selection before it is an operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsepeft.ops.numerics import softmax_dtype
from sparsepeft.ops.sparse_attention.arguments import Attended, Settings, Visibility, words_shape
from sparsepeft.ops.sparse_attention.choice import OPERATOR, AttentionArguments, num_subvectors
from sparsepeft.ops.sparse_attention.cpu import cpu_backward, cpu_forward
from sparsepeft.ops.sparse_attention.pytorch import torch_backward, torch_forward
from sparsepeft.ops.sparse_attention.quantization import select
from sparsepeft.ops.sparse_attention.selection import BlockLists, Selection, list_shape
from sparsepeft.ops.sparse_attention.similarity import Codes

_FORWARD = {"cpu": cpu_forward, "torch": torch_forward}
_BACKWARD = {"cpu": cpu_backward, "torch": torch_backward}


def dispatch_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codebooks: Tensor | None,
    channel_weights: Tensor | None,
    visibility: Visibility,
    settings: Settings,
    impl: str,
) -> Tensor:
    """Attend by the implementation ``impl``, which is not the reference; see :func:`sparse_attention`."""
    packed = settings.pack()
    if OPERATOR.means("flex", impl, _arguments(query, value, codebooks, settings)):
        from sparsepeft.ops.sparse_attention.flex import flex_block_attention  # slow to import

        lists = BlockLists(*_select_blocks(query.detach(), key.detach(), codebooks, *visibility, packed))
        with torch.autocast(query.device.type, enabled=False):
            return flex_block_attention(query, key, value, lists, visibility, settings)
    if impl == "auto" and settings.block_size and query.is_cuda:
        impl = "torch"  # settled here: while it runs, the operator does not know that a graph was traced
    output, *_ = _attend(query, key, value, codebooks, channel_weights, *visibility, packed, impl)
    return output


@torch.library.custom_op("sparsepeft::sparse_attention_select_blocks", mutates_args=())
def _select_blocks(
    query: Tensor,
    key: Tensor,
    codebooks: Tensor | None,
    positions: Tensor,
    lower: Tensor,
    upper: Tensor,
    key_mask: Tensor | None,
    packed_settings: list[float],
) -> tuple[Tensor, Tensor]:
    """Return the block lists and their counts."""
    settings = Settings.unpack(packed_settings, key.shape[2])
    with torch.autocast(query.device.type, enabled=False):
        lists = select(query, key, codebooks, None, Visibility(positions, lower, upper, key_mask), settings)
    assert isinstance(lists, BlockLists)
    return lists.indices, lists.counts


@_select_blocks.register_fake
def _(query: Tensor, key: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _empty_lists(query, key, Settings.unpack(others[-1], key.shape[2]))


def _empty_lists(query: Tensor, key: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    shape = list_shape(query.shape, key.shape[2], settings.top_l, settings.block_size)
    return query.new_empty(shape, dtype=torch.int32), query.new_empty(shape[:3], dtype=torch.int32)


@torch.library.custom_op("sparsepeft::sparse_attention", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codebooks: Tensor | None,
    channel_weights: Tensor | None,
    positions: Tensor,
    lower: Tensor,
    upper: Tensor,
    key_mask: Tensor | None,
    packed_settings: list[float],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, the log-sum-exp and what was selected."""
    settings = Settings.unpack(packed_settings, key.shape[2])
    visibility = Visibility(positions, lower, upper, key_mask)
    impl = OPERATOR.choose(impl, _arguments(query, value, codebooks, settings))
    with torch.autocast(query.device.type, enabled=False):
        if impl == "triton":
            assert codebooks is not None
            from sparsepeft.ops.sparse_attention.triton import select_triton, triton_forward  # optional, and slow

            assert codebooks is not None
            selected = select_triton(query, key, codebooks, channel_weights, visibility, settings)
            nothing = query.new_empty(0, dtype=torch.int32)
            return *triton_forward(query, key, value, selected, visibility, settings), *selected[1:], nothing
        selection = select(query, key, codebooks, channel_weights, visibility, settings)
        return *_FORWARD[impl](query, key, value, selection, visibility, settings), *_as_three(selection)


@_attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, codebooks: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    packed_settings, impl = others[-2:]
    settings, num_codes = Settings.unpack(packed_settings, key.shape[2]), num_subvectors(codebooks)
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    log_sum_exp = query.new_empty(query.shape[:3], dtype=softmax_dtype(query.dtype))
    if OPERATOR.means("triton", impl, _arguments(query, value, codebooks, settings)):
        shapes = words_shape(key.shape, num_codes), (*query.shape[:2], 2, query.shape[2]), (0,)
        a, b, c = (query.new_empty(shape, dtype=torch.int32) for shape in shapes)
        return output, log_sum_exp, a, b, c
    if settings.block_size:
        return output, log_sum_exp, *_as_three(BlockLists(*_empty_lists(query, key, settings)))
    keys, queries = (t.new_empty((*t.shape[:3], num_codes), dtype=torch.uint8) for t in (key, query))
    return output, log_sum_exp, *_as_three(Codes(keys, None if settings.inner_product else queries, keys))


def _as_three(selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
    """Return what was selected as tensors to be kept; the codebooks are kept anyway."""
    first, second = selection[:2]
    nothing = [first.new_empty(0, dtype=torch.int32) for _ in range(2)]  # an operator returns no tensor twice
    return first, nothing[0] if second is None else second, nothing[1]


def _arguments(query: Tensor, value: Tensor, codebooks: Tensor | None, settings: Settings) -> AttentionArguments:
    return AttentionArguments(query, value, num_subvectors(codebooks), settings.block_size, settings.inner_product)


@torch.library.custom_op("sparsepeft::sparse_attention_backward", mutates_args=())
def _attend_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codebooks: Tensor | None,
    output: Tensor,
    log_sum_exp: Tensor,
    selection_a: Tensor,
    selection_b: Tensor,
    selection_c: Tensor,
    positions: Tensor,
    lower: Tensor,
    upper: Tensor,
    key_mask: Tensor | None,
    packed_settings: list[float],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = Settings.unpack(packed_settings, key.shape[2])
    visibility = Visibility(positions, lower, upper, key_mask)
    impl = OPERATOR.choose(impl, _arguments(query, value, codebooks, settings))
    attended = Attended(query, key, value, output, log_sum_exp)
    with torch.autocast(query.device.type, enabled=False):
        if impl == "triton":
            assert codebooks is not None
            from sparsepeft.ops.sparse_attention import triton

            assert codebooks is not None
            selected = triton.Selection(triton.query_tables(query, codebooks, settings), selection_a, selection_b)
            return triton.triton_backward(grad_output, attended, selected, visibility, settings)
        selection: Selection
        if settings.block_size:
            selection = BlockLists(selection_a, selection_b)
        else:
            assert codebooks is not None
            selection = Codes(selection_a, None if settings.inner_product else selection_b, codebooks)
        return _BACKWARD[impl](grad_output, attended, selection, visibility, settings)


@_attend_backward.register_fake
def _(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, codebooks, _, *visibility = inputs[:9]
    ctx.save_for_backward(query, key, value, codebooks, *output, *visibility)
    ctx.settings = inputs[9:]


def _autograd(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grads = _attend_backward(grad_output, *ctx.saved_tensors, *ctx.settings)
    wanted = [grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[:3], strict=True)]
    return *wanted, *[None] * (len(ctx.needs_input_grad) - 3)


_attend.register_autograd(_autograd, setup_context=_setup_context)
