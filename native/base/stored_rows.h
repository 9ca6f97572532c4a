// Rows of a cache: from fp32 to the bytes of their format and back. dsv4/cache/formats.py has the definition.
//
// In FP8 and FP4 a row is written without loss if it was rounded to the format before (base/rows.h): a block's scale
// may come out smaller then, never larger, and the smaller one has all its values.
#pragma once

#include "base/rows.h"

namespace dsv4::DSV4_ISA {

constexpr int64_t KEY_BLOCK = 64, INDEX_KEY_BLOCK = 32;  // codes per scale of FP8 keys, of FP4 index keys
constexpr uint8_t NAN_SCALE = 255;

// Value of a scale byte: 2^(b - 127). Byte 0 belongs to blank rows, whose codes are zeros.
inline float scale_value(uint8_t b) { return b == NAN_SCALE ? NAN : float_of(static_cast<uint32_t>(b) << 23); }

inline uint16_t to_bf16(float x) {
    const uint32_t bits = bits_of(x);
    if (std::isnan(x)) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
inline float from_bf16(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

inline void round_bf16(float* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = from_bf16(to_bf16(x[i]));
}

// Codes of values that the format has.
inline uint8_t e4m3_code(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude < bits_of(0x1p-6f)) return static_cast<uint8_t>(sign | static_cast<uint32_t>(std::fabs(x) * 512.0f));
    return static_cast<uint8_t>(sign | ((magnitude >> 20) - (120u << 3)));
}
inline uint8_t e2m1_code(float x) {
    const float m = std::fabs(x);
    const float code = m < 2.0f ? 2.0f * m : m < 4.0f ? m + 2.0f : 0.5f * m + 4.0f;
    return static_cast<uint8_t>(static_cast<uint32_t>(code) | (bits_of(x) >> 28 & 8u));
}
inline float e4m3_value(uint8_t code) {
    const uint32_t magnitude = code & 127u, sign = (code & 128u) << 24;
    if (magnitude < 8) return float_of(bits_of(static_cast<float>(magnitude) * 0x1p-9f) | sign);
    return float_of(((magnitude << 20) + (120u << 23)) | sign);
}
inline float e2m1_value(uint8_t code) {
    constexpr float MAGNITUDES[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
    return code & 8 ? -MAGNITUDES[code & 7] : MAGNITUDES[code & 7];
}

// Scale byte of a block, and each value divided by the scale to `put(i, value)`; zeros if one is not finite.
template <class Put>
inline uint8_t scale_block(const float* x, int64_t count, float largest, float floor, Put put) {
    float amax = floor;
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) {
        amax = std::max(amax, std::fabs(x[i]));
        finite = finite && std::fabs(x[i]) < INFINITY;
    }
    const float scale = power_of_two_above(amax * (1.0f / largest));
    for (int64_t i = 0; i < count; ++i) put(i, finite ? std::min(std::max(x[i] / scale, -largest), largest) : 0.0f);
    return finite ? static_cast<uint8_t>(bits_of(scale) >> 23) : NAN_SCALE;
}

inline void encode_fp8(const RowFormat& format, const float* x, uint8_t* to) {
    const int64_t plain = format.plain();
    uint8_t* scale = to + plain + 2 * format.rotary;
    std::fill(scale, to + format.bytes, uint8_t{0});
    for (int64_t i = 0; i < plain; i += KEY_BLOCK)
        *scale++ = scale_block(x + i, std::min(KEY_BLOCK, plain - i), 448.0f, 1e-4f,
                               [&](int64_t j, float value) { to[i + j] = e4m3_code(to_e4m3(value)); });
    for (int64_t i = 0; i < format.rotary; ++i) {
        const uint16_t value = to_bf16(x[plain + i]);
        std::memcpy(to + plain + 2 * i, &value, sizeof value);
    }
}

inline void encode_fp4(const RowFormat& format, const float* x, uint8_t* to) {
    uint8_t* scale = to + (format.width + 1) / 2;
    std::fill(to, scale, uint8_t{0});
    for (int64_t i = 0; i < format.width; i += INDEX_KEY_BLOCK)
        *scale++ = scale_block(x + i, std::min(INDEX_KEY_BLOCK, format.width - i), 6.0f, 6.0f * 0x1p-126f,
                               [&](int64_t j, float value) {
                                   const uint8_t code = e2m1_code(to_e2m1(value));
                                   to[(i + j) / 2] = static_cast<uint8_t>(to[(i + j) / 2] | code << 4 * (j % 2));
                               });
}

inline void encode_row(const RowFormat& format, const float* x, uint8_t* to) {
    switch (format.kind) {
        case RowKind::f32: std::memcpy(to, x, static_cast<size_t>(format.bytes)); break;
        case RowKind::bf16:
            for (int64_t i = 0; i < format.width; ++i) {
                const uint16_t value = to_bf16(x[i]);
                std::memcpy(to + 2 * i, &value, sizeof value);
            }
            break;
        case RowKind::fp8: encode_fp8(format, x, to); break;
        case RowKind::fp4: encode_fp4(format, x, to);
    }
}

// Sixteen BF16 numbers, E4M3 codes times a scale, and E2M1 codes times a scale.
#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)

inline __m256i load_256(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m128i load_128(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

// The codes' bits as halves, whose exponent has another bias: 2^-8 times their values.
inline __m256i e4m3_halves(const uint8_t* codes) {
    const __m256i words = _mm256_cvtepu8_epi16(load_128(codes));
    return _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi16(words, 7), _mm256_set1_epi16(0x3F80)),
                           _mm256_slli_epi16(_mm256_srli_epi16(words, 7), 15));
}
// Twice the values of 32 codes in 16 bytes, in two registers.
inline void e2m1_doubles(const uint8_t* codes, __m128i* to) {
    const __m128i table = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
    const __m128i bytes = load_128(codes), low_bits = _mm_set1_epi8(15);
    const __m128i even = _mm_shuffle_epi8(table, _mm_and_si128(bytes, low_bits));
    const __m128i odd = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(bytes, 4), low_bits));
    to[0] = _mm_unpacklo_epi8(even, odd);
    to[1] = _mm_unpackhi_epi8(even, odd);
}

