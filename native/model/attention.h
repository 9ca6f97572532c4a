// Attention of one token over its window and the compressed entries that it sees, and the indexer that picks them.
//
// A token's keys have one order: its window by position, then its entries by number. Scores are chains over the
// channels, the output of a channel and the sum of the weights are chains over the keys. The sink is added last.
#pragma once

#include <vector>

#include "gemm/micro_kernel.h"
#include "model/compressor.h"

namespace dsv4::DSV4_ISA {

#if defined(DSV4_ISA_AVX512)
constexpr int SCORE_ROWS = 8, SCORE_PANELS = 2, VALUE_SLICES = 4;
#else
constexpr int SCORE_ROWS = 6, SCORE_PANELS = 1, VALUE_SLICES = 1;
#endif
constexpr int64_t SCORE_KEYS = SCORE_PANELS * LANES;

// R queries times P panels [width][16] of keys.
template <int R, int P>
[[gnu::noinline]] inline void score_tile(const float* const* q, int64_t width, const float* panels, float* const* y) {
    V acc[R][P];
    clear(acc);
    RowPointers rows{q};
    multiply_panels<1>(acc, rows, 1, width, panels, width * LANES);
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) store(y[r] + p * LANES, acc[r][p]);
}

template <int P>
inline void score_rows(const float* const* q, int64_t rows, const float* panels, int64_t width, float* to, int64_t stride) {
    for (int64_t r = 0; r < rows;) {
        const int count = next_rows<SCORE_ROWS>(rows - r);
        float* y[SCORE_ROWS];
        for (int j = 0; j < count; ++j) y[j] = to + (r + j) * stride;
        with_count<SCORE_ROWS>(count, [&](auto block) __attribute__((always_inline)) {
            score_tile<decltype(block)::value, P>(q + r, width, panels, y);
        });
        r += count;
    }
}

// Scores of `rows` queries against up to SCORE_KEYS packed keys: to[r * stride + j], written for whole panels.
inline void score_keys(const float* const* q, int64_t rows, const float* panels, int64_t keys, int64_t width, float* to, int64_t stride) {
    if (keys > LANES)
        score_rows<SCORE_PANELS>(q, rows, panels, width, to, stride);
    else
        score_rows<1>(q, rows, panels, width, to, stride);
}

// Up to SCORE_KEYS keys as panels.
inline void pack_keys(const float* const* keys, int64_t count, int64_t width, float* panels) {
    for (int64_t at = 0; at < count; at += LANES)
        pack_rows(keys + at, static_cast<int>(std::min<int64_t>(LANES, count - at)), width, panels + at * width);
}

// R heads of one token, all keys, S * 16 channels from d on: out_h = sum_j p_hj * value_j over total_h, which the first channels
// compute: sum_j p_hj + exp(sink - top).
template <int R, int S, bool FIRST>
inline void weigh_slice(float* const* p, const float* const* values, int64_t keys, int64_t d, int last, const float* sink_weight, V* total,
                        float* const* out) {
    V acc[R][S];
    for (int r = 0; r < R; ++r)
        for (int s = 0; s < S; ++s) acc[r][s] = zero();
    for (int64_t j = 0; j < keys; ++j) {
        V value[S];
        for (int s = 0; s < S; ++s)
            value[s] = s < S - 1 || last == LANES ? load(values[j] + d + s * LANES) : load_n(values[j] + d + s * LANES, last);
        for (int r = 0; r < R; ++r) {
            V weight = set1(p[r][j]);
            for (int s = 0; s < S; ++s) acc[r][s] = fma(weight, value[s], acc[r][s]);
            if (FIRST) total[r] = add(total[r], weight);
        }
    }
    for (int r = 0; r < R; ++r) {
        if (FIRST) total[r] = add(total[r], set1(sink_weight[r]));
        for (int s = 0; s < S; ++s) store_n(out[r] + d + s * LANES, div(acc[r][s], total[r]), s < S - 1 ? LANES : last);
    }
}

template <int R>
inline void weigh(float* const* p, const float* const* values, int64_t keys, int64_t width, const float* sink_weight, float* const* out) {
    V total[R];
    for (int r = 0; r < R; ++r) total[r] = zero();
    auto slices = [&](auto count, int64_t d) {
        constexpr int S = decltype(count)::value;
        const int last = static_cast<int>(std::min<int64_t>(LANES, width - d - (S - 1) * LANES));
        d == 0 ? weigh_slice<R, S, true>(p, values, keys, d, last, sink_weight, total, out)
               : weigh_slice<R, S, false>(p, values, keys, d, last, sink_weight, total, out);
    };
    int64_t d = 0;
    for (; d + (VALUE_SLICES - 1) * LANES < width; d += VALUE_SLICES * LANES) slices(std::integral_constant<int, VALUE_SLICES>{}, d);
    for (; d < width; d += LANES) slices(std::integral_constant<int, 1>{}, d);
}

constexpr int WEIGHTED_HEADS = 4;

inline void weigh_rows(int rows, float* const* p, const float* const* values, int64_t keys, int64_t width,
                       const float* sink_weight, float* const* out) {
    with_count<WEIGHTED_HEADS>(rows, [&](auto block) __attribute__((always_inline)) {
        weigh<decltype(block)::value>(p, values, keys, width, sink_weight, out);
    });
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
    int64_t window_columns = (window + SCORE_KEYS - 1) / SCORE_KEYS * SCORE_KEYS;
    auto seen = [&](int64_t t) { return keys.entries ? (start + t + 1) / keys.ratio : 0; };
    auto sparse = [&](int64_t t) { return keys.top_k && seen(t) > keys.top_k; };
    int64_t most = 0, shared = 0;  // entries of any token; of the tokens that read all of theirs
    for (int64_t t = 0; t < tokens; ++t) {
        most = std::max(most, sparse(t) ? keys.top_k : seen(t));
        if (!sparse(t)) shared = std::max(shared, seen(t));
    }
    int64_t stride = window_columns + (most + SCORE_KEYS - 1) / SCORE_KEYS * SCORE_KEYS;
    float* scores = scratch(Scratch::scores, rows * stride);
    float* panels = scratch(Scratch::panel, D * SCORE_KEYS);
    std::vector<const float*> query(static_cast<size_t>(rows));
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < heads; ++h)
            query[static_cast<size_t>(t * heads + h)] = q + t * q_stride + (h0 + h) * D;

    for (int64_t i = 0; i < window; i += SCORE_KEYS) {
        int64_t count = std::min(SCORE_KEYS, window - i);
        pack_keys(keys.window.data() + i, count, D, panels);
        score_keys(query.data(), rows, panels, count, D, scores + i, stride);
    }
    const float* from[SCORE_KEYS];
    for (int64_t e = 0; e < shared; e += SCORE_KEYS) {
        int64_t count = std::min(SCORE_KEYS, shared - e);
        for (int64_t j = 0; j < count; ++j) from[j] = (*keys.entries)[e + j];
        pack_keys(from, count, D, panels);
        for (int64_t t = 0; t < tokens; ++t)
            if (!sparse(t) && e < seen(t))
                score_keys(query.data() + t * heads, heads, panels, count, D, scores + t * heads * stride + window_columns + e, stride);
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
            for (int64_t e = 0; e < entries; e += SCORE_KEYS) {
                int64_t count = std::min(SCORE_KEYS, entries - e);
                pack_keys(values.data() + (c1 - c0) + e, count, D, panels);
                score_keys(query.data() + t * heads, heads, panels, count, D, token_scores + window_columns + e, stride);
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
