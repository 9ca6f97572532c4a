// Runs the model's layers over a ragged batch and appends to the cache: ubatch by ubatch, each through all layers.
#pragma once

#include <algorithm>
#include <vector>

#include "model/attention_layer.h"
#include "model/experts.h"
#include "model/hyper_connections.h"

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
        round_input(c, gate + row * width, width);
    });
    if (!layer.tid2eid && u.notes.experts) {
        for (int64_t row = 0; row < n; ++row)
            std::copy_n(experts + row * k, k, u.notes.experts + row * u.notes.experts_stride);
        u.notes.experts += k;
    }
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
        round_input(c, e, d);
        for (int64_t j = row * s; j < (row + 1) * s; ++j) {
            rms_norm(streams + j * d, w.hnorm, d, eps, normed + j * d);
            round_input(c, normed + j * d, d);
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
// from the embedding. With notes, `first` is 0.
inline void forward(const Model& model, const Cache& cache, const Batch& batch, int64_t first, int64_t last, bool embed,
                    float* streams, const ChoiceNotes& notes) {
    const int64_t width = model.config.hc_mult * model.config.hidden_size;
    thread_local Buffers buffers;
    Ubatch u{model, cache, 0, {}, {}, {}, {}, {}, {}, {}};
    std::swap(u.buffers, buffers);
    BatchPosition at;
    while (at.sequence < batch.sequences) {
        fill_ubatch(u, batch, at);
        u.notes = notes.from_token(at.token - u.n);
        float* rows = streams + (at.token - u.n) * width;
        if (model.residency) read_ahead(model, u.token_ids, first, last);
        prepare_rows(u, embed ? rows : nullptr);
        run_layers(u, first, last, rows);
    }
    std::swap(u.buffers, buffers);
}

}  // namespace dsv4::DSV4_ISA
