// Weights as stored, in any of the formats: dequantized by rows or by columns, and packed into panels for products.
//
// An element dequantizes to the same fp32 number as in dsv4.checkpoint.formats, so a product has the bits of the
// product with the dequantized weight (with AMX, up to rounding).
#pragma once

#include "base/scratch.h"
#include "gemm/accumulation_order.h"
#include "gemm/formats/bf16.h"
#include "gemm/formats/f32.h"
#include "gemm/formats/fp4.h"
#include "gemm/formats/fp8.h"

namespace dsv4::DSV4_ISA {

// Dequantizes inputs [k0, k1) of output n to fp32.
inline void dequantize_row(const Weight& w, int64_t n, int64_t k0, int64_t k1, float* to) {
    switch (w.kind) {
        case Kind::f32: return load_f32_row(w, n, k0, k1, to);
        case Kind::bf16: return dequantize_bf16_row(w, n, k0, k1, to);
        case Kind::fp8: return dequantize_fp8_row(w, n, k0, k1, to);
        case Kind::fp4: return dequantize_fp4_row(w, n, k0, k1, to);
    }
}

#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)

// True if for_each_column supports outputs [n, n + 32) of w.
inline bool has_columns(const Weight& w, int64_t n) {
    if (w.out - n < 32) return false;
    return w.kind != Kind::fp8 || (w.first + n) / 128 == (w.first + n + 31) / 128;
}

// Calls f(k, column, split) for k in [k0, k1), multiples of 32, of outputs [n, n + 32).
template <class F>
[[gnu::always_inline]] inline void for_each_column(const Weight& w, int64_t n, int64_t k0, int64_t k1, F&& f) {
    auto split = [&](int64_t k, const Column& c) __attribute__((always_inline)) { f(k, c, true); };
    switch (w.kind) {
        case Kind::f32:
            return for_each_f32_column(
                w, n, k0, k1, [&](int64_t k, const Column& c) __attribute__((always_inline)) { f(k, c, false); });
        case Kind::bf16: return for_each_bf16_column(w, n, k0, k1, split);
        case Kind::fp8: return for_each_fp8_column(w, n, k0, k1, split);
        case Kind::fp4: return for_each_fp4_column(w, n, k0, k1, split);
    }
}

// Reorders a split column to ascending outputs.
[[gnu::always_inline]] inline Column unsplit(bool split, const Column& c) {
    if (!split) return c;
    Column out;
    for (int h = 0; h < 2; ++h) {
        __m256 a = _mm256_unpacklo_ps(c.v[2 * h], c.v[2 * h + 1]), b = _mm256_unpackhi_ps(c.v[2 * h], c.v[2 * h + 1]);
        out.v[h] = _mm256_permute2f128_ps(a, b, 0x20);
        out.v[2 + h] = _mm256_permute2f128_ps(a, b, 0x31);
    }
    return out;
}

// Stores a column, not split, as one row of each of two panels, panel_stride apart.
[[gnu::always_inline]] inline void store_column(const Column& c, float* to, int64_t panel_stride) {
    _mm256_storeu_ps(to, c.v[0]);
    _mm256_storeu_ps(to + 8, c.v[1]);
    _mm256_storeu_ps(to + panel_stride, c.v[2]);
    _mm256_storeu_ps(to + panel_stride + 8, c.v[3]);
}

#endif

// Packs up to 16 outputs from n0 on into a panel [8 sums][groups * 4][16]; missing outputs and inputs are 0.
inline void pack_panel(const Weight& w, int64_t n0, float* to) {
    int count = static_cast<int>(std::min<int64_t>(LANES, w.out - n0));
    int64_t groups = groups_of(w.in);
    float* values = scratch(Scratch::staging, (count + LANES) * GROUP);
    float* columns = values + count * GROUP;
    for (int64_t g = 0; g < groups; ++g) {
        int64_t k0 = g * GROUP, k1 = std::min(w.in, k0 + GROUP);
        const float* rows[LANES];
        std::fill_n(values, count * GROUP, 0.0f);
        for (int j = 0; j < count; ++j) {
            dequantize_row(w, n0 + j, k0, k1, values + j * GROUP);
            rows[j] = values + j * GROUP;
        }
        for (int r = 0; r < GROUP; r += LANES) {
            pack_rows(rows, count, LANES, columns);
            for (int i = 0; i < LANES; ++i)
                store(to + sum_by_sum(k0 + r + i, groups) * LANES, load(columns + i * LANES));
            for (int j = 0; j < count; ++j) rows[j] += LANES;
        }
    }
}

// Packs outputs [n0, n1) into consecutive panels of 16 outputs.
inline void pack_panels(const Weight& w, int64_t n0, int64_t n1, float* to) {
    const int64_t groups = groups_of(w.in), panel_stride = groups * GROUP * LANES;
    for (int64_t n = n0; n < n1; n += LANES, to += panel_stride) {
#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)
        if (n + 2 * LANES <= n1 && has_columns(w, n) && w.in % GROUP == 0) {
            for_each_column(w, n, 0, w.in,
                            [&](int64_t k, const Column& column, bool split) __attribute__((always_inline)) {
                                store_column(unsplit(split, column), to + sum_by_sum(k, groups) * LANES, panel_stride);
                            });
            n += LANES;
            to += panel_stride;
            continue;
        }
#endif
        pack_panel(w, n, to);
    }
}

}  // namespace dsv4::DSV4_ISA
