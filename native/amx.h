// Products on the matrix unit of processors with AMX, which multiplies BF16 tiles of 16 x 32 and adds in fp32.
//
// A number is the sum of three BF16 numbers, to its last bit: high, middle and low part. Weights in FP4, BF16 and FP8 with
// power-of-two scales are their high part alone, and so are rows rounded to FP8. The parts of x are multiplied apart and joined last.
// FP32 weights stay with linear.h: taking them apart would take longer than multiplying them.
//
// Order of an element, for each part of x: from zero, group after group of 32 inputs and in a group the weight's parts from high to
// low, adds one number: the chain of its even inputs from zero plus the chain of its odd ones. The three are joined as
// high + (middle + low). Tiles take numbers below 2^-126 for zero. The order is what the unit does (Intel's manual, TDPBF16PS).
//
// A tile's second factor holds pairs of inputs side by side: 16 of them for each of 16 columns. Where rows are few they are turned
// for it, where they are many the weight is. Both ways give the same bits.
#pragma once

#include "row_product.h"

#if defined(DSV4_ISA_AMX)

namespace dsv4::DSV4_ISA {

constexpr int64_t TILE_WORDS = 512;      // of 16 bits: 16 rows of 32
constexpr int MOST_PARTS = 3;
constexpr int64_t FEW_ROWS = 16;
constexpr int64_t BLOCK_ROWS = 48;       // three tiles of rows
constexpr int64_t CACHE_WORDS = 1 << 18; // what half a megabyte of second-level cache holds

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline const TileConfig WIDE_TILES;
inline const TileConfig ONE_ROW_TILES = [] {  // the parts of one row are three columns
    TileConfig config;
    for (int t : {0, 1, 2, 3, 4, 5, 7}) config.row_bytes[t] = 16;
    return config;
}();

struct Tiles {  // tiles 0 to 5 add up, 6 and 7 are factors
    explicit Tiles(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
    ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};
template <int T>
[[gnu::always_inline]] inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
[[gnu::always_inline]] inline void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
[[gnu::always_inline]] inline void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int TO, int A, int B>
[[gnu::always_inline]] inline void tile_multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(TO), "i"(A), "i"(B));
}

// f(std::integral_constant<int, I>) for I in [0, N).
template <int N, class F>
[[gnu::always_inline]] inline void each(F&& f) {
    [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
        (f(std::integral_constant<int, I>{}), ...);
    }(std::make_integer_sequence<int, N>{});
}

inline uint16_t* words(Scratch place, int64_t count) {  // aligned to a cache line
    auto at = reinterpret_cast<uintptr_t>(scratch(place, count / 2 + 16));
    return reinterpret_cast<uint16_t*>((at + 63) / 64 * 64);
}

// 32 numbers -> their parts, each the upper half of what the parts before it leave. What is infinite or no number has a high part
// alone.
[[gnu::always_inline]] inline void split(__m512 v0, __m512 v1, __m512i* part) {
    const __m512 upper = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(0xFFFF0000u))), infinity = _mm512_set1_ps(INFINITY);
    const __mmask16 finite0 = _mm512_cmp_ps_mask(_mm512_abs_ps(v0), infinity, _CMP_LT_OQ);
    const __mmask16 finite1 = _mm512_cmp_ps_mask(_mm512_abs_ps(v1), infinity, _CMP_LT_OQ);
    part[0] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_mask_and_ps(v1, finite1, v1, upper), _mm512_mask_and_ps(v0, finite0, v0, upper)));
    v0 = _mm512_maskz_sub_ps(finite0, v0, _mm512_and_ps(v0, upper)), v1 = _mm512_maskz_sub_ps(finite1, v1, _mm512_and_ps(v1, upper));
    const __m512 middle0 = _mm512_and_ps(v0, upper), middle1 = _mm512_and_ps(v1, upper);
    part[1] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(middle1, middle0));
    part[2] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_sub_ps(v1, middle1), _mm512_sub_ps(v0, middle0)));
}

