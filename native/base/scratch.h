// Memory of a thread, and rows turned into columns.
#pragma once

#include <vector>

#include "base/simd.h"

namespace dsv4::DSV4_ISA {

// Memory of one thread, grown to the largest size asked for. Each name is a place of its own.
enum class Scratch { packed, panel, scores, dots, index, wide, lanes, rows, places };
inline float* scratch(Scratch place, int64_t size) {
    thread_local std::vector<float> memory[static_cast<int>(Scratch::places)];
    auto& own = memory[static_cast<int>(place)];
    if (static_cast<int64_t>(own.size()) < size) own.resize(static_cast<size_t>(size));
    return own.data();
}

// The same, from the beginning of a cache line on.
inline float* aligned_scratch(Scratch place, int64_t size) {
    float* own = scratch(place, size + LANES);
    return own + (64 - reinterpret_cast<uintptr_t>(own) % 64) % 64 / sizeof(float);
}

#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)
// Eight numbers of eight rows -> to[i] = number i of each.
inline void turn_floats(const float* const* row, __m256* to) {
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
    to[0] = _mm256_permute2f128_ps(b0, b4, 0x20), to[1] = _mm256_permute2f128_ps(b1, b5, 0x20);
    to[2] = _mm256_permute2f128_ps(b2, b6, 0x20), to[3] = _mm256_permute2f128_ps(b3, b7, 0x20);
    to[4] = _mm256_permute2f128_ps(b0, b4, 0x31), to[5] = _mm256_permute2f128_ps(b1, b5, 0x31);
    to[6] = _mm256_permute2f128_ps(b2, b6, 0x31), to[7] = _mm256_permute2f128_ps(b3, b7, 0x31);
}
#endif

// Columns first..first + 15 of up to 16 strided vectors, transposed: to[k * 16 + j] = from[j][k]. Missing ones are 0.
inline void pack_rows(const float* const* from, int count, int64_t inner, float* to) {
    int64_t k = 0;
#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)
    if (count == LANES) {
        for (; k + 8 <= inner; k += 8) {
            for (int half = 0; half < 2; ++half) {
                const float* row[8];
                __m256 turned[8];
                for (int j = 0; j < 8; ++j) row[j] = from[half * 8 + j] + k;
                turn_floats(row, turned);
                for (int i = 0; i < 8; ++i) _mm256_storeu_ps(to + (k + i) * LANES + half * 8, turned[i]);
            }
        }
    }
#endif
    for (; k < inner; ++k)
        for (int j = 0; j < LANES; ++j) to[k * LANES + j] = j < count ? from[j][k] : 0.0f;
}

}  // namespace dsv4::DSV4_ISA
