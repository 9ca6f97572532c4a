// Attention of one token over its window and the compressed entries that it sees, and the indexer that picks them.
//
// A token's keys have one order: its window by position, then its entries by number. Scores are chains over the
// channels, the output of a channel and the sum of the weights are chains over the keys. The sink is added last.
#pragma once

#include <vector>

#include "compressor.h"

namespace dsv4::DSV4_ISA {

// R queries times a panel [width][16] of keys.
template <int R>
inline void score_tile(const float* const* q, int64_t width, const float* panel, float* const* y) {
    V acc[R];
    for (int r = 0; r < R; ++r) acc[r] = zero();
    for (int64_t k = 0; k < width; ++k) {
        V b = load(panel + k * LANES);
        for (int r = 0; r < R; ++r) acc[r] = fma(set1(q[r][k]), b, acc[r]);
    }
    for (int r = 0; r < R; ++r) store(y[r], acc[r]);
}

// Scores of `rows` queries against up to 16 keys: to[r * stride + j].
inline void score_panel(const float* const* q, int64_t rows, const float* panel, int64_t width, float* to,
                        int64_t stride) {
    constexpr int MOST = 6;
    for (int64_t r = 0; r < rows;) {
        int64_t tiles = (rows - r + MOST - 1) / MOST;
        int count = static_cast<int>((rows - r + tiles - 1) / tiles);
        float* y[MOST];
        for (int j = 0; j < count; ++j) y[j] = to + (r + j) * stride;
        switch (count) {
#define DSV4_CASE(R) \
    case R: score_tile<R>(q + r, width, panel, y); break
            DSV4_CASE(1);
            DSV4_CASE(2);
            DSV4_CASE(3);
            DSV4_CASE(4);
            DSV4_CASE(5);
            DSV4_CASE(6);
#undef DSV4_CASE
            default: std::abort();
        }
        r += count;
    }
}

// R heads of one token, all keys: out_h = sum_j p_hj * value_j over sum_j p_hj + exp(sink - top).
template <int R>
inline void weigh(float* const* p, const float* const* values, int64_t keys, int64_t width, const float* sink_weight,
                  float* const* out) {
    V total[R];
    for (int r = 0; r < R; ++r) total[r] = zero();
    for (int64_t d = 0; d < width; d += LANES) {
        int left = static_cast<int>(std::min<int64_t>(LANES, width - d));
        V acc[R];
        for (int r = 0; r < R; ++r) acc[r] = zero();
        for (int64_t j = 0; j < keys; ++j) {
            V value = left == LANES ? load(values[j] + d) : load_n(values[j] + d, left);
            for (int r = 0; r < R; ++r) {
                V weight = set1(p[r][j]);
                acc[r] = fma(weight, value, acc[r]);
                if (d == 0) total[r] = add(total[r], weight);
            }
        }
        if (d == 0)
            for (int r = 0; r < R; ++r) total[r] = add(total[r], set1(sink_weight[r]));
        for (int r = 0; r < R; ++r) store_n(out[r] + d, div(acc[r], total[r]), left);
    }
}

inline void weigh_rows(int rows, float* const* p, const float* const* values, int64_t keys, int64_t width,
                       const float* sink_weight, float* const* out) {
    switch (rows) {
#define DSV4_CASE(R) \
    case R: return weigh<R>(p, values, keys, width, sink_weight, out)
        DSV4_CASE(1);
        DSV4_CASE(2);
        DSV4_CASE(3);
        DSV4_CASE(4);
#undef DSV4_CASE
        default: std::abort();
    }
}

// The keys that a block of neighbouring tokens of one sequence reads. window[i] is the key of position window_start + i.
struct Keys {
    int64_t window_start;
    std::vector<const float*> window;
    const Entries* entries;  // null without compression
    int64_t ratio, top_k;    // top_k 0: no indexer
    const int32_t* chosen;   // [tokens, top_k], read for tokens that see more than top_k entries
};

// q [tokens, heads of this block, D] at stride q_stride a token, already scaled; heads [h0, h1). out like q.
inline void attend(float* q, int64_t q_stride, int64_t tokens, int64_t start, int64_t h0, int64_t h1, int64_t D,
                   const Keys& keys, const float* sink, float* out) {
    int64_t heads = h1 - h0, rows = tokens * heads;
    int64_t window = static_cast<int64_t>(keys.window.size());
    int64_t window_columns = (window + LANES - 1) / LANES * LANES;
    auto seen = [&](int64_t t) { return keys.entries ? (start + t + 1) / keys.ratio : 0; };
    auto sparse = [&](int64_t t) { return keys.top_k && seen(t) > keys.top_k; };
    int64_t most = 0, shared = 0;  // entries of any token; of the tokens that read all of theirs
    for (int64_t t = 0; t < tokens; ++t) {
        most = std::max(most, sparse(t) ? keys.top_k : seen(t));
        if (!sparse(t)) shared = std::max(shared, seen(t));
    }
    int64_t stride = window_columns + (most + LANES - 1) / LANES * LANES;
    float* scores = scratch(Scratch::scores, rows * stride);
    float* panel = scratch(Scratch::panel, D * LANES);
    std::vector<const float*> query(static_cast<size_t>(rows));
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < heads; ++h)
            query[static_cast<size_t>(t * heads + h)] = q + t * q_stride + (h0 + h) * D;

