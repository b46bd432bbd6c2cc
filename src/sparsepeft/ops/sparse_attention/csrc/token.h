// Attention where every query keeps keys of its own. A tile of keys stays in the cache while a block of queries reads
// what it has selected there; the indices of a query ascend, so it walks through them tile by tile, 16 at a time.
#pragma once

#include "selection.h"

constexpr int64_t QUERIES = 64;       // rows of a block
constexpr int64_t TILE_BYTES = 1 << 18;  // of the rows of keys (and what goes with them) that should stay in the cache

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, ivec{__VA_ARGS__})
#endif

// Sum each of 16 vectors; the result's lane j is the sum of parts[j].
INLINE vec sum_each(const vec* parts) {
    vec quads[4];
    for (int i = 0; i < 4; i++) {
        vec pairs[2];
        for (int j = 0; j < 2; j++) {
            const vec a = parts[4 * i + 2 * j], b = parts[4 * i + 2 * j + 1];
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
}

// Products of one row, held in registers, with the 16 rows named by `index`.
template <int NV>
INLINE vec products(const vec* row, const float* rows, const int32_t* index) {
    vec parts[LANES];
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++) {
        const vec* other = reinterpret_cast<const vec*>(rows) + static_cast<int64_t>(index[j]) * NV;
        parts[j] = row[0] * other[0];
#pragma GCC unroll 16
        for (int v = 1; v < NV; v++) parts[j] += row[v] * other[v];
    }
    return sum_each(parts);
}

template <int NV>
struct TokenScratch {
    static constexpr int64_t WIDTH = NV * LANES;
    Selector selector;
    int64_t list_size;
    float *key, *value, *query, *result, *scores, *grad_output, *grad_key, *grad_value;
    int32_t *kept, *count, *next;
    float* delta;

    TokenScratch(const Problem& p, Arena& arena, bool backward)
        : selector(p, arena), list_size(round_up(std::min(p.top_l, p.keys), LANES)) {
        key = arena.take<float>(p.keys * WIDTH);
        value = arena.take<float>(p.keys * WIDTH);
        query = arena.take<float>(QUERIES * WIDTH);
        result = arena.take<float>(QUERIES * WIDTH);  // the output, or the query's gradient
        kept = arena.take<int32_t>(QUERIES * list_size);
        count = arena.take<int32_t>(QUERIES);
        next = arena.take<int32_t>(QUERIES);
        delta = arena.take<float>(QUERIES);
        scores = arena.take<float>(backward ? 0 : QUERIES * list_size);
        grad_output = arena.take<float>(backward ? QUERIES * WIDTH : 0);
        grad_key = arena.take<float>(backward ? p.keys * WIDTH : 0);
        grad_value = arena.take<float>(backward ? p.keys * WIDTH : 0);
    }

    void read_group(const Problem& p, int64_t batch, int64_t kv_head) {
        selector.read(p, batch, kv_head);
        read_rows(p.key, p.dtype, batch, kv_head, 0, p.keys, p.head_size, WIDTH, key);
        read_rows(p.value, p.dtype, batch, kv_head, 0, p.keys, p.value_size, WIDTH, value);
    }

    // Read a block of queries and select their keys. Lists are filled up to 16 with the last key, for reading only.
    void read_block(const Problem& p, int64_t batch, int64_t head, int64_t begin, int64_t end) {
        read_rows(p.query, p.dtype, batch, head, begin, end, p.head_size, WIDTH, query);
        std::fill(result, result + QUERIES * WIDTH, 0.0f);
        for (int64_t t = begin, row = 0; t < end; t++, row++) {
            const int64_t at = batch * p.queries + t;
            int32_t* list = kept + row * list_size;
            const int64_t n =
                selector.keep(p.query_codes + ((batch * p.heads + head) * p.queries + t) * p.subvectors,
                              p.positions[at], p.lower[at], p.upper[at], p.top_l, p.keep_self, p.keep_first, list);
            count[row] = static_cast<int32_t>(n);
            if (n) std::fill(list + n, list + round_up(n, LANES), list[n - 1]);
        }
    }

    // Call visit(row, from, to) for what each row keeps in a tile of keys, tile by tile; from and to step by 16.
    template <class Visit>
    void for_each_tile(const Problem& p, int64_t rows, int64_t key_bytes, const Visit& visit) {
        const int64_t tile = std::max<int64_t>(LANES, TILE_BYTES / key_bytes);
        std::fill(next, next + rows, 0);
        for (int64_t tile_end = tile; tile_end < p.keys + tile; tile_end += tile)
            for (int64_t row = 0; row < rows; row++) {
                const int32_t* list = kept + row * list_size;
                int32_t stop = next[row];
                while (stop < count[row] && list[stop] < tile_end) stop += LANES;
                if (stop > next[row]) visit(row, next[row], stop);
                next[row] = stop;
            }
    }

    void forward(const Problem& p, int64_t batch, int64_t head, int64_t begin, int64_t end) {
        read_block(p, batch, head, begin, end);
        for_each_tile(p, end - begin, WIDTH * 4, [&](int64_t row, int64_t from, int64_t to) {
            vec q[NV];
            std::memcpy(q, query + row * WIDTH, sizeof(q));
            const int32_t* list = kept + row * list_size;
            for (int64_t i = from; i < to; i += LANES)
                store(scores + row * list_size + i,
                      finish_scores(products<NV>(q, key, list + i), p.scale, p.softcap));
        });
        for (int64_t row = 0; row < end - begin; row++) delta[row] = softmax(p, batch, head, begin, row);
        for_each_tile(p, end - begin, WIDTH * 4, [&](int64_t row, int64_t from, int64_t to) {
            vec total[2][NV] = {};  // two sums: their additions overlap
            const int32_t* list = kept + row * list_size;
            const float* weights = scores + row * list_size;
            for (int64_t i = from; i < to; i += 2)
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    const vec* other = reinterpret_cast<const vec*>(value) + static_cast<int64_t>(list[i + half]) * NV;
                    const float weight = weights[i + half];
#pragma GCC unroll 16
                    for (int v = 0; v < NV; v++) total[half][v] += weight * other[v];
                }
            vec* output = reinterpret_cast<vec*>(result) + row * NV;
            for (int v = 0; v < NV; v++) output[v] += (total[0][v] + total[1][v]) * delta[row];
        });
        write_rows(p.output, p.dtype, batch, head, begin, end, p.value_size, WIDTH, result);
    }

    // Turn a row's scores into weights that add up to a sum; return 1 / sum.
    float softmax(const Problem& p, int64_t batch, int64_t head, int64_t begin, int64_t row) {
        float* row_scores = scores + row * list_size;
        const int64_t n = count[row], padded = round_up(n, LANES);
        float largest = -std::numeric_limits<float>::infinity();
        for (int64_t i = 0; i < n; i++) largest = std::max(largest, row_scores[i]);
        std::fill(row_scores + n, row_scores + padded, -std::numeric_limits<float>::infinity());
        vec total = {};
        for (int64_t i = 0; i < padded; i += LANES) {
            const vec weights = exp(load(row_scores + i) - largest);
            store(row_scores + i, weights);
            total += weights;
        }
        const float whole = sum(total);
        p.log_sum_exp[(batch * p.heads + head) * p.queries + begin + row] = n ? largest + std::log(whole) : 0.0f;
        return n ? 1.0f / whole : 0.0f;
    }

    // With P the weights and S the scores: dV = P^T dO;  dS = P (dO V^T - delta), delta = sum(dO * O);  dQ = dS K;
    // dK = dS^T Q.
    void backward(const Problem& p, int64_t batch, int64_t head, int64_t begin, int64_t end) {
        const int64_t rows = end - begin;
        read_block(p, batch, head, begin, end);
        read_rows(p.grad_output, p.dtype, batch, head, begin, end, p.value_size, WIDTH, grad_output);
        read_rows(p.output, p.dtype, batch, head, begin, end, p.value_size, WIDTH, result);
        for (int64_t row = 0; row < rows; row++) {
            vec total = {};
            for (int64_t d = row * WIDTH; d < (row + 1) * WIDTH; d += LANES)
                total += load(grad_output + d) * load(result + d);
            delta[row] = sum(total);
        }
        std::fill(result, result + rows * WIDTH, 0.0f);
        const float* log_sum_exp = p.log_sum_exp + (batch * p.heads + head) * p.queries + begin;
        for_each_tile(p, rows, WIDTH * 16, [&](int64_t row, int64_t from, int64_t to) {
            vec q[NV], dy[NV], dq[NV];
            std::memcpy(q, query + row * WIDTH, sizeof(q));
            std::memcpy(dy, grad_output + row * WIDTH, sizeof(dy));
            std::memcpy(dq, result + row * WIDTH, sizeof(dq));
            for (int64_t i = from; i < to; i += LANES) {
                const int32_t* list = kept + row * list_size + i;
                const vec scores = finish_scores(products<NV>(q, key, list), p.scale, p.softcap);
                const vec weights = exp(scores - log_sum_exp[row]);
                const vec slopes = weights * (products<NV>(dy, value, list) - delta[row]) *
                                   score_slope(scores, p.scale, p.softcap);
                const int n = static_cast<int>(std::min<int64_t>(LANES, count[row] - i));
                for (int j = 0; j < n; j++) {
                    const int64_t at = static_cast<int64_t>(list[j]) * NV;
                    const vec* k = reinterpret_cast<const vec*>(key) + at;
                    vec* dk = reinterpret_cast<vec*>(grad_key) + at;
                    vec* dv = reinterpret_cast<vec*>(grad_value) + at;
#pragma GCC unroll 16
                    for (int v = 0; v < NV; v++) {
                        dq[v] += slopes[j] * k[v];
                        dk[v] += slopes[j] * q[v];
                        dv[v] += weights[j] * dy[v];
                    }
                }
            }
            std::memcpy(result + row * WIDTH, dq, sizeof(dq));
        });
        write_rows(p.grad_query, p.dtype, batch, head, begin, end, p.head_size, WIDTH, result);
    }
};

