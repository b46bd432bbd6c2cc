// What both granularities share: scores, the arguments, conversion of rows, scratch memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "threads.h"
#include "vectors.h"

// The largest of `count` numbers, whole vectors of them; -infinity of none.
INLINE float largest_of(const float* numbers, int64_t count) {
    vec largest = splat(-std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < count; i += LANES) {
        const vec next = load(numbers + i);
        largest = select(next > largest, next, largest);
    }
    float result = largest[0];
    for (int lane = 1; lane < LANES; lane++) result = std::max(result, largest[lane]);
    return result;
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

// The arguments; `cpu.py` mirrors these two structs. Strides count elements, the last dimension is contiguous.
struct View {
    char* data;
    int64_t batch, head, token;
};
struct Problem {
    int64_t batch, heads, kv_heads, queries, keys, head_size, value_size, subvectors, codewords, width;
    int64_t top_l, keep_self, keep_first, block_size, list_stride;
    int64_t dtype, grad_dtype, threads, parts;
    double scale, softcap;
    View query, key, value, output, grad_output, grad_query, grad_key, grad_value;
    const uint8_t *query_codes, *key_codes, *key_mask;        // (B, H, Tq, M), (B, Hkv, Tk, M), (B, Tk) or null
    const float* codebooks;                                   // (Hkv, M, C, W) if keys are chosen by products, or null
    const int32_t *positions, *lower, *upper;                 // (B, Tq)
    const int32_t *lists, *counts;                            // (B, H, Iq, list_stride), (B, H, Iq)
    float* log_sum_exp;                                       // (B, H, Tq)
    char* scratch;
    int64_t scratch_bytes;                                    // of each thread
    Parallel parallel;
};
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

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
                for (int64_t d = 0; d < size; d++) to[d] = from_bfloat(from[d]);
            else
                for (int64_t d = 0; d < size; d++) to[d] = from_half(from[d]);
        }
        std::fill(to + size, to + width, 0.0f);
    }
}
// Write them back, rounded to the tensor's dtype.
INLINE void write_rows(const View& view, int64_t dtype, int64_t batch, int64_t head, int64_t begin, int64_t end,
                       int64_t size, int64_t width, const float* from) {
    const int64_t base = batch * view.batch + head * view.head;
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

// Gradients of keys and values, of one (batch, kv head) each, where its queries are cut into parts: the first part writes
// what it has summed up, the others add to that, in order, so that rounding does not depend on which thread was faster.
// No part waits for one that nobody has begun, since items are drawn in order too.
class KeyGradients {
  public:
    explicit KeyGradients(const Problem& p) : p(p), turn(p.batch * p.kv_heads) {}

    void add(int64_t batch, int64_t kv_head, int64_t part, const float* key, int64_t key_width, const float* value,
             int64_t value_width) {
        std::atomic<int64_t>& next = turn[batch * p.kv_heads + kv_head];
        while (next.load(std::memory_order_acquire) != part) std::this_thread::yield();
        put(p.grad_key, batch, kv_head, part, p.head_size, key_width, key);
        put(p.grad_value, batch, kv_head, part, p.value_size, value_width, value);
        next.store(part + 1, std::memory_order_release);
    }

  private:
    // Beyond the first part the gradients are float32.
    void put(const View& view, int64_t batch, int64_t head, int64_t part, int64_t size, int64_t width, const float* from) {
        if (part == 0) return write_rows(view, p.grad_dtype, batch, head, 0, p.keys, size, width, from);
        float* to = reinterpret_cast<float*>(view.data) + batch * view.batch + head * view.head;
        for (int64_t t = 0; t < p.keys; t++, to += view.token, from += width)
            for (int64_t d = 0; d < size; d++) to[d] += from[d];
    }

    const Problem& p;
    std::vector<std::atomic<int64_t>> turn;
};
