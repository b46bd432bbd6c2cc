// Vectors of 16 floats: plain C++17 with the vector extension of GCC and Clang, on any CPU, as wide as the compiler's
// flags allow.
#pragma once

#include <cstdint>

#define INLINE static inline __attribute__((always_inline))

constexpr int LANES = 16;
typedef float vec __attribute__((vector_size(64)));
typedef float loose_vec __attribute__((vector_size(64), aligned(4)));  // at any address
typedef int32_t ivec __attribute__((vector_size(64)));

INLINE vec load(const float* p) { return *reinterpret_cast<const loose_vec*>(p); }
INLINE void store(float* p, vec v) { *reinterpret_cast<loose_vec*>(p) = v; }
INLINE vec splat(float x) { return vec{} + x; }
INLINE vec select(ivec condition, vec yes, vec no) {
    return reinterpret_cast<vec>((condition & reinterpret_cast<ivec>(yes)) | (~condition & reinterpret_cast<ivec>(no)));
}
INLINE float sum(vec v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}
