// Grouped products for training: consecutive rows form groups, each with its own weight. y = x W^T and its gradients
// dx = dy W, dW = dy^T x.
//
// An element of a gradient is a sum over terms: the outputs for dx, the group's rows for dW, ascending. Each TERM_BLOCK
// of terms is one chain of fused multiply-adds from zero, and the chains' sums are added in order. So an element
// depends on its own row and column of the factors alone, not on register tiles or threads.
#pragma once

#include "gemm/gemm.h"

namespace dsv4::DSV4_ISA {

constexpr int64_t TERM_BLOCK = 256;
constexpr int64_t SUM_COLUMNS = 256;  // columns packed at a time: TERM_BLOCK terms of them fit the second-level cache

// y[i][j] = sum over t of a[i * item + t * term] * b[t][j]; the terms t are b's outputs, the columns j its inputs. With
// `more` the sum is added to y, as further blocks of terms.
struct Sum {
    const float* a;
    int64_t items, item, term;
    Weight b;
    Rows y;
    bool more = false;
};

// Register tile of R items times P panels of 16 columns, one chain over the terms; added to y if `add_to` is set.
// Element t of item r is a[r * item + t * term].
template <int R, int P>
[[gnu::noinline]] inline void backward_tile(const float* a, int64_t item, int64_t term, int64_t terms,
                                            const float* panel, int64_t panel_stride, float* const* y, int columns,
                                            bool add_to) {
    V acc[R][P];
    clear(acc);
    StridedRows<R> items(a, item);
    multiply_panels<1>(acc, items, term, terms, panel, panel_stride);
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) {
            int left = std::min(columns - p * LANES, LANES);
            if (left <= 0) continue;
            float* to = y[r] + p * LANES;
            store_n(to, add_to ? add(load_n(to, left), acc[r][p]) : acc[r][p], left);
        }
}

// Packs terms [t0, t1), columns [j0, j1) of b into panels [t1 - t0][16], padded with zeros.
inline void pack_terms(const Weight& b, int64_t t0, int64_t t1, int64_t j0, int64_t j1, float* to) {
    alignas(64) float values[SUM_COLUMNS];
    const int64_t panel_stride = (t1 - t0) * LANES;
    for (int64_t t = t0; t < t1; ++t, to += LANES) {
        const float* row = reinterpret_cast<const float*>(b.data + t * b.stride) + j0;
        if (b.kind != Kind::f32) {
            dequantize_row(b, t, j0, j1, values);
            row = values;
        }
        int64_t j = 0;
        for (; j + LANES <= j1 - j0; j += LANES) store(to + j / LANES * panel_stride, load(row + j));
        if (j < j1 - j0) store(to + j / LANES * panel_stride, load_n(row + j, static_cast<int>(j1 - j0 - j)));
    }
}

// Packs items [i, i + 16), of terms [t0, t1), into to [t1 - t0][16]; items from i1 on are not read.
inline void pack_items(const Sum& s, int64_t i, int64_t i1, int64_t t0, int64_t t1, float* to) {
    const int count = static_cast<int>(std::min<int64_t>(LANES, i1 - i));
    for (int64_t t = t0; t < t1; ++t, to += LANES) store(to, load_n(s.a + t * s.term + i * s.item, count));
}

// Computes items [i0, i1), columns [j0, j1) of a sum, at most SUM_COLUMNS columns.
inline void sum_block(const Sum& s, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    const int64_t terms = s.b.out, panels = (j1 - j0 + LANES - 1) / LANES;
    float* packed = scratch(Scratch::packed, panels * std::min(terms, TERM_BLOCK) * LANES);
    float* packed_items = scratch(Scratch::rows, TERM_BLOCK * LANES);
    int64_t t0 = 0;
    do {  // once even without terms: the sum is then zero
        const int64_t t1 = std::min(terms, t0 + TERM_BLOCK), panel_stride = (t1 - t0) * LANES;
        const bool add_to = t0 > 0 || s.more;
        pack_terms(s.b, t0, t1, j0, j1, packed);
        for (int64_t i = i0; i < i1;) {
            const int count = next_rows<TILE_ROWS>(i1 - i);
            const float* a = s.a + i * s.item + t0 * s.term;
            int64_t item = s.item, term = s.term;
            if (item == 1) {
                pack_items(s, i, s.items, t0, t1, packed_items);
                a = packed_items;
                term = LANES;
            }
            for (int64_t p = 0; p < panels; p += TILE_PANELS) {
                float* y[TILE_ROWS];
                for (int r = 0; r < count; ++r) y[r] = s.y.data + (i + r) * s.y.stride + j0 + p * LANES;
                const int columns = static_cast<int>(j1 - j0 - p * LANES);
                const float* panel = packed + p * panel_stride;
                with_count<TILE_ROWS>(count, [&](auto block) __attribute__((always_inline)) {
                    constexpr int R = decltype(block)::value;
                    columns <= LANES
                        ? backward_tile<R, 1>(a, item, term, t1 - t0, panel, panel_stride, y, columns, add_to)
                        : backward_tile<R, TILE_PANELS>(a, item, term, t1 - t0, panel, panel_stride, y, columns,
                                                        add_to);
                });
            }
            i += count;
        }
        t0 = t1;
    } while (t0 < terms);
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
        sum_block(*task.sum, task.i0, task.i1, task.j0, task.j1);
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
inline void input_gradients(const Group* groups, int64_t count) {
    std::vector<Sum> list;
    for (int64_t g = 0; g < count; ++g) {
        const Group& group = groups[g];
        list.push_back({group.y.data, group.rows, group.y.stride, 1, group.w, group.x});
    }
    sums(list);
}

// Computes each group's dW, into gradients[g], from x and from dy, which is in y; a null pointer skips the group. Only
// the shape of a group's weight is read.
inline void weight_gradients(const Group* groups, int64_t count, float* const* gradients) {
    std::vector<Sum> list;
    for (int64_t g = 0; g < count; ++g) {
        const Group& group = groups[g];
        if (!gradients[g]) continue;
        Weight rows;
        rows.data = reinterpret_cast<const uint8_t*>(group.x.data);
        rows.out = group.rows;
        rows.in = group.w.in;
        rows.stride = group.x.stride * static_cast<int64_t>(sizeof(float));
        list.push_back({group.y.data, group.w.out, 1, group.y.stride, rows, {gradients[g], group.w.in}});
    }
    sums(list);
}

}  // namespace dsv4::DSV4_ISA
