// The layers of the model over a ragged batch, tile of tokens after tile of tokens, appending to the cache.
#pragma once

#include <algorithm>
#include <vector>

#include "model/attention.h"
#include "model/experts.h"
#include "model/hyper_connections.h"
#include "model/indexer.h"

namespace dsv4::DSV4_ISA {

// x [n, d] gets the normed input of a sub-layer, weights [n, s * (2 + s)] the site's pre, post and comb.
inline void read_streams(Tile& t, const HyperConnection& site, const float* norm, const float* streams, float* weights,
                         float* x) {
    const Config& c = t.model.config;
    int64_t s = c.hc_mult, d = c.hidden_size, count = s * (2 + s);
    float eps = static_cast<float>(c.rms_norm_eps);
    if (t.n == 1) {  // a decode step: the projections are spread over the threads
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
    each_rows(t.n, [&](int64_t first, int64_t last) {
        constexpr int TOGETHER = 4;
        int64_t row = t.n > 1 ? first : last;
        for (; row + TOGETHER <= last; row += TOGETHER)
            mixes<TOGETHER>(streams + row * s * d, site.fn, count, s * d, eps, weights + row * count);
        for (; row < last; ++row) mixes<1>(streams + row * s * d, site.fn, count, s * d, eps, weights + row * count);
        for (row = first; row < last; ++row) {
            float* mix = weights + row * count;
            site_weights(mix, site, c);
            collect(mix, streams + row * s * d, s, d, x + row * d);
            rms_norm(x + row * d, norm, d, eps, x + row * d);
        }
    });
}

inline void write_streams(Tile& t, const float* y, const float* weights, float* streams) {
    int64_t s = t.model.config.hc_mult, d = t.model.config.hidden_size, count = s * (2 + s);
    each_row(t.n, [&](int64_t row) {
        const float* w = weights + row * count;
        distribute(y + row * d, streams + row * s * d, w + s, w + 2 * s, s, d);
    });
}

// x itself, or a copy rounded to FP8 where the shipped model rounds a linear layer's input.
inline float* rounded(Tile& t, float* x, int64_t width) {
    if (!t.model.config.quantize) return x;
    float* copy = t.buffers.get(t.n * width);
    each_row(t.n, [&](int64_t row) {
        std::copy_n(x + row * width, width, copy + row * width);
        fake_quant_fp8(copy + row * width, width, 128);
    });
    return copy;
}

inline void add_ape(Tile& t, const Compressor& c, float* score) {
    each_row(t.n, [&](int64_t row) {
        const float* ape = c.ape + t.positions[static_cast<size_t>(row)] % c.ratio * c.total;
        for (int64_t i = 0; i < c.total; ++i) score[row * c.total + i] += ape[i];
    });
}

inline void quantize_kv(float* kv, const Config& c) {
    if (c.quantize) fake_quant_fp8(kv, c.head_dim - c.qk_rope_head_dim, 64);
}

// Norm, rotation and rounding of a fresh entry, for the compressor of the keys (main) or of the indexer.
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
        fake_quant_fp4(entry, w.width, 32);
    }
}

