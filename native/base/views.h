// Views of a model, its cache and a batch: pointers into tensors that Python owns. Names are the checkpoint's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "base/index_key_cache.h"

namespace dsv4 {

constexpr int64_t WINDOW = 128;       // tokens of the sliding window
constexpr int64_t PAGE_TOKENS = 128;  // tokens per cache page: whole windows of every compression ratio
constexpr int64_t MOST_STREAMS = 16;
constexpr int64_t MOST_POSITIONS = int64_t{1} << 40;

// Compression of the context in layers of one ratio; ratio 0: window only. See CompressionKind in dsv4/config.py.
struct CompressionKind {
    int64_t ratio = 0;         // tokens per entry
    bool overlap = false;      // an entry also covers the tokens of the window before
    bool has_indexer = false;  // a token reads only the entries that the indexer selects

    int64_t state_tokens() const { return overlap ? 2 * ratio : ratio; }
    int64_t channels(int64_t width) const { return overlap ? 2 * width : width; }  // per token, for entries of `width`
};

constexpr CompressionKind CSA{4, true, true}, HCA{128, false, false};
inline constexpr CompressionKind COMPRESSION_KINDS[] = {{}, CSA, HCA};

// The kind of a ratio; null for a ratio that no layer has.
inline const CompressionKind* compression_kind(int64_t ratio) {
    for (const CompressionKind& kind : COMPRESSION_KINDS)
        if (kind.ratio == ratio) return &kind;
    return nullptr;
}

// Sequences of `lengths` tokens from positions `starts` on, laid end to end; as in training/. What is read of earlier
// tokens, keys and projections, lies before the sequence's own rows: that of the last `most`, or of all if they are fewer.
struct Sequences {
    const int64_t *lengths, *starts;
    int64_t count;

    int64_t end(int64_t s) const { return starts[s] + lengths[s]; }
    int64_t earlier(int64_t s, int64_t most) const { return std::min(starts[s], most); }
};

struct Rows {
    float* data;
    int64_t stride;
};

enum class Kind { f32, bf16, fp8, fp4 };

// A weight [out, in] as stored, rows `stride` bytes apart. FP8 has one scale per 128 x 128 block, FP4 one per 32 inputs
// of an output (two codes per byte, the even input in the low half): E8M0 bytes, or floats where `float_scales` is set.
struct Weight {
    const uint8_t* data = nullptr;
    Kind kind = Kind::f32;
    int64_t out = 0, in = 0, stride = 0;
    const uint8_t* scales = nullptr;
    const float* float_scales = nullptr;
    int64_t scale_stride = 0;
    int64_t first = 0;  // row of output 0 in the whole tensor, which the scales belong to

    // View of outputs [n0, n0 + count).
    Weight rows(int64_t n0, int64_t count) const {
        Weight part = *this;
        part.data += n0 * stride;
        part.first += n0;
        part.out = count;
        return part;
    }
};

// A group of rows with one weight: y = x W^T.
struct Group {
    Rows x;
    int64_t rows;
    Weight w;
    Rows y;
};

struct Config {
    int64_t hidden_size, vocab_size, num_hidden_layers, hc_mult, hc_sinkhorn_iters;
    int64_t num_attention_heads, head_dim, qk_rope_head_dim, q_lora_rank, o_groups, o_lora_rank;
    int64_t index_n_heads, index_head_dim, index_topk;
    int64_t n_routed_experts, n_shared_experts, num_experts_per_tok, moe_intermediate_size;
    double rms_norm_eps, hc_eps, routed_scaling_factor, swiglu_limit;
    bool quantize;  // numerics "shipped"
    bool bf16;      // numerics "bf16": inputs of the layers' and experts' products are rounded to BF16
};

struct HyperConnection {
    const float *fn = nullptr, *base = nullptr, *scale = nullptr;  // [mixes, s * d], [mixes], [3] or [1]
};

struct Compressor {
    Weight wkv, wgate;
    const float *ape = nullptr, *norm = nullptr;
    CompressionKind kind;
    int64_t width = 0, total = 0;  // channels per entry, per token
};

struct Expert {
    Weight w1, w2, w3;
};

struct Layer {
    CompressionKind kind;
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
    int64_t* load = nullptr;  // [experts]: tokens that each has computed, read while they grow; null: not counted
};

// The read-out of the streams, before the head.
struct Readout {
    HyperConnection site;
    const float* norm = nullptr;
};

// Projections of an MTP block's inputs: the next token's embedding and the streams, both normed.
struct MtpInput {
    const float *enorm = nullptr, *hnorm = nullptr;
    Weight e_proj, h_proj;
};

class ExpertResidency;

struct Model {
    Config config{};
    Weight embed, head;
    std::vector<Layer> layers;             // main layers, then the MTP blocks
    std::vector<MtpInput> mtp;             // of each MTP block
    std::vector<float> inv_freq[2];        // 0 for window-only layers, 1 for compressed ones
    ExpertResidency* residency = nullptr;  // of the routed experts; null: nothing limits their memory
};

enum class RowKind { f32, bf16, fp8, fp4 };

// Format of a cache's rows; dsv4/cache/formats.py has the definition.
struct RowFormat {
    RowKind kind = RowKind::f32;
    int64_t width = 0;   // channels
    int64_t rotary = 0;  // fp8: the last channels, which are BF16
    int64_t bytes = 0;   // per row

