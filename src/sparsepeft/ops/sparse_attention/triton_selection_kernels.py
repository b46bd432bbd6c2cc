"""Triton kernels that encode vectors, count equal codes and find what each query keeps.

Codes are packed, eight to a word of 32 bits, 4 bits each: (B, H, WORDS, T). The last word is filled up with 0 for
queries and 15 for keys, which never match.

What a query keeps of its valid keys, beside its own and the first, is those whose rank is not below a threshold. The
rank of a key that is d positions after the query is ``matches << 24`` minus d in zigzag order (0, -1, 1, -2, 2, ... are
0, 1, 2, 3, 4, ...), so no two keys of a query have the same rank, and one int32 per query says all.

Six limits come with each query, (B, 6, Tq), as `selection_limits` makes them.
"""

from __future__ import annotations

import triton
import triton.language as tl

RANK_SHIFT = 24  # more than any distance in zigzag order
_SHIFT = tl.constexpr(RANK_SHIFT)
_KEEP_ALL = tl.constexpr(-(1 << 31))
_KEEP_NONE = tl.constexpr((1 << 31) - 1)


@triton.jit
def _encode_kernel(
    vectors_ptr: tl.tensor,  # (B, H, T, D), strides below, D contiguous
    codebooks_ptr: tl.tensor,  # (Hkv, M, C, W), contiguous, float32
    codes_ptr: tl.tensor,  # (B, H, T, M) uint8, or (B, H, WORDS, T) int32 if PACKED; contiguous
    num_tokens: tl.tensor,
    num_heads: tl.tensor,
    group: tl.tensor,  # heads that share a codebook
    num_tiles: tl.tensor,
    stride_b: tl.tensor,
    stride_h: tl.tensor,
    stride_t: tl.tensor,
    M: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    PADDED_W: tl.constexpr,
    FILLER: tl.constexpr,  # a word of the codes that fill up the last one
    PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    """The nearest codeword of each sub-vector; of equally near ones the lowest."""
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    head = row % num_heads
    tokens = (tl.program_id(0) % num_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_tile = tokens < num_tokens
    channels = tl.arange(0, PADDED_W)
    in_width = channels < W
    vectors_ptr += row // num_heads * stride_b + head * stride_h
    vector = vectors_ptr + tokens.to(tl.int64)[:, None] * stride_t + channels[None, :]
    codebooks_ptr += head // group * (M * C * W)
    for word in range((M + 7) // 8):
        begin = word * 8
        end = tl.minimum(begin + 8, M)
        packed = tl.zeros((BLOCK_T,), tl.int32)
        for m in range(begin, end):
            x = tl.load(vector + m * W, mask=in_tile[:, None] & in_width[None, :], other=0.0).to(tl.float32)
            nearest = tl.full((BLOCK_T,), float("inf"), tl.float32)
            code = tl.zeros((BLOCK_T,), tl.int32)
            for c in range(C):
                codeword = tl.load(codebooks_ptr + (m * C + c) * W + channels, mask=in_width, other=0.0)
                # Half the squared distance, less half the squared length of x, which all codewords share.
                distance = tl.sum((codeword * 0.5)[None, :] * codeword[None, :] - codeword[None, :] * x, axis=1)
                code = tl.where(distance < nearest, c, code)
                nearest = tl.minimum(distance, nearest)
            if PACKED:
                packed |= code << ((m - begin) * 4)
            else:
                tl.store(codes_ptr + (row * num_tokens + tokens) * M + m, code.to(tl.uint8), mask=in_tile)
        if PACKED:
            if end < begin + 8:
                packed |= FILLER << ((end - begin) * 4)
            tl.store(codes_ptr + (row * ((M + 7) // 8) + word) * num_tokens + tokens, packed, mask=in_tile)


@triton.jit
def count_equal(
    query_words: tl.tensor,
    key_words: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    has_query: tl.tensor,
    has_key: tl.tensor,
    WORDS: tl.constexpr,
) -> tl.tensor:
    """Return the number of equal codes of queries and keys, whose indices are given in shapes that broadcast."""
    different = tl.zeros((1, 1), tl.uint32)
    for word in tl.static_range(WORDS):
        query = tl.load(query_words + word * num_queries + queries, mask=has_query, other=0)
        key = tl.load(key_words + word * num_keys + keys, mask=has_key, other=0)
        bits = (query ^ key).to(tl.uint32, bitcast=True)
        bits |= bits >> 2
        bits |= bits >> 1
        # One bit for each of the eight codes that differs; the product has their sum in its highest four bits.
        different += ((bits & 0x11111111) * 0x11111111) >> 28
    return WORDS * 8 - different.to(tl.int32)


@triton.jit
def rank_of(matches: tl.tensor, offset: tl.tensor) -> tl.tensor:
    """Return the rank of keys that have so many matches and are ``offset`` positions after the query."""
    return (matches << _SHIFT) - ((offset << 1) ^ (offset >> 31))


@triton.jit
def load_limits(
    limits_ptr: tl.tensor, num_queries: tl.tensor, num_keys: tl.tensor, queries: tl.tensor, in_tile: tl.tensor
) -> tl.tensor:
    """Return the first four limits of queries; one that does not exist has no valid key."""
    position = tl.load(limits_ptr + queries, mask=in_tile, other=0)
    lower = tl.load(limits_ptr + num_queries + queries, mask=in_tile, other=num_keys)
    upper = tl.load(limits_ptr + num_queries * 2 + queries, mask=in_tile, other=0)
    first = tl.load(limits_ptr + num_queries * 3 + queries, mask=in_tile, other=-1)
    return position, lower, upper, first


@triton.jit
def _select_kernel(
    query_words_ptr: tl.tensor,  # (B, H, WORDS, Tq)
    key_words_ptr: tl.tensor,  # (B, Hkv, WORDS, Tk)
    limits_ptr: tl.tensor,  # (B, 6, Tq)
    key_mask_ptr: tl.tensor,  # (B, Tk), uint8, if HAS_MASK
    thresholds_ptr: tl.tensor,  # (B, H, Tq)
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    num_heads: tl.tensor,
    group: tl.tensor,
    num_tiles: tl.tensor,
    top_l: tl.tensor,
    WORDS: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """The rank of the last key that each query keeps.

    A pass over the valid keys counts those of each number of matches, which gives the number at which the last key is
    found, and how many such keys are kept. A walk from the query's position outwards finds how far these reach; it ends
    when all queries of the tile are there.
    """
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    batch, head = row // num_heads, row % num_heads
    queries = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)  # longest rows first
    in_tile = queries < num_queries
    query_words_ptr += row * WORDS * num_queries
    key_words_ptr += (batch * (num_heads // group) + head // group) * WORDS * num_keys
    limits_ptr += batch * 6 * num_queries
    if HAS_MASK:
        key_mask_ptr += batch * num_keys
    position, lower, upper, first = load_limits(limits_ptr, num_queries, num_keys, queries, in_tile)
    own_key = tl.load(limits_ptr + num_queries * 4 + queries, mask=in_tile, other=-1)
    num_valid = tl.load(limits_ptr + num_queries * 5 + queries, mask=in_tile, other=0)
    remaining = top_l - ((own_key >= 0).to(tl.int32) + ((first >= 0) & (first != own_key)).to(tl.int32))
    searching = (num_valid > top_l) & (remaining > 0)

    # Column c of the histogram counts the valid keys with c + 1 matches; within a tile, four counters share a word.
    levels = tl.arange(0, LEVELS)
    histogram = tl.zeros((BLOCK_Q, LEVELS), tl.int32)
    begin = tl.min(tl.where(searching, lower, num_keys)) // BLOCK_K * BLOCK_K
    end = tl.max(tl.where(searching, upper, 0))
    for start in range(begin, end, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        matches = count_equal(
            query_words_ptr,
            key_words_ptr,
            num_queries,
            num_keys,
            queries[:, None],
            keys[None, :],
            in_tile[:, None],
            (keys < num_keys)[None, :],
            WORDS,
        )
        valid = (keys[None, :] >= lower[:, None]) & (keys[None, :] < upper[:, None])
        if HAS_MASK:
            valid &= (tl.load(key_mask_ptr + keys, mask=keys < num_keys, other=0) != 0)[None, :]
        level = tl.where(valid, matches, 0) - 1
        one = 1 << ((level & 3) * 8)
        for four in tl.static_range(LEVELS // 4):
            counts = tl.sum(tl.where((level >> 2) == four, one, 0), axis=1)
            unpacked = (counts[:, None] >> ((levels & 3) * 8)[None, :]) & 255
            histogram += tl.where((levels >> 2)[None, :] == four, unpacked, 0)
    for forced in tl.static_range(2):  # the query's own key and the first are not searched for
        key = own_key if forced == 0 else tl.where(first == own_key, -1, first)
        present = key[:, None] >= 0
        matches = count_equal(
            query_words_ptr,
            key_words_ptr,
            num_queries,
            num_keys,
            queries[:, None],
            key[:, None],
            in_tile[:, None],
            present,
            WORDS,
        )
        histogram -= (present & (levels[None, :] == matches - 1)).to(tl.int32)

    at_least = tl.sum(histogram, axis=1)[:, None] - tl.cumsum(histogram, axis=1) + histogram
    enough = at_least >= remaining[:, None]
    cut = tl.sum(enough.to(tl.int32), axis=1)  # falling from column to column
    wanted = remaining - tl.max(tl.where(enough, 0, at_least), axis=1)

    # Where no valid key is after its query, the walk takes the keys before it alone.
    one_sided = tl.max(upper - position) <= 1
    reach = tl.max(tl.where(searching, tl.maximum(position - lower, upper - position), 0)) + 1
    steps = tl.where(one_sided, reach, reach * 2)
    active = searching
    taken = tl.zeros((BLOCK_Q,), tl.int32)
    arrival = tl.zeros((BLOCK_Q,), tl.int32)
    start = 0
    while (start < steps) & (tl.max(active.to(tl.int32)) > 0):
        tied, _ = _tied(
            *(query_words_ptr, key_words_ptr, key_mask_ptr, num_queries, num_keys, queries, position, lower, upper),
            *(own_key, first, cut, active, tl.zeros((BLOCK_Q,), tl.int32) + start, one_sided, WORDS, HAS_MASK, BLOCK_K),
        )
        count = tl.sum(tied.to(tl.int32), axis=1)
        arrives = active & (taken + count >= wanted)
        arrival = tl.where(arrives, start, arrival)
        active &= ~arrives
        taken += tl.where(active, count, 0)
        start += BLOCK_K
    tied, offset = _tied(
        *(query_words_ptr, key_words_ptr, key_mask_ptr, num_queries, num_keys, queries, position, lower, upper),
        *(own_key, first, cut, searching, arrival, one_sided, WORDS, HAS_MASK, BLOCK_K),
    )
    last = tied & (taken[:, None] + tl.cumsum(tied.to(tl.int32), axis=1) == wanted[:, None])
    threshold = rank_of(cut, tl.sum(tl.where(last, offset, 0), axis=1))
    threshold = tl.where(searching, threshold, tl.where(num_valid <= top_l, _KEEP_ALL, _KEEP_NONE))
    tl.store(thresholds_ptr + row * num_queries + queries, threshold, mask=in_tile)


@triton.jit
def _tied(
    query_words: tl.tensor,
    key_words: tl.tensor,
    key_mask: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    queries: tl.tensor,
    position: tl.tensor,
    lower: tl.tensor,
    upper: tl.tensor,
    own_key: tl.tensor,
    first: tl.tensor,
    cut: tl.tensor,
    active: tl.tensor,
    start: tl.tensor,
    one_sided: tl.tensor,
    WORDS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Return which keys on steps ``start`` to before ``start + BLOCK_K`` of a query's walk are searched for.

    These are the valid ones with exactly ``cut`` matches that are not kept anyway. Also returned is how many positions
    after the query each is.
    """
    step = start[:, None] + tl.arange(0, BLOCK_K)[None, :]
    offset = tl.where(one_sided, -step, (step >> 1) ^ -(step & 1))
    keys = position[:, None] + offset
    valid = active[:, None] & (keys >= lower[:, None]) & (keys < upper[:, None])
    valid &= (keys != own_key[:, None]) & (keys != first[:, None])
    if HAS_MASK:
        valid &= tl.load(key_mask + keys, mask=valid, other=0) != 0
    matches = count_equal(
        query_words, key_words, num_queries, num_keys, queries[:, None], keys, active[:, None], valid, WORDS
    )
    return valid & (matches == cut[:, None]), offset
