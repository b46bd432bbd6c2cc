// SPARTAN's memory. Without gradients only children of parents are touched that a token, or one of a few, keeps.
#include <algorithm>
#include <cmath>
#include <vector>

#include "rows.h"
#include "threads.h"
#include "training.h"
#include "vectors.h"

namespace {

// The arguments; `cpu.py` mirrors this struct. All tensors are contiguous.
struct Memory {
    int64_t tokens, hidden, parents, children, top_k, threads;
    int64_t is_bfloat16;  // x and output
    int64_t is_shared;    // tokens that are read at once share what they load
    double temperature;
    const void* x;                                         // (N, D)
    const float *parent_keys, *child_keys, *child_values;  // (P, D), (P, C, D), (P, C, D)
    const float* parent_scores;                            // (N, P) if they are there already, else null
    void* output;                                          // (N, D)
};

constexpr int TOGETHER = REGISTERS == 32 ? 4 : 2;  // tokens read at once

// Products of R rows with T vectors, total[t][r] = rows[r] . x[t]. What is loaded serves R or T of them.
template <int T, int R>
INLINE void dot_rows(const float* const* rows, const float* const* x, int64_t size, float* const* total, int64_t at) {
    vec sums[T][R] = {};
    int64_t d = 0;
    for (; d + LANES <= size; d += LANES) {
        vec part[T];
        for (int t = 0; t < T; t++) part[t] = load(x[t] + d);
        for (int r = 0; r < R; r++) {
            const vec row = load(rows[r] + d);
            for (int t = 0; t < T; t++) sums[t][r] += row * part[t];
        }
    }
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) {
            float rest = 0;
            for (int64_t i = d; i < size; i++) rest += rows[r][i] * x[t][i];
            total[t][at + r] = sum(sums[t][r]) + rest;
        }
}

template <int T>
void dot_all(const float* const* rows, int64_t count, const float* const* x, int64_t size, float* const* total) {
    constexpr int R = T == 1 ? 8 : REGISTERS / T - 2;
    int64_t r = 0;
    for (; r + R <= count; r += R) dot_rows<T, R>(rows + r, x, size, total, r);
    for (; r + 2 <= count; r += 2) dot_rows<T, 2>(rows + r, x, size, total, r);
    for (; r < count; r++) dot_rows<T, 1>(rows + r, x, size, total, r);
}

// to[t] = x[t] + the rows weighted by weights[t], `NV` vectors of each, which stay in registers.
template <int T, int NV>
INLINE void add_piece(const float* const* rows, const float* const* weights, int64_t count, const float* const* x,
                      float* const* to, int64_t d) {
    vec total[T][NV];
    for (int t = 0; t < T; t++)
        for (int v = 0; v < NV; v++) total[t][v] = load(x[t] + d + v * LANES);
    for (int64_t r = 0; r < count; r++)
        for (int v = 0; v < NV; v++) {
            const vec row = load(rows[r] + d + v * LANES);
            for (int t = 0; t < T; t++) total[t][v] += weights[t][r] * row;
        }
    for (int t = 0; t < T; t++)
        for (int v = 0; v < NV; v++) store(to[t] + d + v * LANES, total[t][v]);
}

template <int T>
void add_rows(const float* const* rows, const float* const* weights, int64_t count, const float* const* x,
              int64_t size, float* const* to) {
    constexpr int NV = T == 1 ? 12 : REGISTERS / T - 2;
    int64_t d = 0;
    for (; d + NV * LANES <= size; d += NV * LANES) add_piece<T, NV>(rows, weights, count, x, to, d);
    for (; d + LANES <= size; d += LANES) add_piece<T, 1>(rows, weights, count, x, to, d);
    for (; d < size; d++)
        for (int t = 0; t < T; t++) {
            float total = x[t][d];
            for (int64_t r = 0; r < count; r++) total += weights[t][r] * rows[r][d];
            to[t][d] = total;
        }
}

// Read the memory for T tokens at once, with the children of all parents that one of them keeps.
template <int T>
class Reader {
  public:
    explicit Reader(const Memory& memory)
        : m(memory), parents(m.parents), used(T * m.top_k), rows(used.size() * m.children), kept(used.size()),
          slots(m.parents), gates(T * used.size()), scores_storage(T * m.parents), best_storage(T * round_up(m.top_k, LANES)),
          weights_storage(T * round_up(rows.size(), LANES)), wide_x(m.is_bfloat16 ? T * m.hidden : 0),
          wide_output(wide_x.size()) {
        for (int64_t p = 0; p < m.parents; p++) parents[p] = m.parent_keys + p * m.hidden;
        for (int t = 0; t < T; t++) {
            scores[t] = scores_storage.data() + t * m.parents;
            best[t] = best_storage.data() + t * round_up(m.top_k, LANES);
            weights[t] = weights_storage.data() + t * round_up(rows.size(), LANES);
        }
    }