template <int NV>
void run_token(const Problem& p, bool backward) {
    constexpr int64_t WIDTH = TokenScratch<NV>::WIDTH;
    run_threads(p.threads, [&](std::atomic<int64_t>& next, int64_t thread) {
        Arena arena{p.scratch + thread * p.scratch_bytes};
        TokenScratch<NV> scratch(p, arena, backward);
        for (int64_t item; (item = next++) < p.batch * p.kv_heads * p.parts;) {
            const int64_t part = item % p.parts, kv_head = item / p.parts % p.kv_heads, batch = item / p.parts / p.kv_heads;
            const int64_t group = p.heads / p.kv_heads;
            scratch.read_group(p, batch, kv_head);
            if (backward) {
                std::fill(scratch.grad_key, scratch.grad_key + p.keys * WIDTH, 0.0f);
                std::fill(scratch.grad_value, scratch.grad_value + p.keys * WIDTH, 0.0f);
            }
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
                for (int64_t begin = part * QUERIES; begin < p.queries; begin += p.parts * QUERIES) {
                    const int64_t end = std::min(begin + QUERIES, p.queries);
                    if (backward) scratch.backward(p, batch, head, begin, end);
                    else scratch.forward(p, batch, head, begin, end);
                }
            if (backward) {
                write_rows(p.grad_key, p.grad_dtype, batch, kv_head, 0, p.keys, p.head_size, WIDTH, scratch.grad_key,
                           part * p.grad_key_part);
                write_rows(p.grad_value, p.grad_dtype, batch, kv_head, 0, p.keys, p.value_size, WIDTH,
                           scratch.grad_value, part * p.grad_value_part);
            }
        }
    });
}
