// Matrix products. Every element of a product is added in the order of gemm/accumulation_order.h (on AMX tiles of gemm/gemm_amx.h): it depends on its row and
// its column alone, whatever rows, columns or threads there are.
#pragma once

#include <algorithm>
#include <array>
#include <cstdlib>
#include <utility>
#include <vector>

#include "gemm/gemm_amx.h"
#include "gemm/gemm_bf16.h"
#include "gemm/gemv.h"
#include "base/threads.h"

namespace dsv4::DSV4_ISA {

#if defined(DSV4_ISA_AVX512)
constexpr int TILE_ROWS = 12, TILE_PANELS = 2;
#else
constexpr int TILE_ROWS = 6, TILE_PANELS = 1;
#endif
constexpr int TILE_COLUMNS = TILE_PANELS * LANES;

// Where rows r, r + 1 and r + 2 of a tile are read from, for every third r: a pointer for every row would be too many.
template <int R>
struct Thirds {
    const float* from[(R + 2) / 3];
    int64_t apart;

    Thirds(const float* rows, int64_t stride) : apart(stride) {
        for (int i = 0; 3 * i < R; ++i) from[i] = rows + 3 * i * stride;
    }
    [[gnu::always_inline]] const float& of(int row) const { return from[row / 3][row % 3 * apart]; }
    [[gnu::always_inline]] void advance(int64_t step) {
        for (const float*& third : from) third += step;
    }
};

// R rows times P neighbouring panels, rows and panels sum by sum, of numbers or of pairs.
template <bool PAIRS, int P, int R>
inline void tile(const float* x, int64_t groups, const float* panel, float* const* y, int columns) {
    constexpr int64_t OF_GROUP = PAIRS ? STEPS / 2 : STEPS;
    const int64_t steps = groups * OF_GROUP, apart = SUMS * steps * LANES;
    alignas(64) float kept[3][R][P][LANES];
    V acc[R][P];
    for (int64_t at = 0; at < SUMS; ++at, panel += steps * LANES) {
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < P; ++p) acc[r][p] = zero();
        Thirds<R> rows(x + at * steps, SUMS * steps);
        const float* column = panel;
        for (int64_t k = 0; k < steps; k += OF_GROUP) {
#pragma GCC unroll 4
            for (int step = 0; step < OF_GROUP; ++step, column += LANES, rows.advance(1)) {
                V b[P];
                for (int p = 0; p < P; ++p) b[p] = load(column + p * apart);
                for (int r = 0; r < R; ++r) {
                    V a = set1(rows.of(r));
                    for (int p = 0; p < P; ++p) acc[r][p] = multiply_add<PAIRS>(a, b[p], acc[r][p]);
                }
            }
        }
        // After the second sum of a pair the two are joined, after the second pair the pairs, and so on.
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

using ProductTile = void (*)(const float*, int64_t, const float*, float* const*, int);
template <bool PAIRS, int P, int... R>
constexpr std::array<ProductTile, sizeof...(R)> product_tiles(std::integer_sequence<int, R...>) {
    return {&tile<PAIRS, P, R + 1>...};
}
// Tiles of 1 to TILE_ROWS rows.
template <bool PAIRS, int P>
inline constexpr auto PRODUCT_TILES = product_tiles<PAIRS, P>(std::make_integer_sequence<int, TILE_ROWS>());

// How many rows the next tile takes, so that the tiles of what is left are of like height.
inline int next_rows(int64_t left) {
    int64_t tiles = (left + TILE_ROWS - 1) / TILE_ROWS;
    return static_cast<int>((left + tiles - 1) / tiles);
}

// Rows times columns of a weight, which is packed first; PAIRS where BF16 holds all of them.
template <bool PAIRS>
inline void packed_product(const float* const* x, int64_t rows, const Weight& w, int64_t n0, int64_t n1, float* const* y) {
    const int64_t groups = groups_of(w.in), of_row = groups * GROUP / (PAIRS ? 2 : 1), apart = of_row * LANES;
    const int64_t panels = (n1 - n0 + LANES - 1) / LANES;
    float* packed = scratch(Scratch::packed, (panels + TILE_PANELS) * apart);
    float* ordered = scratch(Scratch::rows, TILE_ROWS * groups * GROUP);
    pack<PAIRS>(w, n0, n1, packed);
    for (int64_t r = 0; r < rows;) {
        int count = next_rows(rows - r);
        float* to[TILE_ROWS];
        for (int j = 0; j < count; ++j) order_row<PAIRS>(x[r + j], w.in, ordered + j * of_row);
        for (int64_t p = 0; p < panels; p += TILE_PANELS) {
            for (int j = 0; j < count; ++j) to[j] = y[r + j] + n0 + p * LANES;
            const int columns = static_cast<int>(std::min<int64_t>(TILE_COLUMNS, n1 - n0 - p * LANES));
            const auto& of = columns <= LANES ? PRODUCT_TILES<PAIRS, 1> : PRODUCT_TILES<PAIRS, TILE_PANELS>;
            of[static_cast<size_t>(count - 1)](ordered, groups, packed + p * apart, to, columns);
        }
        r += count;
    }
}

// Rows x[0..rows) times columns [n0, n1) of a weight, n0 a multiple of 16, into y[r] + n0.
inline void block_product(const float* const* x, int64_t rows, const Weight& w, int64_t n0, int64_t n1, float* const* y) {
#if defined(DSV4_ISA_AMX)
    if (w.kind != Kind::f32) return tiles_product(x, rows, w, n0, n1, y);
#endif
#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)
    if (rows == 1) n0 = fast_dots(x[0], w, n0, n1, y[0]);
#endif
    if (n0 == n1) return;
#if defined(DSV4_ISA_AVX512_BF16)
    if (holds_pairs(w, n0, n1) && std::all_of(x, x + rows, [&](const float* row) { return holds(row, w.in); }))
        return packed_product<true>(x, rows, w, n0, n1, y);
#endif
    packed_product<false>(x, rows, w, n0, n1, y);
}

inline void product(const float* const* x, int64_t rows, const Weight& w, float* const* y) {
    block_product(x, rows, w, 0, w.out, y);
}

// How many columns of a weight a part of a product takes where there are many rows: as many as a packed weight of 256 KB
// has, but 128 at least. Each part puts its rows in order anew; with AMX, which multiplies quicker than it takes rows apart and
// packs piece by piece, parts are wider.
inline int64_t columns_at_once([[maybe_unused]] int64_t in) {
#if defined(DSV4_ISA_AMX)
    return 1024;
#else
    return std::clamp<int64_t>((64 << 10) / std::max<int64_t>(1, in) / TILE_COLUMNS * TILE_COLUMNS, 128, 512);
#endif
}

// So many rows a thread make up for packing a weight anew for each part of them.
constexpr int64_t ROWS_APART = 288;

struct FewRows;

// Columns [n0, n1) of a weight for rows [r0, r1).
struct Part {
    const Weight* w;
    Rows x, y;
    int64_t r0, r1, n0, n1;
    const FewRows* few = nullptr;  // with AMX the rows, turned

    void run() const {
        std::vector<const float*> from;
        std::vector<float*> to;
        for (int64_t r = r0; r < r1; ++r) from.push_back(x.data + r * x.stride), to.push_back(y.data + r * y.stride);
#if defined(DSV4_ISA_AMX)
        if (few) return few_rows_product(*few, *w, n0, n1, to.data());
#endif
        block_product(from.data(), r1 - r0, *w, n0, n1, to.data());
    }
};

inline void run(const std::vector<Part>& parts) {
    parallel(static_cast<int64_t>(parts.size()), [&](int64_t task, int) { parts[static_cast<size_t>(task)].run(); });
}

// Several products at once, each of its own rows and weight; together they fill the threads.
struct Product {
    Rows x;
    const Weight* w;
    Rows y;
};

// For AMX the few rows of each product, turned once for all parts and for neighbours that share them; null otherwise.
inline std::vector<const FewRows*> take_few_rows([[maybe_unused]] const Product* list, int count, [[maybe_unused]] int64_t rows) {
    std::vector<const FewRows*> of(static_cast<size_t>(count));
#if defined(DSV4_ISA_AMX)
    thread_local std::vector<FewRows> memory;
    if (rows > FEW_ROWS) return of;
    memory.resize(std::max(memory.size(), of.size()));
    const Product* last = nullptr;
    for (size_t i = 0; i < of.size(); ++i) {
        const Product& now = list[i];
        if (now.w->kind == Kind::f32) continue;
        if (last && last->x.data == now.x.data && last->x.stride == now.x.stride && last->w->in == now.w->in) {
            of[i] = of[static_cast<size_t>(last - list)];
            continue;
        }
        const float* x[FEW_ROWS];
        for (int64_t r = 0; r < rows; ++r) x[r] = now.x.data + r * now.x.stride;
        memory[i].take(x, rows, now.w->in);
        of[i] = &memory[i];
        last = &now;
    }
#endif
    return of;
}

inline void products(const Product* list, int count, int64_t rows) {
    std::vector<Part> parts;
    int64_t work = 0;
    const std::vector<const FewRows*> few = take_few_rows(list, count, rows);
    for (int i = 0; i < count; ++i) work += list[i].w->out * list[i].w->in;
    // A few rows: one part a thread and product of equal work. More: some parts a thread, of columns, or of rows where there
    // are enough of them.
    const int64_t shares = thread_count() * (rows < 8 ? 1 : 4);
    for (int i = 0; i < count; ++i) {
        const Weight& w = *list[i].w;
        const int64_t target = std::max<int64_t>(1, work / shares);
        int64_t wide = std::max<int64_t>(1, target / std::max<int64_t>(1, w.in)), high = rows;
        wide = (wide + 2 * LANES - 1) / (2 * LANES) * 2 * LANES;
        if (rows > 1) wide = std::min<int64_t>(wide, 128);
        if (rows >= ROWS_APART * thread_count()) {
            wide = columns_at_once(w.in);
            high = std::max(ROWS_APART, target * rows / std::max<int64_t>(1, std::min(wide, w.out) * w.in));
            high = (high + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
        }
        const FewRows* own = few[static_cast<size_t>(i)];
        for (int64_t n = 0; n < w.out; n += wide)
            for (int64_t r = 0; r < rows; r += high)
                parts.push_back({&w, list[i].x, list[i].y, r, std::min(rows, r + high), n, std::min(w.out, n + wide), own});
    }
    run(parts);
}

}  // namespace dsv4::DSV4_ISA
