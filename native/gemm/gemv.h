// One row times a weight as stored: every output a dot product along its row, in the order of gemm/accumulation_order.h, four outputs at a time so
// that a row of x is read once for all and the chains overlap.
#pragma once

#include "gemm/accumulation_order.h"
#include "gemm/weights.h"

namespace dsv4::DSV4_ISA {

#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)

// Sums lie in the lanes of a register as the kind's codes unpack. Lane of each sum:
[[gnu::always_inline]] inline __m256i lane_of_sum(Kind kind) {
    switch (kind) {
        case Kind::f32: return _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        case Kind::bf16: return _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);
        default: return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    }
}

// x [in] -> to [groups][4 steps][8 lanes], padded with zeros.
inline void order_lanes(const float* x, int64_t in, Kind kind, float* to) {
    for (int64_t k = 0; k < in; k += 16, to += 16) {
        alignas(32) float part[16] = {};
        const float* from = x + k;
        if (k + 16 > in) from = part, std::copy(x + k, x + in, part);
        __m256 v0 = _mm256_loadu_ps(from), v1 = _mm256_loadu_ps(from + 8), first, second;
        if (kind == Kind::f32) {  // 0 8 1 9 | 4 12 5 13 and 2 10 3 11 | 6 14 7 15
            first = _mm256_unpacklo_ps(v0, v1), second = _mm256_unpackhi_ps(v0, v1);
        } else {  // 0 4 1 5 | 8 12 9 13 and 2 6 3 7 | 10 14 11 15
            __m256 a = _mm256_permute2f128_ps(v0, v1, 0x20), b = _mm256_permute2f128_ps(v0, v1, 0x31);
            __m256 even = _mm256_shuffle_ps(a, b, 0x88), odd = _mm256_shuffle_ps(a, b, 0xDD);
            first = _mm256_shuffle_ps(even, odd, 0x88), second = _mm256_shuffle_ps(even, odd, 0xDD);
            if (kind != Kind::bf16) {
                const __m256i plain = _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);
                first = _mm256_permutevar8x32_ps(first, plain), second = _mm256_permutevar8x32_ps(second, plain);
            }
        }
        _mm256_store_ps(to, first);
        _mm256_store_ps(to + 8, second);
    }
    if ((in + 15) / 16 % 2) std::fill_n(to, 16, 0.0f);
}

// Every FP4 code under every scale: the upper halves of fp32 numbers, their low bytes and then their high bytes. All are exact.
struct alignas(32) Fp4Codes {
    uint8_t low[16], high[16];
};
inline const Fp4Codes* fp4_codes() {
    static const auto& all = *[] {
        auto* codes = new std::array<Fp4Codes, 256>;
        for (int scale = 0; scale < 256; ++scale)
            for (int code = 0; code < 16; ++code) {
                uint32_t bits = bits_of(E2M1[code] * e8m0(static_cast<uint8_t>(scale))) >> 16;
                auto& of = (*codes)[static_cast<size_t>(scale)];
                of.low[code] = static_cast<uint8_t>(bits), of.high[code] = static_cast<uint8_t>(bits >> 8);
            }
        return codes;
    }();
    return all.data();
}

[[gnu::always_inline]] inline __m256i twice(const uint8_t* from) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
[[gnu::always_inline]] inline __m256 even_halves(__m256i words) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }
[[gnu::always_inline]] inline __m256 odd_halves(__m256i words) {
    return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
}