    int64_t plain() const { return width - rotary; }  // fp8: channels in codes
};

// Rows of a cache, which Python owns.
struct StoredRows {
    uint8_t* data = nullptr;
    RowFormat format;

    uint8_t* row(int64_t i) const { return data + i * format.bytes; }
};

// Rows of fp32 channels.
inline StoredRows float_rows(const float* data, int64_t width) {
    auto* bytes = const_cast<uint8_t*>(reinterpret_cast<const uint8_t*>(data));
    return {bytes, {RowKind::f32, width, 0, width * static_cast<int64_t>(sizeof(float))}};
}

struct CompressorCache {
    float *kv = nullptr, *score = nullptr;
    StoredRows entries;
    IndexKeyCache* quantized = nullptr;  // of the indexer's entries; null for attention's, and for FP4 ones
};

struct LayerCache {
    StoredRows window;  // [slots, WINDOW], a ring: slot = position mod WINDOW
    CompressorCache main, index;
};

struct Cache {
    std::vector<LayerCache> layers;
    const int64_t* block_table = nullptr;  // [slots, pages per slot]: pages in any order, shared or not; -1: none
    int64_t pages_per_slot = 0;
    const int64_t* stored = nullptr;  // [slots]: first tokens whose entries are there and are not written; null: none
};

// A ragged batch: the tokens of all sequences, concatenated. Sequence i continues slot slots[i] at position starts[i].
struct Batch {
    const int64_t *token_ids, *lengths, *starts, *slots;
    int64_t sequences;
};

// Where a forward of the main layers notes what they choose for each token; null: nowhere. A token's rows are one behind
// the other, layer by layer. Rows of tokens that read all their entries stay as they are.
struct ChoiceNotes {
    int16_t* experts = nullptr;                      // [T, score-routed layers, num_experts_per_tok]
    int32_t* entries = nullptr;                      // [T, layers with an indexer, index_topk]
    int64_t experts_stride = 0, entries_stride = 0;  // numbers per token

    ChoiceNotes from_token(int64_t t) const {
        return {experts ? experts + t * experts_stride : nullptr, entries ? entries + t * entries_stride : nullptr,
                experts_stride, entries_stride};
    }
};

// Sampling parameters. Kept tokens: the top_k likeliest (0: all), of those the shortest prefix, likeliest first, whose
// share reaches top_p, of those the ones at least min_p times as likely as the likeliest. Temperature 0: the likeliest.
struct Sampling {
    double temperature;
    int64_t top_k;
    double top_p, min_p;
};

// Coefficients of X <- a X + (b G + c G G) X, G = X X^T.
struct NewtonSchulzStep {
    float a, b, c;
};

}  // namespace dsv4
