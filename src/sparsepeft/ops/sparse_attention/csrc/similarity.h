// How much the keys of one (batch, kv head) are like a query: a whole number for each key, from its codes, plus one; 0 of a
// key that may not be attended. Counts of equal codes are bytes, sums of a query's products with the codewords 16 bits.
#pragma once

#include "common.h"

#if defined(__AVX2__) || defined(__SSSE3__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

typedef uint8_t bytes __attribute__((vector_size(VECTOR_BYTES)));
typedef uint8_t loose_bytes __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));
typedef uint16_t words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t loose_words __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));
constexpr int64_t WORD = 64;  // keys per word of bits
constexpr int64_t ENTRIES = 16;  // of a sub-vector's table: codes are below it

INLINE bytes load_bytes(const uint8_t* p) { return *reinterpret_cast<const loose_bytes*>(p); }
INLINE words load_words(const uint16_t* p) { return *reinterpret_cast<const loose_words*>(p); }
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

// The number of codes that a key shares with the query.
struct Matches {
    using Score = uint8_t;
    static constexpr int64_t AT_ONCE = 4 * WORD;  // keys compared at once, in as many vectors as there are registers for
    static constexpr uint8_t NEVER_EQUAL = 254;   // the code of a masked key

    int64_t keys, stride, subvectors;
    uint8_t *planes, *valid;  // a plane of codes for each sub-vector

    Matches(const Problem& p, Arena& arena)
        : keys(p.keys), stride(round_up(p.keys, WORD) + AT_ONCE), subvectors(p.subvectors) {
        planes = arena.take<uint8_t>(stride * subvectors);
        valid = arena.take<uint8_t>(stride);
    }

    void read(const Problem& p, int64_t batch, int64_t kv_head) {
        const uint8_t* codes = p.key_codes + (batch * p.kv_heads + kv_head) * keys * subvectors;
        const uint8_t* mask = p.key_mask ? p.key_mask + batch * keys : nullptr;
        std::fill(valid, valid + stride, 0);
        std::fill(planes, planes + stride * subvectors, NEVER_EQUAL);
        for (int64_t j = 0; j < keys; j++) {
            if (mask && !mask[j]) continue;
            valid[j] = 1;
            for (int64_t m = 0; m < subvectors; m++) planes[m * stride + j] = codes[j * subvectors + m];
        }
    }

    // Fill scores[begin, end), whole words.
    void score(const uint8_t* code, int64_t begin, int64_t end, uint8_t* scores) const {
        for (int64_t j = begin; j < end; j += AT_ONCE) {
            bytes total[AT_ONCE / VECTOR_BYTES];
            std::memcpy(total, valid + j, AT_ONCE);
            for (int64_t m = 0; m < subvectors; m++) {
                const bytes wanted = splat_byte(code[m]);
                const uint8_t* plane = planes + m * stride + j;
                for (bytes& some : total) {
                    some = add_where(some, load_bytes(plane), wanted);
                    plane += VECTOR_BYTES;
                }
            }
            std::memcpy(scores + j, total, AT_ONCE);
        }
    }

    static const uint8_t* of(const Problem& p, int64_t batch, int64_t head, int64_t t, const float*) {
        return p.query_codes + ((batch * p.heads + head) * p.queries + t) * p.subvectors;
    }
    double expected() const { return 1; }
    double spread() const { return 0; }
};

// In each 16 bytes, the entries of a table of 16 that the codes name.
INLINE bytes look_up(bytes table, bytes codes) {
#if defined(__AVX512BW__)
    return reinterpret_cast<bytes>(_mm512_shuffle_epi8(reinterpret_cast<__m512i>(table), reinterpret_cast<__m512i>(codes)));
#elif defined(__AVX2__) && VECTOR_BYTES == 32
    return reinterpret_cast<bytes>(_mm256_shuffle_epi8(reinterpret_cast<__m256i>(table), reinterpret_cast<__m256i>(codes)));
#elif defined(__SSSE3__) && VECTOR_BYTES == 16
    return reinterpret_cast<bytes>(_mm_shuffle_epi8(reinterpret_cast<__m128i>(table), reinterpret_cast<__m128i>(codes)));
#elif defined(__aarch64__)
    return reinterpret_cast<bytes>(vqtbl1q_u8(reinterpret_cast<uint8x16_t>(table), reinterpret_cast<uint8x16_t>(codes)));
#else
    bytes result = {};
    for (int i = 0; i < VECTOR_BYTES; i++) result[i] = table[codes[i]];
    return result;
#endif
}

