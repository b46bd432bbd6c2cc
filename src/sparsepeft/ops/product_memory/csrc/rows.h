// Products with rows that no cache holds, and sums of them: what is needed next is fetched meanwhile.
#pragma once

#include "vectors.h"

// Ask for a line of a row that the second cache should have when it is needed; the first has no room for all rows.
INLINE void fetch(const float* row) { __builtin_prefetch(row, 0, 2); }

// scores[r] = rows[r] . x, meanwhile fetching as much of `ahead`.
template <int R>
INLINE void dot_rows(const float* const* rows, const float* const* ahead, const float* x, int64_t size, float* scores) {
    vec sums[R] = {};
    int64_t d = 0;
    for (; d + LANES <= size; d += LANES) {
        const vec part = load(x + d);
        for (int r = 0; r < R; r++) {
            fetch(ahead[r] + d);
            sums[r] += load(rows[r] + d) * part;
        }
    }
    for (int r = 0; r < R; r++) {
        scores[r] = sum(sums[r]);
        for (int64_t i = d; i < size; i++) scores[r] += rows[r][i] * x[i];
    }
}

inline void dot_all(const float* const* rows, const float* const* ahead, int64_t count, const float* x, int64_t size,
                    float* scores) {
    int64_t r = 0;
    for (; r + 8 <= count; r += 8) dot_rows<8>(rows + r, ahead + r, x, size, scores + r);
    for (; r < count; r++) dot_rows<1>(rows + r, ahead + r, x, size, scores + r);
}

// to[t] = start + rows weighted by weights[t], `NV` vectors of each, which stay in registers. `ahead` is fetched
// meanwhile; `start` and `ahead` may be null.
template <int T, int NV>
INLINE void add_piece(const float* const* rows, const float* const* ahead, const float* const* weights, int64_t count,
                      const float* start, float* const* to, int64_t d, bool past_cache) {
    vec total[T][NV];
    for (int t = 0; t < T; t++)
        for (int v = 0; v < NV; v++) total[t][v] = start ? load(start + d + v * LANES) : vec{};
    for (int64_t r = 0; r < count; r++)
        for (int v = 0; v < NV; v++) {
            if (ahead) fetch(ahead[r] + d + v * LANES);
            const vec row = load(rows[r] + d + v * LANES);
            for (int t = 0; t < T; t++) total[t][v] += weights[t][r] * row;
        }
    for (int t = 0; t < T; t++) {
        const bool can_stream = past_cache && reinterpret_cast<uintptr_t>(to[t] + d) % VECTOR_BYTES == 0;
        for (int v = 0; v < NV; v++) {
            if (can_stream) stream(to[t] + d + v * LANES, total[t][v]);
            else store(to[t] + d + v * LANES, total[t][v]);
        }
    }
}

template <int T>
void add_rows(const float* const* rows, const float* const* ahead, const float* const* weights, int64_t count,
              const float* start, int64_t size, float* const* to, bool past_cache = false) {
    constexpr int NV = T == 1 ? 12 : REGISTERS / T - 2;
    int64_t d = 0;
    for (; d + NV * LANES <= size; d += NV * LANES)
        add_piece<T, NV>(rows, ahead, weights, count, start, to, d, past_cache);
    for (; d + LANES <= size; d += LANES) add_piece<T, 1>(rows, ahead, weights, count, start, to, d, past_cache);
    for (; d < size; d++)
        for (int t = 0; t < T; t++) {
            float total = start ? start[d] : 0;
            for (int64_t r = 0; r < count; r++) total += weights[t][r] * rows[r][d];
            to[t][d] = total;
        }
}
