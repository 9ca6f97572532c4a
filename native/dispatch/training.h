// The kernels of training as entries of the function table.
#pragma once

#include "dispatch/training_ops.h"
#include "training/attention_batch.h"
#include "training/compressor_batch.h"
#include "training/cross_entropy.h"
#include "training/hyper_connections_gradient.h"
#include "training/index_loss.h"
#include "training/newton_schulz.h"

namespace dsv4::DSV4_ISA {

inline TrainingOps training_ops() {
    TrainingOps to{};
    to.rms_norm_gradient = rms_norm_gradients;
    to.swiglu_gradient = swiglu_gradients;
    to.route_gradient = [](const float* logits, const int64_t* index, int64_t n, int64_t experts, int64_t k,
                           float scale, const float* d_weights, const float* d_scores, float* d_logits) {
        for_each_row(n, [&](int64_t row) {
            route_gradient(logits + row * experts, index + row * k, experts, k, scale, d_weights + row * k,
                           d_scores ? d_scores + row * experts : nullptr, d_logits + row * experts);
        });
    };
    to.hc_pre_gradient = [](const Config& c, const HyperConnection& site, const float* norm, const float* streams,
                            int64_t n, const float* dx, const float* d_post, const float* d_comb, float* d_streams,
                            float* d_fn, float* d_base, float* d_scale, float* d_norm) {
        const int64_t count = norm ? c.hc_mult * (2 + c.hc_mult) : c.hc_mult;
        stream_read_gradients({site, c, count, norm, streams, dx, d_post, d_comb, d_streams}, n, d_fn, d_base, d_scale,
                              d_norm);
    };
    to.hc_post_gradient = [](const Config& c, const float* g, const float* y, const float* streams, const float* post,
                             const float* comb, int64_t n, float* dy, float* d_streams, float* d_post, float* d_comb) {
        stream_write_gradients({g, y, streams, post, comb, dy, d_streams, d_post, d_comb}, n, c.hc_mult, c.hidden_size);
    };
    to.hc_head = read_out_streams;
    to.compress = [](const CompressionKind& kind, const Sequences& s, const float* kv, const float* score,
                     int64_t total, int64_t width,
                     float* entries) { compress_batch({kind, kv, score, total, width, s}, entries); };
    to.compress_gradient = [](const CompressionKind& kind, const Sequences& s, const float* kv, const float* score,
                              int64_t total, int64_t width, const float* d_entries, float* d_kv, float* d_score) {
        compress_gradient({kind, kv, score, total, width, s}, d_entries, d_kv, d_score);
    };
    to.attend = [](const AttentionSizes& a, const Sequences& s, const float* q, const float* keys, const float* entries,
                   const int32_t* chosen, const float* sink, float* o, float* probs) {
        attend_batch({q, keys, entries, chosen, sink, s, a.kind, a.heads, a.width, a.top_k}, o, probs);
    };
    to.attend_gradient = [](const AttentionSizes& a, const Sequences& s, const float* q, const float* keys,
                            const float* entries, const int32_t* chosen, const float* sink, const float* d_o,
                            float* d_q, float* d_keys, float* d_entries, float* d_sink) {
        attention_gradient({q, keys, entries, chosen, sink, s, a.kind, a.heads, a.width, a.top_k}, d_o, d_q, d_keys,
                           d_entries, d_sink);
    };
    to.index_loss = [](const AttentionSizes& a, const Sequences& s, const float* q, const float* weights,
                       const float* keys, const int32_t* chosen, const float* probs, float* losses, float* d_q,
                       float* d_weights, float* d_keys) {
        index_losses({q, weights, keys, chosen, probs, s, a.heads, a.width, a.top_k}, losses, {d_q, d_weights, d_keys});
    };
    to.cross_entropy = [](const float* x, int64_t n, const Weight& head, const int64_t* targets, float* losses,
                          int64_t* predicted, float* dx, float* d_head,
                          bool pairs) { cross_entropy({x, n, head, targets, losses, predicted, dx, d_head, pairs}); };
    to.has_pairs = HAS_GRADIENT_PAIRS;
#if defined(DSV4_ISA_AVX2) || defined(DSV4_ISA_AVX512)
    to.newton_schulz = newton_schulz_steps<newton_schulz::Floats>;
#endif
#if defined(DSV4_ISA_AVX512_BF16)
    to.newton_schulz_bf16 = newton_schulz_steps<newton_schulz::Bf16Pairs>;
#endif
    return to;
}

}  // namespace dsv4::DSV4_ISA
