// SPARTAN's memory, read without gradients: only children of kept parents are touched.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "vectors.h"

namespace {

// The arguments; `compiled.py` mirrors this struct. All tensors are contiguous.
struct Memory {
    int64_t tokens, hidden, parents, children, top_k, threads, is_bfloat16;  // the last of x and output
    double temperature;
    const void* x;                                         // (N, D)
    const float *parent_keys, *child_keys, *child_values;  // (P, D), (P, C, D), (P, C, D)
    const float* parent_scores;                            // (N, P) if they are there already, else null
    void* output;                                          // (N, D)
};

// Products of R rows with one vector, total[r] = rows[r] . x.
template <int R>
INLINE void dot_rows(const float* const* rows, const float* x, int64_t size, float* total) {
    vec sums[R] = {};
    int64_t d = 0;
    for (; d + LANES <= size; d += LANES) {
        const vec part = load(x + d);
        for (int r = 0; r < R; r++) sums[r] += load(rows[r] + d) * part;
    }
    for (int r = 0; r < R; r++) {
        float rest = 0;
        for (int64_t i = d; i < size; i++) rest += rows[r][i] * x[i];
        total[r] = sum(sums[r]) + rest;
    }
}

void dot_all(const float* const* rows, int64_t count, const float* x, int64_t size, float* total) {
    int64_t r = 0;
    for (; r + 8 <= count; r += 8) dot_rows<8>(rows + r, x, size, total + r);
    for (; r + 4 <= count; r += 4) dot_rows<4>(rows + r, x, size, total + r);
    for (; r < count; r++) dot_rows<1>(rows + r, x, size, total + r);
}

// x + the rows weighted, into `to`; in pieces that stay in registers.
template <int NV>
INLINE void add_piece(const float* const* rows, const float* weights, int64_t count, const float* x, float* to) {
    vec total[NV];
    for (int v = 0; v < NV; v++) total[v] = load(x + v * LANES);
    for (int64_t r = 0; r < count; r++)
        for (int v = 0; v < NV; v++) total[v] += weights[r] * load(rows[r] + v * LANES);
    for (int v = 0; v < NV; v++) store(to + v * LANES, total[v]);
}

void add_rows(const float** rows, const float* weights, int64_t count, const float* x, int64_t size, float* to) {
    int64_t d = 0;
    const auto step = [&](int64_t width) {
        for (int64_t r = 0; r < count; r++) rows[r] += width;
        d += width;
    };
    for (; d + 12 * LANES <= size; step(12 * LANES)) add_piece<12>(rows, weights, count, x + d, to + d);
    for (; d + LANES <= size; step(LANES)) add_piece<1>(rows, weights, count, x + d, to + d);
    for (int64_t i = 0; d + i < size; i++) {
        float total = x[d + i];
        for (int64_t r = 0; r < count; r++) total += weights[r] * rows[r][i];
        to[d + i] = total;
    }
}

// Turn scores into weights that add up to `whole`.
void softmax(float* scores, int64_t count, float whole) {
    float total = 0;
    const float largest = *std::max_element(scores, scores + count);
    for (int64_t i = 0; i < count; i++) total += scores[i] = std::exp(scores[i] - largest);
    for (int64_t i = 0; i < count; i++) scores[i] *= whole / total;
}

// NaN counts as the largest score.
INLINE bool is_better(float a, float b) { return a > b || (a != a && b == b); }

// The `top_k` best scores and their indices; of equal scores the lowest index.
void keep_best(const float* scores, int64_t count, int64_t top_k, float* best, int64_t* kept) {
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

// bfloat16 is the upper half of a float.
void widen(const uint16_t* from, int64_t size, float* to) {
    for (int64_t i = 0; i < size; i++) {
        const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
        std::memcpy(to + i, &bits, sizeof bits);
    }
}

// To the nearest, ties to even; NaN stays NaN.
void narrow(const float* from, int64_t size, uint16_t* to) {
    for (int64_t i = 0; i < size; i++) {
        uint32_t bits;
        std::memcpy(&bits, from + i, sizeof bits);
        const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        to[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
}

void read(const Memory& m, int64_t begin, int64_t end) {
    const int64_t num_rows = m.top_k * m.children;
    std::vector<const float*> parents(m.parents), rows(num_rows);
    std::vector<float> own_scores(m.parents), gate(m.top_k), weights(num_rows);
    std::vector<int64_t> kept(m.top_k);
    std::vector<float> wide_x(m.is_bfloat16 ? m.hidden : 0), wide_output(wide_x.size());
    for (int64_t p = 0; p < m.parents; p++) parents[p] = m.parent_keys + p * m.hidden;
    const auto point_to = [&](const float* children) {
        for (int64_t r = 0; r < num_rows; r++)
            rows[r] = children + (kept[r / m.children] * m.children + r % m.children) * m.hidden;
    };
    for (int64_t t = begin; t < end; t++) {
        const float* x = m.is_bfloat16 ? wide_x.data() : static_cast<const float*>(m.x) + t * m.hidden;
        float* output = m.is_bfloat16 ? wide_output.data() : static_cast<float*>(m.output) + t * m.hidden;
        if (m.is_bfloat16) widen(static_cast<const uint16_t*>(m.x) + t * m.hidden, m.hidden, wide_x.data());
        const float* scores = m.parent_scores + t * m.parents;
        if (!m.parent_scores) {
            dot_all(parents.data(), m.parents, x, m.hidden, own_scores.data());
            scores = own_scores.data();
        }
        keep_best(scores, m.parents, m.top_k, gate.data(), kept.data());
        softmax(gate.data(), m.top_k, 1.0f);
        point_to(m.child_keys);
        dot_all(rows.data(), num_rows, x, m.hidden, weights.data());
        for (int64_t r = 0; r < num_rows; r++) weights[r] = static_cast<float>(weights[r] / m.temperature);
        for (int64_t k = 0; k < m.top_k; k++) softmax(weights.data() + k * m.children, m.children, gate[k]);
        point_to(m.child_values);
        add_rows(rows.data(), weights.data(), num_rows, x, m.hidden, output);
        if (m.is_bfloat16) narrow(output, m.hidden, static_cast<uint16_t*>(m.output) + t * m.hidden);
    }
}

struct Team {
    const Memory* memory;
    std::atomic<int64_t> next;
};
void work(void* argument) {
    Team& team = *static_cast<Team*>(argument);
    const Memory& m = *team.memory;
    const int64_t step = std::max<int64_t>(1, (m.tokens + 4 * m.threads - 1) / (4 * m.threads));
    for (int64_t begin; (begin = team.next.fetch_add(step)) < m.tokens;)
        read(m, begin, std::min(begin + step, m.tokens));
}
}  // namespace

extern "C" {
// `parallel` is GOMP_parallel of the OpenMP runtime that torch computes with, or null.
typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
void memory_read(const Memory* m, Parallel parallel) {
    Team team{m, {0}};
    if (parallel && m->threads > 1) parallel(work, &team, static_cast<unsigned>(m->threads), 0);
    else work(&team);
}
}
