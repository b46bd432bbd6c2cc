// Vectors of 16 floats: plain C++17 with the vector extension of GCC and Clang, on any CPU, as wide as the compiler's
// flags allow.
#pragma once

#include <cstdint>
#include <cstring>

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
// Half onto half, since a chain of additions one after another takes as long as many products.
INLINE float sum(vec v) {
    typedef float vec8 __attribute__((vector_size(32)));
    typedef float vec4 __attribute__((vector_size(16)));
    vec8 halves[2];
    vec4 quarters[2];
    std::memcpy(halves, &v, sizeof v);
    halves[0] += halves[1];
    std::memcpy(quarters, halves, sizeof quarters);
    const vec4 rest = quarters[0] + quarters[1];
    return (rest[0] + rest[2]) + (rest[1] + rest[3]);
}
