// Newton-Schulz iterations of Muon on BF16 matrices, products in BF16 pairs with fp32 sums.
//
// X <- a X + (b G + c G G) X with G = X X^T. G and its square are symmetric: only the tiles that touch the lower
// triangle are computed, the rest is mirrored. With n rows and m >= n columns a step is then n n m + n n n + 2 n n m
// operations.
#pragma once

#include "base/threads.h"
#include "base/views.h"
#include "gemm/micro_kernel.h"
#include "gemm/vnni_layout.h"

#if defined(DSV4_ISA_AVX512_BF16)

namespace dsv4::DSV4_ISA {

namespace newton_schulz {

constexpr int ROWS = 8, PANELS = 3;  // of a tile of sums
constexpr int64_t BLOCK = 16;        // rows and columns that are transposed together
constexpr int64_t COLUMNS = PANELS * LANES;

// BF16 matrix, rows of `stride` values: row-major, or [panel of 16 columns][pair of rows][16 pairs].
using Bf16 = uint16_t;

inline const float* pairs(const Bf16* values) { return reinterpret_cast<const float*>(values); }

// Panels of x [n, k] as the left operand's transpose: panel p has rows 16 p to 16 p + 15 as columns.
inline void pack_rows(const Bf16* x, int64_t k, int64_t panel, Bf16* to) {
    const Bf16* row[BLOCK];
    for (int64_t i = 0; i < k; i += 2 * LANES) {
        for (int r = 0; r < BLOCK; ++r) row[r] = x + (panel * BLOCK + r) * k + i;
        transpose_16x16_pairs(row, to + panel * BLOCK * k + i * BLOCK);
    }
}

// Panels of x [k, m] as the right operand: panel p has columns 16 p to 16 p + 15.
inline void pack_columns(const Bf16* x, int64_t k, int64_t m, int64_t panel, Bf16* to) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    to += panel * BLOCK * k;
    const Bf16* from = x + panel * BLOCK;
    for (int64_t i = 0; i < k; i += 2, to += 2 * LANES) {
        const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i * m));
        const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + (i + 1) * m));
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
    }
}

[[gnu::always_inline]] inline V widen(const Bf16* from) {
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16))};
}

[[gnu::always_inline]] inline void round_to(Bf16* to, V x) {
    const __m256bh rounded = _mm512_cvtneps_pbh(x.v);
    std::memcpy(to, &rounded, sizeof rounded);
}

// y tile = beta * plus + alpha * (rows of a, over k) times `P` packed panels; `plus` is null or laid out as y.
template <int P>
inline void tile(const Bf16* a, int64_t k, const Bf16* panels, float alpha, float beta, const Bf16* plus, Bf16* y,
                 int64_t y_stride) {
    V acc[ROWS][P];
    clear(acc);
    StridedRows<ROWS> rows(pairs(a), k / 2);
    multiply_panels<4, true>(acc, rows, 1, k / 2, pairs(panels), k / 2 * LANES);
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < P; ++p) {
            V value = mul(set1(alpha), acc[r][p]);
            if (plus) value = fma(set1(beta), widen(plus + r * y_stride + p * LANES), value);
            round_to(y + r * y_stride + p * LANES, value);
        }
}

// y[row0 .. n, columns of the group] = beta * plus + alpha * a [n, k] times packed panels. SYMMETRIC: only the tiles
// that touch the lower triangle.
template <bool SYMMETRIC>
inline void group_of_columns(const Bf16* a, int64_t n, int64_t k, const Bf16* panels, int64_t num_panels, int64_t group,
                             float alpha, float beta, const Bf16* plus, Bf16* y, int64_t y_stride) {
    const int64_t first = group * PANELS, count = std::min<int64_t>(PANELS, num_panels - first);
    for (int64_t r = SYMMETRIC ? first * LANES : 0; r < n; r += ROWS) {
        const int64_t reached = SYMMETRIC ? std::min(count, (r + ROWS - 1) / LANES + 1 - first) : count;
        const int64_t at = r * y_stride + first * LANES;
        with_count<PANELS>(static_cast<int>(reached), [&](auto width) __attribute__((always_inline)) {
            tile<decltype(width)::value>(a + r * k, k, panels + first * LANES * k, alpha, beta,
                                         plus ? plus + at : nullptr, y + at, y_stride);
        });
    }
}

