"""One operator, opaque to ``torch.compile``, in front of the implementations that have a backward of their own.

Kept for backward are the inputs, the output, the log-sum-exp, and what was selected, in three tensors: codes of queries
and keys (token granularity, which selects again), the same packed with a threshold per query (Triton), or block lists
and their counts; what is not needed is empty. Memory is linear in the number of tokens.

FlexAttention has its own derivative, so it stands outside, and only the selection before it is an operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsepeft.ops.numerics import softmax_dtype
from sparsepeft.ops.sparse_attention.arguments import Attended, Settings, Visibility, words_shape
from sparsepeft.ops.sparse_attention.choice import OPERATOR, AttentionArguments
from sparsepeft.ops.sparse_attention.cpu import cpu_backward, cpu_forward
from sparsepeft.ops.sparse_attention.pytorch import torch_backward, torch_forward
from sparsepeft.ops.sparse_attention.quantization import encode
from sparsepeft.ops.sparse_attention.selection import BlockLists, keep_blocks, list_shape

_FORWARD = {"cpu": cpu_forward, "torch": torch_forward}
_BACKWARD = {"cpu": cpu_backward, "torch": torch_backward}


def dispatch_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, codebooks: Tensor, visibility: Visibility, settings: Settings, impl: str
) -> Tensor:
    """Attend by the implementation ``impl``, which is not the reference; see :func:`sparse_attention`."""
    packed = settings.pack()
    if OPERATOR.means("flex", impl, AttentionArguments(query, value, codebooks.shape[1], settings.block_size)):
        from sparsepeft.ops.sparse_attention.flex import flex_block_attention  # slow to import

        lists = BlockLists(*_select_blocks(query.detach(), key.detach(), codebooks.detach(), *visibility, packed))
        with torch.autocast(query.device.type, enabled=False):
            return flex_block_attention(query, key, value, lists, visibility, settings)
    if impl == "auto" and settings.block_size and query.is_cuda:
        impl = "torch"  # settled here: while it runs, the operator does not know that a graph was traced
    output, *_ = _attend(query, key, value, codebooks, *visibility, packed, impl)
    return output


@torch.library.custom_op("sparsepeft::sparse_attention_select_blocks", mutates_args=())
def _select_blocks(
    query: Tensor,
    key: Tensor,
    codebooks: Tensor,
    positions: Tensor,
    lower: Tensor,
    upper: Tensor,
    key_mask: Tensor | None,
    packed_settings: list[float],
) -> tuple[Tensor, Tensor]:
    """Return the block lists and their counts."""
    settings = Settings.unpack(packed_settings, key.shape[2])
    with torch.autocast(query.device.type, enabled=False):
        codes = encode(query, codebooks), encode(key, codebooks)
        lists = keep_blocks(*codes, Visibility(positions, lower, upper, key_mask), settings)
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
    codebooks: Tensor,
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
    impl = OPERATOR.choose(impl, AttentionArguments(query, value, codebooks.shape[1], settings.block_size))
    with torch.autocast(query.device.type, enabled=False):
        if impl == "triton":
            from sparsepeft.ops.sparse_attention.triton import select_triton, triton_forward  # optional, and slow

            selected = select_triton(query, key, codebooks, visibility, settings)
            return *triton_forward(query, key, value, selected, visibility, settings), *selected
        codes = encode(query, codebooks), encode(key, codebooks)
        selection = keep_blocks(*codes, visibility, settings) if settings.block_size else codes
        nothing = query.new_empty(0, dtype=torch.int32)
        return *_FORWARD[impl](query, key, value, selection, visibility, settings), *selection, nothing


@_attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, codebooks: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    packed_settings, impl = others[-2:]
    settings, num_subvectors = Settings.unpack(packed_settings, key.shape[2]), codebooks.shape[1]
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    log_sum_exp = query.new_empty(query.shape[:3], dtype=softmax_dtype(query.dtype))
    if OPERATOR.means("triton", impl, AttentionArguments(query, value, num_subvectors, settings.block_size)):
        shapes = *(words_shape(t.shape, num_subvectors) for t in (query, key)), query.shape[:3]
        a, b, c = (query.new_empty(shape, dtype=torch.int32) for shape in shapes)
        return output, log_sum_exp, a, b, c
    nothing = query.new_empty(0, dtype=torch.int32)
    if settings.block_size:
        return output, log_sum_exp, *_empty_lists(query, key, settings), nothing
    codes = [t.new_empty((*t.shape[:3], num_subvectors), dtype=torch.uint8) for t in (query, key)]
    return output, log_sum_exp, codes[0], codes[1], nothing


@torch.library.custom_op("sparsepeft::sparse_attention_backward", mutates_args=())
def _attend_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    selection_a: Tensor,
    selection_b: Tensor,
    selection_c: Tensor,
    positions: Tensor,
    lower: Tensor,
    upper: Tensor,
    key_mask: Tensor | None,
    num_subvectors: int,
    packed_settings: list[float],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = Settings.unpack(packed_settings, key.shape[2])
    visibility = Visibility(positions, lower, upper, key_mask)
    impl = OPERATOR.choose(impl, AttentionArguments(query, value, num_subvectors, settings.block_size))
    attended = Attended(query, key, value, output, log_sum_exp)
    with torch.autocast(query.device.type, enabled=False):
        if impl == "triton":
            from sparsepeft.ops.sparse_attention.triton import Selection, triton_backward

            selected = Selection(selection_a, selection_b, selection_c)
            return triton_backward(grad_output, attended, selected, visibility, settings)
        selection = BlockLists(selection_a, selection_b) if settings.block_size else (selection_a, selection_b)
        return _BACKWARD[impl](grad_output, attended, selection, visibility, settings)


@_attend_backward.register_fake
def _(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, codebooks, *visibility = inputs[:8]
    ctx.save_for_backward(query, key, value, *output, *visibility)
    ctx.settings = codebooks.shape[1], *inputs[8:]


def _autograd(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grads = _attend_backward(grad_output, *ctx.saved_tensors, *ctx.settings)
    wanted = [grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[:3], strict=True)]
    return *wanted, *[None] * (len(ctx.needs_input_grad) - 3)


_attend.register_autograd(_autograd, setup_context=_setup_context)
