// Products on the matrix unit of processors with AMX, which multiplies BF16 tiles of 16 x 32 and adds in fp32.
//
// A number is the sum of three BF16 numbers, to its last bit: high, middle and low part. Weights in FP4, BF16 and FP8 with
// power-of-two scales are their high part alone, and so are rows rounded to FP8. The parts of x are multiplied apart and joined last.
// FP32 weights stay with linear.h: taking them apart would take longer than multiplying them.
//
// Order of an element, for each part of x: from zero, group after group of 32 inputs and in a group the weight's parts from high to
// low, adds one number: the chain of its even inputs from zero plus the chain of its odd ones. The three are joined as
// high + (middle + low), or the high one alone counts where it is not finite: then it does not matter whether other rows of a
// block needed three parts. Tiles take numbers below 2^-126 for zero. The order is what the unit does (Intel's manual, TDPBF16PS).
//
// A tile's second factor holds pairs of inputs side by side: 16 of them for each of 16 columns. Where rows are few they are turned
// for it, where they are many the weight is. Both ways give the same bits.
#pragma once

#include "amx_tiles.h"

#if defined(DSV4_ISA_AMX)

namespace dsv4::DSV4_ISA {

constexpr int64_t FEW_ROWS = 16;
constexpr int64_t BLOCK_ROWS = 48;        // three tiles of rows
constexpr int64_t CACHE_WORDS = 1 << 18;  // what half a megabyte of second-level cache holds

// Up to 16 rows, turned: what products of them with any weight read. Tile i of group g begins at (g * tiles + i) * words.
struct FewRows {
    std::vector<uint16_t> memory;
    uint16_t* turned = nullptr;
    int64_t rows = 0, tiles = 0, words = 0;
    int parts = 1;

    void take(const float* const* x, int64_t count, int64_t in) {
        const int64_t groups = groups_of(in), stride = groups * GROUP;
        uint16_t* taken = aligned_words(Scratch::wide, MOST_PARTS * count * stride);
        rows = count;
        parts = split_rows(x, rows, in, taken, rows * stride, stride) ? MOST_PARTS : 1;
        const int64_t columns = parts * rows;
        tiles = (columns + LANES - 1) / LANES;
        // One row has three columns at most: its tiles' rows are four pairs long.
        words = rows == 1 ? TILE_WORDS / 4 : TILE_WORDS;
        memory.resize(static_cast<size_t>(groups * tiles * words + 32));
        turned = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
        static const uint16_t nothing[GROUP] = {};
        for (int64_t g = 0; g < groups; ++g) {
            if (rows == 1) {
                turn_parts(taken + g * GROUP, stride, turned + g * words);
                continue;
            }
            for (int64_t i = 0; i < tiles; ++i) {
                const uint16_t* row[LANES];
                for (int64_t c = 0; c < LANES; ++c)
                    row[c] = i * LANES + c < columns ? taken + (i * LANES + c) * stride + g * GROUP : nothing;
                turn_pairs(row, turned + (g * tiles + i) * words);
            }
        }
    }