    for (int64_t i = 0; i < window; i += LANES) {
        int count = static_cast<int>(std::min<int64_t>(LANES, window - i));
        pack_rows(keys.window.data() + i, count, D, panel);
        score_panel(query.data(), rows, panel, D, scores + i, stride);
    }
    const float* from[LANES];
    for (int64_t e = 0; e < shared; e += LANES) {
        int count = static_cast<int>(std::min<int64_t>(LANES, shared - e));
        for (int j = 0; j < count; ++j) from[j] = (*keys.entries)[e + j];
        pack_rows(from, count, D, panel);
        for (int64_t t = 0; t < tokens; ++t)
            if (!sparse(t) && e < seen(t))
                score_panel(query.data() + t * heads, heads, panel, D, scores + t * heads * stride + window_columns + e,
                            stride);
    }
    std::vector<const float*> values(static_cast<size_t>(std::min<int64_t>(window, WINDOW) + most));
    for (int64_t t = 0; t < tokens; ++t) {
        int64_t position = start + t;
        int64_t c0 = std::max<int64_t>(0, position - WINDOW + 1) - keys.window_start;
        int64_t c1 = position + 1 - keys.window_start;
        int64_t entries = sparse(t) ? keys.top_k : seen(t);
        const int32_t* chosen = sparse(t) ? keys.chosen + t * keys.top_k : nullptr;
        const float** value = values.data();
        for (int64_t c = c0; c < c1; ++c) *value++ = keys.window[static_cast<size_t>(c)];
        for (int64_t e = 0; e < entries; ++e) *value++ = (*keys.entries)[chosen ? chosen[e] : e];
        float* token_scores = scores + t * heads * stride;
        if (chosen)
            for (int64_t e = 0; e < entries; e += LANES) {
                int count = static_cast<int>(std::min<int64_t>(LANES, entries - e));
                pack_rows(values.data() + (c1 - c0) + e, count, D, panel);
                score_panel(query.data() + t * heads, heads, panel, D, token_scores + window_columns + e, stride);
            }
        for (int64_t h = 0; h < heads;) {
            int count = static_cast<int>(std::min<int64_t>(4, heads - h));
            float* p[4];
            float* to[4];
            float sink_weight[4];
            for (int r = 0; r < count; ++r) {
                float* row = token_scores + (h + r) * stride;
                // The entries' scores move up to the window's, so that a token's keys lie side by side.
                p[r] = row + c0;
                std::copy_n(row + window_columns, entries, row + c1);
                to[r] = out + t * q_stride + (h0 + h + r) * D;
                int64_t n = c1 - c0 + entries;
                V top = set1(sink[h0 + h + r]);
                for (int64_t i = 0; i < n; i += LANES) {
                    int left = static_cast<int>(std::min<int64_t>(LANES, n - i));
                    V x = load_n(p[r] + i, left);
                    if (left < LANES) {  // the missing lanes are zeros, which must not count
                        alignas(64) float part[LANES];
                        store(part, x);
                        for (int j = left; j < LANES; ++j) part[j] = part[0];
                        x = load(part);
                    }
                    top = max(top, x);
                }
                float highest_score = highest(top);
                for (int64_t i = 0; i < n; i += LANES) {
                    int left = static_cast<int>(std::min<int64_t>(LANES, n - i));
                    store_n(p[r] + i, exp(sub(load_n(p[r] + i, left), set1(highest_score))), left);
                }
                sink_weight[r] = exp1(sink[h0 + h + r] - highest_score);
            }
            weigh_rows(count, p, values.data(), c1 - c0 + entries, D, sink_weight, to);
            h += count;
        }
    }
}

}  // namespace dsv4::DSV4_ISA
