// Attention where every query keeps keys of its own. A tile of keys stays in the cache while a block of queries reads
// what it has selected there; the indices of a query ascend, so it walks through them tile by tile, LANES at a time.
#pragma once

#include "selection.h"

constexpr int64_t QUERIES = 64;       // rows of a block
constexpr int64_t TILE_BYTES = 1 << 15;  // of the rows of keys (and what goes with them) that should stay in the cache

// Vectors of a row that are worked on at once, where as many sums, or three times as many operands, stay in registers.
constexpr int SUMS = REGISTERS / 2, OPERANDS = REGISTERS / 4;

// Products of one row with the LANES rows named by `index`. What is loaded of the row serves four of them.
template <int NV>
INLINE vec products(const vec* row, const float* rows, const int32_t* index) {
    vec parts[LANES];
#pragma GCC unroll 4
    for (int j = 0; j < LANES; j += 4) {
        const vec* others[4];
        for (int i = 0; i < 4; i++) others[i] = reinterpret_cast<const vec*>(rows) + static_cast<int64_t>(index[j + i]) * NV;
        vec total[4] = {};
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++)
            for (int i = 0; i < 4; i++) total[i] += row[v] * others[i][v];
        for (int i = 0; i < 4; i++) parts[j + i] = total[i];
    }
    return sum_each(parts);
}

// WIDTH numbers in a row, whole vectors.
template <int64_t WIDTH>
struct TokenScratch {
    static constexpr int NV = WIDTH / LANES;
    AnySelector selector;
    int64_t list_size;
    float *key, *value, *query, *result, *scores, *slopes, *grad_output, *grad_key, *grad_value;
    int32_t *kept, *count, *next;
    float* delta;

    TokenScratch(const Problem& p, Arena& arena, bool backward)
        : selector(p, arena), list_size(round_up(std::min(p.top_l, p.keys), LANES)) {
        key = arena.take<float>(p.keys * WIDTH);
        value = arena.take<float>(p.keys * WIDTH);
        query = arena.take<float>(QUERIES * WIDTH);
        result = arena.take<float>(QUERIES * WIDTH);  // the output, or the query's gradient
        kept = arena.take<int32_t>(QUERIES * list_size + AT_ONCE);
        count = arena.take<int32_t>(QUERIES);
        next = arena.take<int32_t>(QUERIES);
        delta = arena.take<float>(QUERIES);
        scores = arena.take<float>(backward ? list_size : QUERIES * list_size);
        slopes = arena.take<float>(backward ? list_size : 0);
        grad_output = arena.take<float>(backward ? QUERIES * WIDTH : 0);
        grad_key = arena.take<float>(backward ? p.keys * WIDTH : 0);
        grad_value = arena.take<float>(backward ? p.keys * WIDTH : 0);
    }

    void read_group(const Problem& p, int64_t batch, int64_t kv_head) {
        selector.read(p, batch, kv_head);
        read_rows(p.key, p.dtype, batch, kv_head, 0, p.keys, p.head_size, WIDTH, key);
        read_rows(p.value, p.dtype, batch, kv_head, 0, p.keys, p.value_size, WIDTH, value);
    }

    static vec* row_of(float* rows, int64_t row) { return reinterpret_cast<vec*>(rows) + row * NV; }

    // Call visit(chunk, first) for the vectors of a row, `chunk` (a constant) of them at once.
    template <int CHUNK, class Visit>
    static void for_each_chunk(const Visit& visit) {
        constexpr int N = NV < CHUNK ? NV : CHUNK, REST = NV % N;
        for (int v = 0; v + N <= NV; v += N) visit(std::integral_constant<int, N>{}, v);
        if constexpr (REST > 0) visit(std::integral_constant<int, REST>{}, NV - REST);
    }

    // Read a block of queries and select their keys. Lists are filled up to LANES with the last key, for reading only.
    void read_block(const Problem& p, int64_t batch, int64_t head, int64_t begin, int64_t end) {
        read_rows(p.query, p.dtype, batch, head, begin, end, p.head_size, WIDTH, query);
        std::fill(result, result + QUERIES * WIDTH, 0.0f);
        for (int64_t t = begin, row = 0; t < end; t++, row++) {
            int32_t* list = kept + row * list_size;
            const int64_t n = selector.keep(p, batch, head, t, query + row * WIDTH, list);
            count[row] = static_cast<int32_t>(n);
            if (n) std::fill(list + n, list + round_up(n, LANES), list[n - 1]);
        }
    }

