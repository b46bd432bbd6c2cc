// Dropout that draws its mask anew in backward instead of storing it, by itself and after the softmax of attention.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace {

typedef uint32_t uvec __attribute__((vector_size(VECTOR_BYTES)));

// What is dropped: a hash of the seed and of an element's number, so that it depends on neither threads nor order.
class Noise {
  public:
    Noise(uint64_t seed, double probability)
        : seed(seed), threshold(static_cast<uint32_t>(std::min(probability * 4294967296.0, 4294967295.0))),
          scale(static_cast<float>(1 / (1 - probability))) {
        for (int i = 0; i < LANES; i++) lanes[i] = i;
    }

    // `values` are the elements from number `at` on.
    vec drop(vec values, int64_t at) const {
        const uint64_t key = mix(seed + static_cast<uint64_t>(at >> 32));
        uvec x = (lanes + static_cast<uint32_t>(at)) * 0x9e3779b1u + static_cast<uint32_t>(key);
        x = (x ^ (x >> 16)) * 0x7feb352du;
        x = (x ^ (x >> 15) ^ static_cast<uint32_t>(key >> 32)) * 0x846ca68bu;
        x ^= x >> 16;
        return select(reinterpret_cast<ivec>(x >= threshold), values * scale, vec{});
    }

  private:
    static uint64_t mix(uint64_t x) {  // SplitMix64
        x += 0x9e3779b97f4a7c15u;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
        return x ^ (x >> 31);
    }

    const uint64_t seed;
    const uint32_t threshold;
    const float scale;
    uvec lanes;
};

// Rows of float32 or bfloat16.
void read(const void* from, bool is_bfloat16, int64_t at, int64_t size, float* to) {
    if (is_bfloat16)
        for (int64_t i = 0; i < size; i++) to[i] = from_bfloat(static_cast<const uint16_t*>(from)[at + i]);
    else std::memcpy(to, static_cast<const float*>(from) + at, size * sizeof(float));
}
void write(const float* from, bool is_bfloat16, int64_t at, int64_t size, void* to) {
    if (is_bfloat16)
        for (int64_t i = 0; i < size; i++) static_cast<uint16_t*>(to)[at + i] = to_bfloat(from[i]);
    else std::memcpy(static_cast<float*>(to) + at, from, size * sizeof(float));
}

// The arguments; `cpu.py` mirrors this struct and the next. All tensors are contiguous.
struct Dropout {
    int64_t size, threads, is_bfloat16;
    uint64_t seed;
    double probability;
    const void* from;
    void* to;
};

constexpr int64_t PIECE = 4096;

void drop_piece(const Dropout& d, const Noise& noise, int64_t first) {
    alignas(64) float values[PIECE];
    const int64_t size = std::min(PIECE, d.size - first);
    read(d.from, d.is_bfloat16, first, size, values);
    for (int64_t i = 0; i < size; i += LANES) store(values + i, noise.drop(load(values + i), first + i));
    write(values, d.is_bfloat16, first, size, d.to);
}

// Attention's scores become probabilities.
struct Attention {
    int64_t batch, heads, queries, keys, threads, is_bfloat16;
    int64_t is_causal, mask_kind;  // 0 none, 1 boolean, true where a key may be seen, 2 float32, which is added
    int64_t mask_batch, mask_head, mask_query;  // strides; keys lie side by side
    uint64_t seed;
    double probability, scale;
    void* weights;       // (B, H, Q, K): products of queries and keys; softmax from forward on
    void* dropped;       // the same after dropout, written by both passes
    void* grad_dropped;  // the gradient of `dropped`, in backward, which becomes that of the products
    const void* mask;
};

class Rows {
  public:
    explicit Rows(const Attention& a)
        : a(a), noise(a.seed, a.probability), room(round_up(a.keys, LANES)), weights(room), dropped(room), grad(room) {}

    void forward(int64_t row) {
        const int64_t at = row * a.keys;
        read(a.weights, a.is_bfloat16, at, a.keys, weights.data());
        mask(row);
        softmax();
        for (int64_t i = 0; i < a.keys; i += LANES) put(dropped, i, noise.drop(get(weights, i), at + i));
        write(weights.data(), a.is_bfloat16, at, a.keys, a.weights);
        write(dropped.data(), a.is_bfloat16, at, a.keys, a.dropped);
    }

