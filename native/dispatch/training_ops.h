// Function table of one instruction set's kernels for training: gradients, and forwards over whole sequences.
#pragma once

#include "base/views.h"

namespace dsv4 {

struct AttentionSizes {
    CompressionKind kind;
    int64_t heads, width, top_k;
};

struct TrainingOps {
    void (*rms_norm_gradient)(const float* x, const float* weight, const float* dy, int64_t n, int64_t width, float eps,
                              float* dx, float* d_weight);
    void (*swiglu_gradient)(const float* gate, const float* up, int64_t n, int64_t width, float limit,
                            const float* weight, const float* dy, float* d_gate, float* d_up, float* d_weight);
    void (*route_gradient)(const float* logits, const int64_t* index, int64_t n, int64_t experts, int64_t k,
                           float scale, const float* d_weights, const float* d_scores, float* d_logits);
    // norm null: the read-out, without post and comb.
    void (*hc_pre_gradient)(const Config&, const HyperConnection&, const float* norm, const float* streams, int64_t n,
                            const float* dx, const float* d_post, const float* d_comb, float* d_streams, float* d_fn,
                            float* d_base, float* d_scale, float* d_norm);
    void (*hc_post_gradient)(const Config&, const float* g, const float* y, const float* streams, const float* post,
                             const float* comb, int64_t n, float* dy, float* d_streams, float* d_post, float* d_comb);
    void (*hc_head)(const Config&, const HyperConnection&, const float* streams, int64_t n, float* x);
    void (*compress)(const CompressionKind&, const Sequences&, const float* kv, const float* score, int64_t total,
                     int64_t width, float* entries);
    void (*compress_gradient)(const CompressionKind&, const Sequences&, const float* kv, const float* score,
                              int64_t total, int64_t width, const float* d_entries, float* d_kv, float* d_score);
    void (*attend)(const AttentionSizes&, const Sequences&, const float* q, const float* keys, const float* entries,
                   const int32_t* chosen, const float* sink, float* o, float* probs);
    void (*attend_gradient)(const AttentionSizes&, const Sequences&, const float* q, const float* keys,
                            const float* entries, const int32_t* chosen, const float* sink, const float* d_o,
                            float* d_q, float* d_keys, float* d_entries, float* d_sink);
    // d_q null: losses alone.
    void (*index_loss)(const AttentionSizes&, const Sequences&, const float* q, const float* weights, const float* keys,
                       const int32_t* chosen, const float* probs, float* losses, float* d_q, float* d_weights,
                       float* d_keys);
    // dx and d_head: null where not wanted.
    void (*cross_entropy)(const float* x, int64_t n, const Weight& head, const int64_t* targets, float* losses,
                          int64_t* predicted, float* dx, float* d_head, bool pairs);
    bool has_pairs;  // false: gradients are fp32 even if asked for in BF16 pairs
    // Matrices x [count, n, m], in place; null where the instruction set has no kernel for their numbers.
    void (*newton_schulz)(float* x, int64_t count, int64_t n, int64_t m, const NewtonSchulzStep* steps,
                          int64_t num_steps);
    void (*newton_schulz_bf16)(uint16_t* x, int64_t count, int64_t n, int64_t m, const NewtonSchulzStep* steps,
                               int64_t num_steps);
};

}  // namespace dsv4