    // Call visit(row, from, to) for what each row keeps in a tile of keys, tile by tile; from and to step by LANES.
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
            const vec* q = row_of(query, row);
            const int32_t* list = kept + row * list_size;
            for (int64_t i = from; i < to; i += LANES)
                store(scores + row * list_size + i,
                      finish_scores(products<NV>(q, key, list + i), p.scale, p.softcap));
        });
        for (int64_t row = 0; row < end - begin; row++) delta[row] = softmax(p, batch, head, begin, row);
        for_each_tile(p, end - begin, WIDTH * 4, [&](int64_t row, int64_t from, int64_t to) {
            const int32_t* list = kept + row * list_size;
            const float* weights = scores + row * list_size;
            vec* output = reinterpret_cast<vec*>(result) + row * NV;
            for_each_chunk<SUMS>([&](auto chunk, int v) {
                constexpr int N = decltype(chunk)::value, TURNS = 2 * N <= SUMS ? 2 : 1;  // two sums: additions overlap
                vec total[TURNS][N] = {};
                for (int64_t i = from; i < to; i += TURNS)
                    for (int turn = 0; turn < TURNS; turn++) {
                        const vec* other = row_of(value, list[i + turn]) + v;
                        const float weight = weights[i + turn];
#pragma GCC unroll 16
                        for (int n = 0; n < N; n++) total[turn][n] += weight * other[n];
                    }
                for (int n = 0; n < N; n++) output[v + n] += (total[0][n] + (TURNS == 2 ? total[1][n] : vec{})) * delta[row];
            });
        });
        write_rows(p.output, p.dtype, batch, head, begin, end, p.value_size, WIDTH, result);
    }

    // Turn a row's scores into weights that add up to a sum; return 1 / sum.
    float softmax(const Problem& p, int64_t batch, int64_t head, int64_t begin, int64_t row) {
        float* row_scores = scores + row * list_size;
        const int64_t n = count[row], padded = round_up(n, LANES);
        std::fill(row_scores + n, row_scores + padded, -std::numeric_limits<float>::infinity());
        const float largest = largest_of(row_scores, padded);
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
            const vec *q = row_of(query, row), *dy = row_of(grad_output, row);
            vec* dq = row_of(result, row);
            const int32_t* list = kept + row * list_size;
            for (int64_t i = from; i < to; i += LANES) {
                const vec s = finish_scores(products<NV>(q, key, list + i), p.scale, p.softcap);
                const vec weights = exp(s - log_sum_exp[row]);
                store(scores + i, weights);
                store(slopes + i, weights * (products<NV>(dy, value, list + i) - delta[row]) *
                                      score_slope(s, p.scale, p.softcap));
            }
            const int64_t stop = std::min<int64_t>(to, count[row]);
            for_each_chunk<OPERANDS>([&](auto chunk, int v) {
                constexpr int N = decltype(chunk)::value;
                vec q_part[N], dy_part[N], dq_part[N];
                std::memcpy(q_part, q + v, sizeof q_part);
                std::memcpy(dy_part, dy + v, sizeof dy_part);
                std::memcpy(dq_part, dq + v, sizeof dq_part);
                for (int64_t i = from; i < stop; i++) {
                    const vec* k = row_of(key, list[i]) + v;
                    vec *dk = row_of(grad_key, list[i]) + v, *dv = row_of(grad_value, list[i]) + v;
                    const float slope = slopes[i], weight = scores[i];
#pragma GCC unroll 8
                    for (int n = 0; n < N; n++) {
                        dq_part[n] += slope * k[n];
                        dk[n] += slope * q_part[n];
                        dv[n] += weight * dy_part[n];
                    }
                }
                std::memcpy(dq + v, dq_part, sizeof dq_part);
            });
        });
        write_rows(p.grad_query, p.dtype, batch, head, begin, end, p.head_size, WIDTH, result);
    }
};

template <int64_t WIDTH>
void run_token(const Problem& p, bool backward) {
    KeyGradients gradients(p);
    run_threads(p.parallel, p.threads, [&](std::atomic<int64_t>& next, int64_t thread) {
        Arena arena{p.scratch + thread * p.scratch_bytes};
        TokenScratch<WIDTH> scratch(p, arena, backward);
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
            if (backward)
                gradients.add(batch, kv_head, part, scratch.grad_key, WIDTH, scratch.grad_value, WIDTH);
        }
    });
}
