// Products of small matrices, added to one that is there: blocks of it stay in registers.
#pragma once

#include "vectors.h"

// c[i][j] += sum_k a[i][k] b[k][j] for R rows and NV vectors of columns. If `CROSSED`, a is given as its transpose.
template <bool CROSSED, int R, int NV>
INLINE void add_block(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t count, float* c,
                      int64_t c_row) {
    vec total[R][NV];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < NV; v++) total[r][v] = load(c + r * c_row + v * LANES);
    for (int64_t k = 0; k < count; k++) {
        vec row[NV];
        for (int v = 0; v < NV; v++) row[v] = load(b + k * b_row + v * LANES);
        for (int r = 0; r < R; r++) {
            const vec factor = splat(CROSSED ? a[k * a_row + r] : a[r * a_row + k]);
            for (int v = 0; v < NV; v++) total[r][v] += factor * row[v];
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < NV; v++) store(c + r * c_row + v * LANES, total[r][v]);
}

template <bool CROSSED, int NV>
void add_columns(int64_t rows, const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t count, float* c,
                 int64_t c_row) {
    const int64_t next = CROSSED ? 1 : a_row;
    int64_t r = 0;
    for (; r + 6 <= rows; r += 6) add_block<CROSSED, 6, NV>(a + r * next, a_row, b, b_row, count, c + r * c_row, c_row);
    for (; r + 4 <= rows; r += 4) add_block<CROSSED, 4, NV>(a + r * next, a_row, b, b_row, count, c + r * c_row, c_row);
    for (; r + 2 <= rows; r += 2) add_block<CROSSED, 2, NV>(a + r * next, a_row, b, b_row, count, c + r * c_row, c_row);
    if (r < rows) add_block<CROSSED, 1, NV>(a + r * next, a_row, b, b_row, count, c + r * c_row, c_row);
}

// The last columns, fewer than NV + 1 vectors.
template <bool CROSSED, int NV>
void add_rest(int64_t rows, int64_t columns, const float* a, int64_t a_row, const float* b, int64_t b_row,
              int64_t count, float* c, int64_t c_row) {
    if constexpr (NV > 0) {
        if (columns == NV * LANES) add_columns<CROSSED, NV>(rows, a, a_row, b, b_row, count, c, c_row);
        else add_rest<CROSSED, NV - 1>(rows, columns, a, a_row, b, b_row, count, c, c_row);
    }
}

// c (rows, columns) += a (rows, count) times b (count, columns), whose rows are a stride apart. `columns` is a multiple
// of LANES. If `CROSSED`, a is given as its transpose, (count, rows).
template <bool CROSSED = false>
void add_product(int64_t rows, int64_t columns, int64_t count, const float* a, int64_t a_row, const float* b,
                 int64_t b_row, float* c, int64_t c_row) {
    constexpr int NV = REGISTERS == 32 ? 4 : 2;
    int64_t j = 0;
    for (; j + NV * LANES <= columns; j += NV * LANES)
        add_columns<CROSSED, NV>(rows, a, a_row, b + j, b_row, count, c + j, c_row);
    add_rest<CROSSED, NV - 1>(rows, columns - j, a, a_row, b + j, b_row, count, c + j, c_row);
}
