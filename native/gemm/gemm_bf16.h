// BF16 pairs: products by AVX-512's BF16 dot product, two inputs per instruction, for rows and weights that are exact
// in BF16. The result has the bits of the fp32 product (NaN payloads excepted).
//
// VDPBF16PS adds two products to an accumulator, one after the other, each rounded once, as two fused multiply-adds do.
// A sum's inputs k and k + 2 follow one another (accumulation_order.h): k is in the upper half of a pair, which is
// added first. The instruction flushes numbers below 2^-126 to zero; there are none if all products are multiples of
// 2^-126, as exact_in_bf16 and weight_exact_in_bf16 together ensure: rows are multiples of 2^-47 and FP4 and FP8 weights
// of 2^-79, or with BF16 weights both of 2^-63.
#pragma once

#include "gemm/weights.h"

namespace dsv4::DSV4_ISA {

#if defined(DSV4_ISA_AVX512_BF16)

// Least magnitude of rows that BF16 pairs multiply by a weight.
inline float least_input(const Weight& w) { return w.kind == Kind::bf16 ? LEAST_FACTOR : 0x1p-40f; }

// True if each value of a row is exact in BF16 and either 0 or at least `least_input`.
inline bool exact_in_bf16(const float* x, int64_t in, float least_input) {
    const __m512i upper = _mm512_set1_epi32(0xFFFF), magnitudes = _mm512_set1_epi32(0x7FFFFFFF);
    const __m512i least = _mm512_set1_epi32(static_cast<int>(bits_of(least_input)));
    uint32_t inexact = 0;
    for (int64_t k = 0; k < in; k += LANES) {
        const __m512i bits = _mm512_castps_si512(load_n(x + k, static_cast<int>(std::min<int64_t>(LANES, in - k))).v);
        const __mmask16 small = _mm512_cmplt_epu32_mask(_mm512_and_si512(bits, magnitudes), least);
        inexact |= _mm512_mask_test_epi32_mask(small, bits, magnitudes) | _mm512_test_epi32_mask(bits, upper);
    }
    return inexact == 0;
}

// True if outputs [n0, n1) of a BF16 weight are 0 or at least LEAST_FACTOR.
inline bool bf16_weight_is_normal(const Weight& w, int64_t n0, int64_t n1) {
    const __m512i magnitudes = _mm512_set1_epi16(0x7FFF);
    const __m512i least = _mm512_set1_epi16(static_cast<int16_t>(bits_of(LEAST_FACTOR) >> 16));
    uint32_t small = 0;
    for (int64_t n = n0; n < n1; ++n)
        for (int64_t k = 0; k < w.in; k += 2 * LANES) {
            const __mmask32 left = w.in - k < 2 * LANES ? (__mmask32{1} << (w.in - k)) - 1 : ~__mmask32{0};
            const __m512i values =
                _mm512_and_si512(_mm512_maskz_loadu_epi16(left, w.data + n * w.stride + 2 * k), magnitudes);
            small |= _mm512_mask_test_epi16_mask(_mm512_cmplt_epu16_mask(values, least), values, values);
        }
    return small == 0;
}

// True if outputs [n0, n1) of a stored weight are exact in BF16 and multiples of 2^-79, in BF16 of 2^-63.
inline bool weight_exact_in_bf16(const Weight& w, int64_t n0, int64_t n1) {
    if (w.kind == Kind::bf16) return bf16_weight_is_normal(w, n0, n1);
    const int64_t width = w.kind == Kind::fp4 ? 32 : 128, height = w.kind == Kind::fp4 ? 1 : 128;
    const int least_scale = w.kind == Kind::fp4 ? 127 - 78 : 127 - 70;
    if ((w.kind != Kind::fp4 && w.kind != Kind::fp8) || w.float_scales) return false;
    for (int64_t row = (w.first + n0) / height; row <= (w.first + n1 - 1) / height; ++row) {
        const uint8_t* scales = w.scales + row * w.scale_stride;
        int lowest = 255;
        for (int64_t g = 0; g < (w.in + width - 1) / width; ++g) lowest = std::min<int>(lowest, scales[g]);
        if (lowest < least_scale) return false;
    }
    return true;
}

[[gnu::always_inline]] inline __m512i make_pairs(__m512i first, __m512i second) {
    return _mm512_or_si512(_mm512_andnot_si512(_mm512_set1_epi32(0xFFFF), first), _mm512_srli_epi32(second, 16));
}

// Converts a row that pack_row packed to BF16 pairs [8 sums][groups * 2], in place.
inline void pack_row_pairs(float* row, int64_t groups) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    for (int64_t i = 0; i < groups * LANES; i += LANES) {
        const __m512i a = _mm512_loadu_si512(row + 2 * i), b = _mm512_loadu_si512(row + 2 * i + LANES);
        const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        _mm512_storeu_si512(row + i,
                            make_pairs(_mm512_permutex2var_epi32(a, even, b), _mm512_permutex2var_epi32(a, odd, b)));
    }
}

// Packs outputs [n0, n1) into panels of 16 outputs, [8 sums][groups * 2 pairs][16] each; missing outputs and inputs are
// 0.
inline void pack_panels_pairs(const Weight& w, int64_t n0, int64_t n1, float* to) {
    const int64_t groups = groups_of(w.in), panel_stride = groups * GROUP / 2 * LANES;
    for (int64_t n = n0; n < n1; n += LANES, to += panel_stride) {
        if (n + 2 * LANES <= n1 && has_columns(w, n) && w.in % GROUP == 0) {
            Column first[2];
            for_each_column(
                w, n, 0, w.in, [&](int64_t k, const Column& second, bool split) __attribute__((always_inline)) {
                    if (k % 4 < 2) {
                        first[k % 2] = second;
                        return;
                    }
                    Column pair;
                    for (int i = 0; i < 4; ++i) {
                        const __m256 low = _mm256_castsi256_ps(_mm256_srli_epi32(_mm256_castps_si256(second.v[i]), 16));
                        pair.v[i] = _mm256_or_ps(first[k % 2].v[i], low);
                    }
                    store_column(unsplit(split, pair), to + sum_by_sum(k - 2, groups) / 2 * LANES, panel_stride);
                });
            n += LANES;
            to += panel_stride;
            continue;
        }
        float* panel = scratch(Scratch::panel, groups * GROUP * LANES);
        pack_panel(w, n, panel);
        for (int64_t i = 0; i < groups * GROUP / 2; ++i) {
            const float *first = panel + 2 * i * LANES, *second = first + LANES;
            _mm512_storeu_si512(to + i * LANES, make_pairs(_mm512_loadu_si512(first), _mm512_loadu_si512(second)));
        }
    }
}

#endif

// pack_row and pack_panels; PAIRS packs BF16 pairs instead of fp32.
template <bool PAIRS>
inline void pack_row_as(const float* x, int64_t in, float* to) {
    pack_row(x, in, to);
#if defined(DSV4_ISA_AVX512_BF16)
    if constexpr (PAIRS) pack_row_pairs(to, groups_of(in));
#endif
}
template <bool PAIRS>
inline void pack_panels_as(const Weight& w, int64_t n0, int64_t n1, float* to) {
#if defined(DSV4_ISA_AVX512_BF16)
    if constexpr (PAIRS) return pack_panels_pairs(w, n0, n1, to);
#endif
    pack_panels(w, n0, n1, to);
}

}  // namespace dsv4::DSV4_ISA
