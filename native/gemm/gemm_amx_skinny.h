// Skinny GEMM on AMX, of up to 48 rows that are exact in BF16, or 16 rows of three terms: the rows are transposed to
// VNNI layout, and the weight streams once from memory. See gemm_amx.h.
#pragma once

#include "base/aligned.h"
#include "gemm/amx.h"

#if defined(DSV4_ISA_AMX)

namespace dsv4::DSV4_ISA {

constexpr int64_t MAX_COLUMNS = 3 * LANES;                // a row has one column per term
constexpr int64_t SKINNY_ROWS = MAX_COLUMNS / MAX_TERMS;  // rows that fit with any number of terms

// Rows packed in VNNI layout, for products with any weight. Tile i of group g begins at (g * tiles + i) * words.
struct SkinnyRows {
    Aligned<uint16_t> memory;
    uint16_t* packed = nullptr;
    int64_t rows = 0, tiles = 0, words = 0;
    int terms = 1;

    // False if the rows have more than MAX_COLUMNS columns.
    bool pack(const float* const* x, int64_t count, int64_t in) {
        const int64_t groups = groups_of(in), stride = groups * GROUP;
        uint16_t* split = scratch<uint16_t>(Scratch::staging, MAX_TERMS * count * stride);
        rows = count;
        terms = split_rows(x, rows, in, split, rows * stride, stride);
        const int64_t columns = terms * rows;
        if (columns > MAX_COLUMNS) return false;
        tiles = (columns + LANES - 1) / LANES;
        // A single row has at most three columns: its tiles are four pairs wide.
        words = rows == 1 ? TILE_WORDS / 4 : TILE_WORDS;
        packed = memory.reserve(groups * tiles * words);
        static const uint16_t zeros[GROUP] = {};
        for (int64_t g = 0; g < groups; ++g) {
            if (rows == 1) {
                transpose_4x16_pairs(split + g * GROUP, terms, stride, packed + g * words);
                continue;
            }
            for (int64_t i = 0; i < tiles; ++i) {
                const uint16_t* row[LANES];
                for (int64_t c = 0; c < LANES; ++c)
                    row[c] = i * LANES + c < columns ? split + (i * LANES + c) * stride + g * GROUP : zeros;
                transpose_16x16_pairs(row, packed + (g * tiles + i) * words);
            }
        }
        return true;
    }
};

// hi + (mid + lo) of each output, from sums [16 outputs][4 columns] of one row's terms.
[[gnu::always_inline]] inline __m512 add_terms(const float* sums) {
    auto column = [&](int c) __attribute__((always_inline)) {
        const __m512i outputs = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
        const __m512i place = _mm512_add_epi32(_mm512_set1_epi32(c), outputs);
        __m512 first = _mm512_permutex2var_ps(_mm512_load_ps(sums), place, _mm512_load_ps(sums + LANES));
        __m512 second =
            _mm512_permutex2var_ps(_mm512_load_ps(sums + 2 * LANES), place, _mm512_load_ps(sums + 3 * LANES));
        return _mm512_shuffle_f32x4(first, second, 0x44);
    };
    const __m512 hi = column(0);
    return _mm512_add_ps(hi, _mm512_maskz_add_ps(finite(hi), column(1), column(2)));
}

constexpr int64_t SHORT_ROW = 2048;  // bytes

// Prefetches a weight, some cache lines with every group of a block of W panels. Short rows: line after line of the
// next block, into the second-level cache. Long rows: a few groups ahead in the same rows, into the first-level cache,
// since the next block is far.
template <Kind kind, int W>
struct WeightPrefetcher {
    static constexpr int64_t HIGH = W * LANES, BYTES = group_bytes(kind), LINES = HIGH * BYTES / 64, GROUPS = 8;
    static constexpr int64_t EVERY = 64 / BYTES, ROWS_AT_ONCE = HIGH / EVERY;
    const uint8_t *codes, *scales = nullptr;
    int64_t stride, groups;

