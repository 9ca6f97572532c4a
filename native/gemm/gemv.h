// Product of one to four rows with a weight as stored: every output is a dot product along the weight's row, in the order
// of accumulation_order.h. Several outputs are computed together: x is read once for them, and their chains overlap. The
// rows share the unpacking of the weight, so that checking drafts costs little more than one token.
#pragma once

#include "gemm/weights.h"

namespace dsv4::DSV4_ISA {

#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)

// Register lane of each sum; it depends on how the format's codes unpack.
[[gnu::always_inline]] inline __m256i lane_of_sum(Kind kind) {
    switch (kind) {
        case Kind::f32: return _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        case Kind::bf16: return _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);
        default: return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    }
}

// Packs x [in] into to [groups][4 steps][8 lanes], padded with zeros.
inline void pack_lanes(const float* x, int64_t in, Kind kind, float* to) {
    for (int64_t k = 0; k < in; k += 16, to += 16) {
        alignas(32) float part[16] = {};
        const float* from = x + k;
        if (k + 16 > in) {
            std::copy(x + k, x + in, part);
            from = part;
        }
        __m256 v0 = _mm256_loadu_ps(from), v1 = _mm256_loadu_ps(from + 8), first, second;
        if (kind == Kind::f32) {  // 0 8 1 9 | 4 12 5 13 and 2 10 3 11 | 6 14 7 15
            first = _mm256_unpacklo_ps(v0, v1);
            second = _mm256_unpackhi_ps(v0, v1);
        } else {  // 0 4 1 5 | 8 12 9 13 and 2 6 3 7 | 10 14 11 15
            __m256 a = _mm256_permute2f128_ps(v0, v1, 0x20), b = _mm256_permute2f128_ps(v0, v1, 0x31);
            __m256 even = _mm256_shuffle_ps(a, b, 0x88), odd = _mm256_shuffle_ps(a, b, 0xDD);
            first = _mm256_shuffle_ps(even, odd, 0x88);
            second = _mm256_shuffle_ps(even, odd, 0xDD);
            if (kind != Kind::bf16) {
                const __m256i ascending = _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);
                first = _mm256_permutevar8x32_ps(first, ascending);
                second = _mm256_permutevar8x32_ps(second, ascending);
            }
        }
        _mm256_store_ps(to, first);
        _mm256_store_ps(to + 8, second);
    }
    if ((in + 15) / 16 % 2) std::fill_n(to, 16, 0.0f);
}

constexpr int GEMV_ROWS = 4;  // at most

// Adds one group of 32 weights times each of X rows x [4][8], `stride` floats apart, to acc. `values` (FP4): the table
// entry of the group's scale.
template <Kind kind, int X>
[[gnu::always_inline]] inline void multiply_add_group(__m256 (&acc)[X], const float* x, int64_t stride,
                                                      const uint8_t* codes, const Fp4Bytes* values) {
    auto add = [&](int step, __m256 w) __attribute__((always_inline)) {
        for (int j = 0; j < X; ++j) acc[j] = _mm256_fmadd_ps(_mm256_load_ps(x + j * stride + 8 * step), w, acc[j]);
    };
    if constexpr (kind == Kind::fp4) unpack_fp4_group(codes, *values, add);
    if constexpr (kind == Kind::fp8) unpack_fp8_group(codes, add);
    if constexpr (kind == Kind::bf16) unpack_bf16_group(codes, add);
    if constexpr (kind == Kind::f32) unpack_f32_group(codes, add);
}

// Adds up the eight sums, given in the order of their numbers.
[[gnu::always_inline]] inline float add_sums(__m256 sums) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Prefetch distance in bytes; hides the memory latency.
constexpr int64_t PREFETCH = 2048;

