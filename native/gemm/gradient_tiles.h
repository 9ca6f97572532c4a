// Gradients of products on AMX, of factors rounded to BF16: as gemm_backward.h, but a block of TERM_BLOCK terms is
// summed as TDPBF16PS does. From zero, each group of 32 terms adds one number: the chain of its even terms plus that of
// its odd ones, each from zero. The blocks' sums are added in order.
#pragma once

#include "gemm/gradient_pairs.h"
#include "gemm/gradient_sum.h"

#if defined(DSV4_ISA_AMX)

#include "gemm/amx.h"

namespace dsv4::DSV4_ISA {

constexpr int64_t ITEM_ROWS = 48;  // three tiles of items

// Packs terms [t0, t1), columns [j0, j1) of b into panels of 16 columns: a tile in VNNI layout for each group of terms,
// padded with zeros.
inline void pack_term_tiles(const Weight& b, int64_t t0, int64_t t1, int64_t j0, int64_t j1, uint16_t* to) {
    alignas(64) float values[2][SUM_COLUMNS];
    const int64_t groups = groups_of(t1 - t0), panels = (j1 - j0 + LANES - 1) / LANES;
    for (int64_t pair = 0; pair < groups * LANES; ++pair) {
        const int64_t t = t0 + 2 * pair;
        const float *row = t < t1 ? read_term(b, t, j0, j1, values[0]) : nullptr, *next = nullptr;
        if (t + 1 < t1) next = read_term(b, t + 1, j0, j1, values[1]);
        for (int64_t p = 0; p < panels; ++p) {
            const int64_t j = p * LANES;
            const int left = static_cast<int>(std::min<int64_t>(LANES, j1 - j0 - j));
            const V own = row ? load_n(row + j, left) : zero(), other = next ? load_n(next + j, left) : zero();
            store(reinterpret_cast<float*>(to + (p * groups * LANES + pair) * GROUP), round_pairs(own, other));
        }
    }
}

// Packs terms [t0, t1) of items [i, i + count) into tiles of 16 items, one for each group of terms.
inline void pack_item_tiles(const Sum& s, int64_t i, int64_t count, int64_t t0, int64_t t1, uint16_t* to) {
    const int64_t groups = groups_of(t1 - t0);
    const float* a = s.a + i * s.item + t0 * s.term;
    if (s.item != 1) {  // an item's terms lie side by side
        for (int64_t r = 0; r < count; ++r)
            for (int64_t g = 0; g < groups; ++g) {
                const float* from = a + r * s.item + g * GROUP;
                const int64_t left = t1 - t0 - g * GROUP;
                const __m512 low = load_padded(from, left), high = load_padded(from + LANES, left - LANES);
                uint16_t* tile = to + (r / LANES * groups + g) * TILE_WORDS;
                _mm512_store_si512(tile + r % LANES * GROUP, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
            }
        return;
    }
    for (int64_t r = 0; r < count; r += LANES)
        for (int64_t g = 0; g < groups; ++g, to += TILE_WORDS) {
            alignas(64) uint16_t pairs[LANES][GROUP];
            const uint16_t* row[LANES];
            const int some = static_cast<int>(std::min<int64_t>(LANES, count - r));
            for (int64_t k = 0; k < LANES; ++k) {
                const int64_t t = g * GROUP + 2 * k;
                const float* from = a + r + t * s.term;
                const V own = t0 + t < t1 ? load_n(from, some) : zero();
                const V next = t0 + t + 1 < t1 ? load_n(from + s.term, some) : zero();
                store(reinterpret_cast<float*>(pairs[k]), round_pairs(own, next));
                row[k] = pairs[k];
            }
            transpose_16x16_pairs(row, to);
        }
}

// Products of X tiles of items and W panels over `groups` groups of terms, to y[r * y_stride + column]; added to it if
// `add_to` is set.
template <int X, int W>
inline void multiply_gradient_tiles(const uint16_t* items, const uint16_t* panels, int64_t groups, int64_t count,
                                    int64_t columns, float* y, int64_t y_stride, bool add_to) {
    alignas(64) float sums[X * W][LANES * LANES];
    const uint16_t *item[X], *panel[W];
    for (int x = 0; x < X; ++x) item[x] = items + x * groups * TILE_WORDS;
    for (int w = 0; w < W; ++w) panel[w] = panels + w * groups * TILE_WORDS;
    unroll<X * W>([&](auto t) __attribute__((always_inline)) { tile_zero<decltype(t)::value>(); });
    multiply_tiles<X, W, false>(item, {TILE_WORDS, 64}, panel, {TILE_WORDS, 64}, 1, groups);
    store_tiles<X, W>(sums);
    for (int64_t r = 0; r < count; ++r)
        for (int w = 0; w < W; ++w) {
            const int left = static_cast<int>(std::min<int64_t>(LANES, columns - w * LANES));
            float* to = y + r * y_stride + w * LANES;
            const V sum = load(sums[r / LANES * W + w] + r % LANES * LANES);
            store_n(to, add_to ? add(load_n(to, left), sum) : sum, left);
        }
}

// Computes items [i0, i1), columns [j0, j1) of a sum of factors rounded to BF16, at most SUM_COLUMNS columns.
inline void sum_tiles(const Sum& s, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    const int64_t terms = s.b.out, panels = (j1 - j0 + LANES - 1) / LANES;
    const int64_t most = groups_of(std::min(terms, TERM_BLOCK));
    uint16_t* packed = scratch<uint16_t>(Scratch::packed, panels * most * TILE_WORDS);
    uint16_t* items = scratch<uint16_t>(Scratch::rows, ITEM_ROWS / LANES * most * TILE_WORDS);
    TileUnit tiles(WIDE_TILES);
    int64_t t0 = 0;
    do {  // once even without terms: the sum is then zero
        const int64_t t1 = std::min(terms, t0 + TERM_BLOCK), groups = groups_of(t1 - t0);
        const bool add_to = t0 > 0 || s.more;
        pack_term_tiles(s.b, t0, t1, j0, j1, packed);
        for (int64_t i = i0; i < i1; i += ITEM_ROWS) {
            const int64_t count = std::min(ITEM_ROWS, i1 - i);
            pack_item_tiles(s, i, count, t0, t1, items);
            for (int64_t p = 0; p < panels; p += 2) {
                const int64_t columns = j1 - j0 - p * LANES;
                const uint16_t* panel = packed + p * groups * TILE_WORDS;
                float* y = s.y.data + i * s.y.stride + j0 + p * LANES;
                auto with = [&](auto rows) {
                    constexpr int X = decltype(rows)::value;
                    columns <= LANES
                        ? multiply_gradient_tiles<X, 1>(items, panel, groups, count, columns, y, s.y.stride, add_to)
                        : multiply_gradient_tiles<X, 2>(items, panel, groups, count, columns, y, s.y.stride, add_to);
                };
                switch ((count + LANES - 1) / LANES) {
                    case 1: with(std::integral_constant<int, 1>{}); break;
                    case 2: with(std::integral_constant<int, 2>{}); break;
                    default: with(std::integral_constant<int, 3>{});
                }
            }
        }
        t0 = t1;
    } while (t0 < terms);
}

}  // namespace dsv4::DSV4_ISA

#endif