    // Three rows of 16 pairs -> sixteen times a pair of each and an empty one.
    static void turn_parts(const uint16_t* from, int64_t apart, uint16_t* to) {
        __m512i p0 = _mm512_loadu_si512(from), p1 = _mm512_loadu_si512(from + apart), p2 = _mm512_loadu_si512(from + 2 * apart);
        __m512i none = _mm512_setzero_si512(), a[4];
        __m512i low = _mm512_unpacklo_epi32(p0, p1), high = _mm512_unpackhi_epi32(p0, p1);
        __m512i low2 = _mm512_unpacklo_epi32(p2, none), high2 = _mm512_unpackhi_epi32(p2, none);
        a[0] = _mm512_unpacklo_epi64(low, low2), a[1] = _mm512_unpackhi_epi64(low, low2);
        a[2] = _mm512_unpacklo_epi64(high, high2), a[3] = _mm512_unpackhi_epi64(high, high2);  // quarter q of a[j]: pair 4 * q + j
        __m512i b0 = _mm512_shuffle_i32x4(a[0], a[1], 0x44), b1 = _mm512_shuffle_i32x4(a[2], a[3], 0x44);
        __m512i b2 = _mm512_shuffle_i32x4(a[0], a[1], 0xEE), b3 = _mm512_shuffle_i32x4(a[2], a[3], 0xEE);
        _mm512_store_si512(to, _mm512_shuffle_i32x4(b0, b1, 0x88)), _mm512_store_si512(to + 32, _mm512_shuffle_i32x4(b0, b1, 0xDD));
        _mm512_store_si512(to + 64, _mm512_shuffle_i32x4(b2, b3, 0x88)), _mm512_store_si512(to + 96, _mm512_shuffle_i32x4(b2, b3, 0xDD));
    }
};

// Sums of one row's parts, of 16 outputs a column each of three -> the outputs.
[[gnu::always_inline]] inline __m512 join_parts(const float* sums) {
    auto column = [&](int c) __attribute__((always_inline)) {
        const __m512i place = _mm512_add_epi32(_mm512_set1_epi32(c), _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28));
        __m512 first = _mm512_permutex2var_ps(_mm512_load_ps(sums), place, _mm512_load_ps(sums + LANES));
        __m512 second = _mm512_permutex2var_ps(_mm512_load_ps(sums + 2 * LANES), place, _mm512_load_ps(sums + 3 * LANES));
        return _mm512_shuffle_f32x4(first, second, 0x44);
    };
    const __m512 high = column(0);
    const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(high), _mm512_set1_ps(INFINITY), _CMP_LT_OQ);
    return _mm512_add_ps(high, _mm512_maskz_add_ps(finite, column(1), column(2)));
}

// Asks for the memory of a weight, some lines with every group of 32 rows, before it is read. Short rows: one line after the other of the
// next 32 rows, for the second cache. Long ones, of which the next are far: some groups on in these rows, for the first.
template <Kind kind>
struct Ahead {
    static constexpr int64_t BYTES = group_bytes(kind), LINES = 2 * LANES * BYTES / 64, SHORT = 2048, GROUPS = 8;
    static constexpr int64_t EVERY = 64 / BYTES, ROWS_AT_ONCE = 2 * LANES / EVERY;
    const uint8_t *codes, *scales = nullptr;
    int64_t stride, groups;

    Ahead(const Weight& w, int64_t n) : codes(w.data + n * w.stride), stride(w.stride), groups(groups_of(w.in)) {
        if (kind == Kind::fp4 && w.scale_stride == groups) scales = w.scales + (w.first + n) * groups;
        for (int64_t g = 0; g < groups; g += 2) ask_scales(g);
        for (int64_t i = 0; i < 4096; i += 64) _mm_prefetch(reinterpret_cast<const char*>(codes + i), _MM_HINT_T1);
    }
    [[gnu::always_inline]] void ask(int64_t block, int64_t g) const {
        if (g % 2 == 0) ask_scales((block + 1) * groups + g);
        if (stride <= SHORT) {
            const uint8_t* from = codes + (block + 1) * 2 * LANES * stride + g * LINES * 64;
            for (int64_t i = 0; i < LINES; ++i) _mm_prefetch(reinterpret_cast<const char*>(from + i * 64), _MM_HINT_T1);
            return;
        }
        const int64_t row = block * 2 * LANES + g % EVERY * ROWS_AT_ONCE;
        g = g / EVERY * EVERY + GROUPS;
        const uint8_t* from = codes + (g < groups ? row : row + 2 * LANES) * stride + (g < groups ? g : g - groups) * BYTES;
        for (int64_t r = 0; r < ROWS_AT_ONCE; ++r) _mm_prefetch(reinterpret_cast<const char*>(from + r * stride), _MM_HINT_T0);
    }

   private:
    [[gnu::always_inline]] void ask_scales(int64_t g) const {
        if (scales) _mm_prefetch(reinterpret_cast<const char*>(scales + g * 2 * LANES), _MM_HINT_T1);
    }
};