// Copies the lower triangle's row of blocks onto the upper triangle.
inline void mirror(Bf16* g, int64_t n, int64_t block) {
    for (int64_t column = 0; column < block; ++column)
        transpose_16x16_words(g + block * BLOCK * n + column * BLOCK, n, g + column * BLOCK * n + block * BLOCK, n);
}

// A matrix and the memory of its iterations: n a multiple of 16, m of 32, zeros beyond the true sizes.
struct Iteration {
    int64_t n, m;
    Bf16 *x, *gram, *poly, *x_packed, *gram_packed, *next;

    // Values that `memory` must have, without x.
    static int64_t size(int64_t n, int64_t m) { return 2 * n * m + 3 * n * n; }

    Iteration(int64_t n_, int64_t m_, Bf16* x_, Bf16* memory)
        : n(n_),
          m(m_),
          x(x_),
          gram(memory),
          poly(gram + n * n),
          x_packed(gram + 3 * n * n),
          gram_packed(gram + 2 * n * n),
          next(x_packed + n * m) {}

    // each(count, f) calls f for 0 to count - 1, in any order or side by side.
    template <class Each>
    void step(const NewtonSchulzStep& s, Each&& each) {
        const int64_t blocks = n / BLOCK, groups = (blocks + PANELS - 1) / PANELS;
        const int64_t wide_groups = (m / LANES + PANELS - 1) / PANELS;
        each(blocks, [&](int64_t p) { pack_rows(x, m, p, x_packed); });
        each(groups,
             [&](int64_t g) { group_of_columns<true>(x, n, m, x_packed, blocks, g, 1.0f, 0.0f, nullptr, gram, n); });
        each(blocks, [&](int64_t b) { mirror(gram, n, b); });
        each(blocks, [&](int64_t p) { pack_columns(gram, n, n, p, gram_packed); });
        each(groups,
             [&](int64_t g) { group_of_columns<true>(gram, n, n, gram_packed, blocks, g, s.c, s.b, gram, poly, n); });
        each(blocks, [&](int64_t b) { mirror(poly, n, b); });
        each(m / LANES, [&](int64_t p) { pack_columns(x, n, m, p, x_packed); });
        each(wide_groups,
             [&](int64_t g) { group_of_columns<false>(poly, n, n, x_packed, m / LANES, g, 1.0f, s.a, x, next, m); });
        std::swap(x, next);
    }
};

}  // namespace newton_schulz

// Runs the steps on each of `count` matrices [n, m] of `x`, in place.
inline void newton_schulz_steps(uint16_t* x, int64_t count, int64_t n, int64_t m, const NewtonSchulzStep* steps,
                                int64_t num_steps) {
    using namespace newton_schulz;
    const int64_t rows = (n + BLOCK - 1) / BLOCK * BLOCK, columns = (m + 2 * BLOCK - 1) / (2 * BLOCK) * (2 * BLOCK);
    auto run = [&](int64_t index, auto&& each) {
        Bf16* memory = scratch<Bf16>(Scratch::packed, rows * columns + Iteration::size(rows, columns));
        Bf16 *padded = memory, *matrix = x + index * n * m;
        std::memset(padded, 0, sizeof(Bf16) * static_cast<size_t>(rows * columns));
        for (int64_t r = 0; r < n; ++r) std::copy_n(matrix + r * m, m, padded + r * columns);
        Iteration iteration(rows, columns, padded, memory + rows * columns);
        for (int64_t i = 0; i < num_steps; ++i) iteration.step(steps[i], each);
        for (int64_t r = 0; r < n; ++r) std::copy_n(iteration.x + r * columns, m, matrix + r * m);
    };
    // Many matrices: one per task, which stays in its core's cache. Few: their products are shared out.
    if (count >= 2 * thread_count()) {
        parallel(count, [&](int64_t index, int) {
            run(index, [](int64_t tasks, auto&& f) {
                for (int64_t i = 0; i < tasks; ++i) f(i);
            });
        });
        return;
    }
    for (int64_t index = 0; index < count; ++index)
        run(index, [](int64_t tasks, auto&& f) { parallel(tasks, [&](int64_t i, int) { f(i); }); });
}

}  // namespace dsv4::DSV4_ISA

#endif