[[gnu::always_inline]] inline void split_at(const float* from, int64_t left, __m512i* part) {
    auto mask = [&](int64_t at) { return static_cast<__mmask16>(left >= at + LANES ? 0xFFFF : left <= at ? 0 : (1 << (left - at)) - 1); };
    split(_mm512_maskz_loadu_ps(mask(0), from), _mm512_maskz_loadu_ps(mask(LANES), from + LANES), part);
}

// Rows x[0..rows) -> their parts, part p of row r at to + p * apart + r * stride. False: all of them are their high part alone.
inline bool split_rows(const float* const* x, int64_t rows, int64_t in, uint16_t* to, int64_t apart, int64_t stride) {
    __m512i rest = _mm512_setzero_si512();
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < in; k += GROUP) {
            __m512i part[MOST_PARTS];
            split_at(x[r] + k, in - k, part);
            for (int p = 0; p < MOST_PARTS; ++p) _mm512_storeu_si512(to + p * apart + r * stride + k, part[p]);
            rest = _mm512_or_si512(rest, _mm512_or_si512(part[1], part[2]));
        }
    return _mm512_test_epi16_mask(rest, _mm512_set1_epi16(0x7FFF)) != 0;
}

// Sixteen rows of 16 pairs -> sixteen pairs of 16 rows.
inline void turn_pairs(const uint16_t* const* row, uint16_t* to) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(row[i]);
    for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    // a[4 * i + j], quarter q: pair 4 * q + j of rows 4 * i to 4 * i + 3.
    for (int j = 0; j < 4; ++j) {
        __m512i low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x44), high = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xEE);
        __m512i low2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44), high2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xEE);
        _mm512_store_si512(to + 32 * j, _mm512_shuffle_i32x4(low, low2, 0x88));
        _mm512_store_si512(to + 32 * (4 + j), _mm512_shuffle_i32x4(low, low2, 0xDD));
        _mm512_store_si512(to + 32 * (8 + j), _mm512_shuffle_i32x4(high, high2, 0x88));
        _mm512_store_si512(to + 32 * (12 + j), _mm512_shuffle_i32x4(high, high2, 0xDD));
    }
}

// Scales of FP8 that are no powers of two make numbers of more bits.
inline int weight_parts(const Weight& w) { return w.kind == Kind::fp8 && w.float_scales ? MOST_PARTS : 1; }

// Values of codes 0 to 15, twice, under every scale as BF16 numbers: FP4's, and of FP8's those below its normal numbers.
struct alignas(64) ScaledCodes {
    uint16_t value[32];
};
template <Kind kind>
inline const ScaledCodes* scaled_codes() {
    static const auto& all = *[] {
        auto* made = new std::array<ScaledCodes, 256>;
        for (int scale = 0; scale < 256; ++scale)
            for (int code = 0; code < 32; ++code) {
                float value = kind == Kind::fp4 ? E2M1[code & 15] : e4m3_values()[static_cast<size_t>(code & 15)];
                (*made)[static_cast<size_t>(scale)].value[code] =
                    static_cast<uint16_t>(bits_of(value * e8m0(static_cast<uint8_t>(scale))) >> 16);
            }
        return made;
    }();
    return all.data();
}

// Rows of one tile of a weight, as BF16 numbers and where they have parts one tile each. Missing outputs and inputs are 0.
inline void widen_parts(const Weight& w, int64_t n, int64_t g, int parts, uint16_t* to) {
    const int64_t k = g * GROUP, stop = std::min(w.in, k + GROUP);
    for (int64_t r = 0; r < LANES; ++r) {
        alignas(64) float wide[GROUP] = {};
        __m512i part[MOST_PARTS];
        if (n + r < w.out) widen_row(w, n + r, k, stop, wide);
        split(_mm512_load_ps(wide), _mm512_load_ps(wide + LANES), part);
        for (int p = 0; p < parts; ++p) _mm512_store_si512(to + p * TILE_WORDS + r * GROUP, part[p]);
    }
}

