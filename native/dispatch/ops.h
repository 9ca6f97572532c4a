// Function table of one instruction set's kernels, called by python/.
#pragma once

#include "base/views.h"
#include "dispatch/training_ops.h"

namespace dsv4 {

struct Ops {
    void (*forward)(const Model&, const Cache&, const Batch&, int64_t first, int64_t last, bool embed, float* streams,
                    const ChoiceNotes&);
    void (*fuse_mtp_input)(const Model&, int64_t depth, const int64_t* next_token_ids, int64_t n, float* streams);
    // Read-out of streams [n, s, d]: hc_head, norm, head -> logits [n, vocab].
    void (*head)(const Model&, const Readout&, const float* streams, int64_t n, float* logits);
    void (*linear)(const Rows& x, int64_t n, const Weight&, const Rows& y);
    // Each group's rows times its weight; then the gradients, where y holds dy: dx into x, dW into `gradients`.
    void (*grouped_linear)(const Group*, int64_t count);
    // pairs: factors rounded to BF16, where the instruction set has it (TrainingOps::has_pairs).
    void (*input_gradients)(const Group*, int64_t count, bool pairs);
    void (*weight_gradients)(const Group*, int64_t count, float* const* gradients, bool pairs);
    void (*rms_norm)(const float* x, const float* weight, int64_t n, int64_t width, float eps, float* y);
    void (*sinkhorn)(float* c, int64_t n, int64_t s, int64_t iters, float eps);
    void (*exp)(const float* x, int64_t n, float* y);
    // floor: least amax of a block in FP8.
    void (*fake_quant)(float* x, int64_t n, int64_t width, int64_t block, bool fp4, float floor);
    // Factors of products as BF16 numbers: in fp32, in 16 bits.
    void (*round_factors)(const Rows& x, int64_t n, int64_t width, float* y);
    void (*pack_factors)(const Rows& x, int64_t n, int64_t width, uint16_t* y);
    void (*hadamard)(float* x, int64_t n, int64_t width);
    void (*top_k)(const float* scores, int64_t n, int64_t width, int64_t k, int64_t* index);
    // Indices of the k best of the (start + t + 1) / 4 entries that token t sees; -1 for tokens that see k or fewer.
    // index_keys [., width].
    void (*index_top_k)(const float* q, const float* weights, int64_t tokens, int64_t heads, int64_t width,
                        const float* index_keys, int64_t start, int64_t k, int64_t* index);
    // allowed: a bit per token, null for all. -1 if none may be drawn.
    int64_t (*sample)(const float* logits, int64_t vocab, const uint32_t* allowed, const Sampling&, uint64_t key);
    // Single operations of the forward; see single_ops.h.
    void (*hc_pre)(const Config&, const HyperConnection&, const float* norm, const float* streams, int64_t n,
                   float* weights, float* x);
    void (*hc_post)(const Config&, const float* y, const float* weights, int64_t n, float* streams);
    void (*route)(const Config&, const Layer&, const float* logits, const int64_t* token_ids, int64_t n, int64_t* index,
                  float* weights);
    void (*compress)(const Compressor&, const CompressorCache&, const float* kv, float* score, int64_t start,
                     int64_t n);
    void (*attend)(const Config&, const Layer&, const LayerCache&, float* q, const float* kv, const int32_t* chosen,
                   int64_t start, int64_t n, float* o);
    void (*swiglu)(float* gate, const float* up, int64_t n, int64_t width, float limit, const float* weight);
    void (*rotation)(const std::vector<float>& inv_freq, const int64_t* positions, int64_t n, float* cos, float* sin);
    void (*rotate)(float* x, int64_t n, int64_t width, const float* cos, const float* sin, int64_t pairs);
    TrainingOps training;
};

const Ops& portable_ops();
const Ops& avx2_ops();
const Ops& avx512_ops();
const Ops& avx512_vnni_ops();
const Ops& avx512_bf16_ops();
const Ops& amx_ops();

bool bf16_pairs_are_faster();  // than fp32, on a processor with AVX-512 BF16

}  // namespace dsv4
