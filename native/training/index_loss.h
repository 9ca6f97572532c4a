// The indexer's loss: per token, KL(attention's probabilities of the entries that it reads || softmax of their index
// scores); and its gradient, for one value per token alike.
#pragma once

#include <algorithm>
#include <vector>

#include "gemm/block_products.h"
#include "model/attention.h"
#include "training/key_shares.h"
#include "training/row_gradients.h"

namespace dsv4::DSV4_ISA {

// A token that sees more than k entries reads those chosen, others all.
struct IndexLossBatch {
    const float *q, *weights, *keys;  // [T, heads, width], [T, heads], index keys [., width]
    const int32_t* chosen;            // [T, k]
    const float* probs;               // [T, k], of the entries that a token reads, in order; need not add up to 1
    Sequences sequences;
    int64_t heads, width, k;

    int64_t visible(int64_t position) const { return (position + 1) / CSA.ratio; }
    bool sparse(int64_t position) const { return visible(position) > k; }
    int64_t read(int64_t position) const { return std::min(k, visible(position)); }
};

// Gradients of the sum of the losses; null: not computed.
struct IndexLossGradients {
    float *q, *weights, *keys;
};

// KL of n entries with probabilities p and index scores; with `differentiate` the scores become their gradients.
inline float index_kl(const float* p, float* scores, int64_t n, bool differentiate) {
    float total = 0.0f, top = -INFINITY, sum_exp = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        total += p[i];
        top = std::max(top, scores[i]);
    }
    const float factor = 1.0f / std::max(total, 1e-20f);
    thread_local std::vector<float> memory;
    memory.resize(static_cast<size_t>(n));
    float* weights = memory.data();
    for (int64_t i = 0; i < n; i += LANES) {
        const int left = lanes_left(n, i);
        store_n(weights + i, exp(sub(load_n(scores + i, left), set1(top))), left);
    }
    for (int64_t i = 0; i < n; ++i) sum_exp += weights[i];
    const float log_sum = std::log(sum_exp);
    float loss = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        const float own = p[i] * factor;
        loss += own * (std::log(std::max(own, 1e-20f)) - (scores[i] - top - log_sum));
        if (differentiate) scores[i] = weights[i] / sum_exp * (total * factor) - own;
    }
    return loss;
}

// The tokens of one chunk, block by block. A (token, head) pair is a row of products with the entries' index keys.
class IndexLoss {
   public:
    IndexLoss(const IndexLossBatch& in, const Chunk& chunk, float* losses, const IndexLossGradients& to)
        : in_(in), chunk_(chunk), losses_(losses), to_(to) {}

    void run() {
        const int64_t block = block_tokens(in_.heads);
        for (int64_t t = 0; t < chunk_.count; t += block) run_block(t, std::min(block, chunk_.count - t));
    }

   private:
    void run_block(int64_t first, int64_t tokens) {
        const int64_t H = in_.heads, W = in_.width;
        start_ = chunk_.start + first;
        row_ = chunk_.row + first;
        rows_ = tokens * H;
        int64_t dense = 0;
        while (dense < tokens && !in_.sparse(start_ + dense)) ++dense;
        const int64_t shared = dense ? in_.read(start_ + dense - 1) : 0, picked = dense < tokens ? in_.k : 0,
                      most = std::max(shared, picked);
        stride_ = (most + SCORE_KEYS - 1) / SCORE_KEYS * SCORE_KEYS;
        dots_ = scratch(Scratch::probabilities, rows_ * stride_);
        scores_ = scratch(Scratch::score_gradients, stride_);
        panels_ = scratch(Scratch::panel, W * SCORE_KEYS);
        queries_.clear();
        for (int64_t r = 0; r < rows_; ++r) queries_.push_back(in_.q + (row_ * H + r) * W);
        if (to_.q) {
            key_channels_ = scratch(Scratch::key_channels, channel_panels_size(most, W));
            q_channels_ = scratch(Scratch::query_channels, channel_panels_size(rows_, W));
            pack_channels(queries_.data(), rows_, W, q_channels_);
            std::fill_n(to_.q + row_ * H * W, rows_ * W, 0.0f);
        }
        std::vector<const float*> keys;
        for (int64_t e = 0; e < shared; ++e) keys.push_back(key(e));
        run_tokens(0, dense, keys, chunk_.entry_share);
        for (int64_t t = dense; t < tokens; ++t) {
            const int32_t* numbers = in_.chosen + (row_ + t) * in_.k;
            keys.clear();
            for (int64_t e = 0; e < picked; ++e) keys.push_back(key(numbers[e]));
            float* to = scratch(Scratch::key_gradients, picked * W);
            std::fill_n(to, picked * W, 0.0f);
            run_tokens(t, 1, keys, to);
            for (int64_t e = 0; to_.q && e < picked; ++e)
                for (int64_t i = 0; i < W; ++i) chunk_.entry_share[numbers[e] * W + i] += to[e * W + i];
        }
    }

