// Accumulation order of a product. Each element has eight partial sums; input k belongs to sum 4 * (k mod 2) + k / 4
// mod 4. A sum is a chain of fused multiply-adds over its inputs, ascending, from zero; the inputs are padded with
// zeros to a multiple of 32. The sums are added as ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)).
//
// Eight sums let gemv fill a register from one row of a weight: its codes unpack to inputs of eight sums side by side.
#pragma once

#include "base/simd.h"

namespace dsv4::DSV4_ISA {

constexpr int SUMS = 8;
constexpr int64_t GROUP = 32, STEPS = GROUP / SUMS;  // a sum has four inputs of each 32: its first, + 2, + 16, + 18
// The order in which gemm.h computes the sums: at most three intermediate results wait at a time.
constexpr int SUM_AT[SUMS] = {0, 4, 2, 6, 1, 5, 3, 7};

inline int64_t groups_of(int64_t in) { return (in + GROUP - 1) / GROUP; }

// Place of input r of a group of 32: the index of its sum in SUM_AT, and its step in that sum.
struct Place {
    int sum, step;
};
constexpr Place place_of(int r) {
    int sum = 4 * (r % 2) + r / 4 % 4, at = 0;
    while (SUM_AT[at] != sum) ++at;
    return {at, r / 2 % 2 + 2 * (r / 16)};
}
struct Places {
    Place of[GROUP];
    constexpr Places() : of() {
        for (int r = 0; r < GROUP; ++r) of[r] = place_of(r);
    }
};
inline constexpr Places PLACES;

// Index of input k in a row that pack_row packed, of `groups` groups.
inline int64_t sum_by_sum(int64_t k, int64_t groups) {
    Place p = PLACES.of[k % GROUP];
    return (p.sum * groups + k / GROUP) * STEPS + p.step;
}

// Packs x [in] into to [8 sums][groups * 4], padded with zeros.
inline void pack_row(const float* x, int64_t in, float* to) {
    int64_t groups = groups_of(in), g = 0;
#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)
    for (; (g + 1) * GROUP <= in; ++g) {
        const float* from = x + g * GROUP;
        __m256 v0 = _mm256_loadu_ps(from), v1 = _mm256_loadu_ps(from + 8);
        __m256 v2 = _mm256_loadu_ps(from + 16), v3 = _mm256_loadu_ps(from + 24);
        auto store_pair = [&](int at, __m256 pair) {  // the sums at places `at` and `at` + 4
            _mm_storeu_ps(to + (at * groups + g) * STEPS, _mm256_castps256_ps128(pair));
            _mm_storeu_ps(to + ((at + 4) * groups + g) * STEPS, _mm256_extractf128_ps(pair, 1));
        };
        // Inputs 0 2 16 18 | 4 6 20 22 are of sums 0 and 1, at places 0 and 4; 8 10 24 26 | 12 14 28 30 of sums 2 and
        // 3; the odd inputs of sums 4 to 7.
        store_pair(0, _mm256_shuffle_ps(v0, v2, 0x88));
        store_pair(1, _mm256_shuffle_ps(v0, v2, 0xDD));
        store_pair(2, _mm256_shuffle_ps(v1, v3, 0x88));
        store_pair(3, _mm256_shuffle_ps(v1, v3, 0xDD));
    }
#endif
    for (; g < groups; ++g)
        for (int r = 0; r < GROUP; ++r) {
            int64_t k = g * GROUP + r;
            to[(PLACES.of[r].sum * groups + g) * STEPS + PLACES.of[r].step] = k < in ? x[k] : 0.0f;
        }
}

}  // namespace dsv4::DSV4_ISA
