// Newton-Schulz iterations of Muon, on BF16 matrices (products in BF16 pairs, fp32 sums) or on fp32 ones.
//
// X <- a X + (b G + c G G) X with G = X X^T. G and its square are symmetric: only the tiles that touch the lower
// triangle are computed, the rest is mirrored. With n rows and m >= n columns a step is then n n m + n n n + 2 n n m
// operations.
#pragma once

#include "base/scratch.h"
#include "base/threads.h"
#include "base/transpose.h"
#include "base/views.h"
#include "gemm/micro_kernel.h"

#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)

namespace dsv4::DSV4_ISA {

namespace newton_schulz {

constexpr int64_t BLOCK = 16;  // rows and columns that are transposed together

// A format has its number; terms of a sum that lie side by side as one fp32 value of a packed panel; its packing of
// panels of 16 columns, [terms][16]; and reading and rounding of 16 numbers.
struct Floats {
    using Number = float;
    static constexpr int64_t TERMS = 1;

    // Panel p of x [n, k] as the left operand's transpose: its columns are rows 16 p to 16 p + 15.
    static void pack_rows(const float* x, int64_t k, int64_t panel, float* to) {
        const float* row[BLOCK];
        for (int r = 0; r < BLOCK; ++r) row[r] = x + (panel * BLOCK + r) * k;
        DSV4_ISA::pack_rows(row, BLOCK, k, to + panel * BLOCK * k);
    }

    // Panel p of x [k, m] as the right operand: columns 16 p to 16 p + 15.
    static void pack_columns(const float* x, int64_t k, int64_t m, int64_t panel, float* to) {
        to += panel * BLOCK * k;
        for (int64_t i = 0; i < k; ++i) store(to + i * LANES, load(x + i * m + panel * BLOCK));
    }

    // Transposes 16 rows of 16 numbers, rows `stride` apart.
    static void transpose(const float* from, float* to, int64_t stride) {
        for (int64_t i = 0; i < BLOCK; i += 8)
            for (int64_t j = 0; j < BLOCK; j += 8) {
                const float* row[8];
                __m256 columns[8];
                for (int r = 0; r < 8; ++r) row[r] = from + (i + r) * stride + j;
                transpose_8x8_floats(row, columns);
                for (int c = 0; c < 8; ++c) _mm256_storeu_ps(to + (j + c) * stride + i, columns[c]);
            }
    }

    [[gnu::always_inline]] static V read(const float* from) { return load(from); }
    [[gnu::always_inline]] static void write(float* to, V x) { store(to, x); }
};

#if defined(DSV4_ISA_AVX512_BF16)
struct Bf16Pairs {
    using Number = uint16_t;
    static constexpr int64_t TERMS = 2;

    static void pack_rows(const uint16_t* x, int64_t k, int64_t panel, uint16_t* to) {
        const uint16_t* row[BLOCK];
        for (int64_t i = 0; i < k; i += 2 * LANES) {
            for (int r = 0; r < BLOCK; ++r) row[r] = x + (panel * BLOCK + r) * k + i;
            transpose_16x16_pairs(row, to + panel * BLOCK * k + i * BLOCK);
        }
    }

    static void pack_columns(const uint16_t* x, int64_t k, int64_t m, int64_t panel, uint16_t* to) {
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        to += panel * BLOCK * k;
        const uint16_t* from = x + panel * BLOCK;
        for (int64_t i = 0; i < k; i += 2, to += 2 * LANES) {
            const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i * m));
            const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + (i + 1) * m));
            const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
            _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
        }
    }

    static void transpose(const uint16_t* from, uint16_t* to, int64_t stride) {
        transpose_16x16_words(from, stride, to, stride);
    }

    [[gnu::always_inline]] static V read(const uint16_t* from) {
        const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16))};
    }
    [[gnu::always_inline]] static void write(uint16_t* to, V x) {
        const __m256bh rounded = _mm512_cvtneps_pbh(x.v);
        std::memcpy(to, &rounded, sizeof rounded);
    }
};
#endif

#if defined(DSV4_ISA_AVX512)
constexpr int ROWS = 8, PANELS = 3;  // of a tile of sums
#else
constexpr int ROWS = 6, PANELS = 1;
#endif

// y tile = beta * plus + alpha * (R rows of a, over k) times P packed panels; `plus` is null or laid out as y.
template <class F, int R, int P>
inline void tile(const typename F::Number* a, int64_t k, const typename F::Number* panels, float alpha, float beta,
                 const typename F::Number* plus, typename F::Number* y, int64_t y_stride) {
    V acc[R][P];
    clear(acc);
    const int64_t steps = k / F::TERMS;
    StridedRows<R> rows(reinterpret_cast<const float*>(a), steps);
    multiply_panels<4, F::TERMS == 2>(acc, rows, 1, steps, reinterpret_cast<const float*>(panels), steps * LANES);
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) {
            V value = mul(set1(alpha), acc[r][p]);
            if (plus) value = fma(set1(beta), F::read(plus + r * y_stride + p * LANES), value);
            F::write(y + r * y_stride + p * LANES, value);
        }
}

