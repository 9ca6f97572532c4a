// FP32: all decoders, with the same interface as the other formats.
#pragma once

#include "gemm/formats/columns.h"

namespace dsv4::DSV4_ISA {

// Inputs [k0, k1) of output n.
inline void load_f32_row(const Weight& w, int64_t n, int64_t k0, int64_t k1, float* to) {
    std::memcpy(to, w.data + n * w.stride + 4 * k0, sizeof(float) * static_cast<size_t>(k1 - k0));
}

#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)

// Calls f(k, column), not split, for k in [k0, k1) of outputs [n, n + 32); k0 and k1 are multiples of 4.
template <class F>
[[gnu::always_inline]] inline void for_each_f32_column(const Weight& w, int64_t n, int64_t k0, int64_t k1, F&& f) {
    for_each_piece(w, n, 4 * k0, 4 * k1, [&](int64_t byte, const uint8_t* piece) __attribute__((always_inline)) {
        __m256 columns[4][4];
        for (int q = 0; q < 4; ++q)
            transpose_8x4_floats(reinterpret_cast<const float*>(piece + q * 8 * PIECE_STRIDE), PIECE_STRIDE / 4,
                                 columns[q]);
        for (int i = 0; i < 4; ++i)
            f(byte / 4 + i, Column{{columns[0][i], columns[1][i], columns[2][i], columns[3][i]}});
    });
}

// Calls f(step, eight weights) for the four steps of a group of 32 inputs of one output, in gemv.h's lanes for FP32.
template <class F>
[[gnu::always_inline]] inline void unpack_f32_group(const uint8_t* codes, F&& f) {
    const float* w = reinterpret_cast<const float*>(codes);
    for (int half = 0; half < 2; ++half) {
        __m256 a = _mm256_loadu_ps(w + 16 * half), b = _mm256_loadu_ps(w + 16 * half + 8);
        f(2 * half, _mm256_unpacklo_ps(a, b));
        f(2 * half + 1, _mm256_unpackhi_ps(a, b));
    }
}

#endif

}  // namespace dsv4::DSV4_ISA
