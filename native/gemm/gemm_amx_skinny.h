// Products of few rows, up to 48 of one part or 16 of three, with a weight on AMX tiles: the rows are turned, the weight is
// read from memory once. See gemm/gemm_amx.h.
#pragma once

#include "gemm/amx.h"

#if defined(DSV4_ISA_AMX)

namespace dsv4::DSV4_ISA {

constexpr int64_t MOST_COLUMNS = 3 * LANES, FEW_ROWS = MOST_COLUMNS / MOST_PARTS;  // so few fit whatever their parts

// Rows of few columns (one or, in parts, three each), turned: what products of them with any weight read. Tile i of group g
// begins at (g * tiles + i) * words.
struct FewRows {
    std::vector<uint16_t> memory;
    uint16_t* turned = nullptr;
    int64_t rows = 0, tiles = 0, words = 0;
    int parts = 1;

    // False where the rows have more columns than the tiles take.
    bool take(const float* const* x, int64_t count, int64_t in) {
        const int64_t groups = groups_of(in), stride = groups * GROUP;
        uint16_t* taken = aligned_words(Scratch::wide, MOST_PARTS * count * stride);
        rows = count;
        parts = split_rows(x, rows, in, taken, rows * stride, stride) ? MOST_PARTS : 1;
        const int64_t columns = parts * rows;
        if (columns > MOST_COLUMNS) return false;
        tiles = (columns + LANES - 1) / LANES;
        // One row has three columns at most: its tiles' rows are four pairs long.
        words = rows == 1 ? TILE_WORDS / 4 : TILE_WORDS;
        memory.resize(static_cast<size_t>(groups * tiles * words + 32));
        turned = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
        static const uint16_t nothing[GROUP] = {};
        for (int64_t g = 0; g < groups; ++g) {
            if (rows == 1) {
                turn_parts(taken + g * GROUP, parts, stride, turned + g * words);
                continue;
            }
            for (int64_t i = 0; i < tiles; ++i) {
                const uint16_t* row[LANES];
                for (int64_t c = 0; c < LANES; ++c)
                    row[c] = i * LANES + c < columns ? taken + (i * LANES + c) * stride + g * GROUP : nothing;
                turn_pairs(row, turned + (g * tiles + i) * words);
            }
        }
        return true;
    }

    // Three rows of 16 pairs -> sixteen times a pair of each and an empty one; of one part the others are empty too.
    static void turn_parts(const uint16_t* from, int parts, int64_t apart, uint16_t* to) {
        __m512i none = _mm512_setzero_si512(), p0 = _mm512_loadu_si512(from), p1 = none, p2 = none, a[4];
        if (parts > 1) p1 = _mm512_loadu_si512(from + apart), p2 = _mm512_loadu_si512(from + 2 * apart);
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
        const __m512i outputs = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
        const __m512i place = _mm512_add_epi32(_mm512_set1_epi32(c), outputs);
        __m512 first = _mm512_permutex2var_ps(_mm512_load_ps(sums), place, _mm512_load_ps(sums + LANES));
        __m512 second = _mm512_permutex2var_ps(_mm512_load_ps(sums + 2 * LANES), place, _mm512_load_ps(sums + 3 * LANES));
        return _mm512_shuffle_f32x4(first, second, 0x44);
    };
    const __m512 high = column(0);
    return _mm512_add_ps(high, _mm512_maskz_add_ps(finite(high), column(1), column(2)));
}

constexpr int64_t SHORT_ROW = 2048;  // bytes

// Asks for the memory of a weight, some lines with every group of a block's W panels, before it is read. Short rows: one line
// after the other of the next block, for the second cache. Long ones, of which the next are far: some groups on in these rows,
// for the first.
template <Kind kind, int W>
struct Ahead {
    static constexpr int64_t HIGH = W * LANES, BYTES = group_bytes(kind), LINES = HIGH * BYTES / 64, GROUPS = 8;
    static constexpr int64_t EVERY = 64 / BYTES, ROWS_AT_ONCE = HIGH / EVERY;
    const uint8_t *codes, *scales = nullptr;
    int64_t stride, groups;

