// Products on AMX, the matrix unit that multiplies BF16 tiles of 16 x 32 and accumulates in fp32.
//
// An fp32 value splits exactly into three BF16 terms (hi, mid, lo). FP4 and BF16 weights, FP8 weights with power-of-two
// scales and rows rounded to FP8 are hi alone. The terms of x are multiplied separately and added last. FP32 weights
// use the kernels of gemm.h: splitting them would take longer than multiplying them.
//
// Order of an element's sums, as TDPBF16PS fixes it (Intel's manual): each term of x has an accumulator that starts
// from zero. For each group of 32 inputs, and in it each term of the weight from hi to lo, it adds one number: the
// chain of the even inputs plus the chain of the odd ones, each from zero. The result is hi + (mid + lo), or hi alone
// if hi is not finite, so it does not depend on whether other rows of a block needed three terms. Tiles flush numbers
// below 2^-126 to zero.
//
// The second factor of a tile product is in VNNI layout: pairs of inputs of 16 columns. Few rows are transposed to it
// (gemm_amx_skinny.h); for many rows the weight is. Both ways give the same bits.
#pragma once

#include "gemm/gemm_amx_skinny.h"

#if defined(DSV4_ISA_AMX)

namespace dsv4::DSV4_ISA {

constexpr int64_t BLOCK_ROWS = 48;        // three tiles of rows
constexpr int64_t CACHE_WORDS = 1 << 18;  // 512 KB of second-level cache

// Multiplies X tiles of rows (the terms of 16 rows, or with one term 16 rows each) by a packed weight.
template <int X>
inline void multiply_packed(const uint16_t* const* x, int64_t stride, int64_t rows, int terms, const uint16_t* packed,
                            const Weight& w, int64_t n0, int64_t n1, float* const* y) {
    const int64_t groups = groups_of(w.in);
    const int w_terms = weight_terms(w);
    alignas(64) float sums[X * 2][LANES * LANES];
    auto multiply_panels = [&](auto panels, int64_t n) __attribute__((always_inline)) {
        constexpr int W = decltype(panels)::value;
        const uint16_t* panel[W];
        for (int j = 0; j < W; ++j) panel[j] = packed + ((n - n0) / LANES + j) * groups * w_terms * TILE_WORDS;
        unroll<X * W>([&](auto t) __attribute__((always_inline)) { tile_zero<decltype(t)::value>(); });
        multiply_tiles<X, W, false>(x, {GROUP, 2 * stride}, panel, {TILE_WORDS, 64}, w_terms, groups);
        store_tiles<X, W>(sums);
        for (int j = 0; j < W; ++j) {
            const int left = static_cast<int>(std::min<int64_t>(LANES, n1 - n - j * LANES));
            for (int64_t r = 0; r < rows; ++r) {
                const float* hi = sums[(terms == 1 ? r / LANES : 0) * W + j] + r % LANES * LANES;
                __m512 sum = _mm512_loadu_ps(hi), rest = _mm512_setzero_ps();
                if (terms > 1) {
                    const float *mid = hi + W * LANES * LANES, *lo = mid + W * LANES * LANES;
                    rest = _mm512_maskz_add_ps(finite(sum), _mm512_loadu_ps(mid), _mm512_loadu_ps(lo));
                }
                store_n(y[r] + n + j * LANES, {_mm512_add_ps(sum, rest)}, left);
            }
        }
    };
    for (int64_t n = n0; n < n1; n += 2 * LANES)
        if (n + LANES < n1)
            multiply_panels(std::integral_constant<int, 2>{}, n);
        else
            multiply_panels(std::integral_constant<int, 1>{}, n);
}

// Packs outputs [n0, n1) of a weight, n0 a multiple of 16, into panels of 16 outputs: per group weight_terms(w) tiles
// in VNNI layout.
template <Kind kind>
inline void pack_tiles(const Weight& w, int64_t n0, int64_t n1, uint16_t* to) {
    const int64_t groups = groups_of(w.in), terms = weight_terms(w);
    for (int64_t n = n0; n < n1; n += LANES) {
        const AmxPanel<kind> panel(w, n);
        for (int64_t g = 0; g < groups; ++g) {
            alignas(64) uint16_t tiles[MAX_TERMS * TILE_WORDS];
            terms == 1 ? dequantize_tile<kind, 1>(w, panel, n, g, tiles)
                       : dequantize_tile<kind, MAX_TERMS>(w, panel, n, g, tiles);
            for (int64_t p = 0; p < terms; ++p, to += TILE_WORDS) {
                const uint16_t* row[LANES];
                for (int j = 0; j < LANES; ++j) row[j] = tiles + p * TILE_WORDS + j * GROUP;
                transpose_16x16_pairs(row, to);
            }
        }
    }
}

// Products of many rows: the weight is packed in blocks that fit the second-level cache.
template <Kind kind>
inline void gemm_amx_packed(const float* const* x, int64_t rows, const Weight& w, int64_t n0, int64_t n1,
                            float* const* y) {
    const int64_t groups = groups_of(w.in), panel = groups * weight_terms(w) * TILE_WORDS;
    const int64_t stride =
        (groups | 1) * GROUP;  // odd: rows a power of two apart would share sets of the first-level cache
    const int64_t height = std::max(3 * BLOCK_ROWS, 2 * CACHE_WORDS / (MAX_TERMS * stride) / BLOCK_ROWS * BLOCK_ROWS);
    const int64_t width = std::max<int64_t>(2, CACHE_WORDS / std::max<int64_t>(1, panel)) * LANES;
    const Weight columns = w.rows(0, n1);
    for (int64_t r0 = 0; r0 < rows; r0 += height) {
        const int64_t count = std::min(height, rows - r0), term_stride = (count + LANES - 1) / LANES * LANES * stride;
        uint16_t* split = scratch<uint16_t>(Scratch::staging, MAX_TERMS * term_stride);
        const int terms = split_rows(x + r0, count, w.in, split, term_stride, stride);
        for (int64_t n = n0; n < n1; n += width) {
            const int64_t stop = std::min(n1, n + width);
            uint16_t* packed = scratch<uint16_t>(Scratch::packed, (stop - n + LANES - 1) / LANES * panel);
            pack_tiles<kind>(columns, n, stop, packed);
            const int64_t step = terms == 1 ? BLOCK_ROWS : LANES;
            for (int64_t r = 0; r < count; r += step) {
                const int64_t some = std::min(step, count - r);
                const uint16_t* tile[MAX_TERMS];
                for (int i = 0; i < MAX_TERMS; ++i)
                    tile[i] = split + r * stride + i * (terms == 1 ? LANES * stride : term_stride);
                float* const* out = y + r0 + r;
                switch (terms == 1 ? (some + LANES - 1) / LANES : MAX_TERMS) {
                    case 1: multiply_packed<1>(tile, stride, some, terms, packed, w, n, stop, out); break;
                    case 2: multiply_packed<2>(tile, stride, some, terms, packed, w, n, stop, out); break;
                    default: multiply_packed<3>(tile, stride, some, terms, packed, w, n, stop, out);
                }
            }
        }
    }
}

// Multiplies rows x[0..rows) by outputs [n0, n1) of a weight, into y[r] + n0.
inline void gemm_amx(const float* const* x, int64_t rows, const Weight& w, int64_t n0, int64_t n1, float* const* y) {
    thread_local SkinnyRows skinny;
    if (rows <= MAX_COLUMNS && skinny.pack(x, rows, w.in)) return gemm_amx_skinny(skinny, w, n0, n1, y);
    TileUnit tiles(WIDE_TILES);
    with_kind(w.kind, [&](auto kind) { gemm_amx_packed<decltype(kind)::value>(x, rows, w, n0, n1, y); });
}

}  // namespace dsv4::DSV4_ISA

#endif
