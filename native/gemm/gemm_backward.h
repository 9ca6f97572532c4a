// Products of training: rows in groups, each group with its own weight; y = x W^T, and its gradients dx = dy W, dW = dy^T x.
//
// An element of a gradient is a sum over terms: the outputs for dx, the group's rows for dW, ascending. Each TERMS of them
// are one chain of fused multiply-adds from zero, and the chains' sums are added in order. So an element depends on its own row
// and column of the factors alone, whatever the tiles and threads.
#pragma once

#include <array>
#include <utility>

#include "gemm/gemm.h"

namespace dsv4::DSV4_ISA {

constexpr int64_t TERMS = 256;
constexpr int64_t SUM_COLUMNS = 256;  // packed at a time: TERMS of them stay in the second-level cache

// y[i][j] = the sum over t of a[i * item + t * term] * b[t][j]; the terms are b's outputs, the columns its inputs.
struct Sum {
    const float* a;
    int64_t items, item, term;
    Weight b;
    Rows y;
};

// R items times P neighbouring panels of 16 columns, one chain over the terms; added to y where `add_to` is set. Item r
// of a term is at a[r * item].
template <int R, int P>
inline void sum_tile(const float* a, int64_t item, int64_t term, int64_t terms, const float* panel, int64_t apart,
                     float* const* y, int columns, bool add_to) {
    V acc[R][P];
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) acc[r][p] = zero();
    Thirds<R> items(a, item);
    for (int64_t t = 0; t < terms; ++t, items.advance(term), panel += LANES) {
        V b[P];
        for (int p = 0; p < P; ++p) b[p] = load(panel + p * apart);
        for (int r = 0; r < R; ++r) {
            V own = set1(items.of(r));
            for (int p = 0; p < P; ++p) acc[r][p] = fma(own, b[p], acc[r][p]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) {
            int left = std::min(columns - p * LANES, LANES);
            if (left <= 0) continue;
            float* to = y[r] + p * LANES;
            store_n(to, add_to ? add(load_n(to, left), acc[r][p]) : acc[r][p], left);
        }
}

using SumTile = void (*)(const float*, int64_t, int64_t, int64_t, const float*, int64_t, float* const*, int, bool);
template <int P, int... R>
constexpr std::array<SumTile, sizeof...(R)> sum_tiles(std::integer_sequence<int, R...>) {
    return {&sum_tile<R + 1, P>...};
}
// Tiles of 1 to TILE_ROWS items.
template <int P>
inline constexpr auto SUM_TILES = sum_tiles<P>(std::make_integer_sequence<int, TILE_ROWS>());

// Terms [t0, t1), columns [j0, j1) of b -> panels [t1 - t0][16], padded with zeros.
inline void pack_terms(const Weight& b, int64_t t0, int64_t t1, int64_t j0, int64_t j1, float* to) {
    alignas(64) float widened[SUM_COLUMNS];
    const int64_t apart = (t1 - t0) * LANES;
    for (int64_t t = t0; t < t1; ++t, to += LANES) {
        const float* row = reinterpret_cast<const float*>(b.data + t * b.stride) + j0;
        if (b.kind != Kind::f32) widen_row(b, t, j0, j1, widened), row = widened;
        int64_t j = 0;
        for (; j + LANES <= j1 - j0; j += LANES) store(to + j / LANES * apart, load(row + j));
        if (j < j1 - j0) store(to + j / LANES * apart, load_n(row + j, static_cast<int>(j1 - j0 - j)));
    }
}

// Sixteen items from item i on of terms [t0, t1) that lie side by side -> [t1 - t0][16]; those from item i1 on are not read.
inline void pack_items(const Sum& s, int64_t i, int64_t i1, int64_t t0, int64_t t1, float* to) {
    const int count = static_cast<int>(std::min<int64_t>(LANES, i1 - i));
    for (int64_t t = t0; t < t1; ++t, to += LANES) store(to, load_n(s.a + t * s.term + i * s.item, count));
}

// Items [i0, i1) and columns [j0, j1) of a sum, SUM_COLUMNS columns at most.
inline void part_of_sum(const Sum& s, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    const int64_t terms = s.b.out, panels = (j1 - j0 + LANES - 1) / LANES;
    float* packed = aligned_scratch(Scratch::packed, (panels + TILE_PANELS) * std::min(terms, TERMS) * LANES);
    float* side = aligned_scratch(Scratch::rows, TERMS * LANES);
    int64_t t0 = 0;
    do {  // without a term, once: the sum is zero
        const int64_t t1 = std::min(terms, t0 + TERMS), apart = (t1 - t0) * LANES;
        pack_terms(s.b, t0, t1, j0, j1, packed);
        for (int64_t i = i0; i < i1;) {
            const int count = next_rows(i1 - i);
            const float* a = s.a + i * s.item + t0 * s.term;
            int64_t item = s.item, term = s.term;
            if (item == 1) pack_items(s, i, s.items, t0, t1, side), a = side, term = LANES;
            for (int64_t p = 0; p < panels; p += TILE_PANELS) {
                float* y[TILE_ROWS];
                for (int r = 0; r < count; ++r) y[r] = s.y.data + (i + r) * s.y.stride + j0 + p * LANES;
                const int columns = static_cast<int>(j1 - j0 - p * LANES);
                const auto& tiles = columns <= LANES ? SUM_TILES<1> : SUM_TILES<TILE_PANELS>;
                tiles[static_cast<size_t>(count - 1)](a, item, term, t1 - t0, packed + p * apart, apart, y, columns, t0 > 0);
            }
            i += count;
        }
        t0 = t1;
    } while (t0 < terms);
}

inline void sums(const std::vector<Sum>& list) {
    struct Share {
        const Sum* of;
        int64_t i0, i1, j0, j1;
    };
    std::vector<Share> parts;
    int64_t work = 0;
    for (const Sum& s : list) work += s.items * s.b.in * s.b.out;
    const int64_t target = std::max<int64_t>(1, work / (thread_count() * 4));
    for (const Sum& s : list)
        for (int64_t j0 = 0; j0 < s.b.in; j0 += SUM_COLUMNS) {
            int64_t j1 = std::min(s.b.in, j0 + SUM_COLUMNS);
            // Fewer items than these are not worth packing the columns for.
            int64_t high = std::max<int64_t>(16 * TILE_ROWS, target / std::max<int64_t>(1, (j1 - j0) * s.b.out));
            if (thread_count() == 1) high = s.items;
            high = (high + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
            for (int64_t i0 = 0; i0 < s.items; i0 += high) parts.push_back({&s, i0, std::min(s.items, i0 + high), j0, j1});
        }
    parallel(static_cast<int64_t>(parts.size()), [&](int64_t task, int) {
        const Share& part = parts[static_cast<size_t>(task)];
        part_of_sum(*part.of, part.i0, part.i1, part.j0, part.j1);
    });
}

// y of each group, added in the order of gemm/accumulation_order.h.
inline void grouped_products(const Group* groups, int64_t count) {
    std::vector<Part> parts;
    for (const Group* of = groups; of < groups + count; ++of) {
        const int64_t wide = columns_at_once(of->w.in), out = of->rows ? of->w.out : 0;
        for (int64_t n = 0; n < out; n += wide) parts.push_back({&of->w, of->x, of->y, 0, of->rows, n, std::min(out, n + wide)});
    }
    run(parts);
}

// dx into x, from dy in y.
inline void input_gradients(const Group* groups, int64_t count) {
    std::vector<Sum> list;
    for (int64_t g = 0; g < count; ++g) {
        const Group& of = groups[g];
        list.push_back({of.y.data, of.rows, of.y.stride, 1, of.w, of.x});
    }
    sums(list);
}

// dW of each group, from x and from dy in y, into `gradients`; none where the pointer is null. A weight is its shape here.
inline void weight_gradients(const Group* groups, int64_t count, float* const* gradients) {
    std::vector<Sum> list;
    for (int64_t g = 0; g < count; ++g) {
        const Group& of = groups[g];
        if (!gradients[g]) continue;
        Weight rows;
        rows.data = reinterpret_cast<const uint8_t*>(of.x.data);
        rows.out = of.rows, rows.in = of.w.in, rows.stride = of.x.stride * static_cast<int64_t>(sizeof(float));
        list.push_back({of.y.data, of.w.out, 1, of.y.stride, rows, {gradients[g], of.w.in}});
    }
    sums(list);
}

}  // namespace dsv4::DSV4_ISA
