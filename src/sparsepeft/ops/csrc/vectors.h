// Vectors of floats and bytes, as wide as the target's registers: plain C++17 with the vector extension of GCC and
// Clang. Vectors wider than a register would live in memory, which costs a factor of ten.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __SSE__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else  // NEON, SSE, and what others have
#define VECTOR_BYTES 16
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

constexpr int LANES = VECTOR_BYTES / 4;
typedef float vec __attribute__((vector_size(VECTOR_BYTES)));
typedef float loose_vec __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));  // at any address
typedef int32_t ivec __attribute__((vector_size(VECTOR_BYTES)));

INLINE vec load(const float* p) { return *reinterpret_cast<const loose_vec*>(p); }
INLINE void store(float* p, vec v) { *reinterpret_cast<loose_vec*>(p) = v; }
// Past the caches, to an address that is a multiple of VECTOR_BYTES: for what is written once and read much later. What
// is stored so can be read by others after `finish_streaming`.
#if defined(__AVX512F__)
INLINE void stream(float* p, vec v) { _mm512_stream_ps(p, reinterpret_cast<__m512>(v)); }
#elif defined(__AVX__)
INLINE void stream(float* p, vec v) { _mm256_stream_ps(p, reinterpret_cast<__m256>(v)); }
#elif defined(__SSE__)
INLINE void stream(float* p, vec v) { _mm_stream_ps(p, reinterpret_cast<__m128>(v)); }
#else
INLINE void stream(float* p, vec v) { store(p, v); }
#endif
INLINE void finish_streaming() {
#ifdef __SSE__
    _mm_sfence();
#endif
}
INLINE vec splat(float x) { return vec{} + x; }
INLINE vec select(ivec condition, vec yes, vec no) {
    return reinterpret_cast<vec>((condition & reinterpret_cast<ivec>(yes)) | (~condition & reinterpret_cast<ivec>(no)));
}

// Half onto half, since a chain of additions one after another takes as long as many products.
INLINE float sum(vec v) {
    typedef float vec4 __attribute__((vector_size(16)));
    vec4 parts[VECTOR_BYTES / 16];
    std::memcpy(parts, &v, sizeof v);
    for (int half = VECTOR_BYTES / 32; half > 0; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, ivec{__VA_ARGS__})
#endif

// Sum each of LANES vectors; the result's lane j is the sum of parts[j]. Within groups of four lanes first, where every
// target shuffles fast, then the groups.
INLINE vec sum_each(const vec* parts) {
    vec quads[LANES / 4];
    for (int i = 0; i < LANES / 4; i++) {
        vec pairs[2];
        for (int j = 0; j < 2; j++) {
            const vec a = parts[4 * i + 2 * j], b = parts[4 * i + 2 * j + 1];
#if VECTOR_BYTES == 64
            pairs[j] = SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                       SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
        }
        quads[i] = SHUFFLE(pairs[0], pairs[1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                   SHUFFLE(pairs[0], pairs[1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    const auto fold = [](vec a, vec b) {
        return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    };
    return fold(fold(quads[0], quads[1]), fold(quads[2], quads[3]));
#elif VECTOR_BYTES == 32
            pairs[j] = SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
        }
        quads[i] = SHUFFLE(pairs[0], pairs[1], 0, 1, 8, 9, 4, 5, 12, 13) +
                   SHUFFLE(pairs[0], pairs[1], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    return SHUFFLE(quads[0], quads[1], 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(quads[0], quads[1], 4, 5, 6, 7, 12, 13, 14, 15);
#else
            pairs[j] = SHUFFLE(a, b, 0, 4, 1, 5) + SHUFFLE(a, b, 2, 6, 3, 7);
        }
        quads[i] = SHUFFLE(pairs[0], pairs[1], 0, 1, 4, 5) + SHUFFLE(pairs[0], pairs[1], 2, 3, 6, 7);
    }
    return quads[0];
#endif
}

// e^x to about two units of rounding, 0 below -87; NaN stays NaN.
INLINE vec exp(vec x) {
    const ivec vanishes = x < -87.0f;
    x = select(vanishes, splat(-87.0f), x);
    const vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer part lands in the low bits
    const vec n = shifted - 12582912.0f;
    const vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    vec y = r * 1.9875691e-4f + 1.3981999e-3f;
    y = y * r + 8.3334519e-3f;
    y = y * r + 4.1665795e-2f;
    y = y * r + 1.6666665e-1f;
    y = y * r + 5.0000001e-1f;
    y = y * r * r + r + 1.0f;
    y = reinterpret_cast<vec>(reinterpret_cast<ivec>(y) + (reinterpret_cast<ivec>(shifted) << 23));
    return select(vanishes, vec{}, y);
}

INLINE int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

template <class To, class From>
INLINE To bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}
INLINE float from_bfloat(uint16_t b) { return bits<float>(static_cast<uint32_t>(b) << 16); }
// To the nearest, ties to even; NaN stays NaN.
INLINE uint16_t to_bfloat(float value) {
    const uint32_t x = bits<uint32_t>(value);
    const uint32_t rounded = (x + 0x7fffu + ((x >> 16) & 1)) >> 16, quiet = (x >> 16) | 0x40u;
    return static_cast<uint16_t>((x & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}