#if defined(DSV4_ISA_AVX512)
inline V load_bf16(const uint8_t* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_256(p)), 16))};
}
inline V load_e4m3(const uint8_t* p, float scale) {
    return mul({_mm512_cvtph_ps(e4m3_halves(p))}, set1(scale * 256.0f));
}
inline V widen_doubles(__m128i doubles) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(doubles))}; }
#else
inline __m256 widen_bf16(__m128i words) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}
inline V load_bf16(const uint8_t* p) { return {widen_bf16(load_128(p)), widen_bf16(load_128(p + 16))}; }
inline V load_e4m3(const uint8_t* p, float scale) {
    const __m256i halves = e4m3_halves(p);
    return mul({_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))},
               set1(scale * 256.0f));
}
inline V widen_doubles(__m128i doubles) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(doubles)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(doubles, 8)))};
}
#endif
// Thirty-two codes in 16 bytes.
inline void decode_e2m1(const uint8_t* p, float scale, float* to) {
    __m128i doubles[2];
    e2m1_doubles(p, doubles);
    const V half = set1(0.5f * scale);
    store(to, mul(widen_doubles(doubles[0]), half));
    store(to + LANES, mul(widen_doubles(doubles[1]), half));
}

#else

inline V load_bf16(const uint8_t* p) {
    float x[LANES];
    for (int i = 0; i < LANES; ++i) {
        uint16_t bits;
        std::memcpy(&bits, p + 2 * i, sizeof bits);
        x[i] = from_bf16(bits);
    }
    return load(x);
}
inline V load_e4m3(const uint8_t* p, float scale) {
    float x[LANES];
    for (int i = 0; i < LANES; ++i) x[i] = e4m3_value(p[i]) * scale;
    return load(x);
}
inline void decode_e2m1(const uint8_t* p, float scale, float* to) {
    for (int64_t i = 0; i < INDEX_KEY_BLOCK; ++i) to[i] = e2m1_value(p[i / 2] >> 4 * (i % 2) & 15) * scale;
}

#endif

inline void decode_bf16(const uint8_t* from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, load_bf16(from + 2 * i));
    for (; i < n; ++i) {
        uint16_t bits;
        std::memcpy(&bits, from + 2 * i, sizeof bits);
        to[i] = from_bf16(bits);
    }
}

inline void decode_fp8(const RowFormat& format, const uint8_t* from, float* to) {
    const int64_t plain = format.plain();
    const uint8_t* scales = from + plain + 2 * format.rotary;
    for (int64_t i = 0; i < plain;) {
        const float scale = scale_value(*scales++);
        const int64_t stop = std::min(plain, i + KEY_BLOCK);
        const bool in_range = scale < 0x1p120f;  // so that 256 times the scale is finite
        for (; in_range && i + LANES <= stop; i += LANES) store(to + i, load_e4m3(from + i, scale));
        for (; i < stop; ++i) to[i] = e4m3_value(from[i]) * scale;
    }
    decode_bf16(from + plain, format.rotary, to + plain);
}

inline void decode_fp4(const RowFormat& format, const uint8_t* from, float* to) {
    const uint8_t* scales = from + (format.width + 1) / 2;
    for (int64_t i = 0; i < format.width;) {
        const float scale = scale_value(*scales++);
        const int64_t stop = std::min(format.width, i + INDEX_KEY_BLOCK);
        if (stop - i == INDEX_KEY_BLOCK) {
            decode_e2m1(from + i / 2, scale, to + i);
            i = stop;
        }
        for (; i < stop; ++i) to[i] = e2m1_value(from[i / 2] >> 4 * (i % 2) & 15) * scale;
    }
}

inline void decode_row(const RowFormat& format, const uint8_t* from, float* to) {
    switch (format.kind) {
        case RowKind::f32: std::memcpy(to, from, static_cast<size_t>(format.bytes)); break;
        case RowKind::bf16: decode_bf16(from, format.width, to); break;
        case RowKind::fp8: decode_fp8(format, from, to); break;
        case RowKind::fp4: decode_fp4(format, from, to);
    }
}

// Row i as fp32: where it lies if it is stored so, else decoded into memory [width].
inline const float* read_row(const StoredRows& rows, int64_t i, float* memory) {
    if (rows.format.kind == RowKind::f32) return reinterpret_cast<const float*>(rows.row(i));
    decode_row(rows.format, rows.row(i), memory);
    return memory;
}

}  // namespace dsv4::DSV4_ISA
