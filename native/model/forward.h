// Runs the model's layers over a ragged batch and appends to the cache: ubatch by ubatch, each through all layers.
#pragma once

#include <algorithm>
#include <vector>

#include "model/attention.h"
#include "model/experts.h"
#include "model/hyper_connections.h"
#include "model/indexer.h"

namespace dsv4::DSV4_ISA {

// Reads the streams into the normed input x [n, d] of a sub-layer; weights [n, s * (2 + s)] get the site's pre, post
// and comb.
inline void hc_pre(Ubatch& u, const HyperConnection& site, const float* norm, const float* streams, float* weights,
                   float* x) {
    const Config& c = u.model.config;
    int64_t s = c.hc_mult, d = c.hidden_size, count = s * (2 + s);
    float eps = static_cast<float>(c.rms_norm_eps);
    if (u.n == 1) {  // a decode step: the threads share the mixes
        float squares = 0.0f;
        int64_t threads = thread_count();  // read once: another Python thread may change it
        parallel(threads, [&](int64_t task, int) {
            int64_t first = count * task / threads, last = count * (task + 1) / threads;
            if (task == 0) squares = dot(streams, streams, s * d);
            for (int64_t j = first; j < last; ++j) weights[j] = dot(streams, site.fn + j * s * d, s * d);
        });
        float inverse = 1.0f / std::sqrt(squares / static_cast<float>(s * d) + eps);
        for (int64_t j = 0; j < count; ++j) weights[j] *= inverse;
    }
    for_each_rows(u.n, [&](int64_t first, int64_t last) {
        constexpr int TOGETHER = 4;
        int64_t row = u.n > 1 ? first : last;
        for (; row + TOGETHER <= last; row += TOGETHER)
            mixes<TOGETHER>(streams + row * s * d, site.fn, count, s * d, eps, weights + row * count);
        for (; row < last; ++row) mixes<1>(streams + row * s * d, site.fn, count, s * d, eps, weights + row * count);
        for (row = first; row < last; ++row) {
            float* mix = weights + row * count;
            hc_weights(mix, site, c);
            collect(mix, streams + row * s * d, s, d, x + row * d);
            rms_norm(x + row * d, norm, d, eps, x + row * d);
        }
    });
}

// Writes the output y [n, d] of a sub-layer into the streams, with the weights of hc_pre.
inline void hc_post(Ubatch& u, const float* y, const float* weights, float* streams) {
    int64_t s = u.model.config.hc_mult, d = u.model.config.hidden_size, count = s * (2 + s);
    for_each_row(u.n, [&](int64_t row) {
        const float* w = weights + row * count;
        distribute(y + row * d, streams + row * s * d, w + s, w + 2 * s, s, d);
    });
}

// Input of the quantized linear layers: x, or with shipped numerics a copy rounded to FP8.
inline float* quantized_input(Ubatch& u, float* x, int64_t width) {
    if (!u.model.config.quantize) return x;
    float* copy = u.buffers.get(u.n * width);
    for_each_row(u.n, [&](int64_t row) {
        std::copy_n(x + row * width, width, copy + row * width);
        fake_quant_fp8(copy + row * width, width, 128);
    });
    return copy;
}

inline void add_ape(Ubatch& u, const Compressor& c, float* score) {
    for_each_row(u.n, [&](int64_t row) {
        const float* ape = c.ape + u.positions[static_cast<size_t>(row)] % c.kind.ratio * c.total;
        for (int64_t i = 0; i < c.total; ++i) score[row * c.total + i] += ape[i];
    });
}

inline void quantize_kv(float* kv, const Config& c) {
    if (!c.quantize) return;
    const int64_t plain = c.head_dim - c.qk_rope_head_dim;
    fake_quant_fp8(kv, plain, KEY_BLOCK);
    round_bf16(kv + plain, c.qk_rope_head_dim);
}

// Normalizes, rotates and rounds a new entry: one of attention (main) or an index key.
inline void finish_entry(const Model& m, const Compressor& w, bool main, float* entry, int64_t position) {
    const Config& c = m.config;
    int64_t pairs = c.qk_rope_head_dim / 2;
    rms_norm(entry, w.norm, w.width, static_cast<float>(c.rms_norm_eps), entry);
    std::vector<float> cos(static_cast<size_t>(pairs)), sin(static_cast<size_t>(pairs));
    rotation(m.inv_freq[1], position, cos.data(), sin.data());
    rotate(entry, w.width, cos.data(), sin.data(), pairs, 1.0f);
    if (main) return quantize_kv(entry, c);
    if (c.quantize) {
        hadamard(entry, w.width);
        fake_quant_fp4(entry, w.width, INDEX_KEY_BLOCK);
    }
}

// A sequence's entries for a segment's tokens. If the tokens would decode more entries than there are, all that they
// see are decoded here, once.
inline Entries entries_of_segment(Ubatch& u, const Layer& layer, const StoredRows& pool, const Segment& s, bool split) {
    constexpr int64_t MOST_DECODED = int64_t{1} << 24;  // channels: 64 MiB
    Entries entries(pool, u.cache, s.slot, layer.kind.ratio);
    const int64_t visible = (s.start + s.count) / layer.kind.ratio, width = entries.width;
    const int64_t k = layer.kind.has_indexer ? std::min(visible, u.model.config.index_topk) : visible;
    const int64_t tasks = std::max<int64_t>(s.count / ATTENTION_TOKENS, split ? 2 : 0);
    if (entries.direct() || tasks * k < visible || tasks < 2 || visible * width > MOST_DECODED) return entries;
    float* decoded = u.buffers.get(visible * width);
    for_each_row(visible, [&](int64_t e) { entries.read(e, decoded + e * width); });
    entries.decoded = decoded;
    return entries;
}

// Attention of every token into o [n, H, D], rotated back. q [n, H, D] is rotated and scaled; kv [n, D] are the keys of
// the ubatch's tokens.
inline void attend_ubatch(Ubatch& u, const Layer& layer, const LayerCache& cache, float* q, const float* kv,
                          const int32_t* selected, float* o) {
    const Config& c = u.model.config;
    int64_t H = c.num_attention_heads, D = c.head_dim, pairs = c.qk_rope_head_dim / 2, kind = layer.kind.ratio ? 1 : 0;
    struct Task {
        const Segment* s;
        int64_t i, count, h0, h1;
    };
    std::vector<Task> tasks;
    // With many heads one token is enough work for a task; more would only enlarge the score buffer.
    int64_t block = std::max<int64_t>(1, std::min<int64_t>(ATTENTION_TOKENS, 64 / H));
    int64_t blocks = 0;
    for (const Segment& s : u.segments) blocks += (s.count + block - 1) / block;
    int64_t parts = blocks >= thread_count() ? 1 : std::min<int64_t>(H, (thread_count() + blocks - 1) / blocks);
    for (const Segment& s : u.segments)
        for (int64_t i = 0; i < s.count; i += block)
            for (int64_t p = 0; p < parts; ++p)
                tasks.push_back({&s, i, std::min(block, s.count - i), H * p / parts, H * (p + 1) / parts});
    std::vector<Entries> entries;  // per segment
    if (layer.kind.ratio)
        for (const Segment& s : u.segments)
            entries.push_back(entries_of_segment(u, layer, cache.main.entries, s, parts > 1));
    parallel(static_cast<int64_t>(tasks.size()), [&](int64_t number, int) {
        const Task& task = tasks[static_cast<size_t>(number)];
        const Segment& s = *task.s;
        int64_t start = s.start + task.i, row = s.first + task.i;
        float* decoded = cache.window.format.kind == RowKind::f32 ? nullptr : scratch(Scratch::window_keys, WINDOW * D);
        thread_local AttentionKeys keys;
        keys.window_start = std::max<int64_t>(0, start - WINDOW + 1);
        keys.window.clear();
        for (int64_t p = keys.window_start; p < start + task.count; ++p)
            keys.window.push_back(p >= s.start ? kv + (s.first + p - s.start) * D
                                               : read_row(cache.window, s.slot * WINDOW + p % WINDOW,
                                                          decoded ? decoded + p % WINDOW * D : nullptr));
        keys.entries = layer.kind.ratio ? &entries[static_cast<size_t>(task.s - u.segments.data())] : nullptr;
        keys.ratio = layer.kind.ratio;
        keys.top_k = layer.kind.has_indexer ? c.index_topk : 0;
        keys.selected = selected ? selected + row * c.index_topk : nullptr;
        attend(q + row * H * D, H * D, task.count, start, task.h0, task.h1, D, keys, layer.attn_sink, o + row * H * D);
        for (int64_t j = 0; j < task.count; ++j)
            for (int64_t h = task.h0; h < task.h1; ++h)
                rotate(o + ((row + j) * H + h) * D, D, u.cos[kind].data() + (row + j) * pairs,
                       u.sin[kind].data() + (row + j) * pairs, pairs, -1.0f);
    });
}

// Projections of a ubatch's tokens; null where the layer has no such projection.
struct AttentionInputs {
    float *latent = nullptr, *kv = nullptr;  // [n, rank], [n, D]
    float *main_kv = nullptr, *main_score = nullptr, *index_kv = nullptr, *index_score = nullptr;
    float* head_weights = nullptr;  // of the indexer [n, heads], scaled
};

inline AttentionInputs project_inputs(Ubatch& u, const Layer& layer, const LayerCache& cache, float* x) {
    const Config& c = u.model.config;
    const int64_t n = u.n, d = c.hidden_size, D = c.head_dim, rank = c.q_lora_rank, pairs = c.qk_rope_head_dim / 2;
    const int64_t kind = layer.kind.ratio ? 1 : 0;
    const float eps = static_cast<float>(c.rms_norm_eps);
    const bool indexed = layer.kind.has_indexer;
    AttentionInputs in;
    float* quantized_x = quantized_input(u, x, d);
    in.latent = u.buffers.get(n * rank);
    in.kv = u.buffers.get(n * D);
    std::vector<Product> list{{{quantized_x, d}, &layer.wq_a, {in.latent, rank}},
                              {{quantized_x, d}, &layer.wkv, {in.kv, D}}};
    auto project = [&](const Weight& w) {
        float* to = u.buffers.get(n * w.out);
        list.push_back({{x, d}, &w, {to, w.out}});
        return to;
    };
    if (layer.kind.ratio) {
        in.main_kv = project(layer.main.wkv);
        in.main_score = project(layer.main.wgate);
    }
    if (indexed) {
        in.index_kv = project(layer.index.wkv);
        in.index_score = project(layer.index.wgate);
        in.head_weights = project(layer.index_weights_proj);
    }
    products(list.data(), static_cast<int>(list.size()), n);

    const float *cos = u.cos[kind].data(), *sin = u.sin[kind].data();
    const float weight_scale = static_cast<float>(std::pow(static_cast<double>(c.index_head_dim), -0.5) *
                                                  std::pow(static_cast<double>(c.index_n_heads), -0.5));
    for_each_row(n, [&](int64_t row) {
        float *latent = in.latent + row * rank, *kv = in.kv + row * D;
        rms_norm(latent, layer.q_norm, rank, eps, latent);
        if (c.quantize) fake_quant_fp8(latent, rank, 128);
        rms_norm(kv, layer.kv_norm, D, eps, kv);
        rotate(kv, D, cos + row * pairs, sin + row * pairs, pairs, 1.0f);
        quantize_kv(kv, c);
        // So that fresh and cached keys are the same numbers.
        if (cache.window.format.kind == RowKind::bf16) round_bf16(kv, D);
        if (indexed)
            for (int64_t h = 0; h < c.index_n_heads; ++h) in.head_weights[row * c.index_n_heads + h] *= weight_scale;
    });
    return in;
}

// q [n, H, D], rotated and scaled.
inline float* project_queries(Ubatch& u, const Layer& layer, float* latent) {
    const Config& c = u.model.config;
    const int64_t n = u.n, H = c.num_attention_heads, D = c.head_dim, pairs = c.qk_rope_head_dim / 2,
                  kind = layer.kind.ratio ? 1 : 0;
    const float *cos = u.cos[kind].data(), *sin = u.sin[kind].data();
    float* q = u.buffers.get(n * H * D);
    Product up{{latent, c.q_lora_rank}, &layer.wq_b, {q, H * D}};
    products(&up, 1, n);
    const float scale = static_cast<float>(std::pow(static_cast<double>(D), -0.5));
    for_each_row(n, [&](int64_t row) {
        for (int64_t h = 0; h < H; ++h) {
            float* head = q + (row * H + h) * D;
            rms_norm(head, nullptr, D, static_cast<float>(c.rms_norm_eps), head);
            rotate(head, D, cos + row * pairs, sin + row * pairs, pairs, 1.0f);
            for (int64_t i = 0; i < D; ++i) head[i] *= scale;
        }
    });
    return q;
}

// Writes the entries, attention's and the indexer's, of the compression windows that the ubatch's tokens close.
inline void compress_ubatch(Ubatch& u, const Layer& layer, const LayerCache& cache, const AttentionInputs& in) {
    const bool indexed = layer.kind.has_indexer;
    add_ape(u, layer.main, in.main_score);
    if (indexed) add_ape(u, layer.index, in.index_score);
    const int64_t count = static_cast<int64_t>(u.segments.size()), compressors = indexed ? 2 : 1;
    parallel(count * compressors, [&](int64_t task, int) {
        const Segment& s = u.segments[static_cast<size_t>(task / compressors)];
        const bool main = task % compressors == 0;
        const Compressor& w = main ? layer.main : layer.index;
        compress(w, s, u.cache, main ? cache.main : cache.index, main ? in.main_kv : in.index_kv,
                 main ? in.main_score : in.index_score,
                 [&](float* entry, int64_t position) { finish_entry(u.model, w, main, entry, position); });
    });
}

// Writes the keys of each segment's last WINDOW tokens into its slot's window ring.
inline void store_window(const Ubatch& u, const LayerCache& cache, const float* kv) {
    const int64_t D = u.model.config.head_dim;
    for (const Segment& s : u.segments)
        for (int64_t i = std::max<int64_t>(0, s.count - WINDOW); i < s.count; ++i)
            encode_row(cache.window.format, kv + (s.first + i) * D,
                       cache.window.row(s.slot * WINDOW + (s.start + i) % WINDOW));
}

// y [n, d] = output projection of o [n, H, D]: each group of heads down to o_lora_rank channels, then all of them to d.
inline void project_output(Ubatch& u, const Layer& layer, float* o, float* y) {
    const Config& c = u.model.config;
    const int64_t n = u.n, d = c.hidden_size, groups = c.o_groups, inner = c.num_attention_heads * c.head_dim;
    const int64_t width = inner / groups, total = groups * c.o_lora_rank;
    float* low = u.buffers.get(n * total);
    std::vector<Weight> slices;
    for (int64_t g = 0; g < groups; ++g) slices.push_back(layer.wo_a.rows(g * c.o_lora_rank, c.o_lora_rank));
    std::vector<Product> list;
    for (int64_t g = 0; g < groups; ++g)
        list.push_back({{o + g * width, inner}, &slices[static_cast<size_t>(g)], {low + g * c.o_lora_rank, total}});
    products(list.data(), static_cast<int>(list.size()), n);
    if (c.quantize) for_each_row(n, [&](int64_t row) { fake_quant_fp8(low + row * total, total, 128); });
    Product down{{low, total}, &layer.wo_b, {y, d}};
    products(&down, 1, n);
}

// y [n, d] = attention of the normed input x [n, d].
inline void attention(Ubatch& u, const Layer& layer, const LayerCache& cache, float* x, float* y) {
    const Config& c = u.model.config;
    const AttentionInputs in = project_inputs(u, layer, cache, x);
    float* q = project_queries(u, layer, in.latent);
    if (layer.kind.ratio) compress_ubatch(u, layer, cache, in);
    thread_local std::vector<int32_t> memory;
    const int32_t* selected =
        layer.kind.has_indexer ? select_ubatch_entries(u, layer, cache, in.latent, in.head_weights, memory) : nullptr;
    float* o = u.buffers.get(u.n * c.num_attention_heads * c.head_dim);
    attend_ubatch(u, layer, cache, q, in.kv, selected, o);
    store_window(u, cache, in.kv);
    project_output(u, layer, o, y);
}

// y [n, d] = routed and shared experts of layer number l for the normed input x [n, d].
inline void feed_forward(Ubatch& u, int64_t l, float* x, float* y) {
    const Config& c = u.model.config;
    const Layer& layer = u.model.layers[static_cast<size_t>(l)];
    int64_t n = u.n, d = c.hidden_size, k = c.num_experts_per_tok, E = c.n_routed_experts;
    int64_t width = layer.shared.w1.out;
    float *quantized_x = quantized_input(u, x, d), *logits = u.buffers.get(n * E), *gate = u.buffers.get(n * width);
    float *up = u.buffers.get(n * width), *weights = u.buffers.get(n * k), *rows = u.buffers.get(n * k * d);
    float* hidden = u.buffers.get(n * k * 2 * c.moe_intermediate_size);
    thread_local std::vector<int32_t> memory;
    memory.resize(static_cast<size_t>(n * k));
    int32_t* experts = memory.data();
    Product first[] = {{{x, d}, &layer.gate, {logits, E}},
                       {{quantized_x, d}, &layer.shared.w1, {gate, width}},
                       {{quantized_x, d}, &layer.shared.w3, {up, width}}};
    products(first, 3, n);
    for_each_row(n, [&](int64_t row) {
        thread_local std::vector<float> work;
        route(logits + row * E, layer, c, u.token_ids[static_cast<size_t>(row)], work, experts + row * k,
              weights + row * k);
        swiglu(gate + row * width, up + row * width, width, static_cast<float>(c.swiglu_limit), 1.0f);
        if (c.quantize) fake_quant_fp8(gate + row * width, width, 128);
    });
    run_experts({layer, c, quantized_x, n, experts, weights, hidden, rows}, u.model.residency, l,
                {{gate, width}, &layer.shared.w2, {y, d}});
    for_each_row(n, [&](int64_t row) {
        for (int64_t slot = 0; slot < k; ++slot) {
            const float* expert = rows + (row * k + slot) * d;
            for (int64_t i = 0; i < d; ++i) y[row * d + i] += expert[i];
        }
    });
}

// Layers [first, last) over a ubatch's streams [n, s, d], in place.
inline void run_layers(Ubatch& u, int64_t first, int64_t last, float* streams) {
    const Config& c = u.model.config;
    for (int64_t l = first; l < last; ++l) {
        const Layer& layer = u.model.layers[static_cast<size_t>(l)];
        u.buffers.restart();
        float *x = u.buffers.get(u.n * c.hidden_size), *y = u.buffers.get(u.n * c.hidden_size);
        float* weights = u.buffers.get(u.n * c.hc_mult * (2 + c.hc_mult));
        hc_pre(u, layer.hc_attn, layer.attn_norm, streams, weights, x);
        attention(u, layer, u.cache.layers[static_cast<size_t>(l)], x, y);
        hc_post(u, y, weights, streams);
        hc_pre(u, layer.hc_ffn, layer.ffn_norm, streams, weights, x);
        feed_forward(u, l, x, y);
        hc_post(u, y, weights, streams);
    }
}

struct BatchPosition {
    // The batch's next token, its sequence, and the tokens of that sequence already taken.
    int64_t token = 0, sequence = 0, used = 0;
};

// Fills u with the next UBATCH_TOKENS tokens, or with the rest of the batch.
inline void fill_ubatch(Ubatch& u, const Batch& batch, BatchPosition& at) {
    u.n = 0;
    u.segments.clear();
    u.positions.clear();
    u.token_ids.clear();
    while (at.sequence < batch.sequences && u.n < UBATCH_TOKENS) {
        const int64_t count = std::min(UBATCH_TOKENS - u.n, batch.lengths[at.sequence] - at.used);
        const int64_t start = batch.starts[at.sequence] + at.used;
        u.segments.push_back({u.n, count, start, batch.slots[at.sequence]});
        for (int64_t i = 0; i < count; ++i) {
            u.positions.push_back(start + i);
            u.token_ids.push_back(batch.token_ids[at.token + i]);
        }
        u.n += count;
        at.token += count;
        at.used += count;
        if (at.used == batch.lengths[at.sequence]) {
            ++at.sequence;
            at.used = 0;
        }
    }
}

// Computes the rotation factors of the ubatch's positions and, unless null, its streams [n, s, d] from the embedding.
inline void prepare_rows(Ubatch& u, float* streams) {
    const int64_t s = u.model.config.hc_mult, d = u.model.config.hidden_size,
                  pairs = u.model.config.qk_rope_head_dim / 2;
    for (int kind = 0; kind < 2; ++kind) {
        u.cos[kind].resize(static_cast<size_t>(u.n * pairs));
        u.sin[kind].resize(static_cast<size_t>(u.n * pairs));
    }
    for_each_row(u.n, [&](int64_t row) {
        for (int kind = 0; kind < 2; ++kind)
            rotation(u.model.inv_freq[kind], u.positions[static_cast<size_t>(row)], u.cos[kind].data() + row * pairs,
                     u.sin[kind].data() + row * pairs);
        if (!streams) return;
        float* to = streams + row * s * d;
        dequantize_row(u.model.embed, u.token_ids[static_cast<size_t>(row)], 0, d, to);
        for (int64_t j = 1; j < s; ++j) std::copy_n(to, d, to + j * d);
    });
}

// Input of an MTP block in place of the streams [n, s, d]: e_proj(norm(embedding of the next token)), the same for all
// streams of a token, plus h_proj(norm(stream)).
inline void fuse_mtp_input(const Model& model, int64_t depth, const int64_t* next_token_ids, int64_t n,
                           float* streams) {
    const Config& c = model.config;
    const MtpInput& w = model.mtp[static_cast<size_t>(depth)];
    const int64_t s = c.hc_mult, d = c.hidden_size;
    const float eps = static_cast<float>(c.rms_norm_eps);
    thread_local std::vector<float> memory;
    memory.resize(static_cast<size_t>((2 + s) * n * d));
    float *embedding = memory.data(), *projected = embedding + n * d, *normed = projected + n * d;
    for_each_row(n, [&](int64_t row) {
        float* e = embedding + row * d;
        dequantize_row(model.embed, next_token_ids[row], 0, d, e);
        rms_norm(e, w.enorm, d, eps, e);
        if (c.quantize) fake_quant_fp8(e, d, 128);
        for (int64_t j = row * s; j < (row + 1) * s; ++j) {
            rms_norm(streams + j * d, w.hnorm, d, eps, normed + j * d);
            if (c.quantize) fake_quant_fp8(normed + j * d, d, 128);
        }
    });
    Product first{{embedding, d}, &w.e_proj, {projected, d}}, second{{normed, d}, &w.h_proj, {streams, d}};
    products(&first, 1, n);
    products(&second, 1, n * s);
    for_each_row(n, [&](int64_t row) {
        for (int64_t j = row * s; j < (row + 1) * s; ++j)
            for (int64_t i = 0; i < d; ++i) streams[j * d + i] += projected[row * d + i];
    });
}

// Runs layers [first, last) over a batch. streams [T, s, d] are updated in place; with `embed` they are first filled
// from the embedding.
inline void forward(const Model& model, const Cache& cache, const Batch& batch, int64_t first, int64_t last, bool embed,
                    float* streams) {
    const int64_t width = model.config.hc_mult * model.config.hidden_size;
    thread_local Buffers buffers;
    Ubatch u{model, cache, 0, {}, {}, {}, {}, {}, {}};
    std::swap(u.buffers, buffers);
    BatchPosition at;
    while (at.sequence < batch.sequences) {
        fill_ubatch(u, batch, at);
        float* rows = streams + (at.token - u.n) * width;
        if (model.residency) read_ahead(model, u.token_ids, first, last);
        prepare_rows(u, embed ? rows : nullptr);
        run_layers(u, first, last, rows);
    }
    std::swap(u.buffers, buffers);
}

}  // namespace dsv4::DSV4_ISA
