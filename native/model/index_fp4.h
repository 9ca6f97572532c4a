// Scores of index keys as they are stored, in FP4, with queries in FP4: products of bytes with VNNI, exact in each block
// of 32 channels.
//
// Codes stand for twice their values, whole numbers from -12 to 12. Keys are unsigned, 12 added: a row of queries
// begins its sums at -12 times the sum of its codes.
#pragma once

#include "base/stored_rows.h"
#include "model/index_quantization.h"

#if defined(DSV4_ISA_AVX512_VNNI)

namespace dsv4::DSV4_ISA {

static_assert(GROUP == INDEX_KEY_BLOCK);

// A panel of 16 keys: per block of 32 channels eight registers of codes, four channels of a key side by side, then a
// quarter of the keys' scales.
constexpr int64_t FP4_CODE_BYTES = 8 * 64, FP4_PANEL_BYTES = FP4_CODE_BYTES + 64;
constexpr int FP4_OFFSET = 12;

// Largest norm that keys with the scales of these rows can have; infinite if a scale is NaN.
inline float fp4_norm_bound(const RowFormat& format, const uint8_t* rows, int64_t count) {
    uint8_t highest = 0;
    for (int64_t i = 0; i < count; ++i)
        for (int64_t b = (format.width + 1) / 2; b < format.bytes; ++b)
            highest = std::max(highest, rows[i * format.bytes + b]);
    if (highest == NAN_SCALE) return INFINITY;
    return 6.0f * scale_value(highest) * std::sqrt(static_cast<float>(format.width)) * 1.001f;
}

// Unpacks 16 rows to a panel, blocks FP4_PANEL_BYTES apart.
inline void unpack_fp4_panel(const RowFormat& format, const uint8_t* rows, uint8_t* to) {
    const __m512i table =
        _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    const __m512i low_bits = _mm512_set1_epi8(15);
    const int64_t codes = (format.width + 1) / 2;
    for (int64_t b = 0; b < groups_of(format.width); ++b, to += FP4_PANEL_BYTES) {
        const int64_t left = std::min<int64_t>(16, codes - 16 * b);
        const auto mask = static_cast<__mmask16>((1u << left) - 1u);
        auto row = [&](int64_t i) { return _mm_maskz_loadu_epi8(mask, rows + i * format.bytes + 16 * b); };
        __m512i r[4];  // rows i, 4 + i, 8 + i and 12 + i
        for (int i = 0; i < 4; ++i) {
            r[i] = _mm512_castsi128_si512(row(i));
            r[i] = _mm512_inserti32x4(r[i], row(4 + i), 1);
            r[i] = _mm512_inserti32x4(r[i], row(8 + i), 2);
            r[i] = _mm512_inserti32x4(r[i], row(12 + i), 3);
        }
        const __m512i a0 = _mm512_unpacklo_epi32(r[0], r[1]), a1 = _mm512_unpackhi_epi32(r[0], r[1]);
        const __m512i a2 = _mm512_unpacklo_epi32(r[2], r[3]), a3 = _mm512_unpackhi_epi32(r[2], r[3]);
        const __m512i words[4] = {_mm512_unpacklo_epi64(a0, a2), _mm512_unpackhi_epi64(a0, a2),
                                  _mm512_unpacklo_epi64(a1, a3), _mm512_unpackhi_epi64(a1, a3)};
        for (int j = 0; j < 4; ++j) {
            const __m512i even = _mm512_and_si512(words[j], low_bits);
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(words[j], 4), low_bits);
            _mm512_store_si512(to + 128 * j, _mm512_shuffle_epi8(table, even));
            _mm512_store_si512(to + 128 * j + 64, _mm512_shuffle_epi8(table, odd));
        }
        alignas(64) uint32_t scales[LANES];
        for (int i = 0; i < LANES; ++i) scales[i] = static_cast<uint32_t>(rows[i * format.bytes + codes + b]) << 23;
        _mm512_store_ps(to + FP4_CODE_BYTES, _mm512_mul_ps(_mm512_load_ps(scales), _mm512_set1_ps(0.25f)));
    }
}

