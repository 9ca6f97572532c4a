// Weights as they are stored: FP4 in groups of 32, FP8 in blocks of 128 x 128, BF16, FP32; read in place, row after row.
//
// An element widens to the fp32 number that dsv4.checkpoint.formats gives it, so a product has the bits that it has with
// widened weights (on AMX tiles to rounding). FP8's code for NaN is none that a weight may have. `each_input` turns 32 rows at
// a time round in registers: columns of them, which is what products read.
#pragma once

#include <array>

#include "gemm/accumulation_order.h"
#include "base/rows.h"

namespace dsv4::DSV4_ISA {

// A power of two from an E8M0 byte: 2^(b - 127), 255 is NaN.
inline float e8m0(uint8_t b) {
    return b == 0 ? 0x1p-127f : b == 255 ? NAN : float_of(static_cast<uint32_t>(b) << 23);
}

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

constexpr float E2M1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                            -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

inline float scale_of(const Weight& w, int64_t n, int64_t k) {
    if (w.kind == Kind::fp4) return e8m0(w.scales[(w.first + n) * w.scale_stride + k / 32]);
    int64_t at = (w.first + n) / 128 * w.scale_stride + k / 128;
    return w.float_scales ? w.float_scales[at] : e8m0(w.scales[at]);
}

// Inputs [k0, k1) of output n, widened.
inline void widen_row(const Weight& w, int64_t n, int64_t k0, int64_t k1, float* to) {
    const uint8_t* row = w.data + n * w.stride;
    switch (w.kind) {
        case Kind::f32: std::memcpy(to, row + 4 * k0, sizeof(float) * static_cast<size_t>(k1 - k0)); return;
        case Kind::bf16:
            for (int64_t k = k0; k < k1; ++k)
                *to++ = float_of(static_cast<uint32_t>(row[2 * k] | row[2 * k + 1] << 8) << 16);
            return;
        case Kind::fp8:
            for (int64_t k = k0; k < k1;) {
                float scale = scale_of(w, n, k);
                for (int64_t stop = std::min(k1, (k / 128 + 1) * 128); k < stop; ++k) *to++ = e4m3_values()[row[k]] * scale;
            }
            return;
        case Kind::fp4:
            for (int64_t k = k0; k < k1;) {
                float scale = scale_of(w, n, k);
                for (int64_t stop = std::min(k1, (k / 32 + 1) * 32); k < stop; ++k)
                    *to++ = E2M1[k % 2 ? row[k / 2] >> 4 : row[k / 2] & 15] * scale;
            }
            return;
    }
}

#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)

// One input's weights of 32 outputs. Split: outputs 0 2 4 6 16 18 20 22, the odd ones beside them, then 8 more of each;
// the 16-bit halves of a register become fp32 numbers that way. Else: in their order.
struct Column {
    __m256 v[4];
};

// 16 bytes of 32 rows, row r beside row r + 16, turned into columns by four rounds of interleaving registers i and i + 8; low
// and high interleave the halves of two registers, number by number.
template <class Low, class High>
[[gnu::always_inline]] inline void turn(const uint8_t* from, int64_t stride, __m256i* c, Low low, High high) {
    __m256i d[16];
    for (int r = 0; r < 16; ++r)
        c[r] = _mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + r * stride))),
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + (r + 16) * stride)), 1);
    auto round = [&](const __m256i* x, __m256i* y) __attribute__((always_inline)) {
        for (int i = 0; i < 8; ++i) y[2 * i] = low(x[i], x[i + 8]), y[2 * i + 1] = high(x[i], x[i + 8]);
    };
    round(c, d), round(d, c), round(c, d), round(d, c);
}

// Bytes [0, 16) of 32 rows -> c[i] = byte i of rows 0 to 15 and, in the upper half, 16 to 31.
inline void turn_bytes(const uint8_t* from, int64_t stride, __m256i* c) {
    turn(from, stride, c, [](__m256i a, __m256i b) { return _mm256_unpacklo_epi8(a, b); },
         [](__m256i a, __m256i b) { return _mm256_unpackhi_epi8(a, b); });
}