// The same for whole tiles of one part.
template <Kind kind>
[[gnu::always_inline]] inline void widen_tile(const Weight& w, const ScaledCodes* scaled, int64_t n, int64_t g, uint16_t* to) {
    const uint8_t* codes = w.data + n * w.stride + g * group_bytes(kind);
    if constexpr (kind == Kind::fp4) {
        const uint8_t* scale = w.scales + (w.first + n) * w.scale_stride + g;
        for (int r = 0; r < LANES; ++r, codes += w.stride, scale += w.scale_stride, to += GROUP) {
            __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
            // Both codes of a byte: (byte | byte << 12) & 0x000F000F.
            __m512i code = _mm512_ternarylogic_epi32(byte, _mm512_slli_epi32(byte, 12), _mm512_set1_epi32(0x000F000F), 0xA8);
            _mm512_store_si512(to, _mm512_permutexvar_epi16(code, _mm512_load_si512(scaled[*scale].value)));
        }
    } else if constexpr (kind == Kind::fp8) {
        const uint8_t scale = w.scales[(w.first + n) / 128 * w.scale_stride + g / 4];
        const __m512i below = _mm512_load_si512(scaled[scale].value), bias = _mm512_set1_epi16(static_cast<int16_t>((scale - 7) * 128));
        for (int r = 0; r < LANES; ++r, codes += w.stride, to += GROUP) {
            __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
            __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi16(0x7F));
            __m512i value = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), bias);
            __mmask32 subnormal = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
            value = _mm512_mask_permutexvar_epi16(value, subnormal, magnitude, below);
            // value | (code << 8 & 0x8000)
            _mm512_store_si512(to, _mm512_ternarylogic_epi32(value, _mm512_slli_epi16(code, 8), _mm512_set1_epi16(-0x8000), 0xF8));
        }
    } else {
        for (int r = 0; r < LANES; ++r, codes += w.stride, to += GROUP) _mm512_store_si512(to, _mm512_loadu_si512(codes));
    }
}

// Whether widen_tile takes the tile: in FP8 all of it has one scale under which no code leaves the normal numbers.
template <Kind kind>
[[gnu::always_inline]] inline bool is_whole(const Weight& w, int64_t n, int64_t g) {
    if (n + LANES > w.out || (g + 1) * GROUP > w.in) return false;
    if constexpr (kind != Kind::fp8) return true;
    if ((w.first + n) % 128 > 128 - LANES) return false;
    uint8_t scale = w.scales[(w.first + n) / 128 * w.scale_stride + g / 4];
    return scale >= 10 && scale <= 246;
}

template <Kind kind>
[[gnu::always_inline]] inline void widen(const Weight& w, int parts, int64_t n, int64_t g, uint16_t* to) {
    if (parts == 1 && is_whole<kind>(w, n, g))
        widen_tile<kind>(w, scaled_codes<kind>(), n, g, to);
    else
        widen_parts(w, n, g, parts, to);
}

// Where tiles of one group after the other lie: `step` words apart, their rows `stride` bytes.
struct Steps {
    int64_t step, stride;
};

// Adds groups [0, groups) of X tiles of rows times W tiles of a weight to tiles i * W + j. x[i] and w[j] are the first tiles; a group
// of a weight is `parts` steps.
template <int X, int W, bool FEW>
[[gnu::always_inline]] inline void add_tiles(const uint16_t* const* x, Steps of_x, const uint16_t* const* w, Steps of_w, int parts,
                                             int64_t groups) {
    for (int64_t g = 0; g < groups; ++g)
        for (int p = 0; p < parts; ++p)
            each<W>([&](auto j) __attribute__((always_inline)) {
                tile_load<6>(w[j] + (g * parts + p) * of_w.step, of_w.stride);
                each<X>([&](auto i) __attribute__((always_inline)) {
                    constexpr int TO = decltype(i)::value * W + decltype(j)::value;
                    if (X > 1 || j == 0) tile_load<7>(x[i] + g * of_x.step, of_x.stride);
                    if constexpr (FEW)
                        tile_multiply<TO, 6, 7>();
                    else
                        tile_multiply<TO, 7, 6>();
                });
            });
}

