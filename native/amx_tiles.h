// Tiles of processors with AMX: the instructions, numbers taken apart into BF16, weights widened to it.
#pragma once

#include "row_product.h"

#if defined(DSV4_ISA_AMX)

namespace dsv4::DSV4_ISA {

constexpr int64_t TILE_WORDS = 512;  // of 16 bits: 16 rows of 32
constexpr int MOST_PARTS = 3;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline constexpr TileConfig WIDE_TILES;
inline constexpr TileConfig ONE_ROW_TILES = [] {  // the parts of one row are three columns
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

inline uint16_t* aligned_words(Scratch place, int64_t count) {  // aligned to a cache line
    auto at = reinterpret_cast<uintptr_t>(scratch(place, count / 2 + 16));
    return reinterpret_cast<uint16_t*>((at + 63) / 64 * 64);
}

// 32 numbers -> their parts, each the upper half of what the parts before it leave. What is infinite or no number has a high part
// alone.
[[gnu::always_inline]] inline void split(__m512 v0, __m512 v1, __m512i* part) {
    const __m512 upper = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(0xFFFF0000u))), infinity = _mm512_set1_ps(INFINITY);
    const __mmask16 finite0 = _mm512_cmp_ps_mask(_mm512_abs_ps(v0), infinity, _CMP_LT_OQ);
    const __mmask16 finite1 = _mm512_cmp_ps_mask(_mm512_abs_ps(v1), infinity, _CMP_LT_OQ);
    part[0] = reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(_mm512_mask_and_ps(v1, finite1, v1, upper), _mm512_mask_and_ps(v0, finite0, v0, upper)));
    v0 = _mm512_maskz_sub_ps(finite0, v0, _mm512_and_ps(v0, upper)), v1 = _mm512_maskz_sub_ps(finite1, v1, _mm512_and_ps(v1, upper));
    const __m512 middle0 = _mm512_and_ps(v0, upper), middle1 = _mm512_and_ps(v1, upper);
    part[1] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(middle1, middle0));
    part[2] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_sub_ps(v1, middle1), _mm512_sub_ps(v0, middle0)));
}

[[gnu::always_inline]] inline void split_at(const float* from, int64_t left, __m512i* part) {
    auto mask = [&](int64_t at) {
        int64_t count = std::clamp<int64_t>(left - at, 0, LANES);
        return static_cast<__mmask16>((1u << count) - 1u);
    };
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

}  // namespace dsv4::DSV4_ISA

#endif
