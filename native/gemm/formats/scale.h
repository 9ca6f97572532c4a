// Scales of FP4 and FP8 weights.
#pragma once

#include "base/rows.h"

namespace dsv4::DSV4_ISA {

// Value of an E8M0 byte: 2^(b - 127); 255 is NaN.
inline float e8m0(uint8_t b) { return b == 0 ? 0x1p-127f : b == 255 ? NAN : float_of(static_cast<uint32_t>(b) << 23); }

// Scale of input k of output n.
inline float scale_of(const Weight& w, int64_t n, int64_t k) {
    if (w.kind == Kind::fp4) return e8m0(w.scales[(w.first + n) * w.scale_stride + k / 32]);
    int64_t at = (w.first + n) / 128 * w.scale_stride + k / 128;
    return w.float_scales ? w.float_scales[at] : e8m0(w.scales[at]);
}

}  // namespace dsv4::DSV4_ISA
