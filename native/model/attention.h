// Attention over the sliding window and the visible compressed entries.
//
// Order of sums: a token's keys are its window by position, then its entries by number. A score is one chain of fused
// multiply-adds over the channels; an output channel and the sum of the weights are chains over the keys. The sink is
// added last.
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

// Scores of R queries with P panels [width][16] of keys.
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
inline void score_rows(const float* const* q, int64_t rows, const float* panels, int64_t width, float* to,
                       int64_t stride) {
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

// to[r * stride + j] = scores of `rows` queries with up to SCORE_KEYS packed keys; whole panels are written.
inline void score_keys(const float* const* q, int64_t rows, const float* panels, int64_t keys, int64_t width, float* to,
                       int64_t stride) {
    if (keys > LANES)
        score_rows<SCORE_PANELS>(q, rows, panels, width, to, stride);
    else
        score_rows<1>(q, rows, panels, width, to, stride);
}

// Packs up to SCORE_KEYS keys into panels [width][16].
inline void pack_keys(const float* const* keys, int64_t count, int64_t width, float* panels) {
    for (int64_t at = 0; at < count; at += LANES)
        pack_rows(keys + at, static_cast<int>(std::min<int64_t>(LANES, count - at)), width, panels + at * width);
}

// Output channels [d, d + S * 16) of R heads of one token: out_h = sum_j p_hj * value_j / total_h. The first slice also
// computes total_h = sum_j p_hj + exp(sink - highest score).
template <int R, int S, bool FIRST>
inline void weigh_slice(float* const* p, const float* const* values, int64_t keys, int64_t d, int last,
                        const float* sink_weight, V* total, float* const* out) {
    V acc[R][S];
    for (int r = 0; r < R; ++r)
        for (int s = 0; s < S; ++s) acc[r][s] = zero();
    for (int64_t j = 0; j < keys; ++j) {
        V value[S];
        for (int s = 0; s < S; ++s)
            value[s] =
                s < S - 1 || last == LANES ? load(values[j] + d + s * LANES) : load_n(values[j] + d + s * LANES, last);
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
inline void weigh(float* const* p, const float* const* values, int64_t keys, int64_t width, const float* sink_weight,
                  float* const* out) {
    V total[R];
    for (int r = 0; r < R; ++r) total[r] = zero();
    auto slices = [&](auto count, int64_t d) {
        constexpr int S = decltype(count)::value;
        const int last = static_cast<int>(std::min<int64_t>(LANES, width - d - (S - 1) * LANES));
        d == 0 ? weigh_slice<R, S, true>(p, values, keys, d, last, sink_weight, total, out)
               : weigh_slice<R, S, false>(p, values, keys, d, last, sink_weight, total, out);
    };
    int64_t d = 0;
    for (; d + (VALUE_SLICES - 1) * LANES < width; d += VALUE_SLICES * LANES)
        slices(std::integral_constant<int, VALUE_SLICES>{}, d);
    for (; d < width; d += LANES) slices(std::integral_constant<int, 1>{}, d);
}

constexpr int WEIGHTED_HEADS = 4;

inline void weigh_rows(int rows, float* const* p, const float* const* values, int64_t keys, int64_t width,
                       const float* sink_weight, float* const* out) {
    with_count<WEIGHTED_HEADS>(rows, [&](auto block) __attribute__((always_inline)) {
        weigh<decltype(block)::value>(p, values, keys, width, sink_weight, out);
    });
}

// Keys of a block of neighbouring tokens of one sequence. window[i] is the key of position window_start + i.
struct AttentionKeys {
    int64_t window_start;
    std::vector<const float*> window;
    const Entries* entries;   // null without compression
    int64_t ratio, top_k;     // top_k 0: no indexer
    const int32_t* selected;  // [tokens, top_k], read for tokens that see more than top_k entries

    int64_t visible_entries(int64_t position) const { return entries ? (position + 1) / ratio : 0; }
    bool sparse(int64_t position) const { return top_k && visible_entries(position) > top_k; }
    int64_t attended_entries(int64_t position) const { return sparse(position) ? top_k : visible_entries(position); }
};

// Replaces the scores p[0..n) by e^(score - highest), the sink counting as a score. Returns the sink's weight.
inline float exponentiate_scores(float* p, int64_t n, float sink) {
    V top = set1(sink);
    for (int64_t i = 0; i < n; i += LANES) {
        int left = static_cast<int>(std::min<int64_t>(LANES, n - i));
        V x = load_n(p + i, left);
        if (left < LANES) {  // load_n fills the missing lanes with zeros, which must not raise the maximum
            alignas(64) float part[LANES];
            store(part, x);
            for (int j = left; j < LANES; ++j) part[j] = part[0];
            x = load(part);
        }
        top = max(top, x);
    }
    const float highest_score = highest(top);
    for (int64_t i = 0; i < n; i += LANES) {
        int left = static_cast<int>(std::min<int64_t>(LANES, n - i));
        store_n(p + i, exp(sub(load_n(p + i, left), set1(highest_score))), left);
    }
    return exp1(sink - highest_score);
}

// Adds the probabilities of the last `entries` of n keys with weights p and a sink's weight.
inline void add_probabilities(const float* p, int64_t n, float sink_weight, int64_t entries, float* probs) {
    float total = sink_weight;
    for (int64_t i = 0; i < n; ++i) total += p[i];
    for (int64_t e = 0; e < entries; ++e) probs[e] += p[n - entries + e] / total;
}

// Attention of some heads of a block of neighbouring tokens. Each (token, head) has a row of scores: first the columns
// of the block's window, then, from window_columns on, those of the token's entries.
class AttentionBlock {
   public:
    // q [tokens, q_stride]: head h's query of a token begins at (first_head + h) * width.
    AttentionBlock(const AttentionKeys& keys, const float* q, int64_t q_stride, int64_t tokens, int64_t start,
                   int64_t first_head, int64_t heads, int64_t width)
        : keys_(keys),
          tokens_(tokens),
          start_(start),
          heads_(heads),
          width_(width),
          window_columns_(whole_panels(static_cast<int64_t>(keys.window.size()))) {
        int64_t most = 0, selected = 0;
        for (int64_t t = 0; t < tokens; ++t) {
            const int64_t count = keys.attended_entries(start + t);
            most = std::max(most, count);
            if (keys.sparse(start + t))
                selected = std::max(selected, count);
            else
                shared_ = std::max(shared_, count);
        }
        if (most && !keys.entries->direct()) {
            entries_ = scratch(Scratch::entries, (shared_ + selected) * width);
            for (int64_t e = 0; e < shared_; ++e) keys.entries->read(e, entries_ + e * width);
        }
        stride_ = window_columns_ + whole_panels(most);
        scores_ = scratch(Scratch::scores, tokens * heads * stride_);
        panels_ = scratch(Scratch::panel, width * SCORE_KEYS);
        queries_.reserve(static_cast<size_t>(tokens * heads));
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t h = 0; h < heads; ++h) queries_.push_back(q + t * q_stride + (first_head + h) * width);
        values_.resize(static_cast<size_t>(std::min<int64_t>(static_cast<int64_t>(keys.window.size()), WINDOW) + most));
    }

    void score_window() {
        const int64_t window = static_cast<int64_t>(keys_.window.size());
        for (int64_t i = 0; i < window; i += SCORE_KEYS) {
            const int64_t count = std::min(SCORE_KEYS, window - i);
            pack_keys(keys_.window.data() + i, count, width_, panels_);
            score_keys(queries_.data(), tokens_ * heads_, panels_, count, width_, scores_ + i, stride_);
        }
    }

    // Scores the entries of the dense tokens, which attend to all entries they see: packed once for the block.
    void score_shared_entries() {
        const float* from[SCORE_KEYS];
        for (int64_t e = 0; e < shared_; e += SCORE_KEYS) {
            const int64_t count = std::min(SCORE_KEYS, shared_ - e);
            for (int64_t j = 0; j < count; ++j) from[j] = shared_entry(e + j);
            pack_keys(from, count, width_, panels_);
            for (int64_t t = 0; t < tokens_; ++t)
                if (!keys_.sparse(start_ + t) && e < keys_.visible_entries(start_ + t)) score_entries(t, e, count);
        }
    }

    // Writes token t's output; head h's begins at out + h * width. probs, unless null: gets the probabilities of the
    // token's entries added, over its heads.
    void attend_token(int64_t t, const float* sink, float* out, float* probs) {
        const int64_t position = start_ + t, entries = keys_.attended_entries(position);
        const int64_t first = std::max<int64_t>(0, position - WINDOW + 1) - keys_.window_start;
        const int64_t stop = position + 1 - keys_.window_start, n = stop - first + entries;
        const int32_t* selected = keys_.sparse(position) ? keys_.selected + t * keys_.top_k : nullptr;
        const float** value = values_.data();
        for (int64_t c = first; c < stop; ++c) *value++ = keys_.window[static_cast<size_t>(c)];
        for (int64_t e = 0; e < entries; ++e)
            *value++ = selected ? keys_.entries->read(selected[e], entries_ + (shared_ + e) * width_) : shared_entry(e);
        for (int64_t e = 0; selected && e < entries; e += SCORE_KEYS) {
            const int64_t count = std::min(SCORE_KEYS, entries - e);
            pack_keys(values_.data() + (stop - first) + e, count, width_, panels_);
            score_entries(t, e, count);
        }
        for (int64_t h = 0; h < heads_; h += WEIGHTED_HEADS) {
            const int count = static_cast<int>(std::min<int64_t>(WEIGHTED_HEADS, heads_ - h));
            float *p[WEIGHTED_HEADS], *to[WEIGHTED_HEADS], sink_weight[WEIGHTED_HEADS];
            for (int r = 0; r < count; ++r) {
                float* row = scores_ + (t * heads_ + h + r) * stride_;
                // The entries' scores move up to the window's, so that a token's keys are contiguous.
                std::copy_n(row + window_columns_, entries, row + stop);
                p[r] = row + first;
                to[r] = out + (h + r) * width_;
                sink_weight[r] = exponentiate_scores(p[r], n, sink[h + r]);
                if (probs) add_probabilities(p[r], n, sink_weight[r], entries, probs);
            }
            weigh_rows(count, p, values_.data(), n, width_, sink_weight, to);
        }
    }

   private:
    static int64_t whole_panels(int64_t keys) { return (keys + SCORE_KEYS - 1) / SCORE_KEYS * SCORE_KEYS; }

    // Entry e of those that dense tokens attend to.
    const float* shared_entry(int64_t e) const { return entries_ ? entries_ + e * width_ : keys_.entries->in_place(e); }

    // Scores token t's heads with the packed entries [e, e + count) of the token.
    void score_entries(int64_t t, int64_t e, int64_t count) {
        score_keys(queries_.data() + t * heads_, heads_, panels_, count, width_,
                   scores_ + t * heads_ * stride_ + window_columns_ + e, stride_);
    }

    const AttentionKeys& keys_;
    int64_t tokens_, start_, heads_, width_, window_columns_, stride_;
    int64_t shared_ = 0;  // entries that the dense tokens attend to
    float *scores_, *panels_;
    float* entries_ = nullptr;  // decoded: the shared ones, then a sparse token's; null if they need not be
    std::vector<const float*> queries_, values_;
};

// Attention of heads [h0, h1). q [tokens, heads, width], q_stride per token, is scaled; out has q's layout. probs: see
// attend_token, [tokens, top_k].
inline void attend(const float* q, int64_t q_stride, int64_t tokens, int64_t start, int64_t h0, int64_t h1,
                   int64_t width, const AttentionKeys& keys, const float* sink, float* out, float* probs) {
    AttentionBlock block(keys, q, q_stride, tokens, start, h0, h1 - h0, width);
    block.score_window();
    block.score_shared_entries();
    for (int64_t t = 0; t < tokens; ++t)
        block.attend_token(t, sink + h0, out + t * q_stride + h0 * width, probs ? probs + t * keys.top_k : nullptr);
}

}  // namespace dsv4::DSV4_ISA
