"""Block granularity by FlexAttention: the lists of kept blocks become a ``BlockMask``.

On a GPU it is compiled to a kernel that walks the lists. On a CPU it runs eagerly, as a check of the mask: forward
alone, and with a tensor of all scores.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sparsepeft.ops.sparse_attention.arguments import Settings, Visibility
from sparsepeft.ops.sparse_attention.selection import BlockLists


def flex_block_attention(
    query: Tensor, key: Tensor, value: Tensor, lists: BlockLists, visibility: Visibility, settings: Settings
) -> Tensor:
    """Attend to the valid pairs of the listed blocks; (B, H, Tq, Dv).

    Raises:
        ValueError: a gradient is wanted on a CPU.
    """
    if not query.is_cuda and torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        raise ValueError(
            f"impl is 'flex' and a gradient is wanted on {query.device}, but FlexAttention has a backward on CUDA "
            "only: use impl='auto', or torch.no_grad()."
        )
    # Tuned kernels have tiles that fit into blocks of 64 on every GPU; inside a graph it is the graph's compiler.
    attend: Any = _tuned() if query.is_cuda and not torch.compiler.is_compiling() else flex_attention

    def softcap(score: Tensor, *_: Tensor) -> Tensor:
        return settings.softcap * torch.tanh(score / settings.softcap)

    return attend(
        query,
        key,
        value,
        score_mod=softcap if settings.softcap > 0 else None,
        block_mask=_block_mask(
            lists, query.shape[2], key.shape[2], visibility, settings.block_size, eager=not query.is_cuda
        ),
        scale=settings.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},  # the kernel for few queries has other tiles
    )


@functools.cache
def _tuned() -> Any:
    return torch.compile(flex_attention, mode="max-autotune-no-cudagraphs")


def _block_mask(
    lists: BlockLists, num_queries: int, num_keys: int, visibility: Visibility, block_size: int, *, eager: bool
) -> BlockMask:
    num_key_blocks = -(-num_keys // block_size)
    _, lower, upper, key_mask = visibility
    kept = lists.to_mask(num_key_blocks) if eager else None

    def valid(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = (k >= lower[b, q]) & (k < upper[b, q])
        if key_mask is not None:
            allowed = allowed & key_mask[b, k]
        if kept is not None:  # eager FlexAttention asks this function of every pair, and not the lists
            allowed = allowed & kept[b, h, q // block_size, k // block_size]
        return allowed

    return BlockMask.from_kv_blocks(
        lists.counts,
        F.pad(lists.indices, (0, num_key_blocks - lists.indices.shape[-1])),
        BLOCK_SIZE=block_size,
        mask_mod=valid,
        seq_lengths=(num_queries, num_keys),
    )
