// Matrix products. Every element of a product is one chain of fused multiply-adds over the inner index, in ascending
// order, starting from zero: it depends on its row and its column alone, whatever rows, columns or threads there are.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "stored.h"
#include "threads.h"

namespace dsv4::DSV4_ISA {

#if defined(DSV4_ISA_AVX512)
constexpr int TILE_ROWS = 12, TILE_PANELS = 2;
#else
constexpr int TILE_ROWS = 6, TILE_PANELS = 1;
#endif
constexpr int TILE_COLUMNS = TILE_PANELS * LANES;
constexpr int64_t INNER = 256;  // inner indices packed at a time: a panel of them stays in the first-level cache

// R rows times P neighbouring panels. Panels may be packed (step 16, their distance `apart`) or rows of a matrix that
// lie `step` apart, with `apart` 16. y is added to when `more`.
template <int R, int P>
inline void tile(const float* const* x, int64_t inner, const float* panel, int64_t step, int64_t apart, float* const* y,
                 int columns, bool more) {
    V acc[R][P];
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) {
            int left = columns - p * LANES;
            acc[r][p] = !more || left <= 0 ? zero() : left >= LANES ? load(y[r] + p * LANES) : load_n(y[r] + p * LANES, left);
        }
    for (int64_t k = 0; k < inner; ++k) {
        V b[P];
        for (int p = 0; p < P; ++p) b[p] = load(panel + p * apart + k * step);
        for (int r = 0; r < R; ++r) {
            V a = set1(x[r][k]);
            for (int p = 0; p < P; ++p) acc[r][p] = fma(a, b[p], acc[r][p]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) {
            int left = columns - p * LANES;
            if (left >= LANES)
                store(y[r] + p * LANES, acc[r][p]);
            else if (left > 0)
                store_n(y[r] + p * LANES, acc[r][p], left);
        }
}

template <int P>
inline void tile_rows(int rows, const float* const* x, int64_t inner, const float* panel, int64_t step, int64_t apart,
                      float* const* y, int columns, bool more) {
    switch (rows) {
#define DSV4_CASE(R) \
    case R: return tile<R, P>(x, inner, panel, step, apart, y, columns, more)
        DSV4_CASE(1);
        DSV4_CASE(2);
        DSV4_CASE(3);
        DSV4_CASE(4);
        DSV4_CASE(5);
        DSV4_CASE(6);
#if defined(DSV4_ISA_AVX512)
        DSV4_CASE(7);
        DSV4_CASE(8);
        DSV4_CASE(9);
        DSV4_CASE(10);
        DSV4_CASE(11);
        DSV4_CASE(12);
#endif
#undef DSV4_CASE
        default: std::abort();
    }
}

// How many rows the next tile takes, so that the tiles of what is left are of like height.
inline int next_rows(int64_t left) {
    int64_t tiles = (left + TILE_ROWS - 1) / TILE_ROWS;
    return static_cast<int>((left + tiles - 1) / tiles);
}

// One row times outputs [n0, n1), inputs from k0 on, through packed panels; y is added to when k0 > 0.
inline void panel_product(const float* x, const Weight& w, int64_t n0, int64_t n1, int64_t k0, float* y) {
    float* panel = scratch(Scratch::packed, INNER * LANES);
    for (int64_t n = n0; n < n1; n += LANES)
        for (int64_t k = k0; k < w.in; k += INNER) {
            int64_t inner = std::min(INNER, w.in - k);
            const float* from = x + k;
            float* to = y + n;
            pack_panel(w, n, k, inner, panel);
            tile<1, 1>(&from, inner, panel, LANES, 0, &to, static_cast<int>(std::min<int64_t>(LANES, n1 - n)), k > 0);
        }
}

// One row times outputs [n0, n1) of a weight, which is read once: y + n0.
inline void row_product(const float* x, const Weight& w, int64_t n0, int64_t n1, float* y) {
    int64_t n = n0;
#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)
    int64_t even = w.in / input_step(w.kind) * input_step(w.kind);
    for (; n + 2 * LANES <= n1 && takes(w, n); n += 2 * LANES) {
        Column acc;
        for (__m256& v : acc.v) v = _mm256_setzero_ps();
        each_input(w, n, 0, even, [&](int64_t k, const Column& column, bool) __attribute__((always_inline)) {
            __m256 a = _mm256_broadcast_ss(x + k);
            for (int i = 0; i < 4; ++i) acc.v[i] = _mm256_fmadd_ps(a, column.v[i], acc.v[i]);
        });
        acc = in_order(w.kind != Kind::f32, acc);
        for (int i = 0; i < 4; ++i) _mm256_storeu_ps(y + n + 8 * i, acc.v[i]);
        if (even < w.in) panel_product(x, w, n, n + 2 * LANES, even, y);
    }
#endif
    if (n < n1) panel_product(x, w, n, n1, 0, y);
}

// Rows x[0..rows) times columns [n0, n1) of a weight, n0 a multiple of 16, into y[r] + n0.
inline void block_product(const float* const* x, int64_t rows, const Weight& w, int64_t n0, int64_t n1, float* const* y) {
    if (rows == 1) return row_product(x[0], w, n0, n1, y[0]);
    int64_t panels = (n1 - n0 + LANES - 1) / LANES;
    float* packed = scratch(Scratch::packed, (panels + TILE_PANELS) * LANES * std::min(INNER, w.in));
    for (int64_t k0 = 0; k0 < w.in; k0 += INNER) {
        int64_t inner = std::min(INNER, w.in - k0), apart = inner * LANES;
        pack_panels(w, n0, n1, k0, inner, packed);
        for (int64_t r = 0; r < rows;) {
            int count = next_rows(rows - r);
            const float* from[TILE_ROWS];
            float* to[TILE_ROWS];
            for (int64_t p = 0; p < panels; p += TILE_PANELS) {
                for (int j = 0; j < count; ++j) from[j] = x[r + j] + k0, to[j] = y[r + j] + n0 + p * LANES;
                int columns = static_cast<int>(std::min<int64_t>(TILE_COLUMNS, n1 - n0 - p * LANES));
                if (columns <= LANES)
                    tile_rows<1>(count, from, inner, packed + p * apart, LANES, apart, to, columns, k0 > 0);
                else
                    tile_rows<TILE_PANELS>(count, from, inner, packed + p * apart, LANES, apart, to, columns, k0 > 0);
            }
            r += count;
        }
    }
}

inline void product(const float* const* x, int64_t rows, const Weight& w, float* const* y) {
    block_product(x, rows, w, 0, w.out, y);
}

// Several products at once, each of its own rows and weight; together they fill the threads.
struct Product {
    Rows x;
    const Weight* w;
    Rows y;
};

inline void products(const Product* list, int count, int64_t rows) {
    struct Part {
        const Product* of;
        int64_t n0, n1;
    };
    std::vector<Part> parts;
    int64_t work = 0;
    for (int i = 0; i < count; ++i) work += list[i].w->out * list[i].w->in;
    // A few rows: one part a thread and product of equal work. Many: parts of 128 columns, whose packed weight stays in
    // the second-level cache, or less so that every thread has some.
    int64_t target = std::max<int64_t>(1, work / (thread_count() * (rows < 8 ? 1 : 4)));
    for (int i = 0; i < count; ++i) {
        const Weight& w = *list[i].w;
        int64_t wide = std::max<int64_t>(1, target / std::max<int64_t>(1, w.in));
        wide = (wide + 2 * LANES - 1) / (2 * LANES) * 2 * LANES;
        if (rows > 1) wide = std::min<int64_t>(wide, 128);
        for (int64_t n = 0; n < w.out; n += wide) parts.push_back({&list[i], n, std::min(w.out, n + wide)});
    }
    parallel(static_cast<int64_t>(parts.size()), [&](int64_t task, int) {
        const Part& part = parts[static_cast<size_t>(task)];
        std::vector<const float*> x(static_cast<size_t>(rows));
        std::vector<float*> y(static_cast<size_t>(rows));
        for (int64_t r = 0; r < rows; ++r) {
            x[static_cast<size_t>(r)] = part.of->x.data + r * part.of->x.stride;
            y[static_cast<size_t>(r)] = part.of->y.data + r * part.of->y.stride;
        }
        block_product(x.data(), rows, *part.of->w, part.n0, part.n1, y.data());
    });
}

}  // namespace dsv4::DSV4_ISA
