// Access to 16 outputs of a stored weight in tiles of 16 x 32, for AMX.
#pragma once

#include "gemm/formats/scale.h"

namespace dsv4::DSV4_ISA {

// Bytes of 32 inputs of one output.
constexpr int64_t group_bytes(Kind kind) {
    return kind == Kind::fp4 ? 16 : kind == Kind::fp8 ? 32 : kind == Kind::bf16 ? 64 : 128;
}

#if defined(DSV4_ISA_AMX)

// Calls f(std::integral_constant<int, I>) for I in [0, N).
template <int N, class F>
[[gnu::always_inline]] inline void unroll(F&& f) {
    [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
        (f(std::integral_constant<int, I>{}), ...);
    }(std::make_integer_sequence<int, N>{});
}

// Addresses of 16 outputs, by value so that they stay in registers: after every tile instruction (a memory clobber) the
// compiler would reload them through a Weight reference.
template <Kind kind>
struct AmxPanel {
    const uint8_t *codes, *scales;
    int64_t stride, scale_stride, whole_groups;  // whole_groups: number that dequantize_*_tile supports

    AmxPanel(const Weight& w, int64_t n)
        : codes(w.data + n * w.stride), scales(w.scales), stride(w.stride), scale_stride(w.scale_stride) {
        const bool straddles = kind == Kind::fp8 && (w.first + n) % 128 > 128 - LANES;  // two blocks of scales
        whole_groups = n + LANES > w.out || straddles ? 0 : w.in / 32;
        if (kind == Kind::fp4) scales += (w.first + n) * w.scale_stride;
        if (kind == Kind::fp8 && scales) scales += (w.first + n) / 128 * w.scale_stride;
    }
};

// Calls f(row, from + row * stride) for 16 rows, with few address additions.
template <class F>
[[gnu::always_inline]] inline void for_each_tile_row(const uint8_t* from, int64_t stride, F&& f) {
    unroll<4>([&](auto quarter) __attribute__((always_inline)) {
        constexpr int R = decltype(quarter)::value * 4;
        f(std::integral_constant<int, R>{}, from);
        f(std::integral_constant<int, R + 1>{}, from + stride);
        f(std::integral_constant<int, R + 2>{}, from + 2 * stride);
        f(std::integral_constant<int, R + 3>{}, from + 3 * stride);
        from += 4 * stride;
    });
}

#endif

}  // namespace dsv4::DSV4_ISA
