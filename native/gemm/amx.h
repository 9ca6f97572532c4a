// AMX tiles: the instructions, the split of fp32 into BF16 terms, and dequantization of weights to BF16 tiles.
#pragma once

#include "gemm/vnni_layout.h"
#include "gemm/weights.h"

#if defined(DSV4_ISA_AMX)

namespace dsv4::DSV4_ISA {

constexpr int MAX_TERMS = 3;  // hi, mid, lo

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline constexpr TileConfig WIDE_TILES;
inline constexpr TileConfig ONE_ROW_TILES = [] {  // the terms of one row are three columns
    TileConfig config;
    for (int t : {0, 1, 2, 3, 4, 5, 7}) config.row_bytes[t] = 16;
    return config;
}();

// RAII: configures the tiles and releases them. Tiles 0 to 5 accumulate, 6 and 7 are factors.
struct TileUnit {
    explicit TileUnit(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
    ~TileUnit() { asm volatile("tilerelease" ::: "memory"); }
    TileUnit(const TileUnit&) = delete;
    TileUnit& operator=(const TileUnit&) = delete;
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

inline __mmask16 finite(__m512 x) { return _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(INFINITY), _CMP_LT_OQ); }

// Splits 32 fp32 values into hi, mid and lo, each the upper 16 bits of the remainder. Infinities and NaN have hi alone.
[[gnu::always_inline]] inline void split_hi_mid_lo(__m512 v0, __m512 v1, __m512i* term) {
    const __m512 upper = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(0xFFFF0000u)));
    const __mmask16 finite0 = finite(v0), finite1 = finite(v1);
    term[0] = reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(_mm512_mask_and_ps(v1, finite1, v1, upper), _mm512_mask_and_ps(v0, finite0, v0, upper)));
    v0 = _mm512_maskz_sub_ps(finite0, v0, _mm512_and_ps(v0, upper));
    v1 = _mm512_maskz_sub_ps(finite1, v1, _mm512_and_ps(v1, upper));
    const __m512 mid0 = _mm512_and_ps(v0, upper), mid1 = _mm512_and_ps(v1, upper);
    term[1] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(mid1, mid0));
    term[2] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_sub_ps(v1, mid1), _mm512_sub_ps(v0, mid0)));
}

// Converts a row to BF16. False if that is not exact; `to` is then undefined.
[[gnu::always_inline]] inline bool convert_exact(const float* x, int64_t in, uint16_t* to) {
    __m512i rest = _mm512_setzero_si512();
    for (int64_t k = 0; k < in; k += GROUP) {
        const __m512 v0 = load_padded(x + k, in - k), v1 = load_padded(x + k + LANES, in - k - LANES);
        rest = _mm512_or_si512(rest, _mm512_or_si512(_mm512_castps_si512(v0), _mm512_castps_si512(v1)));
        _mm512_storeu_si512(to + k, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v1, v0)));
    }
    return _mm512_test_epi32_mask(rest, _mm512_set1_epi32(0xFFFF)) == 0;
}

// Splits rows x[0..rows) into BF16 terms, term p of row r at to + p * term_stride + r * stride. Returns the number of
// terms: 1 if all rows are exact in BF16, else 3.
inline int split_rows(const float* const* x, int64_t rows, int64_t in, uint16_t* to, int64_t term_stride,
                      int64_t stride) {
    int64_t exact = 0;
    while (exact < rows && convert_exact(x[exact], in, to + exact * stride)) ++exact;
    if (exact == rows) return 1;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < in; k += GROUP) {
            __m512i term[MAX_TERMS];
            split_hi_mid_lo(load_padded(x[r] + k, in - k), load_padded(x[r] + k + LANES, in - k - LANES), term);
            for (int p = 0; p < MAX_TERMS; ++p) _mm512_storeu_si512(to + p * term_stride + r * stride + k, term[p]);
        }
    return MAX_TERMS;
}

// Number of BF16 terms of a weight: 3 for FP8 under fp32 scales, which need not be powers of two, else 1.
inline int weight_terms(const Weight& w) { return w.kind == Kind::fp8 && w.float_scales ? MAX_TERMS : 1; }

