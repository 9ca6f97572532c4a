// Index queries and keys of few bits, and products of them: BF16 on AMX tiles, whole numbers of twelve bits or so with VNNI.
//
// A row is close to `step` times its rounded numbers: no further, as a vector, than `moved` says.
#pragma once

#include "gemm/amx.h"
#include "gemm/gemm.h"

#if defined(DSV4_ISA_AVX512_VNNI)

namespace dsv4::DSV4_ISA {

// f(k, numbers) for each 16 channels of a row, zeros up to whole groups.
template <class F>
[[gnu::always_inline]] inline void each_channels(const float* row, int64_t width, F&& f) {
    for (int64_t k = 0; k < groups_of(width) * GROUP; k += LANES) f(k, load_padded(row + k, width - k));
}

// Sums of products stay below 2^31. A weight times a step times a sum is in fp32's range: a row whose squares add up to a
// number of it has a norm of 2^64 at most.
struct WholeNumbers {
    static constexpr bool STEPS_DIFFER = true;
    static constexpr int64_t ROWS = 8;  // queries come in multiples of it
    // The least and the most weight of a head for which that holds. A row whose largest number is below LEAST_NUMBER has the
    // step of one that has it.
    static constexpr float LEAST_WEIGHT = 0x1p-50f, MOST_WEIGHT = 0x1p30f, LEAST_NUMBER = 0x1p-40f;

    static float step_of(const float* row, int64_t width) {
        __m512 most = _mm512_setzero_ps();
        each_channels(row, width, [&](int64_t, __m512 x) { most = _mm512_max_ps(_mm512_abs_ps(x), most); });
        const float whole = std::min(32767.0f, std::floor(std::sqrt(0x1.FFFp30f / static_cast<float>(width))));
        return std::max(_mm512_reduce_max_ps(most), LEAST_NUMBER) / whole;
    }

    static void round_row(const float* from, int64_t width, float step, uint16_t* to) {
        const __m512 factor = _mm512_set1_ps(1.0f / step);
        each_channels(from, width, [&](int64_t k, __m512 x) {
            const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(x, factor));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), _mm512_cvtepi32_epi16(whole));
        });
    }

    // Each number by half a step, and by what the roundings of step and quotient add.
    static float moved(float, float step, int64_t width) { return 0.51f * step * std::sqrt(static_cast<float>(width)); }

    // Products of rounded queries, `stride` words a row, and two panels of rounded keys -> to[row * 32 + key].
    static void dots(const uint16_t* q, int64_t stride, int64_t rows, const uint16_t* keys, int64_t groups, float* to) {
        constexpr int R = static_cast<int>(ROWS);
        for (int64_t r = 0; r < rows; r += R) {
            __m512i sums[R][2];
            for (auto& sum : sums) sum[0] = sum[1] = _mm512_setzero_si512();
            StridedRows<R> pairs(reinterpret_cast<const float*>(q + r * stride), stride / 2);
            const uint16_t *low = keys, *high = keys + groups * TILE_WORDS;
#pragma GCC unroll 4
            for (int64_t k = 0; k < groups * LANES; ++k, low += 2 * LANES, high += 2 * LANES, pairs.advance(1)) {
                const __m512i k0 = _mm512_load_si512(low), k1 = _mm512_load_si512(high);
                for (int i = 0; i < R; ++i) {
                    const __m512i pair = _mm512_castps_si512(_mm512_set1_ps(pairs.at(i)));
                    sums[i][0] = _mm512_dpwssd_epi32(sums[i][0], pair, k0), sums[i][1] = _mm512_dpwssd_epi32(sums[i][1], pair, k1);
                }
            }
            for (int i = 0; i < R; ++i)
                for (int p = 0; p < 2; ++p) _mm512_storeu_ps(to + (r + i) * 2 * LANES + p * LANES, _mm512_cvtepi32_ps(sums[i][p]));
        }
    }
};

#if defined(DSV4_ISA_AMX)

struct Bf16Tiles {
    static constexpr bool STEPS_DIFFER = false;
    static constexpr int64_t ROWS = LANES;
    static constexpr float LEAST_WEIGHT = 0.0f, MOST_WEIGHT = INFINITY;

    static float step_of(const float*, int64_t) { return 1.0f; }

    static void round_row(const float* from, int64_t width, float, uint16_t* to) {
        each_channels(from, width, [&](int64_t k, __m512 x) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
        });
    }

    // Each number by a 512th of itself; what is below 2^-126 becomes zero, which index_error adds.
    static float moved(float norm, float, int64_t) { return norm * 0x1.01p-9f; }

    static void dots(const uint16_t* q, int64_t stride, int64_t rows, const uint16_t* keys, int64_t groups, float* to) {
        for (int64_t r = 0; r < rows; r += 3 * LANES) {
            switch ((rows - r) / LANES) {
                case 1: multiply<1>(q + r * stride, stride, keys, groups, to + r * 2 * LANES); break;
                case 2: multiply<2>(q + r * stride, stride, keys, groups, to + r * 2 * LANES); break;
                default: multiply<3>(q + r * stride, stride, keys, groups, to + r * 2 * LANES);
            }
        }
    }

   private:
    TileUnit tiles{WIDE_TILES};

    template <int R>
    static void multiply(const uint16_t* q, int64_t stride, const uint16_t* keys, int64_t groups, float* to) {
        const uint16_t* rows[R];
        const uint16_t* panel[2] = {keys, keys + groups * TILE_WORDS};
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