// acc + one group of 32 weights times x [4][8]: codes as stored, `scale` an FP4 group's E8M0 byte.
template <Kind kind>
[[gnu::always_inline]] inline __m256 add_group(__m256 acc, const float* x, const uint8_t* codes, const Fp4Codes* scale) {
    auto add = [&](int step, __m256 w) __attribute__((always_inline)) { acc = _mm256_fmadd_ps(_mm256_load_ps(x + 8 * step), w, acc); };
    if constexpr (kind == Kind::fp4) {
        // Codes of even inputs in the lower half, of odd ones in the upper.
        const __m256i shift = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4);
        __m256i c = _mm256_and_si256(_mm256_srlv_epi32(twice(codes), shift), _mm256_set1_epi8(15));
        __m256i low = _mm256_shuffle_epi8(twice(scale->low), c), high = _mm256_shuffle_epi8(twice(scale->high), c);
        __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
        add(0, even_halves(a)), add(1, odd_halves(a)), add(2, even_halves(b)), add(3, odd_halves(b));
    } else if constexpr (kind == Kind::fp8) {
        const __m256i spread = _mm256_setr_epi8(-1, 0, -1, 2, -1, 4, -1, 6, -1, 8, -1, 10, -1, 12, -1, 14,  //
                                                -1, 1, -1, 3, -1, 5, -1, 7, -1, 9, -1, 11, -1, 13, -1, 15);
        for (int half = 0; half < 2; ++half) {
            __m256i word = _mm256_shuffle_epi8(twice(codes + 16 * half), spread);
            word = _mm256_and_si256(_mm256_srai_epi16(word, 4), _mm256_set1_epi16(static_cast<int16_t>(0x87F0)));
            add(2 * half, even_halves(word)), add(2 * half + 1, odd_halves(word));
        }
    } else if constexpr (kind == Kind::bf16) {
        for (int half = 0; half < 2; ++half) {
            __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32 * half));
            __m256 even = even_halves(word), odd = odd_halves(word);
            add(2 * half, _mm256_shuffle_ps(even, odd, 0x88)), add(2 * half + 1, _mm256_shuffle_ps(even, odd, 0xDD));
        }
    } else {
        const float* w = reinterpret_cast<const float*>(codes);
        for (int half = 0; half < 2; ++half) {
            __m256 a = _mm256_loadu_ps(w + 16 * half), b = _mm256_loadu_ps(w + 16 * half + 8);
            add(2 * half, _mm256_unpacklo_ps(a, b)), add(2 * half + 1, _mm256_unpackhi_ps(a, b));
        }
    }
    return acc;
}

constexpr int64_t group_bytes(Kind kind) { return kind == Kind::fp4 ? 16 : kind == Kind::fp8 ? 32 : kind == Kind::bf16 ? 64 : 128; }

// The eight sums of a product joined.
[[gnu::always_inline]] inline float joined(__m256 sums) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// How far before its use memory is asked for: the distance that hides its latency.
constexpr int64_t AHEAD = 2048;

// Outputs [n, n + R) of w times x, which order_lanes made: to y[0..R).
template <Kind kind, int R>
inline void dots(const float* x, const Weight& w, int64_t n, float* y) {
    constexpr int64_t bytes = group_bytes(kind);
    const int64_t groups = groups_of(w.in), whole = w.in / GROUP;
    const uint8_t* row = w.data + n * w.stride;
    const uint8_t* scales = kind == Kind::fp4 ? w.scales + (w.first + n) * w.scale_stride : nullptr;
    const Fp4Codes* table = kind == Kind::fp4 ? fp4_codes() : nullptr;
    auto scale = [&](int r, int64_t g) __attribute__((always_inline)) {
        return kind == Kind::fp4 ? table + scales[r * w.scale_stride + g] : nullptr;
    };
    // Rows follow one another: within a row AHEAD bytes on, beyond its end in the rows that come next.
    const int64_t length = whole * bytes;
    const int64_t on = length > AHEAD ? AHEAD : (AHEAD + R * length) / std::max<int64_t>(1, R * length) * R * w.stride;
    const int64_t turn = length > AHEAD ? length - AHEAD : length, beyond = length > AHEAD ? R * w.stride - length + AHEAD : on;
    __m256 acc[R];
    for (__m256& a : acc) a = _mm256_setzero_ps();
    for (int64_t g = 0; g < whole; ++g) {
        int64_t at = g * bytes, far = at < turn ? on : beyond;
        for (int r = 0; r < R; ++r) {
            const uint8_t* codes = row + r * w.stride + at;
            if (at % 64 == 0)
                for (int64_t line = 0; line < bytes; line += 64)
                    _mm_prefetch(reinterpret_cast<const char*>(codes + far + line), _MM_HINT_T0);
            acc[r] = add_group<kind>(acc[r], x + g * GROUP, codes, scale(r, g));
        }
    }
    if (whole < groups) {
        int64_t left = w.in * bytes / GROUP - length;
        if (kind == Kind::fp4) left = (w.in + 1) / 2 - length;
        for (int r = 0; r < R; ++r) {
            uint8_t part[bytes] = {};
            std::memcpy(part, row + r * w.stride + length, static_cast<size_t>(left));
            acc[r] = add_group<kind>(acc[r], x + whole * GROUP, part, scale(r, whole));
        }
    }
    const __m256i order = lane_of_sum(kind);
    for (int r = 0; r < R; ++r) y[r] = joined(_mm256_permutevar8x32_ps(acc[r], order));
}

