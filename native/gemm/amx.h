// Tiles of processors with AMX: the instructions, numbers taken apart into BF16, weights widened to it.
#pragma once

#include "gemm/vnni_layout.h"
#include "gemm/gemv.h"

#if defined(DSV4_ISA_AMX)

namespace dsv4::DSV4_ISA {

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

inline __mmask16 finite(__m512 x) { return _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(INFINITY), _CMP_LT_OQ); }

// 32 numbers -> their parts, each the upper half of what the parts before it leave. What is infinite or no number has a high part
// alone.
[[gnu::always_inline]] inline void split(__m512 v0, __m512 v1, __m512i* part) {
    const __m512 upper = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(0xFFFF0000u)));
    const __mmask16 finite0 = finite(v0), finite1 = finite(v1);
    part[0] = reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(_mm512_mask_and_ps(v1, finite1, v1, upper), _mm512_mask_and_ps(v0, finite0, v0, upper)));
    v0 = _mm512_maskz_sub_ps(finite0, v0, _mm512_and_ps(v0, upper)), v1 = _mm512_maskz_sub_ps(finite1, v1, _mm512_and_ps(v1, upper));
    const __m512 middle0 = _mm512_and_ps(v0, upper), middle1 = _mm512_and_ps(v1, upper);
    part[1] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(middle1, middle0));
    part[2] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_sub_ps(v1, middle1), _mm512_sub_ps(v0, middle0)));
}

// A row that BF16 holds -> its only part. False: it has others, and nothing is said of `to`.
[[gnu::always_inline]] inline bool take_whole(const float* x, int64_t in, uint16_t* to) {
    __m512i rest = _mm512_setzero_si512();
    for (int64_t k = 0; k < in; k += GROUP) {
        const __m512 v0 = numbers_at(x + k, in - k), v1 = numbers_at(x + k + LANES, in - k - LANES);
        rest = _mm512_or_si512(rest, _mm512_or_si512(_mm512_castps_si512(v0), _mm512_castps_si512(v1)));
        _mm512_storeu_si512(to + k, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v1, v0)));
    }
    return _mm512_test_epi32_mask(rest, _mm512_set1_epi32(0xFFFF)) == 0;
}

// Rows x[0..rows) -> their parts, part p of row r at to + p * apart + r * stride. False: all of them are their high part alone.
inline bool split_rows(const float* const* x, int64_t rows, int64_t in, uint16_t* to, int64_t apart, int64_t stride) {
    int64_t whole = 0;
    while (whole < rows && take_whole(x[whole], in, to + whole * stride)) ++whole;
    if (whole == rows) return false;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < in; k += GROUP) {
            __m512i part[MOST_PARTS];
            split(numbers_at(x[r] + k, in - k), numbers_at(x[r] + k + LANES, in - k - LANES), part);
            for (int p = 0; p < MOST_PARTS; ++p) _mm512_storeu_si512(to + p * apart + r * stride + k, part[p]);
        }
    return true;
}

// Scales of FP8 that are no powers of two make numbers of more bits.
inline int weight_parts(const Weight& w) { return w.kind == Kind::fp8 && w.float_scales ? MOST_PARTS : 1; }

// FP4's 16 values under every scale as BF16 numbers, their lower and their upper bytes.
struct alignas(64) Fp4Bytes {
    uint8_t lower[16], upper[16];
};
inline const Fp4Bytes* fp4_bytes() {
    static const auto& all = *[] {
        auto* made = new std::array<Fp4Bytes, 256>;
        for (int at = 0; at < 256 * 16; ++at) {
            uint32_t bits = bits_of(E2M1[at % 16] * e8m0(static_cast<uint8_t>(at / 16)));
            Fp4Bytes& to = (*made)[static_cast<size_t>(at / 16)];
            to.lower[at % 16] = static_cast<uint8_t>(bits >> 16), to.upper[at % 16] = static_cast<uint8_t>(bits >> 24);
        }
        return made;
    }();
    return all.data();
}