// 16-bit numbers [0, 8) of 32 rows -> c[2 * i] and c[2 * i + 1]: number i of rows 0 to 7 with 16 to 23, and of the others.
inline void turn_words(const uint8_t* from, int64_t stride, __m256i* c) {
    turn(from, stride, c, [](__m256i a, __m256i b) { return _mm256_unpacklo_epi16(a, b); },
         [](__m256i a, __m256i b) { return _mm256_unpackhi_epi16(a, b); });
}

// Four numbers of eight rows, `stride` apart -> to[i] = number i of each.
inline void turn_quads(const float* from, int64_t stride, __m256* to) {
    __m256 r[4];
    for (int j = 0; j < 4; ++j)
        r[j] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + j * stride)),
                                    _mm_loadu_ps(from + (j + 4) * stride), 1);
    __m256 a0 = _mm256_unpacklo_ps(r[0], r[1]), a1 = _mm256_unpackhi_ps(r[0], r[1]);
    __m256 a2 = _mm256_unpacklo_ps(r[2], r[3]), a3 = _mm256_unpackhi_ps(r[2], r[3]);
    to[0] = _mm256_shuffle_ps(a0, a2, 0x44), to[1] = _mm256_shuffle_ps(a0, a2, 0xEE);
    to[2] = _mm256_shuffle_ps(a1, a3, 0x44), to[3] = _mm256_shuffle_ps(a1, a3, 0xEE);
}

// The 16-bit halves are the upper halves of fp32 numbers.
inline Column widen_halves(__m256i w0, __m256i w1) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(w0, 16)), _mm256_castsi256_ps(_mm256_and_si256(w0, upper)),
             _mm256_castsi256_ps(_mm256_slli_epi32(w1, 16)), _mm256_castsi256_ps(_mm256_and_si256(w1, upper))}};
}

// Pieces of 32 rows are copied before they are turned: a row at a time, so that the processor sees one stream and not 32,
// which moreover share few places of the first-level cache where the rows' distance is a power of two.
constexpr int64_t PIECE = 512, PIECE_STRIDE = PIECE + 64;
// `ahead`: how far on the piece is that comes after this one, which is asked for.
inline void copy_pieces(const uint8_t* from, int64_t stride, int64_t bytes, int64_t ahead, uint8_t* to) {
    for (int r = 0; r < 32; ++r, from += stride, to += PIECE_STRIDE) {
        int64_t i = 0;
        for (; i + 64 <= bytes; i += 64) {
            _mm_prefetch(reinterpret_cast<const char*>(from + i + ahead), _MM_HINT_T1);
            __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
            __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i + 32));
            _mm256_store_si256(reinterpret_cast<__m256i*>(to + i), a);
            _mm256_store_si256(reinterpret_cast<__m256i*>(to + i + 32), b);
        }
        if (i < bytes) std::memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
    }
}

// f(byte, piece) for bytes [b0, b1) of 32 rows, multiples of 16, in steps of 16: those of row r are at
// piece[r * PIECE_STRIDE].
template <class F>
[[gnu::always_inline]] inline void each_piece(const Weight& w, int64_t n, int64_t b0, int64_t b1, F&& f) {
    alignas(64) uint8_t pieces[32 * PIECE_STRIDE];
    for (int64_t b = b0; b < b1; b += PIECE) {
        int64_t bytes = std::min(PIECE, b1 - b);
        copy_pieces(w.data + n * w.stride + b, w.stride, bytes, b + PIECE < b1 ? PIECE : 32 * w.stride - (b - b0), pieces);
        for (int64_t i = 0; i < bytes; i += 16) f(b + i, pieces + i);
    }
}

