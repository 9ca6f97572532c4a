// V: a vector of 16 floats, one interface on AVX-512, AVX2 and portable C++.
//
// Operations are lane by lane, except the reductions `sum` and `highest`, whose order is fixed: lane i with lane i + 8,
// then + 4, + 2, + 1. A kernel written on V therefore gives the same bits on every instruction set with fused
// multiply-add.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)
#include <immintrin.h>
#endif

namespace dsv4::DSV4_ISA {

constexpr int LANES = 16;

#if defined(DSV4_ISA_AVX512)

struct V {
    __m512 v;
};
inline V zero() { return {_mm512_setzero_ps()}; }
inline V set1(float x) { return {_mm512_set1_ps(x)}; }
inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, V x) { _mm512_storeu_ps(p, x.v); }
inline V load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p)}; }
inline void store_n(float* p, V x, int n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), x.v); }
inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline V add(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V sub(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V mul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V div(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
inline V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
inline V min(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
inline V nearest(V a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// x * 2^n for whole n in [-126, 127]; 0 where cut < limit. NaN stays NaN, whatever n.
inline V scale_or_zero(V x, V n, V cut, float limit) {
    __m512i e = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
    __mmask16 keep = _mm512_cmp_ps_mask(cut.v, _mm512_set1_ps(limit), _CMP_NLT_UQ);
    return {_mm512_maskz_mul_ps(keep, x.v, _mm512_castsi512_ps(e))};
}
// Bit i is set unless x <= limit in lane i, so for NaN too.
inline uint32_t above(V x, V limit) { return _mm512_cmp_ps_mask(x.v, limit.v, _CMP_NLE_UQ); }
// Bit i is set if x > limit in lane i, so not for NaN.
inline uint32_t greater(V x, V limit) { return _mm512_cmp_ps_mask(x.v, limit.v, _CMP_GT_OQ); }
// Lane i of x where bit i is set, else of y.
inline V select(uint32_t lanes, V x, V y) { return {_mm512_mask_blend_ps(static_cast<__mmask16>(lanes), y.v, x.v)}; }
inline __m256 low(V x) { return _mm512_castps512_ps256(x.v); }
inline __m256 high(V x) { return _mm512_extractf32x8_ps(x.v, 1); }

#elif defined(DSV4_ISA_AVX2)

struct V {
    __m256 a, b;
};
inline V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline V set1(float x) {
    __m256 v = _mm256_set1_ps(x);
    return {v, v};
}
inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, V x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline V load_n(const float* p, int n) {
    if (n == LANES) return load(p);
    alignas(64) float part[LANES] = {};
    std::memcpy(part, p, sizeof(float) * static_cast<size_t>(n));
    return load(part);
}
inline void store_n(float* p, V x, int n) {
    if (n == LANES) return store(p, x);
    alignas(64) float part[LANES];
    store(part, x);
    std::memcpy(p, part, sizeof(float) * static_cast<size_t>(n));
}
inline V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
inline V add(V a, V b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
inline V sub(V a, V b) { return {_mm256_sub_ps(a.a, b.a), _mm256_sub_ps(a.b, b.b)}; }
inline V mul(V a, V b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
inline V div(V a, V b) { return {_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }
inline V max(V a, V b) { return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }
inline V min(V a, V b) { return {_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)}; }
inline V nearest(V x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline __m256 scale_half(__m256 x, __m256 n, __m256 cut, float limit) {
    __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    __m256 keep = _mm256_cmp_ps(cut, _mm256_set1_ps(limit), _CMP_NLT_UQ);
    return _mm256_and_ps(keep, _mm256_mul_ps(x, _mm256_castsi256_ps(e)));
}
inline V scale_or_zero(V x, V n, V cut, float limit) {
    return {scale_half(x.a, n.a, cut.a, limit), scale_half(x.b, n.b, cut.b, limit)};
}
inline uint32_t above(V x, V limit) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.a, limit.a, _CMP_NLE_UQ)) |
                                 _mm256_movemask_ps(_mm256_cmp_ps(x.b, limit.b, _CMP_NLE_UQ)) << 8);
}
inline uint32_t greater(V x, V limit) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.a, limit.a, _CMP_GT_OQ)) |
                                 _mm256_movemask_ps(_mm256_cmp_ps(x.b, limit.b, _CMP_GT_OQ)) << 8);
}
inline __m256 select_half(uint32_t lanes, __m256 x, __m256 y) {
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(lanes)), bits), bits);
    return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(set));
}
inline V select(uint32_t lanes, V x, V y) { return {select_half(lanes, x.a, y.a), select_half(lanes >> 8, x.b, y.b)}; }
inline __m256 low(V x) { return x.a; }
inline __m256 high(V x) { return x.b; }

#else

struct V {
    float f[LANES];
};
#define DSV4_EACH(expression)                              \
    V r;                                                   \
    for (int i = 0; i < LANES; ++i) r.f[i] = (expression); \
    return r
