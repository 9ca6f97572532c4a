// A layer's index keys, quantized for the indexer's filter and kept beside the entries, in panels of 16 rows.
//
// The entries are authoritative. Panels belong to rows of the entry tensor, not to sequences: a page has whole panels,
// so sequences that share a page share its panels. Panels are re-quantized lazily after a write; every write to the
// entries must be followed by `invalidate`.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/aligned.h"

namespace dsv4 {

class IndexKeyCache {
   public:
    static constexpr int64_t ROWS = 16;  // rows per panel
    struct Bounds {
        float square = 0.0f, step = 0.0f;  // largest squared norm and largest step of a panel's keys
    };

    // rows: of the entry tensor. checked: keep a checksum of each quantized row, for `stale_row`.
    IndexKeyCache(int64_t rows, bool checked)
        : panels_((rows + ROWS - 1) / ROWS),
          valid_(static_cast<size_t>(panels_)),
          checksums_(checked ? static_cast<size_t>(panels_ * ROWS) : 0) {}

    // Marks a row of the entries as written; must follow every write.
    void invalidate(int64_t row) {
        uint8_t& valid = valid_[static_cast<size_t>(row / ROWS)];
        valid = std::min(valid, static_cast<uint8_t>(row % ROWS));
    }
    void invalidate(int64_t first, int64_t count) {
        for (int64_t row = first; row < first + count; ++row) invalidate(row);
    }

    // Allocates panels of `words` 16-bit values; a change of `words` invalidates all.
    void reserve(int64_t words) {
        if (words == words_) return;
        memory_.reserve(panels_ * words);
        steps_.reserve(panels_ * ROWS);
        bounds_.resize(static_cast<size_t>(panels_));
        words_ = words;
        std::fill(valid_.begin(), valid_.end(), uint8_t{0});
    }

    // Number of up-to-date rows of a panel; they are its first ones.
    int64_t valid_rows(int64_t panel) const { return valid_[static_cast<size_t>(panel)]; }
    const Bounds& bounds(int64_t panel) const { return bounds_[static_cast<size_t>(panel)]; }
    uint16_t* panel(int64_t panel) { return memory_.data() + panel * words_; }
    // Steps of a panel's keys, [ROWS]: a key is about its step times its quantized values.
    float* steps(int64_t panel) { return steps_.data() + panel * ROWS; }

    // Marks the first `rows` rows of a panel as quantized from index keys of `bytes` bytes each. Threads may call this
    // concurrently for different panels.
    void set_valid(int64_t panel, int64_t rows, const Bounds& bounds, const uint8_t* index_keys, int64_t bytes) {
        valid_[static_cast<size_t>(panel)] = static_cast<uint8_t>(rows);
        bounds_[static_cast<size_t>(panel)] = bounds;
        if (checksums_.empty()) return;
        for (int64_t j = 0; j < rows; ++j) checksum_of(panel * ROWS + j) = checksum(index_keys + j * bytes, bytes);
    }

    // First of the entries, of `bytes` bytes each, that has changed since it was quantized, without `invalidate`; -1 if none.
    int64_t stale_row(const uint8_t* entries, int64_t bytes) {
        for (int64_t panel = 0; !checksums_.empty() && panel < panels_; ++panel)
            for (int64_t row = panel * ROWS; row < panel * ROWS + valid_rows(panel); ++row)
                if (checksum_of(row) != checksum(entries + row * bytes, bytes)) return row;
        return -1;
    }

    void count_quantized(int64_t rows) { quantized_rows_ += rows; }
    int64_t quantized_rows() const { return quantized_rows_; }  // since construction

   private:
    uint64_t& checksum_of(int64_t row) { return checksums_[static_cast<size_t>(row)]; }

    static uint64_t checksum(const uint8_t* row, int64_t bytes) {  // FNV-1a over 32-bit words
        uint64_t sum = 0xcbf29ce484222325;
        for (int64_t i = 0; i < bytes; i += 4) {
            uint32_t bits = 0;
            std::memcpy(&bits, row + i, static_cast<size_t>(std::min<int64_t>(sizeof bits, bytes - i)));
            sum = (sum ^ bits) * 0x100000001b3;
        }
        return sum;
    }

    int64_t panels_, words_ = 0, quantized_rows_ = 0;
    std::vector<uint8_t> valid_;
    std::vector<uint64_t> checksums_;
    std::vector<Bounds> bounds_;
    Aligned<uint16_t> memory_;
    Aligned<float> steps_;
};

}  // namespace dsv4