// y[all n rows, columns of the group] = beta * plus + alpha * a [n, k] times packed panels. SYMMETRIC: only the tiles
// that touch the lower triangle.
template <class F, bool SYMMETRIC>
inline void group_of_columns(const typename F::Number* a, int64_t n, int64_t k, const typename F::Number* panels,
                             int64_t num_panels, int64_t group, float alpha, float beta, const typename F::Number* plus,
                             typename F::Number* y, int64_t y_stride) {
    const int64_t first = group * PANELS, all = std::min<int64_t>(PANELS, num_panels - first);
    for (int64_t r = SYMMETRIC ? first * LANES : 0; r < n;) {
        const int rows = next_rows<ROWS>(n - r);
        const int64_t reached = SYMMETRIC ? std::min(all, (r + rows - 1) / LANES + 1 - first) : all;
        const int64_t at = r * y_stride + first * LANES;
        with_count<ROWS>(rows, [&](auto height) __attribute__((always_inline)) {
            with_count<PANELS>(static_cast<int>(reached), [&](auto width) __attribute__((always_inline)) {
                tile<F, decltype(height)::value, decltype(width)::value>(a + r * k, k, panels + first * LANES * k,
                                                                         alpha, beta, plus ? plus + at : nullptr,
                                                                         y + at, y_stride);
            });
        });
        r += rows;
    }
}

// A matrix and the memory of its iterations: n a multiple of 16, m of 32, zeros beyond the true sizes.
template <class F>
struct Iteration {
    using Number = typename F::Number;
    int64_t n, m;
    Number *x, *gram, *poly, *x_packed, *gram_packed, *next;

    // Values that `memory` must have, without x.
    static int64_t size(int64_t n, int64_t m) { return 2 * n * m + 3 * n * n; }

    Iteration(int64_t n_, int64_t m_, Number* x_, Number* memory)
        : n(n_),
          m(m_),
          x(x_),
          gram(memory),
          poly(gram + n * n),
          x_packed(gram + 3 * n * n),
          gram_packed(gram + 2 * n * n),
          next(x_packed + n * m) {}

    // Copies the lower triangle's row of blocks onto the upper triangle.
    void mirror(Number* g, int64_t block) const {
        for (int64_t column = 0; column < block; ++column)
            F::transpose(g + block * BLOCK * n + column * BLOCK, g + column * BLOCK * n + block * BLOCK, n);
    }

    // each(count, f) calls f for 0 to count - 1, in any order or side by side.
    template <class Each>
    void step(const NewtonSchulzStep& s, Each&& each) {
        const int64_t blocks = n / BLOCK, groups = (blocks + PANELS - 1) / PANELS;
        const int64_t wide_groups = (m / LANES + PANELS - 1) / PANELS;
        each(blocks, [&](int64_t p) { F::pack_rows(x, m, p, x_packed); });
        each(groups,
             [&](int64_t g) { group_of_columns<F, true>(x, n, m, x_packed, blocks, g, 1.0f, 0.0f, nullptr, gram, n); });
        each(blocks, [&](int64_t b) { mirror(gram, b); });
        each(blocks, [&](int64_t p) { F::pack_columns(gram, n, n, p, gram_packed); });
        each(groups, [&](int64_t g) {
            group_of_columns<F, true>(gram, n, n, gram_packed, blocks, g, s.c, s.b, gram, poly, n);
        });
        each(blocks, [&](int64_t b) { mirror(poly, b); });
        each(m / LANES, [&](int64_t p) { F::pack_columns(x, n, m, p, x_packed); });
        each(wide_groups,
             [&](int64_t g) { group_of_columns<F, false>(poly, n, n, x_packed, m / LANES, g, 1.0f, s.a, x, next, m); });
        std::swap(x, next);
    }
};

}  // namespace newton_schulz

// Runs the steps on each of `count` matrices [n, m] of `x`, in place; F is newton_schulz::Floats or Bf16Pairs.
template <class F>
inline void newton_schulz_steps(typename F::Number* x, int64_t count, int64_t n, int64_t m,
                                const NewtonSchulzStep* steps, int64_t num_steps) {
    using namespace newton_schulz;
    using Number = typename F::Number;
    const int64_t rows = (n + BLOCK - 1) / BLOCK * BLOCK, columns = (m + 2 * BLOCK - 1) / (2 * BLOCK) * (2 * BLOCK);
    auto run = [&](int64_t index, auto&& each) {
        Number* memory = scratch<Number>(Scratch::packed, rows * columns + Iteration<F>::size(rows, columns));
        Number *padded = memory, *matrix = x + index * n * m;
        std::memset(padded, 0, sizeof(Number) * static_cast<size_t>(rows * columns));
        for (int64_t r = 0; r < n; ++r) std::copy_n(matrix + r * m, m, padded + r * columns);
        Iteration<F> iteration(rows, columns, padded, memory + rows * columns);
        for (int64_t i = 0; i < num_steps; ++i) iteration.step(steps[i], each);
        for (int64_t r = 0; r < n; ++r) std::copy_n(iteration.x + r * columns, m, matrix + r * m);
    };
    // Many matrices, or one for each thread: one per task, which stays in its core's cache. Else their products are
    // shared out, so that no thread waits for another's last matrix.
    if (count >= 2 * thread_count() || count == thread_count()) {
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
