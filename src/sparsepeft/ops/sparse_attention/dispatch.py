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

from sparsepeft.ops.memory.select import softmax_dtype
from sparsepeft.ops.sparse_attention.blocks import BlockLists, keep_blocks, list_shape
from sparsepeft.ops.sparse_attention.choice import choose_impl, means_flex
from sparsepeft.ops.sparse_attention.chunked import chunked_backward, chunked_forward
from sparsepeft.ops.sparse_attention.codes import encode
from sparsepeft.ops.sparse_attention.compiled import compiled_backward, compiled_forward
from sparsepeft.ops.sparse_attention.problem import Reach, Rules, words_shape

_FORWARD = {"cpu": compiled_forward, "torch": chunked_forward}
_BACKWARD = {"cpu": compiled_backward, "torch": chunked_backward}


def dispatch_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, codebooks: Tensor, reach: Reach, rules: Rules, impl: str
) -> Tensor:
    """Attend by the implementation ``impl``; see :func:`sparse_attention`."""
    if means_flex(impl, query, value, rules.block_size):
        from sparsepeft.ops.sparse_attention.flex import flex_block_attention  # slow to import

        choose_impl("flex", query, value, codebooks.shape[1], rules.block_size)
        lists = BlockLists(*_select_blocks(query.detach(), key.detach(), codebooks.detach(), *reach, *rules))
        with torch.autocast(query.device.type, enabled=False):
            return flex_block_attention(query, key, value, lists, reach, rules)
    if impl == "auto" and rules.block_size and query.is_cuda:
        impl = "torch"  # settled here: while it runs, the operator does not know that a graph was traced
    output, *_ = _attend(query, key, value, codebooks, *reach, *rules, impl)
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
    top_l: int,
    scale: float,
    softcap: float,
    keep_self: bool,
    keep_first: bool,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Return the block lists and their counts."""
    rules = Rules(top_l, scale, softcap, keep_self, keep_first, block_size)
    with torch.autocast(query.device.type, enabled=False):
        codes = encode(query, codebooks), encode(key, codebooks)
        lists = keep_blocks(*codes, Reach(positions, lower, upper, key_mask), rules)
    return lists.indices, lists.counts


@_select_blocks.register_fake
def _(
    query: Tensor,
    key: Tensor,
    codebooks: Tensor,
    positions: Tensor,
    lower: Tensor,
    upper: Tensor,
    key_mask: Tensor | None,
    top_l: int,
    scale: float,
    softcap: float,
    keep_self: bool,
    keep_first: bool,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    shape = list_shape(query.shape, key.shape[2], top_l, block_size)
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
    top_l: int,
    scale: float,
    softcap: float,
    keep_self: bool,
    keep_first: bool,
    block_size: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, the log-sum-exp and what was selected."""
    rules = Rules(top_l, scale, softcap, keep_self, keep_first, block_size)
    reach = Reach(positions, lower, upper, key_mask)
    impl = choose_impl(impl, query, value, codebooks.shape[1], block_size)
    with torch.autocast(query.device.type, enabled=False):
        if impl == "triton":
            from sparsepeft.ops.sparse_attention.triton import select_triton, triton_forward  # optional, and slow

            packed = select_triton(query, key, codebooks, reach, rules)
            return *triton_forward(query, key, value, packed, reach, rules), *packed
        codes = encode(query, codebooks), encode(key, codebooks)
        selection = keep_blocks(*codes, reach, rules) if block_size else codes
        nothing = query.new_empty(0, dtype=torch.int32)
        return *_FORWARD[impl](query, key, value, selection, reach, rules), *selection, nothing


@_attend.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codebooks: Tensor,
    positions: Tensor,
    lower: Tensor,
    upper: Tensor,
    key_mask: Tensor | None,
    top_l: int,
    scale: float,
    softcap: float,
    keep_self: bool,
    keep_first: bool,
    block_size: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    log_sum_exp = query.new_empty(query.shape[:3], dtype=softmax_dtype(query.dtype))
    if choose_impl(impl, query, value, codebooks.shape[1], block_size) == "triton":
        shapes = *(words_shape(t.shape, codebooks.shape[1]) for t in (query, key)), query.shape[:3]
        a, b, c = (query.new_empty(shape, dtype=torch.int32) for shape in shapes)
        return output, log_sum_exp, a, b, c
    nothing = query.new_empty(0, dtype=torch.int32)
    if block_size:
        shape = list_shape(query.shape, key.shape[2], top_l, block_size)
        lists = query.new_empty(shape, dtype=torch.int32)
        return output, log_sum_exp, lists, query.new_empty(shape[:3], dtype=torch.int32), nothing
    codes = [t.new_empty((*t.shape[:3], codebooks.shape[1]), dtype=torch.uint8) for t in (query, key)]
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
    top_l: int,
    scale: float,
    softcap: float,
    keep_self: bool,
    keep_first: bool,
    block_size: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rules = Rules(top_l, scale, softcap, keep_self, keep_first, block_size)
    reach = Reach(positions, lower, upper, key_mask)
    impl = choose_impl(impl, query, value, num_subvectors, block_size)
    given = grad_output, query, key, value, output, log_sum_exp
    with torch.autocast(query.device.type, enabled=False):
        if impl == "triton":
            from sparsepeft.ops.sparse_attention.triton import Selection, triton_backward

            return triton_backward(*given, Selection(selection_a, selection_b, selection_c), reach, rules)
        selection = BlockLists(selection_a, selection_b) if block_size else (selection_a, selection_b)
        return _BACKWARD[impl](*given, selection, reach, rules)


@_attend_backward.register_fake
def _(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, codebooks, *reach = inputs[:8]
    ctx.save_for_backward(query, key, value, *output, *reach)
    ctx.settings = codebooks.shape[1], *inputs[8:]


def _autograd(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grads = _attend_backward(grad_output, *ctx.saved_tensors, *ctx.settings)
    wanted = [grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[:3], strict=True)]
    return *wanted, *[None] * (len(ctx.needs_input_grad) - 3)


_attend.register_autograd(_autograd, setup_context=_setup_context)
