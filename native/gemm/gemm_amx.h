// Products on the matrix unit of processors with AMX, which multiplies BF16 tiles of 16 x 32 and adds in fp32.
//
// A number is the sum of three BF16 numbers, to its last bit: high, middle and low part. Weights in FP4, BF16 and FP8 with
// power-of-two scales are their high part alone, and so are rows rounded to FP8. The parts of x are multiplied apart and joined
// last. FP32 weights stay with gemm/gemm.h: taking them apart would take longer than multiplying them.
//
// Order of an element, for each part of x: from zero, group after group of 32 inputs and in a group the weight's parts from
// high to low, adds one number: the chain of its even inputs from zero plus the chain of its odd ones. The three are joined as
// high + (middle + low), or the high one alone counts where it is not finite: then it does not matter whether other rows of a
// block needed three parts. Tiles take numbers below 2^-126 for zero. The order is what the unit does (Intel's manual,
// TDPBF16PS).
//
// A tile's second factor holds pairs of inputs side by side: 16 of them for each of 16 columns. Where rows are few they are
// turned for it, where they are many the weight is. Both ways give the same bits.
#pragma once

#include "gemm/gemm_amx_skinny.h"

#if defined(DSV4_ISA_AMX)

namespace dsv4::DSV4_ISA {

constexpr int64_t BLOCK_ROWS = 48;        // three tiles of rows
constexpr int64_t CACHE_WORDS = 1 << 18;  // what half a megabyte of second-level cache holds

// X tiles of rows, the parts of 16 rows or (parts 1) 16 rows each, times panels of a turned weight.
template <int X>
inline void many_rows(const uint16_t* const* x, int64_t stride, int64_t rows, int parts, const uint16_t* turned, const Weight& w,
                      int64_t n0, int64_t n1, float* const* y) {
    const int64_t groups = groups_of(w.in);
    const int weight = weight_parts(w);
    alignas(64) float sums[X * 2][LANES * LANES];
    auto take = [&](auto panels, int64_t n) __attribute__((always_inline)) {
        constexpr int W = decltype(panels)::value;
        const uint16_t* panel[W];
        for (int j = 0; j < W; ++j) panel[j] = turned + ((n - n0) / LANES + j) * groups * weight * TILE_WORDS;
        each<X * W>([&](auto t) __attribute__((always_inline)) { tile_zero<decltype(t)::value>(); });
        add_tiles<X, W, false>(x, {GROUP, 2 * stride}, panel, {TILE_WORDS, 64}, weight, groups);
        take_tiles<X, W>(sums);
        for (int j = 0; j < W; ++j) {
            const int left = static_cast<int>(std::min<int64_t>(LANES, n1 - n - j * LANES));
            for (int64_t r = 0; r < rows; ++r) {
                const float* high = sums[(parts == 1 ? r / LANES : 0) * W + j] + r % LANES * LANES;
                __m512 sum = _mm512_loadu_ps(high), rest = _mm512_setzero_ps();
                if (parts > 1) {
                    const float *middle = high + W * LANES * LANES, *low = middle + W * LANES * LANES;
                    rest = _mm512_maskz_add_ps(finite(sum), _mm512_loadu_ps(middle), _mm512_loadu_ps(low));
                }
                store_n(y[r] + n + j * LANES, {_mm512_add_ps(sum, rest)}, left);
            }
        }
    };
    for (int64_t n = n0; n < n1; n += 2 * LANES)
        if (n + LANES < n1)
            take(std::integral_constant<int, 2>{}, n);
        else
            take(std::integral_constant<int, 1>{}, n);
}

template <Kind kind>
inline void many_rows_product(const float* const* x, int64_t rows, const Weight& w, int64_t n0, int64_t n1, float* const* y) {
    const int64_t groups = groups_of(w.in), weight = weight_parts(w), panel = groups * weight * TILE_WORDS;
    const int64_t stride = (groups | 1) * GROUP;  // odd: rows a power of two apart would share places in the first-level cache
    const int64_t height = std::max(3 * BLOCK_ROWS, 2 * CACHE_WORDS / (MOST_PARTS * stride) / BLOCK_ROWS * BLOCK_ROWS);
    const int64_t width = std::max<int64_t>(2, CACHE_WORDS / std::max<int64_t>(1, panel)) * LANES;
    const Weight columns = w.rows(0, n1);
    for (int64_t r0 = 0; r0 < rows; r0 += height) {
        const int64_t tall = std::min(height, rows - r0), apart = (tall + LANES - 1) / LANES * LANES * stride;
        uint16_t* taken = aligned_words(Scratch::wide, MOST_PARTS * apart);
        const int parts = split_rows(x + r0, tall, w.in, taken, apart, stride) ? MOST_PARTS : 1;
        for (int64_t n = n0; n < n1; n += width) {
            const int64_t stop = std::min(n1, n + width);
            uint16_t* turned = aligned_words(Scratch::packed, (stop - n + LANES - 1) / LANES * panel);
            uint16_t* to = turned;
            for (int64_t m = n; m < stop; m += LANES) {
                const Panel<kind> outputs(columns, m);
                for (int64_t g = 0; g < groups; ++g) {
                    alignas(64) uint16_t tiles[MOST_PARTS * TILE_WORDS];
                    weight == 1 ? widen<kind, 1>(columns, outputs, m, g, tiles) : widen<kind, MOST_PARTS>(columns, outputs, m, g, tiles);
                    for (int64_t p = 0; p < weight; ++p, to += TILE_WORDS) {
                        const uint16_t* row[LANES];
                        for (int j = 0; j < LANES; ++j) row[j] = tiles + p * TILE_WORDS + j * GROUP;
                        turn_pairs(row, to);
                    }
                }
            }
            const int64_t step = parts == 1 ? BLOCK_ROWS : LANES;
            for (int64_t r = 0; r < tall; r += step) {
                const int64_t count = std::min(step, tall - r);
                const uint16_t* tile[MOST_PARTS];
                for (int i = 0; i < MOST_PARTS; ++i) tile[i] = taken + r * stride + i * (parts == 1 ? LANES * stride : apart);
                float* const* out = y + r0 + r;
                switch (parts == 1 ? (count + LANES - 1) / LANES : MOST_PARTS) {
                    case 1: many_rows<1>(tile, stride, count, parts, turned, w, n, stop, out); break;
                    case 2: many_rows<2>(tile, stride, count, parts, turned, w, n, stop, out); break;
                    default: many_rows<3>(tile, stride, count, parts, turned, w, n, stop, out);
                }
            }
        }
    }
}

// Rows x[0..rows) times outputs [n0, n1) of a weight, into y[r] + n0.
inline void tiles_product(const float* const* x, int64_t rows, const Weight& w, int64_t n0, int64_t n1, float* const* y) {
    thread_local FewRows few;
    if (rows <= MOST_COLUMNS && few.take(x, rows, w.in)) return few_rows_product(few, w, n0, n1, y);
    Tiles tiles(WIDE_TILES);
    with_kind(w.kind, [&](auto kind) { many_rows_product<decltype(kind)::value>(x, rows, w, n0, n1, y); });
}

}  // namespace dsv4::DSV4_ISA

#endif