// Values of FP8's codes below its normal numbers, the first eight, under every scale as BF16 numbers.
struct alignas(16) Subnormals {
    uint16_t value[8];
};
inline const Subnormals* fp8_subnormals() {
    static const auto& all = *[] {
        auto* made = new std::array<Subnormals, 256>;
        for (int at = 0; at < 256 * 8; ++at) {
            float value = e4m3_values()[static_cast<size_t>(at % 8)] * e8m0(static_cast<uint8_t>(at / 8));
            (*made)[static_cast<size_t>(at / 8)].value[at % 8] = static_cast<uint16_t>(bits_of(value) >> 16);
        }
        return made;
    }();
    return all.data();
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

// 16 outputs of a weight, in registers: what is in memory is read anew after every tile instruction.
template <Kind kind>
struct Panel {
    const uint8_t *codes, *scales;
    int64_t stride, scale_stride, whole;  // groups that widen_tile may take

    Panel(const Weight& w, int64_t n) : codes(w.data + n * w.stride), scales(w.scales), stride(w.stride), scale_stride(w.scale_stride) {
        const bool straddles = kind == Kind::fp8 && (w.first + n) % 128 > 128 - LANES;
        whole = n + LANES > w.out || straddles ? 0 : w.in / GROUP;
        if (kind == Kind::fp4) scales += (w.first + n) * w.scale_stride;
        if (kind == Kind::fp8 && scales) scales += (w.first + n) / 128 * w.scale_stride;
    }
};

// f(row, r * stride bytes on from) for each of 16 rows, with few additions.
template <class F>
[[gnu::always_inline]] inline void each_row_of(const uint8_t* from, int64_t stride, F&& f) {
    each<4>([&](auto quarter) __attribute__((always_inline)) {
        constexpr int R = decltype(quarter)::value * 4;
        f(std::integral_constant<int, R>{}, from), f(std::integral_constant<int, R + 1>{}, from + stride);
        f(std::integral_constant<int, R + 2>{}, from + 2 * stride), f(std::integral_constant<int, R + 3>{}, from + 3 * stride);
        from += 4 * stride;
    });
}

// A whole tile as BF16 numbers. False where its scale would take FP8 codes out of the normal numbers: nothing is written then.
template <Kind kind>
[[gnu::always_inline]] inline bool widen_tile(const Panel<kind>& w, int64_t g, uint16_t* to) {
    const uint8_t* codes = w.codes + g * group_bytes(kind);
    if constexpr (kind == Kind::fp4) {
        const Fp4Bytes* values = fp4_bytes();
        alignas(64) static constexpr auto TWICE = [] {  // bytes 0 0 0 0 1 1 1 1 ...
            std::array<uint8_t, 64> index{};
            for (size_t i = 0; i < 64; ++i) index[i] = static_cast<uint8_t>(i / 4);
            return index;
        }();
        const __m512i twice = _mm512_load_si512(TWICE.data()), shift = _mm512_set1_epi32(4 << 16);
        const __m512i code_bits = _mm512_set1_epi8(15), upper = _mm512_set1_epi16(0x1000);
        const uint8_t *scale = w.scales + g, *row_scale[LANES];
        each_row_of(scale, w.scale_stride, [&](auto r, const uint8_t* at) __attribute__((always_inline)) { row_scale[r] = at; });
        each_row_of(codes, w.stride, [&](auto r, const uint8_t* at) __attribute__((always_inline)) {
            // Words of twice a code, then of its places in the table: lower byte, upper byte.
            __m512i bytes = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
            __m512i word = _mm512_srlv_epi16(_mm512_permutexvar_epi8(twice, bytes), shift);
            __m512i place = _mm512_ternarylogic_epi32(word, code_bits, upper, 0xEA);  // (word & code_bits) | upper
            _mm512_store_si512(to + r * GROUP, _mm512_permutexvar_epi8(place, _mm512_load_si512(&values[*row_scale[r]])));
        });
    } else if constexpr (kind == Kind::fp8) {
        const uint8_t scale = w.scales[g / 4];
        if (scale < 10 || scale > 246) return false;
        const __m512i magnitudes = _mm512_set1_epi16(0x07F0), bias = _mm512_set1_epi16(static_cast<int16_t>((scale - 7) * 128));
        const __m512i sign = _mm512_set1_epi16(-0x8000), normal = _mm512_set1_epi16(0x80);
        __m512i least = normal;
        auto widen = [&](const uint8_t* at, auto&& mend) __attribute__((always_inline)) {
            __m512i code = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
            __m512i magnitude = _mm512_and_si512(_mm512_slli_epi16(code, 4), magnitudes);
            __m512i value = mend(magnitude, _mm512_add_epi16(magnitude, bias));
            return _mm512_ternarylogic_epi32(value, code, sign, 0xF8);  // value | (code & sign)
        };
        each_row_of(codes, w.stride, [&](auto r, const uint8_t* at) __attribute__((always_inline)) {
            _mm512_store_si512(to + r * GROUP, widen(at, [&](__m512i magnitude, __m512i value) __attribute__((always_inline)) {
                least = _mm512_min_epu16(least, magnitude);
                return value;
            }));
        });
        if (_mm512_cmplt_epu16_mask(least, normal)) {  // trained weights have few such codes
            const __m512i below = _mm512_castsi128_si512(_mm_load_si128(reinterpret_cast<const __m128i*>(fp8_subnormals()[scale].value)));
            each_row_of(codes, w.stride, [&](auto r, const uint8_t* at) __attribute__((always_inline)) {
                _mm512_store_si512(to + r * GROUP, widen(at, [&](__m512i magnitude, __m512i value) __attribute__((always_inline)) {
                    __mmask32 subnormal = _mm512_cmplt_epu16_mask(magnitude, normal);
                    return _mm512_mask_permutexvar_epi16(value, subnormal, _mm512_srli_epi16(magnitude, 4), below);
                }));
            });
        }
    } else {
        each_row_of(codes, w.stride, [&](auto r, const uint8_t* at) __attribute__((always_inline)) {
            _mm512_store_si512(to + r * GROUP, _mm512_loadu_si512(at));
        });
    }
    return true;
}

// Group g of outputs n to n + 15, of which `panel` is; PARTS tiles of it.
template <Kind kind, int PARTS>
[[gnu::always_inline]] inline void widen(const Weight& w, const Panel<kind>& panel, int64_t n, int64_t g, uint16_t* to) {
    if constexpr (PARTS == 1)
        if (g < panel.whole && widen_tile(panel, g, to)) return;
    widen_parts(w, n, g, PARTS, to);
}

// Where tiles of one group after the other lie: `step` words apart, their rows `stride` bytes.
struct Steps {
    int64_t step, stride;
};

// Adds groups [0, groups) of X tiles of rows times W tiles of a weight to tiles i * W + j. x[i] and w[j] are the first tiles; a
// group of a weight is `parts` steps.
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
