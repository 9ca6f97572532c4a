// Grouped products for training: consecutive rows form groups, each with its own weight. y = x W^T and its gradients
// dx = dy W, dW = dy^T x.
//
// An element of a gradient is a sum over terms: the outputs for dx, the group's rows for dW, ascending. Each TERM_BLOCK
// of terms is one chain of fused multiply-adds from zero, and the chains' sums are added in order. So an element
// depends on its own row and column of the factors alone, not on register tiles or threads. With `pairs` the factors of
// a gradient are rounded to BF16, and a chain takes two terms at a time, or AMX sums a block (gradient_tiles.h).
#pragma once

#include "gemm/gemm.h"
#include "gemm/gradient_pairs.h"
#include "gemm/gradient_sum.h"
#include "gemm/gradient_tiles.h"

namespace dsv4::DSV4_ISA {

// Register tile of R items times P panels of 16 columns, one chain over the terms; added to y if `add_to` is set.
// Element t of item r is a[r * item + t * term]; with PAIRS elements and terms are BF16 pairs.
template <int R, int P, bool PAIRS = false>
[[gnu::noinline]] inline void backward_tile(const float* a, int64_t item, int64_t term, int64_t terms,
                                            const float* panel, int64_t panel_stride, float* const* y, int columns,
                                            bool add_to) {
    V acc[R][P];
    clear(acc);
    StridedRows<R> items(a, item);
    multiply_panels<1, PAIRS>(acc, items, term, terms, panel, panel_stride);
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) {
            int left = std::min(columns - p * LANES, LANES);
            if (left <= 0) continue;
            float* to = y[r] + p * LANES;
            store_n(to, add_to ? add(load_n(to, left), acc[r][p]) : acc[r][p], left);
        }
}

// Steps of a tile over `terms` terms.
template <bool PAIRS>
inline int64_t steps_of(int64_t terms) {
    return PAIRS ? (terms + 1) / 2 : terms;
}

// Packs terms [t0, t1), columns [j0, j1) of b into panels [steps][16], padded with zeros.
template <bool PAIRS>
inline void pack_terms(const Weight& b, int64_t t0, int64_t t1, int64_t j0, int64_t j1, float* to) {
    alignas(64) float values[2][SUM_COLUMNS];
    const int64_t panel_stride = steps_of<PAIRS>(t1 - t0) * LANES;
    for (int64_t t = t0; t < t1; t += PAIRS ? 2 : 1, to += LANES) {
        const float *row = read_term(b, t, j0, j1, values[0]), *next = nullptr;
        if (PAIRS && t + 1 < t1) next = read_term(b, t + 1, j0, j1, values[1]);
        for (int64_t j = 0; j < j1 - j0; j += LANES) {
            const int left = static_cast<int>(std::min<int64_t>(LANES, j1 - j0 - j));
            V own = load_n(row + j, left);
            if constexpr (PAIRS) own = round_pairs(own, next ? load_n(next + j, left) : zero());
            store(to + j / LANES * panel_stride, own);
        }
    }
}

// Elements of some items as a tile reads them.
struct PackedItems {
    const float* a;
    int64_t item, term;
};

// Items [i, i + count) of terms [t0, t1): where they lie or packed into `to`, TERM_BLOCK * 16 values, either for each
// step those of the items side by side or, if an item's terms lie side by side, item after item.
template <bool PAIRS>
inline PackedItems pack_items(const Sum& s, int64_t i, int count, int64_t t0, int64_t t1, float* to) {
    const float* a = s.a + i * s.item + t0 * s.term;
    if (s.item != 1) {
        if (!PAIRS) return {a, s.item, s.term};
        for (int r = 0; r < count; ++r) pack_value_pairs(a + r * s.item, t1 - t0, to + r * TERM_BLOCK / 2);
        return {to, TERM_BLOCK / 2, 1};
    }
    const int some = static_cast<int>(std::min<int64_t>(LANES, s.items - i));
    float* step = to;
    for (int64_t t = t0; t < t1; t += PAIRS ? 2 : 1, a += (PAIRS ? 2 : 1) * s.term, step += LANES) {
        V own = load_n(a, some);
        if constexpr (PAIRS) own = round_pairs(own, t + 1 < t1 ? load_n(a + s.term, some) : zero());
        store(step, own);
    }
    return {to, 1, LANES};
}

