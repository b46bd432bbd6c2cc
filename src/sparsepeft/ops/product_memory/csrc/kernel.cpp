// A large memory: the children of a token's parents, read and learned.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "rows.h"
#include "search.h"
#include "threads.h"
#include "vectors.h"

namespace {

// The arguments; `cpu.py` mirrors these structs. All tensors are contiguous, numbers of rows are 64 bits wide.
struct Children {
    int64_t tokens, hidden, top_k, children, threads;
    double temperature;
    const float* x;                          // (N, D)
    const int64_t* parents;                  // (N, K)
    const float* gate;                       // (N, K)
    const float *child_keys, *child_values;  // (P, C, D)
    float* attention;                        // (N, K, C): each parent's softmax over its children
    float* output;                           // (N, D)
};
// With a = G . value, u = sum_c attention a and G the output's gradient: of a value gate attention G, of a child's score
// gate attention (a - u) / temperature, of the gate u.
struct Gradients {
    const float* grad_output;  // (N, D)
    float *grad_x, *grad_gate;  // (N, D), (N, K)
    float *of_values, *of_scores;  // (N, K, C): what is above, without G
};
// Pairs of token and parent, sorted by parent.
struct Cells {
    int64_t touched;          // parents
    const int64_t* pairs;     // (N * K): token * K + slot
    const int64_t* ends;      // (touched): of each parent in `pairs`
    const int64_t* rows;      // (touched): of each parent in the two below
    float *grad_keys, *grad_values;  // (rows, C, D)
    int64_t num_rows;
};

// A step of AdamW for some rows of a table.
struct Update {
    int64_t touched, width, threads;
    const int64_t *rows, *slots;      // (touched): of the table, and of its moments
    const float* gradient;            // (touched, width)
    float *table, *first, *second;    // (P, width), (slots, width) twice
    double decay, beta1, beta2, step_size, root, epsilon;
};

// One thread's work on tokens.
class Reader {
  public:
    explicit Reader(const Children& memory)
        : m(memory), count(m.top_k * m.children), keys(2 * count), values(2 * count), weights(round_up(count, LANES)) {}

    void read(int64_t begin, int64_t end) {
        point_to(begin, now());
        for (int64_t token = begin; token < end; token++, swap()) {
            point_to(std::min(token + 1, end - 1), next());
            dot_all(keys.data() + now(), values.data() + now(), count, m.x + token * m.hidden, m.hidden, weights.data());
            attend(token);
            float* to = m.output + token * m.hidden;
            const float* of_rows = weights.data();
            add_rows<1>(values.data() + now(), keys.data() + next(), &of_rows, count, m.x + token * m.hidden, m.hidden,
                        &to);
        }
    }

    void differentiate(const Gradients& g, int64_t begin, int64_t end) {
        point_to(begin, now());
        for (int64_t token = begin; token < end; token++, swap()) {
            point_to(std::min(token + 1, end - 1), next());
            const float* grad = g.grad_output + token * m.hidden;
            dot_all(values.data() + now(), keys.data() + now(), count, grad, m.hidden, weights.data());
            float *of_values = g.of_values + token * count, *of_scores = g.of_scores + token * count;
            const float sharpness = static_cast<float>(1 / m.temperature);
            for (int64_t k = 0; k < m.top_k; k++) {
                const float gate = m.gate[token * m.top_k + k];
                const float *attention = m.attention + token * count + k * m.children, *a = &weights[k * m.children];
                float u = 0;
                for (int64_t c = 0; c < m.children; c++) u += attention[c] * a[c];
                for (int64_t c = 0; c < m.children; c++) {
                    const float weight = gate * attention[c];
                    of_values[k * m.children + c] = weight;
                    of_scores[k * m.children + c] = weight * (a[c] - u) * sharpness;
                }
                g.grad_gate[token * m.top_k + k] = u;
            }
            float* to = g.grad_x + token * m.hidden;
            const float* of_rows = of_scores;
            add_rows<1>(keys.data() + now(), values.data() + next(), &of_rows, count, grad, m.hidden, &to);
        }
    }

  private:
    // Two sets of rows: of the token at work, and of the one after it.
    int64_t now() const { return turn * count; }
    int64_t next() const { return (1 - turn) * count; }
    void swap() { turn = 1 - turn; }

    void point_to(int64_t token, int64_t at) {
        for (int64_t k = 0; k < m.top_k; k++)
            for (int64_t c = 0; c < m.children; c++, at++) {
                const int64_t cell = m.parents[token * m.top_k + k] * m.children + c;
                keys[at] = m.child_keys + cell * m.hidden;
                values[at] = m.child_values + cell * m.hidden;
            }
    }

    // Turn the children's scores into weights: of each parent they add up to its gate.
    void attend(int64_t token) {
        const float sharpness = static_cast<float>(1 / m.temperature);
        for (int64_t i = 0; i < count; i += m.children) {
            const float largest = *std::max_element(&weights[i], &weights[i] + m.children);
            for (int64_t c = 0; c < m.children; c++) weights[i + c] = (weights[i + c] - largest) * sharpness;
        }
        for (int64_t i = 0; i < count; i += LANES) store(&weights[i], exp(load(&weights[i])));
        for (int64_t k = 0; k < m.top_k; k++) {
            float* of_parent = &weights[k * m.children];
            float total = 0;
            for (int64_t c = 0; c < m.children; c++) total += of_parent[c];
            const float gate = m.gate[token * m.top_k + k];
            for (int64_t c = 0; c < m.children; c++) {
                const float attention = of_parent[c] / total;
                if (m.attention) m.attention[token * count + k * m.children + c] = attention;
                of_parent[c] = gate * attention;
            }
        }
    }

