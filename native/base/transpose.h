// Transposes in registers.
#pragma once

#include "base/simd.h"

namespace dsv4::DSV4_ISA {

#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)

// 8x8 transpose: to[i] = element i of each row.
inline void transpose_8x8_floats(const float* const* row, __m256* to) {
    __m256 r0 = _mm256_loadu_ps(row[0]), r1 = _mm256_loadu_ps(row[1]), r2 = _mm256_loadu_ps(row[2]);
    __m256 r3 = _mm256_loadu_ps(row[3]), r4 = _mm256_loadu_ps(row[4]), r5 = _mm256_loadu_ps(row[5]);
    __m256 r6 = _mm256_loadu_ps(row[6]), r7 = _mm256_loadu_ps(row[7]);
    __m256 a0 = _mm256_unpacklo_ps(r0, r1), a1 = _mm256_unpackhi_ps(r0, r1);
    __m256 a2 = _mm256_unpacklo_ps(r2, r3), a3 = _mm256_unpackhi_ps(r2, r3);
    __m256 a4 = _mm256_unpacklo_ps(r4, r5), a5 = _mm256_unpackhi_ps(r4, r5);
    __m256 a6 = _mm256_unpacklo_ps(r6, r7), a7 = _mm256_unpackhi_ps(r6, r7);
    __m256 b0 = _mm256_shuffle_ps(a0, a2, 0x44), b1 = _mm256_shuffle_ps(a0, a2, 0xEE);
    __m256 b2 = _mm256_shuffle_ps(a1, a3, 0x44), b3 = _mm256_shuffle_ps(a1, a3, 0xEE);
    __m256 b4 = _mm256_shuffle_ps(a4, a6, 0x44), b5 = _mm256_shuffle_ps(a4, a6, 0xEE);
    __m256 b6 = _mm256_shuffle_ps(a5, a7, 0x44), b7 = _mm256_shuffle_ps(a5, a7, 0xEE);
    to[0] = _mm256_permute2f128_ps(b0, b4, 0x20);
    to[1] = _mm256_permute2f128_ps(b1, b5, 0x20);
    to[2] = _mm256_permute2f128_ps(b2, b6, 0x20);
    to[3] = _mm256_permute2f128_ps(b3, b7, 0x20);
    to[4] = _mm256_permute2f128_ps(b0, b4, 0x31);
    to[5] = _mm256_permute2f128_ps(b1, b5, 0x31);
    to[6] = _mm256_permute2f128_ps(b2, b6, 0x31);
    to[7] = _mm256_permute2f128_ps(b3, b7, 0x31);
}

// Transposes 16 bytes of 32 rows, row r beside row r + 16, by four rounds of interleaving registers i and i + 8. low
// and high interleave the lower and upper halves of two registers, element by element.
template <class Low, class High>
[[gnu::always_inline]] inline void transpose_32_rows(const uint8_t* from, int64_t stride, __m256i* c, Low low,
                                                     High high) {
    __m256i d[16];
    for (int r = 0; r < 16; ++r)
        c[r] = _mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + r * stride))),
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + (r + 16) * stride)), 1);
    auto round = [&](const __m256i* x, __m256i* y) __attribute__((always_inline)) {
        for (int i = 0; i < 8; ++i) {
            y[2 * i] = low(x[i], x[i + 8]);
            y[2 * i + 1] = high(x[i], x[i + 8]);
        }
    };
    round(c, d);
    round(d, c);
    round(c, d);
    round(d, c);
}

// c[i] = byte i of rows 0 to 15 and, in the upper half, of rows 16 to 31; i in [0, 16).
inline void transpose_32x16_bytes(const uint8_t* from, int64_t stride, __m256i* c) {
    transpose_32_rows(
        from, stride, c, [](__m256i a, __m256i b) { return _mm256_unpacklo_epi8(a, b); },
        [](__m256i a, __m256i b) { return _mm256_unpackhi_epi8(a, b); });
}

// c[2 * i] = 16-bit word i of rows 0 to 7 and 16 to 23, c[2 * i + 1] = word i of rows 8 to 15 and 24 to 31; i in [0,
// 8).
inline void transpose_32x8_words(const uint8_t* from, int64_t stride, __m256i* c) {
    transpose_32_rows(
        from, stride, c, [](__m256i a, __m256i b) { return _mm256_unpacklo_epi16(a, b); },
        [](__m256i a, __m256i b) { return _mm256_unpackhi_epi16(a, b); });
}

// Transposes eight rows of four, `stride` apart: to[i] = element i of each row.
inline void transpose_8x4_floats(const float* from, int64_t stride, __m256* to) {
    __m256 r[4];
    for (int j = 0; j < 4; ++j)
        r[j] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + j * stride)),
                                    _mm_loadu_ps(from + (j + 4) * stride), 1);
    __m256 a0 = _mm256_unpacklo_ps(r[0], r[1]), a1 = _mm256_unpackhi_ps(r[0], r[1]);
    __m256 a2 = _mm256_unpacklo_ps(r[2], r[3]), a3 = _mm256_unpackhi_ps(r[2], r[3]);
    to[0] = _mm256_shuffle_ps(a0, a2, 0x44);
    to[1] = _mm256_shuffle_ps(a0, a2, 0xEE);
    to[2] = _mm256_shuffle_ps(a1, a3, 0x44);
    to[3] = _mm256_shuffle_ps(a1, a3, 0xEE);
}

