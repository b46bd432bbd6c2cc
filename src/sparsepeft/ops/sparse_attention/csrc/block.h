// Attention where a block of queries keeps blocks of keys: small dense products that stay in the cache.
#pragma once

#include "common.h"

// c += a b for R rows and NV vectors of columns; a's element (r, i) stands at a[r * a_row + i * a_column].
template <int R, int NV>
INLINE void product_tile(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                         int64_t c_row, int64_t inner) {
    vec total[R][NV];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < NV; v++) total[r][v] = load(c + r * c_row + v * LANES);
    for (int64_t i = 0; i < inner; i++) {
        vec row[NV];
        for (int v = 0; v < NV; v++) row[v] = load(b + i * b_row + v * LANES);
        for (int r = 0; r < R; r++) {
            const float factor = a[r * a_row + i * a_column];
            for (int v = 0; v < NV; v++) total[r][v] += factor * row[v];
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < NV; v++) store(c + r * c_row + v * LANES, total[r][v]);
}

template <int NV>
void product_columns(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                     int64_t c_row, int64_t rows, int64_t inner) {
    int64_t r = 0;
    for (; r + 6 <= rows; r += 6)
        product_tile<6, NV>(a + r * a_row, a_row, a_column, b, b_row, c + r * c_row, c_row, inner);
    for (; r + 2 <= rows; r += 2)
        product_tile<2, NV>(a + r * a_row, a_row, a_column, b, b_row, c + r * c_row, c_row, inner);
    if (r < rows) product_tile<1, NV>(a + r * a_row, a_row, a_column, b, b_row, c + r * c_row, c_row, inner);
}

// c (rows, width) += a (rows, inner) b (inner, width); width is a multiple of a vector's lanes. Six rows and so many
// vectors of columns, their sums and what is loaded, are what the registers hold.
inline void add_product(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                        int64_t c_row, int64_t rows, int64_t inner, int64_t width) {
    constexpr int NV = REGISTERS / 8;
    int64_t d = 0;
    for (; d + NV * LANES <= width; d += NV * LANES)
        product_columns<NV>(a, a_row, a_column, b + d, b_row, c + d, c_row, rows, inner);
    for (; d < width; d += LANES)
        product_columns<1>(a, a_row, a_column, b + d, b_row, c + d, c_row, rows, inner);
}

struct BlockScratch {
    int64_t size, columns, key_width, value_width, num_blocks;  // `columns`: a block's keys, rounded up to vectors
    float *key, *value, *key_columns, *value_columns, *query, *result, *scores, *grad_output, *grad_scores, *grad_key,
        *grad_value;
    float *log_sum_exp, *delta;
    uint8_t *valid, *full;

    BlockScratch(const Problem& p, Arena& arena, bool backward)
        : size(p.block_size), columns(round_up(size, LANES)), key_width(round_up(p.head_size, LANES)),
          value_width(round_up(p.value_size, LANES)), num_blocks((p.keys + size - 1) / size) {
        const int64_t padded_keys = num_blocks * size;
        key = arena.take<float>(backward ? padded_keys * key_width : 0);
        value = arena.take<float>(padded_keys * value_width);
        key_columns = arena.take<float>(num_blocks * columns * key_width);
        value_columns = arena.take<float>(backward ? num_blocks * columns * value_width : 0);
        query = arena.take<float>(size * key_width);
        result = arena.take<float>(size * std::max(key_width, value_width));  // the output, or the query's gradient
        scores = arena.take<float>(size * columns * (backward ? 1 : p.list_stride));
        grad_output = arena.take<float>(backward ? size * value_width : 0);
        grad_scores = arena.take<float>(backward ? size * columns : 0);
        grad_key = arena.take<float>(backward ? padded_keys * key_width : 0);
        grad_value = arena.take<float>(backward ? padded_keys * value_width : 0);
        log_sum_exp = arena.take<float>(size);
        delta = arena.take<float>(size);
        valid = arena.take<uint8_t>(padded_keys);
        full = arena.take<uint8_t>(num_blocks);
    }

    // Lay the rows of a block out in columns, so that a vector holds one dimension of as many keys as it has lanes.
    void transpose(const float* rows, int64_t width, int64_t count, float* to) const {
        for (int64_t d = 0; d < width; d++) {
            for (int64_t j = 0; j < count; j++) to[d * columns + j] = rows[j * width + d];
            std::fill(to + d * columns + count, to + (d + 1) * columns, 0.0f);
        }
    }

