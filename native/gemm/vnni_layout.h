// The VNNI layout that AMX tiles and AVX-512's pairwise dot products read: 16-bit values, two inputs of a row side by
// side.
#pragma once

#include <algorithm>

#include "base/scratch.h"
#include "base/transpose.h"
#include "gemm/accumulation_order.h"

#if defined(DSV4_ISA_AVX512)

namespace dsv4::DSV4_ISA {

constexpr int64_t TILE_WORDS = 512;  // 16-bit values of a tile: 16 rows of 32

// Loads 16 floats of a row of which `left` remain; the rest are zeros.
[[gnu::always_inline]] inline __m512 load_padded(const float* from, int64_t left) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << std::clamp<int64_t>(left, 0, LANES)) - 1u), from);
}

}  // namespace dsv4::DSV4_ISA

#endif