// A row's blocks are 64 bytes apart: 32 codes in the order of the keys' registers, the start of its sums, its scale.
struct Fp4Quantizer {
    static constexpr bool HAS_STEPS = false;
    static constexpr int64_t ROWS = 4;
    static constexpr float MIN_WEIGHT = 0.0f, MAX_WEIGHT = INFINITY;
    static constexpr int64_t START = 32, SCALE = 36;  // bytes

    static float step_of(const float*, int64_t) { return 1.0f; }
    // Rows are in FP4 already.
    static float max_error(float, float, int64_t) { return 0.0f; }

    static void quantize_row(const float* from, int64_t width, float, uint16_t* to) {
        const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
        for (int64_t b = 0; b < groups_of(width); ++b) {
            auto* block = reinterpret_cast<uint8_t*>(to + b * GROUP);
            const __m512 x[2] = {load_padded(from + b * GROUP, width - b * GROUP),
                                 load_padded(from + b * GROUP + LANES, width - b * GROUP - LANES)};
            const float amax = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(x[0]), _mm512_abs_ps(x[1])));
            const float scale = power_of_two_above(std::max(amax, 6.0f * 0x1p-126f) * (1.0f / 6.0f));
            int sum = 0;
            for (int half = 0; half < 2; ++half) {
                const __m512i values = _mm512_cvtps_epi32(_mm512_mul_ps(x[half], _mm512_set1_ps(2.0f / scale)));
                sum += _mm512_reduce_add_epi32(values);
                _mm_storeu_si128(reinterpret_cast<__m128i*>(block + 16 * half),
                                 _mm_shuffle_epi8(_mm512_cvtepi32_epi8(values), order));
            }
            const int32_t start = -FP4_OFFSET * sum;
            std::memcpy(block + START, &start, sizeof start);
            std::memcpy(block + SCALE, &scale, sizeof scale);
        }
    }

    // Products of queries, `stride` words per row, and two panels of keys -> to[row * 32 + key].
    static void dot_panels(const uint16_t* q, int64_t stride, int64_t rows, const uint16_t* index_keys, int64_t groups,
                           float* to) {
        constexpr int R = static_cast<int>(ROWS);
        const auto* keys = reinterpret_cast<const uint8_t*>(index_keys);
        for (int64_t r = 0; r < rows; r += R) {
            __m512 dots[R][2];
            for (auto& dot : dots) dot[0] = dot[1] = _mm512_setzero_ps();
            for (int64_t b = 0; b < groups; ++b) {
                const uint8_t *low = keys + b * FP4_PANEL_BYTES, *high = low + groups * FP4_PANEL_BYTES;
                const uint8_t* block[R];
                __m512i sums[R][2];
                for (int i = 0; i < R; ++i) {
                    block[i] = reinterpret_cast<const uint8_t*>(q + (r + i) * stride + b * GROUP);
                    sums[i][0] = sums[i][1] = broadcast(block[i] + START);
                }
#pragma GCC unroll 8
                for (int k = 0; k < 8; ++k) {
                    const __m512i k0 = _mm512_load_si512(low + 64 * k), k1 = _mm512_load_si512(high + 64 * k);
                    for (int i = 0; i < R; ++i) {
                        const __m512i codes = broadcast(block[i] + 4 * k);
                        sums[i][0] = _mm512_dpbusd_epi32(sums[i][0], k0, codes);
                        sums[i][1] = _mm512_dpbusd_epi32(sums[i][1], k1, codes);
                    }
                }
                const __m512 s0 = _mm512_load_ps(low + FP4_CODE_BYTES), s1 = _mm512_load_ps(high + FP4_CODE_BYTES);
                for (int i = 0; i < R; ++i) {
                    const __m512 scale = _mm512_castsi512_ps(broadcast(block[i] + SCALE));
                    dots[i][0] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums[i][0]), scale), s0, dots[i][0]);
                    dots[i][1] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums[i][1]), scale), s1, dots[i][1]);
                }
            }
            for (int i = 0; i < R; ++i)
                for (int p = 0; p < 2; ++p) _mm512_storeu_ps(to + (r + i) * 2 * LANES + p * LANES, dots[i][p]);
        }
    }

   private:
    static __m512i broadcast(const uint8_t* word) {
        int32_t value;
        std::memcpy(&value, word, sizeof value);
        return _mm512_set1_epi32(value);
    }
};

}  // namespace dsv4::DSV4_ISA

#endif