// Columns that vector code does not take: to[k - k0] for k in [k0, k1), 32 at most, in split order. Apart, so that what
// each column is used for stays in registers.
[[gnu::noinline]] inline void widened_columns(const Weight& w, int64_t n, int64_t k0, int64_t k1, Column* to) {
    alignas(32) float rows[32][32], part[32];
    constexpr int order[32] = {0, 2,  4,  6,  16, 18, 20, 22, 1, 3,  5,  7,  17, 19, 21, 23,
                               8, 10, 12, 14, 24, 26, 28, 30, 9, 11, 13, 15, 25, 27, 29, 31};
    for (int r = 0; r < 32; ++r) widen_row(w, n + r, k0, k1, rows[r]);
    for (int64_t k = 0; k < k1 - k0; ++k) {
        for (int i = 0; i < 32; ++i) part[i] = rows[order[i]][k];
        for (int i = 0; i < 4; ++i) to[k].v[i] = _mm256_load_ps(part + 8 * i);
    }
}

// FP4: k0 and k1 are multiples of 32. The scale is taken from the exponents: codes stand for values times 2^125, and what
// is zero stays zero under saturation.
template <class F>
[[gnu::always_inline]] inline void each_fp4(const Weight& w, int64_t n, int64_t k0, int64_t k1, F&& f) {
    const __m256i low = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    const __m256i upper = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, 0x7D, 0x7E, 0x7E, 0x7E, 0x7E, 0x7F, 0x7F, 0, static_cast<char>(0xFD), static_cast<char>(0xFE),
        static_cast<char>(0xFE), static_cast<char>(0xFE), static_cast<char>(0xFE), static_cast<char>(0xFF),
        static_cast<char>(0xFF)));
    const __m256i lower = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, static_cast<char>(0x80), 0, 0x40, static_cast<char>(0x80), static_cast<char>(0xC0), 0, 0x40, 0,
        static_cast<char>(0x80), 0, 0x40, static_cast<char>(0x80), static_cast<char>(0xC0), 0, 0x40));
    const int64_t groups = (w.in + 31) / 32;
    __m256i scales[16];
    int64_t have = -1;  // the sixteen groups in `scales`
    each_piece(w, n, k0 / 2, k1 / 2, [&](int64_t byte, const uint8_t* piece) __attribute__((always_inline)) {
        int64_t k = 2 * byte, group = k / 32;
        if (group / 16 != have) {
            have = group / 16;
            const uint8_t* from = w.scales + (w.first + n) * w.scale_stride + have * 16;
            if (have * 16 + 16 <= groups) {
                turn_bytes(from, w.scale_stride, scales);
            } else {
                uint8_t part[32 * 16] = {};
                for (int r = 0; r < 32; ++r)
                    std::memcpy(part + r * 16, from + r * w.scale_stride, static_cast<size_t>(groups - have * 16));
                turn_bytes(part, 16, scales);
            }
        }
        __m256i e = scales[group % 16];
        // Exponents with which a value is no normal number: 0, 1 and 253 to 255.
        __m256i odd = _mm256_cmpeq_epi8(
            _mm256_max_epu8(_mm256_sub_epi8(e, _mm256_set1_epi8(2)), _mm256_set1_epi8(static_cast<char>(251))),
            _mm256_sub_epi8(e, _mm256_set1_epi8(2)));
        if (!_mm256_testz_si256(odd, odd)) {
            Column columns[32];
            widened_columns(w, n, k, k + 32, columns);
            for (int i = 0; i < 32; ++i) f(k + i, columns[i]);
            return;
        }
        e = _mm256_sub_epi8(_mm256_set1_epi8(static_cast<char>(252)), e);
        __m256i s0 = _mm256_slli_epi16(_mm256_unpacklo_epi8(e, zero), 7);
        __m256i s1 = _mm256_slli_epi16(_mm256_unpackhi_epi8(e, zero), 7);
        __m256i c[16];
        turn_bytes(piece, PIECE_STRIDE, c);
        auto widen = [&](__m256i codes) __attribute__((always_inline)) {
            __m256i h = _mm256_shuffle_epi8(upper, codes), l = _mm256_shuffle_epi8(lower, codes);
            return widen_halves(_mm256_subs_epu16(_mm256_unpacklo_epi8(l, h), s0),
                                _mm256_subs_epu16(_mm256_unpackhi_epi8(l, h), s1));
        };
        for (int i = 0; i < 16; ++i) {
            f(k + 2 * i, widen(_mm256_and_si256(c[i], low)));
            f(k + 2 * i + 1, widen(_mm256_and_si256(_mm256_srli_epi16(c[i], 4), low)));
        }
    });
}