// The largest of the lanes of `count` vectors, times `sign`.
template <int COUNT>
INLINE float largest_lane(const vec* vectors, float sign) {
    vec largest = vectors[0] * sign;
    for (int i = 1; i < COUNT; i++) largest = select(vectors[i] * sign > largest, vectors[i] * sign, largest);
    typedef float vec4 __attribute__((vector_size(16)));
    vec4 parts[VECTOR_BYTES / 16];
    std::memcpy(parts, &largest, sizeof largest);
    for (int half = VECTOR_BYTES / 32; half > 0; half /= 2)
        for (int i = 0; i < half; i++) parts[i] = parts[i] > parts[i + half] ? parts[i] : parts[i + half];
    return std::max(std::max(parts[0][0], parts[0][1]), std::max(parts[0][2], parts[0][3]));
}

// How codes lie in memory, so that their entries' sums come out in the order of the keys.
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
// A shuffle finds entries of four tables at once: side by side are the codes of four sub-vectors of a key, and one
// instruction adds up four bytes. A key's place is such that packing two vectors of 32-bit sums puts them in order.
struct Lookup {
    static constexpr int64_t TOGETHER = 4, CHUNK = 32, CHUNKS = 2;  // sub-vectors, keys that have their order, chunks at once

    static int64_t place(int64_t key) { return key % 8 / 4 * 16 + key / 8 * 4 + key % 4; }

    static void sum(const uint8_t* codes, int64_t stride, const uint8_t* tables, int64_t groups, uint16_t* to) {
        __m512i totals[2 * CHUNKS] = {};
        const __m512i ones = _mm512_set1_epi8(1);
        for (int64_t g = 0; g < groups; g++, codes += stride, tables += TOGETHER * ENTRIES) {
            const __m512i table = _mm512_loadu_si512(tables);
            for (int i = 0; i < 2 * CHUNKS; i++)
                totals[i] = _mm512_dpbusd_epi32(
                    totals[i], _mm512_permutexvar_epi8(_mm512_loadu_si512(codes + i * VECTOR_BYTES), table), ones);
        }
        for (int i = 0; i < CHUNKS; i++)
            _mm512_storeu_si512(to + i * CHUNK, _mm512_packus_epi32(totals[2 * i], totals[2 * i + 1]));
    }
};
#else
// Entries are added as words of two of them, and the upper ones once more by themselves: 256 of each fit.
struct Lookup {
    static constexpr int64_t TOGETHER = 1, CHUNK = VECTOR_BYTES, CHUNKS = 4;

    static int64_t place(int64_t key) { return key % (CHUNK / 2) * 2 + key / (CHUNK / 2); }

    static void sum(const uint8_t* codes, int64_t stride, const uint8_t* tables, int64_t groups, uint16_t* to) {
        words both[CHUNKS] = {}, upper[CHUNKS] = {};
        for (int64_t g = 0; g < groups; g++, codes += stride, tables += ENTRIES) {
            uint8_t repeated[VECTOR_BYTES];
            for (int i = 0; i < VECTOR_BYTES; i += ENTRIES) std::memcpy(repeated + i, tables, ENTRIES);
            const bytes table = load_bytes(repeated);
            for (int i = 0; i < CHUNKS; i++) {
                const words entries = reinterpret_cast<words>(look_up(table, load_bytes(codes + i * CHUNK)));
                both[i] += entries;
                upper[i] += entries >> 8;
            }
        }
        for (int i = 0; i < CHUNKS; i++) {
            both[i] -= upper[i] << 8;
            std::memcpy(to + i * CHUNK, &both[i], VECTOR_BYTES);
            std::memcpy(to + i * CHUNK + CHUNK / 2, &upper[i], VECTOR_BYTES);
        }
    }
};
#endif

// The sum, over sub-vectors, of the query's products with the codewords of a key, in eight bits; see `query_tables` in
// similarity.py.
struct Products {
    using Score = uint16_t;
    static constexpr int64_t AT_ONCE = Lookup::CHUNK * Lookup::CHUNKS;

    int64_t keys, stride, subvectors, groups, codewords, width;
    uint8_t *codes, *tables;
    uint16_t* valid;   // 1, or 0 of a masked key
    float *books, *shares, *products;  // codewords side by side, (M, W, 16); how many of the keys have a code; (M, 16)
    double mean = 0, deviation = 0;    // of the last query's scores, about

