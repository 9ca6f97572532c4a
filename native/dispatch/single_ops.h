// Operations of the forward one by one, with its code, on tokens of one sequence: the native rung of dsv4/kernels.
#pragma once

#include <numeric>

#include "model/forward.h"

namespace dsv4::DSV4_ISA {

// A ubatch of tokens [start, start + n) of slot 0, whose pages are contiguous. Nothing is rotated.
struct SingleUbatch {
    Model model;
    std::vector<int64_t> pages;
    Cache cache;
    Ubatch ubatch{model, cache, 0, {}, {}, {}, {}, {}, {}, {}};

    SingleUbatch(const Config& config, int64_t start, int64_t n)
        : pages(static_cast<size_t>((start + n) / PAGE_TOKENS + 1)) {
        model.config = config;
        model.config.qk_rope_head_dim = 0;
        std::iota(pages.begin(), pages.end(), 0);
        cache.block_table = pages.data();
        cache.pages_per_slot = static_cast<int64_t>(pages.size());
        ubatch.n = n;
        ubatch.segments.push_back({0, n, start, 0});
        for (int64_t i = 0; i < n; ++i) ubatch.positions.push_back(start + i);
    }
    SingleUbatch(const SingleUbatch&) = delete;
    SingleUbatch& operator=(const SingleUbatch&) = delete;
};

inline void single_hc_pre(const Config& c, const HyperConnection& site, const float* norm, const float* streams,
                          int64_t n, float* weights, float* x) {
    SingleUbatch one(c, 0, n);
    hc_pre(one.ubatch, site, norm, streams, weights, x);
}

inline void single_hc_post(const Config& c, const float* y, const float* weights, int64_t n, float* streams) {
    SingleUbatch one(c, 0, n);
    hc_post(one.ubatch, y, weights, streams);
}

inline void single_route(const Config& c, const Layer& layer, const float* logits, const int64_t* token_ids, int64_t n,
                         int64_t* index, float* weights) {
    const int64_t experts = c.n_routed_experts, k = c.num_experts_per_tok;
    for_each_row(n, [&](int64_t row) {
        std::vector<float> work;
        std::vector<int32_t> chosen(static_cast<size_t>(k));
        route(logits + row * experts, layer, c, token_ids[row], work, chosen.data(), weights + row * k);
        std::copy(chosen.begin(), chosen.end(), index + row * k);
    });
}

inline void single_compress(const Compressor& w, const CompressorCache& state, const float* kv, float* score,
                            int64_t start, int64_t n) {
    SingleUbatch one(Config{}, start, n);
    add_ape(one.ubatch, w, score);
    compress(w, one.ubatch.segments[0], one.cache, state, kv, score, [](float*, int64_t) {});
}

inline void single_attend(const Config& c, const Layer& layer, const LayerCache& cache, float* q, const float* kv,
                          const int32_t* chosen, int64_t start, int64_t n, float* o) {
    SingleUbatch one(c, start, n);
    attend_ubatch(one.ubatch, layer, cache, q, kv, chosen, o);
}

inline void single_swiglu(float* gate, const float* up, int64_t n, int64_t width, float limit, const float* weight) {
    for_each_row(n, [&](int64_t row) { swiglu(gate + row * width, up + row * width, width, limit, weight[row]); });
}

inline void single_rotation(const std::vector<float>& inv_freq, const int64_t* positions, int64_t n, float* cos,
                            float* sin) {
    const auto pairs = static_cast<int64_t>(inv_freq.size());
    for_each_row(n, [&](int64_t row) { rotation(inv_freq, positions[row], cos + row * pairs, sin + row * pairs); });
}

inline void single_rotate(float* x, int64_t n, int64_t width, const float* cos, const float* sin, int64_t pairs) {
    for_each_row(
        n, [&](int64_t row) { rotate(x + row * width, width, cos + row * pairs, sin + row * pairs, pairs, 1.0f); });
}

}  // namespace dsv4::DSV4_ISA