    void read(int64_t first) {
        for (int t = 0; t < T; t++) take(first + t, t);
        if (!m.parent_scores) dot_all<T>(parents.data(), m.parents, x, m.hidden, scores);
        for (int t = 0; t < T; t++) {
            const float* token_scores = m.parent_scores ? m.parent_scores + (first + t) * m.parents : scores[t];
            keep_best(token_scores, m.parents, m.top_k, best[t], kept.data() + t * m.top_k);
            softmax(best[t], m.top_k);
        }
        const int64_t num_used = list_used(), num_rows = num_used * m.children;
        std::fill(gates.begin(), gates.end(), 0.0f);
        for (int t = 0; t < T; t++)
            for (int64_t i = 0; i < m.top_k; i++) gates[t * num_used + slots[kept[t * m.top_k + i]]] = best[t][i];

        point_to(m.child_keys);
        dot_all<T>(rows.data(), num_rows, x, m.hidden, weights);
        for (int t = 0; t < T; t++) weigh(weights[t], gates.data() + t * num_used);
        point_to(m.child_values);
        add_rows<T>(rows.data(), weights, num_rows, x, m.hidden, output);
        if (m.is_bfloat16)
            for (int t = 0; t < T; t++)
                narrow(output[t], m.hidden, static_cast<uint16_t*>(m.output) + (first + t) * m.hidden);
    }

  private:
    void take(int64_t token, int t) {
        if (m.is_bfloat16) {
            widen(static_cast<const uint16_t*>(m.x) + token * m.hidden, m.hidden, wide_x.data() + t * m.hidden);
            x[t] = wide_x.data() + t * m.hidden;
            output[t] = wide_output.data() + t * m.hidden;
        } else {
            x[t] = static_cast<const float*>(m.x) + token * m.hidden;
            output[t] = static_cast<float*>(m.output) + token * m.hidden;
        }
    }

    // In ascending order, so that a token's sums do not depend on its neighbours.
    int64_t list_used() {
        used.assign(kept.begin(), kept.end());
        if constexpr (T == 1) {
            std::sort(used.begin(), used.end());
        } else {  // few parents
            std::fill(slots.begin(), slots.end(), -1);
            for (int64_t p : kept) slots[p] = 0;
            used.clear();
            for (int64_t p = 0; p < m.parents; p++)
                if (slots[p] == 0) used.push_back(p);
        }
        for (size_t u = 0; u < used.size(); u++) slots[used[u]] = u;
        return used.size();
    }

    void point_to(const float* children) {
        for (size_t u = 0; u < used.size(); u++)
            for (int64_t c = 0; c < m.children; c++)
                rows[u * m.children + c] = children + (used[u] * m.children + c) * m.hidden;
    }

    // Turn the scores of the children of each used parent into weights that add up to its gate. A parent that only
    // another token keeps has a gate of zero.
    void weigh(float* children, const float* gates) {
        const int64_t num_used = used.size(), count = m.children;
        const float sharpness = static_cast<float>(1 / m.temperature);
        for (int64_t u = 0; u < num_used; u++) {
            float* weights = children + u * count;
            const float largest = *std::max_element(weights, weights + count);
            for (int64_t c = 0; c < count; c++) weights[c] = (weights[c] - largest) * sharpness;
        }
        for (int64_t i = 0; i < num_used * count; i += LANES) store(children + i, exp(load(children + i)));
        for (int64_t u = 0; u < num_used; u++) {
            float *weights = children + u * count, total = 0;
            for (int64_t c = 0; c < count; c++) total += weights[c];
            const float scale = gates[u] / total;
            for (int64_t c = 0; c < count; c++) weights[c] = gates[u] == 0 ? 0.0f : weights[c] * scale;
        }
    }

    const Memory& m;
    std::vector<const float*> parents;
    std::vector<int64_t> used;        // parents that a token keeps
    std::vector<const float*> rows;   // keys or values of their children
    std::vector<int64_t> kept;        // (T, K)
    std::vector<int64_t> slots;       // where a parent is in `used`
    std::vector<float> gates;         // (T, used)
    std::vector<float> scores_storage, best_storage, weights_storage, wide_x, wide_output;
    const float* x[T];
    float *scores[T], *best[T], *weights[T], *output[T];
};

template <int T>
void read(const Memory& m, int64_t begin, int64_t end) {
    Reader<T> reader(m);
    for (; begin + T <= end; begin += T) reader.read(begin);
    if constexpr (T > 1) {
        if (begin < end) read<T / 2>(m, begin, end);
    }
}

}  // namespace

extern "C" {
void memory_read(const Memory* memory, Parallel parallel) {
    const Memory& m = *memory;
    const int64_t step = std::max<int64_t>(1, (m.tokens + 4 * m.threads - 1) / (4 * m.threads));
    run_threads(parallel, std::min(m.threads, m.tokens), [&](std::atomic<int64_t>& next, int64_t) {
        for (int64_t begin; (begin = next.fetch_add(step)) < m.tokens;)
            if (m.is_shared) read<TOGETHER>(m, begin, std::min(begin + step, m.tokens));
            else read<1>(m, begin, std::min(begin + step, m.tokens));
    });
}

// The width of `Training::weights`.
int64_t memory_columns(int64_t parents, int64_t children) { return group_size(parents) * (1 + children); }

void memory_forward(const Training* training, Parallel parallel) { train_forward(*training, parallel); }

void memory_backward(const Training* training, Parallel parallel) { train_backward(*training, parallel); }
}
