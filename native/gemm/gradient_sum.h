// What gradients of products are: sums over terms, in blocks (gemm_backward.h).
#pragma once

#include "gemm/weights.h"

namespace dsv4::DSV4_ISA {

constexpr int64_t TERM_BLOCK = 256;
constexpr int64_t SUM_COLUMNS = 256;  // columns packed at a time: TERM_BLOCK terms of them fit the second-level cache

// y[i][j] = sum over t of a[i * item + t * term] * b[t][j]; the terms t are b's outputs, the columns j its inputs. With
// `more` the sum is added to y, as further blocks of terms.
struct Sum {
    const float* a;
    int64_t items, item, term;
    Weight b;
    Rows y;
    bool more = false, pairs = false;  // pairs: factors rounded to BF16, where HAS_GRADIENT_PAIRS
};

// Columns [j0, j1) of term t of b, where they lie or dequantized into values.
inline const float* read_term(const Weight& b, int64_t t, int64_t j0, int64_t j1, float* values) {
    if (b.kind == Kind::f32) return reinterpret_cast<const float*>(b.data + t * b.stride) + j0;
    dequantize_row(b, t, j0, j1, values);
    return values;
}

}  // namespace dsv4::DSV4_ISA
