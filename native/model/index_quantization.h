// Quantized index queries and keys, and their products: BF16 on AMX tiles, integers of about twelve bits with VNNI.
//
// The error of a quantized row, row - step * values, has a norm of at most max_error.
#pragma once

#include "gemm/amx.h"
#include "gemm/gemm.h"

#if defined(DSV4_ISA_AVX512_VNNI)

namespace dsv4::DSV4_ISA {

// Calls f(k, values) for each 16 channels of a row, padded with zeros to whole groups.
template <class F>
[[gnu::always_inline]] inline void for_each_lanes(const float* row, int64_t width, F&& f) {
    for (int64_t k = 0; k < groups_of(width) * GROUP; k += LANES) f(k, load_padded(row + k, width - k));
}

// 16-bit integers whose sums of products stay below 2^31. Weight times step times sum stays in fp32's range: a row with
// a finite sum of squares has a norm of at most 2^64.
struct Int16Quantizer {
    static constexpr bool HAS_STEPS = true;
    static constexpr int64_t ROWS = 8;  // query rows are padded to a multiple
    // Head weights for which fp32 does not overflow or underflow. A row with values below MIN_VALUE alone has
    // MIN_VALUE's step.
    static constexpr float MIN_WEIGHT = 0x1p-50f, MAX_WEIGHT = 0x1p30f, MIN_VALUE = 0x1p-40f;

    static float step_of(const float* row, int64_t width) {
        __m512 largest = _mm512_setzero_ps();
        for_each_lanes(row, width, [&](int64_t, __m512 x) { largest = _mm512_max_ps(_mm512_abs_ps(x), largest); });
        const float levels = std::min(32767.0f, std::floor(std::sqrt(0x1.FFFp30f / static_cast<float>(width))));
        return std::max(_mm512_reduce_max_ps(largest), MIN_VALUE) / levels;
    }

    static void quantize_row(const float* from, int64_t width, float step, uint16_t* to) {
        const __m512 factor = _mm512_set1_ps(1.0f / step);
        for_each_lanes(from, width, [&](int64_t k, __m512 x) {
            const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(x, factor));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), _mm512_cvtepi32_epi16(value));
        });
    }

    // Half a step per value, plus the rounding of step and quotient.
    static float max_error(float, float step, int64_t width) {
        return 0.51f * step * std::sqrt(static_cast<float>(width));
    }

    // Products of quantized queries, `stride` words per row, and two panels of quantized keys -> to[row * 32 + key].
    static void dot_panels(const uint16_t* q, int64_t stride, int64_t rows, const uint16_t* index_keys, int64_t groups,
                           float* to) {
        constexpr int R = static_cast<int>(ROWS);
        for (int64_t r = 0; r < rows; r += R) {
            __m512i sums[R][2];
            for (auto& sum : sums) sum[0] = sum[1] = _mm512_setzero_si512();
            StridedRows<R> pairs(reinterpret_cast<const float*>(q + r * stride), stride / 2);
            const uint16_t *low = index_keys, *high = index_keys + groups * TILE_WORDS;
#pragma GCC unroll 4
            for (int64_t k = 0; k < groups * LANES; ++k, low += 2 * LANES, high += 2 * LANES, pairs.advance(1)) {
                const __m512i k0 = _mm512_load_si512(low), k1 = _mm512_load_si512(high);
                for (int i = 0; i < R; ++i) {
                    const __m512i pair = _mm512_castps_si512(_mm512_set1_ps(pairs.at(i)));
                    sums[i][0] = _mm512_dpwssd_epi32(sums[i][0], pair, k0);
                    sums[i][1] = _mm512_dpwssd_epi32(sums[i][1], pair, k1);
                }
            }
            for (int i = 0; i < R; ++i)
                for (int p = 0; p < 2; ++p)
                    _mm512_storeu_ps(to + (r + i) * 2 * LANES + p * LANES, _mm512_cvtepi32_ps(sums[i][p]));
        }
    }
};

#if defined(DSV4_ISA_AMX)

struct Bf16Quantizer {
    static constexpr bool HAS_STEPS = false;
    static constexpr int64_t ROWS = LANES;
    static constexpr float MIN_WEIGHT = 0.0f, MAX_WEIGHT = INFINITY;

    static float step_of(const float*, int64_t) { return 1.0f; }

    static void quantize_row(const float* from, int64_t width, float, uint16_t* to) {
        for_each_lanes(from, width, [&](int64_t k, __m512 x) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
        });
    }

    // 1/512 of each value; index_error adds the flush of values below 2^-126 to zero.
    static float max_error(float norm, float, int64_t) { return norm * 0x1.01p-9f; }

    static void dot_panels(const uint16_t* q, int64_t stride, int64_t rows, const uint16_t* index_keys, int64_t groups,
                           float* to) {
        for (int64_t r = 0; r < rows; r += 3 * LANES) {
            switch ((rows - r) / LANES) {
                case 1: multiply<1>(q + r * stride, stride, index_keys, groups, to + r * 2 * LANES); break;
                case 2: multiply<2>(q + r * stride, stride, index_keys, groups, to + r * 2 * LANES); break;
                default: multiply<3>(q + r * stride, stride, index_keys, groups, to + r * 2 * LANES);
            }
        }
    }

   private:
    TileUnit tiles{WIDE_TILES};

    template <int R>
    static void multiply(const uint16_t* q, int64_t stride, const uint16_t* index_keys, int64_t groups, float* to) {
        const uint16_t* rows[R];
        const uint16_t* panel[2] = {index_keys, index_keys + groups * TILE_WORDS};
        for (int i = 0; i < R; ++i) rows[i] = q + i * LANES * stride;
        unroll<2 * R>([&](auto t) __attribute__((always_inline)) { tile_zero<decltype(t)::value>(); });
        multiply_tiles<R, 2, false>(rows, {GROUP, 2 * stride}, panel, {TILE_WORDS, 64}, 1, groups);
        unroll<2 * R>([&](auto t) __attribute__((always_inline)) {
            constexpr int T = decltype(t)::value;
            tile_store<T>(to + T / 2 * LANES * 2 * LANES + T % 2 * LANES, 2 * LANES * sizeof(float));
        });
    }
};

#endif

}  // namespace dsv4::DSV4_ISA

#endif
