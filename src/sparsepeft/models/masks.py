"""What a sparse attention layer must know about its batch, handed through a model as its attention mask.

transformers builds the mask once per forward pass with a function registered beside the attention function. A mask of
queries x keys would be what sparse attention wants to avoid, so this one is a tensor (B, 1, 1, Tk + Tq + 3) of int32:
for each key whether it may be attended, for each query its position among the keys, whether attention is causal, the
sliding window, and Tk. Being a tensor with four dimensions it passes through `generate`, gradient checkpointing, data
parallelism and compiled graphs as any mask does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sliding_window_causal_mask_function,
)

_NO_WINDOW = 0


class SparseMask(NamedTuple):
    """The parts of a mask that was made by :func:`sparse_mask`."""

    key_mask: Tensor  # (B, Tk) bool
    query_positions: Tensor  # (Tq,) int64
    causal: bool
    window: int | None


def sparse_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """Transformers' mask interface (``AttentionMaskInterface``): never None, so that a lost mask can be told.

    Returns:
        (B, 1, 1, Tk + Tq + 3), int32.

    Raises:
        ValueError: the pattern is not causal, causal with a window, or bidirectional.
    """
    positions = torch.arange(q_length, device=device) + (q_offset - kv_offset)
    causal, window = _pattern(mask_function, local_size, batch_size, positions + kv_offset, kv_length, kv_offset)
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is None:
        keys = torch.ones(batch_size, kv_length, dtype=torch.int32, device=device)
    else:
        keys = padding[:, kv_offset : kv_offset + kv_length].to(device, torch.int32)
    flags = torch.tensor([causal, window or _NO_WINDOW, kv_length], dtype=torch.int32, device=device)
    rest = torch.cat([positions.to(torch.int32), flags]).expand(batch_size, -1)
    return torch.cat([keys, rest], dim=1)[:, None, None]


def read_mask(mask: Tensor | None, batch_size: int, q_length: int, kv_length: int) -> SparseMask:
    """Take apart what :func:`sparse_mask` made.

    Of a mask for more queries, the last ones count: when it generates, Gemma 4 runs its last layers on these alone.

    Raises:
        ValueError: it is missing or some other mask; attending without it would let padding in.
    """
    least = (batch_size, 1, 1, kv_length + q_length + 3)
    flags = [0, 0, -1]
    if mask is not None and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[:3] == least[:3]:
        flags = mask[0, 0, 0, -3:].tolist()
    causal, window, num_keys = flags
    if mask is None or num_keys != kv_length or mask.shape[3] < least[3]:
        received = "no mask" if mask is None else f"a mask of shape {tuple(mask.shape)} and type {mask.dtype}"
        raise ValueError(
            f"Sparse attention received {received}; it expects the one that this package registers with transformers "
            f"(here {least}, int32). Pass the model a mask of padding, (batch, keys), not one of "
            "your own making."
        )
    keys, positions = mask[:, 0, 0, :-3].split([kv_length, mask.shape[3] - kv_length - 3], dim=1)
    queries = positions[0, positions.shape[1] - q_length :]
    return SparseMask(keys.bool(), queries.long(), bool(causal), window or None)


def dense_mask(mask: SparseMask) -> Tensor:
    """The same as (B, 1, Tq, Tk) of bool, for layers that stay dense; True may be attended.

    Positions of queries that differ from row to row, (B, Tq), are understood, too.
    """
    index = torch.arange(mask.key_mask.shape[1], device=mask.key_mask.device)
    queries = mask.query_positions[..., None]
    allowed = torch.ones_like(queries, dtype=torch.bool)
    if mask.causal:
        allowed = allowed & (index <= queries)
    if mask.window is not None:
        allowed = allowed & (index > queries - mask.window)
    return (allowed & mask.key_mask[:, None])[:, None]


def is_whole(mask: SparseMask) -> bool:
    """Whether all positions attend to all, or to all before them, so that attention needs no mask but a flag."""
    length = mask.key_mask.shape[1]
    if mask.causal and (len(mask.query_positions) != length or mask.query_positions[0] != 0):
        return False
    return (mask.window is None or mask.window >= length) and bool(mask.key_mask.all())


def _pattern(
    function: Callable[..., Any],
    local_size: int | None,
    batch_size: int,
    queries: Tensor,
    kv_length: int,
    kv_offset: int,
) -> tuple[bool, int | None]:
    """Whether a pattern is causal, and its window."""
    if function is causal_mask_function:
        return True, None
    if function is bidirectional_mask_function:
        return False, None
    # A closure: compare it with the one pattern left, for a few queries of every row, which costs O(keys).
    if local_size is not None:
        sample = queries[torch.tensor([0, len(queries) // 2, len(queries) - 1], device=queries.device)]
        batch = torch.arange(batch_size, device=queries.device)[:, None, None]
        head = torch.zeros((), dtype=torch.long, device=queries.device)
        keys = torch.arange(kv_length, device=queries.device) + kv_offset
        arguments = batch, head, sample[None, :, None], keys[None, None]
        if torch.equal(
            *torch.broadcast_tensors(function(*arguments), sliding_window_causal_mask_function(local_size)(*arguments))
        ):
            return True, local_size
    raise ValueError(
        "Sparse attention knows causal attention, with or without a sliding window, and attention in both directions; "
        "this batch wants another pattern (packed sequences, chunks, or a mask of the model's own). Give each sequence "
        "a row of its own, padded, or leave attention dense with SptConfig(attention=False)."
    )