template <Kind kind>
inline void dots_of(const float* x, const Weight& w, int64_t n0, int64_t n1, float* y) {
    int64_t n = n0;
    for (; n + 4 <= n1; n += 4) dots<kind, 4>(x, w, n, y + n);
    for (; n < n1; ++n) dots<kind, 1>(x, w, n, y + n);
}

// FP8 codes' bits, moved, are those of fp32 numbers 2^-120 times as large. A block's scale makes up for that in x, which is exact
// for powers of two that neither overflow nor shrink it. False: some block's does not.
inline bool scaled(const Weight& w, int64_t n, const float* x, float* to) {
    for (int64_t k = 0; k < w.in; k += 128) {
        int64_t stop = std::min(w.in, k + 128);
        float scale = scale_of(w, n, k), factor = scale * 0x1p120f;
        if (!(scale >= 0x1p-120f && scale < 0x1p7f) || (bits_of(scale) & 0x7FFFFFu)) return false;
        float most = 0.0f;
        for (int64_t i = k; i < stop; ++i) most = std::max(most, std::fabs(x[i]));
        if (!(most <= 0x1p126f / factor)) return false;
        for (int64_t i = k; i < stop; ++i) to[i] = x[i] * factor;
    }
    return true;
}

// Outputs [n0, n1) of w times one row: y + n0. Returns the first output that was not computed: n1, but for FP8 blocks whose
// scales are not for this code.
inline int64_t fast_dots(const float* x, const Weight& w, int64_t n0, int64_t n1, float* y) {
    float* lanes = scratch(Scratch::lanes, groups_of(w.in) * GROUP + 8);
    lanes += (32 - reinterpret_cast<uintptr_t>(lanes) % 32) % 32 / sizeof(float);
    if (w.kind != Kind::fp8) order_lanes(x, w.in, w.kind, lanes);
    switch (w.kind) {
        case Kind::f32: dots_of<Kind::f32>(lanes, w, n0, n1, y); return n1;
        case Kind::bf16: dots_of<Kind::bf16>(lanes, w, n0, n1, y); return n1;
        case Kind::fp4: dots_of<Kind::fp4>(lanes, w, n0, n1, y); return n1;
        case Kind::fp8: break;
    }
    float* own = scratch(Scratch::wide, w.in);
    while (n0 < n1) {  // outputs of one row of blocks have their scales in common
        int64_t stop = std::min(n1, n0 + 128 - (w.first + n0) % 128);
        if (!scaled(w, n0, x, own)) return n0;
        order_lanes(own, w.in, w.kind, lanes);
        dots_of<Kind::fp8>(lanes, w, n0, stop, y);
        n0 = stop;
    }
    return n1;
}

#endif

}  // namespace dsv4::DSV4_ISA
