// What is done with a row of numbers: softmax, finding the best, conversion to bfloat16 and back.
#pragma once

#include <algorithm>

#include "vectors.h"

// Turn scores into weights that add up to one. There is room for whole vectors.
INLINE void softmax(float* scores, int64_t count) {
    float total = 0;
    const float largest = *std::max_element(scores, scores + count);
    for (int64_t i = 0; i < count; i += LANES) store(scores + i, exp(load(scores + i) - largest));
    for (int64_t i = 0; i < count; i++) total += scores[i];
    for (int64_t i = 0; i < count; i++) scores[i] /= total;
}

// NaN counts as the largest score.
INLINE bool is_better(float a, float b) { return a > b || (a != a && b == b); }

// The `top_k` best scores and their indices; of equal scores the lowest index.
INLINE void keep_best(const float* scores, int64_t count, int64_t top_k, float* best, int64_t* kept) {
    int64_t held = 0;
    for (int64_t p = 0; p < count; p++) {
        if (held == top_k && !is_better(scores[p], best[held - 1])) continue;
        int64_t at = held == top_k ? held - 1 : held++;
        for (; at > 0 && is_better(scores[p], best[at - 1]); at--) {
            best[at] = best[at - 1];
            kept[at] = kept[at - 1];
        }
        best[at] = scores[p];
        kept[at] = p;
    }
}

INLINE void widen(const uint16_t* from, int64_t size, float* to) {
    for (int64_t i = 0; i < size; i++) to[i] = from_bfloat(from[i]);
}
INLINE void narrow(const float* from, int64_t size, uint16_t* to) {
    for (int64_t i = 0; i < size; i++) to[i] = to_bfloat(from[i]);
}
