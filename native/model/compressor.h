// Compression: pools the projections of each closed window of tokens into one entry.
#pragma once

#include <cassert>
#include <vector>

#include "base/stored_rows.h"
#include "gemm/gemm.h"

namespace dsv4::DSV4_ISA {

// Consecutive tokens of one sequence in a ubatch: rows [first, first + count) have positions [start, start + count).
struct Segment {
    int64_t first, count, start, slot;
};

// Entries of a sequence by number, through its row of the block table; the ratio is a power of two.
struct Entries {
    StoredRows pool;
    const int64_t* pages;
    int64_t width;
    const float* decoded = nullptr;  // all entries that are read, as fp32 [., width]; null: they are where they lie
    int shift;                       // a page has 2^shift entries: a shift is cheaper than a division per entry

    Entries(const StoredRows& pool_, const Cache& cache, int64_t slot, int64_t ratio)
        : pool(pool_),
          pages(cache.block_table + slot * cache.pages_per_slot),
          width(pool_.format.width),
          shift(__builtin_ctzll(static_cast<unsigned long long>(PAGE_TOKENS / ratio))) {
        assert(PAGE_TOKENS / ratio == int64_t{1} << shift);
    }
    int64_t row(int64_t e) const { return (pages[e >> shift] << shift) + (e & ((int64_t{1} << shift) - 1)); }
    uint8_t* stored(int64_t e) const { return pool.row(row(e)); }
    // True if entries need no memory to be read.
    bool direct() const { return decoded || pool.format.kind == RowKind::f32; }
    // Entry e where it lies, as fp32; for direct entries.
    const float* in_place(int64_t e) const {
        return decoded ? decoded + e * width : reinterpret_cast<const float*>(pool.row(row(e)));
    }
    // Entry e as fp32: where it lies, or decoded into memory [width].
    const float* read(int64_t e, float* memory) const {
        return decoded ? decoded + e * width : read_row(pool, row(e), memory);
    }
};

// Softmax-weighted sum over the slots of a window, channel by channel. Slots are in the order of their tokens; a slot
// without a score (null) is skipped. Numerator and denominator of a channel are chains over the slots.
inline void pool(const float* const* kv, const float* const* score, int64_t slots, int64_t width, float* to) {
    for (int64_t i = 0; i < width; i += LANES) {
        int left = static_cast<int>(std::min<int64_t>(LANES, width - i));
        V top = set1(-INFINITY), total = zero(), acc = zero();
        for (int64_t k = 0; k < slots; ++k)
            if (score[k]) top = max(top, load_n(score[k] + i, left));
        for (int64_t k = 0; k < slots; ++k) {
            if (!score[k]) continue;
            V weight = exp(sub(load_n(score[k] + i, left), top));
            total = add(total, weight);
            acc = fma(weight, load_n(kv[k] + i, left), acc);
        }
        store_n(to + i, div(acc, total), left);
    }
}

// Writes the entries of the windows that a segment closes to `cache`, those of stored tokens excepted, then the state
// that later windows need. kv and score are the ubatch's projections [rows, total], ape included. finish(entry,
// position) runs on each entry before it is stored.
template <class Finish>
inline void compress(const Compressor& c, const Segment& s, const Cache& pages, const CompressorCache& cache,
                     const float* kv, const float* score, Finish finish) {
    int64_t ratio = c.kind.ratio, rows = c.kind.state_tokens(), end = s.start + s.count;
    const Entries entries(cache.entries, pages, s.slot, ratio);
    float* old_kv = cache.kv + s.slot * rows * c.total;
    float* old_score = cache.score + s.slot * rows * c.total;
    int64_t stored = pages.stored ? pages.stored[s.slot] : 0, first = std::max(s.start, stored) / ratio,
            last = end / ratio;
    std::vector<float> entry(static_cast<size_t>(c.width));
    std::vector<const float*> from(static_cast<size_t>(2 * rows));
    for (int64_t window = first; window < last; ++window) {
        for (int64_t k = 0; k < rows; ++k) {
            int64_t position = window * ratio - (rows - ratio) + k;
            // With overlap the first half of the channels comes from the window before, the second from this one.
            int64_t half = c.kind.overlap && k >= ratio ? c.width : 0;
            auto at = [&](const float* fresh, const float* old) -> const float* {
                if (position < 0) return nullptr;
                if (position >= s.start) return fresh + (s.first + position - s.start) * c.total + half;
                return old + position % rows * c.total + half;
            };
            from[static_cast<size_t>(k)] = at(kv, old_kv);
            from[static_cast<size_t>(rows + k)] = at(score, old_score);
        }
        pool(from.data(), from.data() + rows, rows, c.width, entry.data());
        finish(entry.data(), window * ratio);
        encode_row(cache.entries.format, entry.data(), entries.stored(window));
        if (cache.quantized) cache.quantized->invalidate(entries.row(window));
    }
    for (int64_t position = std::max(s.start, end - rows); position < end; ++position) {
        int64_t row = (s.first + position - s.start) * c.total, to = position % rows * c.total;
        std::copy_n(kv + row, c.total, old_kv + to);
        std::copy_n(score + row, c.total, old_score + to);
    }
}

}  // namespace dsv4::DSV4_ISA