// o [n, H, D], rotated back: every token's attention output. q is scaled and rotated, kv [n, D] the tile's own keys.
inline void attend_all(Tile& t, const Layer& layer, const LayerCache& cache, float* q, const float* kv,
                       const int32_t* chosen, float* o) {
    const Config& c = t.model.config;
    int64_t H = c.num_attention_heads, D = c.head_dim, pairs = c.qk_rope_head_dim / 2, kind = layer.ratio ? 1 : 0;
    struct Task {
        const Segment* s;
        int64_t i, count, h0, h1;
    };
    std::vector<Task> tasks;
    // With many heads a token alone is work enough, and more tokens would need more memory for their scores.
    int64_t block = std::max<int64_t>(1, std::min<int64_t>(ATTENTION_TOKENS, 64 / H));
    int64_t blocks = 0;
    for (const Segment& s : t.segments) blocks += (s.count + block - 1) / block;
    int64_t parts = blocks >= thread_count() ? 1 : std::min<int64_t>(H, (thread_count() + blocks - 1) / blocks);
    for (const Segment& s : t.segments)
        for (int64_t i = 0; i < s.count; i += block)
            for (int64_t p = 0; p < parts; ++p)
                tasks.push_back({&s, i, std::min(block, s.count - i), H * p / parts, H * (p + 1) / parts});
    parallel(static_cast<int64_t>(tasks.size()), [&](int64_t number, int) {
        const Task& task = tasks[static_cast<size_t>(number)];
        const Segment& s = *task.s;
        int64_t start = s.start + task.i, row = s.first + task.i;
        thread_local Keys keys;
        keys.window_start = std::max<int64_t>(0, start - WINDOW + 1);
        keys.window.clear();
        for (int64_t p = keys.window_start; p < start + task.count; ++p)
            keys.window.push_back(p >= s.start ? kv + (s.first + p - s.start) * D
                                               : cache.window + (s.slot * WINDOW + p % WINDOW) * D);
        Entries entries(cache.main.entries, t.cache, s.slot, std::max<int64_t>(1, layer.ratio), D);
        keys.entries = layer.ratio ? &entries : nullptr;
        keys.ratio = layer.ratio;
        keys.top_k = layer.ratio == 4 ? c.index_topk : 0;
        keys.chosen = chosen ? chosen + row * c.index_topk : nullptr;
        attend(q + row * H * D, H * D, task.count, start, task.h0, task.h1, D, keys, layer.attn_sink, o + row * H * D);
        for (int64_t j = 0; j < task.count; ++j)
            for (int64_t h = task.h0; h < task.h1; ++h)
                rotate(o + ((row + j) * H + h) * D, D, t.cos[kind].data() + (row + j) * pairs,
                       t.sin[kind].data() + (row + j) * pairs, pairs, -1.0f);
    });
}