    WeightPrefetcher(const Weight& w, int64_t n)
        : codes(w.data + n * w.stride), stride(w.stride), groups(groups_of(w.in)) {
        if (kind == Kind::fp4 && w.scale_stride == groups) scales = w.scales + (w.first + n) * groups;
        for (int64_t g = 0; g < groups; g += 2) prefetch_scales(g);
        for (int64_t i = 0; i < 4096; i += 64) _mm_prefetch(reinterpret_cast<const char*>(codes + i), _MM_HINT_T1);
    }
    [[gnu::always_inline]] void prefetch(int64_t block, int64_t g) const {
        if (g % 2 == 0) prefetch_scales((block + 1) * groups + g);
        if (stride <= SHORT_ROW) {
            const uint8_t* from = codes + (block + 1) * HIGH * stride + g * LINES * 64;
            for (int64_t i = 0; i < LINES; ++i) _mm_prefetch(reinterpret_cast<const char*>(from + i * 64), _MM_HINT_T1);
            return;
        }
        const int64_t row = block * HIGH + g % EVERY * ROWS_AT_ONCE;
        g = g / EVERY * EVERY + GROUPS;
        const uint8_t* from = codes + (g < groups ? row : row + HIGH) * stride + (g < groups ? g : g - groups) * BYTES;
        for (int64_t r = 0; r < ROWS_AT_ONCE; ++r)
            _mm_prefetch(reinterpret_cast<const char*>(from + r * stride), _MM_HINT_T0);
    }

   private:
    [[gnu::always_inline]] void prefetch_scales(int64_t g) const {
        if (scales) _mm_prefetch(reinterpret_cast<const char*>(scales + g * HIGH), _MM_HINT_T1);
    }
};

// Adds up the terms in accumulators i * W + j, of the skinny rows and W panels from output n on, writes them to y, and
// zeroes the accumulators.
template <bool ONE, int X, int W>
[[gnu::always_inline]] inline void store_outputs(const SkinnyRows& x, const Weight& w, int64_t n, float* const* y) {
    alignas(64) float sums[X * W][LANES * LANES];
    unroll<X * W>([&](auto t) __attribute__((always_inline)) {
        tile_store<decltype(t)::value>(sums[t], ONE ? 16 : 64);
        tile_zero<decltype(t)::value>();
    });
    alignas(64) float columns[X * W][LANES * LANES];  // transposed: a row's 16 outputs side by side
    for (int t = 0; !ONE && t < X * W; ++t) {
        const uint16_t* row[LANES];
        for (int o = 0; o < LANES; ++o) row[o] = reinterpret_cast<const uint16_t*>(sums[t] + o * LANES);
        transpose_16x16_pairs(row, reinterpret_cast<uint16_t*>(columns[t]));
    }
    for (int j = 0; j < W; ++j) {
        const int64_t at = n + j * LANES, outputs = std::min<int64_t>(LANES, w.out - at);
        if constexpr (ONE) {
            store_n(y[0] + at, {add_terms(sums[j])}, static_cast<int>(outputs));
            continue;
        }
        for (int64_t r = 0; r < x.rows; ++r) {
            auto term = [&](int64_t p) __attribute__((always_inline)) {
                const int64_t column = p * x.rows + r;
                return _mm512_load_ps(columns[column / LANES * W + j] + column % LANES * LANES);
            };
            __m512 sum = term(0), rest = _mm512_setzero_ps();
            if (x.terms > 1) rest = _mm512_maskz_add_ps(finite(sum), term(1), term(2));
            store_n(y[r] + at, {_mm512_add_ps(sum, rest)}, static_cast<int>(outputs));
        }
    }
}

// Multiplies skinny rows (ONE: a single row), X tiles of columns, by blocks of W panels with TERMS tiles per group.
//
// A dequantized tile is multiplied LAG tiles later, across block boundaries too. Tile loads read the cache only, and by
// then the stores have reached it; stores still in flight differ from the load in their address modulo 4096, the part
// that the processor compares.
template <Kind kind, int TERMS, bool ONE, int X, int W>
inline void multiply_blocks(const SkinnyRows& x, const Weight& w, int64_t n, int64_t blocks, float* const* y) {
    constexpr int LAG = 7, RING = LAG + 1;
    constexpr int64_t ROW_BYTES = ONE ? 16 : 64, WORDS = ONE ? TILE_WORDS / 4 : TILE_WORDS, HIGH = W * LANES;
    const int64_t groups = groups_of(w.in);
    const uint16_t* const packed = x.packed;
    const WeightPrefetcher<kind, W> prefetcher(w, n);
    auto row_tile = [&](int64_t g, int i) __attribute__((always_inline)) { return packed + (g * X + i) * WORDS; };
    unroll<X * W>([&](auto t) __attribute__((always_inline)) { tile_zero<decltype(t)::value>(); });
    if (kind == Kind::bf16 && w.in % GROUP == 0 &&
        n + blocks * HIGH <= w.out) {  // tiles are loaded from the stored weight itself
        const int64_t stride = w.stride;
        for (int64_t block = 0; block < blocks; ++block) {
            const uint8_t* const begin = w.data + (n + block * HIGH) * stride;
            for (int64_t g = 0; g < groups; ++g) {
                const uint16_t* x_tile[X];
                const uint16_t* panel[W];
                prefetcher.prefetch(block, g);
                for (int i = 0; i < X; ++i) x_tile[i] = row_tile(g, i);
                for (int j = 0; j < W; ++j)
                    panel[j] = reinterpret_cast<const uint16_t*>(begin + j * LANES * stride + g * 64);
                multiply_tiles<X, W, true>(x_tile, {0, ROW_BYTES}, panel, {GROUP, stride}, 1, 1);
            }
            store_outputs<ONE, X, W>(x, w, n + block * HIGH, y);
        }
        return;
    }
    alignas(64) uint16_t ring[RING][TERMS][TILE_WORDS];
    int64_t item = 0, multiply_g = 0, multiply_n = n;
    // Multiplies item - LAG: panel J of the block at output multiply_n, group multiply_g.
    auto multiply = [&](auto panel) __attribute__((always_inline)) {
        constexpr int J = decltype(panel)::value;
        for (int p = 0; p < TERMS; ++p) {
            tile_load<6>(ring[(item - LAG) % RING][p], 64);
            unroll<X>([&](auto i) __attribute__((always_inline)) {
                if (X > 1 || (J == 0 && p == 0)) tile_load<7>(row_tile(multiply_g, i), ROW_BYTES);
                tile_multiply<decltype(i)::value * W + J, 6, 7>();
            });
        }
        if (J < W - 1 || ++multiply_g < groups) return;
        store_outputs<ONE, X, W>(x, w, multiply_n, y);
        multiply_g = 0;
        multiply_n += HIGH;
    };
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t at = n + block * HIGH;
        const AmxPanel<kind> panels[2] = {{w, at}, {w, at + HIGH - LANES}};
        for (int64_t g = 0; g < groups; ++g) {
            prefetcher.prefetch(block, g);
            unroll<W>([&](auto panel) __attribute__((always_inline)) {
                constexpr int J = decltype(panel)::value;
                dequantize_tile<kind, TERMS>(w, panels[J], at + J * LANES, g, ring[item % RING][0]);
                if (item >= LAG) multiply(std::integral_constant<int, (J + LAG * W - LAG) % W>{});
                ++item;
            });
        }
    }
    const int64_t all = blocks * groups * W;
    for (; item < all + LAG; ++item) {
        if (item < LAG) continue;
        (item - LAG) % W == 0 ? multiply(std::integral_constant<int, 0>{})
                              : multiply(std::integral_constant<int, W - 1>{});
    }
}