// y[j][n..n + R) = outputs [n, n + R) of w times each of X rows that pack_lanes packed, `stride` floats apart.
template <Kind kind, int R, int X>
inline void gemv_rows(const float* x, int64_t stride, const Weight& w, int64_t n, float* const* y) {
    constexpr int64_t bytes = group_bytes(kind);
    const int64_t groups = groups_of(w.in), whole = w.in / GROUP;
    const uint8_t* row = w.data + n * w.stride;
    const uint8_t* scales = kind == Kind::fp4 ? w.scales + (w.first + n) * w.scale_stride : nullptr;
    const Fp4Bytes* table = kind == Kind::fp4 ? fp4_table() : nullptr;
    auto values = [&](int r, int64_t g) __attribute__((always_inline)) {
        return kind == Kind::fp4 ? table + scales[r * w.scale_stride + g] : nullptr;
    };
    // Prefetches PREFETCH bytes ahead in each row; at its end, the next R rows.
    const int64_t length = whole * bytes;
    const int64_t within =
        length > PREFETCH ? PREFETCH : (PREFETCH + R * length) / std::max<int64_t>(1, R * length) * R * w.stride;
    const int64_t last = length > PREFETCH ? length - PREFETCH : length,
                  beyond = length > PREFETCH ? R * w.stride - length + PREFETCH : within;
    __m256 acc[R][X];
    for (auto& output : acc)
        for (__m256& a : output) a = _mm256_setzero_ps();
    for (int64_t g = 0; g < whole; ++g) {
        int64_t at = g * bytes, distance = at < last ? within : beyond;
        for (int r = 0; r < R; ++r) {
            const uint8_t* codes = row + r * w.stride + at;
            if (at % 64 == 0)
                for (int64_t line = 0; line < bytes; line += 64)
                    _mm_prefetch(reinterpret_cast<const char*>(codes + distance + line), _MM_HINT_T0);
            multiply_add_group<kind, X>(acc[r], x + g * GROUP, stride, codes, values(r, g));
        }
    }
    if (whole < groups) {
        int64_t left = w.in * bytes / GROUP - length;
        if (kind == Kind::fp4) left = (w.in + 1) / 2 - length;
        for (int r = 0; r < R; ++r) {
            uint8_t part[bytes] = {};
            std::memcpy(part, row + r * w.stride + length, static_cast<size_t>(left));
            multiply_add_group<kind, X>(acc[r], x + whole * GROUP, stride, part, values(r, whole));
        }
    }
    const __m256i order = lane_of_sum(kind);
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < X; ++j) y[j][n + r] = add_sums(_mm256_permutevar8x32_ps(acc[r][j], order));
}

template <Kind kind, int X>
inline void gemv_outputs_of(const float* x, int64_t stride, const Weight& w, int64_t n0, int64_t n1, float* const* y) {
#if defined(DSV4_ISA_AVX512)
    constexpr int R = 4;
#else
    constexpr int R = X > 2 ? 2 : 4;  // R * X sums fit into 16 registers
#endif
    int64_t n = n0;
    for (; n + R <= n1; n += R) gemv_rows<kind, R, X>(x, stride, w, n, y);
    for (; n < n1; ++n) gemv_rows<kind, 1, X>(x, stride, w, n, y);
}

template <Kind kind>
inline void gemv_outputs(const float* x, int64_t rows, int64_t stride, const Weight& w, int64_t n0, int64_t n1,
                         float* const* y) {
    switch (rows) {
        case 1: return gemv_outputs_of<kind, 1>(x, stride, w, n0, n1, y);
        case 2: return gemv_outputs_of<kind, 2>(x, stride, w, n0, n1, y);
        case 3: return gemv_outputs_of<kind, 3>(x, stride, w, n0, n1, y);
        default: return gemv_outputs_of<kind, 4>(x, stride, w, n0, n1, y);
    }
}

// y[j][n0..n1) = outputs [n0, n1) of w times each of up to GEMV_ROWS rows. Returns the first output not computed: n1, or
// the first of an FP8 block whose scale is not supported.
inline int64_t gemv(const float* const* x, int64_t rows, const Weight& w, int64_t n0, int64_t n1, float* const* y) {
    const int64_t stride = groups_of(w.in) * GROUP;
    float* lanes = scratch(Scratch::lanes, rows * stride);
    if (w.kind != Kind::fp8)
        for (int64_t j = 0; j < rows; ++j) pack_lanes(x[j], w.in, w.kind, lanes + j * stride);
    switch (w.kind) {
        case Kind::f32: gemv_outputs<Kind::f32>(lanes, rows, stride, w, n0, n1, y); return n1;
        case Kind::bf16: gemv_outputs<Kind::bf16>(lanes, rows, stride, w, n0, n1, y); return n1;
        case Kind::fp4: gemv_outputs<Kind::fp4>(lanes, rows, stride, w, n0, n1, y); return n1;
        case Kind::fp8: break;
    }
    float* scaled = scratch(Scratch::staging, w.in);
    while (n0 < n1) {  // one row of 128 x 128 blocks at a time: its outputs share their scales
        int64_t stop = std::min(n1, n0 + 128 - (w.first + n0) % 128);
        for (int64_t j = 0; j < rows; ++j) {
            if (!scale_fp8_input(w, n0, x[j], scaled)) return n0;
            pack_lanes(scaled, w.in, w.kind, lanes + j * stride);
        }
        gemv_outputs<Kind::fp8>(lanes, rows, stride, w, n0, stop, y);
        n0 = stop;
    }
    return n1;
}

#endif

}  // namespace dsv4::DSV4_ISA
