// FP8 (E4M3, one scale per 128 x 128 block: E8M0 or fp32): the table and all decoders. Weights must not contain the
// code of NaN.
//
// A code's exponent and mantissa, shifted to fp32's positions, are 2^-120 times its value; a factor of 2^120 corrects
// this.
#pragma once

#include <array>

#include "gemm/formats/amx_panel.h"
#include "gemm/formats/columns.h"

namespace dsv4::DSV4_ISA {

// All values, indexed by code.
inline const std::array<float, 256>& e4m3_values() {
    static const std::array<float, 256> values = [] {
        std::array<float, 256> all{};
        for (int code = 0; code < 256; ++code) {
            int e = code >> 3 & 15, m = code & 7;
            float magnitude = e ? std::ldexp(static_cast<float>(8 + m), e - 10) : std::ldexp(static_cast<float>(m), -9);
            if ((code & 127) == 127) magnitude = NAN;
            all[static_cast<size_t>(code)] = code & 128 ? -magnitude : magnitude;
        }
        return all;
    }();
    return values;
}

// Inputs [k0, k1) of output n.
inline void dequantize_fp8_row(const Weight& w, int64_t n, int64_t k0, int64_t k1, float* to) {
    const uint8_t* row = w.data + n * w.stride;
    for (int64_t k = k0; k < k1;) {
        float scale = scale_of(w, n, k);
        for (int64_t stop = std::min(k1, (k / 128 + 1) * 128); k < stop; ++k) *to++ = e4m3_values()[row[k]] * scale;
    }
}

#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)

// Converts codes in the upper bytes of 16-bit words to the upper halves of fp32 numbers, 2^-120 times their values.
[[gnu::always_inline]] inline __m256i fp8_halves(__m256i words) {
    return _mm256_and_si256(_mm256_srai_epi16(words, 4), _mm256_set1_epi16(static_cast<int16_t>(0x87F0)));
}

// Calls f(k, column), split, for k in [k0, k1) of outputs [n, n + 32) of one block row; k0 and k1 are multiples of 16.
template <class F>
[[gnu::always_inline]] inline void for_each_fp8_column(const Weight& w, int64_t n, int64_t k0, int64_t k1, F&& f) {
    const __m256i zero = _mm256_setzero_si256();
    for_each_piece(w, n, k0, k1, [&](int64_t k, const uint8_t* piece) __attribute__((always_inline)) {
        float scale = scale_of(w, n, k);
        if (!(std::fabs(scale) <= 128.0f)) {  // the factor would be infinite
            Column columns[16];
            dequantize_columns<dequantize_fp8_row>(w, n, k, k + 16, columns);
            for (int i = 0; i < 16; ++i) f(k + i, columns[i]);
            return;
        }
        __m256 factor = _mm256_set1_ps(scale * 0x1p120f);
        __m256i c[16];
        transpose_32x16_bytes(piece, PIECE_STRIDE, c);
        for (int i = 0; i < 16; ++i) {
            Column column = column_of_halves(fp8_halves(_mm256_unpacklo_epi8(zero, c[i])),
                                             fp8_halves(_mm256_unpackhi_epi8(zero, c[i])));
            for (__m256& v : column.v) v = _mm256_mul_ps(v, factor);
            f(k + i, column);
        }
    });
}

// Calls f(step, eight weights times 2^-120, without their scale) for the four steps of a group of 32 inputs of one
// output, as in accumulation_order.h.
template <class F>
[[gnu::always_inline]] inline void unpack_fp8_group(const uint8_t* codes, F&& f) {
    const __m256i spread = _mm256_setr_epi8(-1, 0, -1, 2, -1, 4, -1, 6, -1, 8, -1, 10, -1, 12, -1, 14,  //
                                            -1, 1, -1, 3, -1, 5, -1, 7, -1, 9, -1, 11, -1, 13, -1, 15);
    for (int half = 0; half < 2; ++half) {
        __m256i word = fp8_halves(_mm256_shuffle_epi8(broadcast16(codes + 16 * half), spread));
        f(2 * half, even_halves(word));
        f(2 * half + 1, odd_halves(word));
    }
}

// Multiplies x by the scales of output n's blocks and by 2^120, the factor that unpack_fp8_group leaves out. Exact for
// power-of-two scales in [2^-120, 2^7) under which x stays at most 2^126; false if some block's scale is not of them.
inline bool scale_fp8_input(const Weight& w, int64_t n, const float* x, float* to) {
    for (int64_t k = 0; k < w.in; k += 128) {
        int64_t stop = std::min(w.in, k + 128);
        float scale = scale_of(w, n, k), factor = scale * 0x1p120f;
        if (!(scale >= 0x1p-120f && scale < 0x1p7f) || (bits_of(scale) & 0x7FFFFFu)) return false;
        float largest = 0.0f;
        for (int64_t i = k; i < stop; ++i) largest = std::max(largest, std::fabs(x[i]));
        if (!(largest <= 0x1p126f / factor)) return false;
        for (int64_t i = k; i < stop; ++i) to[i] = x[i] * factor;
    }
    return true;
}

#endif

#if defined(DSV4_ISA_AMX)

// Values of codes 0 to 7, zero and the subnormal ones, under one E8M0 scale, as BF16.
struct alignas(16) Fp8Subnormals {
    uint16_t value[8];
};
// The table, indexed by scale byte.
inline const Fp8Subnormals* fp8_subnormals() {
    static const auto& all = *[] {
        auto* table = new std::array<Fp8Subnormals, 256>;
        for (int at = 0; at < 256 * 8; ++at) {
            float value = e4m3_values()[static_cast<size_t>(at % 8)] * e8m0(static_cast<uint8_t>(at / 8));
            (*table)[static_cast<size_t>(at / 8)].value[at % 8] = static_cast<uint16_t>(bits_of(value) >> 16);
        }
        return table;
    }();
    return all.data();
}

// Dequantizes group g of 16 outputs to a BF16 tile [16][32]. False, with nothing written, if the scale would move a
// code's exponent out of the normal numbers.
[[gnu::always_inline]] inline bool dequantize_fp8_tile(const AmxPanel<Kind::fp8>& w, int64_t g, uint16_t* to) {
    const uint8_t* codes = w.codes + g * group_bytes(Kind::fp8);
    const uint8_t scale = w.scales[g / 4];
    if (scale < 10 || scale > 246) return false;
    const __m512i magnitudes = _mm512_set1_epi16(0x07F0),
                  bias = _mm512_set1_epi16(static_cast<int16_t>((scale - 7) * 128));
    const __m512i sign = _mm512_set1_epi16(-0x8000), normal = _mm512_set1_epi16(0x80);
    __m512i least = normal;
    auto dequantize = [&](const uint8_t* at, auto&& adjust) __attribute__((always_inline)) {
        __m512i code = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
        __m512i magnitude = _mm512_and_si512(_mm512_slli_epi16(code, 4), magnitudes);
        __m512i value = adjust(magnitude, _mm512_add_epi16(magnitude, bias));
        return _mm512_ternarylogic_epi32(value, code, sign, 0xF8);  // value | (code & sign)
    };
    for_each_tile_row(codes, w.stride, [&](auto r, const uint8_t* at) __attribute__((always_inline)) {
        _mm512_store_si512(to + r * 32,
                           dequantize(at, [&](__m512i magnitude, __m512i value) __attribute__((always_inline)) {
                               least = _mm512_min_epu16(least, magnitude);
                               return value;
                           }));
    });
    if (_mm512_cmplt_epu16_mask(least, normal)) {  // second pass for subnormal codes, rare in trained weights
        const __m512i values =
            _mm512_castsi128_si512(_mm_load_si128(reinterpret_cast<const __m128i*>(fp8_subnormals()[scale].value)));
        for_each_tile_row(codes, w.stride, [&](auto r, const uint8_t* at) __attribute__((always_inline)) {
            _mm512_store_si512(
                to + r * 32, dequantize(at, [&](__m512i magnitude, __m512i value) __attribute__((always_inline)) {
                    __mmask32 subnormal = _mm512_cmplt_epu16_mask(magnitude, normal);
                    return _mm512_mask_permutexvar_epi16(value, subnormal, _mm512_srli_epi16(magnitude, 4), values);
                }));
        });
    }
    return true;
}

#endif

}  // namespace dsv4::DSV4_ISA
