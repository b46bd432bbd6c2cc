// Product quantization: the nearest codeword of each sub-vector, for as many tokens at once as a vector has lanes.
#pragma once

#include "common.h"

// `cpu.py` mirrors this struct.
struct Encoding {
    int64_t batch, heads, kv_heads, tokens, subvectors, codewords, width, dtype, threads;
    View vectors;
    const float *codebooks, *half_norms;  // (Hkv, M, C, W), (Hkv, M, C)
    uint8_t* codes;                       // (B, H, T, M)
    Parallel parallel;
};

void encode(const Encoding& e) {
    const int64_t size = e.subvectors * e.width, group = e.heads / e.kv_heads;
    run_threads(e.parallel, e.threads, [&](std::atomic<int64_t>& next, int64_t) {
        std::vector<float> rows(size * LANES), columns(size * LANES);
        for (int64_t item; (item = next++) < e.batch * e.heads;) {
            const int64_t batch = item / e.heads, head = item % e.heads;
            for (int64_t begin = 0; begin < e.tokens; begin += LANES) {
                const int64_t count = std::min<int64_t>(LANES, e.tokens - begin);
                read_rows(e.vectors, e.dtype, batch, head, begin, begin + count, size, size, rows.data());
                for (int64_t d = 0; d < size; d++)
                    for (int64_t t = 0; t < count; t++) columns[d * LANES + t] = rows[t * size + d];
                for (int64_t m = 0; m < e.subvectors; m++) {
                    const int64_t book = head / group * e.subvectors + m;
                    vec smallest = splat(std::numeric_limits<float>::infinity());
                    ivec nearest = {};
                    for (int64_t c = 0; c < e.codewords; c++) {
                        const float* word = e.codebooks + (book * e.codewords + c) * e.width;
                        vec distance = splat(e.half_norms[book * e.codewords + c]);
                        for (int64_t w = 0; w < e.width; w++)
                            distance -= word[w] * load(columns.data() + (m * e.width + w) * LANES);
                        const ivec nearer = distance < smallest;
                        smallest = select(nearer, distance, smallest);
                        nearest = (nearer & static_cast<int32_t>(c)) | (~nearer & nearest);
                    }
                    for (int64_t t = 0; t < count; t++)
                        e.codes[(item * e.tokens + begin + t) * e.subvectors + m] = static_cast<uint8_t>(nearest[t]);
                }
            }
        }
    });
}
