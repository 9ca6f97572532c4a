// Gradients of keys and entries, to which many tokens add.
//
// Sequences are cut into chunks of tokens. A chunk is one task, which sums its own share of the gradients; the shares
// are then added in the order of the chunks. The cut depends on the lengths alone, so threads do not change a bit.
#pragma once

#include <algorithm>
#include <vector>

#include "model/ubatch.h"

namespace dsv4::DSV4_ISA {

constexpr int64_t CHUNK_TOKENS = 64, MOST_CHUNKS = 64;  // a chunk's least tokens, a sequence's most chunks
constexpr int64_t SCORED_ROWS = 64;                     // (token, head) pairs whose scores are in memory at a time

inline int64_t block_tokens(int64_t heads) { return std::clamp<int64_t>(SCORED_ROWS / heads, 1, 16); }

// Tokens at positions [start, start + count) of a sequence; the first has row `row`, its key row `key_row`, the
// sequence's first entry row `entry_row`.
struct Chunk {
    int64_t sequence, row, key_row, start, count, entry_row;
    int64_t entries;  // that its last token sees
    bool leads;       // the sequence's first chunk
    float *key_share = nullptr, *entry_share = nullptr;

    int64_t first_key() const { return std::max<int64_t>(0, start - WINDOW + 1); }  // position
    int64_t keys() const { return start + count - first_key(); }
    // Position of the first key whose gradient is added up with this chunk's: of its tokens, and of earlier ones before it.
    int64_t first_own_key() const { return leads ? first_key() : start; }
};

// The chunks of a batch of sequences. Before a sequence's own keys lie those of its earlier tokens that windows reach.
class KeyShares {
   public:
    // ratio: tokens per entry, 0 without entries; keyed: true if keys get shares too.
    KeyShares(const Sequences& sequences, int64_t ratio, int64_t width, bool keyed) : width_(width), keyed_(keyed) {
        int64_t row = 0, key_row = 0, entry = 0, size = 0;
        for (int64_t s = 0; s < sequences.count; ++s) {
            const int64_t length = sequences.lengths[s];
            const int64_t step = std::max(CHUNK_TOKENS, (length + MOST_CHUNKS - 1) / MOST_CHUNKS);
            key_row += sequences.earlier(s, WINDOW - 1);
            for (int64_t i = 0; i < length; i += step) {
                const int64_t count = std::min(step, length - i), start = sequences.starts[s] + i;
                chunks.push_back(
                    {s, row + i, key_row + i, start, count, entry, ratio ? (start + count) / ratio : 0, i == 0});
                size += (keyed ? chunks.back().keys() : 0) + chunks.back().entries;
            }
            row += length;
            key_row += length;
            entry += ratio ? sequences.end(s) / ratio : 0;
        }
        memory_.resize(static_cast<size_t>(size * width));
        float* to = memory_.data();
        for (Chunk& chunk : chunks) {
            chunk.key_share = to;
            if (keyed) to += chunk.keys() * width;
            chunk.entry_share = to;
            to += chunk.entries * width;
        }
    }

    // Calls f(chunk, its number) for every chunk, the last of a sequence, which see most entries, first.
    template <class F>
    void run(F&& f) {
        const auto count = static_cast<int64_t>(chunks.size());
        parallel(count, [&](int64_t task, int) {
            const int64_t number = count - 1 - task;
            f(chunks[static_cast<size_t>(number)], number);
        });
    }

    // Adds up the shares: d_keys [rows, width], unless null, and d_entries [., width] of all sequences' entries.
    void add_up(float* d_keys, float* d_entries) const {
        parallel(static_cast<int64_t>(chunks.size()), [&](int64_t number, int) {
            const Chunk& chunk = chunks[static_cast<size_t>(number)];
            if (keyed_)
                add_up_keys(static_cast<size_t>(number),
                            d_keys + (chunk.key_row - chunk.start + chunk.first_own_key()) * width_);
            // A chunk's own entries are those that the chunk before does not see.
            const int64_t before = chunk.leads ? 0 : chunks[static_cast<size_t>(number) - 1].entries;
            add_up_entries(static_cast<size_t>(number), before, d_entries + (chunk.entry_row + before) * width_);
        });
    }

    std::vector<Chunk> chunks;

   private:
    void add_up_keys(size_t number, float* to) const {
        const Chunk& own = chunks[number];
        const int64_t start = own.first_own_key(), end = own.start + own.count;
        std::copy_n(own.key_share + (start - own.first_key()) * width_, (end - start) * width_, to);
        for (size_t i = number + 1; i < chunks.size() && chunks[i].sequence == own.sequence; ++i) {
            const Chunk& later = chunks[i];
            const int64_t first = std::max(start, later.first_key()), count = end - first;
            if (count <= 0) return;
            add(later.key_share + (first - later.first_key()) * width_, count, to + (first - start) * width_);
        }
    }

    void add_up_entries(size_t number, int64_t before, float* to) const {
        const Chunk& own = chunks[number];
        const int64_t count = own.entries - before;
        std::copy_n(own.entry_share + before * width_, count * width_, to);
        for (size_t i = number + 1; i < chunks.size() && chunks[i].sequence == own.sequence; ++i)
            add(chunks[i].entry_share + before * width_, count, to);
    }

    void add(const float* from, int64_t rows, float* to) const {
        for (int64_t i = 0; i < rows * width_; ++i) to[i] += from[i];
    }

    int64_t width_;
    bool keyed_;
    std::vector<float> memory_;
};

}  // namespace dsv4::DSV4_ISA