    // With d the gradient of a probability: the score's is probability (d - sum probability d).
    void backward(int64_t row) {
        const int64_t at = row * a.keys;
        read(a.weights, a.is_bfloat16, at, a.keys, weights.data());
        read(a.grad_dropped, a.is_bfloat16, at, a.keys, grad.data());
        std::fill(weights.begin() + a.keys, weights.end(), 0.0f);
        std::fill(grad.begin() + a.keys, grad.end(), 0.0f);
        vec total = {};
        for (int64_t i = 0; i < a.keys; i += LANES) {
            put(grad, i, noise.drop(get(grad, i), at + i));
            total += get(weights, i) * get(grad, i);
            put(dropped, i, noise.drop(get(weights, i), at + i));
        }
        const float mean = sum(total), scale = static_cast<float>(a.scale);
        for (int64_t i = 0; i < a.keys; i += LANES) put(grad, i, get(weights, i) * (get(grad, i) - mean) * scale);
        write(dropped.data(), a.is_bfloat16, at, a.keys, a.dropped);
        write(grad.data(), a.is_bfloat16, at, a.keys, a.grad_dropped);
    }

  private:
    static vec get(const std::vector<float>& from, int64_t i) { return load(from.data() + i); }
    static void put(std::vector<float>& to, int64_t i, vec value) { store(to.data() + i, value); }

    void mask(int64_t row) {
        const float scale = static_cast<float>(a.scale), hidden = -INFINITY;
        for (float& weight : weights) weight *= scale;
        const int64_t query = row % a.queries, head = row / a.queries % a.heads, item = row / a.queries / a.heads;
        const int64_t at = item * a.mask_batch + head * a.mask_head + query * a.mask_query;
        if (a.mask_kind == 1) {
            const bool* seen = static_cast<const bool*>(a.mask) + at;
            for (int64_t i = 0; i < a.keys; i++) weights[i] = seen[i] ? weights[i] : hidden;
        } else if (a.mask_kind == 2) {
            const float* added = static_cast<const float*>(a.mask) + at;
            for (int64_t i = 0; i < a.keys; i++) weights[i] += added[i];
        }
        std::fill(weights.begin() + (a.is_causal ? std::min(query + 1, a.keys) : a.keys), weights.end(), hidden);
    }

    // A row in which nothing may be seen becomes zero.
    void softmax() {
        vec most = splat(-INFINITY);
        for (int64_t i = 0; i < a.keys; i += LANES) {
            const vec value = get(weights, i);
            most = select(value > most, value, most);
        }
        float largest = most[0];
        for (int i = 1; i < LANES; i++) largest = std::max(largest, most[i]);
        if (largest == -INFINITY) largest = 0;  // e^-inf is 0
        vec total = {};
        for (int64_t i = 0; i < a.keys; i += LANES) {
            put(weights, i, exp(get(weights, i) - largest));
            total += get(weights, i);
        }
        const float all = sum(total), scale = all == 0 ? 0 : 1 / all;
        for (int64_t i = 0; i < a.keys; i += LANES) put(weights, i, get(weights, i) * scale);
    }

    const Attention& a;
    const Noise noise;
    const int64_t room;
    std::vector<float> weights, dropped, grad;
};

template <class Use>
void each_row(const Attention& a, Parallel parallel, const Use& use) {
    const int64_t rows = a.batch * a.heads * a.queries, step = 32;
    run_threads(parallel, std::min(a.threads, (rows + step - 1) / step), [&](std::atomic<int64_t>& next, int64_t) {
        Rows of_thread(a);
        for (int64_t begin; (begin = next.fetch_add(step)) < rows;)
            for (int64_t row = begin; row < std::min(begin + step, rows); row++) use(of_thread, row);
    });
}

}  // namespace

extern "C" {
void dropout(const Dropout* arguments, Parallel parallel) {
    const Dropout& d = *arguments;
    const Noise noise(d.seed, d.probability);
    const int64_t pieces = (d.size + PIECE - 1) / PIECE;
    run_threads(parallel, std::min(d.threads, pieces), [&](std::atomic<int64_t>& next, int64_t) {
        for (int64_t piece; (piece = next++) < pieces;) drop_piece(d, noise, piece * PIECE);
    });
}

void attention_forward(const Attention* a, Parallel parallel) {
    each_row(*a, parallel, [](Rows& rows, int64_t row) { rows.forward(row); });
}

void attention_backward(const Attention* a, Parallel parallel) {
    each_row(*a, parallel, [](Rows& rows, int64_t row) { rows.backward(row); });
}
}