// Calls f(std::integral_constant<Kind, kind>) for a format that AMX multiplies: any but FP32.
template <class F>
inline void with_kind(Kind kind, F&& f) {
    switch (kind) {
        case Kind::f32: std::abort();
        case Kind::bf16: return f(std::integral_constant<Kind, Kind::bf16>{});
        case Kind::fp8: return f(std::integral_constant<Kind, Kind::fp8>{});
        case Kind::fp4: return f(std::integral_constant<Kind, Kind::fp4>{});
    }
}

// Dequantizes group g of outputs [n, n + 16) to one BF16 tile per term; missing outputs and inputs are 0.
inline void dequantize_tile_terms(const Weight& w, int64_t n, int64_t g, int terms, uint16_t* to) {
    const int64_t k = g * GROUP, stop = std::min(w.in, k + GROUP);
    for (int64_t r = 0; r < LANES; ++r) {
        alignas(64) float values[GROUP] = {};
        __m512i term[MAX_TERMS];
        if (n + r < w.out) dequantize_row(w, n + r, k, stop, values);
        split_hi_mid_lo(_mm512_load_ps(values), _mm512_load_ps(values + LANES), term);
        for (int p = 0; p < terms; ++p) _mm512_store_si512(to + p * TILE_WORDS + r * GROUP, term[p]);
    }
}

[[gnu::always_inline]] inline bool dequantize_whole_tile(const AmxPanel<Kind::fp4>& panel, int64_t g, uint16_t* to) {
    return dequantize_fp4_tile(panel, g, to);
}
[[gnu::always_inline]] inline bool dequantize_whole_tile(const AmxPanel<Kind::fp8>& panel, int64_t g, uint16_t* to) {
    return dequantize_fp8_tile(panel, g, to);
}
[[gnu::always_inline]] inline bool dequantize_whole_tile(const AmxPanel<Kind::bf16>& panel, int64_t g, uint16_t* to) {
    return load_bf16_tile(panel, g, to);
}

// Dequantizes group g of outputs [n, n + 16), those of the panel, to TERMS tiles.
template <Kind kind, int TERMS>
[[gnu::always_inline]] inline void dequantize_tile(const Weight& w, const AmxPanel<kind>& panel, int64_t n, int64_t g,
                                                   uint16_t* to) {
    if constexpr (TERMS == 1)
        if (g < panel.whole_groups && dequantize_whole_tile(panel, g, to)) return;
    dequantize_tile_terms(w, n, g, TERMS, to);
}

// Layout of the tiles of successive groups: `step` 16-bit words from tile to tile, `stride` bytes from row to row.
struct TileStrides {
    int64_t step, stride;
};

// Adds groups [0, groups) of X tiles of rows times W tiles of a weight to accumulators i * W + j. x[i] and w[j] are the
// first tiles; a weight has `terms` tiles per group. WEIGHT_FIRST: the weight is the first factor and the rows are in
// VNNI layout.
template <int X, int W, bool WEIGHT_FIRST>
[[gnu::always_inline]] inline void multiply_tiles(const uint16_t* const* x, TileStrides x_strides,
                                                  const uint16_t* const* w, TileStrides w_strides, int terms,
                                                  int64_t groups) {
    for (int64_t g = 0; g < groups; ++g)
        for (int p = 0; p < terms; ++p)
            unroll<W>([&](auto j) __attribute__((always_inline)) {
                tile_load<6>(w[j] + (g * terms + p) * w_strides.step, w_strides.stride);
                unroll<X>([&](auto i) __attribute__((always_inline)) {
                    constexpr int TO = decltype(i)::value * W + decltype(j)::value;
                    if (X > 1 || j == 0) tile_load<7>(x[i] + g * x_strides.step, x_strides.stride);
                    if constexpr (WEIGHT_FIRST)
                        tile_multiply<TO, 6, 7>();
                    else
                        tile_multiply<TO, 7, 6>();
                });
            });
}

// Stores the accumulators to sums [X * W][16][16].
template <int X, int W>
[[gnu::always_inline]] inline void store_tiles(float (*sums)[LANES * LANES]) {
    unroll<X * W>([&](auto t) __attribute__((always_inline)) { tile_store<decltype(t)::value>(sums[t], 64); });
}

}  // namespace dsv4::DSV4_ISA

#endif
