// Numbers of 16 bits, two inputs of a row side by side: what AMX tiles and AVX-512's dot products of pairs multiply.
#pragma once

#include <algorithm>

#include "gemm/accumulation_order.h"

#if defined(DSV4_ISA_AVX512)

namespace dsv4::DSV4_ISA {

constexpr int64_t TILE_WORDS = 512;  // of 16 bits: 16 rows of 32

inline uint16_t* aligned_words(Scratch place, int64_t count) {
    return reinterpret_cast<uint16_t*>(aligned_scratch(place, (count + 1) / 2));
}

// Numbers of a row of which `left` are left, 16 of them, then zeros.
[[gnu::always_inline]] inline __m512 numbers_at(const float* from, int64_t left) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << std::clamp<int64_t>(left, 0, LANES)) - 1u), from);
}

// Sixteen rows of 16 pairs -> sixteen pairs of 16 rows.
inline void turn_pairs(const uint16_t* const* row, uint16_t* to) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(row[i]);
    for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    // a[4 * i + j], quarter q: pair 4 * q + j of rows 4 * i to 4 * i + 3.
    for (int j = 0; j < 4; ++j) {
        __m512i low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x44), high = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xEE);
        __m512i low2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44), high2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xEE);
        _mm512_store_si512(to + 32 * j, _mm512_shuffle_i32x4(low, low2, 0x88));
        _mm512_store_si512(to + 32 * (4 + j), _mm512_shuffle_i32x4(low, low2, 0xDD));
        _mm512_store_si512(to + 32 * (8 + j), _mm512_shuffle_i32x4(high, high2, 0x88));
        _mm512_store_si512(to + 32 * (12 + j), _mm512_shuffle_i32x4(high, high2, 0xDD));
    }
}

}  // namespace dsv4::DSV4_ISA

#endif
