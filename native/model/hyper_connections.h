// mHC: the maps between the residual streams and a sub-layer, per token. Names as in dsv4/model/hyper_connections.py.
#pragma once

#include <vector>

#include "base/rows.h"

namespace dsv4::DSV4_ISA {

// Sinkhorn on c [s, s], in place: softmax over the second index, + eps, a column step, then iters - 1 times a row step
// and a column step.
inline void sinkhorn(float* c, int64_t s, int64_t iters, float eps) {
    for (int64_t i = 0; i < s; ++i) {
        float top = c[i * s], total = 0.0f;
        for (int64_t j = 1; j < s; ++j) top = std::max(top, c[i * s + j]);
        for (int64_t j = 0; j < s; ++j) c[i * s + j] = exp1(c[i * s + j] - top);
        total = c[i * s];
        for (int64_t j = 1; j < s; ++j) total += c[i * s + j];
        for (int64_t j = 0; j < s; ++j) c[i * s + j] = c[i * s + j] / total + eps;
    }
    float total[64];
    for (int64_t step = 0; step < 2 * iters - 1; ++step) {
        bool columns = step % 2 == 0;
        for (int64_t a = 0; a < s; ++a) {
            float sum = columns ? c[a] : c[a * s];
            for (int64_t b = 1; b < s; ++b) sum += columns ? c[b * s + a] : c[a * s + b];
            total[a] = sum + eps;
        }
        for (int64_t i = 0; i < s; ++i)
            for (int64_t j = 0; j < s; ++j) c[i * s + j] /= total[columns ? j : i];
    }
}

// sinkhorn for four streams, the official number, in registers.
inline void sinkhorn4(float* c, int64_t iters, float eps) {
    typedef float Row __attribute__((vector_size(16)));
    Row r[4];
    for (int i = 0; i < 4; ++i) {
        float* row = c + 4 * i;
        float top = std::max(std::max(row[0], row[1]), std::max(row[2], row[3]));
        for (int j = 0; j < 4; ++j) row[j] = exp1(row[j] - top);
        float total = row[0] + row[1] + row[2] + row[3];
        for (int j = 0; j < 4; ++j) r[i][j] = row[j] / total + eps;
    }
    for (int64_t step = 0; step < 2 * iters - 1; ++step) {
        if (step % 2 == 0) {
            Row total = r[0] + r[1] + r[2] + r[3] + eps;
            for (auto& row : r) row /= total;
        } else {
            Row a = {r[0][0], r[1][0], r[2][0], r[3][0]}, b = {r[0][1], r[1][1], r[2][1], r[3][1]};
            Row d = {r[0][2], r[1][2], r[2][2], r[3][2]}, e = {r[0][3], r[1][3], r[2][3], r[3][3]};
            Row total = a + b + d + e + eps;
            for (int i = 0; i < 4; ++i) r[i] /= total[i];
        }
    }
    std::memcpy(c, r, sizeof r);
}

// raw[j] = (fn_j . X) * rsqrt(mean(X^2) + eps), X the n values of a token's streams, for R adjacent tokens.
template <int R>
inline void mixes(const float* streams, const float* fn, int64_t count, int64_t n, float eps, float* raw) {
    const float* row[R];
    float inverse[R], found[R];
    for (int r = 0; r < R; ++r) {
        row[r] = streams + r * n;
        inverse[r] = 1.0f / std::sqrt(dot(row[r], row[r], n) / static_cast<float>(n) + eps);
    }
    for (int64_t j = 0; j < count; ++j) {
        dot_f32_rows<R>(row, fn + j * n, n, found);
        for (int r = 0; r < R; ++r) raw[r * count + j] = found[r] * inverse[r];
    }
}

inline float sigmoid1(float x) { return 1.0f / (1.0f + exp1(-x)); }

// to = sum_j weights_j * stream_j.
inline void collect(const float* weights, const float* streams, int64_t s, int64_t d, float* to) {
    for (int64_t i = 0; i < d; i += LANES) {
        int left = static_cast<int>(std::min<int64_t>(LANES, d - i));
        V acc = zero();
        for (int64_t j = 0; j < s; ++j) acc = fma(set1(weights[j]), load_n(streams + j * d + i, left), acc);
        store_n(to + i, acc, left);
    }
}

// Read-out of a token's streams [s, d] to x [d], not normed.
inline void read_out_token(const Config& c, const HyperConnection& site, const float* streams, float* x) {
    const int64_t s = c.hc_mult, d = c.hidden_size;
    float pre[MOST_STREAMS];
    mixes<1>(streams, site.fn, s, s * d, static_cast<float>(c.rms_norm_eps), pre);
    for (int64_t j = 0; j < s; ++j)
        pre[j] = sigmoid1(pre[j] * site.scale[0] + site.base[j]) + static_cast<float>(c.hc_eps);
    collect(pre, streams, s, d, x);
}

// Turns the s * (2 + s) mixes of a site into pre [s], post [s] and comb [s, s], in place.
inline void hc_weights(float* mix, const HyperConnection& site, const Config& c) {
    int64_t s = c.hc_mult;
    for (int64_t i = 0; i < s * (2 + s); ++i) mix[i] = mix[i] * site.scale[std::min<int64_t>(i / s, 2)] + site.base[i];
    for (int64_t i = 0; i < s; ++i) {
        mix[i] = sigmoid1(mix[i]) + static_cast<float>(c.hc_eps);
        mix[s + i] = 2.0f * sigmoid1(mix[s + i]);
    }
    float eps = static_cast<float>(c.hc_eps);
    if (s == 4)
        sinkhorn4(mix + 2 * s, c.hc_sinkhorn_iters, eps);
    else
        sinkhorn(mix + 2 * s, s, c.hc_sinkhorn_iters, eps);
}

// stream_k = post_k * y + sum_j comb_jk * stream_j, in place.
inline void distribute(const float* y, float* streams, const float* post, const float* comb, int64_t s, int64_t d) {
    V old[16];
    for (int64_t i = 0; i < d; i += LANES) {
        int left = static_cast<int>(std::min<int64_t>(LANES, d - i));
        V output = load_n(y + i, left);
        for (int64_t j = 0; j < s; ++j) old[j] = load_n(streams + j * d + i, left);
        for (int64_t k = 0; k < s; ++k) {
            V acc = mul(set1(post[k]), output);
            for (int64_t j = 0; j < s; ++j) acc = fma(set1(comb[j * s + k]), old[j], acc);
            store_n(streams + k * d + i, acc, left);
        }
    }
}

}  // namespace dsv4::DSV4_ISA
