// Which keys a query keeps: a threshold of the scores, found by counting, and the nearest of the keys that are tied.
#pragma once

#include <variant>

#include "similarity.h"

constexpr int64_t AT_ONCE = 16;  // kept keys that are written without asking how many there are

// One bit per key of 64, of a comparison of their scores with a limit.
enum Comparison { AT_LEAST, EQUAL };
template <Comparison COMPARE>
INLINE uint64_t which(const uint8_t* scores, uint8_t limit) {
    const bytes limits = splat_byte(limit);
    uint64_t result = 0;
    for (int i = 0; i < WORD / VECTOR_BYTES; i++) {
        const bytes some = load_bytes(scores + i * VECTOR_BYTES);
        const auto holds = COMPARE == EQUAL ? some == limits : some >= limits;
        uint64_t part = 0;
#if defined(__AVX512BW__)
        part = _mm512_movepi8_mask(reinterpret_cast<__m512i>(holds));
#elif defined(__AVX2__) && VECTOR_BYTES == 32
        part = static_cast<uint32_t>(_mm256_movemask_epi8(reinterpret_cast<__m256i>(holds)));
#else
        uint64_t parts[VECTOR_BYTES / 8];
        std::memcpy(parts, &holds, VECTOR_BYTES);
        for (int j = 0; j < VECTOR_BYTES / 8; j++)  // the product gathers the eight lowest bits in the highest byte
            part |= (((parts[j] & 0x0101010101010101u) * 0x0102040810204080u) >> 56) << (8 * j);
#endif
        result |= part << (i * VECTOR_BYTES % WORD);
    }
    return result;
}
template <Comparison COMPARE>
INLINE uint64_t which(const uint16_t* scores, uint16_t limit) {
    constexpr int PER_VECTOR = VECTOR_BYTES / 2;
    const words limits = words{} + limit;
    uint64_t result = 0;
    for (int i = 0; i < WORD / PER_VECTOR; i++) {
        const words some = load_words(scores + i * PER_VECTOR);
        const auto holds = COMPARE == EQUAL ? some == limits : some >= limits;
        uint64_t part = 0;
#if defined(__AVX512BW__)
        part = _mm512_movepi16_mask(reinterpret_cast<__m512i>(holds));
#elif defined(__AVX2__) && VECTOR_BYTES == 32
        const __m256i flags = reinterpret_cast<__m256i>(holds);
        part = static_cast<uint16_t>(_mm_movemask_epi8(
            _mm_packs_epi16(_mm256_castsi256_si128(flags), _mm256_extracti128_si256(flags, 1))));
#else
        uint64_t parts[VECTOR_BYTES / 8];
        std::memcpy(parts, &holds, VECTOR_BYTES);
        for (int j = 0; j < VECTOR_BYTES / 8; j++)
            part |= (((parts[j] & 0x0001000100010001u) * 0x0001000200040008u) >> 48 & 15) << (4 * j);
#endif
        result |= part << (i * PER_VECTOR);
    }
    return result;
}
INLINE uint64_t below_bit(int64_t bit) { return bit >= WORD ? ~uint64_t{0} : (uint64_t{1} << bit) - 1; }

// How many scores of [begin, end), whole words, are at least the limit: lanes count, for so long as they cannot overflow.
INLINE int64_t num_at_least(const uint8_t* scores, uint8_t limit, int64_t begin, int64_t end) {
    int64_t total = 0;
    for (int64_t j = begin; j < end; j += WORD) total += __builtin_popcountll(which<AT_LEAST>(scores + j, limit));
    return total;
}
INLINE int64_t num_at_least(const uint16_t* scores, uint16_t limit, int64_t begin, int64_t end) {
    constexpr int64_t PER_VECTOR = VECTOR_BYTES / 2, LONG = PER_VECTOR << 14;
    const words limits = words{} + limit;
    int64_t total = 0;
    for (int64_t from = begin; from < end; from += LONG) {
        words counts = {};
        for (int64_t j = from; j < std::min(end, from + LONG); j += PER_VECTOR)
            counts -= reinterpret_cast<words>(load_words(scores + j) >= limits);
        for (int i = 0; i < PER_VECTOR; i++) total += counts[i];
    }
    return total;
}

// The keys of one (batch, kv head), and which of them each query keeps, by their similarity.
template <class Similarity>
struct Selector {
    using Score = typename Similarity::Score;
    static constexpr Score ALWAYS_KEPT = std::numeric_limits<Score>::max();  // stands in the place of a score

    Similarity similarity;
    int64_t keys;
    bool is_masked;
    double guess = 0;  // the last query's threshold, in spreads above what was expected: neighbours have much the same
    Score* scores;
    uint64_t* equal;
    int32_t* before;  // number of bits set in the words of `equal` before this one

    Selector(const Problem& p, Arena& arena) : similarity(p, arena), keys(p.keys), is_masked(p.key_mask) {
        scores = arena.take<Score>(similarity.stride);
        equal = arena.take<uint64_t>(similarity.stride / WORD + 1);
        before = arena.take<int32_t>(similarity.stride / WORD + 1);
    }

    void read(const Problem& p, int64_t batch, int64_t kv_head) { similarity.read(p, batch, kv_head); }

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