// y [n, d] = attention of the normed input x [n, d].
inline void attention(Tile& t, const Layer& layer, const LayerCache& cache, float* x, float* y) {
    const Config& c = t.model.config;
    int64_t n = t.n, d = c.hidden_size, H = c.num_attention_heads, D = c.head_dim, rank = c.q_lora_rank;
    int64_t pairs = c.qk_rope_head_dim / 2, kind = layer.ratio ? 1 : 0, groups = c.o_groups;
    float eps = static_cast<float>(c.rms_norm_eps);
    const Compressor *main = layer.ratio ? &layer.main : nullptr, *index = layer.ratio == 4 ? &layer.index : nullptr;
    float *rounded_x = rounded(t, x, d), *latent = t.buffers.get(n * rank), *kv = t.buffers.get(n * D);
    float *main_kv = nullptr, *main_score = nullptr, *index_kv = nullptr, *index_score = nullptr, *head_weights = nullptr;
    std::vector<Product> list{{{rounded_x, d}, &layer.wq_a, {latent, rank}}, {{rounded_x, d}, &layer.wkv, {kv, D}}};
    auto project = [&](const Weight& w) {
        float* to = t.buffers.get(n * w.out);
        list.push_back({{x, d}, &w, {to, w.out}});
        return to;
    };
    if (main) main_kv = project(main->wkv), main_score = project(main->wgate);
    if (index) {
        index_kv = project(index->wkv), index_score = project(index->wgate);
        head_weights = project(layer.index_weights_proj);
    }
    products(list.data(), static_cast<int>(list.size()), n);

    const float *cos = t.cos[kind].data(), *sin = t.sin[kind].data();
    float weight_scale = static_cast<float>(std::pow(static_cast<double>(c.index_head_dim), -0.5) *
                                            std::pow(static_cast<double>(c.index_n_heads), -0.5));
    each_row(n, [&](int64_t row) {
        rms_norm(latent + row * rank, layer.q_norm, rank, eps, latent + row * rank);
        if (c.quantize) fake_quant_fp8(latent + row * rank, rank, 128);
        rms_norm(kv + row * D, layer.kv_norm, D, eps, kv + row * D);
        rotate(kv + row * D, D, cos + row * pairs, sin + row * pairs, pairs, 1.0f);
        quantize_kv(kv + row * D, c);
        if (index)
            for (int64_t h = 0; h < c.index_n_heads; ++h) head_weights[row * c.index_n_heads + h] *= weight_scale;
    });
    float* q = t.buffers.get(n * H * D);
    Product up{{latent, rank}, &layer.wq_b, {q, H * D}};
    products(&up, 1, n);
    float scale = static_cast<float>(std::pow(static_cast<double>(D), -0.5));
    each_row(n, [&](int64_t row) {
        for (int64_t h = 0; h < H; ++h) {
            float* head = q + (row * H + h) * D;
            rms_norm(head, nullptr, D, eps, head);
            rotate(head, D, cos + row * pairs, sin + row * pairs, pairs, 1.0f);
            for (int64_t i = 0; i < D; ++i) head[i] *= scale;
        }
    });
    if (main) {
        add_ape(t, *main, main_score);
        if (index) add_ape(t, *index, index_score);
        int64_t count = static_cast<int64_t>(t.segments.size()), both = index ? 2 : 1;
        parallel(count * both, [&](int64_t task, int) {
            const Segment& s = t.segments[static_cast<size_t>(task / both)];
            bool first = task % both == 0;
            const Compressor& w = first ? *main : *index;
            compress(w, s, t.cache, first ? cache.main : cache.index, first ? main_kv : index_kv,
                     first ? main_score : index_score,
                     [&](float* entry, int64_t position) { finish_entry(t.model, w, first, entry, position); });
        });
    }
    thread_local std::vector<int32_t> chosen;
    const int32_t* picks = index ? choose_entries(t, layer, cache, latent, head_weights, chosen) : nullptr;
    float* o = t.buffers.get(n * H * D);
    attend_all(t, layer, cache, q, kv, picks, o);
    for (const Segment& s : t.segments)
        for (int64_t i = std::max<int64_t>(0, s.count - WINDOW); i < s.count; ++i)
            std::copy_n(kv + (s.first + i) * D, D, cache.window + (s.slot * WINDOW + (s.start + i) % WINDOW) * D);

    int64_t part = H * D / groups, wide = groups * c.o_lora_rank;
    float* low = t.buffers.get(n * wide);
    std::vector<Weight> slices;
    for (int64_t g = 0; g < groups; ++g) slices.push_back(layer.wo_a.rows(g * c.o_lora_rank, c.o_lora_rank));
    list.clear();
    for (int64_t g = 0; g < groups; ++g)
        list.push_back({{o + g * part, H * D}, &slices[static_cast<size_t>(g)], {low + g * c.o_lora_rank, wide}});
    products(list.data(), static_cast<int>(list.size()), n);
    if (c.quantize) each_row(n, [&](int64_t row) { fake_quant_fp8(low + row * wide, wide, 128); });
    Product down{{low, wide}, &layer.wo_b, {y, d}};
    products(&down, 1, n);
}

// y [n, d] = routed and shared experts of the normed input x [n, d].
inline void feed_forward(Tile& t, const Layer& layer, float* x, float* y) {
    const Config& c = t.model.config;
    int64_t n = t.n, d = c.hidden_size, k = c.num_experts_per_tok, E = c.n_routed_experts;
    int64_t wide = layer.shared.w1.out;
    float *rounded_x = rounded(t, x, d), *logits = t.buffers.get(n * E), *gate = t.buffers.get(n * wide);
    float *up = t.buffers.get(n * wide), *weights = t.buffers.get(n * k), *rows = t.buffers.get(n * k * d);
    float* hidden = t.buffers.get(n * k * 2 * c.moe_intermediate_size);
    thread_local std::vector<int32_t> chosen;
    chosen.resize(static_cast<size_t>(n * k));
    int32_t* index = chosen.data();
    Product first[] = {{{x, d}, &layer.gate, {logits, E}},
                       {{rounded_x, d}, &layer.shared.w1, {gate, wide}},
                       {{rounded_x, d}, &layer.shared.w3, {up, wide}}};
    products(first, 3, n);
    each_row(n, [&](int64_t row) {
        thread_local std::vector<float> work;
        route(logits + row * E, layer, c, t.token_ids[static_cast<size_t>(row)], work, index + row * k, weights + row * k);
        swiglu(gate + row * wide, up + row * wide, wide, static_cast<float>(c.swiglu_limit), 1.0f);
        if (c.quantize) fake_quant_fp8(gate + row * wide, wide, 128);
    });
    run_experts(layer, c, rounded_x, n, index, weights, hidden, rows, {{gate, wide}, &layer.shared.w2, {y, d}});
    each_row(n, [&](int64_t row) {
        for (int64_t slot = 0; slot < k; ++slot) {
            const float* add_in = rows + (row * k + slot) * d;
            for (int64_t i = 0; i < d; ++i) y[row * d + i] += add_in[i];
        }
    });
}

