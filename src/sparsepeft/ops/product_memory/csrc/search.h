// The best of all pairs of half-keys.
#pragma once

#include <vector>

#include "vectors.h"

// The arguments; `cpu.py` mirrors this struct.
struct Search {
    int64_t tokens, first_size, second_size, top_k, threads;
    const float *first, *second;  // (N, first_size), (N, second_size): scores of the half-keys
    int64_t* parents;             // (N, K)
};

// NaN counts as the largest score.
INLINE bool is_better(float a, float b) { return a > b || (a != a && b == b); }

struct Best {
    float score;
    int64_t index;
};
INLINE void keep(Best* best, int64_t& held, int64_t most, float score, int64_t index) {
    const auto precedes = [&](const Best& other) {
        return is_better(score, other.score) || (!is_better(other.score, score) && index < other.index);
    };
    if (held == most && !precedes(best[held - 1])) return;
    int64_t at = held == most ? held - 1 : held++;
    for (; at > 0 && precedes(best[at - 1]); at--) best[at] = best[at - 1];
    best[at] = {score, index};
}

// The best `most` scores, the highest first; of equal ones the lowest index.
inline int64_t keep_best(const float* scores, int64_t count, int64_t most, Best* best) {
    int64_t held = 0;
    for (int64_t i = 0; i < count; i++) keep(best, held, most, scores[i], i);
    return held;
}

inline void search(const Search& s, int64_t begin, int64_t end) {
    std::vector<Best> storage(3 * s.top_k);
    Best *first = storage.data(), *second = first + s.top_k, *best = second + s.top_k;
    for (int64_t token = begin; token < end; token++) {
        const int64_t firsts = keep_best(s.first + token * s.first_size, s.first_size, s.top_k, first);
        const int64_t seconds = keep_best(s.second + token * s.second_size, s.second_size, s.top_k, second);
        int64_t held = 0;
        // A pair of ranks a and b comes after a * b others at least, all of those of better or equal ranks.
        for (int64_t a = 0; a < firsts; a++)
            for (int64_t b = 0; b < seconds && (a + 1) * (b + 1) <= s.top_k; b++)
                keep(best, held, s.top_k, first[a].score + second[b].score,
                     first[a].index * s.second_size + second[b].index);
        for (int64_t k = 0; k < s.top_k; k++) s.parents[token * s.top_k + k] = best[k].index;
    }
}
