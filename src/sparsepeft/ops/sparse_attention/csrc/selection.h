// Which keys a query keeps: matches counted a byte per key, then a threshold found by counting.
#pragma once

#include "common.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

typedef uint8_t bytes __attribute__((vector_size(VECTOR_BYTES)));
typedef uint8_t loose_bytes __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));
typedef int8_t flags __attribute__((vector_size(VECTOR_BYTES)));
constexpr int64_t WORD = 64;          // keys per word of bits
constexpr int64_t AT_ONCE = 16;       // kept keys that are written without asking how many there are
constexpr int64_t MATCHED = 4 * WORD;  // keys compared at once, in as many vectors as there are registers for
constexpr int PIECES = WORD / VECTOR_BYTES;
constexpr uint8_t NEVER_EQUAL = 254;  // the code of a masked key; codes are below 16
constexpr uint8_t ALWAYS_KEPT = 255;  // stands in the place of a count

INLINE bytes load_bytes(const uint8_t* p) { return *reinterpret_cast<const loose_bytes*>(p); }
INLINE bytes splat_byte(uint8_t x) { return bytes{} + x; }

// counts + 1 where the bytes are equal.
INLINE bytes add_where(bytes counts, bytes a, bytes b) {
#if defined(__AVX512BW__)
    const __m512i total = reinterpret_cast<__m512i>(counts);
    const __mmask64 equal = _mm512_cmpeq_epi8_mask(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
    return reinterpret_cast<bytes>(_mm512_mask_sub_epi8(total, equal, total, _mm512_set1_epi8(-1)));
#else
    return counts - reinterpret_cast<bytes>(a == b);
#endif
}
// One bit per byte of a comparison's result.
INLINE uint64_t to_bits(flags condition) {
#if defined(__AVX512BW__)
    return _mm512_movepi8_mask(reinterpret_cast<__m512i>(condition));
#elif defined(__AVX2__) && VECTOR_BYTES == 32
    return static_cast<uint32_t>(_mm256_movemask_epi8(reinterpret_cast<__m256i>(condition)));
#else
    uint64_t parts[VECTOR_BYTES / 8], result = 0;
    std::memcpy(parts, &condition, VECTOR_BYTES);
    for (int i = 0; i < VECTOR_BYTES / 8; i++)  // the product gathers the eight lowest bits in the highest byte
        result |= (((parts[i] & 0x0101010101010101u) * 0x0102040810204080u) >> 56) << (8 * i);
    return result;
#endif
}
// The word of bits that says for which of 64 counts the comparison holds.
template <class Compare>
INLINE uint64_t which(const uint8_t* counts, const Compare& compare) {
    uint64_t result = 0;
    for (int i = 0; i < PIECES; i++)
        result |= to_bits(compare(load_bytes(counts + i * VECTOR_BYTES))) << (i * VECTOR_BYTES % WORD);
    return result;
}
INLINE uint64_t at_least(const uint8_t* counts, uint8_t limit) {
    const bytes limits = splat_byte(limit);
    return which(counts, [&](bytes c) { return c >= limits; });
}
INLINE uint64_t below_bit(int64_t bit) { return bit >= WORD ? ~uint64_t{0} : (uint64_t{1} << bit) - 1; }

// The keys of one (batch, kv head): a plane of bytes for each sub-vector, and which keys may be attended.
struct Selector {
    int64_t keys, stride, subvectors;
    int64_t guess = 1;  // the smallest count that the last query kept: neighbours have much the same
    bool is_masked = false;
    uint8_t *planes, *valid, *counts;
    uint64_t* equal;
    int32_t* before;  // number of bits set in the words of `equal` before this one

    Selector(const Problem& p, Arena& arena)
        : keys(p.keys), stride(round_up(p.keys, WORD) + MATCHED), subvectors(p.subvectors) {
        planes = arena.take<uint8_t>(stride * subvectors);
        valid = arena.take<uint8_t>(stride);
        counts = arena.take<uint8_t>(stride);
        equal = arena.take<uint64_t>(stride / WORD + 1);
        before = arena.take<int32_t>(stride / WORD + 1);
    }

    void read(const Problem& p, int64_t batch, int64_t kv_head) {
        const uint8_t* codes = p.key_codes + (batch * p.kv_heads + kv_head) * keys * subvectors;
        const uint8_t* mask = p.key_mask ? p.key_mask + batch * keys : nullptr;
        is_masked = mask != nullptr;
        std::fill(valid, valid + stride, 0);
        std::fill(planes, planes + stride * subvectors, NEVER_EQUAL);
        for (int64_t j = 0; j < keys; j++) {
            if (mask && !mask[j]) continue;
            valid[j] = 1;
            for (int64_t m = 0; m < subvectors; m++) planes[m * stride + j] = codes[j * subvectors + m];
        }
    }

    // Fill counts[first * WORD, last * WORD) with matches + 1, and 0 where a key may not be attended.
    void match(const uint8_t* code, int64_t lower, int64_t upper, bool compare) {
        const int64_t begin = lower / WORD * WORD, end = round_up(upper, WORD);
        for (int64_t j = begin; j < end; j += MATCHED) {
            bytes total[MATCHED / VECTOR_BYTES];
            std::memcpy(total, valid + j, MATCHED);
            if (compare)
                for (int64_t m = 0; m < subvectors; m++) {
                    const bytes wanted = splat_byte(code[m]);
                    const uint8_t* plane = planes + m * stride + j;
                    for (bytes& some : total) {
                        some = add_where(some, load_bytes(plane), wanted);
                        plane += VECTOR_BYTES;
                    }
                }
            std::memcpy(counts + j, total, MATCHED);
        }
        std::fill(counts + begin, counts + lower, 0);
        std::fill(counts + upper, counts + end, 0);
    }

    int64_t num_at_least(uint8_t limit, int64_t first, int64_t last) const {
        int64_t total = 0;
        for (int64_t w = first; w < last; w++) total += __builtin_popcountll(at_least(counts + w * WORD, limit));
        return total;
    }

    int64_t num_equal_before(int64_t key) const {
        return before[key / WORD] + __builtin_popcountll(equal[key / WORD] & below_bit(key % WORD));
    }

    // Leave in `equal` the last `need` keys: those nearest to a query that stands behind them all.
    void keep_last(int64_t need, int64_t first, int64_t last) {
        for (int64_t w = last - 1; w >= first; w--) {
            const int64_t count = __builtin_popcountll(equal[w]);
            if (need == 0) equal[w] = 0;
            for (int64_t surplus = count - need; need > 0 && surplus > 0; surplus--) equal[w] &= equal[w] - 1;
            need = std::max<int64_t>(0, need - count);
        }
    }

    // Leave in `equal` the `need` keys nearest to `position`; of two equally near the earlier.
    void keep_nearest(int64_t need, int64_t position, int64_t lower, int64_t upper) {
        const int64_t first = lower / WORD, last = (upper + WORD - 1) / WORD;
        if (position >= upper - 1) return keep_last(need, first, last);
        before[first] = 0;
        for (int64_t w = first; w < last; w++) before[w + 1] = before[w] + __builtin_popcountll(equal[w]);
        equal[last] = 0;  // read where `upper` ends a word
        const auto from = [&](int64_t radius) { return std::min(upper, std::max(lower, position - radius)); };
        const auto to = [&](int64_t radius) { return std::max(lower, std::min(upper, position + radius + 1)); };
        int64_t near = 0, far = std::max(std::abs(position - lower), std::abs(upper - 1 - position));
        while (near < far) {
            const int64_t radius = (near + far) / 2;
            if (num_equal_before(to(radius)) - num_equal_before(from(radius)) >= need) far = radius;
            else near = radius + 1;
        }
        const int64_t begin = from(near), end = to(near);
        if (num_equal_before(end) - num_equal_before(begin) > need)  // both keys at this distance, room for one
            equal[(position + near) / WORD] &= ~(uint64_t{1} << (position + near) % WORD);
        for (int64_t w = first; w < last; w++)
            equal[w] &= below_bit(std::max<int64_t>(0, end - w * WORD)) & ~below_bit(std::max<int64_t>(0, begin - w * WORD));
    }

    // Write the indices of the kept keys to `kept`, ascending; return how many. What comes behind them, AT_ONCE numbers at
    // most, is written over: how many bits a word has is not to be foreseen, and a branch that asks costs more.
    int64_t keep(const uint8_t* code, int64_t position, int64_t lower, int64_t upper, int64_t top_l, bool keep_self,
                 bool keep_first, int32_t* kept) {
        if (lower >= upper) return 0;
        const int64_t first = lower / WORD, last = (upper + WORD - 1) / WORD;
        match(code, lower, upper, upper - lower > top_l);
        uint8_t limit = 1;
        std::fill(equal + first, equal + last, 0);
        if (upper - lower > top_l && (!is_masked || num_at_least(1, first, last) > top_l)) {
            int64_t always = 0;
            if (keep_self && position >= lower && position < upper && counts[position])
                counts[position] = ALWAYS_KEPT, always++;
            if (keep_first && always < top_l) {
                int64_t w = first;
                while (!at_least(counts + w * WORD, 1)) w++;
                uint8_t& count = counts[w * WORD + __builtin_ctzll(at_least(counts + w * WORD, 1))];
                if (count != ALWAYS_KEPT) count = ALWAYS_KEPT, always++;
            }
            limit = ALWAYS_KEPT;
            if (always < top_l) {
                // The largest count that at least top_l keys reach: those above it are kept, the rest is a tie.
                int64_t reached = guess, above = num_at_least(static_cast<uint8_t>(reached + 1), first, last);
                while (above >= top_l) above = num_at_least(static_cast<uint8_t>(++reached + 1), first, last);
                for (int64_t more; reached > 1; above = more, reached--)
                    if ((more = num_at_least(static_cast<uint8_t>(reached), first, last)) >= top_l) break;
                guess = reached;
                limit = static_cast<uint8_t>(reached + 1);
                const bytes tied = splat_byte(static_cast<uint8_t>(reached));
                for (int64_t w = first; w < last; w++)
                    equal[w] = which(counts + w * WORD, [&](bytes c) { return c == tied; });
                keep_nearest(top_l - above, position, lower, upper);
            }
        }
        int64_t num_kept = 0;
        for (int64_t w = first; w < last; w++) {
            uint64_t left = at_least(counts + w * WORD, limit) | equal[w];
            const int64_t end = num_kept + __builtin_popcountll(left);
            for (int64_t at = num_kept; at < end; at += AT_ONCE)
#pragma GCC unroll 16
                for (int64_t i = 0; i < AT_ONCE; i++, left &= left - 1)
                    kept[at + i] = static_cast<int32_t>(w * WORD + __builtin_ctzll(left | uint64_t{1} << 63));
            num_kept = end;
        }
        return num_kept;
    }
};
