// Cross-entropy of a linear head, some rows' logits at a time, with its gradient.
#pragma once

#include <algorithm>
#include <vector>

#include "gemm/gemm_backward.h"
#include "model/ubatch.h"
#include "training/row_gradients.h"

namespace dsv4::DSV4_ISA {

// Rows whose logits are in memory at a time: a block of terms of the weight's gradient, which so has the bits of
// weight_gradients on all rows.
constexpr int64_t LOGIT_ROWS = TERM_BLOCK;

struct CrossEntropyBatch {
    const float* x;  // [n, in]
    int64_t n;
    Weight head;  // [vocab, in]
    const int64_t* targets;
    float* losses;       // [n]
    int64_t* predicted;  // [n]: token of the largest logit, the lower id among equals; the first NaN's if there is one
    float *dx, *d_head;  // gradients of the sum of the losses; null: not computed
    bool pairs;          // factors of the gradients rounded to BF16
};

// Loss of one row; with `differentiate` its logits become their gradients.
inline float row_cross_entropy(float* logits, int64_t vocab, int64_t target, int64_t* predicted, bool differentiate) {
    V top = set1(-INFINITY), total = zero();
    uint32_t unordered = 0;  // NaN, which the maximum may lose
    for (int64_t i = 0; i < vocab; i += LANES) {
        const int left = lanes_left(vocab, i);
        const V x = load_n(logits + i, left);
        unordered |= above(x, set1(INFINITY));
        top = max(top, left == LANES ? x : select((1u << left) - 1u, x, top));
    }
    const float highest_logit = unordered ? NAN : highest(top), own = logits[target];
    const float* likeliest = unordered ? std::find_if(logits, logits + vocab, [](float x) { return std::isnan(x); })
                                       : std::find(logits, logits + vocab, highest_logit);
    *predicted = likeliest - logits;
    for (int64_t i = 0; i < vocab; i += LANES) {
        const int left = lanes_left(vocab, i);
        const V x = exp(sub(load_n(logits + i, left), set1(highest_logit)));
        total = add(total, left == LANES ? x : select((1u << left) - 1u, x, zero()));
        if (differentiate) store_n(logits + i, x, left);
    }
    const float sum_exp = sum(total);
    if (differentiate) {
        const V factor = set1(1.0f / sum_exp);
        for (int64_t i = 0; i < vocab; i += LANES) {
            const int left = lanes_left(vocab, i);
            store_n(logits + i, mul(load_n(logits + i, left), factor), left);
        }
        logits[target] -= 1.0f;
    }
    return std::log(sum_exp) - (own - highest_logit);
}

inline void cross_entropy(const CrossEntropyBatch& in) {
    const int64_t width = in.head.in, vocab = in.head.out;
    const bool differentiate = in.dx || in.d_head;
    if (in.d_head && !in.n) std::fill_n(in.d_head, vocab * width, 0.0f);
    std::vector<float> logits(static_cast<size_t>(std::min(in.n, LOGIT_ROWS) * vocab));
    for (int64_t first = 0; first < in.n; first += LOGIT_ROWS) {
        const int64_t count = std::min(LOGIT_ROWS, in.n - first);
        auto* x = const_cast<float*>(in.x) + first * width;
        const Product product{{x, width}, &in.head, {logits.data(), vocab}};
        products(&product, 1, count);
        for_each_row(count, [&](int64_t row) {
            in.losses[first + row] = row_cross_entropy(logits.data() + row * vocab, vocab, in.targets[first + row],
                                                       in.predicted + first + row, differentiate);
        });
        if (in.dx) sums({{logits.data(), count, vocab, 1, in.head, {in.dx + first * width, width}, false, in.pairs}});
        if (!in.d_head) continue;
        Weight rows;
        rows.data = reinterpret_cast<const uint8_t*>(x);
        rows.out = count;
        rows.in = width;
        rows.stride = width * static_cast<int64_t>(sizeof(float));
        sums({{logits.data(), vocab, 1, vocab, rows, {in.d_head, width}, first > 0, in.pairs}});
    }
}

}  // namespace dsv4::DSV4_ISA
