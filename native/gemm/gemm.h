// Products y = x W^T: selects the kernel and divides the work among threads.
//
// Every element accumulates in the order of accumulation_order.h (with AMX: of gemm_amx.h), so it depends on its row
// and its column alone, not on other rows, other columns or threads.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "base/threads.h"
#include "gemm/gemm_amx.h"
#include "gemm/gemm_bf16.h"
#include "gemm/gemv.h"
#include "gemm/micro_kernel.h"

namespace dsv4::DSV4_ISA {

#if defined(DSV4_ISA_AVX512)
constexpr int TILE_ROWS = 12, TILE_PANELS = 2;
#else
constexpr int TILE_ROWS = 6, TILE_PANELS = 1;
#endif
constexpr int TILE_COLUMNS = TILE_PANELS * LANES;

// Register tile: R packed rows times P packed panels, into y[r][0..columns).
template <bool PAIRS, int P, int R>
[[gnu::noinline]] inline void gemm_tile(const float* x, int64_t groups, const float* panel, float* const* y,
                                        int columns) {
    constexpr int GROUP_STEPS = PAIRS ? STEPS / 2 : STEPS;
    const int64_t steps = groups * GROUP_STEPS, panel_stride = SUMS * steps * LANES;
    alignas(64) float kept[3][R][P][LANES];
    V acc[R][P];
    for (int64_t at = 0; at < SUMS; ++at, panel += steps * LANES) {
        clear(acc);
        StridedRows<R> rows(x + at * steps, SUMS * steps);
        multiply_panels<GROUP_STEPS, PAIRS>(acc, rows, 1, steps, panel, panel_stride);
        // Adds the eight sums as a binary tree: a sum to its pair's first, a pair to the first pair, ...
        int level = 0;
        for (int64_t rest = at; rest & 1; rest >>= 1, ++level)
            for (int r = 0; r < R; ++r)
                for (int p = 0; p < P; ++p) acc[r][p] = add(load(kept[level][r][p]), acc[r][p]);
        if (level < 3)
            for (int r = 0; r < R; ++r)
                for (int p = 0; p < P; ++p) store(kept[level][r][p], acc[r][p]);
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

// Packs outputs [n0, n1) of a weight and multiplies the rows by them; PAIRS if both are exact in BF16.
template <bool PAIRS>
inline void gemm_packed(const float* const* x, int64_t rows, const Weight& w, int64_t n0, int64_t n1, float* const* y) {
    const int64_t groups = groups_of(w.in), row_size = groups * GROUP / (PAIRS ? 2 : 1),
                  panel_stride = row_size * LANES;
    const int64_t panels = (n1 - n0 + LANES - 1) / LANES;
    float* packed = scratch(Scratch::packed, panels * panel_stride);
    float* packed_rows = scratch(Scratch::rows, TILE_ROWS * groups * GROUP);
    pack_panels_as<PAIRS>(w, n0, n1, packed);
    for (int64_t r = 0; r < rows;) {
        const int count = next_rows<TILE_ROWS>(rows - r);
        float* to[TILE_ROWS];
        for (int j = 0; j < count; ++j) pack_row_as<PAIRS>(x[r + j], w.in, packed_rows + j * row_size);
        for (int64_t p = 0; p < panels; p += TILE_PANELS) {
            for (int j = 0; j < count; ++j) to[j] = y[r + j] + n0 + p * LANES;
            const int columns = static_cast<int>(std::min<int64_t>(TILE_COLUMNS, n1 - n0 - p * LANES));
            const float* panel = packed + p * panel_stride;
            with_count<TILE_ROWS>(count, [&](auto block) __attribute__((always_inline)) {
                constexpr int R = decltype(block)::value;
                columns <= LANES ? gemm_tile<PAIRS, 1, R>(packed_rows, groups, panel, to, columns)
                                 : gemm_tile<PAIRS, TILE_PANELS, R>(packed_rows, groups, panel, to, columns);
            });
        }
        r += count;
    }
}

// Multiplies rows x[0..rows) by outputs [n0, n1) of a weight, n0 a multiple of 16, into y[r] + n0, on one thread.
inline void gemm(const float* const* x, int64_t rows, const Weight& w, int64_t n0, int64_t n1, float* const* y) {
#if defined(DSV4_ISA_AMX)
    if (w.kind != Kind::f32) return gemm_amx(x, rows, w, n0, n1, y);
#endif
#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)
    if (rows <= GEMV_ROWS) n0 = gemv(x, rows, w, n0, n1, y);
#endif
    if (n0 == n1) return;
#if defined(DSV4_ISA_AVX512_BF16)
    if (w.kind != Kind::f32 &&
        std::all_of(x, x + rows, [&](const float* row) { return exact_in_bf16(row, w.in, least_input(w)); }) &&
        weight_exact_in_bf16(w, n0, n1))
        return gemm_packed<true>(x, rows, w, n0, n1, y);
#endif
    gemm_packed<false>(x, rows, w, n0, n1, y);
}

// Outputs per task for many rows: 256 KB of packed weight, at least 128 outputs. Every task packs its rows anew; AMX
// multiplies faster than it splits and packs rows, so its tasks are wider.
inline int64_t outputs_per_task([[maybe_unused]] int64_t in) {
#if defined(DSV4_ISA_AMX)
    return 1024;
#else
    return std::clamp<int64_t>((64 << 10) / std::max<int64_t>(1, in) / TILE_COLUMNS * TILE_COLUMNS, 128, 512);
#endif
}

// Rows per thread from which on tasks divide the rows too, though each task then packs the weight anew.
constexpr int64_t MIN_TASK_ROWS = 288;

struct SkinnyRows;

// One task: outputs [n0, n1) of a weight for rows [r0, r1).
struct GemmTask {
    const Weight* w;
    Rows x, y;
    int64_t r0, r1, n0, n1;
    const SkinnyRows* skinny = nullptr;  // with AMX: the packed rows if they are few

    void run() const {
        std::vector<const float*> from;
        std::vector<float*> to;
        for (int64_t r = r0; r < r1; ++r) {
            from.push_back(x.data + r * x.stride);
            to.push_back(y.data + r * y.stride);
        }
#if defined(DSV4_ISA_AMX)
        if (skinny) return gemm_amx_skinny(*skinny, *w, n0, n1, to.data());
#endif
        gemm(from.data(), r1 - r0, *w, n0, n1, to.data());
    }
};

inline void run(const std::vector<GemmTask>& tasks) {
    parallel(static_cast<int64_t>(tasks.size()), [&](int64_t task, int) { tasks[static_cast<size_t>(task)].run(); });
}

// y = x W^T.
struct Product {
    Rows x;
    const Weight* w;
    Rows y;
};

// AMX: packs the rows of each product if they are few, once for all its tasks and for adjacent products with the same
// rows. Null for the others.
inline std::vector<const SkinnyRows*> pack_skinny_rows([[maybe_unused]] const Product* list, int count,
                                                       [[maybe_unused]] int64_t rows) {
    std::vector<const SkinnyRows*> packed(static_cast<size_t>(count));
#if defined(DSV4_ISA_AMX)
    thread_local std::vector<SkinnyRows> memory;
    if (rows > SKINNY_ROWS) return packed;
    memory.resize(std::max(memory.size(), packed.size()));
    const Product* last = nullptr;
    for (size_t i = 0; i < packed.size(); ++i) {
        const Product& now = list[i];
        if (now.w->kind == Kind::f32) continue;
        if (last && last->x.data == now.x.data && last->x.stride == now.x.stride && last->w->in == now.w->in) {
            packed[i] = packed[static_cast<size_t>(last - list)];
            continue;
        }
        const float* x[SKINNY_ROWS];
        for (int64_t r = 0; r < rows; ++r) x[r] = now.x.data + r * now.x.stride;
        memory[i].pack(x, rows, now.w->in);
        packed[i] = &memory[i];
        last = &now;
    }
#endif
    return packed;
}

// Computes several products of `rows` rows each on all threads.
inline void products(const Product* list, int count, int64_t rows) {
    std::vector<GemmTask> tasks;
    int64_t work = 0;
    const std::vector<const SkinnyRows*> skinny = pack_skinny_rows(list, count, rows);
    for (int i = 0; i < count; ++i) work += list[i].w->out * list[i].w->in;
    // Few rows: one task of equal work per thread. More rows: about four tasks per thread, which divide the outputs,
    // and from MIN_TASK_ROWS rows per thread on the rows too.
    const int64_t shares = thread_count() * (rows < 8 ? 1 : 4);
    for (int i = 0; i < count; ++i) {
        const Weight& w = *list[i].w;
        const int64_t target = std::max<int64_t>(1, work / shares);
        int64_t wide = std::max<int64_t>(1, target / std::max<int64_t>(1, w.in)), high = rows;
        wide = (wide + 2 * LANES - 1) / (2 * LANES) * 2 * LANES;
        if (rows > 1) wide = std::min<int64_t>(wide, 128);
        if (rows >= MIN_TASK_ROWS * thread_count()) {
            wide = outputs_per_task(w.in);
            high = std::max(MIN_TASK_ROWS, target * rows / std::max<int64_t>(1, std::min(wide, w.out) * w.in));
            high = (high + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
        }
        const SkinnyRows* own = skinny[static_cast<size_t>(i)];
        for (int64_t n = 0; n < w.out; n += wide)
            for (int64_t r = 0; r < rows; r += high)
                tasks.push_back(
                    {&w, list[i].x, list[i].y, r, std::min(rows, r + high), n, std::min(w.out, n + wide), own});
    }
    run(tasks);
}

}  // namespace dsv4::DSV4_ISA
