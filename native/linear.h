// Matrix products. Every element of a product is one chain of fused multiply-adds over the inner index, in ascending
// order, starting from zero: it depends on its row and its column alone, whatever rows, columns or threads there are.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "simd.h"
#include "threads.h"
#include "views.h"

namespace dsv4::DSV4_ISA {

#if defined(DSV4_ISA_AVX512)
constexpr int TILE_ROWS = 12, TILE_PANELS = 2;
#else
constexpr int TILE_ROWS = 6, TILE_PANELS = 1;
#endif
constexpr int TILE_COLUMNS = TILE_PANELS * LANES;
constexpr int64_t INNER = 256;  // inner indices packed at a time: a panel of them stays in the first-level cache

// Memory of one thread, grown to the largest size asked for. Each name is a place of its own.
enum class Scratch { packed, panel, scores, hidden, index, places };
inline float* scratch(Scratch place, int64_t size) {
    thread_local std::vector<float> memory[static_cast<int>(Scratch::places)];
    auto& own = memory[static_cast<int>(place)];
    if (static_cast<int64_t>(own.size()) < size) own.resize(static_cast<size_t>(size));
    return own.data();
}

// Columns first..first + 15 of up to 16 strided vectors, transposed: to[k * 16 + j] = from[j][k]. Missing ones are 0.
inline void pack_rows(const float* const* from, int count, int64_t inner, float* to) {
    int64_t k = 0;
#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)
    if (count == LANES) {
        for (; k + 8 <= inner; k += 8) {
            for (int half = 0; half < 2; ++half) {
                const float* const* row = from + half * 8;
                __m256 r0 = _mm256_loadu_ps(row[0] + k), r1 = _mm256_loadu_ps(row[1] + k);
                __m256 r2 = _mm256_loadu_ps(row[2] + k), r3 = _mm256_loadu_ps(row[3] + k);
                __m256 r4 = _mm256_loadu_ps(row[4] + k), r5 = _mm256_loadu_ps(row[5] + k);
                __m256 r6 = _mm256_loadu_ps(row[6] + k), r7 = _mm256_loadu_ps(row[7] + k);
                __m256 a0 = _mm256_unpacklo_ps(r0, r1), a1 = _mm256_unpackhi_ps(r0, r1);
                __m256 a2 = _mm256_unpacklo_ps(r2, r3), a3 = _mm256_unpackhi_ps(r2, r3);
                __m256 a4 = _mm256_unpacklo_ps(r4, r5), a5 = _mm256_unpackhi_ps(r4, r5);
                __m256 a6 = _mm256_unpacklo_ps(r6, r7), a7 = _mm256_unpackhi_ps(r6, r7);
                __m256 b0 = _mm256_shuffle_ps(a0, a2, 0x44), b1 = _mm256_shuffle_ps(a0, a2, 0xEE);
                __m256 b2 = _mm256_shuffle_ps(a1, a3, 0x44), b3 = _mm256_shuffle_ps(a1, a3, 0xEE);
                __m256 b4 = _mm256_shuffle_ps(a4, a6, 0x44), b5 = _mm256_shuffle_ps(a4, a6, 0xEE);
                __m256 b6 = _mm256_shuffle_ps(a5, a7, 0x44), b7 = _mm256_shuffle_ps(a5, a7, 0xEE);
                float* out = to + k * LANES + half * 8;
                _mm256_storeu_ps(out, _mm256_permute2f128_ps(b0, b4, 0x20));
                _mm256_storeu_ps(out + LANES, _mm256_permute2f128_ps(b1, b5, 0x20));
                _mm256_storeu_ps(out + 2 * LANES, _mm256_permute2f128_ps(b2, b6, 0x20));
                _mm256_storeu_ps(out + 3 * LANES, _mm256_permute2f128_ps(b3, b7, 0x20));
                _mm256_storeu_ps(out + 4 * LANES, _mm256_permute2f128_ps(b0, b4, 0x31));
                _mm256_storeu_ps(out + 5 * LANES, _mm256_permute2f128_ps(b1, b5, 0x31));
                _mm256_storeu_ps(out + 6 * LANES, _mm256_permute2f128_ps(b2, b6, 0x31));
                _mm256_storeu_ps(out + 7 * LANES, _mm256_permute2f128_ps(b3, b7, 0x31));
            }
        }
    }
#endif
    for (; k < inner; ++k)
        for (int j = 0; j < LANES; ++j) to[k * LANES + j] = j < count ? from[j][k] : 0.0f;
}

// Columns [n0, n0 + 16) of the inner indices [k0, k0 + inner) of a weight -> panel [inner][16]; missing columns are 0.
inline void pack_panel(const Weight& w, int64_t n0, int64_t k0, int64_t inner, float* to) {
    int count = static_cast<int>(std::min<int64_t>(LANES, w.out - n0));
    if (w.out_stride == 1) {
        const float* from = w.data + k0 * w.in_stride + n0;
        for (int64_t k = 0; k < inner; ++k, from += w.in_stride, to += LANES)
            store(to, count == LANES ? load(from) : load_n(from, count));
        return;
    }
    const float* rows[LANES];
    for (int j = 0; j < count; ++j) rows[j] = w.data + (n0 + j) * w.out_stride + k0 * w.in_stride;
    if (w.in_stride == 1) return pack_rows(rows, count, inner, to);
    for (int64_t k = 0; k < inner; ++k)
        for (int j = 0; j < LANES; ++j) to[k * LANES + j] = j < count ? rows[j][k * w.in_stride] : 0.0f;
}

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

// One row times columns [n0, n1) of a weight whose outputs lie side by side: the weight streams through once.
inline void row_product(const float* x, const Weight& w, int64_t n0, int64_t n1, float* y) {
    constexpr int UNROLL = 8;
    std::fill(y + n0, y + n1, 0.0f);
    for (int64_t k = 0; k < w.in; k += UNROLL) {
        int count = static_cast<int>(std::min<int64_t>(UNROLL, w.in - k));
        const float* rows = w.data + k * w.in_stride;
        int64_t n = n0;
        if (count == UNROLL) {
            V a[UNROLL];
            for (int j = 0; j < UNROLL; ++j) a[j] = set1(x[k + j]);
            for (; n + LANES <= n1; n += LANES) {
                V acc = load(y + n);
                for (int j = 0; j < UNROLL; ++j) acc = fma(a[j], load(rows + j * w.in_stride + n), acc);
                store(y + n, acc);
            }
        }
        for (; n < n1; n += LANES) {
            int left = static_cast<int>(std::min<int64_t>(LANES, n1 - n));
            V acc = load_n(y + n, left);
            for (int j = 0; j < count; ++j) acc = fma(set1(x[k + j]), load_n(rows + j * w.in_stride + n, left), acc);
            store_n(y + n, acc, left);
        }
    }
}

// Rows x[0..rows) times columns [n0, n1) of a weight, n0 a multiple of 16, into y[r] + n0.
inline void block_product(const float* const* x, int64_t rows, const Weight& w, int64_t n0, int64_t n1, float* const* y) {
    if (rows == 1 && w.out_stride == 1) return row_product(x[0], w, n0, n1, y[0]);
    int64_t panels = (n1 - n0 + LANES - 1) / LANES;
    float* packed = scratch(Scratch::packed, (panels + TILE_PANELS) * LANES * std::min(INNER, w.in));
    for (int64_t k0 = 0; k0 < w.in; k0 += INNER) {
        int64_t inner = std::min(INNER, w.in - k0), apart = inner * LANES;
        for (int64_t p = 0; p < panels; ++p) pack_panel(w, n0 + p * LANES, k0, inner, packed + p * apart);
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
        wide = (wide + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS;
        if (rows > 1 || w.out_stride != 1) wide = std::min<int64_t>(wide, 128);
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