#endif

#if defined(DSV4_ISA_AVX512)

// Transposes 16 rows of 16 words into `to`, rows `from_stride` and `to_stride` words apart.
inline void transpose_16x16_words(const uint16_t* from, int64_t from_stride, uint16_t* to, int64_t to_stride) {
    __m256i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i * from_stride));
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm256_unpacklo_epi16(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi16(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j] = _mm256_unpacklo_epi32(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm256_unpackhi_epi32(b[i + j], b[i + j + 2]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; ++j) {
            b[i + 2 * j] = _mm256_unpacklo_epi64(a[i + j], a[i + j + 4]);
            b[i + 2 * j + 1] = _mm256_unpackhi_epi64(a[i + j], a[i + j + 4]);
        }
    // Half h of b[8 * i + j] has column 8 * h + j of rows 8 * i to 8 * i + 7.
    for (int j = 0; j < 8; ++j) {
        auto column = [&](int k) { return reinterpret_cast<__m256i*>(to + k * to_stride); };
        _mm256_storeu_si256(column(j), _mm256_permute2x128_si256(b[j], b[8 + j], 0x20));
        _mm256_storeu_si256(column(8 + j), _mm256_permute2x128_si256(b[j], b[8 + j], 0x31));
    }
}

// Transposes 16 rows of 16 32-bit elements (BF16 pairs, floats) into to [16 elements][16 rows].
inline void transpose_16x16_pairs(const uint16_t* const* row, uint16_t* to) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(row[i]);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    // Quarter q of a[4 * i + j] has element 4 * q + j of rows 4 * i to 4 * i + 3.
    for (int j = 0; j < 4; ++j) {
        __m512i low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x44), high = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xEE);
        __m512i low2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44);
        __m512i high2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xEE);
        _mm512_store_si512(to + 32 * j, _mm512_shuffle_i32x4(low, low2, 0x88));
        _mm512_store_si512(to + 32 * (4 + j), _mm512_shuffle_i32x4(low, low2, 0xDD));
        _mm512_store_si512(to + 32 * (8 + j), _mm512_shuffle_i32x4(high, high2, 0x88));
        _mm512_store_si512(to + 32 * (12 + j), _mm512_shuffle_i32x4(high, high2, 0xDD));
    }
}

// Transposes one or three rows of 16 BF16 pairs, `stride` words apart, into to [16 pairs][4 rows]; missing rows are 0.
inline void transpose_4x16_pairs(const uint16_t* from, int rows, int64_t stride, uint16_t* to) {
    const __m512i none = _mm512_setzero_si512(), p0 = _mm512_loadu_si512(from);
    __m512i p1 = none, p2 = none, a[4];
    if (rows > 1) {
        p1 = _mm512_loadu_si512(from + stride);
        p2 = _mm512_loadu_si512(from + 2 * stride);
    }
    __m512i low = _mm512_unpacklo_epi32(p0, p1), high = _mm512_unpackhi_epi32(p0, p1);
    __m512i low2 = _mm512_unpacklo_epi32(p2, none), high2 = _mm512_unpackhi_epi32(p2, none);
    // Quarter q of a[j] has pair 4 * q + j of the four rows.
    a[0] = _mm512_unpacklo_epi64(low, low2);
    a[1] = _mm512_unpackhi_epi64(low, low2);
    a[2] = _mm512_unpacklo_epi64(high, high2);
    a[3] = _mm512_unpackhi_epi64(high, high2);
    __m512i b0 = _mm512_shuffle_i32x4(a[0], a[1], 0x44), b1 = _mm512_shuffle_i32x4(a[2], a[3], 0x44);
    __m512i b2 = _mm512_shuffle_i32x4(a[0], a[1], 0xEE), b3 = _mm512_shuffle_i32x4(a[2], a[3], 0xEE);
    _mm512_store_si512(to, _mm512_shuffle_i32x4(b0, b1, 0x88));
    _mm512_store_si512(to + 32, _mm512_shuffle_i32x4(b0, b1, 0xDD));
    _mm512_store_si512(to + 64, _mm512_shuffle_i32x4(b2, b3, 0x88));
    _mm512_store_si512(to + 96, _mm512_shuffle_i32x4(b2, b3, 0xDD));
}

#endif

// Packs `count` rows into a panel [inner][16]: to[k * 16 + j] = from[j][k], 0 for j from `count` on.
inline void pack_rows(const float* const* from, int count, int64_t inner, float* to) {
    int64_t k = 0;
#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)
    if (count == LANES) {
        for (; k + 8 <= inner; k += 8) {
            for (int half = 0; half < 2; ++half) {
                const float* row[8];
                __m256 columns[8];
                for (int j = 0; j < 8; ++j) row[j] = from[half * 8 + j] + k;
                transpose_8x8_floats(row, columns);
                for (int i = 0; i < 8; ++i) _mm256_storeu_ps(to + (k + i) * LANES + half * 8, columns[i]);
            }
        }
    }
#endif
    for (; k < inner; ++k)
        for (int j = 0; j < LANES; ++j) to[k * LANES + j] = j < count ? from[j][k] : 0.0f;
}

}  // namespace dsv4::DSV4_ISA
