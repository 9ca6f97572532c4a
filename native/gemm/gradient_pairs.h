// Factors of gradients as BF16 pairs: two neighbouring terms side by side, rounded to nearest, the even term in the lower
// half. A pair's products are added to an fp32 sum (micro_kernel.h, gradient_tiles.h). Numbers below 2^-126 count as
// zero.
#pragma once

#include "gemm/weights.h"

namespace dsv4::DSV4_ISA {

#if defined(DSV4_ISA_AVX512_BF16) || defined(DSV4_ISA_AMX)
constexpr bool HAS_GRADIENT_PAIRS = true;

[[gnu::always_inline]] inline V round_pairs(V even, V odd) {
    const auto low = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(even.v)),
               high = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(odd.v));
    return {_mm512_castsi512_ps(
        _mm512_or_si512(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16), _mm512_cvtepu16_epi32(low)))};
}

// Packs `terms` contiguous values into pairs [(terms + 1) / 2].
inline void pack_value_pairs(const float* from, int64_t terms, float* to) {
    for (int64_t t = 0; t < terms; t += 2 * LANES) {
        const int left = static_cast<int>(std::min<int64_t>(2 * LANES, terms - t)), first = std::min(left, LANES);
        const V low = load_n(from + t, first), high = left > LANES ? load_n(from + t + LANES, left - LANES) : zero();
        const auto pairs = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v));
        store_n(to + t / 2, {_mm512_castsi512_ps(pairs)}, (left + 1) / 2);
    }
}

#else
constexpr bool HAS_GRADIENT_PAIRS = false;

inline V round_pairs(V, V) { return zero(); }
inline void pack_value_pairs(const float*, int64_t, float*) {}
#endif

}  // namespace dsv4::DSV4_ISA
