// Attention of sequences laid end to end, without a cache, and its gradient.
//
// The forward is inference's. The gradient computes scores and probabilities anew, a block of neighbouring tokens at a
// time; with p the probabilities, k the keys and dO the gradient of the output, a score's gradient is
// p (dO . k - sum of p dO . k), and a key, which is the value too, gets p dO + (gradient of its score) q.
#pragma once

#include <algorithm>
#include <vector>

#include "gemm/block_products.h"
#include "model/attention_layer.h"
#include "training/key_shares.h"
#include "training/row_gradients.h"

namespace dsv4::DSV4_ISA {

struct AttentionBatch {
    // q [T, heads, width], scaled; keys [., width], of each sequence those of up to WINDOW - 1 earlier tokens and its own;
    // entries [., width].
    const float *q, *keys, *entries;
    const int32_t* chosen;  // [T, top_k], read for tokens that see more than top_k entries
    const float* sink;      // [heads]
    Sequences sequences;
    CompressionKind kind;
    int64_t heads, width, top_k;

    int64_t visible(int64_t position) const { return kind.ratio ? (position + 1) / kind.ratio : 0; }
    bool sparse(int64_t position) const { return kind.has_indexer && visible(position) > top_k; }
    int64_t attended(int64_t position) const { return sparse(position) ? top_k : visible(position); }
};

// o [T, heads, width], and unless null the entries' probabilities, added over the heads [T, top_k].
inline void attend_batch(const AttentionBatch& in, float* o, float* probs) {
    Model model;
    model.config.num_attention_heads = in.heads;
    model.config.head_dim = in.width;
    model.config.index_topk = in.top_k;
    Layer layer;
    layer.kind = in.kind;
    layer.attn_sink = in.sink;
    const Cache cache;
    Ubatch u{model, cache, 0, {}, {}, {}, {}, {}, {}, {}};
    std::vector<Entries> entries;
    std::vector<const float*> keys;  // of each segment's first token
    int64_t entry = 0, key = 0;
    for (int64_t s = 0; s < in.sequences.count; ++s) {
        const int64_t length = in.sequences.lengths[s];
        u.segments.push_back({u.n, length, in.sequences.starts[s], 0});
        u.n += length;
        key += in.sequences.earlier(s, WINDOW - 1);
        keys.push_back(in.keys + key * in.width);
        key += length;
        if (!in.kind.ratio) continue;
        entries.emplace_back(float_rows(in.entries, in.width), cache, 0, in.kind.ratio);
        entries.back().decoded = in.entries + entry * in.width;
        entry += in.sequences.end(s) / in.kind.ratio;
    }
    auto window = [&](const Segment& s, int64_t first, int64_t last, std::vector<const float*>& to) {
        const float* own = keys[static_cast<size_t>(&s - u.segments.data())];
        for (int64_t p = first; p < last; ++p) to.push_back(own + (p - s.start) * in.width);
    };
    if (probs) std::fill_n(probs, u.n * in.top_k, 0.0f);
    attend_segments(u, layer, window, attention_tasks(u, probs != nullptr), entries, const_cast<float*>(in.q),
                    in.chosen, o, probs);
}

inline V held(V x, int lanes, V other) { return lanes == LANES ? x : select((1u << lanes) - 1u, x, other); }

// The largest of p[0..n) and `top`.
inline float largest(const float* p, int64_t n, float top) {
    V most = set1(top);
    for (int64_t i = 0; i < n; i += LANES) {
        const int left = lanes_left(n, i);
        most = max(most, held(load_n(p + i, left), left, most));
    }
    return highest(most);
}

// p = e^(p - top); returns their sum.
inline float exponentiate(float* p, int64_t n, float top) {
    V total = zero();
    for (int64_t i = 0; i < n; i += LANES) {
        const int left = lanes_left(n, i);
        const V x = exp(sub(load_n(p + i, left), set1(top)));
        store_n(p + i, x, left);
        total = add(total, held(x, left, zero()));
    }
    return sum(total);
}

// p *= factor; returns the sum of p * x.
inline float scale_and_dot(float* p, const float* x, int64_t n, float factor) {
    V total = zero();
    for (int64_t i = 0; i < n; i += LANES) {
        const int left = lanes_left(n, i);
        const V own = mul(load_n(p + i, left), set1(factor));
        store_n(p + i, own, left);
        total = fma(own, load_n(x + i, left), total);
    }
    return sum(total);
}

// x = p * (x - along).
inline void pull_scores(const float* p, float* x, int64_t n, float along) {
    for (int64_t i = 0; i < n; i += LANES) {
        const int left = lanes_left(n, i);
        store_n(x + i, mul(load_n(p + i, left), sub(load_n(x + i, left), set1(along))), left);
    }
}

// The gradient of the tokens of one chunk: writes their rows of d_q, adds to the chunk's shares and to d_sink [heads].
// A (token, head) pair is a row of scores: the columns of the block's window, then, from `window_columns_` on, entries.
class AttentionGradient {
   public:
    AttentionGradient(const AttentionBatch& in, const Chunk& chunk, const float* d_o, float* d_q, float* d_sink)
        : in_(in), chunk_(chunk), d_o_(d_o), d_q_(d_q), d_sink_(d_sink) {}