inline V set1(float x) { DSV4_EACH(x); }
inline V zero() { return set1(0.0f); }
inline V load(const float* p) { DSV4_EACH(p[i]); }
inline void store(float* p, V x) { std::memcpy(p, x.f, sizeof x.f); }
inline V load_n(const float* p, int n) { DSV4_EACH(i < n ? p[i] : 0.0f); }
inline void store_n(float* p, V x, int n) { std::memcpy(p, x.f, sizeof(float) * static_cast<size_t>(n)); }
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__aarch64__)
inline V fma(V a, V b, V c) { DSV4_EACH(__builtin_fmaf(a.f[i], b.f[i], c.f[i])); }
#else  // rounds twice: without the instruction the C library's fma would cost more than the rest of the kernel
inline V fma(V a, V b, V c) { DSV4_EACH(a.f[i] * b.f[i] + c.f[i]); }
#endif
inline V add(V a, V b) { DSV4_EACH(a.f[i] + b.f[i]); }
inline V sub(V a, V b) { DSV4_EACH(a.f[i] - b.f[i]); }
inline V mul(V a, V b) { DSV4_EACH(a.f[i] * b.f[i]); }
inline V div(V a, V b) { DSV4_EACH(a.f[i] / b.f[i]); }
inline V max(V a, V b) { DSV4_EACH(a.f[i] > b.f[i] ? a.f[i] : b.f[i]); }
inline V min(V a, V b) { DSV4_EACH(a.f[i] < b.f[i] ? a.f[i] : b.f[i]); }
inline V nearest(V a) { DSV4_EACH(__builtin_rintf(a.f[i])); }
inline float power_of_two(float n) {
    // The sum's low bits are those of n. A conversion would do too, but is not defined for NaN.
    const float sum = n + 0x1.8p23f;
    uint32_t bits;
    std::memcpy(&bits, &sum, sizeof bits);
    bits = (bits + 127u) << 23;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}
inline V scale_or_zero(V x, V n, V cut, float limit) {
    DSV4_EACH(cut.f[i] < limit ? 0.0f : x.f[i] * power_of_two(n.f[i]));
}
inline uint32_t above(V x, V limit) {
    uint32_t lanes = 0;
    for (int i = 0; i < LANES; ++i) lanes |= static_cast<uint32_t>(!(x.f[i] <= limit.f[i])) << i;
    return lanes;
}
inline uint32_t greater(V x, V limit) {
    uint32_t lanes = 0;
    for (int i = 0; i < LANES; ++i) lanes |= static_cast<uint32_t>(x.f[i] > limit.f[i]) << i;
    return lanes;
}
inline V select(uint32_t lanes, V x, V y) { DSV4_EACH(lanes >> i & 1u ? x.f[i] : y.f[i]); }
#undef DSV4_EACH

#endif

#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)
inline float sum(V x) {
    __m256 eight = _mm256_add_ps(low(x), high(x));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float highest(V x) {
    __m256 eight = _mm256_max_ps(low(x), high(x));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#else
inline float sum(V x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) x.f[i] += x.f[i + half];
    return x.f[0];
}
inline float highest(V x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) x.f[i] = x.f[i] > x.f[i + half] ? x.f[i] : x.f[i + half];
    return x.f[0];
}
#endif

// e^x to 2 units in the last place; 0 below -86.6, finite where e^x overflows; NaN stays NaN. x = n ln 2 + r; the Taylor
// series of e^r to the 7th power has a remainder of 6e-9 on |r| <= ln(2) / 2.
inline V exp(V x) {
    // x is the second operand: min and max return that one if either is NaN.
    V bounded = min(set1(88.7f), max(set1(-86.6f), x));
    V n = nearest(mul(bounded, set1(1.44269504f)));
    // ln 2 in two terms: the first has few bits, so its product with n is exact.
    V r = fma(n, set1(-0.693359375f), bounded);
    r = fma(n, set1(2.12194440e-4f), r);
    V p = set1(1.0f / 5040.0f);
    p = fma(p, r, set1(1.0f / 720.0f));
    p = fma(p, r, set1(1.0f / 120.0f));
    p = fma(p, r, set1(1.0f / 24.0f));
    p = fma(p, r, set1(1.0f / 6.0f));
    p = fma(p, r, set1(0.5f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    return scale_or_zero(add(p, p), sub(n, set1(1.0f)), x, -86.6f);  // n reaches 128, and 2^128 is infinite
}

inline V sigmoid(V x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x)))); }

inline float exp1(float x) {
    alignas(64) float out[LANES];
    store(out, exp(set1(x)));
    return out[0];
}

// a . b: four accumulators V, added in pairs, then `sum`. The order depends on n alone.
inline float dot(const float* a, const float* b, int64_t n) {
    V s[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int j = 0; j < 4; ++j) s[j] = fma(load(a + i + j * LANES), load(b + i + j * LANES), s[j]);
    for (int j = 0; i < n; ++j, i += LANES) {
        int left = n - i < LANES ? static_cast<int>(n - i) : LANES;
        s[j] = fma(load_n(a + i, left), load_n(b + i, left), s[j]);
    }
    return sum(add(add(s[0], s[1]), add(s[2], s[3])));
}

// to[r] = dot(a[r], b, n), bit for bit; b is read once for R rows.
template <int R>
inline void dot_f32_rows(const float* const* a, const float* b, int64_t n, float* to) {
    V s[R][4];
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < 4; ++j) s[r][j] = zero();
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int j = 0; j < 4; ++j) {
            V x = load(b + i + j * LANES);
            for (int r = 0; r < R; ++r) s[r][j] = fma(load(a[r] + i + j * LANES), x, s[r][j]);
        }
    for (int j = 0; i < n; ++j, i += LANES) {
        int left = n - i < LANES ? static_cast<int>(n - i) : LANES;
        V x = load_n(b + i, left);
        for (int r = 0; r < R; ++r) s[r][j] = fma(load_n(a[r] + i, left), x, s[r][j]);
    }
    for (int r = 0; r < R; ++r) to[r] = sum(add(add(s[r][0], s[r][1]), add(s[r][2], s[r][3])));
}

}  // namespace dsv4::DSV4_ISA
