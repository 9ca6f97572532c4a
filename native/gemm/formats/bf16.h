// BF16: all decoders.
#pragma once

#include "gemm/formats/amx_panel.h"
#include "gemm/formats/columns.h"

namespace dsv4::DSV4_ISA {

// Inputs [k0, k1) of output n.
inline void dequantize_bf16_row(const Weight& w, int64_t n, int64_t k0, int64_t k1, float* to) {
    const uint8_t* row = w.data + n * w.stride;
    for (int64_t k = k0; k < k1; ++k) *to++ = float_of(static_cast<uint32_t>(row[2 * k] | row[2 * k + 1] << 8) << 16);
}

#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)

// Calls f(k, column), split, for k in [k0, k1) of outputs [n, n + 32); k0 and k1 are multiples of 8.
template <class F>
[[gnu::always_inline]] inline void for_each_bf16_column(const Weight& w, int64_t n, int64_t k0, int64_t k1, F&& f) {
    for_each_piece(w, n, 2 * k0, 2 * k1, [&](int64_t byte, const uint8_t* piece) __attribute__((always_inline)) {
        __m256i c[16];
        transpose_32x8_words(piece, PIECE_STRIDE, c);
        for (int i = 0; i < 8; ++i) f(byte / 2 + i, column_of_halves(c[2 * i], c[2 * i + 1]));
    });
}

// Calls f(step, eight weights) for the four steps of a group of 32 inputs of one output, in gemv.h's lanes for BF16.
template <class F>
[[gnu::always_inline]] inline void unpack_bf16_group(const uint8_t* codes, F&& f) {
    for (int half = 0; half < 2; ++half) {
        __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32 * half));
        __m256 even = even_halves(word), odd = odd_halves(word);
        f(2 * half, _mm256_shuffle_ps(even, odd, 0x88));
        f(2 * half + 1, _mm256_shuffle_ps(even, odd, 0xDD));
    }
}

#endif

#if defined(DSV4_ISA_AMX)

// Loads group g of 16 outputs as a BF16 tile [16][32].
[[gnu::always_inline]] inline bool load_bf16_tile(const AmxPanel<Kind::bf16>& w, int64_t g, uint16_t* to) {
    for_each_tile_row(w.codes + g * group_bytes(Kind::bf16), w.stride,
                      [&](auto r, const uint8_t* at)
                          __attribute__((always_inline)) { _mm512_store_si512(to + r * 32, _mm512_loadu_si512(at)); });
    return true;
}

#endif

}  // namespace dsv4::DSV4_ISA