// Computes items [i0, i1), columns [j0, j1) of a sum, at most SUM_COLUMNS columns.
template <bool PAIRS>
inline void sum_block(const Sum& s, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    const int64_t terms = s.b.out, panels = (j1 - j0 + LANES - 1) / LANES;
    float* packed = scratch(Scratch::packed, panels * std::min(terms, TERM_BLOCK) * LANES);
    float* packed_items = scratch(Scratch::rows, TERM_BLOCK * LANES);
    int64_t t0 = 0;
    do {  // once even without terms: the sum is then zero
        const int64_t t1 = std::min(terms, t0 + TERM_BLOCK), steps = steps_of<PAIRS>(t1 - t0);
        const bool add_to = t0 > 0 || s.more;
        pack_terms<PAIRS>(s.b, t0, t1, j0, j1, packed);
        for (int64_t i = i0; i < i1;) {
            const int count = next_rows<TILE_ROWS>(i1 - i);
            const PackedItems from = pack_items<PAIRS>(s, i, count, t0, t1, packed_items);
            for (int64_t p = 0; p < panels; p += TILE_PANELS) {
                float* y[TILE_ROWS];
                for (int r = 0; r < count; ++r) y[r] = s.y.data + (i + r) * s.y.stride + j0 + p * LANES;
                const int columns = static_cast<int>(j1 - j0 - p * LANES);
                const float* panel = packed + p * steps * LANES;
                with_count<TILE_ROWS>(count, [&](auto block) __attribute__((always_inline)) {
                    constexpr int R = decltype(block)::value;
                    columns <= LANES ? backward_tile<R, 1, PAIRS>(from.a, from.item, from.term, steps, panel,
                                                                  steps * LANES, y, columns, add_to)
                                     : backward_tile<R, TILE_PANELS, PAIRS>(from.a, from.item, from.term, steps, panel,
                                                                            steps * LANES, y, columns, add_to);
                });
            }
            i += count;
        }
        t0 = t1;
    } while (t0 < terms);
}

// The same of factors rounded to BF16, where HAS_GRADIENT_PAIRS.
inline void sum_rounded(const Sum& s, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
#if defined(DSV4_ISA_AMX)
    sum_tiles(s, i0, i1, j0, j1);
#else
    sum_block<HAS_GRADIENT_PAIRS>(s, i0, i1, j0, j1);
#endif
}

inline void sums(const std::vector<Sum>& list) {
    struct Task {
        const Sum* sum;
        int64_t i0, i1, j0, j1;
    };
    std::vector<Task> tasks;
    int64_t work = 0;
    for (const Sum& s : list) work += s.items * s.b.in * s.b.out;
    const int64_t target = std::max<int64_t>(1, work / (thread_count() * 4));
    for (const Sum& s : list)
        for (int64_t j0 = 0; j0 < s.b.in; j0 += SUM_COLUMNS) {
            int64_t j1 = std::min(s.b.in, j0 + SUM_COLUMNS);
            // Fewer items per task would not pay for packing the columns.
            int64_t high = std::max<int64_t>(16 * TILE_ROWS, target / std::max<int64_t>(1, (j1 - j0) * s.b.out));
            if (thread_count() == 1) high = s.items;
            high = (high + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
            for (int64_t i0 = 0; i0 < s.items; i0 += high)
                tasks.push_back({&s, i0, std::min(s.items, i0 + high), j0, j1});
        }
    parallel(static_cast<int64_t>(tasks.size()), [&](int64_t number, int) {
        const Task& task = tasks[static_cast<size_t>(number)];
        auto* run = HAS_GRADIENT_PAIRS && task.sum->pairs ? sum_rounded : sum_block<false>;
        run(*task.sum, task.i0, task.i1, task.j0, task.j1);
    });
}

// Computes y of each group, in the order of accumulation_order.h.
inline void grouped_products(const Group* groups, int64_t count) {
    std::vector<GemmTask> tasks;
    for (const Group* group = groups; group < groups + count; ++group) {
        const int64_t wide = outputs_per_task(group->w.in), out = group->rows ? group->w.out : 0;
        for (int64_t n = 0; n < out; n += wide)
            tasks.push_back({&group->w, group->x, group->y, 0, group->rows, n, std::min(out, n + wide)});
    }
    run(tasks);
}

// Computes each group's dx, into x, from dy, which is in y.
inline void input_gradients(const Group* groups, int64_t count, bool pairs) {
    std::vector<Sum> list;
    for (int64_t g = 0; g < count; ++g) {
        const Group& group = groups[g];
        list.push_back({group.y.data, group.rows, group.y.stride, 1, group.w, group.x, false, pairs});
    }
    sums(list);
}

// Computes each group's dW, into gradients[g], from x and from dy, which is in y; a null pointer skips the group. Only
// the shape of a group's weight is read.
inline void weight_gradients(const Group* groups, int64_t count, float* const* gradients, bool pairs) {
    std::vector<Sum> list;
    for (int64_t g = 0; g < count; ++g) {
        const Group& group = groups[g];
        if (!gradients[g]) continue;
        Weight rows;
        rows.data = reinterpret_cast<const uint8_t*>(group.x.data);
        rows.out = group.rows;
        rows.in = group.w.in;
        rows.stride = group.x.stride * static_cast<int64_t>(sizeof(float));
        list.push_back({group.y.data, group.w.out, 1, group.y.stride, rows, {gradients[g], group.w.in}, false, pairs});
    }
    sums(list);
}

}  // namespace dsv4::DSV4_ISA