    const Children& m;
    const int64_t count;  // K * C
    std::vector<const float*> keys, values;
    std::vector<float> weights;
    int64_t turn = 0;
};

// The gradients of one parent's children: for T of them at once, the vectors of its tokens, weighted.
template <int T>
void add_tokens(const std::vector<const float*>& tokens, const float* weights, int64_t stride, int64_t hidden,
                float* rows, bool past_cache) {
    const float* of_child[T];
    float* to[T];
    for (int t = 0; t < T; t++) {
        of_child[t] = weights + t * stride;
        to[t] = rows + t * hidden;
    }
    add_rows<T>(tokens.data(), nullptr, of_child, tokens.size(), nullptr, hidden, to, past_cache);
}

// Gradients of so many bytes are not in the cache any more when they are used.
constexpr size_t LARGE = 1 << 25;

void add_cells(const Children& m, const Gradients& g, const Cells& cells, int64_t begin, int64_t end) {
    std::vector<const float*> x, grads;
    std::vector<float> of_values, of_scores;  // (C, pairs)
    const bool past_cache = cells.num_rows * m.children * m.hidden * sizeof(float) > LARGE;
    for (int64_t parent = begin; parent < end; parent++) {
        const int64_t first = parent ? cells.ends[parent - 1] : 0, count = cells.ends[parent] - first;
        x.resize(count);
        grads.resize(count);
        of_values.resize(m.children * count);
        of_scores.resize(m.children * count);
        for (int64_t i = 0; i < count; i++) {
            const int64_t pair = cells.pairs[first + i], token = pair / m.top_k;
            x[i] = m.x + token * m.hidden;
            grads[i] = g.grad_output + token * m.hidden;
            for (int64_t c = 0; c < m.children; c++) {
                of_values[c * count + i] = g.of_values[pair * m.children + c];
                of_scores[c * count + i] = g.of_scores[pair * m.children + c];
            }
        }
        const int64_t row = cells.rows[parent] * m.children, width = m.hidden;
        const auto add = [&](auto at_once, int64_t c) {
            constexpr int T = decltype(at_once)::value;
            float *keys = cells.grad_keys + (row + c) * width, *values = cells.grad_values + (row + c) * width;
            add_tokens<T>(x, &of_scores[c * count], count, width, keys, past_cache);
            add_tokens<T>(grads, &of_values[c * count], count, width, values, past_cache);
        };
        int64_t c = 0;
        for (; c + 4 <= m.children; c += 4) add(std::integral_constant<int, 4>(), c);
        for (; c < m.children; c++) add(std::integral_constant<int, 1>(), c);
    }
    finish_streaming();
}

// Fresh memory comes in pages of 4 KB, each of which costs as much as writing it; in large ones where Linux has them.
void ask_for_large_pages(float* begin, int64_t size) {
#ifdef __linux__
    constexpr uintptr_t PAGE = 1 << 21;
    const uintptr_t address = reinterpret_cast<uintptr_t>(begin), end = address + size * sizeof(float);
    const uintptr_t from = (address + PAGE - 1) / PAGE * PAGE, to = end / PAGE * PAGE;
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

void update_row(const Update& u, const float* __restrict gradient, float* __restrict table, float* __restrict first,
                float* __restrict second) {
    const float decay = u.decay, keep1 = u.beta1, add1 = 1 - u.beta1, keep2 = u.beta2, add2 = 1 - u.beta2;
    const float step_size = u.step_size, scale = 1 / u.root, epsilon = u.epsilon;
    for (int64_t d = 0; d < u.width; d++) {
        first[d] = keep1 * first[d] + add1 * gradient[d];
        second[d] = keep2 * second[d] + add2 * gradient[d] * gradient[d];
        table[d] = decay * table[d] - step_size * first[d] / (std::sqrt(second[d]) * scale + epsilon);
    }
}

// `work(begin, end)` on threads that take a part of the items at a time.
template <class Work>
void in_parts(Parallel parallel, int64_t items, int64_t threads, const Work& work) {
    const int64_t step = std::max<int64_t>(1, (items + 8 * threads - 1) / (8 * threads));
    run_threads(parallel, std::min(threads, items), [&](std::atomic<int64_t>& next, int64_t) {
        for (int64_t begin; (begin = next.fetch_add(step)) < items;) work(begin, std::min(begin + step, items));
    });
}

}  // namespace

extern "C" {
void product_memory_search(const Search* s, Parallel parallel) {
    in_parts(parallel, s->tokens, s->threads, [&](int64_t begin, int64_t end) { search(*s, begin, end); });
}

void product_memory_read(const Children* m, Parallel parallel) {
    in_parts(parallel, m->tokens, m->threads, [&](int64_t begin, int64_t end) { Reader(*m).read(begin, end); });
}

// Of the hidden states and the gate, and what `product_memory_cells` needs.
void product_memory_backward(const Children* m, const Gradients* g, Parallel parallel) {
    in_parts(parallel, m->tokens, m->threads,
             [&](int64_t begin, int64_t end) { Reader(*m).differentiate(*g, begin, end); });
}

void product_memory_update(const Update* u, Parallel parallel) {
    in_parts(parallel, u->touched, u->threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const int64_t slot = u->slots[i] * u->width;
            update_row(*u, u->gradient + i * u->width, u->table + u->rows[i] * u->width, u->first + slot,
                       u->second + slot);
        }
    });
}

void product_memory_cells(const Children* m, const Gradients* g, const Cells* cells, Parallel parallel) {
    const int64_t size = cells->num_rows * m->children * m->hidden;
    ask_for_large_pages(cells->grad_keys, size);
    ask_for_large_pages(cells->grad_values, size);
    in_parts(parallel, cells->touched, m->threads,
             [&](int64_t begin, int64_t end) { add_cells(*m, *g, *cells, begin, end); });
}
}
