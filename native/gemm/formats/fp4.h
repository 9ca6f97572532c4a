// FP4 (E2M1, two codes per byte, one E8M0 scale per 32 inputs): the table and all decoders.
#pragma once

#include <array>

#include "gemm/formats/amx_panel.h"
#include "gemm/formats/columns.h"

namespace dsv4::DSV4_ISA {

constexpr float E2M1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                            -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// Inputs [k0, k1) of output n.
inline void dequantize_fp4_row(const Weight& w, int64_t n, int64_t k0, int64_t k1, float* to) {
    const uint8_t* row = w.data + n * w.stride;
    for (int64_t k = k0; k < k1;) {
        float scale = scale_of(w, n, k);
        for (int64_t stop = std::min(k1, (k / 32 + 1) * 32); k < stop; ++k)
            *to++ = E2M1[k % 2 ? row[k / 2] >> 4 : row[k / 2] & 15] * scale;
    }
}

#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)

// The 16 values under one scale as BF16, which is exact: low bytes, then high bytes. One cache line per scale.
struct alignas(64) Fp4Bytes {
    uint8_t low[16], high[16];
};
// The table, indexed by scale byte.
inline const Fp4Bytes* fp4_table() {
    static const auto& all = *[] {
        auto* table = new std::array<Fp4Bytes, 256>;
        for (int scale = 0; scale < 256; ++scale)
            for (int code = 0; code < 16; ++code) {
                uint32_t bits = bits_of(E2M1[code] * e8m0(static_cast<uint8_t>(scale))) >> 16;
                auto& of = (*table)[static_cast<size_t>(scale)];
                of.low[code] = static_cast<uint8_t>(bits);
                of.high[code] = static_cast<uint8_t>(bits >> 8);
            }
        return table;
    }();
    return all.data();
}

// Calls f(k, column), split, for k in [k0, k1) of outputs [n, n + 32); k0 and k1 are multiples of 32. `low` and `high`
// hold the bytes of the values times 2^125; the scale is subtracted from their exponents, and saturation keeps zeros
// zero.
template <class F>
[[gnu::always_inline]] inline void for_each_fp4_column(const Weight& w, int64_t n, int64_t k0, int64_t k1, F&& f) {
    const __m256i code_bits = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    const __m256i high = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 0x7D, 0x7E, 0x7E, 0x7E, 0x7E, 0x7F, 0x7F, 0, static_cast<char>(0xFD), static_cast<char>(0xFE),
                      static_cast<char>(0xFE), static_cast<char>(0xFE), static_cast<char>(0xFE),
                      static_cast<char>(0xFF), static_cast<char>(0xFF)));
    const __m256i low = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, static_cast<char>(0x80), 0, 0x40, static_cast<char>(0x80), static_cast<char>(0xC0), 0, 0x40, 0,
                      static_cast<char>(0x80), 0, 0x40, static_cast<char>(0x80), static_cast<char>(0xC0), 0, 0x40));
    const int64_t groups = (w.in + 31) / 32;
    __m256i scales[16];
    int64_t loaded = -1;  // index of the sixteen groups in `scales`
    for_each_piece(w, n, k0 / 2, k1 / 2, [&](int64_t byte, const uint8_t* piece) __attribute__((always_inline)) {
        int64_t k = 2 * byte, group = k / 32;
        if (group / 16 != loaded) {
            loaded = group / 16;
            const uint8_t* from = w.scales + (w.first + n) * w.scale_stride + loaded * 16;
            if (loaded * 16 + 16 <= groups) {
                transpose_32x16_bytes(from, w.scale_stride, scales);
            } else {
                uint8_t part[32 * 16] = {};
                for (int r = 0; r < 32; ++r)
                    std::memcpy(part + r * 16, from + r * w.scale_stride, static_cast<size_t>(groups - loaded * 16));
                transpose_32x16_bytes(part, 16, scales);
            }
        }
        __m256i e = scales[group % 16];
        // Under scale bytes 0, 1 and 253 to 255 some value is not a normal number.
        __m256i extreme = _mm256_cmpeq_epi8(
            _mm256_max_epu8(_mm256_sub_epi8(e, _mm256_set1_epi8(2)), _mm256_set1_epi8(static_cast<char>(251))),
            _mm256_sub_epi8(e, _mm256_set1_epi8(2)));
        if (!_mm256_testz_si256(extreme, extreme)) {
            Column columns[32];
            dequantize_columns<dequantize_fp4_row>(w, n, k, k + 32, columns);
            for (int i = 0; i < 32; ++i) f(k + i, columns[i]);
            return;
        }
        e = _mm256_sub_epi8(_mm256_set1_epi8(static_cast<char>(252)), e);
        __m256i s0 = _mm256_slli_epi16(_mm256_unpacklo_epi8(e, zero), 7);
        __m256i s1 = _mm256_slli_epi16(_mm256_unpackhi_epi8(e, zero), 7);
        __m256i c[16];
        transpose_32x16_bytes(piece, PIECE_STRIDE, c);
        auto dequantize = [&](__m256i codes) __attribute__((always_inline)) {
            __m256i h = _mm256_shuffle_epi8(high, codes), l = _mm256_shuffle_epi8(low, codes);
            return column_of_halves(_mm256_subs_epu16(_mm256_unpacklo_epi8(l, h), s0),
                                    _mm256_subs_epu16(_mm256_unpackhi_epi8(l, h), s1));
        };
        for (int i = 0; i < 16; ++i) {
            f(k + 2 * i, dequantize(_mm256_and_si256(c[i], code_bits)));
            f(k + 2 * i + 1, dequantize(_mm256_and_si256(_mm256_srli_epi16(c[i], 4), code_bits)));
        }
    });
}

