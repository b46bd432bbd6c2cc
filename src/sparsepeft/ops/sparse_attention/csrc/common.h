// What both granularities share: the exponential, the arguments, conversion of rows, threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "vectors.h"

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

// Scores before the softmax: scaled, and capped at +-softcap by a tanh where there is one.
INLINE vec finish_scores(vec s, float scale, float softcap) {
    s *= scale;
    if (softcap > 0) {
        const vec x = s / softcap;
        const vec magnitude = select(x < 0.0f, -x, x);
        const vec tanh = 2.0f / (exp(-2.0f * magnitude) + 1.0f) - 1.0f;
        s = select(x < 0.0f, -tanh, tanh) * softcap;
    }
    return s;
}
// The derivative of that, from its result.
INLINE vec score_slope(vec s, float scale, float softcap) {
    if (softcap <= 0) return splat(scale);
    const vec x = s / softcap;
    return (1.0f - x * x) * scale;
}

// The arguments; `compiled.py` mirrors these two structs. Strides count elements, the last dimension is contiguous.
struct View {
    char* data;
    int64_t batch, head, token;
};
struct Problem {
    int64_t batch, heads, kv_heads, queries, keys, head_size, value_size, subvectors;
    int64_t top_l, keep_self, keep_first, block_size, list_stride;
    int64_t dtype, grad_dtype, threads, parts, grad_key_part, grad_value_part;
    double scale, softcap;
    View query, key, value, output, grad_output, grad_query, grad_key, grad_value;
    const uint8_t *query_codes, *key_codes, *key_mask;        // (B, H, Tq, M), (B, Hkv, Tk, M), (B, Tk) or null
    const int32_t *positions, *lower, *upper;                 // (B, Tq)
    const int32_t *lists, *counts;                            // (B, H, Iq, list_stride), (B, H, Iq)
    float* log_sum_exp;                                       // (B, H, Tq)
    char* scratch;
    int64_t scratch_bytes;                                    // of each thread
};
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

template <class To, class From>
INLINE To bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}
INLINE float from_half(uint16_t h) {
    const uint32_t magnitude = (h & 0x7fffu) << 13;
    const float value = (h & 0x7c00u) == 0x7c00u ? bits<float>(magnitude | 0x7f800000u) : bits<float>(magnitude) * 0x1p112f;
    return bits<float>(bits<uint32_t>(value) | (h & 0x8000u) << 16);
}
INLINE uint16_t to_half(float value) {
    const uint32_t all = bits<uint32_t>(value), sign = (all >> 16) & 0x8000u;
    uint32_t x = all & 0x7fffffffu;
    if (x > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (x >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (x < 0x38800000u) return static_cast<uint16_t>(sign | (bits<uint32_t>(bits<float>(x) + 0.5f) - 0x3f000000u));
    x += 0xc8000fffu + ((x >> 13) & 1);  // a smaller exponent's bias, and round half to even
    return static_cast<uint16_t>(sign | (x >> 13));
}
INLINE uint16_t to_bfloat(float value) {
    const uint32_t x = bits<uint32_t>(value);
    if ((x & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((x >> 16) | 0x40u);
    return static_cast<uint16_t>((x + 0x7fffu + ((x >> 16) & 1)) >> 16);
}

// Read rows [begin, end) of one head as float32, `width` apart and zero-padded.
INLINE void read_rows(const View& view, int64_t dtype, int64_t batch, int64_t head, int64_t begin, int64_t end,
                      int64_t size, int64_t width, float* to) {
    const int64_t base = batch * view.batch + head * view.head;
    for (int64_t t = begin; t < end; t++, to += width) {
        const int64_t at = base + t * view.token;
        if (dtype == FLOAT32) {
            std::memcpy(to, reinterpret_cast<const float*>(view.data) + at, sizeof(float) * size);
        } else {
            const uint16_t* from = reinterpret_cast<const uint16_t*>(view.data) + at;
            if (dtype == BFLOAT16)
                for (int64_t d = 0; d < size; d++) to[d] = bits<float>(static_cast<uint32_t>(from[d]) << 16);
            else
                for (int64_t d = 0; d < size; d++) to[d] = from_half(from[d]);
        }
        std::fill(to + size, to + width, 0.0f);
    }
}
// Write them back, rounded to the tensor's dtype; `offset` elements further on.
INLINE void write_rows(const View& view, int64_t dtype, int64_t batch, int64_t head, int64_t begin, int64_t end,
                       int64_t size, int64_t width, const float* from, int64_t offset = 0) {
    const int64_t base = batch * view.batch + head * view.head + offset;
    for (int64_t t = begin; t < end; t++, from += width) {
        const int64_t at = base + t * view.token;
        if (dtype == FLOAT32) {
            std::memcpy(reinterpret_cast<float*>(view.data) + at, from, sizeof(float) * size);
        } else {
            uint16_t* to = reinterpret_cast<uint16_t*>(view.data) + at;
            if (dtype == BFLOAT16)
                for (int64_t d = 0; d < size; d++) to[d] = to_bfloat(from[d]);
            else
                for (int64_t d = 0; d < size; d++) to[d] = to_half(from[d]);
        }
    }
}

INLINE int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Hands out a thread's scratch memory. With a null base it only adds up how much is needed.
struct Arena {
    char* base;
    int64_t used = 0;
    template <class T>
    T* take(int64_t count) {
        T* result = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return result;
    }
};

// Run `worker(next, thread)` on every thread; a worker draws its items from `next`. Threads of our own rather than
// OpenMP: not every compiler has it, and a second OpenMP runtime beside torch's spins on the same cores.
template <class Worker>
void run_threads(int64_t threads, const Worker& worker) {
    std::atomic<int64_t> next{0};
    std::vector<std::thread> others;
    for (int64_t thread = 1; thread < threads; thread++) others.emplace_back([&, thread] { worker(next, thread); });
    worker(next, 0);
    for (std::thread& other : others) other.join();
}