// Layers [first, last) over a tile's streams [n, s, d], in place.
inline void run_layers(Tile& t, int64_t first, int64_t last, float* streams) {
    const Config& c = t.model.config;
    for (int64_t l = first; l < last; ++l) {
        const Layer& layer = t.model.layers[static_cast<size_t>(l)];
        t.buffers.restart();
        float *x = t.buffers.get(t.n * c.hidden_size), *y = t.buffers.get(t.n * c.hidden_size);
        float* weights = t.buffers.get(t.n * c.hc_mult * (2 + c.hc_mult));
        read_streams(t, layer.hc_attn, layer.attn_norm, streams, weights, x);
        attention(t, layer, t.cache.layers[static_cast<size_t>(l)], x, y);
        write_streams(t, y, weights, streams);
        read_streams(t, layer.hc_ffn, layer.ffn_norm, streams, weights, x);
        feed_forward(t, layer, x, y);
        write_streams(t, y, weights, streams);
    }
}

// Layers [first, last) over a batch. streams [T, s, d] is the input, or written from the embedding when `embed`.
inline void forward(const Model& model, const Cache& cache, const Batch& batch, int64_t first, int64_t last, bool embed,
                    float* streams) {
    const Config& c = model.config;
    int64_t s = c.hc_mult, d = c.hidden_size, pairs = c.qk_rope_head_dim / 2, done = 0;
    thread_local Buffers buffers;
    Tile t{model, cache, 0, {}, {}, {}, {}, {}, {}};
    std::swap(t.buffers, buffers);
    int64_t sequence = 0, used = 0;  // tokens of the current sequence that earlier tiles took
    while (sequence < batch.sequences) {
        t.n = 0;
        t.segments.clear(), t.positions.clear(), t.token_ids.clear();
        while (sequence < batch.sequences && t.n < TILE_TOKENS) {
            int64_t count = std::min(TILE_TOKENS - t.n, batch.lengths[sequence] - used);
            int64_t start = batch.starts[sequence] + used;
            t.segments.push_back({t.n, count, start, batch.slots[sequence]});
            for (int64_t i = 0; i < count; ++i) {
                t.positions.push_back(start + i);
                t.token_ids.push_back(batch.token_ids[done + t.n + i]);
            }
            t.n += count, used += count;
            if (used == batch.lengths[sequence]) ++sequence, used = 0;
        }
        for (int kind = 0; kind < 2; ++kind) {
            t.cos[kind].resize(static_cast<size_t>(t.n * pairs));
            t.sin[kind].resize(static_cast<size_t>(t.n * pairs));
        }
        float* tile = streams + done * s * d;
        each_row(t.n, [&](int64_t row) {
            for (int kind = 0; kind < 2; ++kind)
                rotation(model.inv_freq[kind], t.positions[static_cast<size_t>(row)], t.cos[kind].data() + row * pairs,
                         t.sin[kind].data() + row * pairs);
            if (!embed) return;
            float* to = tile + row * s * d;
            dequantize_row(model.embed, t.token_ids[static_cast<size_t>(row)], 0, d, to);
            for (int64_t j = 1; j < s; ++j) std::copy_n(to, d, to + j * d);
        });
        run_layers(t, first, last, tile);
        done += t.n;
    }
    std::swap(t.buffers, buffers);
}

}  // namespace dsv4::DSV4_ISA