// Sums of few rows and W panels from output n on, in tiles i * W + j -> y; the tiles are zero again.
template <bool ONE, int X, int W>
[[gnu::always_inline]] inline void take_few(const FewRows& of, const Weight& w, int64_t n, float* const* y) {
    alignas(64) float sums[X * W][LANES * LANES];
    each<X * W>([&](auto t) __attribute__((always_inline)) {
        tile_store<decltype(t)::value>(sums[t], ONE ? 16 : 64);
        tile_zero<decltype(t)::value>();
    });
    for (int j = 0; j < W; ++j) {
        const int64_t at = n + j * LANES, outputs = std::min<int64_t>(LANES, w.out - at);
        if constexpr (ONE) {
            store_n(y[0] + at, {join_parts(sums[j])}, static_cast<int>(outputs));
            continue;
        }
        for (int64_t r = 0; r < of.rows; ++r)
            for (int64_t o = 0; o < outputs; ++o) {
                auto part = [&](int64_t p) { return sums[(p * of.rows + r) / LANES * W + j][o * LANES + (p * of.rows + r) % LANES]; };
                const float rest = of.parts > 1 && std::isfinite(part(0)) ? part(1) + part(2) : 0.0f;
                y[r][at + o] = part(0) + rest;
            }
    }
}

// Up to 16 rows (ONE: of a single row the three parts): their parts' columns side by side, X tiles of them, times blocks of W panels,
// each of PARTS tiles a group.
//
// A widened tile is multiplied LAG tiles later, over the ends of blocks too: its stores have then left for the cache, from where alone a
// tile is read, and those on their way have other places within 4096 bytes, which is all that a processor compares.
template <Kind kind, int PARTS, bool ONE, int X, int W>
inline void few_rows(const FewRows& of, const Weight& w, int64_t n, int64_t blocks, float* const* y) {
    constexpr int LAG = 7, KEPT = LAG + 1;
    constexpr int64_t ROW_BYTES = ONE ? 16 : 64, WORDS = ONE ? TILE_WORDS / 4 : TILE_WORDS, HIGH = W * LANES;
    const int64_t groups = groups_of(w.in);
    const uint16_t* const turned = of.turned;
    const Ahead<kind> ahead(w, n);
    auto row_tile = [&](int64_t g, int i) __attribute__((always_inline)) { return turned + (g * X + i) * WORDS; };
    each<X * W>([&](auto t) __attribute__((always_inline)) { tile_zero<decltype(t)::value>(); });
    if (kind == Kind::bf16 && w.in % GROUP == 0 && n + blocks * HIGH <= w.out) {  // read where they are stored
        const int64_t stride = w.stride;
        for (int64_t block = 0; block < blocks; ++block) {
            const uint8_t* const begin = w.data + (n + block * HIGH) * stride;
            for (int64_t g = 0; g < groups; ++g) {
                const uint16_t* x[X];
                const uint16_t* panel[W];
                ahead.ask(block, g);
                for (int i = 0; i < X; ++i) x[i] = row_tile(g, i);
                for (int j = 0; j < W; ++j) panel[j] = reinterpret_cast<const uint16_t*>(begin + j * LANES * stride + g * 64);
                add_tiles<X, W, true>(x, {0, ROW_BYTES}, panel, {GROUP, stride}, 1, 1);
            }
            take_few<ONE, X, W>(of, w, n + block * HIGH, y);
        }
        return;
    }
    alignas(64) uint16_t kept[KEPT][PARTS][TILE_WORDS];
    int64_t item = 0, late_g = 0, late_n = n;
    // Multiplies item - LAG, which is of panel J, group late_g and output late_n.
    auto multiply = [&](auto panel) __attribute__((always_inline)) {
        constexpr int J = decltype(panel)::value;
        for (int p = 0; p < PARTS; ++p) {
            tile_load<6>(kept[(item - LAG) % KEPT][p], 64);
            each<X>([&](auto i) __attribute__((always_inline)) {
                if (X > 1 || (J == 0 && p == 0)) tile_load<7>(row_tile(late_g, i), ROW_BYTES);
                tile_multiply<decltype(i)::value * W + J, 6, 7>();
            });
        }
        if (J < W - 1 || ++late_g < groups) return;
        take_few<ONE, X, W>(of, w, late_n, y);
        late_g = 0, late_n += HIGH;
    };
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t at = n + block * HIGH;
        const Panel<kind> panels[2] = {{w, at}, {w, at + HIGH - LANES}};
        for (int64_t g = 0; g < groups; ++g) {
            ahead.ask(block, g);
            each<W>([&](auto panel) __attribute__((always_inline)) {
                constexpr int J = decltype(panel)::value;
                widen<kind, PARTS>(w, panels[J], at + J * LANES, g, kept[item % KEPT][0]);
                if (item >= LAG) multiply(std::integral_constant<int, (J + LAG * W - LAG) % W>{});
                ++item;
            });
        }
    }
    const int64_t all = blocks * groups * W;
    for (; item < all + LAG; ++item)
        if (item >= LAG) (item - LAG) % W == 0 ? multiply(std::integral_constant<int, 0>{}) : multiply(std::integral_constant<int, W - 1>{});
}

