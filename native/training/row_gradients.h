// Gradients of operations on one row: norm, SwiGLU, router, compression.
#pragma once

#include <algorithm>
#include <vector>

#include "base/row_sums.h"
#include "base/rows.h"
#include "model/ubatch.h"

namespace dsv4::DSV4_ISA {

inline int lanes_left(int64_t n, int64_t i) { return static_cast<int>(std::min<int64_t>(LANES, n - i)); }

inline void add_to(float* to, V x, int lanes) { store_n(to, add(load_n(to, lanes), x), lanes); }

// dx of a row of rms_norm; adds the row's share to d_weight. weight and d_weight may be null.
inline void rms_norm_gradient(const float* x, const float* weight, const float* dy, int64_t n, float eps, float* dx,
                              float* d_weight) {
    const float inverse = 1.0f / std::sqrt(dot(x, x, n) / static_cast<float>(n) + eps);
    auto pull_at = [&](int64_t i, int left) {
        V g = load_n(dy + i, left);
        return weight ? mul(g, load_n(weight + i, left)) : g;
    };
    V along = zero();
    for (int64_t i = 0; i < n; i += LANES) {
        const int left = lanes_left(n, i);
        along = fma(pull_at(i, left), load_n(x + i, left), along);
    }
    // y = x * inverse * weight, and d inverse / dx = -inverse^3 / n * x.
    const V factor = set1(inverse), back = set1(-inverse * inverse * inverse / static_cast<float>(n) * sum(along));
    for (int64_t i = 0; i < n; i += LANES) {
        const int left = lanes_left(n, i);
        const V value = load_n(x + i, left), pull = pull_at(i, left);
        if (d_weight) add_to(d_weight + i, mul(load_n(dy + i, left), mul(value, factor)), left);
        store_n(dx + i, fma(value, back, mul(pull, factor)), left);
    }
}

inline void rms_norm_gradients(const float* x, const float* weight, const float* dy, int64_t n, int64_t width,
                               float eps, float* dx, float* d_weight) {
    auto run = [&](int64_t first, int64_t last, float* partial) {
        for (int64_t row = first; row < last; ++row)
            rms_norm_gradient(x + row * width, weight, dy + row * width, width, eps, dx + row * width, partial);
    };
    if (d_weight) return sum_rows(n, width, d_weight, run);
    for_each_rows(n, [&](int64_t first, int64_t last) { run(first, last, nullptr); });
}

// Gradients of a row of swiglu: of gate and up, none where they were clamped, and of the row's weight, returned.
inline float swiglu_gradient(const float* gate, const float* up, int64_t n, float limit, float weight, const float* dy,
                             float* d_gate, float* d_up) {
    V d_weight = zero();
    for (int64_t i = 0; i < n; i += LANES) {
        const int left = lanes_left(n, i);
        const V raw_gate = load_n(gate + i, left), raw_up = load_n(up + i, left), top = set1(limit);
        const V g = min(top, raw_gate), u = max(set1(-limit), min(top, raw_up)), pull = load_n(dy + i, left);
        const V open = sigmoid(g), silu = mul(open, g), slope = fma(silu, sub(set1(1.0f), open), open);
        d_weight = fma(pull, mul(silu, u), d_weight);
        const V scaled = mul(pull, set1(weight));
        const uint32_t clamped_up = greater(raw_up, top) | greater(sub(zero(), raw_up), top);
        store_n(d_gate + i, select(greater(raw_gate, top), zero(), mul(mul(scaled, u), slope)), left);
        store_n(d_up + i, select(clamped_up, zero(), mul(scaled, silu)), left);
    }
    return sum(d_weight);
}

inline void swiglu_gradients(const float* gate, const float* up, int64_t n, int64_t width, float limit,
                             const float* weight, const float* dy, float* d_gate, float* d_up, float* d_weight) {
    for_each_row(n, [&](int64_t row) {
        const int64_t at = row * width;
        d_weight[row] = swiglu_gradient(gate + at, up + at, width, limit, weight[row], dy + at, d_gate + at, d_up + at);
    });
}

// d_logits [experts] of a token's router, from the gradients of its k weights and, unless null, of all scores.
inline void route_gradient(const float* logits, const int64_t* index, int64_t experts, int64_t k, float scale,
                           const float* d_weights, const float* d_scores, float* d_logits) {
    auto score = [&](int64_t e) {
        return std::sqrt(std::max(logits[e], 0.0f) + std::log1p(std::exp(-std::fabs(logits[e]))));
    };
    // An expert that stands twice in a row of the hash table has weight 0 from the second time on.
    auto pull = [&](int64_t i) { return std::find(index, index + i, index[i]) != index + i ? 0.0f : d_weights[i]; };
    for (int64_t e = 0; e < experts; ++e) d_logits[e] = d_scores ? d_scores[e] : 0.0f;
    float total = 0.0f, along = 0.0f;
    for (int64_t i = 0; i < k; ++i) total += score(index[i]);
    total += 1e-20f;
    for (int64_t i = 0; i < k; ++i) along += pull(i) * (score(index[i]) / total);
    for (int64_t i = 0; i < k; ++i) d_logits[index[i]] += scale * (pull(i) - along) / total;
    for (int64_t e = 0; e < experts; ++e) {
        // d score = sigmoid / (2 score); where e^-logit overflows, sigmoid is score^2 to rounding.
        const float s = score(e), inverse = std::exp(-logits[e]);
        d_logits[e] *= inverse == INFINITY ? 0.5f * s : 0.5f / (s * (1.0f + inverse));
    }
}

// Gradients of pool: each slot's kv and score, from the entry's gradient dy [width]. Null slots are skipped.
inline void pool_gradient(const float* const* kv, const float* const* score, int64_t slots, int64_t width,
                          const float* dy, float* const* d_kv, float* const* d_score) {
    for (int64_t i = 0; i < width; i += LANES) {
        const int left = lanes_left(width, i);
        V top = set1(-INFINITY), total = zero(), acc = zero();
        for (int64_t k = 0; k < slots; ++k)
            if (score[k]) top = max(top, load_n(score[k] + i, left));
        for (int64_t k = 0; k < slots; ++k) {
            if (!score[k]) continue;
            const V weight = exp(sub(load_n(score[k] + i, left), top));
            total = add(total, weight);
            acc = fma(weight, load_n(kv[k] + i, left), acc);
        }
        const V entry = div(acc, total), pull = div(load_n(dy + i, left), total);
        for (int64_t k = 0; k < slots; ++k) {
            if (!score[k]) continue;
            const V own = mul(exp(sub(load_n(score[k] + i, left), top)), pull);
            store_n(d_kv[k] + i, own, left);
            store_n(d_score[k] + i, mul(own, sub(load_n(kv[k] + i, left), entry)), left);
        }
    }
}

}  // namespace dsv4::DSV4_ISA