    const float* key(int64_t e) const { return in_.keys + (chunk_.entry_row + e) * in_.width; }

    // Losses and gradients of tokens [first, first + count) of the block, which read the first of the keys, each as many
    // as it reads.
    void run_tokens(int64_t first, int64_t count, const std::vector<const float*>& keys, float* d_keys) {
        const int64_t H = in_.heads, W = in_.width, n = static_cast<int64_t>(keys.size());
        for (int64_t i = 0; count && i < n; i += SCORE_KEYS) {
            const int64_t some = std::min(SCORE_KEYS, n - i);
            pack_keys(keys.data() + i, some, W, panels_);
            score_keys(queries_.data() + first * H, count * H, panels_, some, W, dots_ + first * H * stride_ + i,
                       stride_);
        }
        for (int64_t t = first; t < first + count; ++t) run_token(t, n);
        if (!to_.q || !count || !n) return;
        const float* d_dots = dots_ + first * H * stride_;
        pack_channels(keys.data(), n, W, key_channels_);
        add_products(d_dots, stride_, 1, count * H, n, {key_channels_, n * LANES, W}, to_.q + (row_ + first) * H * W);
        add_products(d_dots, 1, stride_, n, count * H, {q_channels_ + first * H * LANES, rows_ * LANES, W}, d_keys);
    }

    // A token's loss; the products in its rows, of `keys` keys, become their gradients.
    void run_token(int64_t t, int64_t keys) {
        const int64_t H = in_.heads, n = in_.read(start_ + t), row = row_ + t;
        const float* weights = in_.weights + row * H;
        float* dots = dots_ + t * H * stride_;
        for (int64_t i = 0; i < n; i += LANES) {
            V score = zero();
            for (int64_t h = 0; h < H; ++h)
                score = fma(set1(weights[h]), max(load(dots + h * stride_ + i), zero()), score);
            store(scores_ + i, score);
        }
        losses_[row] = n ? index_kl(in_.probs + row * in_.k, scores_, n, to_.q != nullptr) : 0.0f;
        if (!to_.q) return;
        for (int64_t h = 0; h < H; ++h) {
            float* dot = dots + h * stride_;
            V along = zero();
            for (int64_t i = 0; i < n; i += LANES) {
                const int left = lanes_left(n, i);
                const V own = load_n(dot + i, left), pull = load_n(scores_ + i, left);
                along = fma(pull, max(own, zero()), along);
                store_n(dot + i, select(above(own, zero()), mul(pull, set1(weights[h])), zero()), left);
            }
            if (n < keys) std::fill(dot + n, dot + keys, 0.0f);
            to_.weights[row * H + h] = sum(along);
        }
    }

    const IndexLossBatch& in_;
    const Chunk& chunk_;
    float* losses_;
    const IndexLossGradients& to_;
    int64_t start_ = 0, row_ = 0, rows_ = 0, stride_ = 0;
    float *dots_ = nullptr, *scores_ = nullptr, *panels_ = nullptr, *key_channels_ = nullptr, *q_channels_ = nullptr;
    std::vector<const float*> queries_;
};

// losses [T], and the gradients of their sum.
inline void index_losses(const IndexLossBatch& in, float* losses, const IndexLossGradients& to) {
    KeyShares shares(in.sequences, CSA.ratio, in.width, false);
    shares.run([&](const Chunk& chunk, int64_t) { IndexLoss(in, chunk, losses, to).run(); });
    if (to.q) shares.add_up(nullptr, to.keys);
}

}  // namespace dsv4::DSV4_ISA