    void run() {
        const int64_t block = block_tokens(in_.heads);
        for (int64_t t = 0; t < chunk_.count; t += block) run_block(t, std::min(block, chunk_.count - t));
    }

   private:
    static int64_t whole_panels(int64_t keys) { return (keys + SCORE_KEYS - 1) / SCORE_KEYS * SCORE_KEYS; }
    int64_t entries_of(int64_t t) const { return in_.attended(start_ + t); }

    void run_block(int64_t first, int64_t tokens) {
        const int64_t H = in_.heads, D = in_.width;
        start_ = chunk_.start + first;
        row_ = chunk_.row + first;
        rows_ = tokens * H;
        const int64_t window_start = std::max<int64_t>(0, start_ - WINDOW + 1);
        window_start_ = window_start;
        window_ = start_ + tokens - window_start;
        window_columns_ = whole_panels(window_);
        int64_t dense = 0;  // tokens that see no more than top_k entries; the first ones
        while (dense < tokens && !in_.sparse(start_ + dense)) ++dense;
        shared_ = dense ? entries_of(dense - 1) : 0;
        const int64_t picked = dense < tokens ? in_.top_k : 0;
        stride_ = window_columns_ + whole_panels(std::max(shared_, picked));
        reserve();

        std::vector<const float*> window, shared;
        const float* keys = in_.keys + (chunk_.key_row - chunk_.start + window_start) * D;
        for (int64_t i = 0; i < window_; ++i) window.push_back(keys + i * D);
        for (int64_t e = 0; e < shared_; ++e) shared.push_back(entry(e));
        score(0, rows_, window, 0);
        score(0, dense * H, shared, window_columns_);
        std::vector<const float*> chosen(static_cast<size_t>(picked));
        for (int64_t t = dense; t < tokens; ++t) score(t * H, H, choose(t, chosen), window_columns_);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t h = 0; h < H; ++h) differentiate_row(t, h, t < dense);

        std::fill_n(d_q_ + row_ * H * D, rows_ * D, 0.0f);
        differentiate(0, rows_, window, 0, chunk_.key_share + (window_start - chunk_.first_key()) * D);
        differentiate(0, dense * H, shared, window_columns_, chunk_.entry_share);
        for (int64_t t = dense; t < tokens; ++t) {
            float* to = scratch(Scratch::key_gradients, picked * D);
            std::fill_n(to, picked * D, 0.0f);
            differentiate(t * H, H, choose(t, chosen), window_columns_, to);
            const int32_t* numbers = in_.chosen + (row_ + t) * in_.top_k;
            for (int64_t e = 0; e < picked; ++e) {
                float* own = chunk_.entry_share + numbers[e] * D;
                for (int64_t i = 0; i < D; ++i) own[i] += to[e * D + i];
            }
        }
    }

    const float* entry(int64_t e) const { return in_.entries + (chunk_.entry_row + e) * in_.width; }

    const std::vector<const float*>& choose(int64_t t, std::vector<const float*>& chosen) const {
        for (size_t i = 0; i < chosen.size(); ++i)
            chosen[i] = entry(in_.chosen[(row_ + t) * in_.top_k + static_cast<int64_t>(i)]);
        return chosen;
    }

    void reserve() {
        const int64_t D = in_.width, H = in_.heads;
        p_ = scratch(Scratch::probabilities, rows_ * stride_);
        ds_ = scratch(Scratch::score_gradients, rows_ * stride_);
        panels_ = scratch(Scratch::panel, D * SCORE_KEYS);
        key_channels_ = scratch(Scratch::key_channels, channel_panels_size(std::max({window_, shared_, in_.top_k}), D));
        q_channels_ = scratch(Scratch::query_channels, channel_panels_size(rows_, D));
        o_channels_ = scratch(Scratch::output_channels, channel_panels_size(rows_, D));
        queries_.clear();
        pulls_.clear();
        for (int64_t r = 0; r < rows_; ++r) {
            queries_.push_back(in_.q + (row_ * H + r) * D);
            pulls_.push_back(d_o_ + (row_ * H + r) * D);
        }
        pack_channels(queries_.data(), rows_, D, q_channels_);
        pack_channels(pulls_.data(), rows_, D, o_channels_);
    }