// FP8: k0 and k1 are multiples of 16, and the 32 outputs lie in one block. The codes' bits are those of fp32 numbers
// 2^-120 times as large, and the scale makes up for it.
template <class F>
[[gnu::always_inline]] inline void each_fp8(const Weight& w, int64_t n, int64_t k0, int64_t k1, F&& f) {
    const __m256i zero = _mm256_setzero_si256(), keep = _mm256_set1_epi16(static_cast<int16_t>(0x87F0));
    each_piece(w, n, k0, k1, [&](int64_t k, const uint8_t* piece) __attribute__((always_inline)) {
        float scale = scale_of(w, n, k);
        if (!(scale <= 128.0f)) {
            Column columns[16];
            widened_columns(w, n, k, k + 16, columns);
            for (int i = 0; i < 16; ++i) f(k + i, columns[i]);
            return;
        }
        __m256 factor = _mm256_set1_ps(scale * 0x1p120f);
        __m256i c[16];
        turn_bytes(piece, PIECE_STRIDE, c);
        for (int i = 0; i < 16; ++i) {
            auto halves = [&](__m256i word) __attribute__((always_inline)) { return _mm256_and_si256(_mm256_srai_epi16(word, 4), keep); };
            Column column = widen_halves(halves(_mm256_unpacklo_epi8(zero, c[i])), halves(_mm256_unpackhi_epi8(zero, c[i])));
            for (__m256& v : column.v) v = _mm256_mul_ps(v, factor);
            f(k + i, column);
        }
    });
}

// BF16: k0 and k1 are multiples of 8.
template <class F>
[[gnu::always_inline]] inline void each_bf16(const Weight& w, int64_t n, int64_t k0, int64_t k1, F&& f) {
    each_piece(w, n, 2 * k0, 2 * k1, [&](int64_t byte, const uint8_t* piece) __attribute__((always_inline)) {
        __m256i c[16];
        turn_words(piece, PIECE_STRIDE, c);
        for (int i = 0; i < 8; ++i) f(byte / 2 + i, widen_halves(c[2 * i], c[2 * i + 1]));
    });
}

// FP32: k0 and k1 are multiples of 4; columns in order, not split.
template <class F>
[[gnu::always_inline]] inline void each_f32(const Weight& w, int64_t n, int64_t k0, int64_t k1, F&& f) {
    each_piece(w, n, 4 * k0, 4 * k1, [&](int64_t byte, const uint8_t* piece) __attribute__((always_inline)) {
        __m256 turned[4][4];
        for (int q = 0; q < 4; ++q)
            turn_quads(reinterpret_cast<const float*>(piece + q * 8 * PIECE_STRIDE), PIECE_STRIDE / 4, turned[q]);
        for (int i = 0; i < 4; ++i)
            f(byte / 4 + i, Column{{turned[0][i], turned[1][i], turned[2][i], turned[3][i]}});
    });
}

// Whether `each_input` can take outputs [n, n + 32) of w.
inline bool takes(const Weight& w, int64_t n) {
    if (w.out - n < 32) return false;
    return w.kind != Kind::fp8 || (w.first + n) / 128 == (w.first + n + 31) / 128;
}