template <Kind kind, int PARTS, bool ONE, int X>
inline void few_rows_of(const FewRows& of, const Weight& w, int64_t n0, int64_t n1, float* const* y) {
    if (w.in == 0) {
        for (int64_t r = 0; r < of.rows; ++r) std::fill(y[r] + n0, y[r] + n1, 0.0f);
        return;
    }
    const int64_t pairs = (n1 - n0) / (2 * LANES), rest = n0 + pairs * 2 * LANES;
    if (pairs) few_rows<kind, PARTS, ONE, X, 2>(of, w, n0, pairs, y);
    if (rest < n1) few_rows<kind, PARTS, ONE, X, 1>(of, w.rows(0, n1), rest, (n1 - rest + LANES - 1) / LANES, y);
}

// X tiles of rows, the parts of 16 rows or (parts 1) 16 rows each, times panels of a turned weight.
template <int X>
inline void many_rows(const uint16_t* const* x, int64_t stride, int64_t rows, int parts, const uint16_t* turned, const Weight& w, int64_t n0,
                      int64_t n1, float* const* y) {
    const int64_t groups = groups_of(w.in);
    const int weight = weight_parts(w);
    alignas(64) float sums[X * 2][LANES * LANES];
    auto take = [&](auto panels, int64_t n) __attribute__((always_inline)) {
        constexpr int W = decltype(panels)::value;
        const uint16_t* panel[W];
        for (int j = 0; j < W; ++j) panel[j] = turned + ((n - n0) / LANES + j) * groups * weight * TILE_WORDS;
        each<X * W>([&](auto t) __attribute__((always_inline)) { tile_zero<decltype(t)::value>(); });
        add_tiles<X, W, false>(x, {GROUP, 2 * stride}, panel, {TILE_WORDS, 64}, weight, groups);
        take_tiles<X, W>(sums);
        for (int j = 0; j < W; ++j) {
            int left = static_cast<int>(std::min<int64_t>(LANES, n1 - n - j * LANES));
            for (int64_t r = 0; r < rows; ++r) {
                const float* high = sums[(parts == 1 ? r / LANES : 0) * W + j] + r % LANES * LANES;
                __m512 sum = _mm512_loadu_ps(high), rest = _mm512_setzero_ps();
                if (parts > 1) {
                    __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(sum), _mm512_set1_ps(INFINITY), _CMP_LT_OQ);
                    rest = _mm512_maskz_add_ps(finite, _mm512_loadu_ps(high + W * LANES * LANES), _mm512_loadu_ps(high + 2 * W * LANES * LANES));
                }
                store_n(y[r] + n + j * LANES, {_mm512_add_ps(sum, rest)}, left);
            }
        }
    };
    for (int64_t n = n0; n < n1; n += 2 * LANES)
        if (n + LANES < n1)
            take(std::integral_constant<int, 2>{}, n);
        else
            take(std::integral_constant<int, 1>{}, n);
}