    // Products of the keys with q, into p_, and with dO, into ds_, in columns from `column` on.
    void score(int64_t first, int64_t rows, const std::vector<const float*>& keys, int64_t column) {
        const auto count = static_cast<int64_t>(keys.size());
        for (int64_t i = 0; rows && i < count; i += SCORE_KEYS) {
            const int64_t some = std::min(SCORE_KEYS, count - i), at = first * stride_ + column + i;
            pack_keys(keys.data() + i, some, in_.width, panels_);
            score_keys(queries_.data() + first, rows, panels_, some, in_.width, p_ + at, stride_);
            score_keys(pulls_.data() + first, rows, panels_, some, in_.width, ds_ + at, stride_);
        }
    }

    // Scores of a row become probabilities, products with dO the gradients of the scores; both zero for hidden keys.
    void differentiate_row(int64_t t, int64_t h, bool dense) {
        const int64_t position = start_ + t, entries = entries_of(t), row = (t * in_.heads + h) * stride_;
        const int64_t first = std::max<int64_t>(0, position - WINDOW + 1) - window_start_,
                      stop = position + 1 - window_start_, count = stop - first;
        float *p = p_ + row + first, *ds = ds_ + row + first, *p_e = p_ + row + window_columns_,
              *ds_e = ds_ + row + window_columns_;
        const float top = largest(p_e, entries, largest(p, count, in_.sink[h]));
        const float sink = exp1(in_.sink[h] - top);
        const float total = exponentiate(p, count, top) + exponentiate(p_e, entries, top) + sink;
        const float factor = 1.0f / total;
        const float along = scale_and_dot(p, ds, count, factor) + scale_and_dot(p_e, ds_e, entries, factor);
        pull_scores(p, ds, count, along);
        pull_scores(p_e, ds_e, entries, along);
        d_sink_[h] -= sink * factor * along;
        for (float* values : {p_ + row, ds_ + row}) {
            std::fill_n(values, first, 0.0f);
            std::fill(values + stop, values + window_, 0.0f);
            if (dense) std::fill(values + window_columns_ + entries, values + window_columns_ + shared_, 0.0f);
        }
    }

    // Adds what the scores of some rows with the keys give to the rows' d_q, and to d_keys [keys, width].
    void differentiate(int64_t first, int64_t rows, const std::vector<const float*>& keys, int64_t column,
                       float* d_keys) {
        const auto count = static_cast<int64_t>(keys.size());
        if (!rows || !count) return;
        const int64_t D = in_.width, at = first * stride_ + column;
        pack_channels(keys.data(), count, D, key_channels_);
        add_products(ds_ + at, stride_, 1, rows, count, {key_channels_, count * LANES, D},
                     d_q_ + (row_ * in_.heads + first) * D);
        add_products(ds_ + at, 1, stride_, count, rows, {q_channels_ + first * LANES, rows_ * LANES, D}, d_keys);
        add_products(p_ + at, 1, stride_, count, rows, {o_channels_ + first * LANES, rows_ * LANES, D}, d_keys);
    }

    const AttentionBatch& in_;
    const Chunk& chunk_;
    const float* d_o_;
    float *d_q_, *d_sink_;
    int64_t start_ = 0, row_ = 0, rows_ = 0;  // of the block: position and row of its first token; (token, head) pairs
    int64_t window_start_ = 0, window_ = 0, window_columns_ = 0, shared_ = 0, stride_ = 0;
    float *p_ = nullptr, *ds_ = nullptr, *panels_ = nullptr;
    float *key_channels_ = nullptr, *q_channels_ = nullptr, *o_channels_ = nullptr;
    std::vector<const float*> queries_, pulls_;
};

// d_q [T, heads, width] of the scaled queries, d_keys and d_entries [., width] and d_sink [heads].
inline void attention_gradient(const AttentionBatch& in, const float* d_o, float* d_q, float* d_keys, float* d_entries,
                               float* d_sink) {
    KeyShares shares(in.sequences, in.kind.ratio, in.width, true);
    std::vector<float> sinks(shares.chunks.size() * static_cast<size_t>(in.heads));
    shares.run([&](const Chunk& chunk, int64_t number) {
        AttentionGradient(in, chunk, d_o, d_q, sinks.data() + number * in.heads).run();
    });
    shares.add_up(d_keys, d_entries);
    std::fill_n(d_sink, in.heads, 0.0f);
    for (size_t i = 0; i < sinks.size(); ++i) d_sink[i % static_cast<size_t>(in.heads)] += sinks[i];
}

}  // namespace dsv4::DSV4_ISA