// f(k, column, split) for k in [k0, k1), multiples of 32, for outputs [n, n + 32).
template <class F>
[[gnu::always_inline]] inline void each_input(const Weight& w, int64_t n, int64_t k0, int64_t k1, F&& f) {
    auto split = [&](int64_t k, const Column& c) __attribute__((always_inline)) { f(k, c, true); };
    switch (w.kind) {
        case Kind::f32:
            return each_f32(w, n, k0, k1, [&](int64_t k, const Column& c) __attribute__((always_inline)) { f(k, c, false); });
        case Kind::bf16: return each_bf16(w, n, k0, k1, split);
        case Kind::fp8: return each_fp8(w, n, k0, k1, split);
        case Kind::fp4: return each_fp4(w, n, k0, k1, split);
    }
}

// A column of a weight of this kind in the outputs' order.
[[gnu::always_inline]] inline Column in_order(bool split, const Column& c) {
    if (!split) return c;
    Column out;
    for (int h = 0; h < 2; ++h) {
        __m256 a = _mm256_unpacklo_ps(c.v[2 * h], c.v[2 * h + 1]), b = _mm256_unpackhi_ps(c.v[2 * h], c.v[2 * h + 1]);
        out.v[h] = _mm256_permute2f128_ps(a, b, 0x20);
        out.v[2 + h] = _mm256_permute2f128_ps(a, b, 0x31);
    }
    return out;
}

// A column in the outputs' order -> one row of two panels.
[[gnu::always_inline]] inline void put_column(const Column& c, float* to, int64_t apart) {
    _mm256_storeu_ps(to, c.v[0]);
    _mm256_storeu_ps(to + 8, c.v[1]);
    _mm256_storeu_ps(to + apart, c.v[2]);
    _mm256_storeu_ps(to + apart + 8, c.v[3]);
}

#endif

// Outputs [n0, n0 + 16 or fewer) -> panel [8 sums][groups * 4][16]; missing columns and inputs are 0.
inline void pack_panel(const Weight& w, int64_t n0, float* to) {
    int count = static_cast<int>(std::min<int64_t>(LANES, w.out - n0));
    int64_t groups = groups_of(w.in);
    float* wide = scratch(Scratch::wide, (count + LANES) * GROUP);
    float* turned = wide + count * GROUP;
    for (int64_t g = 0; g < groups; ++g) {
        int64_t k0 = g * GROUP, k1 = std::min(w.in, k0 + GROUP);
        const float* rows[LANES];
        std::fill_n(wide, count * GROUP, 0.0f);
        for (int j = 0; j < count; ++j) {
            widen_row(w, n0 + j, k0, k1, wide + j * GROUP);
            rows[j] = wide + j * GROUP;
        }
        for (int r = 0; r < GROUP; r += LANES) {
            pack_rows(rows, count, LANES, turned);
            for (int i = 0; i < LANES; ++i) store(to + sum_by_sum(k0 + r + i, groups) * LANES, load(turned + i * LANES));
            for (int j = 0; j < count; ++j) rows[j] += LANES;
        }
    }
}

// Outputs [n0, n1) -> panels of 16 outputs, one after the other.
inline void pack_panels(const Weight& w, int64_t n0, int64_t n1, float* to) {
    const int64_t groups = groups_of(w.in), apart = groups * GROUP * LANES;
    for (int64_t n = n0; n < n1; n += LANES, to += apart) {
#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)
        if (n + 2 * LANES <= n1 && takes(w, n) && w.in % GROUP == 0) {
            each_input(w, n, 0, w.in, [&](int64_t k, const Column& column, bool split) __attribute__((always_inline)) {
                put_column(in_order(split, column), to + sum_by_sum(k, groups) * LANES, apart);
            });
            n += LANES, to += apart;
            continue;
        }
#endif
        pack_panel(w, n, to);
    }
}

}  // namespace dsv4::DSV4_ISA