    void read_group(const Problem& p, int64_t batch, int64_t kv_head, bool backward, float* buffer) {
        const uint8_t* mask = p.key_mask ? p.key_mask + batch * p.keys : nullptr;
        for (int64_t block = 0; block < num_blocks; block++) {
            const int64_t begin = block * size, end = std::min(begin + size, p.keys);
            float* rows = backward ? key + begin * key_width : buffer;
            read_rows(p.key, p.dtype, batch, kv_head, begin, end, p.head_size, key_width, rows);
            transpose(rows, key_width, end - begin, key_columns + block * columns * key_width);
            read_rows(p.value, p.dtype, batch, kv_head, begin, end, p.value_size, value_width,
                      value + begin * value_width);
            if (backward)
                transpose(value + begin * value_width, value_width, end - begin,
                          value_columns + block * columns * value_width);
            full[block] = end - begin == columns;
            for (int64_t j = begin; j < end; j++) {
                valid[j] = mask ? mask[j] : 1;
                full[block] &= valid[j];
            }
        }
    }

    // Put `nothing` where a pair of query and key must not meet.
    void mask_scores(const Problem& p, int64_t batch, int64_t begin, int64_t rows, int64_t block, float* to,
                     int64_t stride, float nothing) const {
        const int64_t first = block * size, keys = std::min(size, p.keys - first);
        for (int64_t row = 0; row < rows; row++) {
            const int64_t lower = p.lower[batch * p.queries + begin + row] - first;
            const int64_t upper = p.upper[batch * p.queries + begin + row] - first;
            if (full[block] && lower <= 0 && upper >= keys) continue;
            float* line = to + row * stride;
            for (int64_t j = 0; j < keys; j++)
                if (j < lower || j >= upper || !valid[first + j]) line[j] = nothing;
            std::fill(line + keys, line + columns, nothing);
        }
    }

    void forward(const Problem& p, int64_t batch, int64_t head, int64_t block_row, const int32_t* list, int64_t count) {
        const int64_t begin = block_row * size, rows = std::min(size, p.queries - begin), stride = count * columns;
        read_rows(p.query, p.dtype, batch, head, begin, begin + rows, p.head_size, key_width, query);
        std::fill(scores, scores + rows * stride, 0.0f);
        for (int64_t i = 0; i < count; i++) {
            float* to = scores + i * columns;
            add_product(query, key_width, 1, key_columns + list[i] * columns * key_width, columns, to, stride, rows,
                        key_width, columns);
            for (int64_t row = 0; row < rows; row++)
                for (int64_t j = 0; j < columns; j += LANES)
                    store(to + row * stride + j, finish_scores(load(to + row * stride + j), p.scale, p.softcap));
            mask_scores(p, batch, begin, rows, list[i], to, stride, -std::numeric_limits<float>::infinity());
        }
        for (int64_t row = 0; row < rows; row++) {
            float* line = scores + row * stride;
            const float largest = largest_of(line, stride);
            const bool none = largest == -std::numeric_limits<float>::infinity();
            vec total = {};
            for (int64_t j = 0; j < stride; j += LANES) {
                const vec weights = exp(load(line + j) - (none ? 0.0f : largest));
                store(line + j, weights);
                total += weights;
            }
            const float whole = sum(total);
            p.log_sum_exp[(batch * p.heads + head) * p.queries + begin + row] = none ? 0.0f : largest + std::log(whole);
            delta[row] = none ? 0.0f : 1.0f / whole;
        }
        std::fill(result, result + rows * value_width, 0.0f);
        for (int64_t i = 0; i < count; i++) {
            const int64_t first = list[i] * size;
            add_product(scores + i * columns, stride, 1, value + first * value_width, value_width, result, value_width,
                        rows, std::min(size, p.keys - first), value_width);
        }
        for (int64_t row = 0; row < rows; row++)
            for (int64_t d = row * value_width; d < (row + 1) * value_width; d += LANES)
                store(result + d, load(result + d) * delta[row]);
        write_rows(p.output, p.dtype, batch, head, begin, begin + rows, p.value_size, value_width, result);
    }

