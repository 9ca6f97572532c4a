// Column access to 32 rows of a stored weight, for packing. Rows are read in pieces of 512 bytes, which are transposed
// in registers.
#pragma once

#include <algorithm>

#include "base/transpose.h"
#include "gemm/formats/scale.h"

namespace dsv4::DSV4_ISA {

#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)

// Weights of 32 outputs for one input. Split order: outputs 0 2 4 6 16 18 20 22, then 1 3 5 7 17 19 21 23, then the
// same + 8; unpacking the 16-bit halves of a register to fp32 gives this order. Not split: ascending order.
struct Column {
    __m256 v[4];
};

// Column of fp32 numbers from their upper 16-bit halves.
[[gnu::always_inline]] inline __m256 even_halves(__m256i words) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}
[[gnu::always_inline]] inline __m256 odd_halves(__m256i words) {
    return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
}
[[gnu::always_inline]] inline Column column_of_halves(__m256i w0, __m256i w1) {
    return {{even_halves(w0), odd_halves(w0), even_halves(w1), odd_halves(w1)}};
}

// A piece of 32 rows is copied row by row before it is transposed: the hardware then prefetches one stream instead of
// 32, which for a power-of-two stride would also compete for few sets of the first-level cache.
constexpr int64_t PIECE = 512, PIECE_STRIDE = PIECE + 64;

// Copies one piece of 32 rows and prefetches the next one, `next` bytes ahead.
inline void copy_piece(const uint8_t* from, int64_t stride, int64_t bytes, int64_t next, uint8_t* to) {
    for (int r = 0; r < 32; ++r, from += stride, to += PIECE_STRIDE) {
        int64_t i = 0;
        for (; i + 64 <= bytes; i += 64) {
            _mm_prefetch(reinterpret_cast<const char*>(from + i + next), _MM_HINT_T1);
            __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
            __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i + 32));
            _mm256_store_si256(reinterpret_cast<__m256i*>(to + i), a);
            _mm256_store_si256(reinterpret_cast<__m256i*>(to + i + 32), b);
        }
        if (i < bytes) std::memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
    }
}

// Calls f(byte, piece) for bytes [b0, b1) of rows [n, n + 32), in steps of 16; b0 and b1 are multiples of 16. The 16
// bytes of row r are at piece[r * PIECE_STRIDE].
template <class F>
[[gnu::always_inline]] inline void for_each_piece(const Weight& w, int64_t n, int64_t b0, int64_t b1, F&& f) {
    alignas(64) uint8_t pieces[32 * PIECE_STRIDE];
    for (int64_t b = b0; b < b1; b += PIECE) {
        int64_t bytes = std::min(PIECE, b1 - b);
        copy_piece(w.data + n * w.stride + b, w.stride, bytes, b + PIECE < b1 ? PIECE : 32 * w.stride - (b - b0),
                   pieces);
        for (int64_t i = 0; i < bytes; i += 16) f(b + i, pieces + i);
    }
}

// Scalar fallback for scales that the vector code does not support: split columns to[k - k0] for k in [k0, k1), at most
// 32. Not inlined, so that the caller's columns stay in registers.
template <auto DequantizeRow>
[[gnu::noinline]] inline void dequantize_columns(const Weight& w, int64_t n, int64_t k0, int64_t k1, Column* to) {
    alignas(32) float rows[32][32], part[32];
    constexpr int order[32] = {0, 2,  4,  6,  16, 18, 20, 22, 1, 3,  5,  7,  17, 19, 21, 23,
                               8, 10, 12, 14, 24, 26, 28, 30, 9, 11, 13, 15, 25, 27, 29, 31};
    for (int r = 0; r < 32; ++r) DequantizeRow(w, n + r, k0, k1, rows[r]);
    for (int64_t k = 0; k < k1 - k0; ++k) {
        for (int i = 0; i < 32; ++i) part[i] = rows[order[i]][k];
        for (int i = 0; i < 4; ++i) to[k].v[i] = _mm256_load_ps(part + 8 * i);
    }
}

// Loads 16 bytes into both halves of a register.
[[gnu::always_inline]] inline __m256i broadcast16(const uint8_t* from) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

#endif

}  // namespace dsv4::DSV4_ISA