template <Kind kind>
inline void many_rows_product(const float* const* x, int64_t rows, const Weight& w, int64_t n0, int64_t n1, float* const* y) {
    const int64_t groups = groups_of(w.in), weight = weight_parts(w), panel = groups * weight * TILE_WORDS;
    const int64_t stride = (groups | 1) * GROUP;  // odd: rows a power of two apart would share places in the first-level cache
    const int64_t height = std::max(3 * BLOCK_ROWS, 2 * CACHE_WORDS / (MOST_PARTS * stride) / BLOCK_ROWS * BLOCK_ROWS);
    const int64_t width = std::max<int64_t>(2, CACHE_WORDS / std::max<int64_t>(1, panel)) * LANES;
    const Weight columns = w.rows(0, n1);
    for (int64_t r0 = 0; r0 < rows; r0 += height) {
        const int64_t tall = std::min(height, rows - r0), apart = (tall + LANES - 1) / LANES * LANES * stride;
        uint16_t* taken = aligned_words(Scratch::wide, MOST_PARTS * apart);
        const int parts = split_rows(x + r0, tall, w.in, taken, apart, stride) ? MOST_PARTS : 1;
        for (int64_t n = n0; n < n1; n += width) {
            const int64_t stop = std::min(n1, n + width);
            uint16_t* turned = aligned_words(Scratch::packed, (stop - n + LANES - 1) / LANES * panel);
            uint16_t* to = turned;
            for (int64_t m = n; m < stop; m += LANES)
                for (int64_t g = 0; g < groups; ++g) {
                    alignas(64) uint16_t tiles[MOST_PARTS * TILE_WORDS];
                    weight == 1 ? widen<kind, 1>(columns, Panel<kind>(columns, m), m, g, tiles)
                                : widen<kind, MOST_PARTS>(columns, Panel<kind>(columns, m), m, g, tiles);
                    for (int64_t p = 0; p < weight; ++p, to += TILE_WORDS) {
                        const uint16_t* row[LANES];
                        for (int j = 0; j < LANES; ++j) row[j] = tiles + p * TILE_WORDS + j * GROUP;
                        turn_pairs(row, to);
                    }
                }
            const int64_t step = parts == 1 ? BLOCK_ROWS : LANES;
            for (int64_t r = 0; r < tall; r += step) {
                const int64_t count = std::min(step, tall - r);
                const uint16_t* tile[MOST_PARTS];
                for (int i = 0; i < MOST_PARTS; ++i) tile[i] = taken + r * stride + i * (parts == 1 ? LANES * stride : apart);
                float* const* out = y + r0 + r;
                switch (parts == 1 ? (count + LANES - 1) / LANES : MOST_PARTS) {
                    case 1: many_rows<1>(tile, stride, count, parts, turned, w, n, stop, out); break;
                    case 2: many_rows<2>(tile, stride, count, parts, turned, w, n, stop, out); break;
                    default: many_rows<3>(tile, stride, count, parts, turned, w, n, stop, out);
                }
            }
        }
    }
}

template <class F>
inline void with_kind(Kind kind, F&& f) {
    switch (kind) {
        case Kind::f32: std::abort();
        case Kind::bf16: return f(std::integral_constant<Kind, Kind::bf16>{});
        case Kind::fp8: return f(std::integral_constant<Kind, Kind::fp8>{});
        case Kind::fp4: return f(std::integral_constant<Kind, Kind::fp4>{});
    }
}

// Few rows times outputs [n0, n1) of a weight, into y[r] + n0.
inline void few_rows_product(const FewRows& x, const Weight& w, int64_t n0, int64_t n1, float* const* y) {
    Tiles tiles(x.rows == 1 ? ONE_ROW_TILES : WIDE_TILES);
    with_kind(w.kind, [&](auto kind) {
        constexpr Kind KIND = decltype(kind)::value;
        auto with_parts = [&](auto parts) {
            constexpr int PARTS = decltype(parts)::value;
            if (x.rows == 1) return few_rows_of<KIND, PARTS, true, 1>(x, w, n0, n1, y);
            switch (x.tiles) {
                case 1: return few_rows_of<KIND, PARTS, false, 1>(x, w, n0, n1, y);
                case 2: return few_rows_of<KIND, PARTS, false, 2>(x, w, n0, n1, y);
                default: return few_rows_of<KIND, PARTS, false, 3>(x, w, n0, n1, y);
            }
        };
        if constexpr (KIND == Kind::fp8)
            if (weight_parts(w) > 1) return with_parts(std::integral_constant<int, MOST_PARTS>{});
        with_parts(std::integral_constant<int, 1>{});
    });
}

// Rows x[0..rows) times outputs [n0, n1) of a weight, into y[r] + n0.
inline void tiles_product(const float* const* x, int64_t rows, const Weight& w, int64_t n0, int64_t n1, float* const* y) {
    if (rows <= FEW_ROWS) {
        thread_local FewRows few;
        few.take(x, rows, w.in);
        return few_rows_product(few, w, n0, n1, y);
    }
    Tiles tiles(WIDE_TILES);
    with_kind(w.kind, [&](auto kind) { many_rows_product<decltype(kind)::value>(x, rows, w, n0, n1, y); });
}

}  // namespace dsv4::DSV4_ISA

#endif