template <int X, int W>
[[gnu::always_inline]] inline void take_tiles(float (*sums)[LANES * LANES]) {
    each<X * W>([&](auto t) __attribute__((always_inline)) { tile_store<decltype(t)::value>(sums[t], 64); });
}

// Up to 16 rows, turned: what products of them with any weight read. Tile i of group g begins at (g * tiles + i) * words.
struct FewRows {
    std::vector<uint16_t> memory;
    uint16_t* turned = nullptr;
    int64_t rows = 0, tiles = 0, words = 0;
    int parts = 1;

    void take(const float* const* x, int64_t count, int64_t in) {
        const int64_t groups = groups_of(in), stride = groups * GROUP;
        uint16_t* split = dsv4::DSV4_ISA::words(Scratch::wide, MOST_PARTS * count * stride);
        rows = count;
        parts = split_rows(x, rows, in, split, rows * stride, stride) ? MOST_PARTS : 1;
        const int64_t columns = parts * rows;
        tiles = (columns + LANES - 1) / LANES;
        // One row has three columns at most: its tiles' rows are four pairs long.
        words = rows == 1 ? TILE_WORDS / 4 : TILE_WORDS;
        memory.resize(static_cast<size_t>(groups * tiles * words + 32));
        turned = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
        static const uint16_t nothing[GROUP] = {};
        for (int64_t g = 0; g < groups; ++g) {
            if (rows == 1) {
                turn_parts(split + g * GROUP, stride, turned + g * words);
                continue;
            }
            for (int64_t i = 0; i < tiles; ++i) {
                const uint16_t* row[LANES];
                for (int64_t c = 0; c < LANES; ++c)
                    row[c] = i * LANES + c < columns ? split + (i * LANES + c) * stride + g * GROUP : nothing;
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

// Up to 16 rows: their parts' columns side by side, X tiles of them; W panels of the weight at a time.
//
// A widened tile is multiplied LAG tiles later: its stores have then left for the cache, from where alone a tile is read, and those
// on their way have other places within 4096 bytes, which is all that a processor compares.
template <Kind kind, int X, int W>
inline void few_rows(const FewRows& of, const Weight& w, int64_t n, float* const* y) {
    constexpr int LAG = 7, KEPT = LAG + 1;
    const int64_t groups = groups_of(w.in), row_bytes = of.rows == 1 ? 16 : 64;
    const int weight = kind == Kind::bf16 || kind == Kind::fp4 ? 1 : weight_parts(w);
    auto row_tiles = [&](int64_t g, const uint16_t** x) __attribute__((always_inline)) {
        for (int i = 0; i < X; ++i) x[i] = of.turned + (g * X + i) * of.words;
    };
    // Memory is asked for some groups on, at the ends of rows in the next panels'.
    constexpr int64_t AHEAD_GROUPS = 8, bytes = group_bytes(kind);
    auto ask = [&](int64_t g, int j) __attribute__((always_inline)) {
        if (g * bytes % 64) return;
        const uint8_t* from = w.data + (n + j * LANES) * w.stride + (g + AHEAD_GROUPS) * bytes;
        if (g + AHEAD_GROUPS >= groups) from += W * LANES * w.stride - groups * bytes;
        for (int64_t r = 0; r < LANES; ++r)
            for (int64_t line = 0; line < bytes; line += 64)
                _mm_prefetch(reinterpret_cast<const char*>(from + r * w.stride + line), _MM_HINT_T0);
    };
    each<X * W>([&](auto t) __attribute__((always_inline)) { tile_zero<decltype(t)::value>(); });
    if (kind == Kind::bf16 && w.in % GROUP == 0 && n + W * LANES <= w.out) {  // read where they are stored
        for (int64_t g = 0; g < groups; ++g) {
            const uint16_t* x[X];
            const uint16_t* panel[W];
            row_tiles(g, x);
            for (int j = 0; j < W; ++j) {
                ask(g, j);
                panel[j] = reinterpret_cast<const uint16_t*>(w.data + (n + j * LANES) * w.stride + g * bytes);
            }
            add_tiles<X, W, true>(x, {0, row_bytes}, panel, {GROUP, w.stride}, 1, 1);
        }
    } else {
        alignas(64) uint16_t kept[KEPT * MOST_PARTS * TILE_WORDS];
        for (int64_t g = 0; g * W < groups * W + LAG; ++g)
            each<W>([&](auto panel) __attribute__((always_inline)) {
                constexpr int j = decltype(panel)::value, before = (j + LAG * W - LAG) % W;
                const int64_t item = g * W + j;
                if (g < groups) {
                    ask(g, j);
                    widen<kind>(w, weight, n + j * LANES, g, kept + item % KEPT * weight * TILE_WORDS);
                }
                const int64_t at = (item - LAG) / W;  // its panel is `before`
                if (item < LAG || at >= groups) return;
                const uint16_t* x[X];
                row_tiles(at, x);
                for (int p = 0; p < weight; ++p) {
                    tile_load<6>(kept + ((item - LAG) % KEPT * weight + p) * TILE_WORDS, 64);
                    each<X>([&](auto i) __attribute__((always_inline)) {
                        if (X > 1 || (before == 0 && p == 0)) tile_load<7>(x[decltype(i)::value], row_bytes);
                        tile_multiply<decltype(i)::value * W + before, 6, 7>();
                    });
                }
            });
    }
    alignas(64) float sums[X * W][LANES * LANES];
    take_tiles<X, W>(sums);
    for (int j = 0; j < W; ++j) {
        int64_t outputs = std::min<int64_t>(LANES, w.out - n - j * LANES);
        for (int64_t r = 0; r < of.rows; ++r)
            for (int64_t o = 0; o < outputs; ++o) {
                auto part = [&](int64_t p) { return sums[(p * of.rows + r) / LANES * W + j][o * LANES + (p * of.rows + r) % LANES]; };
                y[r][n + j * LANES + o] = of.parts == 1 ? part(0) : part(0) + (part(1) + part(2));
            }
    }
}

template <Kind kind, int X, int W>
inline void few_rows_of(const FewRows& of, const Weight& w, int64_t n0, int64_t n1, float* const* y) {
    int64_t n = n0;
    for (; n + W * LANES <= n1; n += W * LANES) few_rows<kind, X, W>(of, w, n, y);
    for (; n < n1; n += LANES) few_rows<kind, X, 1>(of, w.rows(0, n1), n, y);
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
                V sum = load(high);
                if (parts > 1) sum = add(sum, add(load(high + W * LANES * LANES), load(high + 2 * W * LANES * LANES)));
                store_n(y[r] + n + j * LANES, sum, left);
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
    const int64_t width = std::max<int64_t>(2, CACHE_WORDS / panel) * LANES;
    const Weight columns = w.rows(0, n1);
    for (int64_t r0 = 0; r0 < rows; r0 += height) {
        const int64_t tall = std::min(height, rows - r0), apart = (tall + LANES - 1) / LANES * LANES * stride;
        uint16_t* split = words(Scratch::wide, MOST_PARTS * apart);
        const int parts = split_rows(x + r0, tall, w.in, split, apart, stride) ? MOST_PARTS : 1;
        for (int64_t n = n0; n < n1; n += width) {
            const int64_t stop = std::min(n1, n + width);
            uint16_t* turned = words(Scratch::packed, (stop - n + LANES - 1) / LANES * panel);
            uint16_t* to = turned;
            for (int64_t m = n; m < stop; m += LANES)
                for (int64_t g = 0; g < groups; ++g) {
                    alignas(64) uint16_t tiles[MOST_PARTS * TILE_WORDS];
                    widen<kind>(columns, static_cast<int>(weight), m, g, tiles);
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
                for (int i = 0; i < MOST_PARTS; ++i) tile[i] = split + r * stride + i * (parts == 1 ? LANES * stride : apart);
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
        switch (x.tiles) {
            case 1: return few_rows_of<KIND, 1, 2>(x, w, n0, n1, y);
            case 2: return few_rows_of<KIND, 2, 2>(x, w, n0, n1, y);
            default: return few_rows_of<KIND, 3, 2>(x, w, n0, n1, y);
        }
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