    // The equations of the token kernel's backward, as products of blocks.
    void backward(const Problem& p, int64_t batch, int64_t head, int64_t block_row, const int32_t* list, int64_t count) {
        const int64_t begin = block_row * size, rows = std::min(size, p.queries - begin);
        read_rows(p.query, p.dtype, batch, head, begin, begin + rows, p.head_size, key_width, query);
        read_rows(p.grad_output, p.dtype, batch, head, begin, begin + rows, p.value_size, value_width, grad_output);
        read_rows(p.output, p.dtype, batch, head, begin, begin + rows, p.value_size, value_width, result);
        for (int64_t row = 0; row < rows; row++) {
            vec total = {};
            for (int64_t d = row * value_width; d < (row + 1) * value_width; d += LANES)
                total += load(grad_output + d) * load(result + d);
            delta[row] = sum(total);
            log_sum_exp[row] = p.log_sum_exp[(batch * p.heads + head) * p.queries + begin + row];
        }
        std::fill(result, result + rows * key_width, 0.0f);
        for (int64_t i = 0; i < count; i++) {
            const int64_t block = list[i], first = block * size, keys = std::min(size, p.keys - first);
            std::fill(scores, scores + rows * columns, 0.0f);
            std::fill(grad_scores, grad_scores + rows * columns, 0.0f);
            add_product(query, key_width, 1, key_columns + block * columns * key_width, columns, scores, columns, rows,
                        key_width, columns);
            add_product(grad_output, value_width, 1, value_columns + block * columns * value_width, columns,
                        grad_scores, columns, rows, value_width, columns);
            for (int64_t row = 0; row < rows; row++)
                for (int64_t j = row * columns; j < (row + 1) * columns; j += LANES) {
                    const vec s = finish_scores(load(scores + j), p.scale, p.softcap);
                    const vec weights = exp(s - log_sum_exp[row]);
                    store(scores + j, weights);
                    store(grad_scores + j,
                          weights * (load(grad_scores + j) - delta[row]) * score_slope(s, p.scale, p.softcap));
                }
            mask_scores(p, batch, begin, rows, block, scores, columns, 0.0f);
            mask_scores(p, batch, begin, rows, block, grad_scores, columns, 0.0f);
            add_product(grad_scores, columns, 1, key + first * key_width, key_width, result, key_width, rows, keys,
                        key_width);
            add_product(grad_scores, 1, columns, query, key_width, grad_key + first * key_width, key_width, keys, rows,
                        key_width);
            add_product(scores, 1, columns, grad_output, value_width, grad_value + first * value_width, value_width,
                        keys, rows, value_width);
        }
        write_rows(p.grad_query, p.dtype, batch, head, begin, begin + rows, p.head_size, key_width, result);
    }
};

inline void run_block(const Problem& p, bool backward) {
    KeyGradients gradients(p);
    run_threads(p.parallel, p.threads, [&](std::atomic<int64_t>& next, int64_t thread) {
        Arena arena{p.scratch + thread * p.scratch_bytes};
        BlockScratch scratch(p, arena, backward);
        const int64_t block_rows = (p.queries + p.block_size - 1) / p.block_size, group = p.heads / p.kv_heads;
        for (int64_t item; (item = next++) < p.batch * p.kv_heads * p.parts;) {
            const int64_t part = item % p.parts, kv_head = item / p.parts % p.kv_heads, batch = item / p.parts / p.kv_heads;
            scratch.read_group(p, batch, kv_head, backward, scratch.query);
            if (backward) {
                std::fill(scratch.grad_key, scratch.grad_key + p.keys * scratch.key_width, 0.0f);
                std::fill(scratch.grad_value, scratch.grad_value + p.keys * scratch.value_width, 0.0f);
            }
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
                for (int64_t row = part; row < block_rows; row += p.parts) {
                    const int64_t at = (batch * p.heads + head) * block_rows + row;
                    const int32_t* list = p.lists + at * p.list_stride;
                    if (backward) scratch.backward(p, batch, head, row, list, p.counts[at]);
                    else scratch.forward(p, batch, head, row, list, p.counts[at]);
                }
            if (backward)
                gradients.add(batch, kv_head, part, scratch.grad_key, scratch.key_width, scratch.grad_value,
                              scratch.value_width);
        }
    });
}
