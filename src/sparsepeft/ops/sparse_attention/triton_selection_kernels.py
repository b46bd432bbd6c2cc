"""Triton kernels that encode keys, make queries' tables, and find what each query keeps.

Codes of keys are packed, eight to a word of 32 bits, 4 bits each: (B, Hkv, WORDS, Tk). A query's table has 16 entries
for each of 8 * WORDS sub-vectors, (B, H, Tq, WORDS * 128): 0 to 255, less 128, as int8; 0 where there is no such
sub-vector or codeword. The score of a pair is the sum of the entries that the key's codes name, so it is a product of
the table with zeros and ones, and matrix units compute it, exactly. Equal codes are counted by tables of zeros and
ones.

What a query keeps of its valid keys, beside its own and the first, is those with a score above its ``cut``, and those
that have just this and are no farther than its ``reach``. Distances are in zigzag order: of the keys 0, -1, 1, -2, 2,
... positions after the query they are 0, 1, 2, 3, 4, ..., so no two keys of a query are equally far. Thresholds,
(B, H, 2, Tq), hold both.

Six limits come with each query, (B, 6, Tq), as `selection_limits` makes them.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LARGEST = tl.constexpr((1 << 31) - 1)
_BINS = tl.constexpr(16)  # a hexadecimal digit


@triton.jit
def _encode_kernel(
    vectors_ptr: tl.tensor,  # (B, H, T, D), strides below, D contiguous
    words_ptr: tl.tensor,  # (Hkv, M, C, W), contiguous, float32, see `weighted_words`
    half_norms_ptr: tl.tensor,  # (Hkv, M, C), the same
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
    words_ptr += head // group * (M * C * W)
    half_norms_ptr += head // group * (M * C)
    for word in range((M + 7) // 8):
        begin = word * 8
        packed = tl.zeros((BLOCK_T,), tl.int32)
        for m in range(begin, tl.minimum(begin + 8, M)):
            x = tl.load(vector + m * W, mask=in_tile[:, None] & in_width[None, :], other=0.0).to(tl.float32)
            nearest = tl.full((BLOCK_T,), float("inf"), tl.float32)
            code = tl.zeros((BLOCK_T,), tl.int32)
            for c in range(C):
                codeword = tl.load(words_ptr + (m * C + c) * W + channels, mask=in_width, other=0.0)
                # Half the squared distance, less half the squared length of x, which all codewords share.
                distance = tl.load(half_norms_ptr + m * C + c) - tl.sum(codeword[None, :] * x, axis=1)
                code = tl.where(distance < nearest, c, code)
                nearest = tl.minimum(distance, nearest)
            if PACKED:
                packed |= code << ((m - begin) * 4)
            else:
                tl.store(codes_ptr + (row * num_tokens + tokens) * M + m, code.to(tl.uint8), mask=in_tile)
        if PACKED:
            tl.store(codes_ptr + (row * ((M + 7) // 8) + word) * num_tokens + tokens, packed, mask=in_tile)


@triton.jit
def _table_kernel(
    query_ptr: tl.tensor,  # (B, H, T, D), strides below, D contiguous
    codebooks_ptr: tl.tensor,  # (Hkv, M, C, W), contiguous, float32
    tables_ptr: tl.tensor,  # (B, H, T, WORDS * 128), int8, contiguous
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
    WORDS: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    """Inner products with the codewords, in eight bits: the steps of `query_tables` one by one, none of them fused."""
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    head = row % num_heads
    tokens = (tl.program_id(0) % num_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_tile = tokens < num_tokens
    codewords = tl.arange(0, 16)
    in_codebook = codewords < C
    query = query_ptr + row // num_heads * stride_b + head * stride_h + tokens.to(tl.int64) * stride_t
    codebook = codebooks_ptr + head // group * (M * C * W) + codewords * W
    largest = tl.zeros((BLOCK_T,), tl.float32)
    for m in range(M):
        above = _above_least(query + m * W, codebook + m * C * W, in_tile, in_codebook, W)
        largest = tl.maximum(largest, tl.max(above, axis=1))
    divisor = tl.where(largest > 0.0, largest, 1.0)  # with a largest of 0 all entries are
    scale = tl.div_rn(tl.full((BLOCK_T,), 255.0, tl.float32), divisor)
    table = tables_ptr + (row * num_tokens + tokens)[:, None] * (WORDS * 128) + codewords[None, :]
    for m in range(WORDS * 8):
        entry = tl.zeros((BLOCK_T, 16), tl.float32)
        if m < M:
            entry = _above_least(query + m * W, codebook + m * C * W, in_tile, in_codebook, W) * scale[:, None]
        whole = tl.floor(entry)
        is_even = whole == 2.0 * tl.floor(whole * 0.5)
        up = tl.where(is_even, entry - whole > 0.5, entry - whole >= 0.5)  # halves to even
        tl.store(table + m * 16, (whole + up.to(tl.float32) - 128.0).to(tl.int8), mask=in_tile[:, None])


@triton.jit
def _above_least(
    query: tl.tensor, codebook: tl.tensor, in_tile: tl.tensor, in_codebook: tl.tensor, W: tl.constexpr
) -> tl.tensor:
    """Return products of a sub-vector with codewords, (BLOCK_T, 16), less the least of each row; 0 beyond the last."""
    product = tl.zeros((query.shape[0], 16), tl.float32)
    for w in range(W):
        number = tl.load(query + w, mask=in_tile, other=0.0).to(tl.float32)
        product += number[:, None] * tl.load(codebook + w, mask=in_codebook, other=0.0)[None, :]
    least = tl.min(tl.where(in_codebook[None, :], product, float("inf")), axis=1)
    return tl.where(in_codebook[None, :], product - least[:, None], 0.0)


@triton.jit
def similarity(
    tables: tl.tensor,
    key_words: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    WORDS: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
) -> tl.tensor:
    """Return the scores of queries and keys, int32, (queries, keys), or (keys, queries) if KEYS_FIRST."""
    entry = tl.arange(0, 128)
    table = tables + queries.to(tl.int64)[:, None] * (WORDS * 128) + entry[None, :]
    if KEYS_FIRST:
        score = tl.full((keys.shape[0], queries.shape[0]), WORDS * 1024, tl.int32)  # 128 for each sub-vector
    else:
        score = tl.full((queries.shape[0], keys.shape[0]), WORDS * 1024, tl.int32)
    for word in tl.static_range(WORDS):
        packed = tl.load(key_words + word * num_keys + keys, mask=keys < num_keys, other=0)
        code = (packed[:, None] >> (entry >> 4 << 2)[None, :]) & 15
        named = (code == (entry & 15)[None, :]).to(tl.int8)
        entries = tl.load(table + word * 128, mask=(queries < num_queries)[:, None], other=0)
        if KEYS_FIRST:
            score = tl.dot(named, tl.trans(entries), score, out_dtype=tl.int32)
        else:
            score = tl.dot(entries, tl.trans(named), score, out_dtype=tl.int32)
    return score


@triton.jit
def distance_of(offset: tl.tensor) -> tl.tensor:
    """Return how far in zigzag order keys are that stand ``offset`` positions after the query."""
    return (offset << 1) ^ (offset >> 31)


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
    tables_ptr: tl.tensor,  # (B, H, Tq, WORDS * 128)
    key_words_ptr: tl.tensor,  # (B, Hkv, WORDS, Tk)
    limits_ptr: tl.tensor,  # (B, 6, Tq)
    key_mask_ptr: tl.tensor,  # (B, Tk), uint8, if HAS_MASK
    thresholds_ptr: tl.tensor,  # (B, H, 2, Tq)
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    num_heads: tl.tensor,
    group: tl.tensor,
    num_tiles: tl.tensor,
    top_l: tl.tensor,
    WORDS: tl.constexpr,
    DIGITS: tl.constexpr,  # of the largest score, hexadecimal
    HAS_MASK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """The score and distance of the last key that each query keeps, digit by digit from the highest.

    A pass over the valid keys counts those with each value of a digit, which gives the digit of the key that is looked
    for, and how many of those that share it are kept. First the digits of its score, then those of its nearness among
    keys of this score.
    """
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    batch, head = row // num_heads, row % num_heads
    queries = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)  # longest rows first
    in_tile = queries < num_queries
    tables_ptr += row * num_queries * (WORDS * 128)
    key_words_ptr += (batch * (num_heads // group) + head // group) * WORDS * num_keys
    limits_ptr += batch * 6 * num_queries
    if HAS_MASK:
        key_mask_ptr += batch * num_keys
    position, lower, upper, first = load_limits(limits_ptr, num_queries, num_keys, queries, in_tile)
    own_key = tl.load(limits_ptr + num_queries * 4 + queries, mask=in_tile, other=-1)
    num_valid = tl.load(limits_ptr + num_queries * 5 + queries, mask=in_tile, other=0)
    wanted = top_l - ((own_key >= 0).to(tl.int32) + ((first >= 0) & (first != own_key)).to(tl.int32))
    searching = (num_valid > top_l) & (wanted > 0)

    # Where no valid key is after its query, distances to both sides need not be told apart, which takes a bit less.
    one_sided = (tl.max(upper - position) <= 1).to(tl.int32)
    farthest = tl.max(tl.where(searching, tl.maximum(position - lower, upper - position), 0)) << (1 - one_sided)
    distance_digits = 0
    while (1 << (distance_digits * 4)) <= farthest:
        distance_digits += 1
    farthest = (1 << (distance_digits * 4)) - 1

    common = (tables_ptr, key_words_ptr, key_mask_ptr, num_queries, num_keys, queries, position, lower, upper)
    forced = (own_key, first)
    cut, wanted, tied = _find(
        *common, *forced, farthest, one_sided, DIGITS, wanted, searching, position, False, WORDS, HAS_MASK, BLOCK_K
    )
    nearness, _, _ = _find(
        *common, *forced, farthest, one_sided, distance_digits, wanted, tied, cut, True, WORDS, HAS_MASK, BLOCK_K
    )
    reach = tl.where(tied, (farthest - nearness) << one_sided, _LARGEST)
    cut = tl.where(searching, cut, tl.where(num_valid <= top_l, -1, _LARGEST))
    thresholds_ptr += row * 2 * num_queries
    tl.store(thresholds_ptr + queries, cut, mask=in_tile)
    tl.store(thresholds_ptr + num_queries + queries, reach, mask=in_tile)


@triton.jit
def _find(
    tables: tl.tensor,
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
    farthest: tl.tensor,
    one_sided: tl.tensor,
    num_digits: tl.tensor,
    wanted: tl.tensor,
    undecided: tl.tensor,
    cut: tl.tensor,
    NEARNESS: tl.constexpr,
    WORDS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Return the number of the last of the ``wanted`` keys, its score or, if NEARNESS, its nearness at this ``cut``.

    Where all keys that share the digits so far are wanted, the rest are zero. Also returned is how many keys of just
    this number are wanted, and whether there are more of them.
    """
    BLOCK_Q: tl.constexpr = queries.shape[0]
    bins = tl.arange(0, _BINS)
    number = tl.zeros((BLOCK_Q,), tl.int32)
    shift = num_digits * 4
    while (shift > 0) & (tl.max(undecided.to(tl.int32)) > 0):
        shift -= 4
        begin, end = lower, upper
        if NEARNESS:  # no key is farther than one whose lower digits are zero
            bound = farthest - number
            begin = tl.maximum(begin, position - bound)
            end = tl.minimum(end, position + bound + 1)
        aligned = tl.min(tl.where(undecided, begin, num_keys)) // BLOCK_K * BLOCK_K
        histogram = tl.zeros((BLOCK_Q, _BINS), tl.int32)
        for start in range(aligned, tl.max(tl.where(undecided, end, 0)), BLOCK_K):
            keys = start + tl.arange(0, BLOCK_K)
            numbers = similarity(tables, key_words, num_queries, num_keys, queries, keys, WORDS, False)
            if NEARNESS:
                distance = (distance_of(keys[None, :] - position[:, None]) + one_sided) >> one_sided
                numbers = tl.where(numbers == cut[:, None], farthest - distance, -1)
            valid = undecided[:, None] & (keys[None, :] >= lower[:, None]) & (keys[None, :] < upper[:, None])
            valid &= (keys[None, :] != own_key[:, None]) & (keys[None, :] != first[:, None])  # kept anyway
            if HAS_MASK:
                valid &= (tl.load(key_mask + keys, mask=keys < num_keys, other=0) != 0)[None, :]
            digit = tl.where(valid, (numbers >> shift) - (number >> shift)[:, None], -1)
            one = 1 << ((digit & 3) * 8)  # four counters share a word
            for four in tl.static_range(_BINS // 4):
                counts = tl.sum(tl.where((digit >> 2) == four, one, 0), axis=1)
                unpacked = (counts[:, None] >> ((bins & 3) * 8)[None, :]) & 255
                histogram += tl.where((bins >> 2)[None, :] == four, unpacked, 0)
        at_least = tl.sum(histogram, axis=1)[:, None] - tl.cumsum(histogram, axis=1) + histogram
        enough = at_least >= wanted[:, None]  # falling from bin to bin
        digit = tl.sum(enough.to(tl.int32), axis=1) - 1
        number += tl.where(undecided, digit << shift, 0)
        wanted -= tl.where(undecided, tl.max(tl.where(enough, 0, at_least), axis=1), 0)
        undecided &= tl.sum(tl.where(bins[None, :] == digit[:, None], histogram, 0), axis=1) != wanted
    return number, wanted, undecided