template <Kind kind, int TERMS, bool ONE, int X>
inline void gemm_amx_skinny_as(const SkinnyRows& x, const Weight& w, int64_t n0, int64_t n1, float* const* y) {
    if (w.in == 0) {
        for (int64_t r = 0; r < x.rows; ++r) std::fill(y[r] + n0, y[r] + n1, 0.0f);
        return;
    }
    // Reading 16 long rows side by side is faster than 32: presumably the hardware prefetcher follows no more streams.
    const int64_t pairs = ONE && w.stride > SHORT_ROW ? 0 : (n1 - n0) / (2 * LANES), rest = n0 + pairs * 2 * LANES;
    if (pairs) multiply_blocks<kind, TERMS, ONE, X, 2>(x, w, n0, pairs, y);
    if (rest < n1) multiply_blocks<kind, TERMS, ONE, X, 1>(x, w.rows(0, n1), rest, (n1 - rest + LANES - 1) / LANES, y);
}

// Multiplies skinny rows by outputs [n0, n1) of a weight, into y[r] + n0.
inline void gemm_amx_skinny(const SkinnyRows& x, const Weight& w, int64_t n0, int64_t n1, float* const* y) {
    TileUnit tiles(x.rows == 1 ? ONE_ROW_TILES : WIDE_TILES);
    with_kind(w.kind, [&](auto kind) {
        constexpr Kind KIND = decltype(kind)::value;
        auto with_terms = [&](auto terms) {
            constexpr int TERMS = decltype(terms)::value;
            if (x.rows == 1) return gemm_amx_skinny_as<KIND, TERMS, true, 1>(x, w, n0, n1, y);
            switch (x.tiles) {
                case 1: return gemm_amx_skinny_as<KIND, TERMS, false, 1>(x, w, n0, n1, y);
                case 2: return gemm_amx_skinny_as<KIND, TERMS, false, 2>(x, w, n0, n1, y);
                default: return gemm_amx_skinny_as<KIND, TERMS, false, 3>(x, w, n0, n1, y);
            }
        };
        if constexpr (KIND == Kind::fp8)
            if (weight_terms(w) > 1) return with_terms(std::integral_constant<int, MAX_TERMS>{});
        with_terms(std::integral_constant<int, 1>{});
    });
}

}  // namespace dsv4::DSV4_ISA

#endif
