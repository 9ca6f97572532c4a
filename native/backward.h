// Products of training: rows in groups, each group with its own weight; y = x W^T, and its gradients dx = dy W, dW = dy^T x.
//
// An element of a gradient is a sum over terms: the outputs for dx, the group's rows for dW, ascending. Each TERMS of them
// are one chain of fused multiply-adds from zero, and the chains' sums are added in order. So an element depends on its own row
// and column of the factors alone, whatever the tiles and threads.
#pragma once

#include <array>
#include <utility>

#include "linear.h"

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

// R items times P neighbouring panels of 16 columns, one chain over the terms; added to y where `add_to` is set.
template <int R, int P>
inline void sum_tile(const float* const* a, int64_t term, int64_t terms, const float* panel, int64_t apart, float* const* y,
                     int columns, bool add_to) {
    V acc[R][P];
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) acc[r][p] = zero();
    const float* from[R];
    for (int r = 0; r < R; ++r) from[r] = a[r];
    for (int64_t t = 0, at = 0; t < terms; ++t, at += term, panel += LANES) {
        V b[P];
        for (int p = 0; p < P; ++p) b[p] = load(panel + p * apart);
        for (int r = 0; r < R; ++r) {
            V own = set1(from[r][at]);
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

using SumTile = void (*)(const float* const*, int64_t, int64_t, const float*, int64_t, float* const*, int, bool);
template <int P, int... R>
constexpr std::array<SumTile, sizeof...(R)> sum_tiles(std::integer_sequence<int, R...>) {
    return {&sum_tile<R + 1, P>...};
}
// Tiles of 1 to TILE_ROWS items.
template <int P>
inline constexpr auto SUM_TILES = sum_tiles<P>(std::make_integer_sequence<int, TILE_ROWS>());

// Memory of this thread that begins a cache line.
inline float* aligned_scratch(Scratch place, int64_t size) {
    float* own = scratch(place, size + LANES);
    return own + (64 - reinterpret_cast<uintptr_t>(own) % 64) % 64 / sizeof(float);
}

// Terms [t0, t1), columns [j0, j1) of b -> panels [t1 - t0][16], padded with zeros.
inline void pack_terms(const Weight& b, int64_t t0, int64_t t1, int64_t j0, int64_t j1, float* to) {
    alignas(64) float row[SUM_COLUMNS];
    const int64_t apart = (t1 - t0) * LANES, padded = (j1 - j0 + LANES - 1) / LANES * LANES;
    std::fill_n(row + (j1 - j0), padded - (j1 - j0), 0.0f);
    for (int64_t t = t0; t < t1; ++t, to += LANES) {
        widen_row(b, t, j0, j1, row);
        for (int64_t j = 0; j < padded; j += LANES) store(to + j / LANES * apart, load(row + j));
    }
}

// Items [i0, i1) and columns [j0, j1) of a sum, SUM_COLUMNS columns at most.
inline void part_of_sum(const Sum& s, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    const int64_t terms = s.b.out, panels = (j1 - j0 + LANES - 1) / LANES;
    float* packed = aligned_scratch(Scratch::packed, (panels + TILE_PANELS) * std::min(terms, TERMS) * LANES);
    float* turned = aligned_scratch(Scratch::rows, TERMS * LANES);
    int64_t t0 = 0;
    do {  // without a term, once: the sum is zero
        const int64_t t1 = std::min(terms, t0 + TERMS), apart = (t1 - t0) * LANES;
        pack_terms(s.b, t0, t1, j0, j1, packed);
        for (int64_t i = i0; i < i1;) {
            int count = next_rows(i1 - i);
            const float* a[TILE_ROWS];
            float* y[TILE_ROWS];
            int64_t term = s.term;
            for (int r = 0; r < count; ++r) a[r] = s.a + (i + r) * s.item + t0 * s.term;
            if (s.item == 1 && s.term != 1) {  // items lie side by side: a term's are copied to one place for all panels
                const int take = i + LANES <= s.items ? LANES : count;
                for (int64_t t = t0; t < t1; ++t) store(turned + (t - t0) * LANES, load_n(s.a + t * s.term + i, take));
                for (int r = 0; r < count; ++r) a[r] = turned + r;
                term = LANES;
            }
            for (int64_t p = 0; p < panels; p += TILE_PANELS) {
                for (int r = 0; r < count; ++r) y[r] = s.y.data + (i + r) * s.y.stride + j0 + p * LANES;
                int columns = static_cast<int>(j1 - j0 - p * LANES);
                const auto& tiles = columns <= LANES ? SUM_TILES<1> : SUM_TILES<TILE_PANELS>;
                tiles[static_cast<size_t>(count - 1)](a, term, t1 - t0, packed + p * apart, apart, y, columns, t0 > 0);
            }
            i += count;
        }
        t0 = t1;
    } while (t0 < terms);
}

inline void sums(const std::vector<Sum>& list) {
    struct Part {
        const Sum* of;
        int64_t i0, i1, j0, j1;
    };
    std::vector<Part> parts;
    int64_t work = 0;
    for (const Sum& s : list) work += s.items * s.b.in * s.b.out;
    const int64_t target = std::max<int64_t>(1, work / (thread_count() * 4));
    for (const Sum& s : list)
        for (int64_t j0 = 0; j0 < s.b.in; j0 += SUM_COLUMNS) {
            int64_t j1 = std::min(s.b.in, j0 + SUM_COLUMNS);
            // Fewer items than these are not worth packing the columns for.
            int64_t high = std::max<int64_t>(8 * TILE_ROWS, target / std::max<int64_t>(1, (j1 - j0) * s.b.out));
            if (thread_count() == 1) high = s.items;
            high = (high + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
            for (int64_t i0 = 0; i0 < s.items; i0 += high) parts.push_back({&s, i0, std::min(s.items, i0 + high), j0, j1});
        }
    parallel(static_cast<int64_t>(parts.size()), [&](int64_t task, int) {
        const Part& part = parts[static_cast<size_t>(task)];
        part_of_sum(*part.of, part.i0, part.i1, part.j0, part.j1);
    });
}

// y of each group, added in the order of order.h.
inline void grouped_products(const Group* groups, int64_t count) {
    struct Part {
        const Group* of;
        int64_t n0, n1;
    };
    std::vector<Part> parts;
    for (const Group* of = groups; of < groups + count; ++of)
        for (int64_t n = 0; of->rows && n < of->w.out; n += 128) parts.push_back({of, n, std::min(of->w.out, n + 128)});
    parallel(static_cast<int64_t>(parts.size()), [&](int64_t task, int) {
        const Part& part = parts[static_cast<size_t>(task)];
        std::vector<const float*> x;
        std::vector<float*> y;
        for (int64_t r = 0; r < part.of->rows; ++r) {
            x.push_back(part.of->x.data + r * part.of->x.stride);
            y.push_back(part.of->y.data + r * part.of->y.stride);
        }
        block_product(x.data(), part.of->rows, part.of->w, part.n0, part.n1, y.data());
    });
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
