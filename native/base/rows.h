// Operations on one row: norm, rotation, Hadamard, rounding to BF16, FP8 and FP4, SwiGLU.
#pragma once

#include <algorithm>

#include "base/simd.h"
#include "base/views.h"

namespace dsv4::DSV4_ISA {

// to = x * rsqrt(mean(x^2) + eps) * weight; weight may be null.
inline void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* to) {
    float inverse = 1.0f / std::sqrt(dot(x, x, n) / static_cast<float>(n) + eps);
    V factor = set1(inverse);
    for (int64_t i = 0; i < n; i += LANES) {
        int left = static_cast<int>(std::min<int64_t>(LANES, n - i));
        V y = mul(load_n(x + i, left), factor);
        if (weight) y = mul(y, load_n(weight + i, left));
        store_n(to + i, y, left);
    }
}

// Computes cos and sin [pairs] of the rotation at a position.
inline void rotation(const std::vector<float>& inv_freq, int64_t position, float* cos, float* sin) {
    for (size_t i = 0; i < inv_freq.size(); ++i) {
        float angle = static_cast<float>(position) * inv_freq[i];
        cos[i] = std::cos(angle);
        sin[i] = std::sin(angle);
    }
}

// Rotates the last 2 * pairs of n channels, adjacent channels forming a pair; sign -1 rotates back.
inline void rotate(float* x, int64_t n, const float* cos, const float* sin, int64_t pairs, float sign) {
    float* rotated = x + n - 2 * pairs;
    for (int64_t i = 0; i < pairs; ++i) {
        float even = rotated[2 * i], odd = rotated[2 * i + 1], s = sign * sin[i];
        rotated[2 * i] = even * cos[i] + odd * -s;
        rotated[2 * i + 1] = odd * cos[i] + even * s;
    }
}

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// 2^ceil(log2(ratio)) for a positive normal ratio.
inline float power_of_two_above(float ratio) {
    uint32_t bits = bits_of(ratio);
    return float_of((bits + ((bits & 0x7FFFFFu) ? 0x800000u : 0u)) & 0x7F800000u);
}

// Rounds x in [-448, 448] to the nearest e4m3fn value, ties to the even code; a quiet NaN stays NaN.
inline float to_e4m3(float x) {
    uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFFu;
    if (magnitude < bits_of(0x1p-6f)) {  // subnormal codes are 2^-9 apart
        float rounded = __builtin_rintf(float_of(magnitude) * 512.0f) * (1.0f / 512.0f);
        return float_of(bits_of(rounded) | (bits & 0x80000000u));
    }
    magnitude = std::min(magnitude, 0x7FF00000u);  // a NaN's could carry into the sign
    magnitude += 0x7FFFFu + ((magnitude >> 20) & 1u);
    return float_of((magnitude & ~0xFFFFFu) | (bits & 0x80000000u));
}

// Rounds x in [-6, 6] to the nearest e2m1 value, ties to the even code.
inline float to_e2m1(float x) {
    float magnitude = std::fabs(x);
    float step = magnitude < 2.0f ? 0.5f : magnitude < 4.0f ? 1.0f : 2.0f;
    return std::copysign(__builtin_rintf(magnitude / step) * step, x);
}

template <class Round>
inline void fake_quant(float* x, int64_t n, int64_t block, float largest, float floor, Round round) {
    for (int64_t start = 0; start < n; start += block) {
        int64_t stop = std::min(n, start + block);
        float amax = floor;
        for (int64_t i = start; i < stop; ++i) amax = std::max(amax, std::fabs(x[i]));
        float scale = power_of_two_above(amax * (1.0f / largest));
        for (int64_t i = start; i < stop; ++i)
            x[i] = round(std::min(std::max(x[i] / scale, -largest), largest)) * scale;
    }
}
// floor: least amax of a block.
inline void fake_quant_fp8(float* x, int64_t n, int64_t block, float floor = 1e-4f) {
    fake_quant(x, n, block, 448.0f, floor, to_e4m3);
}
inline void fake_quant_fp4(float* x, int64_t n, int64_t block) {
    fake_quant(x, n, block, 6.0f, 6.0f * 0x1p-126f, to_e2m1);
}

// Least magnitude of a factor in BF16, in which it is a multiple of 2^-63: so products and their sums are multiples of
// 2^-126, and no instruction set flushes one to zero.
constexpr float LEAST_FACTOR = 0x1p-56f;

// Upper half of the nearest BF16 number, ties to even, with zero for magnitudes below LEAST_FACTOR.
inline uint32_t to_bf16_factor(float x) {
    const uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFFu;
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
    const uint32_t number = (rounded & 0x7FFFFFFFu) < bits_of(LEAST_FACTOR) ? 0u : rounded;
    return magnitude > 0x7F800000u ? 0x7FC00000u : number;
}

// Rounds the factors of products to BF16; y may be x.
inline void round_factors(const float* x, int64_t n, float* y) {
    for (int64_t i = 0; i < n; ++i) y[i] = float_of(to_bf16_factor(x[i]));
}
inline void pack_factors(const float* x, int64_t n, uint16_t* y) {
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<uint16_t>(to_bf16_factor(x[i]) >> 16);
}

// Rounds the input of a product of layers or experts as the numerics say; x [n].
inline void round_input(const Config& c, float* x, int64_t n) {
    if (c.quantize) fake_quant_fp8(x, n, 128);
    if (c.bf16) round_factors(x, n, x);
}

// Normalized Walsh-Hadamard transform of n = 2^k channels, in place.
inline void hadamard(float* x, int64_t n) {
    for (int64_t half = 1; half < n; half *= 2)
        for (int64_t start = 0; start < n; start += 2 * half)
            for (int64_t i = start; i < start + half; ++i) {
                float a = x[i], b = x[i + half];
                x[i] = a + b;
                x[i + half] = a - b;
            }
    float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(n)));
    for (int64_t i = 0; i < n; ++i) x[i] *= scale;
}

// gate = silu(min(gate, limit)) * clamp(up, -limit, limit) * weight, in place.
inline void swiglu(float* gate, const float* up, int64_t n, float limit, float weight) {
    for (int64_t i = 0; i < n; i += LANES) {
        int left = static_cast<int>(std::min<int64_t>(LANES, n - i));
        // The value is the second operand: min and max return that one if either is NaN.
        V g = min(set1(limit), load_n(gate + i, left));
        V u = max(set1(-limit), min(set1(limit), load_n(up + i, left)));
        store_n(gate + i, mul(mul(mul(sigmoid(g), g), u), set1(weight)), left);
    }
}

}  // namespace dsv4::DSV4_ISA