    Ahead(const Weight& w, int64_t n) : codes(w.data + n * w.stride), stride(w.stride), groups(groups_of(w.in)) {
        if (kind == Kind::fp4 && w.scale_stride == groups) scales = w.scales + (w.first + n) * groups;
        for (int64_t g = 0; g < groups; g += 2) ask_scales(g);
        for (int64_t i = 0; i < 4096; i += 64) _mm_prefetch(reinterpret_cast<const char*>(codes + i), _MM_HINT_T1);
    }
    [[gnu::always_inline]] void ask(int64_t block, int64_t g) const {
        if (g % 2 == 0) ask_scales((block + 1) * groups + g);
        if (stride <= SHORT_ROW) {
            const uint8_t* from = codes + (block + 1) * HIGH * stride + g * LINES * 64;
            for (int64_t i = 0; i < LINES; ++i) _mm_prefetch(reinterpret_cast<const char*>(from + i * 64), _MM_HINT_T1);
            return;
        }
        const int64_t row = block * HIGH + g % EVERY * ROWS_AT_ONCE;
        g = g / EVERY * EVERY + GROUPS;
        const uint8_t* from = codes + (g < groups ? row : row + HIGH) * stride + (g < groups ? g : g - groups) * BYTES;
        for (int64_t r = 0; r < ROWS_AT_ONCE; ++r) _mm_prefetch(reinterpret_cast<const char*>(from + r * stride), _MM_HINT_T0);
    }

   private:
    [[gnu::always_inline]] void ask_scales(int64_t g) const {
        if (scales) _mm_prefetch(reinterpret_cast<const char*>(scales + g * HIGH), _MM_HINT_T1);
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
    alignas(64) float columns[X * W][LANES * LANES];  // the same, a row's 16 outputs side by side
    for (int t = 0; !ONE && t < X * W; ++t) {
        const uint16_t* row[LANES];
        for (int o = 0; o < LANES; ++o) row[o] = reinterpret_cast<const uint16_t*>(sums[t] + o * LANES);
        turn_pairs(row, reinterpret_cast<uint16_t*>(columns[t]));
    }
    for (int j = 0; j < W; ++j) {
        const int64_t at = n + j * LANES, outputs = std::min<int64_t>(LANES, w.out - at);
        if constexpr (ONE) {
            store_n(y[0] + at, {join_parts(sums[j])}, static_cast<int>(outputs));
            continue;
        }
        for (int64_t r = 0; r < of.rows; ++r) {
            auto part = [&](int64_t p) __attribute__((always_inline)) {
                const int64_t column = p * of.rows + r;
                return _mm512_load_ps(columns[column / LANES * W + j] + column % LANES * LANES);
            };
            __m512 sum = part(0), rest = _mm512_setzero_ps();
            if (of.parts > 1) rest = _mm512_maskz_add_ps(finite(sum), part(1), part(2));
            store_n(y[r] + at, {_mm512_add_ps(sum, rest)}, static_cast<int>(outputs));
        }
    }
}

// Few rows (ONE: of a single row the three parts): their columns side by side, X tiles of them, times blocks of W panels,
// each of PARTS tiles a group.
//
// A widened tile is multiplied LAG tiles later, over the ends of blocks too: its stores have then left for the cache, from
// where alone a tile is read, and those on their way have other places within 4096 bytes, which is all that a processor
// compares.
template <Kind kind, int PARTS, bool ONE, int X, int W>
inline void few_rows(const FewRows& of, const Weight& w, int64_t n, int64_t blocks, float* const* y) {
    constexpr int LAG = 7, KEPT = LAG + 1;
    constexpr int64_t ROW_BYTES = ONE ? 16 : 64, WORDS = ONE ? TILE_WORDS / 4 : TILE_WORDS, HIGH = W * LANES;
    const int64_t groups = groups_of(w.in);
    const uint16_t* const turned = of.turned;
    const Ahead<kind, W> ahead(w, n);
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
    for (; item < all + LAG; ++item) {
        if (item < LAG) continue;
        (item - LAG) % W == 0 ? multiply(std::integral_constant<int, 0>{}) : multiply(std::integral_constant<int, W - 1>{});
    }
}

template <Kind kind, int PARTS, bool ONE, int X>
inline void few_rows_of(const FewRows& of, const Weight& w, int64_t n0, int64_t n1, float* const* y) {
    if (w.in == 0) {
        for (int64_t r = 0; r < of.rows; ++r) std::fill(y[r] + n0, y[r] + n1, 0.0f);
        return;
    }
    // Of long rows 16 are read side by side, which is quicker than 32: presumably the processor's own looking ahead follows no more.
    const int64_t pairs = ONE && w.stride > SHORT_ROW ? 0 : (n1 - n0) / (2 * LANES), rest = n0 + pairs * 2 * LANES;
    if (pairs) few_rows<kind, PARTS, ONE, X, 2>(of, w, n0, pairs, y);
    if (rest < n1) few_rows<kind, PARTS, ONE, X, 1>(of, w.rows(0, n1), rest, (n1 - rest + LANES - 1) / LANES, y);
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

}  // namespace dsv4::DSV4_ISA

#endif
