// The attention of one layer over a ubatch: projections, compression, index, attention, output.
#pragma once

#include <algorithm>
#include <vector>

#include "model/attention.h"
#include "model/indexer.h"
#include "model/ubatch.h"

namespace dsv4::DSV4_ISA {

// Input of the layers' products: x, or a copy rounded as the numerics say.
inline float* quantized_input(Ubatch& u, float* x, int64_t width) {
    const Config& c = u.model.config;
    if (!c.quantize && !c.bf16) return x;
    float* copy = u.buffers.get(u.n * width);
    for_each_row(u.n, [&](int64_t row) {
        std::copy_n(x + row * width, width, copy + row * width);
        round_input(c, copy + row * width, width);
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

// Tasks of a ubatch's attention: a block of neighbouring tokens of a segment and some heads each.
struct AttentionTask {
    const Segment* s;
    int64_t i, count, h0, h1;
};

// Cuts attention into tasks. Few tokens divide the heads too, unless they are kept `together`.
inline std::vector<AttentionTask> attention_tasks(const Ubatch& u, bool together) {
    const int64_t H = u.model.config.num_attention_heads;
    std::vector<AttentionTask> tasks;
    // With many heads one token is enough work for a task; more would only enlarge the score buffer.
    int64_t block = std::max<int64_t>(1, std::min<int64_t>(ATTENTION_TOKENS, 64 / H));
    int64_t blocks = 0;
    for (const Segment& s : u.segments) blocks += (s.count + block - 1) / block;
    int64_t parts =
        together || blocks >= thread_count() ? 1 : std::min<int64_t>(H, (thread_count() + blocks - 1) / blocks);
    for (const Segment& s : u.segments)
        for (int64_t i = 0; i < s.count; i += block)
            for (int64_t p = 0; p < parts; ++p)
                tasks.push_back({&s, i, std::min(block, s.count - i), H * p / parts, H * (p + 1) / parts});
    return tasks;
}

// Attention of every token into o [n, H, D], rotated back. q [n, H, D] is rotated and scaled; window(segment, first,
// last, to) appends the keys of positions [first, last); entries are those of each segment, none without compression.
// probs [n, index_topk], unless null: the entries' probabilities, added over the heads; then a task has all heads.
template <class Window>
inline void attend_segments(Ubatch& u, const Layer& layer, Window&& window, const std::vector<AttentionTask>& tasks,
                            const std::vector<Entries>& entries, float* q, const int32_t* selected, float* o,
                            float* probs) {
    const Config& c = u.model.config;
    int64_t H = c.num_attention_heads, D = c.head_dim, pairs = c.qk_rope_head_dim / 2, kind = layer.kind.ratio ? 1 : 0;
    parallel(static_cast<int64_t>(tasks.size()), [&](int64_t number, int) {
        const AttentionTask& task = tasks[static_cast<size_t>(number)];
        const Segment& s = *task.s;
        int64_t start = s.start + task.i, row = s.first + task.i;
        thread_local AttentionKeys keys;
        keys.window_start = std::max<int64_t>(0, start - WINDOW + 1);
        keys.window.clear();
        window(s, keys.window_start, start + task.count, keys.window);
        keys.entries = layer.kind.ratio ? &entries[static_cast<size_t>(task.s - u.segments.data())] : nullptr;
        keys.ratio = layer.kind.ratio;
        keys.top_k = layer.kind.has_indexer ? c.index_topk : 0;
        keys.selected = selected ? selected + row * c.index_topk : nullptr;
        attend(q + row * H * D, H * D, task.count, start, task.h0, task.h1, D, keys, layer.attn_sink, o + row * H * D,
               probs ? probs + row * c.index_topk : nullptr);
        for (int64_t j = 0; j < task.count; ++j)
            for (int64_t h = task.h0; h < task.h1; ++h)
                rotate(o + ((row + j) * H + h) * D, D, u.cos[kind].data() + (row + j) * pairs,
                       u.sin[kind].data() + (row + j) * pairs, pairs, -1.0f);
    });
}

// attend_segments of a ubatch, whose tokens have the keys kv [n, D]; earlier keys and the entries are the cache's.
inline void attend_ubatch(Ubatch& u, const Layer& layer, const LayerCache& cache, float* q, const float* kv,
                          const int32_t* selected, float* o) {
    const std::vector<AttentionTask> tasks = attention_tasks(u, false);
    const bool split = tasks.front().h1 < u.model.config.num_attention_heads;
    std::vector<Entries> entries;  // per segment
    if (layer.kind.ratio)
        for (const Segment& s : u.segments)
            entries.push_back(entries_of_segment(u, layer, cache.main.entries, s, split));
    auto window = [&](const Segment& s, int64_t first, int64_t last, std::vector<const float*>& to) {
        const int64_t D = u.model.config.head_dim;
        float* decoded = cache.window.format.kind == RowKind::f32 ? nullptr : scratch(Scratch::window_keys, WINDOW * D);
        for (int64_t p = first; p < last; ++p)
            to.push_back(p >= s.start ? kv + (s.first + p - s.start) * D
                                      : read_row(cache.window, s.slot * WINDOW + p % WINDOW,
                                                 decoded ? decoded + p % WINDOW * D : nullptr));
    };
    attend_segments(u, layer, window, tasks, entries, q, selected, o, nullptr);
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
        round_input(c, latent, rank);
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
    if (c.bf16) for_each_row(n, [&](int64_t row) { round_factors(o + row * inner, inner, o + row * inner); });
    for (int64_t g = 0; g < groups; ++g) slices.push_back(layer.wo_a.rows(g * c.o_lora_rank, c.o_lora_rank));
    std::vector<Product> list;
    for (int64_t g = 0; g < groups; ++g)
        list.push_back({{o + g * width, inner}, &slices[static_cast<size_t>(g)], {low + g * c.o_lora_rank, total}});
    products(list.data(), static_cast<int>(list.size()), n);
    if (c.quantize || c.bf16) for_each_row(n, [&](int64_t row) { round_input(c, low + row * total, total); });
    Product down{{low, total}, &layer.wo_b, {y, d}};
    products(&down, 1, n);
}

// Notes the entries that each token of the ubatch attends to, [n, index_topk]; null: all tokens read all entries.
inline void note_entries(Ubatch& u, const int32_t* selected) {
    const int64_t k = u.model.config.index_topk;
    for (const Segment& s : u.segments)
        for (int64_t i = 0; selected && i < s.count; ++i)
            if ((s.start + i + 1) / CSA.ratio > k)
                std::copy_n(selected + (s.first + i) * k, k, u.notes.entries + (s.first + i) * u.notes.entries_stride);
    u.notes.entries += k;
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
    if (layer.kind.has_indexer && u.notes.entries) note_entries(u, selected);
    float* o = u.buffers.get(u.n * c.num_attention_heads * c.head_dim);
    attend_ubatch(u, layer, cache, q, in.kv, selected, o);
    store_window(u, cache, in.kv);
    project_output(u, layer, o, y);
}

}  // namespace dsv4::DSV4_ISA
