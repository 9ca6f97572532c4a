// The register micro-kernel of every product with packed panels: R rows times P panels of 16 columns, in R * P
// accumulators.
#pragma once

#include <utility>

#include "base/simd.h"

namespace dsv4::DSV4_ISA {

// R rows, `stride` apart, with one pointer per three rows: one per row would not fit the registers.
template <int R>
struct StridedRows {
    const float* third[(R + 2) / 3];
    int64_t stride;

    StridedRows(const float* rows, int64_t stride_) : stride(stride_) {
        for (int i = 0; 3 * i < R; ++i) third[i] = rows + 3 * i * stride;
    }
    [[gnu::always_inline]] const float& at(int row) const { return third[row / 3][row % 3 * stride]; }
    [[gnu::always_inline]] void advance(int64_t step) {
        for (const float*& row : third) row += step;
    }
};

// Rows at arbitrary addresses.
struct RowPointers {
    const float* const* rows;
    int64_t k = 0;

    [[gnu::always_inline]] const float& at(int row) const { return rows[row][k]; }
    [[gnu::always_inline]] void advance(int64_t step) { k += step; }
};

// c + a * b; with PAIRS, c + the product of the upper BF16 halves + that of the lower halves.
template <bool PAIRS>
[[gnu::always_inline]] inline V multiply_add(V a, V b, V c) {
#if defined(DSV4_ISA_AVX512_BF16)
    if constexpr (PAIRS)
        return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
#endif
    return fma(a, b, c);
}

template <int R, int P>
[[gnu::always_inline]] inline void clear(V (&acc)[R][P]) {
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) acc[r][p] = zero();
}

// Continues the chains of acc[r][p] over k in [0, steps): adds row r's element k * step times row k of panel p. steps
// is a multiple of UNROLL; panels are [steps][16], panel_stride apart.
template <int UNROLL, bool PAIRS = false, int R, int P, class Rows>
[[gnu::always_inline]] inline void multiply_panels(V (&acc)[R][P], Rows& rows, int64_t step, int64_t steps,
                                                   const float* panel, int64_t panel_stride) {
    for (int64_t k = 0; k < steps; k += UNROLL) {
#pragma GCC unroll 4
        for (int u = 0; u < UNROLL; ++u, panel += LANES, rows.advance(step)) {
            V b[P];
            for (int p = 0; p < P; ++p) b[p] = load(panel + p * panel_stride);
            for (int r = 0; r < R; ++r) {
                const V a = set1(rows.at(r));
                for (int p = 0; p < P; ++p) acc[r][p] = multiply_add<PAIRS>(a, b[p], acc[r][p]);
            }
        }
    }
}

// Calls f(std::integral_constant<int, count>) for a count in [1, MAX].
template <int MAX, class F>
[[gnu::always_inline]] inline void with_count(int count, F&& f) {
    [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
        (void)((count == I + 1 && (f(std::integral_constant<int, I + 1>{}), true)) || ...);
    }(std::make_integer_sequence<int, MAX>{});
}

// Height of the next block of rows, at most MAX, such that the remaining rows form blocks of about equal height.
template <int MAX>
inline int next_rows(int64_t left) {
    const int64_t blocks = (left + MAX - 1) / MAX;
    return static_cast<int>((left + blocks - 1) / blocks);
}

}  // namespace dsv4::DSV4_ISA