    Products(const Problem& p, Arena& arena)
        : keys(p.keys), stride(round_up(p.keys, WORD) + AT_ONCE), subvectors(p.subvectors),
          groups((subvectors + Lookup::TOGETHER - 1) / Lookup::TOGETHER), codewords(p.codewords), width(p.width) {
        codes = arena.take<uint8_t>(stride * groups * Lookup::TOGETHER);
        tables = arena.take<uint8_t>(groups * Lookup::TOGETHER * ENTRIES);
        valid = arena.take<uint16_t>(stride);
        books = arena.take<float>(subvectors * width * ENTRIES);
        shares = arena.take<float>(subvectors * ENTRIES);
        products = arena.take<float>(subvectors * ENTRIES);
    }

    void read(const Problem& p, int64_t batch, int64_t kv_head) {
        const uint8_t* from = p.key_codes + (batch * p.kv_heads + kv_head) * keys * subvectors;
        const uint8_t* mask = p.key_mask ? p.key_mask + batch * keys : nullptr;
        const float* words = p.codebooks + kv_head * subvectors * codewords * width;
        std::fill(codes, codes + stride * groups * Lookup::TOGETHER, 0);
        std::fill(tables, tables + groups * Lookup::TOGETHER * ENTRIES, 0);
        std::fill(valid, valid + stride, 0);
        std::fill(shares, shares + subvectors * ENTRIES, 0.0f);
        for (int64_t j = 0; j < keys; j++) {
            valid[j] = !mask || mask[j];
            const int64_t at = (j / Lookup::CHUNK * Lookup::CHUNK + Lookup::place(j % Lookup::CHUNK)) * Lookup::TOGETHER;
            for (int64_t m = 0; m < subvectors; m++) {
                const int64_t together = m % Lookup::TOGETHER, code = from[j * subvectors + m];
                codes[m / Lookup::TOGETHER * Lookup::TOGETHER * stride + at + together] =
                    static_cast<uint8_t>(together * ENTRIES + code);
                shares[m * ENTRIES + code] += 1.0f / static_cast<float>(keys);
            }
        }
        for (int64_t i = 0; i < subvectors * width; i++)  // codewords that there are not: the last once more
            for (int64_t c = 0; c < ENTRIES; c++)
                books[i * ENTRIES + c] =
                    words[(i / width * codewords + std::min(c, codewords - 1)) * width + i % width];
    }

    void make_tables(const float* query) {
        float largest = 0;
        for (int64_t m = 0; m < subvectors; m++) {
            vec totals[ENTRIES / LANES] = {};
            for (int64_t w = m * width; w < (m + 1) * width; w++)
                for (int i = 0; i < ENTRIES / LANES; i++) totals[i] += query[w] * load(books + w * ENTRIES + i * LANES);
            float* row = products + m * ENTRIES;
            std::memcpy(row, totals, sizeof totals);
            const float least = -largest_lane<ENTRIES / LANES>(totals, -1.0f);
            largest = std::max(largest, largest_lane<ENTRIES / LANES>(totals, 1.0f) - least);
            for (int64_t c = 0; c < ENTRIES; c++) row[c] -= least;
        }
        const float scale = largest > 0 ? 255.0f / largest : 0.0f;
        float total = 0, variance = 0;
        for (int64_t m = 0; m < subvectors; m++) {
            float* row = products + m * ENTRIES;
            for (int64_t c = 0; c < ENTRIES; c++) row[c] = std::nearbyint(row[c] * scale);  // halves to even
            for (int64_t c = 0; c < ENTRIES; c++)
                tables[m * ENTRIES + c] = static_cast<uint8_t>(static_cast<int32_t>(row[c]));
            vec firsts = {}, seconds = {};
            for (int64_t c = 0; c < ENTRIES; c += LANES) {
                const vec entries = load(row + c), weighted = entries * load(shares + m * ENTRIES + c);
                firsts += weighted;
                seconds += weighted * entries;
            }
            const float first = ::sum(firsts), second = ::sum(seconds);
            total += first;
            variance += second - first * first;
        }
        const bool is_finite = std::isfinite(total) && std::isfinite(variance);
        mean = is_finite ? total + 1 : 1, deviation = is_finite ? std::sqrt(std::max(variance, 0.0f)) : 0;
    }

    void score(const float* query, int64_t begin, int64_t end, uint16_t* scores) {
        make_tables(query);
        for (int64_t j = begin; j < end; j += AT_ONCE) {
            Lookup::sum(codes + j * Lookup::TOGETHER, stride * Lookup::TOGETHER, tables, groups, scores + j);
            for (int64_t i = j; i < j + AT_ONCE; i++) scores[i] = valid[i] ? scores[i] + 1 : 0;
        }
    }

    static const float* of(const Problem&, int64_t, int64_t, int64_t, const float* query) { return query; }
    double expected() const { return mean; }
    double spread() const { return deviation; }
};
