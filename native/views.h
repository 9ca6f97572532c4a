// What the kernels see of a model, its cache and a batch: pointers into tensors that Python owns. Official names.
#pragma once

#include <cstdint>
#include <vector>

namespace dsv4 {

struct Rows {
    float* data;
    int64_t stride;
};

// A linear map [out, in], strides in elements. Outputs side by side (out_stride 1) is the layout that streams.
struct Weight {
    const float* data = nullptr;
    int64_t out = 0, in = 0, out_stride = 0, in_stride = 0;
};

struct Config {
    int64_t hidden_size, vocab_size, num_hidden_layers, hc_mult, hc_sinkhorn_iters;
    int64_t num_attention_heads, head_dim, qk_rope_head_dim, q_lora_rank, o_groups, o_lora_rank;
    int64_t index_n_heads, index_head_dim, index_topk;
    int64_t n_routed_experts, num_experts_per_tok, moe_intermediate_size;
    double rms_norm_eps, hc_eps, routed_scaling_factor, swiglu_limit;
    bool quantize;  // numerics "shipped"
};

struct HyperConnection {
    const float *fn = nullptr, *base = nullptr, *scale = nullptr;  // [mixes, s * d], [mixes], [3] or [1]
};

struct Compressor {
    Weight wkv, wgate;
    const float *ape = nullptr, *norm = nullptr;
    int64_t ratio = 0, width = 0, total = 0;  // total: 2 * width with overlap

    bool overlap() const { return ratio == 4; }
    int64_t rows() const { return overlap() ? 2 * ratio : ratio; }
};

struct Expert {
    Weight w1, w2, w3;
};

struct Layer {
    int64_t ratio = 0;
    HyperConnection hc_attn, hc_ffn;
    const float *attn_norm = nullptr, *ffn_norm = nullptr;
    const float *attn_sink = nullptr, *q_norm = nullptr, *kv_norm = nullptr;
    Weight wq_a, wq_b, wkv, wo_a, wo_b;
    Compressor main, index;
    Weight index_wq_b, index_weights_proj;
    Weight gate;
    const float* bias = nullptr;
    const int64_t* tid2eid = nullptr;
    std::vector<Expert> experts;
    Expert shared;
};

struct Model {
    Config config{};
    const float* embed = nullptr;
    std::vector<Layer> layers;  // the MTP blocks behind the main ones
    std::vector<float> inv_freq[2];  // of window-only layers, of compressed layers
};

struct CompressorCache {
    float *kv = nullptr, *score = nullptr, *entries = nullptr;
};

struct LayerCache {
    float* window = nullptr;  // [slots, 128, head_dim], a ring: slot = position mod 128
    CompressorCache main, index;
};

struct Cache {
    std::vector<LayerCache> layers;
    const int64_t* block_table = nullptr;  // [slots, pages a slot]
    int64_t pages_per_slot = 0;
};

// Tokens of n sequences laid end to end; sequence i continues cache row slots[i] at position starts[i].
struct Batch {
    const int64_t *token_ids, *lengths, *starts, *slots;
    int64_t sequences;
};

}  // namespace dsv4
