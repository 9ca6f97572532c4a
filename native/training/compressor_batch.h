// Compression of sequences laid end to end, without a cache, and its gradient.
#pragma once

#include <vector>

#include "model/compressor.h"
#include "training/row_gradients.h"

namespace dsv4::DSV4_ISA {

// One layer's projections kv and score [rows, total], ape included: of each sequence those of up to state_tokens - 1
// earlier tokens, which its first window may reach, and its own.
struct CompressorBatch {
    CompressionKind kind;
    const float *kv, *score;
    int64_t total, width;  // channels per token, per entry
    Sequences sequences;

    int64_t earlier(int64_t s) const { return sequences.earlier(s, kind.state_tokens() - 1); }
};

// Calls f(slots, row, entry) for each closed window: row(k) is the offset in kv of slot k's channels, -1 before the
// sequence's start; entry the number of the entry among all sequences'.
template <class F>
inline void for_each_window(const CompressorBatch& in, F&& f) {
    struct Window {
        int64_t origin, number, entry;  // row of the sequence's position 0, perhaps negative; window in it; entry
    };
    std::vector<Window> windows;
    const int64_t ratio = in.kind.ratio, slots = in.kind.state_tokens();
    int64_t row = 0;
    for (int64_t s = 0; s < in.sequences.count; ++s) {
        const int64_t start = in.sequences.starts[s];
        row += in.earlier(s);
        for (int64_t w = start / ratio; w < in.sequences.end(s) / ratio; ++w)
            windows.push_back({row - start, w, static_cast<int64_t>(windows.size())});
        row += in.sequences.lengths[s];
    }
    for_each_row(static_cast<int64_t>(windows.size()), [&](int64_t i) {
        const Window& window = windows[static_cast<size_t>(i)];
        f(
            slots,
            [&](int64_t k) -> int64_t {
                const int64_t position = window.number * ratio - (slots - ratio) + k;
                // With overlap the first half of the channels comes from the window before, the second from this one.
                return position < 0
                           ? -1
                           : (window.origin + position) * in.total + (slots > ratio && k >= ratio ? in.width : 0);
            },
            window.entry);
    });
}

// entries [., width], of all closed windows in order.
inline void compress_batch(const CompressorBatch& in, float* entries) {
    for_each_window(in, [&](int64_t slots, auto row, int64_t entry) {
        thread_local std::vector<const float*> from;
        from.resize(static_cast<size_t>(2 * slots));
        for (int64_t k = 0; k < slots; ++k) {
            const int64_t at = row(k);
            from[static_cast<size_t>(k)] = at < 0 ? nullptr : in.kv + at;
            from[static_cast<size_t>(slots + k)] = at < 0 ? nullptr : in.score + at;
        }
        pool(from.data(), from.data() + slots, slots, in.width, entries + entry * in.width);
    });
}

// d_kv and d_score [rows, total], zero where a channel is in no closed window. Each channel of a token is in one
// window at most, so no two windows write to the same place.
inline void compress_gradient(const CompressorBatch& in, const float* d_entries, float* d_kv, float* d_score) {
    int64_t rows = 0;
    for (int64_t s = 0; s < in.sequences.count; ++s) rows += in.earlier(s) + in.sequences.lengths[s];
    for_each_rows(rows, [&](int64_t first, int64_t last) {
        std::fill(d_kv + first * in.total, d_kv + last * in.total, 0.0f);
        std::fill(d_score + first * in.total, d_score + last * in.total, 0.0f);
    });
    for_each_window(in, [&](int64_t slots, auto row, int64_t entry) {
        thread_local std::vector<const float*> from;
        thread_local std::vector<float*> to;
        from.resize(static_cast<size_t>(2 * slots));
        to.resize(static_cast<size_t>(2 * slots));
        for (int64_t k = 0; k < slots; ++k) {
            const int64_t at = row(k);
            const auto kv = static_cast<size_t>(k), score = static_cast<size_t>(slots + k);
            from[kv] = at < 0 ? nullptr : in.kv + at;
            from[score] = at < 0 ? nullptr : in.score + at;
            to[kv] = d_kv + std::max<int64_t>(at, 0);
            to[score] = d_score + std::max<int64_t>(at, 0);
        }
        pool_gradient(from.data(), from.data() + slots, slots, in.width, d_entries + entry * in.width, to.data(),
                      to.data() + slots);
    });
}

}  // namespace dsv4::DSV4_ISA