// Calls f(step, eight weights) for the four steps of a group of 32 inputs of one output, as in accumulation_order.h.
template <class F>
[[gnu::always_inline]] inline void unpack_fp4_group(const uint8_t* codes, const Fp4Bytes& values, F&& f) {
    // Codes of even inputs in the lower half, of odd ones in the upper.
    const __m256i shift = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4);
    __m256i c = _mm256_and_si256(_mm256_srlv_epi32(broadcast16(codes), shift), _mm256_set1_epi8(15));
    __m256i low = _mm256_shuffle_epi8(broadcast16(values.low), c),
            high = _mm256_shuffle_epi8(broadcast16(values.high), c);
    __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
    f(0, even_halves(a));
    f(1, odd_halves(a));
    f(2, even_halves(b));
    f(3, odd_halves(b));
}

#endif

#if defined(DSV4_ISA_AMX)

// Dequantizes group g of 16 outputs to a BF16 tile [16][32].
[[gnu::always_inline]] inline bool dequantize_fp4_tile(const AmxPanel<Kind::fp4>& w, int64_t g, uint16_t* to) {
    const uint8_t* codes = w.codes + g * group_bytes(Kind::fp4);
    const Fp4Bytes* values = fp4_table();
    alignas(64) static constexpr auto TWICE = [] {  // bytes 0 0 0 0 1 1 1 1 ...
        std::array<uint8_t, 64> index{};
        for (size_t i = 0; i < 64; ++i) index[i] = static_cast<uint8_t>(i / 4);
        return index;
    }();
    const __m512i twice = _mm512_load_si512(TWICE.data()), shift = _mm512_set1_epi32(4 << 16);
    const __m512i code_bits = _mm512_set1_epi8(15), high_byte = _mm512_set1_epi16(0x1000);
    const uint8_t *scale = w.scales + g, *row_scale[LANES];
    for_each_tile_row(scale, w.scale_stride,
                      [&](auto r, const uint8_t* at) __attribute__((always_inline)) { row_scale[r] = at; });
    for_each_tile_row(codes, w.stride, [&](auto r, const uint8_t* at) __attribute__((always_inline)) {
        // Each 16-bit word gets its code twice, then the places of the value's low and high byte in the table.
        __m512i bytes = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
        __m512i word = _mm512_srlv_epi16(_mm512_permutexvar_epi8(twice, bytes), shift);
        __m512i place = _mm512_ternarylogic_epi32(word, code_bits, high_byte, 0xEA);  // (word & code_bits) | high_byte
        _mm512_store_si512(to + r * 32, _mm512_permutexvar_epi8(place, _mm512_load_si512(&values[*row_scale[r]])));
    });
    return true;
}

#endif

}  // namespace dsv4::DSV4_ISA