    // The largest score that at least `need` keys reach, or one that just `need` do, and the number of keys above it.
    // Counts at two scores say about where between them it lies.
    struct Threshold {
        int64_t score, num_above;
    };
    Threshold threshold(int64_t need, int64_t always, int64_t begin, int64_t end) {
        const double spread = std::max(1.0, similarity.spread()), expected = similarity.expected();
        int64_t low = 1, high = ALWAYS_KEPT, num_low = -1, num_high = -1;  // low is reached by as many, high is not
        int64_t at = std::lround(expected + guess * spread), step = 1;
        for (int turn = 1; high - low > 1; turn++) {
            at = std::max(low + 1, std::min(high - 1, at));
            const int64_t num = num_at_least(scores, static_cast<Score>(at), begin, end);
            (num >= need ? low : high) = at;
            (num >= need ? num_low : num_high) = num;
            if (num == need) break;
            if (turn == 1) step = 1 + static_cast<int64_t>(std::abs(num - need) * similarity.spread() / (1.75 * need));
            if (num_low < 0 || num_high < 0) {
                at = num >= need ? low + step : high - step;
                step *= 2;
            } else if (turn % 3) {
                at = low + static_cast<int64_t>((num_low - need + 0.5) / (num_low - num_high) * (high - low));
            } else {
                at = (low + high) / 2;
            }
        }
        guess = (static_cast<double>(low) - expected) / spread;
        return num_low == need ? Threshold{low - 1, need} : Threshold{low, num_high < 0 ? always : num_high};
    }

    // Write the indices of the kept keys to `kept`, ascending; return how many. What comes behind them, AT_ONCE numbers at
    // most, is written over: how many bits a word has is not to be foreseen, and a branch that asks costs more.
    int64_t keep(const Problem& p, int64_t batch, int64_t head, int64_t t, const float* query, int32_t* kept) {
        const int64_t at = batch * p.queries + t, position = p.positions[at], lower = p.lower[at], upper = p.upper[at];
        const int64_t top_l = p.top_l;
        if (lower >= upper) return 0;
        const int64_t begin = lower / WORD * WORD, end = round_up(upper, WORD), first = begin / WORD, last = end / WORD;
        std::fill(equal + first, equal + last, 0);
        bool chooses = upper - lower > top_l;
        if (chooses) similarity.score(similarity.of(p, batch, head, t, query), begin, end, scores);
        else std::copy(similarity.valid + begin, similarity.valid + end, scores + begin);
        std::fill(scores + begin, scores + lower, 0);
        std::fill(scores + upper, scores + end, 0);
        int64_t limit = 1;
        chooses = chooses && (!is_masked || num_at_least(scores, 1, begin, end) > top_l);
        if (chooses) {
            int64_t always = 0;
            if (p.keep_self && position >= lower && position < upper && scores[position])
                scores[position] = ALWAYS_KEPT, always++;
            if (p.keep_first && always < top_l) {
                int64_t j = begin;
                while (!which<AT_LEAST>(scores + j, 1)) j += WORD;
                j += __builtin_ctzll(which<AT_LEAST>(scores + j, 1));
                if (scores[j] != ALWAYS_KEPT) scores[j] = ALWAYS_KEPT, always++;
            }
            limit = ALWAYS_KEPT;
            if (always < top_l) {
                const Threshold found = threshold(top_l, always, begin, end);
                limit = found.score + 1;
                if (found.num_above < top_l) {
                    for (int64_t w = first; w < last; w++)
                        equal[w] = which<EQUAL>(scores + w * WORD, static_cast<Score>(found.score));
                    keep_nearest(top_l - found.num_above, position, lower, upper);
                }
            }
        }
        int64_t num_kept = 0;
        for (int64_t w = first; w < last; w++) {
            uint64_t left = which<AT_LEAST>(scores + w * WORD, static_cast<Score>(limit)) | equal[w];
#if defined(__AVX512F__)
            for (int64_t j = w * WORD; left; j += AT_ONCE, left >>= AT_ONCE) {
                const __m512i index = _mm512_add_epi32(
                    _mm512_set1_epi32(static_cast<int32_t>(j)),
                    _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
                const __mmask16 some = static_cast<__mmask16>(left);
                _mm512_storeu_si512(kept + num_kept, _mm512_maskz_compress_epi32(some, index));
                num_kept += __builtin_popcount(some);
            }
#else
            const int64_t stop = num_kept + __builtin_popcountll(left);
            for (int64_t at = num_kept; at < stop; at += AT_ONCE)
#pragma GCC unroll 16
                for (int64_t i = 0; i < AT_ONCE; i++, left &= left - 1)
                    kept[at + i] = static_cast<int32_t>(w * WORD + __builtin_ctzll(left | uint64_t{1} << 63));
            num_kept = stop;
#endif
        }
        return num_kept;
    }
};

// By the similarity that is asked for: a call with codebooks is one by products.
class AnySelector {
  public:
    AnySelector(const Problem& p, Arena& arena)
        : selector(p.codebooks ? Any(std::in_place_type<Selector<Products>>, p, arena)
                               : Any(std::in_place_type<Selector<Matches>>, p, arena)) {}

    void read(const Problem& p, int64_t batch, int64_t kv_head) {
        std::visit([&](auto& one) { one.read(p, batch, kv_head); }, selector);
    }
    // For query t of a head, whose vector is `query`.
    int64_t keep(const Problem& p, int64_t batch, int64_t head, int64_t t, const float* query, int32_t* kept) {
        return std::visit([&](auto& one) { return one.keep(p, batch, head, t, query, kept); }, selector);
    }

  private:
    using Any = std::variant<Selector<Matches>, Selector<Products>>;
    Any selector;
};
